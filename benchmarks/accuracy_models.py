"""Small networks of three families, and the digits they learn in `benchmarks.accuracy`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import interpolate

from .torchvision_shim import ensure_torchvision

ensure_torchvision()

from timm.models.resnet import BasicBlock, ResNet  # noqa: E402
from timm.models.swin_transformer import SwinTransformer  # noqa: E402

from .contenders import vit  # noqa: E402

TRAIN, BATCH = 1_200, 64
CLASSES: dict[str, Any] = {"num_classes": 10, "in_chans": 1}


@dataclass(frozen=True)
class Digits:
    """Images of (N, 1, size, size) and labels; every seed has its own split."""

    images: torch.Tensor
    labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor

    @classmethod
    def load(cls, size: int, seed: int) -> Digits:
        """Read what scikit-learn ships, enlarge it and split it."""
        raw = load_digits()
        images = torch.tensor(raw.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
        if size != images.shape[-1]:
            images = interpolate(images, (size, size), mode="bilinear")
        labels = torch.tensor(raw.target, dtype=torch.int64)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
        images, labels = images[order], labels[order]
        return cls(images[:TRAIN], labels[:TRAIN], images[TRAIN:], labels[TRAIN:])

    def batches(self, epoch: int, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The batches of an epoch, the same for everybody."""
        generator = torch.Generator().manual_seed(1_000 * seed + epoch)
        for chosen in torch.randperm(TRAIN, generator=generator).split(BATCH):
            if len(chosen) == BATCH:
                yield self.images[chosen], self.labels[chosen]


@dataclass(frozen=True)
class Model:
    """A network and the images it takes.

    Attributes:
        build: makes it.
        size: height and width of its images.
        words: what it is, for the README.
    """

    build: Callable[[], nn.Module]
    size: int
    words: str


def small_vit(depth: int) -> nn.Module:
    """A ViT of width 64 with dropout: 16 patches of 2x2 and a class token."""
    return vit(
        depth, img_size=8, patch_size=2, embed_dim=64, num_heads=4, proj_drop_rate=0.1, **CLASSES
    )


def small_swin() -> nn.Module:
    """Two stages of four blocks, windows of 4x4."""
    return SwinTransformer(
        img_size=16, patch_size=2, embed_dim=32, depths=(4, 4), num_heads=(2, 4), window_size=4,
        drop_path_rate=0.0, **CLASSES,
    )  # fmt: skip


def small_resnet() -> nn.Module:
    """Four stages of three basic blocks."""
    return ResNet(
        BasicBlock, [3, 3, 3, 3], stem_width=16, channels=(16, 32, 48, 64), output_stride=16,
        **CLASSES,
    )  # fmt: skip


MODELS = {
    "ViT-6": Model(partial(small_vit, 6), 8, "ViT of 6 blocks of width 64, dropout 0.1"),
    "ViT-12": Model(partial(small_vit, 12), 8, "ViT of 12 blocks of width 64, dropout 0.1"),
    "Swin": Model(small_swin, 16, "Swin of two stages of 4 blocks of width 32 and 64"),
    "ResNet": Model(small_resnet, 32, "ResNet of four stages of 3 basic blocks of width 16 to 64"),
}
