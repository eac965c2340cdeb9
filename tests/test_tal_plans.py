"""What is rewired in video backbones, and that what its chains keep does not grow with depth."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import re2fx
from benchmarks.tal.backbones import Backbone, slowfast, small_slowfast, small_swin, swin
from benchmarks.tal.costs import kept

# How many blocks a SlowFast has per stage, the first of which is a projection.
BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}


def chains(backbone: Backbone) -> list[int]:
    """The lengths of the chains of a backbone that has no memory."""
    with torch.device("meta"):
        model, frames = backbone.build().train(), backbone.example()
    explained = re2fx.explain(model, (frames,))
    return [len(chain.residuals) for chain in explained.plan.chains]


@pytest.mark.parametrize(
    ("variant", "lengths"), [("t", [4, 4, 12, 4]), ("s", [4, 4, 36, 4]), ("b", [4, 4, 36, 4])]
)
def test_a_chain_per_stage_of_a_swin(variant: str, lengths: list[int]) -> None:
    assert chains(swin(variant, frames=16, pixels=64)) == lengths


@pytest.mark.parametrize("depth", BLOCKS)
def test_a_chain_per_stage_and_pathway_of_a_slowfast(depth: int) -> None:
    found = chains(slowfast(depth, frames=32, pixels=64))
    slow, fast = found[::2], found[1::2]
    assert slow == fast == [blocks - 1 for blocks in BLOCKS[depth]]


def bytes_of(*backbones: Backbone) -> list[dict[str, Any]]:
    return [kept(backbone, fake=True) for backbone in backbones]


def test_chains_of_a_rewired_swin_keep_the_same_at_any_depth() -> None:
    shallow, deep = bytes_of(small_swin((2, 2), frames=32), small_swin((2, 8), frames=32))
    assert (shallow["chains"], deep["chains"]) == ([4, 4], [4, 16])
    assert deep["inside"]["reversible"] == shallow["inside"]["reversible"] > 0
    assert deep["inside"]["store"] > 1.9 * shallow["inside"]["store"]
    assert deep["inside"]["checkpoint"] > 1.9 * shallow["inside"]["checkpoint"]


def test_chains_of_a_rewired_slowfast_keep_a_counter_per_norm_more() -> None:
    """The batches that a BatchNorm has seen are a number of 8 bytes; residuals have three each."""
    shallow, deep = bytes_of(small_slowfast(50, frames=32), small_slowfast(101, frames=32))
    more = sum(deep["chains"]) - sum(shallow["chains"])
    assert more == 34
    assert deep["inside"]["reversible"] - shallow["inside"]["reversible"] <= 3 * 8 * more
    assert deep["inside"]["store"] > 2 * shallow["inside"]["store"]
    assert deep["inside"]["checkpoint"] > 2 * shallow["inside"]["checkpoint"]
