"""The lowest bits of whole numbers, packed without a gap.

Eight elements make one word of ``8 * count`` bits, that is ``count`` bytes. They are taken from
eight stretches of the flattened tensor rather than next to each other, so that every step is
arithmetic on contiguous memory::

    elements     a a a ... b b b ... c c c ...  ...  h h h        eight stretches of one length
    a word       a | b << count | c << 2 count | ... | h << 7 count
"""

from __future__ import annotations

import torch
from torch import Tensor

LANES = 8


def pack(whole: Tensor, count: int) -> Tensor:
    """The ``count`` lowest bits of every element, 1 to 8.

    Args:
        whole: integers, of any shape and strides.
        count: how many bits of each.

    Returns:
        a flat uint8 tensor of ``count`` bytes for eight elements.
    """
    low = (whole & (2**count - 1)).reshape(-1)
    missing = -low.numel() % LANES
    if missing:
        low = torch.cat([low, low.new_zeros(missing)])
    lanes = low.view(LANES, -1)
    word = word_of(count)
    if word is not low.dtype:
        lanes = lanes.to(word)
    packed = lanes[0]
    for lane in range(1, LANES):
        packed = packed | (lanes[lane] << lane * count)
    raw = packed.contiguous().view(torch.uint8).view(-1, word.itemsize)
    taken: Tensor = raw[:, :count].contiguous().view(-1)
    return taken


def unpack(high: Tensor, packed: Tensor, count: int) -> Tensor:
    """``high << count`` with the bits that `pack` has taken.

    Args:
        high: integers, of any shape and strides.
        packed: from `pack`, for as many elements in the same order.
        count: how many bits of each.

    Returns:
        contiguous integers of ``high``'s shape and dtype.
    """
    word = word_of(count)
    raw = packed.view(-1, count)
    if word.itemsize != count:
        padding = raw.new_zeros(raw.shape[0], word.itemsize - count)
        raw = torch.cat([raw, padding], 1)
    words = raw.contiguous().view(word).view(-1)
    mask = 2**count - 1
    lanes = [((words >> lane * count) & mask).to(high.dtype) for lane in range(LANES)]
    low = torch.stack(lanes).view(-1)[: high.numel()].view(high.shape)
    joined: Tensor = (high << count) | low
    return joined


def word_of(count: int) -> torch.dtype:
    """Integers in which eight elements' bits fit."""
    if count == 1:
        return torch.uint8
    return torch.int16 if count == 2 else torch.int32 if count <= 4 else torch.int64
