"""Features in which the actions of made-up videos can be seen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.tal.localizer import Found, Localizer, Targets
from benchmarks.tal.losses import tiou


def videos(
    actions: list[list[tuple[float, float, int]]], cells: int, channels: int
) -> tuple[Tensor, Tensor, Targets]:
    """One video per list of actions ``(start, end, label)``, with as many cells.

    A class has a direction of its own, and what is not action is noise.
    """
    codes = torch.randn(8, channels)
    features = 0.3 * torch.randn(len(actions), channels, cells)
    for i, video in enumerate(actions):
        for start, end, label in video:
            features[i, :, round(start) : round(end)] += codes[label].unsqueeze(1)
    mask = torch.ones(len(actions), cells, dtype=torch.bool)
    return features, mask, targets_of(actions)


def targets_of(actions: list[list[tuple[float, float, int]]]) -> Targets:
    """The actions, a list of ``(start, end, label)`` per video."""
    segments = [torch.tensor([a[:2] for a in video]).reshape(-1, 2) for video in actions]
    labels = [torch.tensor([a[2] for a in video], dtype=torch.int64) for video in actions]
    return Targets(segments, labels)


def fit(
    model: Localizer[Any], features: Tensor, mask: Tensor, targets: Targets, steps: int, rate: float
) -> None:
    """Train on one batch, and leave the model in eval mode."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model.losses(model(features, mask), targets)["total"].backward()
        optimizer.step()
    model.eval()


def recalled(found: list[Found], targets: Targets, overlap: float) -> bool:
    """Whether a video's best detections, as many as it has actions, are its actions.

    Detections that overlap a better one of their class by half do not count.
    """
    return all(
        _recalled(some, segments, labels, overlap)
        for some, segments, labels in zip(found, targets.segments, targets.labels, strict=True)
    )


def _recalled(found: Found, segments: Tensor, labels: Tensor, overlap: float) -> bool:
    kept: list[int] = []
    for i in range(len(found.scores)):
        rivals = [j for j in kept if found.labels[j] == found.labels[i]]
        if not rivals or tiou(found.segments[i : i + 1], found.segments[rivals]).max() < 0.5:
            kept.append(i)
    kept = kept[: len(segments)]
    same = found.labels[kept].unsqueeze(1) == labels
    hits = (tiou(found.segments[kept], segments) > overlap) & same
    return bool(hits.any(0).all())


def gradients_are_finite(model: Localizer[Any], features: Tensor, mask: Tensor, t: Targets) -> bool:
    """After one backward, with finite losses; every parameter must have a gradient."""
    losses = model.losses(model(features, mask), t)
    losses["total"].backward()
    gradients = [p.grad for p in model.parameters()]
    return all(loss.isfinite() for loss in losses.values()) and all(
        g is not None and bool(g.isfinite().all()) for g in gradients
    )
