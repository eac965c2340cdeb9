"""Where anchors are placed: against brute force over injected errors and over all placements."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import re2fx
from re2fx import Coupling
from re2fx.conditioning import Drift, anchored, assess, place_anchors
from re2fx.plan import Location
from re2fx.wiring import Block, Wiring

from .models import Net
from .programs import couplings

COMMON = settings(
    deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
FP32 = torch.finfo(torch.float32).eps
SKIPS = st.sampled_from((1.0, 0.5, 0.9, 1.1))


@st.composite
def chains(draw: st.DrawFn, most: int = 12) -> list[Coupling]:
    """The couplings of a chain with scaled skips."""
    coupling = draw(couplings())
    return [coupling.scaled(k, 1.0) for k in draw(st.lists(SKIPS, min_size=1, max_size=most))]


def predicted(chain: Sequence[Coupling], eps: float) -> list[float]:
    """Per undone block, from the last, the error: each block's rounding followed by itself."""
    sizes, total = [1.0], [0.0] * len(chain)
    for coupling in reversed(chain):
        sizes.append(sizes[-1] / max(1.0, coupling.gain))
    for source in range(len(chain)):  # counted from the end
        newer, older = 0.0, 0.0
        for place, coupling in enumerate(reversed(chain)):
            smaller = sizes[place] / sizes[place + 1]
            own = eps * (smaller + abs(coupling.a)) * sizes[place] if place == source else 0.0
            newer, older = older, (newer - coupling.a * older + own) / coupling.b
            total[place] += (older / sizes[place + 1]) ** 2
    return [math.sqrt(value) for value in total]


@settings(COMMON, max_examples=200)
@given(chain=chains())
def test_drift_is_what_all_roundings_come_to(chain: list[Coupling]) -> None:
    drift = Drift(FP32)
    got = [drift.undo(coupling) for coupling in reversed(chain)]
    assert got == pytest.approx(predicted(chain, FP32), rel=1e-6)


@settings(COMMON, max_examples=100)
@given(coupling=couplings(), seed=st.integers(0, 99))
def test_drift_covers_what_rounding_does(coupling: Coupling, seed: int) -> None:
    """Streams in fp32 without branches, run and undone; by root mean square.

    Within a factor of two, since states are not all of one size.
    """
    p, q = torch.randn(2, 2000, generator=torch.Generator().manual_seed(seed))
    states = [q, p]
    for _ in range(12):
        states.append(coupling.step(states[-1], states[-2], torch.zeros(())))
    newer, older, drift = states[-1], states[-2], Drift(FP32)
    for true in reversed(states[:-2]):
        newer, older = older, coupling.inverse(newer, older, torch.zeros(()))
        error = float((older - true).norm() / true.norm())
        assert error <= 2 * drift.undo(coupling)


@settings(COMMON, max_examples=100)
@given(chain=chains(7), tolerance=st.sampled_from((1e-6, 1e-5, 1e-4, 1e-3)))
def test_no_placement_has_fewer_anchors(chain: list[Coupling], tolerance: float) -> None:
    """Every subset is tried; a block that alone is too much needs an anchor in front of it."""

    def holds(places: tuple[int, ...]) -> bool:
        drift = Drift(FP32)
        for block in range(len(chain) - 1, 0, -1):
            error = drift.undo(chain[block])
            if block in places:
                drift = Drift(FP32)
            elif error > tolerance:
                return False
        return True

    found = place_anchors(chain, FP32, tolerance)
    assert list(found) == sorted(found)
    assert 0 not in found
    assert holds(found)
    inner = range(1, len(chain))
    fewer = (p for size in range(len(found)) for p in itertools.combinations(inner, size))
    assert not any(holds(places) for places in fewer)


def test_places_by_hand() -> None:
    """The error of (1/2, 1/2, 1) doubles per block: 13 blocks in fp32, 42 in fp64."""
    chain = [Coupling(0.5, 0.5, 1)] * 48
    assert place_anchors(chain, FP32, 1e-3) == (9, 22, 35)
    assert place_anchors(chain, torch.finfo(torch.float64).eps, 1e-3) == (6,)
    assert place_anchors([Coupling.re2tal()] * 1000, FP32, 1e-3) == ()
    assert place_anchors([Coupling.re2tal()], FP32, 1e-9) == ()
    assert place_anchors([], FP32, 1e-9) == ()


def wiring(chain: Sequence[Coupling], tolerance: float = 1e-3) -> Wiring:
    """Blocks with nothing but couplings."""
    blocks = (Block("p", "q", f"f{i}", "r", c, Location()) for i, c in enumerate(chain))
    return Wiring("x", tuple(blocks), tolerance=tolerance)


def test_anchors_follow_the_dtype_of_the_streams() -> None:
    kept = anchored(wiring([Coupling(0.5, 0.5, 1)] * 48))
    both = {torch.float32: (9, 22, 35), torch.float64: (6,)}
    for dtype, places in both.items():
        assert tuple(i for i, dtypes in enumerate(kept) if dtype in dtypes) == places
    assert not any(anchored(wiring([Coupling.original()] * 48)))


def test_scaled_skips_amplify_where_they_are() -> None:
    """Halving the skip in the second half alone makes only that half lose digits."""
    plain, halved = Coupling.re2tal(), Coupling.re2tal().scaled(0.5, 1.0)
    both = [*[plain] * 24, *[halved] * 24]
    assert place_anchors(both, FP32, 1e-4) == place_anchors([halved] * 48, FP32, 1e-4)[-1:] == (29,)
    assert place_anchors([plain] * 48, FP32, 1e-4) == ()


@pytest.mark.parametrize(
    ("coupling", "said"),
    [
        (Coupling.original(), "b = 0 cannot be inverted"),
        (Coupling(0.5, 1e-5, 1), r"rounding grows 5e\+04-fold per block.* at 11 of 12 residuals"),
    ],
    ids=str,
)
def test_where_anchors_do_not_pay(coupling: Coupling, said: str) -> None:
    rev: Any = re2fx.transform(Net(12), coupling=coupling, memory="store")
    with pytest.raises(re2fx.ConditioningError, match=f"Net: chain 0 of 12 residuals .*{said}"):
        rev.memory = "reversible"


def test_few_blocks_between_anchors_are_not_worth_it() -> None:
    """An anchor every other residual keeps as many states as there are residuals."""
    coupling = Coupling(0.5, 0.002, 1)
    found = assess(wiring([coupling] * 48), FP32)
    assert "saves little" in found.problem
    assert len(found.anchors) == 23
    wider = assess(wiring([coupling] * 48, 0.5), FP32)
    assert not wider.problem
    assert len(wider.anchors) <= 16
    assert assess(wiring([coupling] * 400), FP32).drift == math.inf  # and no overflow


@pytest.mark.parametrize("value", [0.0, 1.0, -1e-3, math.nan, "1e-3", None])
def test_a_tolerance_that_is_none(value: object) -> None:
    with pytest.raises(re2fx.OptionError, match=r"drift_tolerance=.*between 0 and 1"):
        re2fx.transform(Net(), drift_tolerance=value)  # type: ignore[arg-type]
