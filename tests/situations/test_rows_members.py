"""Rows 6, 8, 16 and 23: parameters that are shared, frozen, adapted, hooked, saved and moved."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

import re2fx
from re2fx.memory import live_bytes
from re2fx.observers import Observers

from ..compare import assert_same, weighted
from ..models import Block, ConvNet, Net
from .harness import compare, double, example, outcome, pair, reversible, row, train, without

IMAGE = example(4, 3, 6, 6)
X = example(5, 4)


class Tied(nn.Module):
    """One block four times, and one weight in two branches and in the head."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.others = Block(8, 0.2), nn.ModuleList([Block(8), Block(8)])
        self.others[1].inner = self.others[0].inner
        self.weight = self.block.outer.weight

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (2, 2))
        for _ in range(4):
            x = self.block(x)
        for other in self.others:
            x = other(x)
        return F.linear(x, self.weight.t())


@row(6)
@without("eager", "re2fx.replay:Generators.write", lambda self: None)
def test_shared_weights(executor: str) -> None:
    """Without a generator state for each use: every use draws the masks of the first."""
    compare(pair(executor, double(Tied())), X)


@row(6)
def test_hooks_on_shared_parameters_fire_once(executor: str) -> None:
    """Gradient hooks see the sum of all uses."""
    both = pair(executor, double(Tied()))
    weight = both.model.get_parameter("block.inner.weight")
    fired: list[Tensor] = []
    weight.register_post_accumulate_grad_hook(lambda p: fired.append(p.grad.clone()))
    left = compare(both, X)
    assert len(fired) == 2
    for seen in fired:
        torch.testing.assert_close(seen, left.gradients["block.inner.weight"])


@row(8)
def test_a_frozen_backbone(executor: str) -> None:
    """An input without gradient, and two layers that train."""
    model = double(Net(depth=6, dropout=0.2))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(("blocks.2.outer", "head")))
    left = compare(pair(executor, model), X.long().double())
    assert sum(g is not None for g in left.gradients.values()) == 5  # with the input's

    def without_input(run: Any, model: nn.Module, inputs: Any) -> Any:
        return train(run, model, (inputs[0].detach(),))

    left = compare(pair(executor, model), X, situation=without_input)
    assert sum(g is not None for g in left.gradients.values()) == 4


@row(8)
def test_nothing_trains(executor: str) -> None:
    """The output has no history and nothing is kept."""
    model = double(Net(depth=6)).requires_grad_(False)
    both = pair(executor, model)
    for run in both:
        assert not run(X).requires_grad
    assert live_bytes(lambda: both.reversible(X)) <= both.store(X).nbytes


class LoRA(nn.Module):
    """A frozen linear layer with a trained correction of low rank."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + self.up(self.down(x))
        return out


def adapt(model: nn.Module) -> nn.Module:
    for index in range(4):
        block: Any = model.get_submodule(f"blocks.{index}")
        block.inner = LoRA(block.inner)
    return double(model)


@row(8)
@pytest.mark.parametrize("when", ["before", "after"])
def test_adapters(executor: str, when: str) -> None:
    """Adapters get their gradients, whether they were there first or not."""
    model = double(Net())
    if when == "before":
        adapt(model)
    both = pair("eager", model)
    if when == "after":
        adapt(model)
    if executor == "compiled":
        both.reversible = reversible(executor, both.reversible)  # type: ignore[arg-type]
    left = compare(both, X)
    trained = [n for n, g in left.gradients.items() if g is not None and ("up" in n or "down" in n)]
    assert len(trained) == 8


def weight_norm(model: nn.Module) -> None:
    nn.utils.parametrizations.weight_norm(model.get_submodule("blocks.1.inner"))


def orthogonal(model: nn.Module) -> None:
    nn.utils.parametrizations.orthogonal(model.get_submodule("blocks.1.inner"))


def old_spectral(model: nn.Module) -> None:
    nn.utils.spectral_norm(model.get_submodule("blocks.1.inner"))


@row(16)
@pytest.mark.parametrize("change", [weight_norm, orthogonal, old_spectral])
def test_parametrized_weights(executor: str, change: Callable[[nn.Module], None]) -> None:
    """Weights that are computed from parameters at every call."""
    if change is old_spectral:
        pytest.importorskip("torch.nn.utils.spectral_norm")
    model = double(Net())
    change(model)
    compare(pair(executor, model), X)


@contextmanager
def all_left_out(self: Observers, saved: Any) -> Any:
    """`Observers.noted` that takes every hook for one that only looks."""
    for hooks, _ in self._hooks:
        self._quiet.update({(id(hooks), key): True for key in hooks})
    yield


@row(16)
@without("eager", "re2fx.observers:Observers.noted", all_left_out)
def test_hooks_that_change_values(executor: str) -> None:
    """Without `Observers.noted`: the rerun is of another function."""
    model = double(Net(dropout=0.2))
    leaf = model.get_submodule("blocks.2.inner")
    leaf.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    leaf.register_forward_hook(lambda module, args, out: out + 1)
    if executor == "eager":
        leaf.register_full_backward_hook(lambda module, inputs, outputs: (3 * inputs[0],))  # type: ignore[index]
    compare(pair(executor, model), X)


@contextmanager
def none_left_out(self: Observers) -> Any:
    """`Observers.left_out` that leaves every hook in."""
    yield


@row(16)
@without("eager", "re2fx.observers:Observers.left_out", none_left_out)
def test_observing_hooks_count_once(executor: str) -> None:
    """Without `Observers.left_out`: they are called again in the backward."""
    model = double(Net(dropout=0.2))
    seen: list[str] = []
    leaf = model.get_submodule("blocks.2.inner")
    leaf.register_forward_hook(lambda module, args, out: seen.append("forward"))
    leaf.register_forward_pre_hook(lambda module, args: seen.append("before"))
    both = pair(executor, model)
    compare(both, X)
    seen.clear()
    weighted(both.reversible(X)).backward()
    assert seen == ["before", "forward"]


def doubled(module: nn.Module, args: Any, out: Tensor) -> None:
    out.mul_(2)


def noisy(module: nn.Module, args: Any, out: Tensor) -> None:
    torch.rand(3)


@row(16, compiled=None)
@without("eager", "re2fx.observers:Observers.noted", all_left_out)
@pytest.mark.parametrize("hook", [doubled, noisy])
def test_hooks_that_return_nothing_and_act(executor: str, hook: Any) -> None:
    """Without `Observers.noted`: what they do is missing from the rerun."""
    model = double(Net(dropout=0.2))
    model.get_submodule("blocks.2.inner").register_forward_hook(hook)
    compare(pair(executor, model), X)


@row(16)
def test_hooks_on_dissolved_modules(executor: str) -> None:
    """Tracing dissolves a block, so a hook on it is named; Dynamo compiles hooks in."""
    model = double(Net())
    model.get_submodule("blocks.1").register_forward_hook(lambda module, args, out: 2 * out)
    if executor == "eager":
        with pytest.warns(re2fx.Re2fxWarning, match=r"hooks registered on blocks\.1 will not run"):
            re2fx.transform(model)
    both = pair(executor, model, X)
    plain = re2fx.transform(double(Net()), memory="store")
    assert not torch.allclose(both.reversible(X), plain(X))
    compare(both, X)


def through_pickle(module: Any) -> Any:
    return pickle.loads(pickle.dumps(module))


def through_save(module: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@row(23)
@without("eager", "re2fx.module:RewiredModule.__deepcopy__", GraphModule.__deepcopy__)
@without("eager", "re2fx.module:RewiredModule.__reduce__", GraphModule.__reduce__)
@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_save])
def test_copies(executor: str, copied: Callable[[Any], Any]) -> None:
    """A copy is rewired alike and shares nothing."""
    rev: Any = re2fx.transform(double(ConvNet(dropout=0.2)))
    if executor == "compiled":
        weighted(reversible(executor, rev)(IMAGE)).backward()
        rev.zero_grad()
    made = copied(rev)
    owned = {p.data_ptr() for p in rev.parameters()}
    assert not any(p.data_ptr() in owned for p in made.parameters())
    results = []
    for module in (rev, made):
        run = reversible(executor, module) if executor == "compiled" else module
        results.append(outcome(run, module, (IMAGE,), train))
    assert_same(results[1], results[0], 1e-12)


@row(23)
def test_state_dicts_both_ways(executor: str) -> None:
    """The names are the given model's; strict loading works in both directions."""
    model, other = double(Net()), Net().double()
    rev: Any = re2fx.transform(model)
    run = reversible(executor, rev) if executor == "compiled" else rev
    assert rev.state_dict().keys() == other.state_dict().keys()
    before = run(X)
    other.load_state_dict(rev.state_dict(), strict=True)
    fresh: Any = re2fx.transform(other)
    assert torch.equal(fresh(X), rev(X))
    rev.load_state_dict(Net().double().state_dict(), strict=True)
    assert not torch.allclose(run(X), before)
    rev.load_state_dict(other.state_dict(), assign=True)
    torch.testing.assert_close(run(X), before)
    with pytest.raises(RuntimeError, match="Missing key"):
        rev.load_state_dict({}, strict=True)


@row(23)
def test_moved_and_cast(executor: str) -> None:
    """``.to()``, ``.half()`` and `to_empty` reach members and constants."""
    model = double(Net())
    both = pair(executor, model)
    model.float()
    compare(both, X.float(), tolerance=1e-4)
    both.store.to(torch.float64)  # type: ignore[attr-defined]
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    compare(both, X)
    state = copy.deepcopy(model.state_dict())
    model.to("meta").to_empty(device="cpu")
    model.load_state_dict(state)
    compare(both, X)
