"""What a backbone keeps and how long its steps take: measured small, predicted at papers' sizes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import re2fx
from benchmarks.common import median_ratio, paired_times
from re2fx.memory import saved_bytes

from .backbones import Backbone, slowfast, small_slowfast, small_swin, swin
from .batches import Batch, Sample, collate
from .detector import Detector, detector_loss
from .entries import ENTRIES, LOCALIZERS

Row = dict[str, Any]
# Of actions, of a localizer whose steps are measured.
CLASSES = 7

# The depths of each family; only how often a stage repeats its block differs.
SMALL: Mapping[str, Sequence[Backbone]] = {
    "swin": [small_swin((2, depth, 2)) for depth in (2, 4, 8, 12)],
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


def peaks(backbone: Backbone) -> Row:
    """What a training step of a backbone has alive at its highest, predicted, in bytes.

    Nothing is allocated. Given are the backbone as it is, rewired, and rewired with the least
    memory that a step can be planned to.
    """
    with torch.device("meta"):
        model, frames = backbone.build().train(), backbone.example()
    ways = {
        "plain": model,
        **{way: re2fx.transform(model, (frames,), memory=way) for way in ("reversible", "lowest")},
    }
    return {
        "words": backbone.words,
        "frames": backbone.frames,
        "pixels": backbone.pixels,
        "peak": {way: re2fx.foresee(made, frames).peak.peak for way, made in ways.items()},
    }


def steps(backbone: Backbone, localizer: str, batch: int, rounds: int) -> list[Row]:
    """What a training step keeps and takes, localizer included, by entry.

    Args:
        backbone: of the size of the videos.
        localizer: a name of `entries.LOCALIZERS`.
        batch: videos per step.
        rounds: of timing, all entries in turn in each.

    Returns:
        per entry the bytes that its forward keeps, and the median over the rounds of its step's
        time over that of the original backbone.
    """
    shown = _videos(backbone.example(batch))
    runs = {}
    for name, entry in ENTRIES.items():
        torch.manual_seed(0)
        body = entry.made_of(backbone.build().train(), shown.frames[:1])
        given = shown
        if not entry.trained:
            given = replace(shown, frames=body(shown.frames).detach())
            body = nn.Identity()
        head = LOCALIZERS[localizer].make(backbone.channels, CLASSES)
        runs[name] = Detector(body, head, backbone.stride).train(), given
    seconds = paired_times({name: partial(_step, *run) for name, run in runs.items()}, rounds)
    return [
        {
            "family": backbone.family,
            "localizer": localizer,
            "entry": name,
            "kept": saved_bytes(partial(detector_loss, *run), run[0]).total,
            "time": median_ratio(seconds, name, "original"),
        }
        for name, run in runs.items()
    ]


def _step(model: Detector, given: Batch) -> None:
    model.zero_grad(set_to_none=True)
    detector_loss(model, given)["total"].backward()


def _videos(frames: Tensor) -> Batch:
    """Videos of frames ``(B, 3, T, H, W)``, each with one action in its second quarter."""
    count, length = len(frames), frames.shape[2]
    action = torch.tensor([[length / 4, length / 2]])
    return collate(
        [
            Sample(str(i), frames[i], 0.0, 1.0, action, torch.tensor([i % CLASSES]), length)
            for i in range(count)
        ]
    )
