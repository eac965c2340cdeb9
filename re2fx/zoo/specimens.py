"""Models of the catalogue whose constructors take more than numbers and names."""

from __future__ import annotations

from typing import Any

from ..torchvision_shim import ensure_torchvision


def mvit(version: int = 2, depth: int = 6, width: int = 24, size: int = 64, frames: int = 4) -> Any:
    """Torchvision's MViT, whose stages are a list of its own class."""
    ensure_torchvision()
    from torchvision.models.video import mvit as library

    middle, blocks, here = depth // 2, [], width
    for index in range(depth):
        widens = index == middle - (version == 1)
        halves = index == middle
        blocks.append(
            library.MSBlockConfig(
                num_heads=2 if index < middle else 4,
                input_channels=here,
                output_channels=2 * here if widens else here,
                kernel_q=[3, 3, 3] if version == 2 or halves else [],
                kernel_kv=[3, 3, 3],
                stride_q=[1, 2, 2] if halves else ([1, 1, 1] if version == 2 else []),
                stride_kv=[1, 4, 4] if index < middle else [1, 2, 2],
            )
        )
        here = blocks[-1].output_channels
    return library.MViT(
        spatial_size=(size, size),
        temporal_size=frames,
        block_setting=blocks,
        residual_pool=version == 2,
        residual_with_cls_embed=version != 2,
        rel_pos_embed=version == 2,
        proj_after_attn=version == 2,
        dropout=0.1,
        stochastic_depth_prob=0.1,
        num_classes=10,
    )
