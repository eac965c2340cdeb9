"""Frames of every kind, in every mixture, leave behind what stored execution does."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import cache, partial
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
from re2fx.memory import saved_bytes
from re2fx.program import RunBlock, Segment
from re2fx.rerun import Again, watching

from . import programs
from .framed import MODELS, ConvStages, Mixed, Transformer, force, largest, mixed, torchvision
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


EVERY, SECOND = slice(None), slice(1, None, 2)


@pytest.mark.parametrize("slices", [1, 3])
@pytest.mark.parametrize("name", ["written attention", "dropout", "convolutions", "gpt2"])
def test_states_in_front_of_blocks(name: str, slices: int) -> None:
    """Kept for all blocks, or some of them among others that are undone or stored."""
    net = network(name)
    for stored, states in itertools.product((0, 0.5), (EVERY, SECOND)):
        compare(net.choose(stored=stored, states=states, slices=slices), *net.inputs)


@pytest.mark.parametrize("options", [{}, {"coupling": Coupling.consistent(0.25), "exact": True}])
def test_nothing_is_undone_where_a_state_is_kept(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is what would undo it to the bit kept."""
    net = Mixed.of(double(Transformer(depth=3)), example(2, 7, 4), **options)
    kept = []
    for states in (None, EVERY):
        net.choose(states=states)
        with re2fx.record() as calls:
            out = net.pair.reversible(*net.inputs)
        (call,) = calls
        kept.append(sum(record.lost is not None for record in call.records))
        undone: list[str] = []
        retreat = type(call.coupling).retreat

        def counted(self: Any, *given: Any, retreat: Any = retreat, undone: Any = undone) -> Any:
            undone.append("block")
            return retreat(self, *given)

        with monkeypatch.context() as patch:
            patch.setattr(type(call.coupling), "retreat", counted)
            out.sum().backward()
        assert len(undone) == (5 if states is None else 0)
    assert kept == [5 if options else 0, 0]


def test_a_state_takes_one_stream() -> None:
    net = network("written attention")
    sizes = []
    for states in (None, EVERY):
        run = net.choose(states=states).reversible
        sizes.append(sum(saved_bytes(partial(run, *net.inputs), net.rev).chains))
    stream = 2 * 7 * 8 * 8  # samples, tokens, width, bytes
    # The last two states of the stream are kept anyway, and so is nothing in front of the first.
    assert sizes[1] - sizes[0] == (net.blocks[0] - 1) * stream


def test_a_kept_state_that_was_changed_is_refused() -> None:
    net = network("written attention")
    net.choose(states=EVERY)
    with re2fx.record() as calls:
        out = net.pair.reversible(*net.inputs)
    before = calls[0].records[-1].before
    assert before is not None
    before.tensor.add_(1)
    with pytest.raises(re2fx.errors.ReplayError, match="changed in place"):
        out.sum().backward()


@pytest.mark.parametrize("stored", [0, 0.5])
@pytest.mark.parametrize("name", ["written attention", "dropout", "convolutions", "gpt2"])
def test_part_by_part(name: str, stored: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every frame cut wherever less crosses than was made, and brought back in those parts."""
    monkeypatch.setattr("re2fx.partition.NARROW", 1)
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    net = Mixed.of(double(model), *inputs)
    for slices in (1, 3):
        compare(net.choose(stored=stored, slices=slices, apart=1e-9), *inputs)


def test_parts_that_come_apart_hold_less_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a part in front saves is not there while those behind it are differentiated."""
    monkeypatch.setattr("re2fx.partition.NARROW", 1)
    net = Mixed.of(double(ConvStages()), example(3, 3, 8, 8))
    take, most = Again.take, [0]

    def watched(self: Again, slot: int) -> tuple[Tensor, int]:
        found = take(self, slot)
        most[0] = max(most[0], len(self.saved))
        return found

    monkeypatch.setattr(Again, "take", watched)
    held = []
    for apart in (0, 1e-9):
        most[0] = 0
        net.choose(apart=apart).reversible(*net.inputs).sum().backward()
        held.append(most[0])
    assert held[1] < held[0]


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


def test_writes_in_place_do_not_keep_frames_from_being_made() -> None:
    """A ReLU writes to the sum in front of it: both are in one frame, and nothing is stored."""
    resnet = torchvision.models.resnet
    model = resnet.ResNet(resnet.BasicBlock, [3, 3, 1, 1], num_classes=3)
    x = example(2, 3, 32, 32)
    net = Mixed.of(double(model), x)
    steps = largest(net.rev, x).steps
    ran = [step for step in steps if isinstance(step, Segment) and step.outputs]
    assert all(step.frame is not None for step in ran)
    compare(net.choose(), x)


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
                data.draw(st.frozensets(st.sampled_from([*net.checkpoints, *net.states]))),
                data.draw(st.integers(1, 5)),
                data.draw(st.sampled_from((0, 0.5, 1e-9))),
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
