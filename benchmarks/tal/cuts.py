"""Stretches of a video's time, and the actions in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .annotations import Action
from .video import VideoError

ENDINGS = (".mp4", ".mkv", ".webm", ".avi", ".mov")
# ActivityNet's files are called v_<name>.
PREFIXES = ("", "v_")


@dataclass(frozen=True)
class View:
    """What a network sees of a video.

    Attributes:
        frames: their number T.
        size: height and width in pixels; other shapes are squeezed into it.
        mean: of each colour, of 1.
        std: of each colour, of 1.
        remembered: whether each process keeps the frames of all videos that it has read, which
            have to have a constant frame rate; for small sets.
    """

    frames: int = 64
    size: int = 32
    mean: tuple[float, float, float] = (0.45, 0.45, 0.45)
    std: tuple[float, float, float] = (0.225, 0.225, 0.225)
    remembered: bool = False


@dataclass(frozen=True)
class Cut:
    """A stretch of a video's time, in seconds, that ``length`` frames of ``step`` seconds fill."""

    offset: float
    step: float
    length: int

    @property
    def times(self) -> list[float]:
        """The middle of each frame."""
        return [self.offset + (index + 0.5) * self.step for index in range(self.length)]


def targets(
    actions: Sequence[Action], cut: Cut, labels: Sequence[str], kept: float
) -> tuple[Tensor, Tensor]:
    """The actions in a cut.

    Args:
        actions: in seconds.
        cut: what they are clipped to.
        labels: the classes; other actions are left out.
        kept: the part of an action that has to be inside.

    Returns:
        segments of (n, 2), float32, in frames of the cut, and labels of (n,), int64.
    """
    segments, classes = [], []
    for action in actions:
        start, end = ((time - cut.offset) / cut.step for time in (action.start, action.end))
        first, last = max(start, 0.0), min(end, float(cut.length))
        # A part that is just enough is not to be lost to rounding.
        enough = last - first >= kept * (end - start) - 1e-6
        if last > first and enough and action.label in labels:
            segments.append((first, last))
            classes.append(labels.index(action.label))
    shape = (len(segments), 2)
    return torch.tensor(segments).reshape(shape).float(), torch.tensor(classes, dtype=torch.int64)


def find(folder: Path, name: str) -> Path:
    """The file of a video.

    Raises:
        VideoError: there is none.
    """
    for prefix in PREFIXES:
        for ending in ENDINGS:
            path = folder / f"{prefix}{name}{ending}"
            if path.exists():
                return path
    raise VideoError(folder / name, "no such file")
