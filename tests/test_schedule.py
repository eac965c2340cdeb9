"""Couplings that move on a schedule."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

from re2fx import ConditioningError, Coupling, OptionError, Schedule

from .compare import assert_same, step
from .models import Net
from .test_couplings import FAR, NEAR, RE2TAL, Two, X, made, pieces


def values(schedule: Schedule, steps: int) -> list[Any]:
    """The couplings at first and after every step, as the network has them."""
    rev: Any = schedule.rev
    seen = [rev.coupling]
    for _ in range(steps):
        schedule.step()
        assert schedule.coupling == rev.coupling
        seen.append(rev.coupling)
    return seen


def test_shapes_by_hand() -> None:
    start, end = Coupling(0.5, 0.5, 1), Coupling(0.25, 1, 2)
    rev = made(Net().double())
    linear = values(Schedule(rev, start, end, over=4), 6)
    assert linear[0] == start
    assert linear[1] == Coupling(0.4375, 0.625, 1.25)
    assert linear[3] == Coupling(0.3125, 0.875, 1.75)
    assert linear[4:] == [end] * 3
    cosine = values(Schedule(rev, start, end, over=4, shape="cosine"), 5)
    share = (1 - math.cos(math.pi / 4)) / 2
    assert cosine[1].b == pytest.approx(0.5 + 0.5 * share)
    assert cosine[2].b == pytest.approx(0.75)
    assert cosine[3].b == pytest.approx(1 - 0.5 * share)
    assert cosine[4:] == [end] * 2
    constant = values(Schedule(rev, start, end, over=3, shape="constant"), 4)
    assert constant == [start] * 3 + [end] * 2


def test_seldom() -> None:
    rev = made(Net().double())
    seen = values(Schedule(rev, NEAR, FAR, over=5, every=2), 7)
    at = [
        Coupling(0.5 + (0.3 - 0.5) * s, 0.5 + (0.7 - 0.5) * s, 1.25 - 0.25 * s) for s in (0.4, 0.8)
    ]
    assert seen[:6:2] == [NEAR, *at]
    assert seen[1:7:2] == [NEAR, *at]
    assert seen[6:] == [FAR, FAR], "the first change after the last step"


def test_waypoints_and_one_per_chain() -> None:
    rev = made(Two().double())
    schedule = Schedule.of(rev, [(0, NEAR), (2, (NEAR, FAR)), (4, RE2TAL)])
    seen = values(schedule, 5)
    assert seen[0] == NEAR
    assert seen[1] == (NEAR, Coupling(0.4, 0.6, 1.125))
    assert seen[2] == (NEAR, FAR)
    assert seen[3] == (Coupling(0.25, 0.75, 1.125), Coupling(0.15, 0.85, 1))
    assert seen[4:] == [RE2TAL, RE2TAL]
    whole = pieces()
    assert values(Schedule(whole, NEAR, lambda chain: FAR, over=1), 1) == [NEAR, FAR]


def test_every_step_trains_the_network_that_it_says() -> None:
    model = Two().double()
    rev = made(model)
    schedule = Schedule(rev, NEAR, (FAR, RE2TAL), over=3)
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    for _ in range(5):
        wanted = step(made(model, coupling=schedule.coupling), "store", X)
        assert_same(step(rev, "reversible", X), wanted, 1e-11)
        optimizer.zero_grad()
        rev(X).square().sum().backward()
        optimizer.step()
        schedule.step()
    assert rev.coupling == (FAR, RE2TAL)


def test_snapped() -> None:
    rev = made(Net().double())
    start, end = Coupling(0.5, 0.5, 1), Coupling(0, 1, 1)
    seen = values(Schedule(rev, start, end, over=8, snap=True), 8)
    assert {c.b for c in seen} == {0.5, 1.0}
    assert [c.b for c in seen].index(1.0) == 4
    assert all(c.a + c.b == pytest.approx(1) for c in seen)


def test_state_survives_a_checkpoint(tmp_path: Any) -> None:
    rev = made(Two().double())
    schedule = Schedule(rev, NEAR, (FAR, RE2TAL), over=7, shape="cosine", every=2)
    values(schedule, 3)
    torch.save(schedule.state_dict(), tmp_path / "schedule.pt")
    for state in (
        torch.load(tmp_path / "schedule.pt"),
        json.loads(json.dumps(schedule.state_dict())),
    ):
        other = made(Two().double())
        resumed = Schedule(other, RE2TAL, RE2TAL, over=1, by="epoch")
        resumed.load_state_dict(state)
        assert other.coupling == rev.coupling == schedule.at(3)
        assert resumed.state_dict() == schedule.state_dict()
        assert [resumed.at(i) for i in range(9)] == [schedule.at(i) for i in range(9)]
    with pytest.raises(OptionError, match="2 given for 1 chain"):
        Schedule(made(Net()), NEAR, FAR, over=1).load_state_dict(schedule.state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"over": 0}, "over=0: expected a whole number of steps, at least 1"),
        ({"over": 2.5}, "over=2.5: expected a whole number"),
        ({"every": 0}, "every=0: expected a whole number"),
        ({"shape": "steep"}, "shape='steep': expected one of 'linear', 'cosine', 'constant'"),
        ({"by": "batch"}, "by='batch': expected one of 'step', 'epoch'"),
        ({"start": [NEAR, FAR]}, "2 given for 1 chain;"),
        ({"end": 0.5}, "coupling=0.5: expected a re2fx.Coupling"),
        ({"rev": Net()}, r"Schedule\(Net\): expected what re2fx.transform made"),
        ({"start": Coupling.momentum(0.5)}, "passes b = 0, which cannot be inverted"),
        ({"end": Coupling.original(), "snap": True}, "b = 0 has no power of two"),
    ],
)
def test_what_it_does_not_take(options: dict[str, Any], message: str) -> None:
    given = {"rev": made(Net()), "start": NEAR, "end": FAR, "over": 4, **options}
    with pytest.raises(OptionError, match=message):
        Schedule(**given)


def test_waypoints_it_does_not_take() -> None:
    for steps in ([], [1, 2], [0, 3, 3], [0, 2, 1], [0, -1]):
        with pytest.raises(OptionError, match=r"waypoints at .*: expected whole numbers"):
            Schedule.of(made(Net()), [(at, NEAR) for at in steps])


def test_what_cannot_be_reconstructed_is_refused_at_once() -> None:
    """The first and the last are fine, and so is a network that stores."""
    rev = made(Net(10))
    low = [(0, Coupling(0, 1, 1)), (10, Coupling(0, 1e-14, 1)), (20, Coupling(0, 1, 1))]
    with pytest.raises(ConditioningError, match="rounding grows"):
        Schedule.of(rev, low)
    assert rev.coupling == Coupling.re2tal()
    rev.memory = "store"
    Schedule.of(rev, low)
    Schedule(rev, Coupling.original(), Coupling.momentum(0.5), over=3)
    assert rev.coupling == Coupling.original()
