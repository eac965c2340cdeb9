"""One coupling per chain, and couplings that change between two steps."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import re2fx
from re2fx import Chain, ConditioningError, Coupling, OptionError

from .compare import assert_reversible_equals_store, assert_same, step
from .models import Block, Net
from .reference import Step, run_chain
from .test_backend import EXECUTORS
from .test_backend import step as compiled_step
from .test_pieces import Dropping
from .test_routes import Branching

X = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
RE2TAL, NEAR, FAR = Coupling.re2tal(), Coupling(0.5, 0.5, 1.25), Coupling(0.3, 0.7, 1)


@pytest.fixture(autouse=True)
def fresh() -> Any:
    torch.manual_seed(0)
    yield
    torch.compiler.reset()


class Halved(Block):
    """Its skip has a constant factor."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.9 * x + self.outer(self.drop(F.gelu(self.inner(self.norm(x)))))


class Two(nn.Module):
    """Two chains of different lengths, the second with scaled skips and batch norm's buffers."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 8)
        self.first = nn.Sequential(*[Block(8, dropout) for _ in range(3)])
        self.middle = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.BatchNorm1d(6))
        self.second = nn.Sequential(*[Halved(6, dropout) for _ in range(4)])
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.second(self.middle(self.first(self.stem(x)))))
        return out


def by_hand(model: Two, x: Tensor, couplings: tuple[Coupling, Coupling], readout: str) -> Tensor:
    """The rewired network in plain Python."""

    def stage(x: Tensor, blocks: nn.Sequential, coupling: Coupling, skip: float) -> Tensor:
        steps = [Step(lambda p, b=b: b(p) - skip * p, skip) for b in blocks]  # type: ignore[misc]
        return run_chain(x, steps, (coupling.a, coupling.b, coupling.c), readout)[-1]

    x = stage(model.stem(x), model.first, couplings[0], 1.0)
    out: Tensor = model.head(stage(model.middle(x), model.second, couplings[1], 0.9))
    return out


def made(model: nn.Module, **options: Any) -> re2fx.RewiredModule:
    """Transform and narrow the type."""
    rev = re2fx.transform(model, **options)
    assert isinstance(rev, re2fx.RewiredModule)
    return rev


# per chain


def longer(chain: Chain) -> Coupling:
    """By the chain's length."""
    return NEAR if len(chain) == 3 else FAR


@pytest.mark.parametrize("coupling", [[NEAR, FAR], (NEAR, FAR), longer])
@pytest.mark.parametrize("readout", ["mean", "sum"])
def test_one_per_chain(coupling: Any, readout: str) -> None:
    model = Two().double()
    rev = made(model, coupling=coupling, readout=readout)
    assert rev.coupling == (NEAR, FAR)
    assert_reversible_equals_store(rev, X)
    torch.testing.assert_close(rev(X), by_hand(model, X, (NEAR, FAR), readout))
    same = made(model, coupling=lambda chain: FAR)
    assert same.coupling == FAR


@pytest.mark.parametrize(
    ("coupling", "message"),
    [
        ([NEAR], "1 given for 2 chains"),
        ([], "0 given for 2 chains"),
        ((NEAR, FAR, FAR), "3 given for 2 chains"),
        (lambda chain: 0.5, "the function returned 0.5 for chain 0; expected a re2fx.Coupling"),
        ([NEAR, (0, 1, 1)], "expected a re2fx.Coupling, a sequence with one per chain, or a func"),
        (Coupling, "expected a re2fx.Coupling"),
        ("re2tal", "expected a re2fx.Coupling"),
        ([NEAR, Coupling.original()], r"\(1, 0, 1\): b = 0 cannot be inverted"),
    ],
)
def test_what_does_not_fit(coupling: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        re2fx.transform(Two(), coupling=coupling)
    rev = made(Two(), coupling=[FAR, NEAR])
    error = ConditioningError if "inverted" in message else OptionError
    with pytest.raises(error, match="b = 0" if "inverted" in message else message):
        rev.coupling = coupling
    assert rev.coupling == (FAR, NEAR)


def test_each_chain_is_looked_at_by_itself() -> None:
    weak = Coupling(0, 1e-7, 1)
    with pytest.raises(ConditioningError, match=r"chain 1 of 4 residuals with coupling \(0, 9e-08"):
        re2fx.transform(Two(), coupling=lambda chain: weak if len(chain) == 4 else NEAR)
    with pytest.raises(OptionError, match="2 given for 1 chain;"):
        re2fx.transform(Net(), coupling=[NEAR, FAR])


def test_report_takes_them() -> None:
    report = re2fx.report(Two(), X.float(), coupling=[NEAR, FAR])
    assert [chain.kept.reversible is not None for chain in report.chains] == [True, True]
    refused = re2fx.report(Two(), X.float(), coupling=[NEAR, Coupling(0, 1e-7, 1)])
    assert "chain 1 of 4 residuals" in refused.reason


# pieces


def pieces(**options: Any) -> Any:
    torch.manual_seed(3)
    return re2fx.transform(Dropping().double(), X.reshape(1, 5, 4), **options)


def test_one_per_chain_of_pieces() -> None:
    seen: list[str] = []

    def listed(chain: Chain) -> Coupling:
        seen.append(chain.residuals[0].location.module)
        return Coupling(0, 1, 1 + len(seen) / 8)

    rev, x = pieces(coupling=listed), X.reshape(1, 5, 4)
    found: Any = rev.coupling
    assert type(rev).__mro__[1] is re2fx.PiecewiseModule
    assert seen == [f"layers.{i}.first" for i in range(4)]
    assert [c.c for c in found] == [1.125, 1.25, 1.375, 1.5]
    assert rev.memory == "reversible"
    assert_reversible_equals_store(rev, x)
    other = pieces(coupling=list(found))
    assert_same(step(other, "reversible", x), step(rev, "store", x), 1e-12)
    with pytest.raises(OptionError, match="2 given for 4 chains"):
        pieces(coupling=[NEAR, NEAR])
    rev.coupling = FAR
    assert [piece.coupling for piece in rev.pieces.values()] == [FAR] * 4
    assert_same(step(rev, "reversible", x), step(pieces(coupling=FAR), "store", x), 1e-12)
    with pytest.raises(ConditioningError):
        rev.coupling = [NEAR, NEAR, NEAR, Coupling(0, 1e-15, 1)]
    assert rev.coupling == FAR, "all or none"
    assert pickle.loads(pickle.dumps(rev)).coupling == FAR


# change

STEPS: list[Any] = [FAR, RE2TAL, (NEAR, FAR), (FAR, Coupling(0.5, 0.5, 0.25)), longer, NEAR]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("readout", ["mean", "sum"])
@pytest.mark.parametrize("order", [("store", "reversible"), ("reversible", "store")])
def test_a_changed_network_is_the_one_made_so(
    readout: str, training: bool, order: tuple[str, ...]
) -> None:
    model = Two(dropout=0.3).double().train(training)
    rev = made(model, readout=readout)
    for coupling in STEPS:
        rev.coupling = coupling
        wanted = made(model, coupling=coupling, readout=readout)
        assert rev.coupling == wanted.coupling
        for memory in order:
            assert_same(step(rev, memory, X), step(wanted, "store", X), 1e-11)
        rev.train(not training)
        assert_same(step(rev, order[0], X), step(wanted, "store", X), 1e-11)
        rev.train(training)


def test_a_backward_undoes_what_its_forward_did() -> None:
    model = Net().double()
    rev = made(model)
    wanted: dict[Coupling, list[Tensor]] = {}
    for coupling in (NEAR, FAR):
        stored = made(model, coupling=coupling, memory="store")
        wanted[coupling] = list(torch.autograd.grad(stored(X).sum(), list(model.parameters())))
    rev.coupling = NEAR
    first = rev(X).sum()
    rev.coupling = FAR
    second = rev(X).sum()
    rev.coupling = Coupling(0.1, 0.9, 2)
    for loss, coupling in ((first, NEAR), (second, FAR)):
        got = torch.autograd.grad(loss, list(model.parameters()))
        torch.testing.assert_close(list(got), wanted[coupling], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("readout", ["mean", "sum"])
def test_everything_that_looks_sees_the_present_one(readout: str) -> None:
    model = Two().double()
    rev, wanted = made(model, readout=readout), made(model, coupling=[FAR, NEAR], readout=readout)
    rev(X)
    before = rev.code
    rev.coupling = (FAR, NEAR)
    assert rev.plan is not None
    assert rev.code == wanted.code != before
    assert [name for name, _ in rev.history] == [name for name, _ in wanted.history]
    for (_, a), (_, b) in zip(rev.history, wanted.history, strict=True):
        assert str(a) == str(b)
    assert {row.status for row in re2fx.diff(rev, wanted).rows} == {"kept"}
    with re2fx.record() as calls:
        rev(X)
    frames: list[Any] = [call.records[0].frame for call in calls]
    assert [frame.coupling for frame in frames] == [FAR, NEAR.scaled(0.9, 1)]
    checked = re2fx.verify(rev, X)
    checked.raise_for_findings()
    assert rev.eval().code == wanted.code
    rev.train()
    with re2fx.DriftGuard(rev, every=1, tolerance=1e-9, action="raise") as guard:
        for coupling in (NEAR, FAR, RE2TAL):
            rev.coupling = coupling
            rev(X).sum().backward()
    assert len(guard.history) == 3


def test_emit_shows_the_present_one() -> None:
    rev = made(Net().double())
    emitted = re2fx.emit(rev, X)
    rev.coupling = FAR
    again, wanted = re2fx.emit(rev, X), re2fx.emit(made(Net().double(), coupling=FAR), X)
    texts = [re.sub(r"marks \d+", "", str(e)) for e in (again, wanted, emitted)]
    assert texts[0] == texts[1] != texts[2]


def through_pickle(module: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(module))


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, through_pickle])
@pytest.mark.parametrize("readout", ["mean", "sum"])
def test_copies_have_it(copied: Callable[[nn.Module], Any], readout: str) -> None:
    model = Two().double()
    rev = made(model, readout=readout)
    rev.coupling = (FAR, NEAR)
    other = copied(rev)
    assert other.coupling == (FAR, NEAR)
    assert_same(step(other, "reversible", X), step(rev, "store", X), 1e-12)
    expected = step(rev, "reversible", X)
    other.coupling = NEAR
    assert rev.coupling == (FAR, NEAR)
    assert_same(step(rev, "reversible", X), expected, 0)
    assert_same(step(rev, "store", X), expected, 1e-11)
    wanted = made(model, coupling=NEAR, readout=readout)
    for memory in ("reversible", "store"):
        assert_same(step(other, memory, X), step(wanted, "store", X), 1e-11)


def logits(rev: Any, x: Tensor, memory: str) -> tuple[Tensor, list[Tensor | None]]:
    rev.memory = memory
    rev.zero_grad()
    out = rev(x).logits
    out.square().sum().backward()
    return out.detach(), [p.grad for p in rev.parameters()]


@pytest.mark.parametrize(
    ("readout", "copied"),
    [("mean", None), ("sum", None), ("mean", copy.copy), ("sum", copy.deepcopy),
     ("mean", through_pickle)],
)  # fmt: skip
def test_every_way_of_calling_it(readout: str, copied: Any) -> None:
    """Captured before the change, after it, and in a copy that goes its own way."""
    model = Branching().double()
    x = X.reshape(1, 5, 4).expand(3, 5, 4).contiguous()
    rev: Any = made(model, example_inputs=x, readout=readout)
    rev(x[:1])
    given = rev
    if copied is not None:
        rev = copied(given)
    assert len(rev._variants) == 2
    for coupling in (FAR, NEAR):
        rev.coupling = coupling
        wanted = made(model, example_inputs=x, readout=readout, coupling=coupling)
        for inputs in (x, x[:1], x[:1, :1])[: 2 if coupling == FAR else 3]:
            for memory in ("reversible", "store"):
                got = logits(rev, inputs, memory)
                stored = logits(wanted, inputs, "store")
                torch.testing.assert_close(got, stored, rtol=1e-10, atol=1e-11)
    assert len(rev._variants) == 3
    if copied is not None:
        assert given.coupling == RE2TAL
        wanted = made(model, example_inputs=x, readout=readout)
        got = logits(given, x[:1], "store")
        torch.testing.assert_close(got, logits(wanted, x[:1], "store"), rtol=1e-10, atol=1e-11)


class Constant(Net):
    """Reads a tensor that is no member, which a capture holds under a name of its own."""

    def forward(self, x: Tensor, scale: float | None = None) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x) * torch.tensor([0.5] * 8 if scale is None else [0.25] * 8).to(x.dtype)
        out: Tensor = self.head(x)
        return out


def test_constants_of_later_captures() -> None:
    """Without renaming them in the normalised graph too, they are those of the first capture."""
    model = Constant().double()
    x = X.reshape(1, 5, 4)
    rev, wanted = made(model, example_inputs=x), made(model, example_inputs=x, coupling=FAR)
    rev(x, scale=0.25)
    rev.coupling = FAR
    for given in ({}, {"scale": 0.25}):
        with torch.no_grad():
            torch.testing.assert_close(rev(x, **given), wanted(x, **given), rtol=1e-12, atol=0)
        torch.testing.assert_close(rev(x, **given), wanted(x, **given), rtol=1e-12, atol=0)


def test_memory_and_what_it_allows() -> None:
    rev = made(Net().double(), memory="store")
    rev.coupling = Coupling.original()
    original = step(rev, "store", X)
    with pytest.raises(ConditioningError, match="b = 0 cannot be inverted"):
        rev.memory = "reversible"
    assert rev.memory == "store"
    rev.coupling = FAR
    assert_reversible_equals_store(rev, X)
    with pytest.raises(ConditioningError, match="rounding grows"):
        rev.coupling = Coupling(0, 1e-14, 1)
    assert rev.coupling == FAR
    rev.memory = "store"
    rev.coupling = Coupling.original()
    assert_same(step(rev, "store", X), original, 0)


def test_an_edited_graph_keeps_its_coupling() -> None:
    rev = made(Net().double())
    stale = rev.graph
    rev.coupling = FAR
    for node in stale.nodes:
        if node.target is F.gelu:
            node.target = F.silu
    with pytest.raises(OptionError, match=r"Read `graph` again"):
        rev.recompile()
    for node in rev.graph.nodes:
        if node.op == "call_function" and node.target is F.gelu:
            node.target = F.silu
    rev.recompile()
    assert_reversible_equals_store(rev, X)
    for edited in (rev, copy.deepcopy(rev), through_pickle(rev)):
        with pytest.raises(OptionError, match="was edited"):
            edited.coupling = NEAR
        assert edited.coupling == FAR
        assert "silu" in edited.code


def test_setting_what_it_is_makes_nothing_anew() -> None:
    rev = made(Net().double())
    program, graph = rev._variants[0].programs[True], rev.graph
    rev.coupling = Coupling(0.0, 1.0, 1.0)
    assert rev._variants[0].programs[True] is program
    assert rev.graph is graph


def test_the_plain_graph_is_made_when_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    rev = made(Net().double())
    times: list[bool] = []
    recouple = rev._executors.recouple

    def counted(*args: Any) -> Any:
        times.append(True)
        return recouple(*args)

    object.__setattr__(rev._executors, "recouple", counted)
    for i in range(20):
        rev.coupling = Coupling(i / 40, 1 - i / 40, 1)
        rev(X).sum().backward()
    assert times == []
    with torch.no_grad():
        rev(X)
        rev(X)
    assert len(times) == 1


# compiled


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("options", EXECUTORS.values(), ids=EXECUTORS)
@pytest.mark.parametrize("memory", ["reversible", "store"])
def test_compiled_code_has_the_present_one(options: Any, memory: str) -> None:
    if memory == "store" and "scope" in options:
        options = {"compiler": "aot_eager"}
    model = Two().double()
    rev = made(model, memory=memory)
    run = torch.compile(rev, backend="re2fx", options=options, fullgraph=True)
    for coupling in (RE2TAL, FAR, (NEAR, FAR), RE2TAL):
        rev.coupling = coupling
        wanted = step(made(model, coupling=coupling), "store", X)
        rev.prepare(marked=True)  # as another compilation does: what was traced is there again
        for _ in range(2):
            assert_same(compiled_step(run, rev, X), wanted, 1e-11)
    with torch.no_grad():
        torch.testing.assert_close(run(X), made(model, coupling=RE2TAL)(X))


def test_dynamo_guards_the_coefficients() -> None:
    """By themselves, not only through the functions that are made anew with them."""
    rev = made(Net(2).double())
    run: Any = torch.compile(rev, backend="re2fx", options={"compiler": "eager"})
    counted = torch._dynamo.utils.counters["stats"]
    before = counted["unique_graphs"]
    for text in (rev._coefficients, "others", "others"):
        rev._coefficients = text
        run(X)
    assert counted["unique_graphs"] == before + 2


def test_other_backends_have_the_present_one() -> None:
    model = Two().double()
    rev = made(model, memory="store")
    run: Any = torch.compile(rev, backend="aot_eager", fullgraph=True)
    for coupling in (RE2TAL, FAR):
        rev.coupling = coupling
        assert_same(
            compiled_step(run, rev, X), step(made(model, coupling=coupling), "store", X), 1e-11
        )


def test_more_changes_than_dynamo_compiles_for() -> None:
    """Then the module runs without being compiled, and right."""
    rev, wanted = made(Net().double()), made(Net().double(), memory="store")
    wanted.load_state_dict(rev.state_dict())
    run: Any = torch.compile(rev, backend="re2fx", options={"compiler": "eager"})
    for i in range(torch._dynamo.config.recompile_limit + 2):
        rev.coupling = wanted.coupling = Coupling(i / 40, 1 - i / 40, 1)
        assert_same(compiled_step(run, rev, X), compiled_step(wanted, wanted, X), 1e-11)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("coupling", [(NEAR, FAR), longer])
def test_the_backend_takes_one_per_chain(coupling: Any) -> None:
    model = Two().double()
    options = {"compiler": "aot_eager", "coupling": coupling}
    run: Any = torch.compile(model, backend="re2fx", options=options, fullgraph=True)
    wanted = step(made(model, coupling=(NEAR, FAR)), "store", X)
    assert_same(compiled_step(run, model, X), wanted, 1e-11)


@pytest.mark.parametrize(
    ("coupling", "message"), [([NEAR], "1 given for 2 chains"), ("b", "expected a re2fx.Coupling")]
)
def test_what_does_not_fit_the_backend(coupling: Any, message: str) -> None:
    options = {"compiler": "eager", "coupling": coupling}
    run: Any = torch.compile(Two().double(), backend="re2fx", options=options)
    with pytest.raises(Exception, match=message):
        run(X)
