"""Bytes kept for the backward, as exact numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import re2fx
from re2fx.memory import live_bytes, saved_bytes

from .models import ConvNet, Net

RNG_STATE = 5056  # bytes of the CPU generator's state
BATCH, WIDTH = 64, 32
STREAM = BATCH * WIDTH * 4


def chain_only(depth: int, dropout: float) -> tuple[nn.Module, Tensor]:
    """Blocks without stem and head, and an input of one stream."""
    rev = re2fx.transform(Net(depth, WIDTH, dropout).blocks)
    return rev, torch.randn(BATCH, WIDTH, requires_grad=True)


@pytest.mark.parametrize("depth", [8, 16, 32])
def test_a_chain_keeps_two_stream_tensors_whatever_its_depth(depth: int) -> None:
    rev, x = chain_only(depth, dropout=0.0)
    saved = saved_bytes(lambda: rev(x), rev)
    assert saved.chains == (2 * STREAM,)
    assert saved.outside == 0


@pytest.mark.parametrize("depth", [8, 16, 32])
def test_random_numbers_cost_one_generator_state_per_block(depth: int) -> None:
    rev, x = chain_only(depth, dropout=0.1)
    saved = saved_bytes(lambda: rev(x), rev)
    assert saved.chains == (2 * STREAM + depth * RNG_STATE,)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_allocator_agrees(dropout: float) -> None:
    """Nothing is kept that the executor does not know of: only the result comes on top."""
    for depth in (8, 32):
        rev, x = chain_only(depth, dropout)
        live_bytes(lambda: rev(x))  # noqa: B023
        live = live_bytes(lambda: rev(x))  # noqa: B023
        states = depth * RNG_STATE if dropout else 0
        factor = 8  # the one half of the mean readout
        assert live == 3 * STREAM + factor + states


def test_stored_execution_grows_with_depth() -> None:
    """What the reversible executor is compared with is real."""
    kept = []
    for depth in (8, 16):
        rev, x = chain_only(depth, dropout=0.0)
        assert isinstance(rev, re2fx.RewiredModule)
        rev.memory = "store"
        kept.append(live_bytes(lambda: rev(x)))  # noqa: B023
    assert kept[1] > 1.9 * kept[0] > 20 * STREAM


def test_batch_norm_buffers_are_not_copied_for_keeps() -> None:
    """Per batch norm only the 8 bytes of its counter, whose version the forward moves."""
    model = ConvNet(depth=4)
    rev = re2fx.transform(model)
    x = torch.randn(8, 3, 16, 16)
    stream = 8 * 6 * 16 * 16 * 4
    assert saved_bytes(lambda: rev(x), rev).chains == (2 * stream + 4 * 2 * 8,)


def test_no_grad_keeps_nothing() -> None:
    rev, x = chain_only(8, dropout=0.0)
    with torch.no_grad():
        rev(x)
        assert live_bytes(lambda: rev(x)) == STREAM
