"""What a run is about: which videos, how they are shown, and how long each stage trains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from .annotations import Annotations, read
from .batches import Loader, loader
from .clips import ResizedVideos, TrimmedClips, Videos, View, Windows
from .engine import Group, Training
from .metrics import ACTIVITYNET

VALIDATION = "validation"


@dataclass(frozen=True)
class Setting:
    """A data set, and the recipe for it.

    Attributes:
        annotations: of the untrimmed videos, in ActivityNet's format.
        videos: the folder of their files.
        clips: of the trimmed clips to pretrain on, in the same format.
        clip_videos: the folder of their files.
        sampling: ``"resize"`` shows a video as a whole (ActivityNet), ``"windows"`` shows windows
            of it (THUMOS).
        frames: per sample.
        pixels: height and width.
        rate: frames per second of windows and clips.
        stride: frames from one window to the next where videos are searched.
        clip_frames: frames of a clip.
        remembered: whether decoded videos stay in memory; see `cuts.View`.
        backbones: names of `backbones.BACKBONES`.
        thresholds: tIoU at which the average precision is taken.
        pretraining, finetuning, training: of a backbone on clips, or of a classifier on top of one
            whose package has weights; of a rewired backbone on clips; of a localizer.
    """

    annotations: Path
    videos: Path
    clips: Path
    clip_videos: Path
    sampling: Literal["resize", "windows"] = "resize"
    frames: int = 128
    pixels: int = 32
    rate: float = 8.0
    stride: int = 96
    clip_frames: int = 16
    remembered: bool = False
    backbones: tuple[str, ...] = ("swin", "slowfast")
    thresholds: tuple[float, ...] = ACTIVITYNET
    pretraining: Training = field(default_factory=Training)
    finetuning: Training = field(default_factory=Training)
    training: Training = field(default_factory=Training)

    def truth(self) -> Annotations:
        """Where the actions are."""
        return read(self.annotations)

    def searched(self, annotations: Annotations, subset: str) -> Videos:
        """The videos of a subset as they are searched for actions."""
        return self._shown(annotations, subset, self.stride, 0)

    def trained(self, annotations: Annotations, seed: int) -> Videos:
        """The training videos as a localizer learns from them."""
        return self._shown(annotations, "training", None, seed)

    def _shown(
        self, annotations: Annotations, subset: str, stride: int | None, seed: int
    ) -> Videos:
        view = View(self.frames, self.pixels, remembered=self.remembered)
        given: dict[str, Any] = {"subset": subset, "seed": seed}
        if self.sampling == "resize":
            return ResizedVideos(annotations, self.videos, view, **given)
        return Windows(annotations, self.videos, view, rate=self.rate, stride=stride, **given)

    def trimmed(self, subset: str, labels: Sequence[str] | None = None) -> TrimmedClips:
        """The clips of a subset; those of training are cropped and mirrored at random."""
        learning = subset == "training"
        view = View(self.clip_frames, self.pixels, remembered=self.remembered)
        return TrimmedClips(
            read(self.clips), self.clip_videos, view,
            rate=self.rate, random=learning, flip=learning, subset=subset, labels=labels,
        )  # fmt: skip


def batches(
    dataset: Any, training: Training, group: Group | None = None, shuffle: bool = True
) -> Loader:
    """The batches of a data set."""
    group = group or Group()
    return loader(
        dataset, training.batch, training.workers, training.seed, shuffle, group.rank, group.world
    )
