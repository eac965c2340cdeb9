"""Self-attention of each cell with the cells near it, in time and memory linear in T.

Queries are cut into blocks of ``R`` cells, where ``R`` is how far a cell sees to either side. A
block's queries see nothing outside their own block and its two neighbours, ``3 R`` keys, of which a
band of ``2 R + 1`` is within reach of each::

    keys      [ b - 1 ][   b   ][ b + 1 ]
    query 0    |<--- R -+- R --->|
    query R-1          |<- R ---+-- R --->|
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .layers import ChannelNorm, MaskedConv

# Two masks ``(R, 3 R)`` of a block's queries and the keys around them.
Band = tuple[Tensor, Tensor]


def local_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, heads: int, band: Band
) -> Tensor:
    """Attention within a window.

    Args:
        q: queries, ``(B, C, T)``.
        k: keys, of the same shape.
        v: values, of the same shape.
        mask: ``(B, T)``, the cells that may be looked at. Every cell may look at itself, so that no
            row of the softmax is empty.
        heads: C is a multiple of it.
        band: of `band_of`.

    Returns:
        ``(B, C, T)``; arbitrary, but finite, where cells are invalid.
    """
    near, own = band
    reach, cells = near.shape[0], q.shape[-1]
    extra = -cells % reach
    queries = _heads(F.pad(q, (0, extra)).unflatten(2, (-1, reach)), heads)
    keys, values = (_heads(_around(x, reach, extra), heads) for x in (k, v))
    seen = _around(mask, reach, extra).unsqueeze(2) & near | own
    result = F.scaled_dot_product_attention(
        queries, keys, values, attn_mask=seen.flatten(0, 1).unsqueeze(1)
    )
    return _cells(result, q.shape[0])[..., :cells]


def band_of(reach: int) -> Band:
    """Which of a block's ``3 R`` keys each of its R queries reaches, and which is its own."""
    distance = torch.arange(3 * reach) - reach - torch.arange(reach).unsqueeze(1)
    return distance.abs() <= reach, distance == 0


def _around(x: Tensor, reach: int, extra: int) -> Tensor:
    """Each block with its two neighbours: ``(..., T)`` to ``(..., blocks, 3 R)``."""
    return F.pad(x, (reach, reach + extra)).unfold(-1, 3 * reach, reach)


def _heads(x: Tensor, heads: int) -> Tensor:
    """``(B, C, blocks, cells)`` to ``(B * blocks, heads, cells, C / heads)``."""
    return x.unflatten(1, (heads, -1)).permute(0, 3, 1, 4, 2).flatten(0, 1)


def _cells(x: Tensor, batch: int) -> Tensor:
    """``(B * blocks, heads, cells, C / heads)`` to ``(B, C, blocks * cells)``."""
    return x.unflatten(0, (batch, -1)).permute(0, 2, 4, 1, 3).flatten(3, 4).flatten(1, 2)


class Projection(nn.Module):
    """A depthwise convolution over time, a norm and a linear map."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = MaskedConv(width, width, groups=width)
        self.norm = ChannelNorm(width)
        self.linear = nn.Conv1d(width, width, 1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """``(B, C, T)`` to the same shape."""
        return self.linear(self.norm(self.depthwise(x, mask)))


class LocalAttention(nn.Module):
    """Local multi-head self-attention (ActionFormer's encoder), its projections over three cells.

    Args:
        width: channels, a multiple of ``heads``.
        heads: how many.
        window: how many cells one sees, odd and at least 3: itself and as many to either side.

    Raises:
        ValueError: a size that cannot be.
    """

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        if window % 2 == 0 or window < 3:
            raise ValueError(f"window must be odd and at least 3, not {window}")
        if width % heads:
            raise ValueError(f"width {width} is no multiple of the {heads} heads")
        self.heads = heads
        self.query, self.key, self.value = (Projection(width) for _ in range(3))
        self.output = nn.Conv1d(width, width, 1)
        near, own = band_of(window // 2)
        self.near: Tensor
        self.own: Tensor
        self.register_buffer("near", near, persistent=False)
        self.register_buffer("own", own, persistent=False)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """``(B, C, T)`` and ``(B, T)`` to ``(B, C, T)``."""
        q, k, v = self.query(x, mask), self.key(x, mask), self.value(x, mask)
        band = self.near, self.own
        return self.output(local_attention(q, k, v, mask, self.heads, band))
