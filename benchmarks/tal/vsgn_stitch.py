"""Video self-stitching: a clip and its magnified copy, one behind the other (VSGN, sec. 3.2).

::

    | clip: `cells` | gap | magnified copy: `factor * cells` |

The magnified copy makes short actions long. The network sees both at once, learns the actions in
both, and the detections of both are brought back to the clip.

Zhao, Thabet and Ghanem, *Video Self-Stitching Graph Network for Temporal Action Localization*, ICCV
2021. Simplified: factors are whole numbers, and clips are given; the paper cuts long videos into
clips first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .layers import sample, valid_length
from .localizer import Found, Targets, merged


@dataclass(frozen=True)
class Stitching:
    """Where things are in a stitched sequence.

    Attributes:
        cells: the clip's, with its padding.
        gap: invalid cells between the clip and its copy. At least as many as a cell of the coarsest
            level is wide keep both apart on all levels.
        factor: how much longer the copy is.
    """

    cells: int
    gap: int = 16
    factor: int = 2

    def __post_init__(self) -> None:
        if self.cells < 1 or self.gap < 0 or self.factor < 1:
            raise ValueError(f"{self}: needs cells >= 1, gap >= 0 and factor >= 1")

    @property
    def start(self) -> int:
        """Where the magnified copy starts."""
        return self.cells + self.gap

    @property
    def total(self) -> int:
        """How many cells the sequence has."""
        return self.start + self.factor * self.cells

    def times(self, frames: int) -> Stitching:
        """The same in frames, of which every cell has so many."""
        return Stitching(self.cells * frames, self.gap * frames, self.factor)

    def mask(self, mask: Tensor) -> Tensor:
        """The valid cells ``(B, total)`` of clips with the valid cells ``(B, cells)``."""
        copy = mask.repeat_interleave(self.factor, 1)
        return torch.cat([mask, mask.new_zeros(len(mask), self.gap), copy], 1)

    def magnified(self, mask: Tensor) -> Tensor:
        """The magnified cells among those, ``(B, total)``, for clips with the mask ``(B, cells)``.

        It is the same for all clips, valid or not.
        """
        place = torch.arange(self.total, device=mask.device)
        return (place >= self.start).expand(len(mask), -1)

    def twice(self, targets: Targets) -> Targets:
        """The actions of clips, and the same in their magnified copies."""
        both = [torch.cat([s, s * self.factor + self.start]) for s in targets.segments]
        return Targets(both, [torch.cat([label, label]) for label in targets.labels])


def stitch(
    clips: Tensor, mask: Tensor, targets: Targets, plan: Stitching, dim: int = -1
) -> tuple[Tensor, Targets]:
    """Clips with their magnified copies behind them, and the actions in both.

    Args:
        clips: features ``(B, C, T)``, or frames ``(B, C, T, H, W)`` with ``dim=2``.
        mask: ``(B, T)``, the valid positions of the clips.
        targets: of the clips, in the positions of ``clips``.
        plan: with ``cells = T``, see `Stitching.times` for frames.
        dim: that of the time.

    Returns:
        clips with ``plan.total`` positions, zeros in the gap; and targets with twice as many
        actions.

    Raises:
        ValueError: the clips do not have ``plan.cells`` positions.
    """
    if clips.shape[dim] != plan.cells:
        raise ValueError(f"clips of {clips.shape[dim]} positions for a plan of {plan.cells}")
    time_last = clips.movedim(dim, -1)
    flat = time_last.flatten(1, -2)
    copy = sample(flat, _magnified_centres(plan, clips), valid_length(mask))
    joined = torch.cat([F.pad(flat, (0, plan.gap)), copy], -1)
    stitched = joined.reshape(*time_last.shape[:-1], plan.total).movedim(-1, dim)
    return stitched, plan.twice(targets)


def _magnified_centres(plan: Stitching, clips: Tensor) -> Tensor:
    """Where the magnified cells' centres are in the clip, ``(B, factor * cells)``."""
    cells = torch.arange(plan.factor * plan.cells, device=clips.device)
    return ((cells + 0.5) / plan.factor).expand(len(clips), -1)


def unstitch(
    found: Found, plan: Stitching, length: float, short: float | None = None, most: int = 200
) -> Found:
    """The detections in both parts of a stitched video, brought back to the clip.

    Args:
        found: in the stitched sequence.
        plan: how it was stitched.
        length: how many cells of the clip are valid.
        short: of actions shorter than this, in cells of the clip, those in the magnified copy are
            taken, of others those in the clip, as in sec. 3.4; all by default.
        most: how many at the most.

    Returns:
        sorted by score, clipped to the clip; what has its centre in the gap is left out.
    """
    middle = found.segments.mean(1)
    limit = math.inf if short is None else short
    least = 0.0 if short is None else short
    clip = _part(found, middle < plan.cells, 0.0, 1.0, length)
    copy = _part(found, middle >= plan.start, float(plan.start), float(plan.factor), length)
    return merged([_of_length(clip, least, math.inf), _of_length(copy, 0.0, limit)], most)


def _part(found: Found, inside: Tensor, start: float, factor: float, length: float) -> Found:
    segments = ((found.segments[inside] - start) / factor).clamp(0, length)
    return Found(segments, found.scores[inside], found.labels[inside])


def _of_length(found: Found, least: float, limit: float) -> Found:
    lengths = found.segments[:, 1] - found.segments[:, 0]
    kept = (lengths > 0) & (lengths >= least) & (lengths < limit)
    return Found(found.segments[kept], found.scores[kept], found.labels[kept])
