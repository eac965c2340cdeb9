"""VSGN: anchors on a cross-scale graph pyramid, whose segments are adjusted at their boundaries.

Zhao, Thabet and Ghanem, *Video Self-Stitching Graph Network for Temporal Action Localization*, ICCV
2021. Video self-stitching (sec. 3.2) is in `vsgn_stitch`, the pyramid (sec. 3.3) in `vsgn_graph`,
the anchors in `vsgn_anchors`; the four modules of scoring and localization (sec. 3.4) are here: the
anchors' classes and segments, the boundary adjustment, the supplementary scores.

Simplified: classes have a focal loss with a sigmoid each; the adjustment is trained on the anchors
that the regression is trained on, and no gradient flows through where it samples; the score of a
detection is its class's times the geometric mean of the start, end and action scores.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .layers import ConvHead, centres, masked, padded, sample, valid_length
from .localizer import Found, Localizer, Targets, best, widened
from .losses import balanced_loss, focal_loss, giou_loss
from .vsgn_anchors import anchors_of, boundary_targets, decode, match
from .vsgn_graph import CrossScalePyramid

# Where the adjustment samples, from a segment's start, 0, to its end, 1.
AT_START, INSIDE, AT_END = (-0.1, 0.0, 0.1), (0.25, 0.5, 0.75), (0.9, 1.0, 1.1)


@dataclass(frozen=True)
class VSGNConfig:
    """Sizes and constants.

    Attributes:
        channels: of the features.
        classes: how many kinds of actions.
        width: channels inside.
        levels: of the pyramid, on grids of 1, 2, 4, ... cells.
        depth: graph layers per level.
        neighbours: edges per cell, a half of them free, a half cross-scale.
        stitched: whether videos come stitched; `VSGN.forward` then needs ``magnified``.
        anchors: lengths of each cell's anchors, in widths of the level's cell.
        positive: the tIoU with an action from which on an anchor learns it.
        head_layers: convolutions per head.
        prior: the probability that every class starts with.
        weights: of the classification, localization, adjustment and boundary losses.
        threshold: scores up to it are dropped.
    """

    channels: int
    classes: int
    width: int = 64
    levels: int = 5
    depth: int = 2
    neighbours: int = 8
    stitched: bool = False
    anchors: tuple[float, ...] = (2.0, 3.0)
    positive: float = 0.5
    head_layers: int = 3
    prior: float = 0.01
    weights: tuple[float, float, float, float] = (8.0, 1.0, 1.0, 0.5)
    threshold: float = 0.001


@dataclass(frozen=True)
class VSGNPredictions:
    """What the modules say about N anchors and T cells.

    Attributes:
        anchors: ``(B, N, 2)``, in cells.
        logits: ``(B, N, classes)``, before the sigmoid.
        located: ``(B, N, 2)``, the anchors' segments.
        adjusted: ``(B, N, 2)``, the same after the boundary adjustment.
        boundaries: ``(B, 3, T)``, logits of start, end and action.
        mask: ``(B, T)``, the valid cells.
        valid: ``(B, N)``, the anchors of valid cells.
    """

    anchors: Tensor
    logits: Tensor
    located: Tensor
    adjusted: Tensor
    boundaries: Tensor
    mask: Tensor
    valid: Tensor


class BoundaryAdjustment(nn.Module):
    """Moves both ends of segments by what the features at start, end and inside say (sec. 3.4).

    Args:
        width: channels.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        fractions = AT_START + INSIDE + AT_END
        self.fractions: Tensor
        self.register_buffer("fractions", torch.tensor(fractions), persistent=False)
        self.hidden = nn.Linear(len(fractions) * width, width)
        self.shifts = nn.Linear(width, 2)
        # Segments start out as they were located.
        nn.init.zeros_(self.shifts.weight)
        nn.init.zeros_(self.shifts.bias)

    def forward(self, x: Tensor, segments: Tensor, length: Tensor) -> Tensor:
        """Adjusted segments.

        Args:
            x: ``(B, width, T)``.
            segments: ``(B, N, 2)``; no gradient goes to them.
            length: ``(B,)``, how many cells are valid.

        Returns:
            ``(B, N, 2)``, moved by fractions of the lengths.
        """
        segments = segments.detach()
        start, end = segments[..., :1], segments[..., 1:]
        positions = start + (end - start) * self.fractions
        seen = sample(x, positions.flatten(1), length)
        seen = seen.unflatten(2, (segments.shape[1], -1)).permute(0, 2, 1, 3).flatten(2)
        return segments + self.shifts(self.hidden(seen).relu()) * (end - start)


class VSGN(Localizer[VSGNPredictions]):
    """A single-stage localizer with anchors, and a refinement."""

    def __init__(self, config: VSGNConfig) -> None:
        super().__init__()
        self.config = config
        width, layers, kinds = config.width, config.head_layers, len(config.anchors)
        self.pyramid = CrossScalePyramid(
            config.channels, width, config.levels, config.depth, config.neighbours, config.stitched
        )
        rarely = -math.log((1 - config.prior) / config.prior)
        self.classifier = ConvHead(width, kinds * config.classes, layers, rarely)
        self.regressor = ConvHead(width, kinds * 2, layers, 0.0)
        self.adjustment = BoundaryAdjustment(width)
        self.boundaries = ConvHead(width, 3, 2, 0.0)

    def forward(
        self, features: Tensor, mask: Tensor, magnified: Tensor | None = None
    ) -> VSGNPredictions:
        """Classify, locate and adjust all anchors; T is padded to what the levels need.

        Args:
            features: ``(B, C, T)``.
            mask: ``(B, T)``, the valid cells.
            magnified: ``(B, T)``, the magnified cells of stitched videos, of
                `vsgn_stitch.Stitching.magnified`.

        Raises:
            ValueError: it is given though ``config.stitched`` is not set, or the other way round.
        """
        if (magnified is not None) != self.config.stitched:
            given = "not given" if magnified is None else "given"
            raise ValueError(f"stitched={self.config.stitched}, but magnified is {given}")
        multiple = 2 ** (self.config.levels - 1)
        if magnified is not None:
            _, magnified = padded(features, magnified, multiple)
        features, mask = padded(features, mask, multiple)
        return self._predict(*self.pyramid(features, mask, magnified))

    def _predict(self, levels: list[Tensor], masks: list[Tensor]) -> VSGNPredictions:
        pairs = list(zip(levels, masks, strict=True))
        kinds = len(self.config.anchors)
        logits = torch.cat([_per_anchor(self.classifier(*pair), kinds) for pair in pairs], 1)
        deltas = torch.cat([_per_anchor(self.regressor(*pair), kinds) for pair in pairs], 1)
        anchors = anchors_of(masks, self.config.anchors)
        located = decode(anchors, deltas)
        finest = masked(*pairs[0])
        adjusted = self.adjustment(finest, located, valid_length(masks[0]))
        boundaries = self.boundaries(*pairs[0])
        valid = torch.cat([mask.repeat_interleave(kinds, 1) for mask in masks], 1)
        return VSGNPredictions(anchors, logits, located, adjusted, boundaries, masks[0], valid)

    def losses(self, predictions: VSGNPredictions, targets: Targets) -> dict[str, Tensor]:
        """The losses of the four modules (sec. 3.4).

        Focal loss of all valid anchors, divided by how many learn an action; GIoU loss of these, as
        located and as adjusted; balanced cross-entropy of starts, ends and actions.

        Returns:
            ``"classification"``, ``"localization"``, ``"adjustment"``, ``"boundaries"``,
            ``"total"``.
        """
        labels, wanted = self._targets(predictions, targets)
        logits = _widened(predictions.logits)
        positive = labels >= 0
        count = positive.sum().clamp(min=1)
        ones = torch.zeros_like(logits)
        ones[positive, labels[positive]] = 1
        truth = wanted[positive]
        losses = {
            "classification": focal_loss(logits, ones)[predictions.valid].sum() / count,
            "localization": giou_loss(predictions.located[positive], truth).sum() / count,
            "adjustment": giou_loss(predictions.adjusted[positive], truth).sum() / count,
            "boundaries": _boundary_loss(predictions, targets),
        }
        weighted = zip(self.config.weights, losses.values(), strict=True)
        total = torch.stack([weight * loss for weight, loss in weighted]).sum()
        return {**losses, "total": total}

    def _targets(self, predictions: VSGNPredictions, targets: Targets) -> tuple[Tensor, Tensor]:
        """Per anchor its class ``(B, N)``, -1 for none, and the segment to learn ``(B, N, 2)``."""
        labels, wanted = [], []
        for i, (segments, kinds) in enumerate(zip(targets.segments, targets.labels, strict=True)):
            anchors, valid = predictions.anchors[i], predictions.valid[i]
            segments = segments.to(anchors)
            index = match(anchors, valid, segments, self.config.positive)
            # The last row is that of index -1.
            kinds = torch.cat([kinds.to(index), index.new_tensor([-1])])
            segments = torch.cat([widened(segments), anchors.new_zeros(1, 2)])
            labels.append(kinds[index])
            wanted.append(segments[index])
        return torch.stack(labels), torch.stack(wanted)

    @torch.no_grad()
    def detections(self, predictions: VSGNPredictions, most: int = 200) -> list[Found]:
        """The adjusted segments; those of a stitched video are in the stitched sequence.

        See `vsgn_stitch.unstitch` for bringing them back.
        """
        length = valid_length(predictions.mask)
        classes = _widened(predictions.logits).sigmoid() * predictions.valid.unsqueeze(2)
        scores = classes * _boundary_scores(predictions, length).unsqueeze(2)
        limits = length.tolist()
        return [
            best(predictions.adjusted[i], scores[i], limit, most, self.config.threshold)
            for i, limit in enumerate(limits)
        ]


def _per_anchor(x: Tensor, kinds: int) -> Tensor:
    """``(B, kinds * outputs, T)`` to ``(B, T * kinds, outputs)``."""
    return x.unflatten(1, (kinds, -1)).permute(0, 3, 1, 2).flatten(1, 2)


def _boundary_loss(predictions: VSGNPredictions, targets: Targets) -> Tensor:
    """Balanced cross-entropy over the valid cells of the batch, added up for the three scores."""
    cells = centres(predictions.mask)[0]
    wanted = [boundary_targets(cells, segments.to(cells)) for segments in targets.segments]
    logits, ones = _widened(predictions.boundaries).unbind(1), torch.stack(wanted).unbind(1)
    rows = zip(logits, ones, strict=True)
    return torch.stack([balanced_loss(x, y.to(x), predictions.mask) for x, y in rows]).sum()


def _boundary_scores(predictions: VSGNPredictions, length: Tensor) -> Tensor:
    """How much the cells say that segments ``(B, N)`` start and end there and are actions."""
    curves = _widened(predictions.boundaries).sigmoid()
    start, end = predictions.adjusted.unbind(-1)
    inside = torch.stack([start + (end - start) * f for f in INSIDE], -1)
    at_start = sample(curves[:, :1], start, length).squeeze(1)
    at_end = sample(curves[:, 1:2], end, length).squeeze(1)
    action = sample(curves[:, 2:], inside.flatten(1), length).squeeze(1)
    action = action.unflatten(1, (-1, len(INSIDE))).mean(-1)
    return (at_start * at_end * action) ** (1 / 3)


def _widened(x: Tensor) -> Tensor:
    """In fp32 at least."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
