"""Torch's tests of its checkpoint, restated: how often a branch runs, and what is kept meanwhile.

The table is in test_checkpoint_suite.py.
"""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.flop_counter import FlopCounterMode

from re2fx.memory import live_bytes, saved_bytes

from .chains import Branch, X, calls, chain, of, reset
from .compare import weighted
from .models import Net
from .situations.harness import Run, compare, double, pair


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


@pytest.mark.parametrize("part", [True, False])
@pytest.mark.parametrize("retain", [True, False])
def test_what_was_brought_back_is_freed_at_once(retain: bool, part: bool) -> None:
    """When a branch runs, nothing that another one made is alive, wanted or not."""
    made: list[StorageWeakRef] = []
    alive: list[int] = []
    other = torch.zeros_like(X, requires_grad=True)

    def function(x: Tensor) -> Tensor:
        alive.append(sum(not ref.expired() for ref in made))
        out = torch.exp(other if part else x * 0.1)
        made.append(StorageWeakRef(out.untyped_storage()))
        return x + out if part else torch.tanh(out)

    both = of(function, 4)
    output = both.reversible(X)
    inputs = [both.model.get_parameter("stem.weight")] if part else None
    output.sum().backward(retain_graph=retain, inputs=inputs)
    assert alive == [0] * 8
    assert all(ref.expired() for ref in made)
    made.clear()
    alive.clear()
    output = both.store(X)
    assert alive == [0, 1, 2, 3]


def tensors() -> int:
    """How many are alive."""
    gc.collect()
    return sum(issubclass(type(held), Tensor) for held in gc.get_objects())


def test_nothing_stays_of_a_backward_that_ends_early() -> None:
    """What it brought back goes with it, though the graph is kept."""
    both = of()
    wanted = both.model.get_parameter("branches.1.inner.weight")
    loss = both.reversible(X).sum()
    torch.autograd.grad(loss, wanted, retain_graph=True)
    before = tensors()
    torch.autograd.grad(loss, wanted, retain_graph=True)
    assert tensors() == before
