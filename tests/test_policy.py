"""What the user selects, and which of several possible chains is taken."""

from __future__ import annotations

import copy
import json
import pickle
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import graph_break
from torch._dynamo.exc import BackendCompilerFailed

import re2fx
from re2fx import OptionError, Plan, Residual
from re2fx.api import weigher
from re2fx.capture import capture
from re2fx.errors import ChainCutError, ModeMismatchError
from re2fx.graph import Flow
from re2fx.memory import saved_bytes
from re2fx.pipeline import make_plan
from re2fx.plan import Chain, Weight

from .compare import assert_reversible_equals_store
from .models import Block, Net
from .reference import Step, run_chain

# Dynamo hides this warning from everybody but those who make warnings errors.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")

X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LONG = torch.randn(4, 64, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
KIB = 2**10


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Compiled code does not outlive its test."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def seeded(model: type[nn.Module], *args: Any, **kwargs: Any) -> Any:
    """A model in fp64 with the same weights every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return model(*args, **kwargs).double()


def net(depth: int = 6, **kwargs: Any) -> Any:
    """A plain chain of residuals."""
    return seeded(Net, depth=depth, **kwargs)


class Around(nn.Module):
    """A residual around a chain of blocks, on the whole stream or on its mean over the tokens."""

    def __init__(self, width: int, depth: int, pooled: bool) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*[Block(width) for _ in range(depth)])
        self.out, self.pooled = nn.Linear(width, width), pooled

    def forward(self, x: Tensor) -> Tensor:
        h = x.mean(1, keepdim=True) if self.pooled else x
        return x + self.out(self.blocks(h))


class Nest(nn.Module):
    """A chain of such residuals.

    With ``pooled`` the outer stream is wide and nothing keeps it for the backward, while what the
    inner chains keep is small.
    """

    stem: nn.Module

    def __init__(self, pooled: bool, outer: int = 2, inner: int = 3, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Linear(4, width)
        self.outer = nn.Sequential(*[Around(width, inner, pooled) for _ in range(outer)])
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        value: Tensor = self.head(self.outer(self.stem(x)))
        return value


OUTER, INNER = "outer.?", "outer.?.blocks.*"


def rewired(model: nn.Module, *args: Any, **options: Any) -> re2fx.RewiredModule:
    """The model rewired, which is not to fail."""
    rev = re2fx.transform(model, *args, **options)
    assert isinstance(rev, re2fx.RewiredModule)
    return rev


def shape(plan: Plan) -> tuple[list[int], dict[str, int]]:
    """Chain lengths, and refusals by rule."""
    return [len(c) for c in plan.chains], dict(Counter(r.rule for r in plan.refusals))


def sentence(plan: Plan, rule: str) -> str:
    """The first refusal by a rule."""
    return next(r.sentence for r in plan.refusals if r.rule == rule)


def kept(model: nn.Module, x: Tensor) -> int:
    """Bytes kept for the backward when it is run."""
    return saved_bytes(lambda: model(x), model).total


# select=


def even(residual: Residual) -> bool:
    """Not the third block."""
    return residual.location.module != "blocks.2"


SELECTIONS: dict[str, tuple[Any, list[int], str]] = {
    "glob": ("blocks.[3-5]", [3], "no pattern of select= matches blocks.0"),
    "list": (["blocks.0", "blocks.1", "blocks.4", "blocks.5"], [2, 2], "matches blocks.2"),
    "tuple": (("blocks.0", "blocks.1"), [2], "matches blocks.2"),
    "negation": ("!blocks.2", [2, 3], "'!blocks.2' of select= excludes blocks.2"),
    "both": (["blocks.*", "!*.2"], [2, 3], "'!*.2' of select= excludes blocks.2"),
    "order does not matter": (["!*.2", "blocks.*"], [2, 3], "'!*.2' of select= excludes"),
    "function": (even, [2, 3], "the function select= says no to blocks.2"),
    "truth": (lambda r: r.location.module.strip("blocks.2"), [2, 3], "says no to blocks.2"),
}


@pytest.mark.parametrize("name", SELECTIONS)
def test_select(name: str) -> None:
    select, lengths, text = SELECTIONS[name]
    model = net()
    plan = re2fx.explain(model, select=select).plan
    assert shape(plan) == (lengths, {"not selected": 6 - sum(lengths)})
    assert text in sentence(plan, "not selected")
    rev = rewired(model, select=select)
    assert rev.plan == plan
    assert rev.eval().plan.signature() == plan.signature()


def test_a_chain_splits_at_what_is_not_selected() -> None:
    model = net()
    rev = rewired(model, select="!blocks.2", memory="store")
    blocks = [Step(lambda x, b=b: b(x) - x) for b in model.blocks]  # type: ignore[misc]
    x = run_chain(model.stem(X), blocks[:2], (0, 1, 1), "mean")[-1]
    x = run_chain(model.blocks[2](x), blocks[3:], (0, 1, 1), "mean")[-1]
    torch.testing.assert_close(rev(X), model.head(x), rtol=1e-12, atol=1e-12)
    assert_reversible_equals_store(rev, X)


def test_the_function_is_asked_about_what_explain_shows() -> None:
    asked: list[Residual] = []

    def note(residual: Residual) -> bool:
        asked.append(residual)
        return True

    model = net(dropout=0.1)
    plan = re2fx.explain(model, select=note).plan
    assert asked == list(plan.chains[0].residuals)


def test_a_residual_of_the_model_itself_has_an_empty_path() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.a(x)
            return x + self.b(x)

    assert shape(re2fx.explain(Flat(), select="*").plan) == ([2], {})
    with pytest.warns(re2fx.Re2fxWarning, match="no pattern of select= matches the model itself"):
        re2fx.transform(Flat(), select="?*")


def test_singles_left_by_a_selection_say_so() -> None:
    plan = re2fx.explain(net(3), select="!blocks.1").plan
    assert shape(plan) == ([], {"chain of one": 2, "not selected": 1})
    assert "no other selected residual continues its stream" in sentence(plan, "chain of one")
    assert "selected" not in sentence(re2fx.explain(net(1)).plan, "chain of one")


def test_what_is_inside_an_outer_residual_can_be_selected() -> None:
    model = seeded(Nest, pooled=False)
    assert shape(re2fx.explain(model).plan) == ([2], {"nested": 6})
    plan = re2fx.explain(model, select=INNER).plan
    assert shape(plan) == ([3, 3], {"not selected": 2})
    assert_reversible_equals_store(rewired(model, select=INNER), LONG)


class Unhashable:
    """A function that cannot be compared."""

    __hash__ = None  # type: ignore[assignment]

    def __call__(self, residual: Residual) -> bool:
        return True


BAD: list[tuple[dict[str, Any], str]] = [
    ({"select": 3}, r"select=3: expected a function that takes a re2fx.Residual, a pattern"),
    ({"select": []}, r"select=\[\]: expected a function"),
    ({"select": ""}, r"select='': expected a function"),
    ({"select": ["blocks.*", 1]}, r"select=\['blocks.\*', 1\]: expected a function"),
    ({"select": {"blocks.0"}}, r"select=\{'blocks.0'\}: expected a function"),
    ({"select": Unhashable()}, r"select=.*the function must be hashable"),
    ({"min_chain": 1}, r"min_chain=1: .* at least 2. A chain of one keeps two states"),
    ({"min_chain": True}, r"min_chain=True: expected a whole number"),
    ({"min_chain": 2.0}, r"min_chain=2.0: expected a whole number"),
    ({"min_saving": -1}, r"min_saving=-1: expected bytes as a whole number of at least 0"),
    ({"min_saving": 1.0}, r"min_saving=1.0: expected bytes .* below 1.0"),
    ({"min_saving": float("nan")}, r"min_saving=nan: expected bytes"),
    ({"min_saving": True}, r"min_saving=True: expected bytes"),
    ({"min_saving": "1 MiB"}, r"min_saving='1 MiB': expected bytes"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=lambda value: str(value)[:40])
def test_bad_values(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        re2fx.transform(net(), **options)
    with pytest.raises(OptionError, match=message):
        re2fx.explain(net(), **options)
    with pytest.raises(BackendCompilerFailed, match=message) as caught:
        compiled(net(), **options)(X)
    assert isinstance(caught.value.inner_exception, OptionError)


# min_chain=


def test_min_chain() -> None:
    model = net()
    plan = re2fx.explain(model, select="!blocks.2", min_chain=3).plan
    assert shape(plan) == ([3], {"short chain": 2, "not selected": 1})
    assert sentence(plan, "short chain") == (
        "its chain has 2 residuals, fewer than min_chain=3 asks for"
    )
    rev = rewired(model, select="!blocks.2", min_chain=3)
    assert rev.plan == plan
    assert_reversible_equals_store(rev, X)
    assert shape(re2fx.explain(net(1), min_chain=3).plan) == ([], {"chain of one": 1})


def test_a_short_outer_chain_gives_way() -> None:
    plan = re2fx.explain(seeded(Nest, pooled=False), min_chain=3).plan
    assert shape(plan) == ([3, 3], {"short chain": 2})


def test_short_chains_inside_a_long_one_are_nested() -> None:
    plan = re2fx.explain(seeded(Nest, pooled=False, outer=4), min_chain=4).plan
    assert shape(plan) == ([4], {"nested": 12})
    assert "longer" not in sentence(plan, "nested"), "there was no choice"


# min_saving=


def weight(model: nn.Module, x: Tensor) -> Weight:
    """What its only chain keeps."""
    found = re2fx.explain(model, x, min_saving=0).plan.chains[0].weight
    assert found is not None
    return found


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_prediction_is_what_training_keeps(dtype: torch.dtype, dropout: float) -> None:
    model, x = net(dropout=dropout).to(dtype), LONG.to(dtype)
    found = weight(model, x)
    rev = rewired(model)
    assert found.reversible == saved_bytes(lambda: rev(x), rev).chains[0]
    rev.memory = "store"
    assert found.stored - found.reversible > 0
    assert abs(kept(model, x) - kept(rewired(model), x) - found.saving) <= 2 * x.nbytes * 2


def test_min_saving_in_bytes() -> None:
    model = net()
    saving = weight(model, LONG).saving
    assert shape(re2fx.explain(model, LONG, min_saving=saving).plan) == ([6], {})
    plan = re2fx.explain(model, LONG, min_saving=saving + 1).plan
    assert shape(plan) == ([], {"small saving": 6})
    text = sentence(plan, "small saving")
    assert text.startswith("rewired, its chain of 6 residuals would keep 32.00 KiB for the ")
    assert f"less than min_saving={saving + 1} (" in text
    with pytest.warns(re2fx.Re2fxWarning, match="small saving"):
        assert re2fx.transform(model, LONG, min_saving=saving + 1) is model


def test_min_saving_as_a_fraction() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.long, self.turn, self.short = net(8).blocks, nn.Linear(8, 8), net(2).blocks

        def forward(self, x: Tensor) -> Tensor:
            value: Tensor = self.short(torch.tanh(self.turn(self.long(x))))
            return value

    model = Two().double()
    x = torch.cat([LONG, LONG], 2)
    plan = re2fx.explain(model, x, min_saving=0.0).plan
    long, short = (c.weight.saving / c.weight.stored for c in plan.chains if c.weight)
    assert 0 < short < long < 1
    plan = re2fx.explain(model, x, min_saving=(short + long) / 2).plan
    assert shape(plan) == ([8], {"small saving": 2})
    assert f"({short:.0%}), less than min_saving=0." in sentence(plan, "small saving")
    assert_reversible_equals_store(rewired(model, x, min_saving=(short + long) / 2), x)


def test_shapes_are_enough() -> None:
    model = net()
    assert weight(model, LONG.to("meta")) == weight(model, LONG)


@pytest.mark.parametrize("example_inputs", [None, (), {"x": None}])
def test_min_saving_needs_shapes(example_inputs: Any) -> None:
    for door in (re2fx.transform, re2fx.explain):
        with pytest.raises(OptionError, match=r"min_saving=1: .*Pass example_inputs= .*'meta'"):
            door(net(), example_inputs, min_saving=1)


class Untold(nn.Module):
    """Shapes do not say what it keeps."""

    def forward(self, x: Tensor) -> Tensor:
        return x * float(x.sum()) if self.training else x


class Veiled(nn.Module):
    """A nest whose stem asks for a value."""

    def __init__(self) -> None:
        super().__init__()
        self.untold, self.nest = Untold(), Nest(pooled=True)

    def forward(self, x: Tensor) -> Tensor:
        value: Tensor = self.nest(self.untold(x))
        return value


def test_bytes_that_cannot_be_predicted() -> None:
    model = Veiled().double()
    with pytest.raises(OptionError, match=r"min_saving=1: .*depends on values.*with select="):
        re2fx.transform(model, LONG, min_saving=1)
    plan = re2fx.explain(model, LONG).plan
    assert shape(plan) == ([2], {"nested": 6})
    assert "because it is longer; the bytes saved cannot be predicted: Veiled: what it" in sentence(
        plan, "nested"
    )
    with pytest.raises(OptionError, match=r"Net: it does not run in train mode .*RuntimeError"):
        re2fx.explain(net(), torch.ones(2, 5, dtype=torch.float64), min_saving=1)


# nested chains


@pytest.mark.parametrize("pooled", [False, True], ids=["outer saves more", "inner save more"])
def test_nested_chains_are_chosen_by_the_bytes_they_save(pooled: bool) -> None:
    model = seeded(Nest, pooled)
    rev = rewired(model, LONG)
    outer, inner = (rewired(model, select=select) for select in (OUTER, INNER))
    assert [len(c) for c in outer.plan.chains] == [2]
    assert [len(c) for c in inner.plan.chains] == [3, 3]
    better, worse = (inner, outer) if pooled else (outer, inner)
    assert kept(better, LONG) < kept(worse, LONG)
    assert rev.plan.signature() == better.plan.signature() == rev.eval().plan.signature()
    assert kept(rev.train(), LONG) == kept(better, LONG)
    assert torch.equal(rev(LONG), better(LONG))
    assert_reversible_equals_store(rev, LONG)


def test_the_choice_is_explained_with_its_figures() -> None:
    model = seeded(Nest, pooled=False)
    told = re2fx.explain(model, LONG)
    assert shape(told.plan) == ([2], {"nested": 6})
    found = told.plan.chains[0].weight
    assert found == Weight(stored=632 * KIB, reversible=32 * KIB)
    assert found.saving == kept(model, LONG) - kept(rewired(model, LONG), LONG)
    text = sentence(told.plan, "nested")
    assert "it lies inside the branch of add_3 (" in text
    assert text.endswith(
        "which is rewired as a whole; that chain saves 600.00 KiB for the backward, and those "
        "inside it would save 536.00 KiB"
    )
    assert "keeps 32.00 KiB for the backward instead of 632.00 KiB" in str(told)
    weights = json.loads(json.dumps(told.to_dict()))["chains"][0]["weight"]
    assert weights == {"stored": 632 * KIB, "reversible": 32 * KIB}

    text = sentence(re2fx.explain(seeded(Nest, pooled=True), LONG).plan, "nested")
    assert "a chain with add (" in text
    assert "what is rewired there saves 8.38 KiB for the backward, and this chain of 2 " in text
    assert "would save -22.12 KiB" in text


def test_without_shapes_the_longer_is_taken() -> None:
    told = re2fx.explain(seeded(Nest, pooled=True))
    assert shape(told.plan) == ([2], {"nested": 6})
    assert told.plan.chains[0].weight is None
    assert sentence(told.plan, "nested").endswith(
        "because it is longer; example_inputs= would let the bytes saved decide"
    )
    assert told.to_dict()["chains"][0]["weight"] is None


def test_an_outer_chain_that_saves_too_little_gives_way() -> None:
    """Its fraction is smaller, though it saves more."""
    model = seeded(Nest, pooled=False, outer=2, inner=12)
    (outer,) = re2fx.explain(model, LONG, select=OUTER, min_saving=0).plan.chains
    inner, _ = re2fx.explain(model, LONG, select=INNER, min_saving=0).plan.chains
    fractions = [c.weight.saving / c.weight.stored for c in (outer, inner) if c.weight]
    low, high = sorted(fractions)
    plan = re2fx.explain(model, LONG, min_saving=(low + high) / 2).plan
    winner = [2] if fractions[0] > fractions[1] else [12, 12]
    loser = {"nested": 24} if fractions[0] > fractions[1] else {"small saving": 2}
    assert shape(plan) == (winner, loser)


class Deep(nn.Module):
    """Three levels: two residuals of two chains of two residuals, each of two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.top = nn.Sequential(*[Wrap(Wrap(Block(4), 2), 2) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        value: Tensor = self.top(x)
        return value


class Wrap(nn.Module):
    """A residual around a chain of some residuals."""

    def __init__(self, block: nn.Module, times: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*[copy.deepcopy(block) for _ in range(times)])
        self.out = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(self.body(x))


@dataclass
class Scales:
    """Savings by the depth of a chain's modules; notes what is weighed together."""

    savings: Sequence[int]

    def __call__(self, flow: Flow, chains: Sequence[Chain]) -> list[Weight]:
        weights = []
        for chain in chains:
            level = chain.residuals[0].location.module.count("body")
            weights.append(Weight(100 + self.savings[level], 100))
        names = [r.add for chain in chains for r in chain.residuals]
        assert len(names) == len(set(names)), "chains that are weighed together share no node"
        return weights


@pytest.mark.parametrize(
    ("savings", "lengths", "figures"),
    [
        # One chain of 2 at the top, 2 below it, 4 below those.
        ((9, 4, 1), [2], ("saves 9 B", "would save 8 B")),
        ((8, 4, 2), [2], ("saves 8 B", "would save 8 B")),
        ((7, 4, 1), [2, 2], ("saves 8 B", "would save 7 B")),
        ((7, 1, 2), [2, 2, 2, 2], ("saves 8 B", "would save 7 B")),
        ((9, 1, 2), [2], ("saves 9 B", "would save 8 B")),
        ((-9, -4, -1), [2, 2, 2, 2], ("saves -2 B", "would save -4 B")),
    ],
)
def test_three_levels(savings: Any, lengths: list[int], figures: tuple[str, str]) -> None:
    model = Deep()
    captured = capture(model)
    _, plan = make_plan(captured.train, model, weigh=Scales(savings))
    assert [len(c) for c in plan.chains] == lengths
    assert {r.rule for r in plan.refusals} == {"nested"}
    said = " ".join(r.sentence for r in plan.refusals)
    assert all(figure in said for figure in figures), said


def state(model: nn.Module) -> Any:
    """All that a user could see change."""
    return (
        {k: v.clone() for k, v in model.state_dict().items()},
        [p.requires_grad for p in model.parameters()],
        [p.grad for p in model.parameters()],
        [m.training for m in model.modules()],
        torch.get_rng_state(),
    )


def test_weighing_leaves_everything_as_it_is() -> None:
    class Normed(Nest):
        def __init__(self) -> None:
            super().__init__(pooled=True)
            self.stem = nn.Sequential(self.stem, nn.BatchNorm1d(64), nn.Dropout(0.5))

    model = Normed().double().eval()
    next(model.parameters()).requires_grad_(False)
    before = state(model)
    x = LONG.clone().requires_grad_()
    assert shape(re2fx.explain(model, x).plan) == ([3, 3], {"nested": 2})
    torch.testing.assert_close(state(model), before, rtol=0, atol=0)
    assert x.grad is None


class Bent(nn.Module):
    """Its branch keeps a value more if its input needs a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        value: Tensor = x + self.layer(torch.sin(torch.cos(x)))
        return value


STEPS: dict[str, tuple[Any, Tensor, dict[str, Any]]] = {
    "outer": (lambda: seeded(Nest, pooled=False), LONG, {}),
    "inner": (lambda: seeded(Nest, pooled=True), LONG, {}),
    "the input is the stream": (
        lambda: nn.Sequential(Bent(), Bent(), nn.Dropout(0.1), Bent(), Bent()),
        LONG.float(),
        {"min_saving": 0},
    ),
}


@pytest.mark.parametrize("name", STEPS)
def test_what_changes_from_step_to_step_changes_no_plan(name: str) -> None:
    build, x, options = STEPS[name]
    model = build()
    wanted = re2fx.explain(model, x, **options).plan
    weights = [c.weight for c in wanted.chains]
    assert None not in weights

    def same(x: Tensor = x) -> None:
        plan = re2fx.explain(model, x, **options).plan
        assert plan == wanted
        assert [c.weight for c in plan.chains] == weights

    same(x.clone().requires_grad_())
    with torch.no_grad():
        same()
    with torch.autocast("cpu", torch.bfloat16):
        same()
    model.eval().requires_grad_(False)
    same()


class Noisy(Around):
    """In train mode its branch keeps the whole stream, in eval mode next to nothing."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.out(self.blocks(x.mean(1, keepdim=True)))
        if self.training:
            h = torch.sin(h * torch.rand_like(x))
        return x + h


def test_eval_mode_is_rewired_as_train_mode_is() -> None:
    """Weighed by itself its graph would be rewired inside."""
    model = seeded(Nest, pooled=True)
    model.outer = nn.Sequential(*[Noisy(8, 3, pooled=True) for _ in range(2)]).double()
    captured = capture(model, LONG)
    alone = weigher(model, LONG, captured, "branch")
    assert shape(make_plan(captured.eval, model, weigh=alone)[1])[0] == [3, 3]
    rev = rewired(model, LONG)
    assert [len(c) for c in rev.plan.chains] == [2]
    weights = [c.weight for c in rev.plan.chains]
    assert [c.weight for c in rev.eval().plan.chains] == weights
    assert kept(rev.train(), LONG) < kept(rewired(model, select=INNER), LONG)
    assert_reversible_equals_store(rev, LONG)


def test_the_report_says_the_same() -> None:
    model = net(dropout=0.1)
    (row,) = re2fx.report(model, LONG).chains
    assert weight(model, LONG) == Weight(row.kept.store, row.kept.reversible or 0)
    assert [c.residuals for c in re2fx.report(seeded(Nest, pooled=True), LONG).chains] == [3, 3]


def test_a_rewired_module_knows_nothing_of_the_policy() -> None:
    model = seeded(Nest, pooled=True)
    rev = rewired(model, LONG, select=lambda residual: True, min_saving=1)
    again = pickle.loads(pickle.dumps(rev))
    assert again.plan == rev.plan
    assert again.plan.chains[0].weight == rev.plan.chains[0].weight
    assert torch.equal(again(LONG), rev(LONG))


# the backend


def compiled(
    model: Any, fullgraph: bool = True, dynamic: bool | None = None, **options: Any
) -> Any:
    """A compiled model."""
    options = {"compiler": "aot_eager", **options}
    return torch.compile(
        model, backend="re2fx", options=options, fullgraph=fullgraph, dynamic=dynamic
    )


def plans_of(run: Any, *inputs: Any) -> list[Plan]:
    """The plans made while a compiled model is called."""
    plans: list[Plan] = []

    def spy(*args: Any) -> tuple[Flow, Plan]:
        flow, plan = make_plan(*args)
        plans.append(plan)
        return flow, plan

    with patch("re2fx.backend.make_plan", spy):
        run(*inputs)
    return plans


POLICIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "glob": (net, {"select": ["blocks.*", "!blocks.2"]}),
    "function": (net, {"select": even}),
    "min_chain": (net, {"select": even, "min_chain": 3}),
    "outer": (lambda: seeded(Nest, pooled=False), {}),
    "inner": (lambda: seeded(Nest, pooled=True), {}),
    "outer selected": (lambda: seeded(Nest, pooled=True), {"select": OUTER}),
    "bytes": (lambda: seeded(Nest, pooled=True), {"min_saving": 4 * KIB}),
    "fraction": (lambda: seeded(Nest, pooled=False), {"min_saving": 0.5}),
}


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", POLICIES)
def test_the_backend_makes_the_same_plan(name: str, mode: str) -> None:
    build, options = POLICIES[name]
    model = build().train(mode == "train")
    x = LONG.clone().requires_grad_()
    rev = rewired(model, x, **options)
    fast = compiled(model, **options)
    (plan,) = plans_of(fast, x)
    assert plan.signature() == rev.plan.signature()
    assert [r.rule for r in plan.refusals] == [r.rule for r in rev.plan.refusals]
    assert [c.weight for c in plan.chains] == [c.weight for c in rev.plan.chains]
    torch.testing.assert_close(fast(x), rev(x), rtol=1e-12, atol=1e-12)
    got = torch.autograd.grad(fast(x).square().sum(), [x, *model.parameters()])
    wanted = torch.autograd.grad(rev(x).square().sum(), [x, *model.parameters()])
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


def test_dropout_counts_in_eval_mode_too() -> None:
    """Dynamo bakes the flag in; the plan must not depend on it."""
    model = net(dropout=0.1)
    saving = weight(model, LONG).saving
    assert saving > weight(net(), LONG).saving, "dropout keeps a mask"
    fast = compiled(model, min_saving=saving)
    for training in (True, False):
        (plan,) = plans_of(fast.train(training), LONG)
        assert [c.weight for c in plan.chains] == [weight(model, LONG)]


@pytest.mark.parametrize("pooled", [False, True])
def test_symbolic_sizes(pooled: bool) -> None:
    model = seeded(Nest, pooled)
    fast = compiled(model, dynamic=True)
    wanted = rewired(model, LONG).plan
    plans = plans_of(fast, LONG)
    assert plans, "Dynamo may compile twice: first with the floats of the model as inputs"
    for plan in plans:
        assert plan.signature() == wanted.signature()
        assert [c.weight for c in plan.chains] == [c.weight for c in wanted.chains]
    other = torch.cat([LONG, LONG], 1)
    assert plans_of(fast, other) == [], "weighing put no guard on the sizes"
    torch.testing.assert_close(fast(other), rewired(model, LONG)(other), rtol=1e-12, atol=1e-12)


def test_shapes_for_which_other_chains_save_more_are_an_error() -> None:
    """For one token the pooled stream is as wide as the other one."""
    model = seeded(Nest, pooled=True, inner=2)
    one = LONG[:, :1]
    assert shape(re2fx.explain(model, one).plan)[0] == [2]
    fast = compiled(model, dynamic=False)
    fast(LONG)
    with pytest.raises(BackendCompilerFailed, match="rewired differently in two compil") as caught:
        fast(one)
    assert isinstance(caught.value.inner_exception, ModeMismatchError)
    torch.compiler.reset()
    fast = compiled(model, dynamic=False, select=INNER)
    fast(LONG)
    torch.testing.assert_close(fast(one), rewired(model, select=INNER)(one))


def test_other_options_are_another_network() -> None:
    model = net()
    outputs = []
    for select in (None, ["!blocks.2"], ["!blocks.3"], even):
        torch.compiler.reset()
        outputs.append(compiled(model, select=select)(X))
    assert torch.equal(outputs[1], outputs[3])
    assert not torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[1], outputs[2])


def test_a_rewired_module_takes_no_policy() -> None:
    rev = rewired(net())
    for options in ({"select": "*"}, {"min_chain": 3}, {"min_saving": 0}):
        torch.compiler.reset()
        with pytest.raises(BackendCompilerFailed, match=r"rewired already; .*min_saving.* are"):
            compiled(rev, **options)(X)


def test_a_cut_behind_what_is_not_selected() -> None:
    """A chain ends at what is not selected, so a break behind that cuts none."""

    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.blocks, self.head = nn.Linear(4, 8), net(4).blocks, nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.blocks(self.stem(x))
            graph_break()
            value: Tensor = self.head(x)
            return value

    model = Broken().double()
    with pytest.raises(BackendCompilerFailed) as caught:
        compiled(model, fullgraph=False)(X)
    assert isinstance(caught.value.inner_exception, ChainCutError)
    torch.compiler.reset()
    fast = compiled(model, fullgraph=False, select="!blocks.3")
    expected = rewired(model, select="!blocks.3")(X)
    torch.testing.assert_close(fast(X), expected, rtol=1e-12, atol=1e-12)


def test_emit_takes_the_policy() -> None:
    blocks = [
        re2fx.emit(net(), X, **options).blocks
        for options in ({}, {"select": even}, {"select": even, "min_chain": 3})
    ]
    assert blocks == [6, 5, 3]
