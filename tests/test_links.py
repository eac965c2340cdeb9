"""Shape-only operations between the blocks of a chain."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import re2fx

from .compare import assert_reversible_equals_store
from .models import Block


class Windows(nn.Module):
    """Blocks on a sequence, then on windows of it, as MaxViT's."""

    def __init__(self) -> None:
        super().__init__()
        self.whole = nn.ModuleList([Block(8) for _ in range(2)])
        self.parts = nn.ModuleList([Block(8) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.whole:
            x = block(x)
        x = x.flatten(1, 2)
        batch, tokens, width = x.shape  # of what the operation before made
        x = x.reshape(batch, tokens // 4, 4, width)
        for block in self.parts:
            x = block(x)
        return x


def test_an_operation_may_need_a_size_of_the_one_before() -> None:
    rev = re2fx.transform(Windows().double())
    assert isinstance(rev, re2fx.RewiredModule)
    (chain,) = rev.plan.chains
    assert [len(link) for link in chain.links] == [0, 0, 2, 0]
    assert_reversible_equals_store(rev, torch.randn(2, 2, 6, 8, dtype=torch.float64))
