"""What autograd and its users do around a call whose frames are planned."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import re2fx
from re2fx.errors import StoredOnlyError
from re2fx.rerun import watching

from .compare import weighted
from .framed import Layer, Mixed, Transformer, mixed
from .models import Twice
from .situations.harness import Run, compare, double, example

X = example(2, 7, 4)
KINDS: dict[str, dict[str, Any]] = {
    "lowest": {"slices": 7},
    "half": {"stored": 0.5},
}
kinds = pytest.mark.parametrize("kind", KINDS)
network = cache(mixed)


def chosen(name: str, kind: str) -> Mixed:
    """A network with frames of some kinds."""
    net = network(name)
    net.choose(**KINDS[kind])
    return net


@pytest.fixture(autouse=True)
def _nothing_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("re2fx.rerun.SMALL", 0)


@kinds
@pytest.mark.parametrize("name", ["written attention", "dropout", "convolutions"])
def test_double_backward(name: str, kind: str) -> None:
    def situation(run: Run, model: nn.Module, inputs: Any) -> Any:
        output = run(*inputs)
        (gradient,) = torch.autograd.grad(weighted(output), inputs, create_graph=True)
        (weighted(output) + gradient.square().sum()).backward()
        return output

    net = chosen(name, kind)
    compare(net.pair, *net.inputs, situation=situation, tolerance=1e-9)


@kinds
@pytest.mark.parametrize("name", ["written attention", "dropout", "convolutions"])
def test_two_backwards_through_one_graph(name: str, kind: str) -> None:
    def situation(run: Run, model: nn.Module, inputs: Any) -> Any:
        output = run(*inputs)
        weighted(output).backward(retain_graph=True)
        output.square().sum().backward(retain_graph=True)
        weighted(output.sin()).backward()
        return output

    net = chosen(name, kind)
    compare(net.pair, *net.inputs, situation=situation)


@kinds
@pytest.mark.parametrize("asked", ["layers.0.norm1.weight", "stem.0.weight", "out.weight"])
def test_a_backward_for_some_and_then_the_rest(asked: str, kind: str) -> None:
    def situation(run: Run, model: nn.Module, inputs: Any) -> Any:
        output, some = run(*inputs), model.get_parameter(asked)
        weighted(output).backward(retain_graph=True, inputs=[some])
        rest = [p for p in model.parameters() if p is not some]
        weighted(output).backward(inputs=[*inputs, *rest])
        return output

    compare(chosen("dropout", kind).pair, X, situation=situation)


class Tapped(nn.Module):
    """States of the stream are read outside."""

    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        self.layers, self.head = Transformer(depth=depth).layers, nn.Linear(8, 32)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        taps = []
        for layer in self.layers:
            x = layer(x)
            taps.append(self.head(x).sigmoid())
        return tuple(taps)


@kinds
@pytest.mark.parametrize("order", [(3, 0), (0, 3), (1, 2, 0, 3)])
def test_taps_used_one_after_the_other(order: tuple[int, ...], kind: str) -> None:
    """What a backward leaves of the graph can be differentiated later."""
    net = taps(kind)

    def situation(run: Run, model: nn.Module, inputs: Any) -> Any:
        outputs = run(*inputs)
        for place in order:
            weighted(outputs[place]).backward(retain_graph=True)
        return outputs

    def freeing(run: Run, model: nn.Module, inputs: Any) -> Any:
        first, *others = run(*inputs)
        weighted(others.pop(0)).backward(inputs=list(model.get_submodule("layers.1").parameters()))
        weighted(first).backward()
        return first

    compare(net.pair, *net.inputs, situation=situation)
    compare(net.pair, *net.inputs, situation=freeing)


@cache
def tapped() -> Mixed:
    return Mixed.of(double(Tapped()), example(2, 5, 8))


def taps(kind: str) -> Mixed:
    """With frames of some kinds."""
    net = tapped()
    net.choose(**KINDS[kind])
    return net


class Fork(nn.Module):
    """Two readers of the middle of a chain, one of which is differentiated first."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.head = Transformer(depth=3).layers, nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.layers[0](x)
        middle = self.head(x).sin()
        return middle, self.layers[2](self.layers[1](x))


@kinds
def test_a_tap_after_the_graph_behind_it_was_freed(kind: str) -> None:
    """The first backward stops in front of what both share, which stays."""
    net = Mixed.of(double(Fork()), example(2, 5, 8))
    net.choose(**KINDS[kind])

    def situation(run: Run, model: nn.Module, inputs: Any) -> Any:
        middle, end = run(*inputs)
        late = list(model.get_submodule("layers.2").parameters())
        weighted(end).backward(inputs=late)
        weighted(middle).backward()
        return middle

    compare(net.pair, *net.inputs, situation=situation)


@kinds
@pytest.mark.parametrize("name", ["written attention", "dropout", "convolutions"])
def test_two_forwards_before_a_backward(name: str, kind: str) -> None:
    def situation(run: Run, model: nn.Module, inputs: Any) -> Any:
        first, second = run(*inputs), run(inputs[0].roll(1, 0))
        (weighted(first) + weighted(second.sin())).backward()
        return first, second

    net = chosen(name, kind)
    compare(net.pair, *net.inputs, situation=situation)


@kinds
def test_a_backward_in_another_thread(kind: str) -> None:
    def situation(run: Run, model: nn.Module, inputs: Any) -> Any:
        output = run(*inputs)
        weighted(output).backward(retain_graph=True)
        thread = threading.Thread(target=lambda: weighted(output).backward())
        thread.start()
        thread.join()
        return output

    compare(chosen("dropout", kind).pair, X, situation=situation)


def test_backwards_in_two_threads_at_once() -> None:
    """Through graphs of one module that draws no random numbers."""
    net = chosen("written attention", "lowest")
    torch.manual_seed(0)
    outputs = [net.pair.reversible(X) for _ in range(4)]
    torch.manual_seed(0)
    expected = [net.pair.store(X) for _ in range(4)]
    parameters = list(net.rev.parameters())
    wanted = [torch.autograd.grad(weighted(out), parameters) for out in expected]
    got: dict[int, Any] = {}

    def one(index: int) -> None:
        got[index] = torch.autograd.grad(weighted(outputs[index]), parameters)

    for pair in ((0, 1), (2, 3)):
        threads = [threading.Thread(target=one, args=(index,)) for index in pair]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for index, gradients in enumerate(wanted):
        torch.testing.assert_close(got[index], gradients, rtol=1e-9, atol=1e-10)


@kinds
def test_hooks(kind: str) -> None:
    """Each once per call and in its order, with the gradients of stored execution."""
    seen: list[Any] = []

    def situation(run: Run, model: nn.Module, inputs: Any) -> Any:
        module = model.get_submodule("layers.0.mlp.0")
        handles = [
            module.register_forward_hook(lambda m, args, out: seen.append(("forward", out.sum()))),
            module.register_full_backward_hook(lambda m, i, o: seen.append(("back", weighted(o)))),
            model.get_submodule("stem.3").register_forward_pre_hook(
                lambda m, args: seen.append(("stem", args[0].sum()))
            ),
        ]
        output = run(*inputs)
        output.register_hook(lambda gradient: seen.append(("tensor", gradient.sum())))
        weighted(output).backward()
        for handle in handles:
            handle.remove()
        return output

    net = chosen("written attention", kind)
    compare(net.pair, X, situation=situation)
    half = len(seen) // 2
    stored, planned = seen[:half], seen[half:]
    assert [name for name, _ in stored] == [name for name, _ in planned]
    assert [name for name, _ in stored] == ["stem", "forward", "tensor", "back"]
    for (_, a), (_, b) in zip(stored, planned, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@kinds
def test_an_optimizer_that_steps_in_the_backward(kind: str) -> None:
    left = []
    for run in network("written attention").choose(**KINDS[kind]):
        net = Mixed.of(double(Transformer()), X)
        handles = []
        for parameter in net.rev.parameters():
            optimizer = torch.optim.SGD([parameter], 0.05, momentum=0.9)

            def step(p: Tensor, optimizer: torch.optim.Optimizer = optimizer) -> None:
                optimizer.step()
                optimizer.zero_grad()

            handles.append(parameter.register_post_accumulate_grad_hook(step))
        stored = run is network("written attention").pair.store
        both = net.choose(**KINDS[kind])
        for _ in range(3):
            weighted((both.store if stored else both.reversible)(X)).backward()
        left.append([p.detach().clone() for p in net.rev.parameters()])
    torch.testing.assert_close(*left, rtol=1e-9, atol=1e-10)


class Reads(nn.Module):
    """A module with such a function."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.into(x)
        out: Tensor = self.out(Twice.apply(hidden.sin(), hidden.cos()).sigmoid())
        return out


class Around(nn.Module):
    """Such modules in a stem, in branches and in a head."""

    def __init__(self, inner: Callable[[int], nn.Module] = Reads, depth: int = 3) -> None:
        super().__init__()
        self.stem, self.head = inner(8), inner(8)
        self.norms = nn.ModuleList([nn.LayerNorm(8) for _ in range(depth)])
        self.inner = nn.ModuleList([inner(8) for _ in range(depth)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for norm, inner in zip(self.norms, self.inner, strict=True):
            x = x + inner(norm(x))
        out: Tensor = self.head(x)
        return out


@kinds
def test_a_function_that_reads_twice(kind: str) -> None:
    net = Mixed.of(double(Around()), example(2, 5, 8), leaves=[Reads])
    compare(net.choose(**KINDS[kind]), *net.inputs)


@kinds
def test_shared_weights(kind: str) -> None:
    """Between blocks, and between a block and the segments."""
    model: Any = Transformer(depth=3)
    model.layers[2] = model.layers[0]
    model.head.weight = nn.Parameter(model.stem[0].weight.detach().repeat(1, 2))
    model.layers[1].mlp[0].weight = model.layers[1].mlp[3].weight = nn.Parameter(torch.randn(8, 8))
    model.layers[1].mlp[0].bias = nn.Parameter(torch.randn(8))
    model.layers[1].mlp[0].out_features = 8
    model.layers[1].mlp[3].in_features = 8
    net = Mixed.of(double(model), X)
    compare(net.choose(**KINDS[kind]), X)


@kinds
@pytest.mark.parametrize("frozen", ["layers.0", "layers", "stem", "norm", "layers.1.mlp.0"])
def test_frozen_parameters(frozen: str, kind: str) -> None:
    model = double(Transformer(depth=2, dropout=0.2))
    net = Mixed.of(model, X)
    net.choose(**KINDS[kind])
    model.get_submodule(frozen).requires_grad_(False)
    compare(net.pair, X)
    for run in net.pair:  # neither does the input
        torch.manual_seed(0)
        weighted(run(X)).backward()


@kinds
def test_an_input_that_needs_no_gradient(kind: str) -> None:
    net = chosen("dropout", kind)
    left = []
    for run in net.pair:
        torch.manual_seed(0)
        net.rev.zero_grad()
        weighted(run(X)).backward()
        left.append([p.grad for p in net.rev.parameters()])
    torch.testing.assert_close(*left, rtol=1e-9, atol=1e-10)
    net.rev.zero_grad()


@kinds
def test_without_gradients(kind: str) -> None:
    """Nothing is planned or kept; in between and afterwards too."""
    net = chosen("written attention", kind)
    expected = net.pair.store(X)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(net.pair.reversible(X), expected, rtol=1e-12, atol=1e-12)
    compare(net.pair, X)


def test_transforms_of_functions() -> None:
    """Values and forward derivatives; others are refused."""
    net = chosen("written attention", "lowest")
    rows = torch.stack([X, X + 1])
    both = [torch.func.vmap(run)(rows) for run in net.pair]
    torch.testing.assert_close(*both, rtol=1e-12, atol=1e-12)
    jvps = [torch.func.jvp(run, (X,), (X.cos(),)) for run in net.pair]
    torch.testing.assert_close(*jvps, rtol=1e-12, atol=1e-12)
    with pytest.raises(StoredOnlyError):
        torch.func.grad(lambda x: weighted(net.pair.reversible(x)))(X)


@kinds
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_of_the_users_own(reentrant: bool, kind: str) -> None:
    def situation(run: Run, model: nn.Module, inputs: Any) -> Any:
        around = run if run is net.pair.store else partial(checkpoint, run, use_reentrant=reentrant)
        output = around(*inputs)
        weighted(output).backward()
        return output

    net = chosen("dropout", kind)
    compare(net.pair, X, situation=situation)


def test_states_move_with_the_backward_only_if_nobody_can_ask() -> None:
    """With a graph that is retained, a second backward starts where the first did."""
    net = chosen("written attention", "lowest")
    parameters = list(net.rev.parameters())
    output = net.pair.reversible(X)
    names: list[list[str]] = [[], []]
    for number in (0, 1):
        with watching(names[number].append):
            torch.autograd.grad(weighted(output), parameters, retain_graph=True)
    assert names[0] == names[1]


def test_layers_alone() -> None:
    """A module is not required to have a stem or a head."""
    net = Mixed.of(double(nn.Sequential(*[Layer(8) for _ in range(2)])), example(2, 5, 8))
    for kind in KINDS.values():
        compare(net.choose(**kind), *net.inputs)
    assert isinstance(net.rev, re2fx.RewiredModule)
