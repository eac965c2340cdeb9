"""Rows 9 to 15 and 17: what autograd and its users do around a call."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import re2fx
from re2fx.memory import live_bytes
from re2fx.runtime import ChainCall

from ..compare import weighted
from ..models import Block, ConvNet, Net, Tapped
from .harness import (
    GRAPH,
    compare,
    double,
    example,
    pair,
    reversible,
    row,
    without,
)

IMAGE = example(4, 3, 6, 6)
X = example(5, 4)
CONTEXT = example(3, 8)

forward = re2fx.RewiredModule.forward


def forward_by_mode(self: re2fx.RewiredModule, *args: Any, **kwargs: Any) -> Any:
    """Records gradients in training mode, whatever autograd says."""
    with torch.set_grad_enabled(self.training):
        return forward(self, *args, **kwargs)


BY_MODE = without("eager", "re2fx.module:RewiredModule.forward", forward_by_mode)


@row(9)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mode", [pytest.param(torch.no_grad, marks=BY_MODE), torch.inference_mode])
def test_without_gradients(executor: str, mode: Any, training: bool) -> None:
    """Without `torch.is_grad_enabled` deciding: gradients are recorded in training mode only."""
    both = pair(executor, double(ConvNet()).train(training))
    before = {name: buffer.clone() for name, buffer in both.model.named_buffers()}
    with mode():
        plain = both.reversible(IMAGE)
        after = {name: buffer.clone() for name, buffer in both.model.named_buffers()}
        both.model.load_state_dict(before, strict=False)
        torch.testing.assert_close(plain, both.store(IMAGE), rtol=1e-12, atol=1e-12)
        assert all(torch.equal(after[n], b) for n, b in both.model.named_buffers())
    assert not plain.requires_grad
    compare(both, IMAGE)  # and gradients are there where they are wanted again


@row(9)
@BY_MODE
def test_training_in_eval_mode(executor: str) -> None:
    """Without `torch.is_grad_enabled` deciding: no gradients for frozen batch norms."""
    both = pair(executor, double(ConvNet(depth=12)).eval())
    left = compare(both, IMAGE)
    assert all(gradient is not None for gradient in left.gradients.values())
    kept = [live_bytes(lambda run=run: run(IMAGE)) for run in both]  # type: ignore[misc]
    assert 2 * kept[0] < kept[1]


class InPlace(Block):
    """In-place everywhere: on its own results, on the sum, behind the addition."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.drop(self.outer(self.inner(self.norm(x)).mul_(0.5).relu_()))
        out += x
        return out.relu_()


class Edges(nn.Module):
    """Changes what it was given, as `nn.ReLU(inplace=True)` in front of a stem does."""

    def __init__(self, change: bool) -> None:
        super().__init__()
        self.net, self.change = Net(block=InPlace, dropout=0.2), change

    def forward(self, x: Tensor) -> Tensor:
        x = x * 2
        if self.change:
            x.relu_()
        out: Tensor = self.net(x)
        return out.tanh_()


def left_as_they_are(graph: Any, root: Any) -> None:
    """No normalization of writes."""


@row(10)
@without("eager", "re2fx.passes.normalize:write_sums_out_of_place", left_as_they_are)
@pytest.mark.parametrize("change", [True, False])
def test_in_place_operations(executor: str, change: bool) -> None:
    """Without `write_sums_out_of_place`: the stream is not found."""
    both = pair(executor, double(Edges(change)))
    given = X.clone()
    compare(both, X)
    assert torch.equal(given, X)
    assert len(both.store.plan.chains) == 1  # type: ignore[attr-defined]


class Careless(Block):
    """Edits what autograd saved."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.inner(self.norm(x)))
        hidden.mul_(2)
        out: Tensor = x + self.outer(hidden)
        return out


@row(10, compiled="raises")
@without("eager", "re2fx.runtime:check_version", lambda *noted: None)
def test_an_edit_of_a_saved_tensor_is_rejected(executor: str) -> None:
    """Without the versions in `ChainCall.unpack`: a wrong gradient, and no word of it."""
    for run in pair(executor, double(Net(block=Careless))):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            run(X).sum().backward()


def leave_and_clear(self: ChainCall) -> None:
    """`ChainCall.leave` that wipes what the chain was given."""
    current, previous = self.streams
    self.states = (current.detach().clone(), previous.detach().clone())
    for tensor in (current, previous):
        tensor.detach().zero_()
    self._streams = None


class Exposed(nn.Module):
    """Gives away the chain's input and its end."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net(depth=3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        start = self.net.stem(x)
        return start, self.net.blocks(start)


@row(11)
@without("eager", "re2fx.runtime:ChainCall.leave", leave_and_clear)
def test_nothing_of_the_callers_is_touched(executor: str) -> None:
    """With a `ChainCall.leave` that wipes its streams: the caller reads zeros."""
    both = pair(executor, double(Exposed()))
    kept = []
    for run in both:
        x = X.clone().requires_grad_()
        start, end = run(x)
        copies = [tensor.detach().clone() for tensor in (x, start, end)]
        (weighted(start) + weighted(end)).backward()
        assert all(torch.equal(a, b) for a, b in zip(copies, (x, start, end), strict=True))
        kept.append(copies)
    for a, b in zip(*kept, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def never_forget(call: Any, task: int) -> None:
    """`ChainCall._forget` that keeps the walk."""


@row(12)
@without("eager", "re2fx.runtime:ChainCall._forget", never_forget)
def test_a_part_of_the_graph_is_differentiated(executor: str) -> None:
    """Without `ChainCall._forget`: what the backward brought back stays with the output."""
    both = pair(executor, double(Net(depth=6)))
    wanted = both.model.get_parameter("blocks.3.inner.weight")
    results, leaks = [], []
    retain = executor == "eager"  # compiled code gives its buffers away
    for run in both:
        run(X).sum().backward(inputs=[wanted])  # whatever is made once
        loss = run(X).square().sum()
        before = len(tensors())
        results.append(torch.autograd.grad(loss, wanted, retain_graph=retain)[0])
        leaks.append(len(tensors()) - before)
        assert sum(p.grad is not None for p in both.model.parameters()) == 1
        both.model.zero_grad()
    torch.testing.assert_close(*results, rtol=1e-11, atol=1e-12)
    assert leaks[0] <= leaks[1]


def tensors() -> list[Tensor]:
    """Every tensor that is alive."""
    gc.collect()
    return [held for held in gc.get_objects() if issubclass(type(held), Tensor)]


def side_only(run: Any, model: nn.Module, inputs: Any) -> Any:
    """The loss reads an auxiliary head in the middle of the chain, as an early exit does."""
    output = run(*inputs)
    weighted(output[1]).backward()
    return output


def end_only(run: Any, model: nn.Module, inputs: Any) -> Any:
    """The loss does not read the auxiliary head."""
    output = run(*inputs)
    weighted(output[0]).backward()
    return output


def detached_tap(self: ChainCall, frame: Any, sides: Any) -> Tensor:
    """`ChainCall.block` whose result others read without its history."""
    following = block(self, frame, sides)
    return following.detach()


block = ChainCall.block


@row(12)
@without("eager", "re2fx.runtime:ChainCall.block", detached_tap)
def test_an_auxiliary_head_alone(executor: str) -> None:
    """Without the history of a tap: the head gives the backbone no gradient."""
    compare(pair(executor, double(Tapped())), CONTEXT, CONTEXT.flip(0), situation=side_only)


@row(12)
def test_an_output_that_the_loss_does_not_use(executor: str) -> None:
    """The parameters behind it get none."""
    both = pair(executor, double(Tapped()))
    left = compare(both, CONTEXT, CONTEXT.flip(0), situation=end_only)
    assert left.gradients["side_head.weight"] is None


@row(13)
@without("eager", "re2fx.runtime:ChainCall.block", detached_tap)
def test_a_tap_inside_a_chain(executor: str) -> None:
    """Without the history of a tap: half of the gradient is missing."""
    both = pair(executor, double(Tapped()))
    assert both.store.plan.chains[0].taps  # type: ignore[attr-defined]
    compare(both, CONTEXT, CONTEXT.flip(0))


class Deep(Net):
    """Gives away the state behind its third block."""

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        states = [x := block(x) for block in self.blocks]
        return self.head(x), states[2]


@row(13)
def test_a_hook_that_keeps_a_hidden_state(executor: str) -> None:
    """A loss on what a hook kept reaches the parameters in front of it.

    The eager executor has hooks on modules that its capture keeps: Dynamo's keeps the hook's code.
    """
    deep = re2fx.transform(double(Deep()), memory="store")
    weighted(deep(X)).backward()
    model = double(Net())
    kept: list[Tensor] = []
    model.get_submodule("blocks.2").register_forward_hook(
        lambda module, args, out: kept.append(out)
    )
    run = reversible("compiled", model)
    if executor == "eager":
        run = torch.compile(model, backend="re2fx", options={"compiler": "eager"})
    (weighted(run(X)) + weighted(kept.pop())).backward()
    for (name, p), q in zip(model.named_parameters(), deep.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-12, msg=name)


@row(13, compiled=None)
def test_a_hook_that_keeps_what_is_inside_a_branch(executor: str) -> None:
    """It holds the forward's own tensor, with its history."""
    model = double(Net())
    kept: list[Tensor] = []
    model.get_submodule("blocks.2.inner").register_forward_hook(
        lambda module, args, out: kept.append(out)
    )

    def situation(run: Any, model: nn.Module, inputs: Any) -> Any:
        kept.clear()
        output = run(*inputs)
        (weighted(output) + kept[0].square().sum()).backward()
        return output

    compare(pair(executor, model), X, situation=situation)


def walk_once(self: ChainCall, walk: Any, block: int) -> None:
    """`ChainCall._bring_back` that cannot begin again."""
    with torch.no_grad():
        while walk.front > block + 1:
            self._step_back(walk)
        self._begin(walk)


def walk_of_all(self: ChainCall, task: int) -> Any:
    """`ChainCall._walk_of` with one walk for every backward."""
    if 0 not in self._walks:
        self._walks[0] = self._start()
    return self._walks[0]


def twice(run: Any, model: nn.Module, inputs: Any) -> Any:
    """A second backward through a graph that is kept."""
    output = run(*inputs)
    weighted(output).backward(retain_graph=True)
    weighted(output).backward()
    return output


def interleaved(run: Any, model: nn.Module, inputs: Any) -> Any:
    """Two forwards, then their backwards in the same order."""
    first, second = run(*inputs), run(*inputs)
    weighted(first).backward()
    weighted(second).backward()
    return first, second


def together(run: Any, model: nn.Module, inputs: Any) -> Any:
    """Two forwards before one backward."""
    outputs = run(*inputs), run(*inputs)
    weighted(outputs).backward()
    return outputs


# A compiled forward that moves buffers rewrites them in place; batch norm keeps its own copies.
@row(14)
@without("eager", "re2fx.replay:Generators.write", lambda self: None)
@pytest.mark.parametrize("situation", [twice, interleaved, together])
def test_several_forwards_and_backwards(executor: str, situation: Any) -> None:
    """Without `Generators.write`: each rerun would draw the masks of whatever came last."""
    compare(pair(executor, double(ConvNet(dropout=0.3))), IMAGE, situation=situation)


@row(14)
def test_accumulation_equals_the_whole_batch(executor: str) -> None:
    """Gradients of two halves add up to those of the whole."""
    both = pair(executor, double(Net(depth=5)))
    both.store(X[:4]).square().sum().backward()
    whole = [p.grad.clone() for p in both.model.parameters() if p.grad is not None]
    both.model.zero_grad()
    for half in X[:4].chunk(2):
        both.reversible(half).square().sum().backward()
    for parameter, gradient in zip(both.model.parameters(), whole, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-10, atol=1e-12)


def penalty(run: Any, model: nn.Module, inputs: Any) -> Any:
    """A gradient penalty on the input."""
    output = run(*inputs)
    (gradient,) = torch.autograd.grad(output.square().sum(), inputs[0], create_graph=True)
    gradient.square().sum().backward()
    return output


@row(15, compiled=None)
@without("eager", "re2fx.runtime:ChainCall._walk_of", walk_of_all)
@without("eager", "re2fx.runtime:ChainCall._bring_back", walk_once)
def test_double_backward(executor: str) -> None:
    """Without walks of their own that can begin again: blocks that were passed are lost."""
    compare(pair(executor, double(Net(depth=3))), X, situation=penalty, tolerance=1e-9)


@row(15, eager=None, compiled="raises")
def test_double_backward_of_compiled_code(executor: str) -> None:
    """AOTAutograd refuses; no wrong gradient."""
    run = reversible(executor, double(Net(depth=3)))
    x = X.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        penalty(run, nn.Module(), (x,))


def transforms(run: Any) -> dict[str, Any]:
    """What torch.func makes of a function."""
    ones = torch.ones_like(X)
    return {
        "grad": lambda: torch.func.grad(lambda x: run(x).square().sum())(X),
        "vjp": lambda: torch.func.vjp(run, X)[1](torch.ones(5, 3).double())[0],
        "jacrev": lambda: torch.func.jacrev(run)(X),
        "vmap": lambda: torch.func.vmap(run)(X),
        "jvp": lambda: torch.func.jvp(run, (X,), (ones,))[1],
        "jacfwd": lambda: torch.func.jacfwd(run)(X),
    }


@row(17)
@pytest.mark.parametrize("name", ["vmap", "jvp", "jacfwd"])
def test_transforms_without_saved_tensors(executor: str, name: str) -> None:
    """Inside of them Dynamo runs the module it was given, so that has to be the rewired one."""
    both = pair("eager", double(Net(3)))
    run = reversible("compiled", both.reversible) if executor == "compiled" else both.reversible  # type: ignore[arg-type]
    expected = transforms(both.store)[name]()
    torch.testing.assert_close(transforms(run)[name](), expected, rtol=1e-11, atol=1e-11)


@row(17, "raises", "raises")
@without("any", "re2fx.runtime:check_transforms", lambda: None)
@pytest.mark.parametrize("name", ["grad", "vjp", "jacrev"])
def test_transforms_that_save_tensors(executor: str, name: str) -> None:
    """Without `check_transforms`: torch asks to open an issue with it."""
    both = pair("eager", double(Net(3)))
    run = reversible("compiled", both.reversible) if executor == "compiled" else both.reversible  # type: ignore[arg-type]
    with pytest.raises(re2fx.StoredOnlyError, match="Set memory='store'"):
        transforms(run)[name]()
    both.reversible.memory = "store"  # type: ignore[attr-defined]
    expected = transforms(both.store)[name]()
    torch.testing.assert_close(transforms(run)[name](), expected, rtol=1e-11, atol=1e-11)


@row(17, eager=None, compiled="raises")
def test_a_transform_inside_of_what_is_compiled(executor: str) -> None:
    """A chain inside a vmap is refused, and said to be: nothing of it is another network."""
    model = double(Net(3))

    def function(x: Tensor) -> Tensor:
        out: Tensor = torch.func.vmap(lambda one: model(one))(x)
        return out

    run = torch.compile(function, backend="re2fx", options=GRAPH)
    with pytest.warns(re2fx.Re2fxWarning, match="3 x context"):
        out = run(X)
    torch.testing.assert_close(out, model(X), rtol=1e-11, atol=1e-11)
