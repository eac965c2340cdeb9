"""PLACEHOLDER"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.flop_counter import FlopCounterMode

from re2fx.memory import live_bytes, saved_bytes

from .chains import Branch, Chain, Parts, X, calls, chain, of, reset
from .compare import weighted
from .models import Net
from .situations.harness import Run, compare, double, example, pair


# Inputs, outputs, gradients


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("wanted", [True, False])
def test_inputs_with_and_without_a_gradient(wanted: bool, named: bool) -> None:
    """By position and by name."""

    def situation(run: Run, model: nn.Module, inputs: Any) -> Any:
        x = inputs[0] if wanted else inputs[0].detach()
        output = run(x=x) if named else run(x)
        weighted(output).backward()
        return output

    both = of(torch.tanh)
    left = compare(both, X, situation=situation)
    assert (left.gradients["input 0"] is None) == (not wanted)
    assert left.gradients["branches.0.inner.weight"] is not None


def test_backward_and_grad_agree() -> None:
    """What `torch.autograd.grad` returns is what `backward` adds up."""
    both = of(torch.tanh)
    parameters = list(both.model.parameters())
    weighted(both.reversible(X)).backward()
    grads = torch.autograd.grad(weighted(both.reversible(X)), parameters)
    for parameter, grad in zip(parameters, grads, strict=True):
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, grad)


class Structured(Parts):
    """Takes and returns more than tensors."""

    def forward(self, given: Any, scale: int = 1, extra: Any = None) -> Any:
        x = self.stem(given["x"]) * scale
        for branch in self.branches:
            x = x + branch(x) * given["masks"][0]
        return {"results": [x, (x.square(),)], "scale": scale, "extra": extra, "sure": True}, given


def test_structures_and_what_is_no_tensor() -> None:
    """Dicts, tuples, numbers, None and a bool, into the model and out of it."""
    mask = example(4)

    def situation(run: Run, model: nn.Module, inputs: Any) -> Any:
        given = {"x": inputs[0], "masks": (mask,)}
        result, same = run(given, 3)
        assert result["scale"] == 3
        assert result["extra"] is None
        assert result["sure"] is True
        assert same["x"] is inputs[0]
        assert same["masks"][0] is mask
        first, (second,) = result["results"]
        (weighted(first) + weighted(second)).backward()
        return first, second

    model = double(Structured(*[Branch() for _ in range(3)]))
    both = pair("eager", model, {"x": X, "masks": (mask,)}, 3, leaves=[Branch])
    compare(both, X, situation=situation)


class Numbers(Parts):
    """Takes no tensor."""

    def forward(self, scale: float) -> Tensor:
        x = self.stem.weight * scale
        for branch in self.branches:
            x = x + branch(x)
        return x


def test_no_tensor_among_the_inputs() -> None:
    """The parameters have gradients all the same."""
    both = pair("eager", double(Numbers(Branch(), Branch())), leaves=[Branch])
    compare(both, 0.7)


class Two(Parts):
    """Hands its second input on."""

    def forward(self, x: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        for branch in self.branches:
            x = x + branch(x) * other
        return x, other


@pytest.mark.parametrize("trained", [0, 1])
def test_one_of_two_inputs_has_a_gradient(trained: int) -> None:
    """An output that needs none does not get one."""

    def situation(run: Run, model: nn.Module, inputs: Any) -> Any:
        inputs[1 - trained].requires_grad_(False)
        outputs = run(*inputs)
        assert outputs[1].requires_grad == (trained == 1)
        weighted(outputs[0]).backward()
        return outputs

    both = pair("eager", double(Two(Branch(), Branch())), leaves=[Branch])
    left = compare(both, X, X + 1, situation=situation)
    assert left.gradients[f"input {1 - trained}"] is None


def silent(x: Tensor) -> Tensor:
    """Without a gradient."""
    with torch.no_grad():
        return torch.tanh(x)


def partly(x: Tensor) -> Tensor:
    """Gradients off, on again inside, and off by the switch."""
    with torch.no_grad():
        y = x.exp()
        with torch.enable_grad():
            z = x.sin()
    with torch.set_grad_enabled(False):
        return z.detach() + y + (x.cos() if x.requires_grad else x)


def mixed(x: Tensor) -> Tensor:
    """One factor detached, one not."""
    with torch.no_grad():
        scale = x.sigmoid()
    return x.detach().cos() * x.sin() * scale


@pytest.mark.parametrize("function", [silent, partly, mixed])
def test_detached_branches(function: Callable[[Tensor], Tensor]) -> None:
    """Grad mode changes inside of a branch; three steps, one like the other."""
    both = of(function)
    for _ in range(3):
        compare(both, X)
    assert torch.is_grad_enabled()


def test_nothing_needs_a_gradient() -> None:
    """Frozen from end to end: the output has no history, and no branch is run again."""
    both = of(torch.tanh)
    both.model.requires_grad_(False)
    for run in both:
        assert not run(X).requires_grad
    assert calls(both) == [2, 2, 2]


def test_hooks_of_a_parameter_inside_and_outside() -> None:
    """Tied into the stem, the branches and the end: one gradient, so the hook runs once."""
    branches = [Branch() for _ in range(3)]
    model = Ends(*branches)
    for branch in branches:
        branch.inner.weight = model.stem.weight
    both = pair("eager", double(model), leaves=[Branch])
    seen: list[Tensor] = []
    model.stem.weight.register_hook(seen.append)
    compare(both, X)
    assert len(seen) == 2
    torch.testing.assert_close(*seen, rtol=1e-11, atol=1e-12)


class Ends(Chain):
    """Ends with the weight it began with."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) @ self.stem.weight


class Keep(torch.autograd.Function):
    """Scales by a saved tensor, and shows what the backward finds of it."""

    found: list[Tensor] = []  # noqa: RUF012

    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: Tensor) -> Tensor:
        ctx.save_for_backward(kept)
        return x * kept

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        (kept,) = ctx.saved_tensors
        Keep.found.append(kept)
        return grad * kept, None


class Scaled(nn.Module):
    """A branch that saves a parameter, or a tensor it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4), requires_grad=False)

    def forward(self, x: Tensor, given: Tensor | None = None) -> Tensor:
        out: Tensor = Keep.apply(x, self.scale if given is None else given)
        return out


class Given(Parts):
    """Hands a tensor to its branches."""

    def forward(self, x: Tensor, given: Tensor) -> Tensor:
        x = self.stem(x)
        for branch in self.branches:
            x = x + branch(x, given)
        return x


def test_a_saved_tensor_is_the_one_that_was_saved() -> None:
    """A parameter is itself, and what a branch was given has its memory: nothing is copied."""
    both = chain(Scaled(), Scaled())
    Keep.found.clear()
    compare(both, X)
    scales = [branch.scale for branch in both.model.branches]  # type: ignore[union-attr]
    assert all(a is b for a, b in zip(Keep.found, scales[::-1] * 2, strict=True))

    other = pair("eager", double(Given(Scaled(), Scaled())), leaves=[Scaled])
    given = example(4)
    Keep.found.clear()
    other.reversible(X, given).sum().backward()
    assert [found.data_ptr() for found in Keep.found] == [given.data_ptr()] * 2
    Keep.found.clear()


# How often a branch runs


def plain(x: Tensor) -> Tensor:
    """Saves nothing."""
    return x.clone()


def test_branches_run_again_once() -> None:
    """In the backward, and then in each further one; not without gradients, not when stored."""
    both = of(torch.tanh)
    output = both.reversible(X)
    assert calls(both) == [1, 1, 1]
    for times in (2, 3, 4):
        output.sum().backward(retain_graph=True)
        assert calls(both) == [times] * 3
    both.store(X).sum().backward()
    with torch.no_grad():
        both.reversible(X)
    assert calls(both) == [6, 6, 6]


class Quiet(nn.Module):
    """A branch that saves nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.shift, self.calls = nn.Parameter(torch.zeros(4)), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * 2.0 + self.shift


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [("qqq", [1, 1, 1]), ("qqb", [1, 1, 2]), ("bqq", [2, 2, 2]), ("qbq", [1, 2, 2])],
)
def test_nothing_runs_again_that_nothing_asks_for(kinds: str, expected: list[int]) -> None:
    """The walk ends at the first branch that saved something; none begins where none did."""
    both = chain(*[Branch() if kind == "b" else Quiet() for kind in kinds])
    both.reversible(X).sum().backward()
    assert calls(both) == expected
    reset(both)
    compare(both, X)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_only_the_blocks_behind_a_wanted_gradient(index: int) -> None:
    """`inputs=` of a backward ends the walk."""
    both = of(torch.tanh)
    wanted = both.model.get_parameter(f"branches.{index}.inner.weight")
    both.reversible(X).sum().backward(inputs=[wanted])
    assert calls(both) == [1] * index + [2] * (3 - index)
    got = wanted.grad
    wanted.grad = None
    both.store(X).sum().backward(inputs=[wanted])
    torch.testing.assert_close(got, wanted.grad, rtol=1e-11, atol=1e-12)


def test_the_first_branch_stops_when_all_is_there() -> None:
    """What only its result needs is not run: nothing lies before it."""
    ends: list[Tensor] = []

    def function(x: Tensor) -> Tensor:
        out = torch.tanh(x)
        ends.append(out)
        return out + 1.0

    both = of(function)
    both.reversible(X).sum().backward()
    assert calls(both) == [2, 2, 2]
    assert len(ends) == 3 + 2


def test_arithmetic_of_a_backward() -> None:
    """One branch more than stored execution for every block, and half of the first."""

    def flops(run: Run) -> int:
        with FlopCounterMode(display=False) as counter:
            weighted(run(X)).backward()
        return counter.get_total_flops()

    both = pair("eager", double(Net(depth=5)))
    linear = 2 * 5 * 8 * 16
    assert flops(both.reversible) - flops(both.store) == (2 * 5 - 1) * linear


def test_a_saved_tensor_is_looked_at_outside_of_a_backward() -> None:
    """Each look runs the branches behind it again and leaves nothing; a backward frees it."""
    seen: list[tuple[Any, Tensor]] = []

    def function(x: Tensor) -> Tensor:
        out = torch.exp(x * 0.1)
        seen.append((out.grad_fn, out.detach()))
        return out

    both = of(function)
    output = both.reversible(X)
    first, last = seen[0], seen[2]
    for node, value in (first, first, last):
        torch.testing.assert_close(node._saved_result, value, rtol=1e-12, atol=1e-12)
    assert calls(both) == [3, 3, 4]
    output.sum().backward()
    assert calls(both) == [4, 4, 5]
    with pytest.raises(RuntimeError, match="already been freed"):
        first[0]._saved_result  # noqa: B018


def test_two_backwards_over_parts_of_a_graph() -> None:
    """First the later parameters, then the earlier ones, each on a walk of its own."""
    both = of(torch.tanh, 4)

    def situation(run: Run, model: nn.Module, inputs: Any) -> Any:
        output = run(*inputs)
        late = [p for name, p in model.named_parameters() if name[:10] in LATE]
        grads = torch.autograd.grad(weighted(output), late, retain_graph=True)
        if run is both.reversible:
            assert calls(both) == [2, 2, 3, 3]  # with those of the stored run
        weighted(output).backward(inputs=[model.get_parameter("stem.weight")])
        return output, grads

    compare(both, X, situation=situation)
    assert calls(both) == [3, 3, 4, 4]


LATE = ("branches.2", "branches.3")


# Memory


def test_bytes_kept_for_the_backward() -> None:
    """The last two states, whatever the depth; in stored execution every activation."""
    kept: dict[int, Any] = {}
    for depth in (3, 12):
        both = of(torch.sigmoid, depth)
        parts = saved_bytes(lambda run=both.reversible: run(X), both.model)  # type: ignore[misc]
        kept[depth] = (parts, *(live_bytes(lambda run=run: run(X)) for run in both))  # type: ignore[misc]
    stream = X.numel() * 8
    assert {parts.chains for parts, _, _ in kept.values()} == {(2 * stream,)}
    assert kept[12][0] == kept[3][0]
    assert kept[12][1] == kept[3][1]
    assert kept[12][2] - kept[3][2] == 9 * 2 * stream  # the input of a layer, the result of sigmoid


@pytest.mark.parametrize("retain", [True, False])
def test_what_was_brought_back_is_freed_at_once(retain: bool) -> None:
    """When a branch runs, nothing that another one made is alive."""
    made: list[StorageWeakRef] = []
    alive: list[int] = []

    def function(x: Tensor) -> Tensor:
        alive.append(sum(not ref.expired() for ref in made))
        out = torch.exp(x * 0.1)
        made.append(StorageWeakRef(out.untyped_storage()))
        return torch.tanh(out)

    both = of(function, 4)
    output = both.reversible(X)
    output.sum().backward(retain_graph=retain)
    assert alive == [0] * 8
    assert all(ref.expired() for ref in made)
    made.clear()
    alive.clear()
    output = both.store(X)
    assert alive == [0, 1, 2, 3]
