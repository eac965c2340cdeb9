"""What a backbone keeps and how long its steps take: measured small, predicted at papers' sizes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

import re2fx
from benchmarks.common import median_ratio, paired_times

from .backbones import Backbone, slowfast, small_slowfast, small_swin, swin
from .entries import ENTRIES

Row = dict[str, Any]

# The depths of each family; only how often a stage repeats its block differs.
SMALL: Mapping[str, Sequence[Backbone]] = {
    "swin": [small_swin((2, depth)) for depth in (2, 4, 8, 12)],
    "slowfast": [small_slowfast(depth) for depth in (50, 101, 152)],
}
PAPERS: Mapping[str, Sequence[Backbone]] = {
    "swin": [swin(variant) for variant in "tsb"],
    "slowfast": [slowfast(depth) for depth in (50, 101, 152)],
}


def kept(backbone: Backbone, *, fake: bool, measure: bool = False) -> Row:
    """Bytes kept for the backward, in all and inside the chains, in three ways.

    Args:
        backbone: which.
        fake: whether neither parameters nor frames take memory.
        measure: whether to train one step for real and count, too.
    """
    with torch.device("meta" if fake else "cpu"):
        model, frames = backbone.build().train(), backbone.example()
    found = re2fx.report(model, (frames,), measure=measure)
    ways = ("store", "checkpoint", "reversible")
    chains = [chain.kept for chain in found.chains]
    return {
        "family": backbone.family,
        "words": backbone.words,
        "frames": backbone.frames,
        "pixels": backbone.pixels,
        "chains": [chain.residuals for chain in found.chains],
        "total": {way: getattr(found.total, way) for way in ways},
        "inside": {way: sum(getattr(own, way) or 0 for own in chains) for way in ways},
        "measured": None if found.measured is None else {
            way: getattr(found.measured, way) for way in ways
        },
    }  # fmt: skip


def depths(backbones: Iterable[Backbone], *, fake: bool) -> list[Row]:
    """`kept` of several."""
    return [kept(backbone, fake=fake, measure=not fake) for backbone in backbones]


def step_times(backbone: Backbone, batch: int, rounds: int) -> dict[str, float]:
    """Step times over that of the original backbone, by entry; median of paired rounds."""
    frames = backbone.example(batch)
    models: dict[str, nn.Module] = {}
    for name, entry in ENTRIES.items():
        if entry.trained:
            torch.manual_seed(0)
            models[name] = entry.made_of(backbone.build().train(), frames[:1])
    steps = {name: _step(model, frames) for name, model in models.items()}
    seconds = paired_times(steps, rounds)
    return {name: median_ratio(seconds, name, "original") for name in steps}


def _step(model: nn.Module, frames: torch.Tensor) -> Any:
    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(frames).square().mean().backward()

    return step
