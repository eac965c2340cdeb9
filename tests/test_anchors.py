"""Anchors: true pairs of states that a chain keeps where reconstructing would lose digits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import re2fx
from re2fx import Coupling
from re2fx.memory import saved_bytes

from .compare import assert_reversible_equals_store, assert_same, step, weighted
from .joint import assert_compiled_equals_store
from .models import Block, ConvNet, Net, Tapped
from .programs import Block as Piece
from .programs import Program, Stage, build
from .test_backend import EXECUTORS, compiled

# Dynamo hides this warning from everybody but those who make warnings errors.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")

COUPLINGS = [Coupling(0.5, 0.5, 1), Coupling.momentum(0.5), Coupling(0.5, 0.3, 1)]
FORCED = 2e-14  # a tolerance that fp64 meets for a few blocks only
X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
IMAGE = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Compiled code does not outlive its test."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def rewired(model: nn.Module, tolerance: float = FORCED, **options: Any) -> re2fx.RewiredModule:
    """Transform with one of the couplings."""
    options = {"coupling": COUPLINGS[0], **options}
    rev = re2fx.transform(model, drift_tolerance=tolerance, **options)
    assert isinstance(rev, re2fx.RewiredModule)
    return rev


def anchors(rev: nn.Module, *inputs: Any) -> list[list[int]]:
    """Per chain the blocks in front of which the last call kept a pair."""
    with re2fx.record() as calls:
        rev(*inputs)
    return [[i for i, r in enumerate(call.records) if r.anchor is not None] for call in calls]


# gradients, in fp64 with anchors forced


@pytest.mark.parametrize("coupling", COUPLINGS, ids=str)
@pytest.mark.parametrize("readout", ["mean", "sum", "last"])
def test_gradients_are_those_of_stored_execution(coupling: Coupling, readout: str) -> None:
    rev = rewired(Net(16, dropout=0.3).double(), coupling=coupling, readout=readout)
    assert len(anchors(rev, X)[0]) >= 2
    assert_reversible_equals_store(rev, X, tolerance=1e-10)


@pytest.mark.parametrize("activation", ["branch", "stream"])
def test_batch_norm_and_dropout(activation: str) -> None:
    rev = rewired(ConvNet(12, dropout=0.3).double(), activation=activation)
    assert anchors(rev, IMAGE)[0]
    assert_reversible_equals_store(rev, IMAGE, tolerance=1e-9)


def test_sides_and_taps() -> None:
    rev = rewired(Tapped(depth=14).double())
    x, context = torch.randn(2, 3, 8, dtype=torch.float64)
    assert anchors(rev, x, context)[0]
    assert_reversible_equals_store(rev, x, context, tolerance=1e-10)
    assert_reversible_equals_store(
        rev, x, context, tolerance=1e-10, loss=lambda out: weighted(out[1])
    )


def test_links_between_the_blocks() -> None:
    """The pair is kept behind the shape-only operations, as its block reads it."""
    blocks = tuple(Piece(("mlp",), link="permute, contiguous" if i else None) for i in range(14))
    network, x, cond = build(Program((2, 4, 4), (Stage("linear", blocks),)))
    rev = rewired(network)
    assert anchors(rev, x, cond)[0]
    assert_reversible_equals_store(rev, x, cond, tolerance=1e-10)


def test_double_and_repeated_backward() -> None:
    rev = rewired(Net(14).double())
    weights = [p for name, p in rev.named_parameters() if "weight" in name and "head" not in name]
    outcomes = []
    for memory in ("store", "reversible"):
        rev.memory = memory
        x = X.clone().requires_grad_()
        out = weighted(rev(x))
        (first,) = torch.autograd.grad(out, x, create_graph=True)
        penalty = torch.autograd.grad(first.square().sum(), weights, retain_graph=True)
        again = torch.autograd.grad(out, [x, *rev.parameters()])
        outcomes.append([first.detach(), *penalty, *again])
    for got, wanted in zip(*outcomes, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


def test_only_an_early_block_is_differentiated() -> None:
    """The walk begins at the anchor behind it: blocks behind that run no second time."""
    rev = rewired(Net(16).double())
    (places,) = anchors(rev, X)
    runs = [0] * 16

    def count(index: int) -> Any:
        return lambda *_: runs.__setitem__(index, runs[index] + 1)

    with re2fx.record() as calls:
        rev(X)
    (call,) = calls
    for index in range(16):
        rev.get_submodule(f"blocks.{index}.inner").register_forward_hook(count(index))
    call.unpack(0, 0)
    assert [index for index, number in enumerate(runs) if number] == list(range(places[0]))
    torch.testing.assert_close(call.reconstruct(), rev.get_submodule("stem")(X))


# what is kept


def test_anchors_are_what_is_kept() -> None:
    """Two states each; the last two of the chain besides."""
    model = Net(16, 32).double()
    few, many = (rewired(model, tolerance) for tolerance in (1e-3, FORCED))
    state, places = 5 * 32 * 8, anchors(many, X)[0]
    assert anchors(few, X) == [[]]
    assert saved_bytes(lambda: few(X), model).chains == (2 * state,)
    assert saved_bytes(lambda: many(X), model).chains == (2 * state * (1 + len(places)),)


def test_the_report_counts_them() -> None:
    model, coupling = Net(48, 64), Coupling(0.5, 0.5, 1)
    found = re2fx.report(model, torch.randn(32, 4), coupling=coupling, measure=True)
    (chain,) = found.chains
    assert chain.anchors == 3
    assert chain.kept.reversible == 2 * chain.state * (1 + chain.anchors)
    assert found.measured is not None
    assert found.measured.reversible == found.total.reversible
    assert "Chain 0 keeps a pair of states at 3 anchors, 48.0 KiB of it" in str(found)
    tighter = re2fx.report(model, torch.randn(32, 4), coupling=coupling, drift_tolerance=1e-5)
    assert tighter.chains[0].anchors > 3
    assert "anchor" not in str(re2fx.report(model, torch.randn(32, 4)))


def test_explain_counts_them() -> None:
    said = "3 anchors, a pair of states kept in front of residual 9, 22, 35"
    coupling = Coupling(0.5, 0.5, 1)
    explanation = re2fx.explain(Net(48), coupling=coupling)
    assert said in str(explanation)
    assert any(said in str(table.rows) for table in explanation.tables())
    assert said in explanation.to_dict()["chains"][0]["notes"][0]
    assert said in str(re2fx.explain(re2fx.transform(Net(48), coupling=coupling)))
    assert "anchor" not in str(re2fx.explain(Net(48)))
    refused = re2fx.explain(Net(48), coupling=coupling, drift_tolerance=1e-7)
    assert "cannot be reversed: rounding grows 2-fold" in str(refused)


def test_they_follow_the_dtype_of_the_streams() -> None:
    """Cast after the transform, too."""
    rev = rewired(Net(24).double(), 1e-3)
    assert anchors(rev, X) == [[]]
    rev.float()
    assert anchors(rev, X.float()) == [[11]]


# what somebody else does to a kept state


def test_a_kept_state_that_is_written_to_is_noticed() -> None:
    """The chain's input is the caller's; of 14 blocks the anchor in front of block 1 has it."""
    rev = rewired(nn.Sequential(*[Block(8) for _ in range(14)]), 1e-3)
    x = torch.randn(3, 8)
    assert anchors(rev, x) == [[1]]
    out = rev(x)
    x.add_(1)
    with pytest.raises(re2fx.ReplayError, match=r"kept here as an anchor was changed in place"):
        out.sum().backward()


def test_the_walk_cannot_begin_at_one_that_was_written_to() -> None:
    rev = rewired(nn.Sequential(*[Block(8) for _ in range(14)]), 1e-3)
    x = torch.randn(3, 8)
    with re2fx.record() as calls:
        rev(x)
    x.add_(1)
    with pytest.raises(re2fx.ReplayError, match="anchor"):
        calls[0].reconstruct()


# accuracy


def test_forty_eight_residuals_in_fp32() -> None:
    """Without anchors the first states would have no digit left."""
    torch.manual_seed(0)
    rev = rewired(Net(48, 16), 1e-3)
    x = torch.randn(16, 4)
    checked = re2fx.verify(rev, x, tolerance=1e-3)
    errors = [block.error for block in checked.chains[0].blocks]
    assert max(error or 0 for error in errors) <= 1e-3
    assert sum(error == 0 for error in errors) >= 4  # the end, and in front of each anchor
    assert_same(step(rev, "reversible", x), step(rev, "store", x), 2e-3)
    loose = re2fx.verify(rewired(Net(48, 16), 0.9), x, tolerance=1e-3)
    assert max(block.error or 0 for block in loose.chains[0].blocks) > 0.1


def test_verify_and_the_guard_go_through_them() -> None:
    rev = rewired(Net(48, 16), 1e-4)
    x = torch.randn(16, 4)
    re2fx.verify(rev, x, tolerance=1e-3).raise_for_findings()
    with re2fx.DriftGuard(rev, every=1, tolerance=1e-3, action="raise") as guard:
        for _ in range(47):
            rev(x).square().mean().backward()
    assert len(guard.history) == 47
    assert sum(drift.error == 0 for drift in guard.history) == len(anchors(rev, x)[0])


# compiled


@pytest.mark.parametrize("name", EXECUTORS)
def test_the_backend_anchors_too(name: str) -> None:
    torch.manual_seed(0)
    model = Net(14, dropout=0.0).double()
    options = {"coupling": COUPLINGS[0], "drift_tolerance": FORCED}
    expected = step(rewired(model), "store", X)
    run = compiled(model, {**EXECUTORS[name], **options})
    x = X.clone().requires_grad_()
    weighted(run(x)).backward()
    torch.testing.assert_close(x.grad, expected.gradients["input 0"], rtol=1e-10, atol=1e-10)
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected.gradients[key], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("coupling", COUPLINGS, ids=str)
def test_reversed_graphs_keep_the_anchors(coupling: Coupling) -> None:
    rev = rewired(Net(14, dropout=0.3).double(), coupling=coupling)
    places = anchors(rev, X)[0]
    watched = assert_compiled_equals_store(rev, X, tolerance=1e-10)
    assert watched.blocks == [14]
    assert watched.counts()["stream"] == 2 + 2 * len(places)


def test_reversed_graphs_with_links() -> None:
    blocks = tuple(Piece(("mlp",), link="permute, contiguous" if i else None) for i in range(14))
    network, x, cond = build(Program((2, 4, 4), (Stage("linear", blocks),)))
    rev = rewired(network)
    watched = assert_compiled_equals_store(rev, x, cond, tolerance=1e-10)
    kept = watched.counts()  # of each pair one state as it was added, and one behind its link
    assert kept["stream"] + kept["aten.clone.default"] == 2 + 2 * len(anchors(rev, x, cond)[0])


@pytest.mark.parametrize("name", EXECUTORS)
def test_a_rewired_module_compiled(name: str) -> None:
    """The marks carry the tolerance."""
    rev = rewired(Net(14).double())
    expected = step(rev, "store", X)
    rev.memory = "reversible"
    run = compiled(rev, EXECUTORS[name])
    kept = saved_bytes(lambda: run(X.clone()), rev).total
    rev.zero_grad()
    weighted(run(X)).backward()
    for key, parameter in rev.named_parameters():
        torch.testing.assert_close(parameter.grad, expected.gradients[key], rtol=1e-9, atol=1e-10)
    state = 5 * 8 * 8
    assert kept >= 2 * state * (1 + len(anchors(rev, X)[0]))
    with pytest.raises(Exception, match=r"is rewired already; .*drift_tolerance"):
        compiled(rev, {**EXECUTORS[name], "drift_tolerance": 1e-2})(X)


def test_float_streams_of_compiled_graphs() -> None:
    """In fp32 at the usual tolerance, 48 residuals deep."""
    torch.manual_seed(0)
    model = Net(48, 16)
    x = torch.randn(16, 4)
    expected = step(rewired(model, 1e-3), "store", x)
    options = {"coupling": COUPLINGS[0], "compiler": "aot_eager"}
    weighted(compiled(model, options)(x)).backward()
    largest = max(float(g.norm()) for g in expected.gradients.values() if g is not None)
    for key, parameter in model.named_parameters():
        wanted = expected.gradients[key]
        assert parameter.grad is not None
        assert wanted is not None
        error = float((parameter.grad - wanted).norm())
        assert error <= 2e-3 * max(float(wanted.norm()), 1e-6 * largest), key


# what the anchors say


def deep(coupling: Coupling) -> Any:
    """A deep network in fp32, whose branches are left out where anchors are placed."""
    torch.manual_seed(0)
    rev: Any = re2fx.transform(Net(28), coupling=coupling)
    assert anchors(rev, X.float())[0]
    return rev


def test_a_backward_says_when_states_came_back_worse_than_predicted() -> None:
    """With a negative b the branches of this network add to what the coupling amplifies."""
    rev = deep(Coupling(0.5, -0.5, 1))
    with pytest.warns(re2fx.Re2fxWarning, match=r"came back with a relative error of .*=0\.001"):
        weighted(rev(X.float())).backward()
    rev.memory = "store"
    weighted(rev(X.float())).backward()


def test_a_backward_that_meets_its_tolerance_says_nothing() -> None:
    weighted(deep(Coupling(0.5, 0.5, 1))(X.float())).backward()
