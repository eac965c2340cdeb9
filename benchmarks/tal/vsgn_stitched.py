"""VSGN with video self-stitching: a clip and its magnified copy are looked at together.

Zhao, Thabet and Ghanem, *Video Self-Stitching Graph Network for Temporal Action Localization*, ICCV
2021, sec. 3.2. Features are stitched, behind the backbone, so that it sees each frame once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .layers import valid_length
from .localizer import Found, Localizer, Targets
from .vsgn import VSGN, VSGNConfig, VSGNPredictions
from .vsgn_stitch import Stitching, stitch, unstitch


@dataclass(frozen=True)
class StitchedPredictions:
    """What VSGN says about stitched clips.

    Attributes:
        inner: about the stitched sequences.
        plan: where clip and copy are.
        length: ``(B,)``, how many cells of the clips are valid.
    """

    inner: VSGNPredictions
    plan: Stitching
    length: Tensor


class StitchedVSGN(Localizer[StitchedPredictions]):
    """A VSGN whose clips are stitched, and whose detections are brought back to them.

    Args:
        config: of the VSGN; ``stitched`` is set.
        gap: cells between a clip and its copy; by default as wide as the coarsest level's.
        factor: how much longer the copy is.
        short: actions shorter than this, in cells, are taken from the copy, longer ones from the
            clip (sec. 3.4); all from both by default.
    """

    def __init__(
        self,
        config: VSGNConfig,
        gap: int | None = None,
        factor: int = 2,
        short: float | None = None,
    ) -> None:
        super().__init__()
        self.vsgn = VSGN(replace(config, stitched=True))
        self.gap = 2 ** (config.levels - 1) if gap is None else gap
        self.factor, self.short = factor, short

    def forward(self, features: Tensor, mask: Tensor) -> StitchedPredictions:
        """Stitch features ``(B, C, T)`` with the mask ``(B, T)``, and predict."""
        plan = Stitching(features.shape[-1], self.gap, self.factor)
        joined, _ = stitch(features, mask, Targets([], []), plan)
        inner = self.vsgn(joined, plan.mask(mask), plan.magnified(mask))
        return StitchedPredictions(inner, plan, valid_length(mask))

    def losses(self, predictions: StitchedPredictions, targets: Targets) -> dict[str, Tensor]:
        """Those of `VSGN.losses`, for the actions in both parts."""
        return self.vsgn.losses(predictions.inner, predictions.plan.twice(targets))

    @torch.no_grad()
    def detections(self, predictions: StitchedPredictions, most: int = 200) -> list[Found]:
        """The segments of both parts, in cells of the clips."""
        both = self.vsgn.detections(predictions.inner, 2 * most)
        lengths = predictions.length.tolist()
        return [
            unstitch(found, predictions.plan, length, self.short, most)
            for found, length in zip(both, lengths, strict=True)
        ]
