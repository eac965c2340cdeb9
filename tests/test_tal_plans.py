"""What is rewired in video backbones, and that what its chains keep does not grow with depth.

At the papers' sizes, where neither parameters nor frames take memory.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from benchmarks.tal.backbones import slowfast, small_swin, swin
from benchmarks.tal.costs import kept, peaks

pytestmark = pytest.mark.xdist_group("tal plans")
# How many blocks a SlowFast has per stage, the first of which is a projection.
BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}


@cache
def row(backbone: str | int) -> dict[str, Any]:
    """The chains of a Swin of this variant or a SlowFast of this depth, and what they keep."""
    return kept(swin(backbone) if isinstance(backbone, str) else slowfast(backbone), fake=True)


@pytest.mark.parametrize(
    ("variant", "lengths"), [("t", [4, 4, 12, 4]), ("s", [4, 4, 36, 4]), ("b", [4, 4, 36, 4])]
)
def test_a_chain_per_stage_of_a_swin(variant: str, lengths: list[int]) -> None:
    assert row(variant)["chains"] == lengths


@pytest.mark.parametrize("depth", BLOCKS)
def test_a_chain_per_stage_and_pathway_of_a_slowfast(depth: int) -> None:
    slow, fast = row(depth)["chains"][::2], row(depth)["chains"][1::2]
    assert slow == fast == [blocks - 1 for blocks in BLOCKS[depth]]


def test_chains_of_a_rewired_swin_keep_a_generators_state_per_residual_more() -> None:
    """That which a residual's stochastic depth draws from."""
    shallow, deep = row("t"), row("s")
    more = sum(deep["chains"]) - sum(shallow["chains"])
    assert more == 24
    state = torch.get_rng_state().nbytes
    for part in ("inside", "total"):
        assert deep[part]["reversible"] - shallow[part]["reversible"] == more * state
    for way in ("store", "checkpoint"):
        assert deep["inside"][way] > 1.5 * shallow["inside"][way]


def test_chains_of_a_rewired_slowfast_keep_a_counter_per_norm_more() -> None:
    """The batches that a BatchNorm has seen are a number of 8 bytes; residuals have three each."""
    shallow, deep = row(50), row(101)
    more = sum(deep["chains"]) - sum(shallow["chains"])
    assert more == 34
    assert deep["inside"]["reversible"] - shallow["inside"]["reversible"] <= 3 * 8 * more
    for way in ("store", "checkpoint"):
        assert deep["inside"][way] > 1.5 * shallow["inside"][way]


def test_a_planned_step_takes_less_than_a_reversed_one() -> None:
    found = peaks(small_swin((2,), width=16, frames=32, pixels=16))["peak"]
    assert found["lowest"] < found["reversible"] < found["plain"]
