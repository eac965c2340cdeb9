"""Rows 25 to 27 and 33 to 35: what re2fx says before and instead of rewiring."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

import re2fx

from ..compare import weighted
from ..models import Block, Net
from .harness import (
    GRAPH,
    compare,
    double,
    example,
    pair,
    row,
    without,
)

X = example(5, 4)


class Cheap(nn.Module):
    """Residuals whose branches keep next to nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = nn.ParameterList([torch.full((), 0.1) for _ in range(2)])
        self.heavy = Net(depth=6)

    def forward(self, x: Tensor) -> Tensor:
        for scale in self.scales:
            x = x + torch.relu(x.sum(0, keepdim=True)) * scale.detach()
        out: Tensor = self.heavy(x)
        return out


@row(25)
def test_where_reversing_does_not_pay(executor: str) -> None:
    """The report says so before training, chain by chain, and `min_saving` leaves such chains."""
    model = double(Cheap())
    report = re2fx.report(model, X)
    cheap, heavy = (chain.kept for chain in report.chains)
    assert cheap.reversible is not None
    assert cheap.reversible >= cheap.store
    assert heavy.pays
    options: dict[str, Any] = {"min_saving": 0.25}
    store: Any = re2fx.transform(model, X, memory="store", **options)
    assert [len(chain) for chain in store.plan.chains] == [6]
    assert "saving" in str(store.plan)
    run: Any = re2fx.transform(model, X, **options)
    if executor == "compiled":
        run = torch.compile(model, backend="re2fx", options=GRAPH | options)
    torch.testing.assert_close(run(X), store(X), rtol=1e-11, atol=1e-11)


class Restless(nn.Module):
    """Draws from a generator of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.generator = torch.Generator().manual_seed(1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight * torch.rand(x.shape, generator=self.generator, dtype=x.dtype)


def restless() -> nn.Module:
    model = Net()
    block: Any = model.get_submodule("blocks.2")
    block.drop = Restless()
    return double(model)


@row(26, compiled=None)
@without("eager", "re2fx.judgement:branches", lambda evidence: iter(()))
def test_a_branch_that_is_not_deterministic(executor: str) -> None:
    """`verify` names the block and what it draws from."""
    rev: Any = re2fx.transform(restless())
    verification = re2fx.verify(rev, X)
    assert verification.verdict == "wrong"
    named = [f for f in verification.findings if "blocks.2" in f.where]
    assert named
    assert any("generator" in f.sentence + f.remedy for f in named)


@row(26, eager=None, compiled="raises")
def test_a_branch_that_is_not_deterministic_is_not_compiled(executor: str) -> None:
    """Dynamo ends its graph at a generator that is not the default one."""
    run: Any = torch.compile(restless(), backend="re2fx", options=GRAPH)
    with pytest.raises(BackendCompilerFailed, match="may go on beyond this graph"):
        run(X)


class Routed(Block):
    """Of four experts the one with the highest score."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__(width, dropout)
        self.score = nn.Linear(width, 4)
        self.experts = nn.Parameter(torch.zeros(4, width))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        values, chosen = self.score(normed).softmax(-1).topk(1)
        picked = torch.nn.functional.embedding(chosen[..., 0], self.experts)
        out: Tensor = x + self.outer(self.inner(normed)) * values + picked
        return out


@row(27)
def test_discrete_choices(executor: str) -> None:
    """Top-k routing away from a tie is as in the stored run."""
    compare(pair(executor, double(Net(block=Routed))), X)


class Kink(nn.Module):
    """A step whose place is a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.at = nn.Parameter(torch.full((3, 8), 1e9), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x - self.at)


class Kinked(nn.Module):
    """Residuals with such a step in the first branch."""

    def __init__(self) -> None:
        super().__init__()
        self.kink = Kink()
        self.mixes = nn.ModuleList([nn.Linear(8, 8) for _ in range(12)])

    def forward(self, x: Tensor) -> Tensor:
        for index, mix in enumerate(self.mixes):
            branch = torch.tanh(mix(x))
            x = x + (branch + self.kink(x) if index == 0 else branch)
        return x


@row(27, compiled=None)
def test_a_choice_that_rounding_turns(executor: str) -> None:
    """`verify` names the block in which the last digit decides."""
    model = double(Kinked()).float()
    kink = model.get_parameter("kink.at")
    with torch.no_grad():
        kink.fill_(1e9)
    rev: Any = re2fx.transform(model)
    x = example(3, 8, dtype=torch.float32)
    with re2fx.record() as calls:
        rev(x)
    again = calls[0].reconstruct()
    findings = []
    for place in map(tuple, (again != x).nonzero().tolist()):
        with torch.no_grad():
            kink.fill_(1e9)[place] = torch.minimum(again, x)[place]
        findings += [f for f in re2fx.verify(rev, x).findings if "kink" in f.sentence]
    assert findings
    assert {finding.severity for finding in findings} == {"note"}


class Mix(nn.Module):
    """A branch."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x))


class Deciding(nn.Module):
    """Its control flow depends on the values."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(Mix()) for _ in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x) if x.sum() > 0 else x + block(-x)
        return x


@row(33, "raises", "raises")
def test_a_forward_that_depends_on_values(executor: str) -> None:
    """What, where, and what to try; compiled, the network stays as it is, with a warning."""
    model = double(Deciding())
    x = example(3, 8)
    if executor == "eager":
        with pytest.raises(re2fx.CaptureError) as plain:
            re2fx.transform(model, x)
        said = str(plain.value)
        assert "transform the largest submodule" in said
    else:
        run: Any = torch.compile(model, backend="re2fx", options=GRAPH)
        with pytest.warns(re2fx.Re2fxWarning, match="Python runs the addition at") as caught:
            out = run(x)
        torch.testing.assert_close(out, model(x), rtol=1e-12, atol=1e-12)
        said = str(caught[0].message)
        assert "rewire first" in said
    assert "test_rows_answers.py:" in said


class Straight(nn.Module):
    """No residual at all."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out


NOTHING = {"no residual": Straight, "all refused": lambda: Net(depth=1)}


@row(34)
@pytest.mark.parametrize("name", NOTHING)
def test_nothing_to_rewire(executor: str, name: str) -> None:
    """The model as it is, with a warning and the reasons."""
    model = double(NOTHING[name]())
    reason = "no addition" if name == "no residual" else "chain of one"

    def take() -> Any:
        if executor == "eager":
            return re2fx.transform(model)
        run: Any = torch.compile(model, backend="re2fx", options=GRAPH)
        run(X)
        return run

    with pytest.warns(re2fx.Re2fxWarning, match=reason):
        run = take()
    assert executor == "compiled" or run is model
    torch.testing.assert_close(run(X), model(X), rtol=1e-12, atol=1e-12)


@row(34, "raises", "raises")
@pytest.mark.parametrize("name", NOTHING)
def test_nothing_to_rewire_if_strict(executor: str, name: str) -> None:
    """An error with the same reasons."""
    model = double(NOTHING[name]())
    if executor == "eager":
        with pytest.raises(re2fx.NoResidualError):
            re2fx.transform(model, strict=True)
        return
    run: Any = torch.compile(model, backend="re2fx", options={**GRAPH, "strict": True})
    with pytest.raises(BackendCompilerFailed) as wrapped:
        run(X)
    assert isinstance(wrapped.value.inner_exception, re2fx.NoResidualError)


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "memory": ({"memory": "none"}, re2fx.OptionError, "memory='none'.*'reversible', 'store'"),
    "readout": ({"readout": "first"}, re2fx.OptionError, "readout='first'.*'mean', 'sum', 'last'"),
    "coupling": ({"coupling": 1}, re2fx.OptionError, "expected a re2fx.Coupling"),
    "b = 0": ({"coupling": re2fx.Coupling(1, 0, 1)}, re2fx.OptionError, "b = 0 cannot be inverted"),
    "min_chain": ({"min_chain": 0}, re2fx.OptionError, "min_chain=0"),
    "min_saving": ({"min_saving": -1}, re2fx.OptionError, "min_saving=-1"),
}


@row(35, "raises", "raises")
@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(executor: str, name: str) -> None:
    """Named with the allowed values, before any work is done."""
    options, error, match = BAD[name]
    model = double(Net())
    if executor == "eager":
        with pytest.raises(error, match=match):
            re2fx.transform(model, **options)
        return
    run: Any = torch.compile(model, backend="re2fx", options=GRAPH | options)
    with pytest.raises(BackendCompilerFailed, match=match) as wrapped:
        run(X)
    assert isinstance(wrapped.value.inner_exception, error)


@row(35, "raises", "raises")
def test_unknown_arguments(executor: str) -> None:
    """An option nobody knows, and inputs the model does not take."""
    model = double(Net())
    if executor == "eager":
        with pytest.raises(TypeError, match="reversable"):
            re2fx.transform(model, reversable=True)  # type: ignore[call-arg]
        with pytest.raises(re2fx.InputError, match="too many positional arguments"):
            re2fx.transform(model, (X, X))
        return
    run: Any = torch.compile(model, backend="re2fx", options={"reversable": True})
    with pytest.raises(BackendCompilerFailed, match="no option 'reversable'"):
        weighted(run(X))
