"""Torch's tests of its checkpoint, restated: one inside another, and backwards inside backwards.

The table is in test_checkpoint_suite.py.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial, reduce
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import re2fx
from re2fx.errors import ReplayError

from .chains import Branch, Chain, Parts, X, calls, no_collection, of, reset
from .compare import assert_reversible_equals_store, assert_same, weighted
from .models import Net, Twice
from .situations.harness import Run, compare, double, outcome, pair, train

Function = Callable[[Tensor], Tensor]
kept = partial(checkpoint, use_reentrant=False)


def checkpointed(function: Function) -> Function:
    """A checkpoint around it."""
    return lambda x: kept(function, x)


def derivative(function: Function) -> Function:
    """Its gradient, which can be differentiated."""
    return lambda x: torch.autograd.grad(weighted(function(x)), x, create_graph=True)[0]


LETTERS = {"c": checkpointed, "g": derivative}
NESTED = ["c", "cc", "g", "gc", "gcc", "gg", "gcg", "cggc", "gcgc", "ggg", "gcggc", "gcgcgc"]


def nested(letters: str, function: Function) -> Function:
    """Checkpoints and derivatives around a function, the first letter outermost."""
    return reduce(lambda inner, letter: LETTERS[letter](inner), reversed(letters), function)


@pytest.mark.parametrize("letters", NESTED)
def test_checkpoints_and_derivatives_around_a_chain(letters: str) -> None:
    """Up to the fourth derivative, as without the checkpoints."""
    both = of(torch.tanh, 2)

    def situation(run: Run, model: nn.Module, inputs: Any) -> Any:
        some = letters.replace("c", "") if run is both.store else letters
        output = nested(some, run)(*inputs)
        weighted(output).backward()
        return output

    compare(both, X, situation=situation, tolerance=1e-9)


@pytest.mark.parametrize("letters", ["gc", "gg", "cg", "gcg", "gcgc"])
def test_checkpoints_and_derivatives_around_two_chains(letters: str) -> None:
    """One behind the other, a checkpoint around each and around both."""
    first, second = of(torch.tanh, 2), of(torch.sin, 2)

    def situation(run: Run, model: nn.Module, inputs: Any) -> Any:
        if run is first.store:
            output = nested(letters.replace("c", ""), lambda x: second.store(first.store(x)))
        else:
            parts = checkpointed(first.reversible), checkpointed(second.reversible)
            output = nested(letters, lambda x: parts[1](parts[0](x)))
        value = output(*inputs)
        weighted(value).backward()
        return value

    first.model.add_module("second", second.model)
    compare(first, X, situation=situation, tolerance=1e-9)


class Witness:
    """Lives as long as the node of a graph that it is left with."""


def witnesses(output: Tensor) -> list[weakref.ref[Witness]]:
    """One with every node behind a tensor."""
    left: list[Any] = [output.grad_fn]
    seen, found = set(), []
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        witness = Witness()
        node.metadata["witness"] = witness
        found.append(weakref.ref(witness))
        left += [following for following, _ in node.next_functions]
    return found


@pytest.mark.parametrize("letters", ["", *NESTED])
@pytest.mark.parametrize("differentiated", [True, False])
def test_the_graph_goes_with_its_last_reader(letters: str, differentiated: bool) -> None:
    """No cycle, before a backward and after it."""
    both = of(torch.tanh, 2)
    with no_collection():
        x = X.clone().requires_grad_()
        output = nested(letters, both.reversible)(x)
        left = witnesses(output)
        assert all(ref() is not None for ref in left)
        if differentiated:
            weighted(output).backward(retain_graph=True)
        del output
        assert len(left) > 10
        assert [ref() for ref in left if ref() is not None] == []


# Backwards inside of a forward and a backward


def test_hooks_on_the_graph_run_once() -> None:
    """The backward goes through the forward's graph; the graph of a rerun is not differentiated."""
    seen: list[Tensor] = []

    def function(x: Tensor) -> Tensor:
        out = torch.tanh(x)
        if out.requires_grad:
            out.register_hook(seen.append)
        return out

    compare(of(function), X)
    assert len(seen) == 6
    for stored, reversible in zip(seen[:3], seen[3:], strict=True):
        torch.testing.assert_close(stored, reversible, rtol=1e-11, atol=1e-12)


class Middle(Parts):
    """Gives away the state in the middle."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        states = [self.stem(x)]
        for branch in self.branches:
            states.append(states[-1] + branch(states[-1]))
        return states[2], states[-1]


@pytest.mark.parametrize("place", ["end", "parameter"])
def test_a_backward_in_a_hook_of_a_backward(place: str) -> None:
    """Through an earlier part of the same graph: each walks on its own."""
    both = pair("eager", double(Middle(*[Branch() for _ in range(4)])), leaves=[Branch])

    def situation(run: Run, model: nn.Module, inputs: Any) -> Any:
        middle, end = run(*inputs)
        loss = weighted(middle)

        def hook(*args: Any) -> None:
            handle.remove()
            loss.backward(retain_graph=True)

        watched = end.grad_fn if place == "end" else model.get_parameter("branches.2.inner.weight")
        handle = watched.register_hook(hook)
        weighted(end).backward()
        return middle, end

    compare(both, X, situation=situation)


class Through(torch.autograd.Function):
    """Runs a function without a graph, and again with one in its backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Function, way: str) -> Tensor:
        ctx.save_for_backward(x)
        ctx.function, ctx.way = function, way
        return function(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            output = ctx.function(x)
        if ctx.way == "grad":
            return (*torch.autograd.grad(output, x, grad), None, None)
        output.backward(grad)
        return x.grad, None, None


@pytest.mark.parametrize("way", ["grad", "backward", "reentrant checkpoint"])
def test_a_backward_that_runs_a_chain(way: str) -> None:
    """Forward and backward of a chain, inside the backward of another call of it."""
    both = of(torch.tanh)

    def situation(run: Run, model: nn.Module, inputs: Any) -> Any:
        if way == "reentrant checkpoint":
            output = run(checkpoint(run, *inputs, use_reentrant=True))
        else:
            output = run(Through.apply(run(*inputs), run, way))
        weighted(output).backward()
        return output

    compare(both, X, situation=situation)


def inner_gradient(x: Tensor) -> Tensor:
    """Differentiates what it has just computed."""
    return torch.autograd.grad(x.sin().exp().sum(), x, create_graph=True)[0]


def test_a_gradient_inside_of_a_branch() -> None:
    """Refused with what to do instead; the next step is as ever."""
    both = of(inner_gradient)
    weighted(both.store(X)).backward()
    with pytest.raises(ReplayError, match="memory='store'"):
        both.reversible(X)
    compare(of(), X)


@pytest.mark.parametrize("depth", [2, 3, 6])
def test_a_function_that_reads_twice(depth: int) -> None:
    """Its branch runs once more, and no other one."""
    both = of(lambda x: Twice.apply(x.sin(), x.cos()), depth)
    compare(both, X)
    reset(both)
    weighted(both.reversible(X)).backward()
    assert calls(both) == [3] * depth


def test_what_a_function_saved_is_freed() -> None:
    """Its own result among it, without a collection."""
    made: list[weakref.ref[Tensor]] = []

    class Own(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            out = x.exp()
            ctx.save_for_backward(out)
            made.append(weakref.ref(out))
            return out

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            (out,) = ctx.saved_tensors
            return grad * out

    both = of(lambda x: Own.apply(x.sin()))
    with no_collection():
        weighted(both.reversible(X)).backward()
        assert len(made) == 6
        assert [ref() for ref in made] == [None] * 6
    compare(both, X)


# Chains and checkpoints inside of branches and around them


def test_a_chain_inside_of_a_branch() -> None:
    """A rewired module is a part of a branch of another."""
    branches = []
    for _ in range(3):
        inner = re2fx.transform(double(Chain(Branch(), Branch(torch.sin))), leaves=[Branch])
        branches.append(Branch(inner))
    outer = re2fx.transform(double(Chain(*branches)), leaves=[Branch])
    assert isinstance(outer, re2fx.RewiredModule)
    assert len(outer.plan.chains[0]) == 3
    assert_reversible_equals_store(outer, X)
    outer.memory = "reversible"
    for branch in branches:
        branch.calls = 0
    weighted(outer(X)).backward()
    assert [branch.calls for branch in branches] == [2, 2, 2]


@pytest.mark.parametrize("preserve", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_inside_of_a_branch(reentrant: bool, preserve: bool) -> None:
    """With random numbers, kept or drawn again as it says."""
    inner = partial(checkpoint, use_reentrant=reentrant, preserve_rng_state=preserve)

    def body(x: Tensor) -> Tensor:
        return nn.functional.dropout(x.sin().exp(), 0.3).sin()

    compare(of(lambda x: inner(body, x)), X)


class Checkpointed(Net):
    """A checkpoint around each block."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = kept(block, x)
        out: Tensor = self.head(x)
        return out


def test_a_checkpoint_around_each_block() -> None:
    """It is written out, and the blocks are rewired as if it were not there."""
    model = double(Checkpointed(dropout=0.3))
    both = pair("eager", model, X)
    assert len(both.store.plan.chains[0]) == 4  # type: ignore[attr-defined]
    compare(both, X)


@pytest.mark.parametrize("preserve", [True, False])
def test_a_checkpoint_around_a_chain(preserve: bool) -> None:
    """Random numbers are drawn again if it says so, and the same ones are."""
    both = of(lambda x: nn.functional.dropout(x, 0.4 if preserve else 0.0).tanh())

    def situation(run: Run, model: nn.Module, inputs: Any) -> Any:
        output = kept(run, *inputs, preserve_rng_state=preserve)
        torch.rand(3)
        weighted(output).backward()
        return output

    compare(both, X, situation=situation)


@pytest.mark.parametrize("container", [list, lambda parts: nn.Sequential(*parts), nn.ModuleList])
def test_a_sequence_of_chains(container: Any) -> None:
    """`checkpoint_sequential` over several of them."""
    parts = [of(), of(torch.sin), of(torch.sigmoid)]
    parts[0].model.add_module("others", nn.ModuleList(part.model for part in parts[1:]))

    def situation(run: Run, model: nn.Module, inputs: Any) -> Any:
        stored = run is parts[0].store
        runs = container([part.store if stored else part.reversible for part in parts])
        output = checkpoint_sequential(runs, 2, inputs[0], use_reentrant=False)
        weighted(output).backward()
        return output

    compare(parts[0], X, situation=situation)


def test_a_checkpoint_wrapper_around_a_chain() -> None:
    """The names of parameters stay, and so do the gradients."""
    both = of()
    names = set(both.model.state_dict())
    wrapped = checkpoint_wrapper(both.reversible)  # type: ignore[arg-type]
    assert set(wrapped.state_dict()) == names
    expected = outcome(both.store, both.model, (X.clone().requires_grad_(),), train)
    got = outcome(wrapped, both.model, (X.clone().requires_grad_(),), train)
    assert_same(got, expected, 1e-11)
