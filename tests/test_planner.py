"""Training steps fitted into memory: what is kept, what is predicted, and what is measured."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import re2fx
from re2fx.errors import BudgetError
from re2fx.foresight import total
from re2fx.memory import saved_bytes
from re2fx.memory_plan import MemoryPlan, weigh
from re2fx.planner import Planner

from .framed import ConvStages, Mixed, Transformer, Whole
from .planning import single as single
from .situations.harness import double, example

TOLERANCE = 0.03
FLOAT = torch.float32


Given = tuple[nn.Module, Tensor]
NETWORKS: dict[str, Callable[[], Given]] = {
    "written attention": lambda: (
        Transformer(width=32, depth=1),
        example(4, 128, 4, dtype=FLOAT),
    ),
    "torch's attention": lambda: (
        Transformer(Whole, dropout=0.1, width=32, depth=1),
        example(4, 128, 4, dtype=FLOAT),
    ),
    "convolutions": lambda: (ConvStages(16), example(4, 3, 48, 48, dtype=FLOAT)),
}


PLANNERS: dict[int, Planner] = {}


@cache
def network(name: str) -> tuple[re2fx.RewiredModule, Tensor]:
    torch.manual_seed(0)
    model, x = NETWORKS[name]()
    rev = re2fx.transform(model, x)
    assert isinstance(rev, re2fx.RewiredModule)
    return rev, x


def planned(rev: re2fx.RewiredModule, x: Tensor, memory: str | int) -> MemoryPlan:
    """A network's plan for a memory; the steps that were predicted before are not again."""

    def known(*given: Any) -> Planner:
        if id(rev) not in PLANNERS:
            PLANNERS[id(rev)] = Planner(*given)
        return PLANNERS[id(rev)]

    rev.memory = memory
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("re2fx.planner.Planner", known)
        return rev.plan_memory(x)


def peak_of(rev: re2fx.RewiredModule, x: Tensor) -> int:
    """Measured on a second step, with gradients there before."""

    def step() -> None:
        torch.autograd.backward(total(rev(x)))

    step()
    for parameter in rev.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return re2fx.peak(step).peak


# Predicted and measured


@pytest.mark.parametrize("name", NETWORKS)
def test_the_peak_is_what_is_planned(name: str) -> None:
    """Within every budget, and the less work the larger it is."""
    rev, x = network(name)
    lowest = planned(rev, x, "lowest")
    least, most = lowest.predicted.peak.peak, lowest.stored.peak.peak
    assert least < 0.7 * most
    assert peak_of(rev, x) == pytest.approx(least, rel=TOLERANCE)
    rev.memory = "store"
    assert peak_of(rev, x) == pytest.approx(most, rel=TOLERANCE)
    work = []
    for share in (0.0, 0.5, 1.0):
        budget = int(least + share * (most - least))
        plan = planned(rev, x, budget)
        real = peak_of(rev, x)
        assert plan.predicted.peak.peak <= budget
        assert real == pytest.approx(plan.predicted.peak.peak, rel=TOLERANCE)
        assert real <= budget * (1 + TOLERANCE)
        work.append(weigh(plan.predicted))
    # Two plans that differ by less than 5 % in their work are as good as each other.
    assert all(after <= before * 1.05 for before, after in pairwise(work))
    assert work[-1] == weigh(lowest.stored)
    assert work[0] > work[-1]


def test_frames_are_stored_one_by_one() -> None:
    """Between the lowest and stored execution lie plans that store some of the blocks."""
    rev, x = network("convolutions")
    lowest = planned(rev, x, "lowest")
    least, most = lowest.predicted.peak.peak, lowest.stored.peak.peak
    plans = [planned(rev, x, int(least + part * (most - least))) for part in (0.2, 0.8)]
    stored = [sum(plan.frames.stored) - len(plan.frames.checkpointed) for plan in plans]
    assert stored == sorted(stored)
    assert stored[0] < stored[-1]
    assert planned(rev, x, most).frames.stored == (3, 2)


def test_what_a_plan_says() -> None:
    rev, x = network("written attention")
    lowest = planned(rev, x, "lowest")
    assert f"in up to {lowest.frames.slices} slices" in str(lowest)
    assert lowest.counts["blocks reversed"] == 2
    assert lowest.counts["checkpoints"]
    assert lowest.work > 1
    budget = lowest.stored.peak.peak
    plan = planned(rev, x, budget)
    assert plan.counts["blocks stored"] == 2
    assert plan.work == 1
    assert rev.memory_plan is plan


class Long(nn.Module):
    """A wide layer over a long sequence, on a narrow stream."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 256), nn.GELU(), nn.Linear(256, 8))
            for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def test_slices_lower_the_peak_of_a_long_sequence() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 2048, 8)
    net = Mixed.of(Long(), x)
    peaks = []
    for slices in (1, 4, 16):
        net.choose(slices=slices)
        peaks.append(peak_of(net.rev, x))
    assert peaks[0] > 2.5 * peaks[1] > 4 * peaks[2]
    net.rev.memory = "lowest"
    plan = net.rev.plan_memory(x)
    assert plan.frames.slices == 16
    assert plan.predicted.peak.peak == pytest.approx(peaks[2], rel=TOLERANCE)


# What is kept


@pytest.mark.parametrize("slices", [1, 7])
def test_two_states_per_chain_and_the_inputs_of_checkpoints_are_kept(
    slices: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing else, to the byte; what two of them keep is counted once."""
    monkeypatch.setattr("re2fx.rerun.SMALL", 0)
    model, x = double(Transformer(depth=4, width=64)), example(2, 7, 4)
    net = Mixed.of(model, x)
    net.choose(slices=slices)
    kept = saved_bytes(lambda: net.rev(x), model)
    state = 2 * 7 * 64 * 8
    assert kept.chains == (2 * state,)
    assert kept.outside == 0
    # The input; what the stem gives; the two states, which the readout reads; what it returns.
    assert kept.checkpoints == (x.numel() * 8, state, 0, 2 * 7 * 3 * 8)
    net.choose(stored=1, checkpointed=False)
    stored = saved_bytes(lambda: net.rev(x), model)
    assert stored.checkpoints == ()
    assert stored.outside > 10 * kept.total


def test_of_a_stored_suffix_the_states_in_front_are_kept() -> None:
    """They are the first stored block's inputs, too."""
    model, x = double(Transformer(depth=4, width=64)), example(2, 7, 4)
    net = Mixed.of(model, x)
    state = 2 * 7 * 64 * 8
    outside = []
    for stored in (0, 0.25, 0.5, 1):
        net.choose(stored=stored)
        kept = saved_bytes(lambda: net.rev(x), model)
        assert kept.chains[0] <= 2 * state
        assert (kept.chains[0] > state) == (stored < 1)
        outside.append(kept.outside)
    assert outside[0] == 0
    assert outside == sorted(set(outside))


@pytest.mark.parametrize("name", ["dropout", "convolutions", "written attention"])
@pytest.mark.parametrize("kinds", [{"slices": 3}, {"stored": 0.5}])
@pytest.mark.parametrize("way", ["forward", "backward", "retained", "double"])
def test_nothing_is_left(name: str, kinds: Any, way: str) -> None:
    """No cycle holds what a step has made; without any collection."""
    net = nets(name)
    net.choose(**kinds)
    parameters = list(net.rev.parameters())
    seen: list[weakref.ref[Tensor]] = []

    def follow(module: nn.Module, args: Any, out: Any) -> None:
        if isinstance(out, Tensor):
            seen.append(weakref.ref(out))

    modules = [m for m in net.rev.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    handles = [module.register_forward_hook(follow) for module in modules]
    net.rev(*net.inputs)
    gc.collect()
    seen.clear()
    gc.disable()
    try:
        output = net.rev(*net.inputs)
        assert seen
        if way == "backward":
            torch.autograd.grad(output.sum(), parameters)
        elif way == "retained":
            torch.autograd.grad(output.sum(), parameters, retain_graph=True)
        elif way == "double":
            made = torch.autograd.grad(output.square().sum(), parameters, create_graph=True)
            total(list(made)).backward(inputs=parameters)
            del made
        del output
        assert [ref() for ref in seen if ref() is not None] == []
    finally:
        gc.enable()
        net.rev.zero_grad()
        for handle in handles:
            handle.remove()


@cache
def nets(name: str) -> Mixed:
    from .framed import mixed

    return mixed(name)


def test_states_go_with_the_graph() -> None:
    """In the backward the last states are let go of as soon as the graph behind them is freed."""
    model, x = Transformer(depth=6, width=16), example(4, 64, 4, dtype=FLOAT)
    net = Mixed.of(model, x)
    net.choose(checkpointed=False)
    alive: list[int] = []
    made: list[weakref.ref[Tensor]] = []
    with re2fx.program.calls_made_by(_Following.make(made)):
        output = net.rev(x)
    middle = net.rev.get_parameter("layers.3.norm1.weight")
    middle.register_hook(lambda gradient: alive.append(sum(r() is not None for r in made)))
    output.sum().backward()
    assert made
    assert alive == [0]


def test_what_a_checkpoint_brought_back_goes_when_all_of_it_was_asked_for() -> None:
    net = nets("written attention")
    net.choose()
    with re2fx.record() as calls:
        output = net.rev(*net.inputs)
    left: list[list[int]] = []
    stem = net.rev.get_parameter("stem.0.bias")
    handle = stem.register_hook(
        lambda gradient: left.append([len(call._agains) for call in calls.checkpoints])
    )
    output.sum().backward()
    handle.remove()
    net.rev.zero_grad()
    assert left == [[0] * 4]


class _Following(re2fx.runtime.ChainCall):
    """Knows the states that it ends with."""

    made: list[weakref.ref[Tensor]]

    @classmethod
    def make(cls, made: list[weakref.ref[Tensor]]) -> Any:
        def one(chain: int, root: Any, *starts: Any) -> _Following:
            call = cls(root, *starts)
            call.made = made
            return call

        return one

    def leave(self) -> None:
        super().leave()
        assert self.states is not None
        self.made += [weakref.ref(state) for state in self.states if state is not None]


# Budgets


def test_a_budget_below_the_floor() -> None:
    """The least that a step takes is said, and where."""
    rev, x = network("convolutions")
    floor = planned(rev, x, "lowest").predicted.peak.peak
    rev.memory = floor - 1
    for call in (lambda: planned(rev, x, floor - 1), lambda: rev(x)):
        with pytest.raises(BudgetError, match=r"below the least .* \(memory='lowest'\)") as caught:
            call()
        assert re2fx.text.amount(floor) in str(caught.value)
    assert planned(rev, x, floor).predicted.peak.peak <= floor
    with torch.no_grad():
        rev.memory = 1
        rev(x)  # plans nothing


def test_a_budget_of_plenty() -> None:
    """All is stored, and nothing runs again."""
    rev, x = network("written attention")
    plan = planned(rev, x, "1TiB")
    assert rev.memory == 2**40
    assert plan.frames.stored == (2,)
    assert plan.frames.checkpointed == frozenset()
    names: list[str] = []
    with re2fx.rerun.watching(names.append):
        rev(x).sum().backward()
    assert names == []
