"""Datasets of untrimmed videos and trimmed clips: frames, and where the actions are in them.

A sample's time axis counts frames: frame i stands for the ``step`` seconds from
``offset + i * step`` on and is read in their middle, and segments reach from 0 to T on that axis.

An index may come with an epoch, as `loader` passes it, and everything random depends on the seed,
the epoch and the index alone: the number of workers and ranks changes nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .annotations import Annotations, Video
from .batches import Batch, Broken, Key, Loader, Sample, collate, generator, loader
from .cuts import Cut, View, find, targets
from .video import Memory, VideoError, decode

__all__ = [
    "Batch", "Broken", "Cut", "Loader", "ResizedVideos", "Sample", "TrimmedClips", "Videos",
    "View", "Windows", "collate", "loader", "targets",
]  # fmt: skip

# A random window without an action is drawn again, at most so many times.
TRIALS = 10


class Videos(Dataset[Sample | Broken], ABC):
    """What the datasets share.

    Args:
        annotations: videos, their durations and actions.
        folder: of the video files, which are called as the videos are.
        view: what the network sees.
        subset: which videos; None takes all.
        labels: the classes in order; actions of others are no targets. None takes those of the
            annotations.
        seed: of what is random.
    """

    # The part of an action that has to be inside a cut for it to be a target.
    kept = 0.0

    def __init__(
        self,
        annotations: Annotations,
        folder: str | Path,
        view: View,
        *,
        subset: str | None = None,
        labels: Sequence[str] | None = None,
        seed: int = 0,
    ) -> None:
        self.folder, self.view, self.seed = Path(folder), view, seed
        self.memory = Memory((view.size, view.size)) if view.remembered else None
        self.labels = tuple(annotations.labels if labels is None else labels)
        self.videos = [video for video in annotations.videos if subset in (None, video.subset)]

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, key: Key) -> Sample | Broken:
        """The sample of an index, in epoch 0 unless told otherwise."""
        epoch, index = (0, key) if isinstance(key, int) else key
        if not 0 <= index < len(self):
            raise IndexError(f"{index} of {len(self)} samples")
        video = self.video(index)
        if video.duration <= 0:
            return Broken(video.name, f"lasts {video.duration} s by its annotations")
        try:
            return self.sample(video, index, generator(self.seed, epoch, index))
        except VideoError as error:
            return Broken(video.name, error.reason)

    def video(self, index: int) -> Video:
        """The video that a sample is taken from."""
        return self.videos[index]

    def sample(self, video: Video, index: int, random: torch.Generator) -> Sample:
        """Cut and read.

        Raises:
            VideoError: the video cannot be read.
        """
        cut = self.cut(video, index, random)
        segments, labels = targets(video.actions, cut, self.labels, self.kept)
        frames = self.read(video, cut)
        return Sample(video.name, frames, cut.offset, cut.step, segments, labels, cut.length)

    @abstractmethod
    def cut(self, video: Video, index: int, random: torch.Generator) -> Cut:
        """The part of the video that is shown."""

    def read(self, video: Video, cut: Cut) -> Tensor:
        """The frames of a cut, normalised and padded with zeros to (3, T, H, W)."""
        size, path = self.view.size, find(self.folder, video.name)
        if self.memory is not None:
            pixels = self.memory.decode(path, cut.times)
        else:
            pixels = decode(path, cut.times, (size, size))
        frames = torch.zeros(3, self.view.frames, size, size)
        mean, std = (torch.tensor(values) for values in (self.view.mean, self.view.std))
        frames[:, : cut.length] = ((pixels / 255 - mean) / std).permute(3, 0, 1, 2)
        return frames


class ResizedVideos(Videos):
    """Whole videos, each resampled to T frames, as is usual for ActivityNet."""

    def cut(self, video: Video, index: int, random: torch.Generator) -> Cut:
        """All of it."""
        return Cut(0.0, video.duration / self.view.frames, self.view.frames)


class Windows(Videos):
    """Windows of T frames at a fixed rate, as is usual for THUMOS; the last is padded.

    Args, besides those of `Videos`:
        rate: frames per second of the windows, whatever the videos have.
        stride: frames from one window to the next. None takes one random window per video and
            epoch, with an action in it if a few draws find one.
        kept: the part of an action that has to be inside a window for it to be a target there.
    """

    def __init__(
        self,
        annotations: Annotations,
        folder: str | Path,
        view: View,
        *,
        rate: float,
        stride: int | None,
        kept: float = 0.75,
        subset: str | None = None,
        labels: Sequence[str] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(annotations, folder, view, subset=subset, labels=labels, seed=seed)
        self.rate, self.kept = rate, kept
        self.starts = None if stride is None else self._starts(stride)

    def _starts(self, stride: int) -> list[tuple[int, int]]:
        """Per window its video and its first frame, until the video's last frame is inside."""
        return [
            (number, start)
            for number, video in enumerate(self.videos)
            for start in range(0, max(self.count(video) - self.view.frames, 0) + stride, stride)
        ]

    def count(self, video: Video) -> int:
        """How many frames a video has at the windows' rate."""
        return max(1, round(video.duration * self.rate))

    def __len__(self) -> int:
        return super().__len__() if self.starts is None else len(self.starts)

    def video(self, index: int) -> Video:
        """The video that a window is cut from."""
        return self.videos[index if self.starts is None else self.starts[index][0]]

    def cut(self, video: Video, index: int, random: torch.Generator) -> Cut:
        """The window of this number, or a random one."""
        if self.starts is not None:
            return self.window(video, self.starts[index][1])
        latest = max(self.count(video) - self.view.frames, 0)
        for _ in range(TRIALS):
            start = int(torch.randint(latest + 1, (), generator=random))
            window = self.window(video, start)
            if len(targets(video.actions, window, self.labels, self.kept)[1]):
                break
        return window

    def window(self, video: Video, start: int) -> Cut:
        """The window that starts with a frame."""
        length = min(self.view.frames, self.count(video) - start)
        return Cut(start / self.rate, 1 / self.rate, length)


class TrimmedClips(Videos):
    """Actions cut out, one label each, to pretrain a classifier on.

    Each action of a trained label is a clip. One longer than T frames is cropped; of a shorter one
    the last frame is repeated.

    Args, besides those of `Videos`:
        rate: frames per second of the clips, whatever the videos have.
        random: crop anywhere, another place in each epoch, instead of in the middle.
        flip: mirror half of the clips, others in each epoch.
    """

    def __init__(
        self,
        annotations: Annotations,
        folder: str | Path,
        view: View,
        *,
        rate: float,
        random: bool = False,
        flip: bool = False,
        subset: str | None = None,
        labels: Sequence[str] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(annotations, folder, view, subset=subset, labels=labels, seed=seed)
        self.rate, self.random, self.flip = rate, random, flip
        self.videos = [
            replace(video, actions=(action,))
            for video in self.videos
            for action in video.actions
            if action.label in self.labels
        ]

    def cut(self, video: Video, index: int, random: torch.Generator) -> Cut:
        """A part of the action, or all of it."""
        (action,) = video.actions
        count = max(1, round((action.end - action.start) * self.rate))
        length = min(self.view.frames, count)
        place = float(torch.rand((), generator=random)) if self.random else 0.5
        slack = max(action.end - action.start - length / self.rate, 0.0)
        return Cut(action.start + place * slack, 1 / self.rate, length)

    def sample(self, video: Video, index: int, random: torch.Generator) -> Sample:
        """Cut, read and mirror."""
        sample = super().sample(video, index, random)
        frames = sample.frames
        frames[:, sample.length :] = frames[:, sample.length - 1 : sample.length]
        mirrored = self.flip and float(torch.rand((), generator=random)) < 0.5
        return replace(sample, frames=frames.flip(-1)) if mirrored else sample
