"""``memory="lowest"`` and budgets, as users come to them and as they change things afterwards."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.utils.checkpoint import checkpoint

import re2fx
from re2fx import Coupling
from re2fx.errors import CaptureError, OptionError
from re2fx.rerun import watching

from .compare import Outcome, assert_same, step, weighted
from .framed import Layer, Transformer, mixed
from .planning import few_slices as few_slices
from .situations.harness import Pair, compare, double, example, outcome, train
from .test_pieces import Dropping, Middle, made, pieces

X = example(2, 7, 4)


def lowest(model: nn.Module, *inputs: Any, memory: Any = "lowest", **options: Any) -> Pair:
    """A model in fp64 at its lowest, and stored."""
    rev = re2fx.transform(double(model), inputs or None, memory=memory, **options)
    assert isinstance(rev, re2fx.RewiredModule)
    store = copy.copy(rev)
    store.memory = "store"
    return Pair(model, rev, store)


@pytest.mark.parametrize("value", [
    "6", "GiB", "6 GiBs", "-1GiB", "0", "0MB", "lowst", "", "6gib", "1e9", 0, -5, True, False, 1.5,
    None, [], b"6GiB", "6GiB6GiB", "six GiB", "nan GB", "Store", "0.0KiB",
])  # fmt: skip
def test_values_that_memory_does_not_take(value: Any) -> None:
    with pytest.raises(OptionError, match=r"memory=.*expected one of 'reversible'"):
        re2fx.transform(Transformer(), memory=value)
    rev: Any = re2fx.transform(Transformer())
    with pytest.raises(OptionError, match="expected one of"):
        rev.memory = value
    assert rev.memory == "reversible"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("6GiB", 6 * 2**30), ("500MB", 500 * 10**6), ("1.5 KiB", 1536), (" 2 TB ", 2 * 10**12),
        ("7B", 7), (7, 7),
    ],
)  # fmt: skip
def test_budgets_are_bytes(text: Any, number: int) -> None:
    rev: Any = re2fx.transform(Transformer())
    rev.memory = text
    assert rev.memory == number


def test_less_than_one_byte_is_none() -> None:
    with pytest.raises(OptionError):
        re2fx.transform(Transformer(), memory="0.3B")


def test_planned_at_the_first_call_with_gradients() -> None:
    pair = lowest(Transformer())
    rev: Any = pair.reversible
    assert rev.memory_plan is None
    with torch.no_grad():
        rev(X)
    assert rev.memory_plan is None
    compare(pair, X)
    plan: Any = rev.memory_plan
    assert plan.frames.stored == (0,)
    assert plan.frames.slices > 1
    compare(pair, X.repeat(3, 1, 1))
    assert rev.memory_plan is plan
    rev.eval()
    assert rev.memory_plan is None
    compare(pair, X)
    assert rev.memory_plan is not plan
    rev.train()
    assert rev.memory_plan is plan


def test_nothing_to_plan() -> None:
    rev: Any = re2fx.transform(Transformer())
    for memory in ("reversible", "store"):
        rev.memory = memory
        with pytest.raises(OptionError, match="nothing to plan"):
            rev.plan_memory(X)
        assert rev.memory_plan is None


class Clipped(nn.Module):
    """Looks at the values it is given."""

    def forward(self, x: Tensor) -> Tensor:
        return x / x.norm() if x.norm() > 1 else x


def test_what_depends_on_values_is_not_planned() -> None:
    """And runs as it was told to instead."""
    model: Any = Transformer()
    model.layers[1].mlp[1] = Clipped()
    with pytest.raises(CaptureError, match=r"depends on values.*memory='reversible'"):
        lowest(model, X, leaves=[Clipped])
    compare(lowest(model, X, leaves=[Clipped], memory="reversible"), X)


@pytest.mark.parametrize("x", [example(5, 3, 4), example(1, 7, 4), example(2, 1, 4)])
@pytest.mark.parametrize("name", ["written attention", "torch's attention", "dropout"])
def test_other_sizes_than_planned(name: str, x: Tensor) -> None:
    net = mixed(name)
    for kinds in ({"slices": 7}, {"slices": 2, "stored": 0.5}):
        compare(net.choose(**kinds), x)


@pytest.mark.parametrize("x", [example(1, 3, 4, 16, 24)])
def test_other_sizes_than_what_was_opened(x: Tensor) -> None:
    """Windows that were opened for the sizes of one input run closed for others."""
    net = mixed("swin3d")
    compare(net.choose(slices=7), x)


def test_back_to_reversible() -> None:
    """The former behaviour: nothing outside the chains runs again."""
    net = mixed("written attention")
    net.choose(slices=3)
    compare(net.pair, X)
    net.rev.memory = "reversible"
    assert net.rev.memory_plan is None
    names: list[str] = []
    with watching(names.append):
        compare(net.pair, X)
    assert len(names) == 4
    net.rev.memory = "lowest"
    with watching(names.append):
        compare(net.pair, X)
    assert len(names) > 4 + 4


def saved(rev: Any) -> Any:
    """Through `torch.save`."""
    buffer = io.BytesIO()
    torch.save(rev, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda rev: pickle.loads(pickle.dumps(rev)),
    "save": saved,
}


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("memory", ["lowest"])
def test_copies_keep_memory_and_plan(way: str, memory: Any) -> None:
    pair = lowest(Transformer(), X, memory=memory)
    rev: Any = pair.reversible
    expected = step(pair.store, "store", X)  # type: ignore[arg-type]
    rev.plan_memory(X)
    other = COPIES[way](rev)
    assert other.memory == memory
    assert other.memory_plan is not None
    assert other.memory_plan.frames == rev.memory_plan.frames
    assert other.memory_plan.predicted.peak.peak == rev.memory_plan.predicted.peak.peak
    assert_same(outcome(other, other, (X.clone().requires_grad_(),), train), expected, 1e-10)
    assert other.memory_plan.frames == rev.memory_plan.frames
    other.memory = "reversible"
    assert rev.memory == memory
    assert rev.memory_plan is not None


def test_another_coupling_after_planning() -> None:
    for readout in ("mean", "sum"):
        pair = lowest(Transformer(depth=1), X, readout=readout)
        rev: Any = pair.reversible
        for coupling in (Coupling.consistent(0.25), Coupling(0.5, 0.5, 1)):
            rev.coupling = coupling
            pair.store.coupling = coupling  # type: ignore[attr-defined]
            compare(pair, X)
            assert rev.memory_plan.frames.checkpointed


def test_a_schedule() -> None:
    pair = lowest(Transformer(depth=3), X)
    runs: Any = (pair.reversible, pair.store)
    ends = Coupling(0.5, 0.5, 1), Coupling(0.2, 0.8, 1)
    schedules = [re2fx.Schedule(run, *ends, over=4) for run in runs]
    for _ in range(5):
        compare(pair, X)
        for schedule in schedules:
            schedule.step()
    assert runs[0].coupling == ends[1]


def test_autocast() -> None:
    model = Transformer(width=16, depth=1)
    rev: Any = re2fx.transform(model, X.float(), memory="lowest")
    left = []
    for memory in ("store", "lowest"):
        rev.memory = memory
        rev.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            out = rev(X.float())
        assert out.dtype == torch.bfloat16
        weighted(out.float()).backward()
        left.append([p.grad.clone() for p in rev.parameters()])
    for a, b in zip(*left, strict=True):
        assert float((a - b).norm()) <= 0.05 * float(a.norm()) + 1e-3
    plan = rev.memory_plan
    rev.memory = "lowest"
    assert rev.plan_memory(X.float()).stored.peak.peak != plan.stored.peak.peak


def test_autocast_is_planned_for_where_it_is_met() -> None:
    """Once for each; a transform outside of the training's autocast does no harm."""
    rev: Any = re2fx.transform(Transformer(width=16, depth=1), X.float(), memory="lowest")
    plans = [rev.memory_plan]
    for _ in range(2):
        for enabled in (True, False):
            with torch.autocast("cpu", torch.bfloat16, enabled):
                rev(X.float()).float().sum().backward()
            plans.append(rev.memory_plan)
    assert plans[1].stored.peak.peak != plans[0].stored.peak.peak
    assert plans[2] is plans[4] is plans[0]
    assert plans[3] is plans[1]
    again = copy.deepcopy(rev)
    assert again.memory_plan.predicted == plans[0].predicted


def test_a_checkpoint_around_the_first_call() -> None:
    """What is planned in there is none of its business."""
    for reentrant in (True, False):
        pair = lowest(Transformer(dropout=0.3, depth=1), X)
        run = partial(checkpoint, pair.reversible, use_reentrant=reentrant)
        compare(Pair(pair.model, run, pair.store), X)
        assert pair.reversible.memory_plan is not None  # type: ignore[attr-defined]


def test_hooks_do_not_see_what_is_planned() -> None:
    """Such as one that asks for values."""
    pair = lowest(Transformer(), X)
    seen: list[float] = []
    layer = pair.model.get_submodule("layers.0.mlp.3")
    handle = layer.register_forward_hook(lambda m, args, out: seen.append(out.sum().item()))
    layer.register_full_backward_hook(lambda m, before, after: seen.append(weighted(after).item()))
    weighted(pair.reversible(X)).backward()
    assert len(seen) == 2
    handle.remove()


def test_transforms_plan_nothing() -> None:
    pair = lowest(Transformer(), X)
    rows = torch.stack([X, X + 1])
    for _ in range(2):
        both = [torch.func.vmap(run)(rows) for run in pair]
        torch.testing.assert_close(*both, rtol=1e-12, atol=1e-12)
        compare(pair, X)


@pytest.mark.parametrize("memory", ["lowest"])
def test_compiled_it_runs_as_reversible(memory: Any) -> None:
    pair = lowest(Transformer(), X, memory=memory)
    options: Any = {"compiler": "aot_eager"}
    run = torch.compile(pair.reversible, backend="re2fx", options=options)
    compare(Pair(pair.model, run, pair.store), X)


@pytest.mark.parametrize("memory", ["lowest", 2**30, "6GiB", "nonsense"])
def test_the_backend_plans_nothing(memory: Any) -> None:
    run = torch.compile(Transformer().double(), backend="re2fx", options={"memory": memory})
    message = "expected one of" if memory == "nonsense" else "use re2fx.transform"
    with pytest.raises(BackendCompilerFailed, match=message) as caught:
        run(X)
    assert isinstance(caught.value.inner_exception, OptionError)


def test_pieces_plan_on_their_own() -> None:
    model = made(Middle)
    x = example(3, 4)
    rev = pieces(model, x, memory="lowest")
    assert rev.memory == "lowest"

    def one(memory: Any) -> Outcome:
        return step(rev, memory, x)

    assert_same(one("lowest"), one("store"), 1e-10)
    rev.memory = "lowest"
    assert_same(one("lowest"), one("store"), 1e-10)


@pytest.mark.parametrize("memory", [2**40, "6GiB"])
def test_pieces_take_no_budget(memory: Any) -> None:
    model, x = made(Dropping), example(3, 4)
    with pytest.raises(OptionError, match="memory='lowest'"):
        re2fx.transform(model, x, memory=memory)
    rev = pieces(model, x)
    with pytest.raises(OptionError, match="memory='lowest'"):
        rev.memory = memory
    assert rev.memory == "reversible"
    piece = next(iter(rev.pieces.values()))
    piece.memory = memory
    assert piece.memory in (2**40, 6 * 2**30)


class Outer(nn.Module):
    """Blocks with rewired modules in them."""

    def __init__(self, inner: list[nn.Module]) -> None:
        super().__init__()
        self.inner = nn.ModuleList(inner)

    def forward(self, x: Tensor) -> Tensor:
        for inner in self.inner:
            x = x + inner(x)
        return x


def test_rewired_modules_inside() -> None:
    """Under a budget they run at their lowest, and count in it."""
    x = example(2, 7, 8)
    parts = [re2fx.transform(nn.Sequential(Layer(8)).double(), x) for _ in range(2)]
    pair = lowest(Outer(parts), x, leaves=["inner.0", "inner.1"])
    rev: Any = pair.reversible
    expected = step(rev, "store", x)
    assert_same(step(rev, "lowest", x), expected, 1e-10)
    assert all(part.memory_plan is not None for part in parts)
    assert_same(step(rev, 2**40, x), expected, 1e-10)  # type: ignore[arg-type]
    assert rev.memory == 2**40
    assert [part.memory for part in parts] == ["lowest"] * 2


def test_a_call_of_another_kind_is_planned_for_itself() -> None:
    """One that is captured by itself, such as one of other dtypes or optional arguments."""

    class Optional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Transformer()

        def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
            out: Tensor = self.net(x if scale is None else x * scale)
            return out

    pair = lowest(Optional(), X)
    compare(pair, X)
    compare(pair, X, example(4))
    compare(pair, X)
    variants = pair.reversible._variants  # type: ignore[attr-defined]
    assert [len(variant.memory_plans) for variant in variants] == [1, 1]
