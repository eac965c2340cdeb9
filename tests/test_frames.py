"""Frames of every kind, in every mixture, leave behind what stored execution does."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import re2fx
from re2fx import Coupling
from re2fx.errors import ConditioningError, NoResidualError
from re2fx.frames import Frames
from re2fx.program import RunBlock, Segment
from re2fx.rerun import watching

from . import programs
from .framed import MODELS, ConvStages, Mixed, Transformer, force, largest, mixed
from .models import Tapped
from .situations.harness import compare, double, example, outcome, train

STORED = {"none": 0.0, "one": 0.01, "half": 0.5, "all": 1.0}
network = cache(mixed)


@pytest.fixture(params=[500, 0], ids=["small ones kept", "nothing small"])
def small(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Up to what size tensors that slices would have to make again are kept."""
    monkeypatch.setattr("re2fx.rerun.SMALL", request.param)
    return int(request.param)


@pytest.mark.parametrize("slices", [1, 2, 3, 7])
@pytest.mark.parametrize("name", [name for name in MODELS if name != "swin3d"])
def test_every_mixture(name: str, slices: int) -> None:
    net = network(name)
    for stored, checkpointed in itertools.product(STORED.values(), (True, False)):
        kinds = {"stored": stored, "checkpointed": checkpointed, "slices": slices}
        compare(net.choose(**kinds), *net.inputs)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("slices", [2, 7])
@pytest.mark.parametrize("name", ["written attention", "dropout", "gpt2"])
def test_what_is_small_and_what_is_not(name: str, slices: int) -> None:
    net = network(name)
    for stored in (0, 0.5):
        compare(net.choose(stored=stored, slices=slices), *net.inputs)


@pytest.mark.parametrize("kinds", [
    {"slices": 7}, {"slices": 2, "stored": 0.5}, {"slices": 3, "stored": 1}, {"checkpointed": False}
])  # fmt: skip
def test_shifted_windows(kinds: Any) -> None:
    """Two dimensions of windows, of which one is cut, opened for the sizes of the example."""
    net = network("swin3d")
    compare(net.choose(**kinds), *net.inputs)


@pytest.mark.parametrize("name", ["written attention", "gpt2", "swin3d"])
def test_something_is_sliced(name: str) -> None:
    """In a segment and in a block, else the tests above would show little."""
    net = network(name)
    steps = largest(net.rev, *net.inputs).steps
    kinds = {type(s) for s in steps if isinstance(s, (RunBlock, Segment)) and is_sliced(s)}
    assert kinds == {RunBlock, Segment}


def is_sliced(step: RunBlock | Segment) -> bool:
    """Whether a part of it may run slice by slice."""
    body = step.frame.body if step.frame is not None else None
    return body is not None and body.sliced


def brought_back(net: Mixed) -> list[str]:
    """The frames that run again in one step."""
    names: list[str] = []
    x = [v.clone().requires_grad_(v.is_floating_point()) for v in net.inputs]
    with watching(names.append):
        train(net.pair.reversible, net.rev, tuple(x))
    net.rev.zero_grad()
    return names


def names_of(net: Mixed) -> list[str]:
    """Of all checkpoints."""
    steps = largest(net.rev, *net.inputs).steps
    return [s.frame.name for s in steps if isinstance(s, Segment) and s.frame is not None]


@pytest.mark.parametrize("slices", [1, 3])
def test_each_frame_runs_again_once(slices: int) -> None:
    """And none that is stored; slices make no difference."""
    net = network("written attention")
    net.choose(stored=1)
    count = len(brought_back(net))
    assert 2 <= count <= len(net.checkpoints)  # what saves nothing need not run
    for stored, blocks in ((0, 4), (0.01, 3), (0.5, 2), (1, 0)):
        net.choose(stored=stored, slices=slices)
        names = brought_back(net)
        assert len(names) == len(set(names)) == blocks + count
        net.choose(stored=stored, slices=slices, checkpointed=False)
        assert len(brought_back(net)) == blocks
    net.choose(stored=1, checkpointed=net.checkpoints[:1])
    assert brought_back(net) == names_of(net)[:1]


def test_single_checkpoints() -> None:
    """One at a time."""
    net = network("convolutions")
    for place in net.checkpoints:
        compare(net.choose(stored=0.5, checkpointed=[place]), *net.inputs)


@pytest.mark.parametrize("kinds", [{}, {"stored": 0.5}, {"stored": 1, "slices": 2}])
def test_statistics_move_once(kinds: Any) -> None:
    """Over several steps, by as much as stored; the counter too."""
    left = []
    for memory in ("frames", "store"):
        torch.manual_seed(0)
        net = Mixed.of(double(ConvStages()), example(3, 3, 8, 8))
        run = net.choose(**kinds).reversible if memory == "frames" else net.pair.store
        optimizer = torch.optim.SGD(net.rev.parameters(), 0.01)
        for _ in range(3):
            optimizer.zero_grad()
            train(run, net.rev, net.inputs)
            optimizer.step()
        left.append(dict(net.rev.state_dict()))
    counters = [value for name, value in left[0].items() if "num_batches" in name]
    assert counters
    assert all(value == 3 for value in counters)
    for name, value in left[1].items():
        torch.testing.assert_close(left[0][name], value, rtol=1e-10, atol=1e-10, msg=name)


COUPLINGS: dict[str, dict[str, Any]] = {
    "consistent": {"coupling": Coupling.consistent(0.25)},
    "anchors": {"coupling": Coupling(0.5, 0.5, 1)},
    "sum": {"readout": "sum"},
    "different ones": {"coupling": [Coupling.consistent(0.25), Coupling.consistent(0.5)]},
    "blocks": {"coupling": Coupling.consistent(0.25), "activation": "block"},
    "random": {"coupling": Coupling.bdia(), "readout": "last"},
    "exact": {"coupling": Coupling.consistent(0.25), "exact": True},
}


@pytest.mark.parametrize("how", COUPLINGS)
def test_couplings(how: str) -> None:
    options = COUPLINGS[how]
    if how in ("different ones", "blocks"):
        net = Mixed.of(double(ConvStages()), example(3, 3, 8, 8), **options)
    else:
        net = Mixed.of(double(Transformer(depth=3)), example(2, 7, 4), **options)
    for stored, slices in itertools.product(STORED.values(), (1, 3)):
        compare(net.choose(stored=stored, slices=slices), *net.inputs)


def test_anchors_are_kept_in_front_of_stored_blocks() -> None:
    """A pair of states now and then, of the blocks that are undone alone."""
    how = {"coupling": Coupling(0.5, 0.5, 1), "drift_tolerance": 1e-13}
    net = Mixed.of(double(Transformer(depth=6)), example(2, 7, 4), **how)
    counts = []
    for stored in (0, 0.5, 1):
        net.choose(stored=stored)
        with re2fx.record() as calls:
            net.pair.reversible(*net.inputs)
        counts.append(sum(record.anchor is not None for record in calls[0].records))
    assert counts[0] >= counts[1] >= counts[2] == 0
    assert counts[0] > 0


@pytest.mark.parametrize("kinds", [{}, {"stored": 0.5}, {"checkpointed": False}])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_exact_gradients_are_equal_to_the_bit(kinds: Any, dtype: torch.dtype) -> None:
    """Without slices, which add in another order."""
    model = double(Transformer(dropout=0.2, depth=3)).to(dtype)
    x = example(2, 7, 4, dtype=dtype).requires_grad_()
    net = Mixed.of(model, x, coupling=Coupling.consistent(0.25), exact=True)
    pair = net.choose(**kinds)
    got, expected = (outcome(run, model, (x,), train) for run in pair)
    for name, gradient in expected.gradients.items():
        assert gradient is not None
        assert torch.equal(got.gradients[name], gradient), name  # type: ignore[arg-type]
    assert all(map(torch.equal, got.outputs, expected.outputs))


@pytest.mark.parametrize("slices", [2])
def test_side_inputs_and_taps(slices: int) -> None:
    net = Mixed.of(double(Tapped()), example(3, 8), example(3, 8))
    for stored in STORED.values():
        compare(net.choose(stored=stored, slices=slices), *net.inputs)


class Uneven(nn.Module):
    """A stem whose parts read one another across slices, and two dimensions to cut."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(4, 96), nn.Linear(96, 8)
        self.table = nn.Parameter(torch.randn(11, 96))
        self.layers = Transformer(depth=2).layers

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.sigmoid(self.into(x) * self.table)
        before = self.out(hidden).flip(1).cumsum(1)
        hidden = torch.tanh(self.into(before.split(4, -1)[0]) + self.table.transpose(0, 1).t())
        x = self.out(hidden).cumsum(1)
        out: Tensor = self.layers(x)
        return out


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("slices", [2, 4, 20])
def test_slices_of_different_sizes(slices: int) -> None:
    """Also of parameters, and more of them than items."""
    net = Mixed.of(double(Uneven()), example(1, 11, 4))
    compare(net.choose(slices=slices), *net.inputs)


def test_slices_follow_one_another() -> None:
    """The results of a part are laid together as they were cut; the first step shows it."""
    net = Mixed.of(double(Uneven()), example(1, 11, 4))
    plain = net.pair.store(*net.inputs)
    net.choose(slices=4)
    torch.testing.assert_close(net.pair.reversible(*net.inputs), plain, rtol=1e-12, atol=1e-12)


INSIDES = (
    "linear", "mlp", "pre-norm", "in place", "layer scale", "attention", "saved output",
    "dropout", "stochastic depth", "squeeze", "halves", "broadcast", "conv", "shape reader",
)  # fmt: skip


@settings(
    max_examples=12, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip
@given(data=st.data(), rank=st.sampled_from((2, 3, 4)), training=st.booleans())
def test_random_programs(data: st.DataObject, rank: int, training: bool) -> None:
    """Random networks, each in a few random mixtures of frames."""
    program = data.draw(programs.programs(rank, insides=INSIDES))
    network, x, cond = programs.build(program)
    options = {"coupling": data.draw(programs.couplings())}
    try:
        net = Mixed.of(network.train(training), x, cond, strict=True, **options)
    except (NoResidualError, ConditioningError):
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("re2fx.rerun.SMALL", data.draw(st.sampled_from((0, 100, 4096))))
        for _ in range(2):
            frames = Frames(
                tuple(data.draw(st.integers(0, n)) for n in net.blocks),
                data.draw(st.frozensets(st.sampled_from(net.checkpoints)))
                if net.checkpoints
                else frozenset(),
                data.draw(st.integers(1, 5)),
            )
            force(net.rev, frames, x, cond)
            compare(net.pair, x, cond, tolerance=1e-8)


def test_frames_of_both_modes() -> None:
    """Each mode has its own; what is planned in one leaves the other alone."""
    net = mixed("dropout")
    training = net.choose(slices=3)
    compare(training, *net.inputs)
    net.rev.eval()
    held = net.rev._held(net.inputs, {})
    assert isinstance(held, tuple)
    assert set(held[0].framed) == {True}
    compare(net.pair, *net.inputs)
    assert set(held[0].framed) == {True, False}
    force(net.rev, replace(held[0].framed[False].frames, stored=(1,)), *net.inputs)
    compare(net.pair, *net.inputs)
