"""The three ways to train one network: as it is, checkpointed, and reversible.

All share one set of parameters. Checkpointing is what a user would compare with: PyTorch's
non-reentrant form around every residual branch, the same pieces that re2fx runs again.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import re2fx

from .torchvision_shim import ensure_torchvision

ensure_torchvision()

from timm.models.vision_transformer import Block, VisionTransformer  # noqa: E402

Forward = Callable[[torch.Tensor], torch.Tensor]


class Checkpointed(nn.Module):
    """A timm block, either branch of which keeps only its input."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``Block.forward`` with a checkpoint around each branch."""
        x = x + checkpoint(self.attention, x, use_reentrant=False)
        return x + checkpoint(self.mlp, x, use_reentrant=False)

    def attention(self, x: torch.Tensor) -> Any:
        """The first branch."""
        block = self.block
        return block.drop_path1(block.ls1(block.attn(block.norm1(x))))

    def mlp(self, x: torch.Tensor) -> Any:
        """The second branch."""
        block = self.block
        return block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


def vit(depth: int, **options: Any) -> nn.Module:
    """A timm vision transformer with ``depth`` blocks, that is twice as many residuals."""
    model: nn.Module = VisionTransformer(depth=depth, **options)
    return model.train()


def contender(name: str, model: nn.Module) -> nn.Module:
    """One of the contenders, on the parameters of the given network."""
    if name == "plain":
        return model
    if name == "re2fx":
        return re2fx.transform(model)
    if isinstance(model, nn.Sequential):
        return nn.Sequential(*(checkpointed(module) for module in model))
    twin = copy.copy(model)
    twin._modules = {key: module and checkpointed(module) for key, module in model._modules.items()}
    return twin


def checkpointed(module: nn.Module) -> nn.Module:
    """Blocks wrapped; anything else as it is."""
    if isinstance(module, nn.Sequential):
        return nn.Sequential(*map(checkpointed, module))
    return Checkpointed(module) if isinstance(module, Block) else module


def training_step(model: nn.Module, batch: torch.Tensor) -> Callable[[], None]:
    """Forward and backward as a function of no arguments, gradients created anew."""

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(batch).square().mean().backward()

    return step
