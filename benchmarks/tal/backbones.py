"""Video backbones from other people's packages, with their features kept over time.

torchvision's Video Swin (Liu et al., CVPR 2022) and pytorchvideo's SlowFast (Feichtenhofer et al.,
ICCV 2019) end in a pool over time and space and a classifier. Here the pool leaves time alone and
the classifier is another module, so that one network is pretrained, rewired and finetuned. Nothing
inside of a backbone is written by hand: what is rewired is what the package built.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.torchvision_shim import ensure_torchvision

Build = Callable[[], nn.Module]
# The depths whose weights pytorchvideo has.
SLOWFAST_WEIGHTS = (50, 101)


@dataclass(frozen=True)
class Backbone:
    """How to make one.

    Attributes:
        family: ``"swin"`` or ``"slowfast"``.
        words: what it is, for tables.
        build: makes the network, given frames ``(B, 3, T, H, W)``, giving features ``(B, channels,
            T / stride)``.
        channels: of its features.
        stride: frames per feature.
        frames, pixels: of the clips that it is meant for.
        pretrained: whether `build` gives it weights of its package instead of random ones.
        pace: its learning rate with a localizer, in parts of the setting's for backbones.
        patience: the epochs with a localizer, in parts of the setting's.
    """

    family: str
    words: str
    build: Build
    channels: int
    stride: int
    frames: int
    pixels: int
    pretrained: bool = False
    pace: float = 1.0
    patience: float = 1.0

    def example(self, batch: int = 1) -> Tensor:
        """Random frames of its size."""
        return torch.randn(batch, 3, self.frames, self.pixels, self.pixels)


class Swin(nn.Module):
    """A Video Swin whose features are means over space.

    Args:
        network: a ``torchvision.models.video.SwinTransformer3d``; its pool and head are replaced.
    """

    def __init__(self, network: Any) -> None:
        super().__init__()
        network.avgpool = nn.AdaptiveAvgPool3d((None, 1, 1))
        network.head = nn.Identity()
        self.network, self.channels = network, network.num_features

    def forward(self, frames: Tensor) -> Tensor:
        """Features ``(B, C, T / 2)`` of frames ``(B, 3, T, H, W)``."""
        flat: Tensor = self.network(frames)
        return flat.unflatten(1, (self.channels, -1))


class SlowFast(nn.Module):
    """A SlowFast whose features are means over space, at the pace of its slow pathway.

    Args:
        network: made by ``pytorchvideo.models.slowfast.create_slowfast``; its pool and head are
            replaced.
        pace: frames of the fast pathway per frame of the slow one.
    """

    def __init__(self, network: Any, pace: int = 4) -> None:
        super().__init__()
        slow = nn.AdaptiveAvgPool3d((None, 1, 1))
        fast = nn.Sequential(
            nn.AvgPool3d((pace, 1, 1), (pace, 1, 1)), nn.AdaptiveAvgPool3d((None, 1, 1))
        )
        network.blocks[-2].pool = nn.ModuleList([slow, fast])
        network.blocks[-1] = nn.Identity()
        self.network, self.pace = network, pace

    def forward(self, frames: Tensor) -> Tensor:
        """Features ``(B, C, T / pace)`` of frames ``(B, 3, T, H, W)``."""
        pooled: Tensor = self.network([frames[:, :, :: self.pace], frames])
        return pooled.flatten(2)


# full size


def swin(variant: str, frames: int = 768, pixels: int = 224, weights: bool = False) -> Backbone:
    """``swin3d_t``, ``swin3d_s`` or ``swin3d_b`` of torchvision.

    Args:
        variant: ``"t"``, ``"s"`` or ``"b"``.
        frames: of the clips.
        pixels: height and width of these.
        weights: whether to take torchvision's, of Kinetics-400; they are downloaded once.
    """

    def build() -> nn.Module:
        ensure_torchvision()
        from torchvision.models import video

        return Swin(getattr(video, f"swin3d_{variant}")(weights="DEFAULT" if weights else None))

    channels = {"t": 768, "s": 768, "b": 1024}[variant]
    words = f"swin3d_{variant}"
    return Backbone("swin", words, build, channels, 2, frames, pixels, pretrained=weights)


def slowfast(depth: int, frames: int = 768, pixels: int = 224, weights: bool = False) -> Backbone:
    """SlowFast 8x8 on a ResNet of 50, 101 or 152 layers.

    Args:
        depth: of the ResNet.
        frames: of the clips.
        pixels: height and width of these.
        weights: whether to take pytorchvideo's, of Kinetics-400, which there are for 50 and 101
            layers; they are downloaded once.

    Raises:
        ValueError: there are none.
    """
    if weights and depth not in SLOWFAST_WEIGHTS:
        raise ValueError(f"no weights of SlowFast-R{depth}, but of {SLOWFAST_WEIGHTS}")

    def build() -> nn.Module:
        ensure_torchvision()
        from pytorchvideo.models import hub

        if depth not in SLOWFAST_WEIGHTS:
            return _slowfast({"model_depth": depth})
        return SlowFast(getattr(hub, f"slowfast_r{depth}")(pretrained=weights))

    words = f"SlowFast-R{depth}"
    return Backbone("slowfast", words, build, 2304, 4, frames, pixels, pretrained=weights)


def _slowfast(options: dict[str, Any]) -> nn.Module:
    ensure_torchvision()
    from pytorchvideo.models.slowfast import create_slowfast

    return SlowFast(create_slowfast(**options))


# small configurations of the same classes


def small_swin(
    depths: tuple[int, ...] = (2, 2, 2),
    width: int = 24,
    frames: int = 128,
    pixels: int = 32,
    window: int = 2,
) -> Backbone:
    """A Video Swin on patches of two frames and 2 x 2 pixels.

    Its linear layers start as wide as Glorot and Bengio (AISTATS 2010) say: torchvision's standard
    deviation of 0.02 suits layers of hundreds of channels and leaves narrow ones all but silent.

    Args:
        depths: blocks of the stages.
        width: channels of the first stage; each later one has twice as many.
        frames: of the clips.
        pixels: height and width of these.
        window: how many patches the attention sees in time, of 4 x 4 in space. Clips that go on
            alike teach it to average over its windows, and what is averaged tells no boundary.
    """

    def build() -> nn.Module:
        ensure_torchvision()
        from torchvision.models.video import SwinTransformer3d

        network = SwinTransformer3d(
            patch_size=[2, 2, 2], embed_dim=width, depths=[*depths],
            num_heads=[2**stage for stage in range(len(depths))], window_size=[window, 4, 4],
            mlp_ratio=2.0, stochastic_depth_prob=0.0,
        )  # fmt: skip
        for module in network.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
        return Swin(network)

    channels = width * 2 ** (len(depths) - 1)
    words = f"Video Swin of {'+'.join(map(str, depths))} blocks, width {width}"
    # Higher rates undo what pretraining has taught it; README, Decisions.
    return Backbone(
        "swin", words, build, channels, 2, frames, pixels, pace=0.5, patience=4 / 3
    )  # fmt: skip


def small_slowfast(
    depth: int = 50, width: int = 8, frames: int = 128, pixels: int = 32
) -> Backbone:
    """A SlowFast on a narrow ResNet whose last two stages keep their resolution."""
    stages = ((2, 2, 1, 1), (2, 2, 1, 1))
    options = {
        "model_depth": depth,
        "stem_dim_outs": (width, width // 4),
        "slowfast_channel_reduction_ratio": (4,),
        "stem_conv_kernel_sizes": ((1, 3, 3), (5, 3, 3)),
        "stem_pool": (None, None),
        "stage_spatial_strides": stages,
    }
    channels = 32 * width + 8 * width
    words = f"SlowFast-R{depth} of width {width}"
    return Backbone("slowfast", words, partial(_slowfast, options), channels, 4, frames, pixels)


BACKBONES: dict[str, Callable[[], Backbone]] = {
    "swin": small_swin,
    "slowfast": small_slowfast,
    **{f"swin3d_{variant}": partial(swin, variant, weights=True) for variant in "tsb"},
    **{f"slowfast_r{depth}": partial(slowfast, depth, weights=True) for depth in SLOWFAST_WEIGHTS},
}
