"""Small residual networks that the tests share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Pre-norm residual with dropout, as a transformer's MLP."""

    def __init__(self, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inner = nn.Linear(width, 2 * width)
        self.drop = nn.Dropout(dropout)
        self.outer = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(self.drop(F.gelu(self.inner(self.norm(x)))))


class Net(nn.Module):
    """Stem, a chain of blocks, head."""

    def __init__(
        self,
        depth: int = 4,
        width: int = 8,
        dropout: float = 0.0,
        block: Callable[..., nn.Module] = Block,
    ) -> None:
        super().__init__()
        self.stem = nn.Linear(4, width)
        self.blocks = nn.Sequential(*[block(width, dropout) for _ in range(depth)])
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.blocks(self.stem(x)))
        return out


class ConvBlock(nn.Module):
    """Post-activation residual with batch norm and in-place activations, as a ResNet's."""

    def __init__(self, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.drop = nn.Dropout2d(dropout)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(self.drop(out)))
        out += x
        activated: Tensor = self.relu(out)
        return activated


class ConvNet(nn.Module):
    """A small ResNet stage."""

    def __init__(self, depth: int = 3, width: int = 6, dropout: float = 0.0) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        )
        self.blocks = nn.Sequential(*[ConvBlock(width, dropout) for _ in range(depth)])
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x))
        out: Tensor = self.head(x.mean((2, 3)))
        return out


class Tapped(nn.Module):
    """Side input with a gradient, taps in the middle, two outputs."""

    def __init__(self, width: int = 8, depth: int = 5) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(depth)])
        self.mixes = nn.ModuleList([nn.Linear(width, width) for _ in range(depth)])
        self.condition = nn.Linear(width, width)
        self.side_head = nn.Linear(width, 2)

    def forward(self, x: Tensor, context: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        scale = torch.sigmoid(self.condition(context))
        side = None
        for index, (norm, mix) in enumerate(zip(self.norms, self.mixes, strict=True)):
            x = x + torch.tanh(mix(norm(x))) * scale
            if index == 2:
                side = self.side_head(x)
        assert side is not None
        return x, {"side": side}


class Twice(torch.autograd.Function):
    """Reads what it saved twice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        product = x * y
        ctx.save_for_backward(x, y, product)
        return product + x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        first, second = ctx.saved_tensors, ctx.saved_tensors
        y = 2 * first[1] - second[1]  # y itself, if both readings are alike
        return grad * (y + 1), grad * (2 * second[0] - first[0])
