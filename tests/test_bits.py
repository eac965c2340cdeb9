"""Packing the lowest bits of whole numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from re2fx.bits import pack, unpack

WHOLE = (torch.int32, torch.int64)


def numbers(count: int, dtype: torch.dtype) -> Tensor:
    info = torch.iinfo(dtype)
    generator = torch.Generator().manual_seed(count)
    return torch.randint(info.min, info.max, (count,), dtype=dtype, generator=generator)


@settings(deadline=None, max_examples=60)
@given(count=st.integers(0, 70), bits=st.integers(1, 8), dtype=st.sampled_from(WHOLE))
def test_what_is_shifted_out_comes_back(count: int, bits: int, dtype: torch.dtype) -> None:
    whole = numbers(count, dtype)
    packed = pack(whole, bits)
    assert packed.dtype == torch.uint8
    assert packed.numel() == bits * -(-count // 8)
    assert torch.equal(unpack(whole >> bits, packed, bits), whole)


@pytest.mark.parametrize("bits", range(1, 9))
def test_strides_do_not_matter(bits: int) -> None:
    whole = numbers(4 * 3 * 5 * 2, torch.int32).view(4, 3, 5, 2)
    for other in (
        whole.transpose(0, 3),
        whole[:, ::2],
        whole.to(memory_format=torch.channels_last),
    ):
        assert torch.equal(unpack(other >> bits, pack(other, bits), bits), other)


@pytest.mark.parametrize("bits", range(1, 9))
def test_no_bit_is_wasted(bits: int) -> None:
    whole = numbers(8 * 1000, torch.int32)
    assert pack(whole, bits).untyped_storage().nbytes() == bits * 1000
