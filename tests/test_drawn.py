"""BDIA: coefficients drawn in the forward, the given network in eval mode."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import re2fx
from re2fx import Coupling
from re2fx.drawn import Drawn, signs
from re2fx.memory import saved_bytes

from .compare import assert_reversible_equals_store, assert_same, step, weighted
from .models import ConvNet, Net, Tapped
from .test_backend import EAGER, EXECUTORS, GRAPH, REGION, compiled

# Dynamo hides this warning from everybody but those who make warnings errors.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
IMAGE = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Compiled code does not outlive its test."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def rewired(model: nn.Module, *inputs: Any, gamma: float = 0.5, **options: Any) -> Any:
    """Transform with drawn signs."""
    options = {"coupling": Coupling.bdia(gamma), "readout": "last", **options}
    rev = re2fx.transform(model, *inputs, **options)
    assert isinstance(rev, re2fx.RewiredModule)
    return rev


# the coupling


@pytest.mark.parametrize("skip", [1.0, 0.5])
@pytest.mark.parametrize("gamma", [0.5, 0.25, -0.75])
def test_each_sample_takes_one_of_two_couplings(gamma: float, skip: float) -> None:
    p, q, f = torch.randn(3, 6, 2, 3, generator=torch.Generator().manual_seed(0)).double()
    coupling = Coupling.bdia(gamma).scaled(skip, 1.0)
    draw = torch.tensor([1.0, -1, -1, 1, 1, -1], dtype=torch.float64).view(6, 1, 1)
    got = coupling.step(p, q, f, draw)
    for index, sign in enumerate(draw.flatten().tolist()):
        g = sign * gamma
        wanted = skip * ((1 - g) * p[index] + g * q[index]) + (1 + g) * f[index]
        torch.testing.assert_close(got[index], wanted)
        (outcome,) = (o for o in coupling.outcomes if abs(o.b - skip * g) < 1e-12)
        torch.testing.assert_close(outcome.step(p[index], q[index], f[index]), wanted)
    torch.testing.assert_close(coupling.inverse(got, p, f, draw), q)
    mean = (coupling.step(p, q, f, draw) + coupling.step(p, q, f, -draw)) / 2
    torch.testing.assert_close(mean, skip * p + f)


def test_what_it_is() -> None:
    coupling = Coupling.bdia()
    assert (coupling.a, coupling.b, coupling.c) == (1, 0, 1)
    assert coupling.draws
    assert coupling.invertible
    assert coupling.expected == Coupling.original()
    assert coupling.growth == pytest.approx(2)
    assert str(coupling) == "bdia(0.5)"
    for gamma in (0, 1.0, -1, float("nan"), "a half"):
        with pytest.raises(re2fx.OptionError, match="gamma must lie"):
            Coupling.bdia(gamma)  # type: ignore[arg-type]
    with pytest.raises(re2fx.OptionError, match=r"use readout='last'"):
        re2fx.transform(Net(), coupling=coupling)


def test_signs() -> None:
    torch.manual_seed(0)
    drawn = signs(torch.zeros(1000, 3, 2, dtype=torch.float64))
    assert drawn.shape == (1000, 1, 1)
    assert drawn.dtype == torch.float64
    assert set(drawn.flatten().tolist()) == {1.0, -1.0}
    assert abs(float(drawn.mean())) < 0.1


# the network


def test_by_hand() -> None:
    """A loop that draws behind each branch."""
    model = Net(4).double()
    rev = rewired(model, memory="store")
    torch.manual_seed(3)
    got = rev(X)
    torch.manual_seed(3)
    p = q = model.stem(X)
    for block in model.blocks:
        f = block(p) - p
        g = 0.5 * (torch.randint(0, 2, (5, 1)) * 2 - 1).double()
        p, q = (1 - g) * p + g * q + (1 + g) * f, p
    torch.testing.assert_close(got, model.head(p))


def test_samples_and_calls_differ() -> None:
    rev = rewired(Net(6).double())
    x = X[:1].expand(64, 4)
    first, second = rev(x), rev(x)
    assert len({tuple(row.tolist()) for row in first}) > 32
    assert not torch.equal(first, second)


def test_the_given_network_in_eval_mode() -> None:
    """Also with gradients, which are stored then."""
    model = Net(12, dropout=0.2).double()
    rev = rewired(model).eval()
    wanted = model(X)
    torch.testing.assert_close(rev(X), wanted)
    gradients = torch.autograd.grad(weighted(wanted), list(model.parameters()))
    again = torch.autograd.grad(weighted(rev(X)), list(rev.parameters()))
    for got, want in zip(again, gradients, strict=True):
        torch.testing.assert_close(got, want)
    assert rev.wirings == ()
    assert len(rev.plan.chains) == 1
    re2fx.verify(rev, X).raise_for_findings()
    assert rev.train().wirings


# the executor


@pytest.mark.parametrize("gamma", [0.5, 0.8])
def test_gradients_are_those_of_stored_execution(gamma: float) -> None:
    """Dropout inside: the signs come behind each branch's noise in the random stream."""
    rev = rewired(Net(6, dropout=0.3).double(), gamma=gamma)
    assert_reversible_equals_store(rev, X, tolerance=1e-9)


@pytest.mark.parametrize("activation", ["branch", "stream"])
def test_batch_norm_links_and_activations(activation: str) -> None:
    rev = rewired(ConvNet(4, dropout=0.3).double(), activation=activation)
    assert_reversible_equals_store(rev, IMAGE, tolerance=1e-9)


def test_sides_and_taps() -> None:
    rev = rewired(Tapped().double())
    x, context = torch.randn(2, 3, 8, dtype=torch.float64)
    assert_reversible_equals_store(rev, x, context, tolerance=1e-9)


def test_with_anchors() -> None:
    rev = rewired(Net(24).double(), drift_tolerance=1e-12)
    with re2fx.record() as calls:
        rev(X)
    assert sum(record.anchor is not None for record in calls[0].records) >= 2
    assert_reversible_equals_store(rev, X, tolerance=1e-10)


def test_it_keeps_a_sign_per_sample_and_block() -> None:
    rev = rewired(Net(6, 32).double())
    assert saved_bytes(lambda: rev(X), rev).chains == (2 * 5 * 32 * 8 + 6 * 5 * 8,)


def test_forty_eight_residuals_in_fp32() -> None:
    torch.manual_seed(0)
    rev = rewired(Net(48, 16))
    x = torch.randn(16, 4)
    checked = re2fx.verify(rev, x, tolerance=1e-3)
    assert max(block.error or 0 for block in checked.chains[0].blocks) <= 1e-3
    assert_same(step(rev, "reversible", x), step(rev, "store", x), 3e-3)
    rev.memory = "reversible"
    with re2fx.DriftGuard(rev, every=1, tolerance=1e-3, action="raise") as guard:
        for _ in range(8):
            rev(x).square().mean().backward()
    assert len(guard.history) == 8


def test_explain_says_what_it_means() -> None:
    said = "signs are drawn per sample and block; in eval mode it is the given network, stored"
    assert said in str(re2fx.explain(Net(), coupling=Coupling.bdia()))
    assert said in str(re2fx.explain(rewired(Net())))
    assert "drawn" not in str(re2fx.explain(Net()))


def test_the_report_counts_signs_and_anchors() -> None:
    model = Net(48, 64)
    options: Any = {"coupling": Coupling.bdia(), "readout": "last"}
    found = re2fx.report(model, torch.randn(32, 4), measure=True, **options)
    (chain,) = found.chains
    assert chain.anchors
    assert chain.kept.reversible == 2 * chain.state * (1 + chain.anchors) + 48 * 32 * 4
    assert found.measured is not None
    assert found.measured.reversible == found.total.reversible


# compiled


@pytest.mark.parametrize("options", [EAGER, REGION], ids=["eager", "region"])
def test_the_backend_draws(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = Net(4).double()
    expected = step(rewired(model), "store", X, seed=5)
    run = compiled(model, {**options, "coupling": Coupling.bdia(), "readout": "last"})
    run(X)  # what compiling draws is not the step's
    model.zero_grad()
    torch.manual_seed(5)
    weighted(run(X)).backward()
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected.gradients[key], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", EXECUTORS)
def test_compiled_in_eval_mode_it_is_the_given_network(name: str) -> None:
    model = Net(4).double().eval()
    run = compiled(model, {**EXECUTORS[name], "coupling": Coupling.bdia(), "readout": "last"})
    torch.testing.assert_close(run(X), model(X))


def test_graphs_compiled_as_wholes_cannot_draw() -> None:
    run = compiled(Net(4).double(), {**GRAPH, "coupling": Coupling.bdia(), "readout": "last"})
    with pytest.raises(Exception, match=r"coupling bdia\(0.5\) draws .*scope='region'"):
        run(X)
    rev = rewired(Net(4).double())
    with pytest.raises(Exception, match=r"coupling bdia\(0.5\) draws .*re2fx.transform without"):
        compiled(rev, GRAPH)(X)


def test_copies_draw_too(tmp_path: Any) -> None:
    rev = rewired(Net(4).double())
    torch.save(rev, tmp_path / "rev.pt")
    again = torch.load(tmp_path / "rev.pt", weights_only=False)
    outputs: list[Tensor] = []
    for module in (rev, again):
        torch.manual_seed(1)
        outputs.append(module(X))
    torch.testing.assert_close(*outputs)
    assert isinstance(again.wirings[0].blocks[0].coupling, Drawn)
