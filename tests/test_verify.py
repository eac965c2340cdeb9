"""Reversible against stored execution, on models with and without a planted fault."""

from __future__ import annotations

import copy
import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import re2fx
from re2fx.findings import Verification

from .models import Block, ConvNet, Net, Tapped

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
IMAGE = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))
STREAM = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        HIDDEN.manual_seed(0)
        GLOBAL["scale"] = 1.0
        yield


def rewired(model: nn.Module, **options: Any) -> re2fx.RewiredModule:
    """Transform."""
    rev = re2fx.transform(model, **options)
    assert isinstance(rev, re2fx.RewiredModule)
    return rev


def severities(verification: Verification) -> set[str]:
    """Of all findings."""
    return {finding.severity for finding in verification.findings}


def named(verification: Verification, severity: str = "error") -> list[str]:
    """Where the findings of one severity are."""
    return [f.where for f in verification.findings if f.severity == severity]


# models without a fault


class Linked(nn.Module):
    """A chain with a permutation inside, an early tap and a side input."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])
        self.second = nn.ModuleList([nn.Linear(5, 5) for _ in range(2)])

    def forward(self, x: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
        for mix in self.first:
            x = x + torch.tanh(mix(x)) * gate
        tap = x.mean()
        x = x.transpose(0, 1)
        for mix in self.second:
            x = x + torch.tanh(mix(x))
        return x, tap


class TwoChains(nn.Module):
    """Two stages with a widening between them."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = Net(3, 8, 0.1), Net(3, 12, 0.1)
        self.between = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.two(self.between(self.one(x)))
        return out


CLEAN: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "dropout": (lambda: Net(6, dropout=0.2), X),
    "batch norm": (lambda: ConvNet(4, dropout=0.2), IMAGE),
    "taps and side inputs": (Tapped, tuple(STREAM)),
    "links": (Linked, tuple(STREAM)),
    "two chains": (TwoChains, X),
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", CLEAN)
def test_clean_models_are_found_ok(name: str, dtype: torch.dtype, training: bool) -> None:
    build, inputs = CLEAN[name]
    rev = rewired(build().to(dtype)).train(training)
    inputs = tuple(x.to(dtype) for x in (inputs if isinstance(inputs, tuple) else (inputs,)))
    verification = re2fx.verify(rev, inputs)
    assert verification.ok, verification
    assert severities(verification) <= {"note"}
    assert len(verification.chains) == len(rev.plan.chains)
    for chain, errors in zip(rev.plan.chains, verification.chains, strict=True):
        assert len(errors.blocks) == len(chain)
        assert errors.complete
        assert errors.blocks[-1].error == 0
        assert errors.dtype == str(dtype).removeprefix("torch.")
    assert max(g.error for g in verification.gradients) < 100 * torch.finfo(dtype).eps
    count = len(list(rev.parameters())) + len(inputs)
    assert len(verification.gradients) == count
    verification.raise_for_findings()


@pytest.mark.parametrize("name", ["dropout", "batch norm", "two chains"])
def test_under_autocast(name: str) -> None:
    build, inputs = CLEAN[name]
    rev = rewired(build())
    with torch.autocast("cpu", torch.bfloat16):
        verification = re2fx.verify(rev, inputs)
    assert verification.ok, verification
    assert "bfloat16 autocast" in verification.conditions
    assert verification.tolerance == 5e-2
    assert any("branches compute in bfloat16" in f.sentence for f in verification.findings)


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_models_of_libraries(name: str, training: bool) -> None:
    from .zoo import ZOO

    animal = ZOO[name]
    rev = animal.rewire(animal.build()).train(training)
    verification = re2fx.verify(rev, animal.inputs())
    assert verification.ok, verification
    verification.raise_for_findings()


def test_frozen_parameters_and_inputs_as_they_are() -> None:
    rev = rewired(Net())
    for parameter in rev.get_submodule("stem").parameters():
        parameter.requires_grad_(False)
    verification = re2fx.verify(rev, X, input_gradients=False)
    assert verification.ok, verification
    names = {g.name for g in verification.gradients}
    assert "stem.weight" not in names
    assert not any(name.startswith("input") for name in names)


def test_inputs_by_keyword_and_in_lists() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def forward(self, clips: list[Tensor]) -> Tensor:
            clips[0] += 1  # a write to the input
            out: Tensor = self.net(clips[0] + clips[1])
            return out

    rev = rewired(Sum(), example_inputs=([X, X],))
    given = X.clone()
    verification = re2fx.verify(rev, {"clips": [given, X]})
    assert verification.ok, verification
    assert torch.equal(given, X)
    assert {"input clips[0]", "input clips[1]"} <= {g.name for g in verification.gradients}


def test_the_given_loss_is_differentiated() -> None:
    rev = rewired(Tapped())
    verification = re2fx.verify(rev, tuple(STREAM), loss=lambda out: out[1]["side"].sum())
    assert verification.ok, verification
    names = {g.name for g in verification.gradients}
    assert "mixes.0.weight" in names
    assert "mixes.4.weight" not in names, "it lies behind the tap"


# planted faults


class Faulty(nn.Module):
    """Residuals of which one runs a given function in its branch."""

    def __init__(self, fault: nn.Module, at: int = 2, depth: int = 5) -> None:
        super().__init__()
        self.at = at
        self.mixes = nn.ModuleList([nn.Linear(8, 8) for _ in range(depth)])
        self.fault = fault

    def forward(self, x: Tensor) -> Tensor:
        for index, mix in enumerate(self.mixes):
            branch = torch.tanh(mix(x))
            if index == self.at:
                branch = self.fault(branch)
            x = x + branch
        return x


class Leaf(nn.Module):
    """Kept whole by tracing, as it has a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))


class OwnGenerator(Leaf):
    """Draws from a generator of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight * torch.rand(x.shape, generator=self.generator, dtype=x.dtype)


class PythonRandom(Leaf):
    """Draws from Python's random."""

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight * random.random()


class NumpyRandom(Leaf):
    """Draws from NumPy's random."""

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight * float(np.random.rand())


GLOBAL = {"scale": 1.0}
HIDDEN = torch.Generator().manual_seed(2)


class ReadsGlobal(Leaf):
    """Reads a global that changes between calls."""

    def forward(self, x: Tensor) -> Tensor:
        GLOBAL["scale"] += 0.5
        return x * self.weight * GLOBAL["scale"]


class HiddenGenerator(Leaf):
    """Draws from a generator that no module holds."""

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight * torch.rand(x.shape, generator=HIDDEN, dtype=x.dtype)


class MovesAttribute(Leaf):
    """Moves a tensor that is not a buffer, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.state = torch.ones(())

    def forward(self, x: Tensor) -> Tensor:
        self.state.mul_(1.5)
        return x * self.weight * self.state


class MovesForeignBuffer(Leaf):
    """Moves a buffer of a module that it does not own."""

    def __init__(self, owner: nn.Module) -> None:
        super().__init__()
        self.owner = [owner]

    def forward(self, x: Tensor) -> Tensor:
        level = self.owner[0].get_buffer("level")
        return x * self.weight * level.mul_(1.5)


class Counts(Leaf):
    """Its factor is a plain attribute that every call moves."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.weight * self.calls


class Level(nn.Module):
    """Holds a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("level", torch.ones(()))


class Owned(Faulty):
    """A branch moves the buffer of a module beside the chain."""

    def __init__(self) -> None:
        level = Level()
        super().__init__(MovesForeignBuffer(level))
        self.beside = level


FAULTS: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "own generator": (lambda: Faulty(OwnGenerator()), "fault.generator", "default generator"),
    "python random": (lambda: Faulty(PythonRandom()), "Python's random", "default generator"),
    "numpy random": (lambda: Faulty(NumpyRandom()), "NumPy's random", "default generator"),
    "global": (lambda: Faulty(ReadsGlobal()), "same input", "a global"),
    "hidden generator": (lambda: Faulty(HiddenGenerator()), "same input", "generator of its own"),
    "tensor attribute": (lambda: Faulty(MovesAttribute()), "fault.state", "registered buffer"),
    "foreign buffer": (Owned, "beside.level", "registered buffer"),
    "plain attribute": (lambda: Faulty(Counts()), "fault.calls", "registered buffer"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found_in_its_block(name: str) -> None:
    build, cause, remedy = FAULTS[name]
    rev = rewired(build())
    verification = re2fx.verify(rev, STREAM[0])
    assert verification.verdict == "wrong"
    location = rev.plan.chains[0].residuals[2].location
    branches = [f for f in verification.findings if "Run again" in f.sentence]
    assert len(branches) == 1, verification
    place = f"chain 0, block 2: the model itself (test_verify.py:{location.line})"
    assert branches[0].where == place
    assert cause in branches[0].sentence
    assert remedy in branches[0].remedy
    with pytest.raises(re2fx.VerificationError, match="Run again"):
        verification.raise_for_findings()


class Moody(Leaf):
    """Saves another number of tensors at every other call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return torch.tanh(x * self.weight) if self.calls % 2 else x * self.weight


def test_an_error_of_the_backward_is_a_finding() -> None:
    rev = rewired(Faulty(Moody()))
    verification = re2fx.verify(rev, STREAM[0])
    assert verification.verdict == "wrong"
    assert verification.gradients == ()
    (error,) = (f for f in verification.findings if "not deterministic" in f.sentence)
    assert error.where.startswith("chain 0, block 2: the model itself (test_verify.py:")
    json.dumps(verification.to_dict())


class Fragile(Leaf):
    """Raises when it is run a second time."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls > 1:
            raise ValueError("planted")
        return x * self.weight


def test_an_error_of_the_users_code_in_the_backward_is_a_finding() -> None:
    verification = re2fx.verify(rewired(Faulty(Fragile())), STREAM[0])
    assert verification.verdict == "wrong"
    assert verification.findings[0].sentence == "planted"
    reached = [block.error is not None for block in verification.chains[0].blocks]
    assert reached == [False, False, True, True, True]
    assert "the last 3 blocks only" in str(verification)


def test_one_line_of_many_blocks_is_one_finding() -> None:
    class Noisy(Block):
        def __init__(self, width: int, dropout: float) -> None:
            super().__init__(width, dropout)
            self.noise = PythonRandom()

        def forward(self, x: Tensor) -> Tensor:
            return x + self.noise(self.outer(self.norm(x).repeat(1, 2)))

    verification = re2fx.verify(rewired(Net(8, block=Noisy)), X)
    branches = [f for f in verification.findings if "Run again" in f.sentence]
    assert len(branches) == 1
    assert "chain 0, blocks 0, 1, 2, 3 and 4 more: blocks.0, blocks.1," in branches[0].where


def test_a_statistic_that_is_counted_twice() -> None:
    """It does not move the branch's result, so only the state tells."""

    class Counter(Leaf):
        def __init__(self) -> None:
            super().__init__()
            self.seen = torch.zeros(())

        def forward(self, x: Tensor) -> Tensor:
            self.seen += 1
            return x * self.weight

    verification = re2fx.verify(rewired(Faulty(Counter())), STREAM[0])
    assert verification.verdict == "wrong"
    assert named(verification) == ["fault.seen"]


def test_a_change_between_forward_and_backward_only() -> None:
    """Nothing moves while the branches are tried, so only the gradient tells."""

    def loss(output: Tensor) -> Tensor:
        GLOBAL["scale"] += 1
        return output.sum()

    class Reads(Leaf):
        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight * GLOBAL["scale"]

    verification = re2fx.verify(rewired(Faulty(Reads())), STREAM[0], loss=loss)
    assert not verification.ok
    assert any("gradients of" in f.where for f in verification.findings)


def half_streams(rev: re2fx.RewiredModule) -> re2fx.RewiredModule:
    """Take out of the graph what widens the streams."""
    (widening,) = (n for n in rev.graph.nodes if "widen" in str(n.target))
    widening.target = torch.clone
    rev.recompile()
    return rev


def test_streams_in_half_precision_are_found() -> None:
    rev = rewired(Net(24, 32).bfloat16())
    verification = re2fx.verify(rev, X.bfloat16())
    assert verification.ok
    assert "carried in float32" in verification.findings[0].sentence
    exact = verification.chains[0].worst.error
    verification = re2fx.verify(half_streams(rev), X.bfloat16())
    assert verification.verdict == "inexact"
    assert verification.chains[0].dtype == "bfloat16"
    assert "carried in bfloat16" in verification.findings[0].sentence
    assert verification.chains[0].worst.error or 100 * (exact or 0) < 0


def test_an_ill_conditioned_coupling_is_inexact_and_not_wrong() -> None:
    rev = rewired(Net(16), coupling=re2fx.Coupling.consistent(0.5))
    verification = re2fx.verify(rev, X, tolerance=1e-5)
    assert verification.verdict == "inexact", verification
    chain, gradients = sorted(verification.findings, key=lambda f: len(f.where))
    assert "coupling (0.5, 0.5, 1.5)" in chain.remedy
    assert "has these gradients too" in gradients.sentence


class Kink(nn.Module):
    """A ReLU whose kink can be put anywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.at = nn.Parameter(torch.full((3, 8), 1e9), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x - self.at)


class Kinked(nn.Module):
    """Residuals with such a ReLU in the first branch."""

    def __init__(self) -> None:
        super().__init__()
        self.kink = Kink()
        self.mixes = nn.ModuleList([nn.Linear(8, 8) for _ in range(12)])

    def forward(self, x: Tensor) -> Tensor:
        for index, mix in enumerate(self.mixes):
            branch = torch.tanh(mix(x))
            x = x + (branch + self.kink(x) if index == 0 else branch)
        return x


def test_a_sign_turned_by_the_last_digit_is_a_note() -> None:
    rev = rewired(Kinked())
    x = torch.randn(3, 8)
    with re2fx.record() as calls:
        rev(x)
    again = calls[0].reconstruct()
    kinks = []
    for entry in (again != x).nonzero().tolist():
        kink = rev.get_parameter("kink.at")
        with torch.no_grad():
            kink.fill_(1e9)[tuple(entry)] = torch.minimum(again, x)[tuple(entry)]
        verification = re2fx.verify(rev, x)
        assert verification.ok, verification
        kinks += [f for f in verification.findings if "kink" in f.sentence]
    assert kinks
    assert {f.severity for f in kinks} == {"note"}
    assert verification.tolerance == 1e-4


class Garbage(torch.autograd.Function):
    """A kernel whose gradient is what happens to lie in memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: float) -> Tensor:
        ctx.size = size
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return torch.rand(gradients[0].shape, generator=HIDDEN) * ctx.size, None


class GarbageHead(Leaf):
    """Adds parameters that get such gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + Garbage.apply(self.weight, 1e30) + Garbage.apply(self.other, 1e10)
        return out


@pytest.mark.parametrize("garbage", [False, True])
def test_a_wrong_executor_is_found(monkeypatch: pytest.MonkeyPatch, garbage: bool) -> None:
    """A gradient that the reconstructed states do not account for, beside a useless large one."""
    model: nn.Module = Net()
    if garbage:
        model = nn.Sequential(model, GarbageHead())
        verification = re2fx.verify(rewired(model), X)
        assert verification.verdict == "inexact"
        (where,) = named(verification, "warning")
        assert set(where.removeprefix("gradients of ").split(", ")) == {"1.weight", "1.other"}
    take = re2fx.rerun.Again.take

    def skewed(self: Any, slot: int) -> tuple[Tensor, int]:
        tensor, _ = take(self, slot)
        return tensor * 1.01, 0

    monkeypatch.setattr(re2fx.rerun.Again, "take", skewed)
    verification = re2fx.verify(rewired(model), X)
    assert verification.verdict == "wrong"
    assert "does not account for" in verification.findings[0].sentence


def test_a_wrong_inverse_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    inverse = re2fx.Coupling.inverse
    monkeypatch.setattr(re2fx.Coupling, "inverse", lambda self, *x: inverse(self, *x) * 2)
    verification = re2fx.verify(rewired(Net()), X)
    assert verification.verdict == "wrong"
    assert (verification.chains[0].worst.error or 0) > 0.5
    assert "chain 0" in named(verification)


def test_dropout_that_is_not_replayed_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(re2fx.replay.Generators, "moved", lambda self: False)
    verification = re2fx.verify(rewired(Net(dropout=0.3)), X)
    assert verification.verdict == "wrong"
    assert any("Run again" in f.sentence for f in verification.findings)


def test_a_model_that_does_not_repeat_outside_its_chains() -> None:
    class Outside(Net):
        def __init__(self) -> None:
            super().__init__()
            self.noise = HiddenGenerator()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.noise(super().forward(x))
            return out

    verification = re2fx.verify(rewired(Outside()), X)
    assert verification.verdict == "inexact"
    (finding,) = verification.findings
    assert finding.where.startswith("gradients of ")
    assert finding.where.endswith("outputs")
    assert "Two runs of stored execution differ" in finding.sentence


def test_gradients_that_are_not_finite() -> None:
    verification = re2fx.verify(rewired(Net()), X, loss=lambda out: (out * 1e38 * 1e38).sum())
    assert verification.verdict == "inexact"
    assert "not finite" in verification.findings[0].sentence


# nothing is touched


def numpy_state() -> bytes:
    """Of NumPy's global generator."""
    state: Any = np.random.get_state()
    return bytes(state[1].tobytes())


class Everything:
    """What a verification must leave as it is."""

    def __init__(self, rev: re2fx.RewiredModule) -> None:
        members = {**dict(rev.named_parameters()), **dict(rev.named_buffers())}
        self.members = {n: (t, t.detach().clone(), t.requires_grad) for n, t in members.items()}
        self.grads = {n: (p.grad, copy.deepcopy(p.grad)) for n, p in rev.named_parameters()}
        self.flags = {n: m.training for n, m in rev.named_modules()}
        self.random = torch.get_rng_state(), random.getstate(), numpy_state()
        self.rest = rev.memory, torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()
        self.attributes = {n: set(vars(m)) for n, m in rev.named_modules()}

    def unchanged(self, rev: re2fx.RewiredModule) -> None:
        """Compare with the present."""
        now = Everything(rev)
        for name, (tensor, value, needs_grad) in self.members.items():
            assert now.members[name][0] is tensor
            assert torch.equal(tensor, value)
            assert tensor.requires_grad == needs_grad
        for name, (grad, kept) in self.grads.items():
            assert now.grads[name][0] is grad
            assert grad is None or kept is None or torch.equal(grad, kept)
        assert self.flags == now.flags
        assert torch.equal(self.random[0], now.random[0])
        assert self.random[1:] == now.random[1:]
        assert self.rest == now.rest
        assert self.attributes == now.attributes


def prepared(model: nn.Module) -> re2fx.RewiredModule:
    """With gradients, statistics, a mixture of modes, and stored execution chosen."""
    rev = rewired(model)
    for index, parameter in enumerate(rev.parameters()):
        if index % 2:
            parameter.grad = torch.randn_like(parameter)
    rev.get_submodule("blocks.1").eval()
    rev.memory = "store"
    return rev


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_touched(fails: bool) -> None:
    rev = prepared(ConvNet(3, dropout=0.3))
    x = IMAGE.clone().requires_grad_()
    before = Everything(rev)

    def loss(output: Tensor) -> Tensor:
        random.random()
        if fails:
            raise ValueError("planted")
        return output.square().sum()

    if fails:
        with pytest.raises(ValueError, match="planted"):
            re2fx.verify(rev, x, loss=loss)
    else:
        assert re2fx.verify(rev, x, loss=loss).ok
    before.unchanged(rev)
    assert x.grad is None
    assert torch.equal(x, IMAGE)


def test_faults_leave_nothing_behind() -> None:
    for name, (build, _, _) in FAULTS.items():
        rev = rewired(build())
        before = Everything(rev)
        state = {k: v for k, v in vars(rev.get_submodule("fault")).items() if k in ("calls",)}
        re2fx.verify(rev, STREAM[0])
        before.unchanged(rev)
        assert state.items() <= vars(rev.get_submodule("fault")).items(), name


def test_what_a_forward_leaves_on_a_module_goes() -> None:
    class Remembers(Leaf):
        def forward(self, x: Tensor) -> Tensor:
            self.last, self.seen = x, x.detach()
            return x * self.weight

    rev = rewired(Faulty(Remembers()))
    assert re2fx.verify(rev, STREAM[0]).ok, "the rerun leaves the same but for rounding"
    assert not {"last", "seen"} & set(vars(rev.get_submodule("fault")))


def test_without_gradients_and_in_inference_mode() -> None:
    rev = rewired(Net())
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert re2fx.verify(rev, X.clone()).ok


# arguments and views


def test_other_modules_are_told_to_transform_first() -> None:
    with pytest.raises(re2fx.OptionError, match=r"Net is not rewired.*re2fx\.transform"):
        re2fx.verify(Net(), X)


@pytest.mark.parametrize(
    ("loss", "said"),
    [(lambda out: out, "of \\(5, 3\\) with a gradient"), (lambda out: 1.0, "not float")],
)
def test_a_loss_that_is_no_scalar(loss: Any, said: str) -> None:
    with pytest.raises(re2fx.OptionError, match=said):
        re2fx.verify(rewired(Net()), X, loss=loss)


def test_a_coupling_that_cannot_be_reversed() -> None:
    rev = rewired(Net(), coupling=re2fx.Coupling.original(), memory="store")
    with pytest.raises(re2fx.ConditioningError, match="b = 0"):
        re2fx.verify(rev, X)
    assert rev.memory == "store"


def test_how_it_reads() -> None:
    verification = re2fx.verify(rewired(Faulty(PythonRandom())), STREAM[0])
    lines = str(verification).splitlines()
    assert lines[0].startswith("Faulty: wrong: reversible execution does not do what stored")
    assert lines[1].startswith("error: chain 0, block 2")
    assert lines[3].startswith("    -> Draw with torch's default generator")
    assert lines[-8].endswith(verification.gradients[0].name)
    assert lines[-1].startswith("    chain 0, 5 blocks, float32 streams: at most ")
    assert len(lines) < 25


def test_as_data() -> None:
    verification = re2fx.verify(rewired(Net()), X)
    data = json.loads(json.dumps(verification.to_dict()))
    assert data["verdict"] == "ok"
    assert len(data["chains"][0]["blocks"]) == 4
    assert data["gradients"][0]["error"] >= data["gradients"][-1]["error"]


def test_in_a_terminal_and_in_a_notebook() -> None:
    pytest.importorskip("rich")
    import io

    from rich.console import Console

    verification = re2fx.verify(rewired(Faulty(PythonRandom())), STREAM[0])
    console = Console(file=io.StringIO(), width=120)
    console.print(verification)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    page, worst = verification._repr_html_(), verification.gradients[0].name
    for text in ("Faulty: wrong", "error: chain 0, block 2", worst, "float32"):
        assert text in shown
        assert text in page
    assert (
        "<script"
        not in Verification(
            "<script>", "", 0, (re2fx.Finding("note", "<script>", "", ""),), 0, (), ()
        )._repr_html_()
    )


def test_the_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    verification = re2fx.verify(rewired(TwoChains()), X)
    picture = verification.plot(tmp_path / "errors.png")
    assert (tmp_path / "errors.png").stat().st_size > 10_000
    (axes,) = picture.axes
    assert axes.get_yscale() == "log"
    lines = {line.get_label(): line for line in axes.get_lines()}
    for index, chain in enumerate(verification.chains):
        (line,) = (line for label, line in lines.items() if f"chain {index}, " in str(label))
        drawn = dict(zip(line.get_xdata(), line.get_ydata(), strict=True))
        for depth, block in enumerate(reversed(chain.blocks)):
            if block.error:
                assert drawn[depth] == block.error


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    verification = re2fx.verify(rewired(Net()), X)
    for module in [m for m in sys.modules if m.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(re2fx.OptionError, match=r"pip install 're2fx\["):
        verification.plot()


def peak(run: Callable[[], object]) -> int:
    """The most bytes alive at once on the CPU above what was there before."""
    from torch.profiler import ProfilerActivity, profile

    run()
    with profile(
        activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        most = max(most, alive)
    return most


def test_it_takes_no_more_memory_than_a_stored_step() -> None:
    """Beyond it there are two more sets of gradients, and copies of inputs and states."""
    grown = []
    for depth in (4, 12):
        rev = rewired(Net(depth, 32))
        rev.memory = "store"
        x = torch.randn(1024, 4)
        gradients = sum(p.numel() * p.element_size() for p in rev.parameters())
        stored = peak(lambda: rev(x).sum().backward())  # noqa: B023
        grown.append(peak(lambda: re2fx.verify(rev, x)) - stored - 2 * gradients)  # noqa: B023
    stream = 1024 * 32 * 4
    assert max(grown) < 2 * stream
    assert grown[1] - grown[0] < stream


def test_views_are_loaded_when_asked_for() -> None:
    code = """
import sys, torch, re2fx
from tests.models import Net
str(re2fx.verify(re2fx.transform(Net()), torch.randn(5, 4)))
print([name for name in ("rich", "jinja2", "matplotlib") if name in sys.modules])
"""
    root = Path(__file__).parent.parent
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root
    )
    assert run.stdout == "[]\n"
