"""Frames of video files, by the time at which they are shown.

A reader walks forwards through the frames and jumps to a keyframe only when that saves decoding.
Threads are left to the loader's workers: each file is decoded on one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream
from numpy.typing import NDArray
from torch import Tensor

# A video that ends so long before the length it states has been cut off: seconds, and part of it.
SHORT, SHORT_PART = 1.0, 0.05
# Without an index of keyframes, jump over more than this: in seconds.
FAR = 10.0
# Of a video that is written: frames from one keyframe to the next, at most.
KEYFRAMES = 24
# Fixed: where x264 looks ahead to share out quality, small frames get other bytes in each run.
QUALITY = {
    "libx264": {"preset": "veryfast", "qp": "18", "bf": "0"},
    "mpeg4": {"qmin": "1", "qmax": "3"},
}
# A time this little before a frame means the frame: in frames, and at most half a clock tick.
EARLY = 0.05


class VideoError(RuntimeError):
    """A video that cannot be read: its path and the reason."""

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = str(path), reason

    def __reduce__(self) -> tuple[type[VideoError], tuple[str, str]]:
        """Workers send their errors home."""
        return type(self), (self.path, self.reason)


@dataclass(frozen=True)
class Properties:
    """What a file says of its video.

    Attributes:
        frames: their number; where the file does not count them, what rate and duration make.
        fps: frames per second, on average.
        duration: in seconds.
        width: in pixels.
        height: in pixels.
        tick: of the clock by which frames are shown, in seconds.
    """

    frames: int
    fps: float
    duration: float
    width: int
    height: int
    tick: float


def probe(path: str | Path) -> Properties:
    """Read a video's header.

    Raises:
        VideoError: the file is missing or broken or has no video.
    """
    with _opened(path) as (container, stream):
        fps, duration = _rate(stream), _duration(container, stream)
        frames = stream.frames or round(duration * fps)
        return Properties(frames, fps, duration, stream.width, stream.height, _tick(stream))


def decode(path: str | Path, times: Sequence[float], size: tuple[int, int] | None = None) -> Tensor:
    """Read the frames that are shown at some times.

    Args:
        path: of a video file.
        times: in seconds from the video's start, in any order; before the start stands for the
            first frame, after the end for the last.
        size: height and width to scale the frames to; None keeps them.

    Returns:
        frames of (T, H, W, 3), uint8.

    Raises:
        VideoError: the file is missing, broken, has no video or no frames, or ends before a frame
            that its stated length promises.
    """
    order = sorted(range(len(times)), key=lambda index: times[index])
    with _opened(path) as (container, stream):
        height, width = size or (stream.height, stream.width)
        frames = np.empty((len(times), height, width, 3), np.uint8)
        # One for all frames: what it prepares for a size takes longer than a small frame.
        reader, scaler = _Reader(path, container, stream), VideoReformatter()
        shown, before = None, 0
        for index in order:
            frame = reader.at(times[index])
            if frame is shown:
                frames[index] = frames[before]
            else:
                frames[index] = scaler.reformat(frame, width, height, "rgb24").to_ndarray()
            shown, before = frame, index
    return torch.from_numpy(frames)


class Memory:
    """Videos of a constant frame rate, each decoded once: for sets that fit into memory.

    Args:
        size: height and width to scale the frames to.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size
        self.kept: dict[Path, tuple[Tensor, Properties]] = {}

    def decode(self, path: Path, times: Sequence[float]) -> Tensor:
        """As `decode`, to (T, height, width, 3), uint8.

        Raises:
            VideoError: as there; a video that cannot be read is tried again the next time.
        """
        if path not in self.kept:
            found = probe(path)
            middles = [(index + 0.5) / found.fps for index in range(max(found.frames, 1))]
            self.kept[path] = decode(path, middles, self.size), found
        frames, told = self.kept[path]
        early = min(0.5 * told.tick * told.fps, EARLY)
        shown = (torch.tensor(times, dtype=torch.float64) * told.fps + early).floor().long()
        return frames[shown.clamp(0, len(frames) - 1)]


class _Reader:
    """Walks through a video's frames; ``frame`` is shown until ``following`` is, if there is one.

    Times inside are in ticks of the stream's clock.
    """

    def __init__(self, path: str | Path, container: InputContainer, stream: VideoStream) -> None:
        self.path, self.container, self.stream = path, container, stream
        self.duration = _duration(container, stream)
        self.tick = _tick(stream)
        self.start, self.index = stream.start_time or 0, stream.index_entries
        self.interval = 1 / _rate(stream) / self.tick
        self.early = min(0.5, EARLY * self.interval)
        self.frame, self.following = self._read_on("has no frames")

    def at(self, time: float) -> VideoFrame:
        """The frame shown at a time that is not before the last one asked for."""
        time = max(time, 0.0) if self.duration == 0 else min(max(time, 0.0), self.duration)
        ticks = math.floor(self.start + time / self.tick + self.early)
        if self._jump_saves(ticks):
            self._jump(ticks)
        while self.following is not None and self._shown(self.following) <= ticks:
            self.frame, self.following = self.following, next(self.frames, None)
        if self.following is None:
            self._check_end(time)
        return self.frame

    def _read_on(self, otherwise: str) -> tuple[VideoFrame, VideoFrame | None]:
        """The next two frames from wherever the container is, or else an error."""
        self.frames = self.container.decode(self.stream)
        first = next(self.frames, None)
        if first is None:
            raise VideoError(self.path, otherwise)
        return first, next(self.frames, None)

    def _shown(self, frame: VideoFrame) -> int:
        """When a frame is first shown."""
        if frame.pts is None:
            raise VideoError(self.path, "has frames without a time")
        return frame.pts

    def _jump_saves(self, ticks: int) -> bool:
        """Whether a keyframe lies between here and there, as far as is known."""
        if self.following is None:
            return False
        here, index = self._shown(self.following), self.index
        # To look into the index for a frame that is next takes longer than to decode it.
        if ticks < here + self.interval or len(index) == 0:
            return False
        if index[len(index) - 1].timestamp <= here:
            # Matroska's index is not read before it is needed.
            return (ticks - here) * self.tick > FAR
        # An index goes by when frames are decoded, which may be earlier than they are shown.
        delay = self.start - index[0].timestamp
        nearest = index.search_timestamp(ticks - delay)
        return nearest >= 0 and index[nearest].timestamp + delay > here

    def _jump(self, ticks: int) -> None:
        """Go on from a keyframe that is shown no later than ``ticks``."""
        target, back = ticks, math.ceil(1 / self.tick)
        while True:
            self.container.seek(target, stream=self.stream)
            seconds = (target - self.start) * self.tick
            self.frame, self.following = self._read_on(f"has no frames near {seconds:.1f} s")
            if self._shown(self.frame) <= ticks or target <= self.start:
                return
            # Some containers lead to a keyframe that is only decoded by then.
            target, back = max(target - back, self.start), 2 * back

    def _check_end(self, time: float) -> None:
        """Refuse to show the last frame where the file promises another."""
        end = (self._shown(self.frame) - self.start + self.interval) * self.tick
        if time - end > max(SHORT, SHORT_PART * self.duration):
            raise VideoError(self.path, f"ends at {end:.1f} s of {self.duration:.1f} s")


@contextmanager
def _opened(path: str | Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """A file and its first video stream; whatever FFmpeg objects to names the file."""
    try:
        # Titles in odd encodings are no reason to refuse a video.
        with av.open(str(path), metadata_errors="ignore") as container:
            if not container.streams.video:
                raise VideoError(path, "has no video")
            stream = container.streams.video[0]
            stream.thread_count = 1
            yield container, stream
    except av.FFmpegError as error:
        raise VideoError(path, error.strerror or type(error).__name__) from error


def _rate(stream: VideoStream) -> float:
    """Frames per second; 25 where the file knows none."""
    return float(stream.average_rate or stream.guessed_rate or 25)


def _tick(stream: VideoStream) -> float:
    """Seconds per tick of the stream's clock."""
    return float(stream.time_base or Fraction(1, av.time_base))


def _duration(container: InputContainer, stream: VideoStream) -> float:
    """Seconds, of the video or else of the file; 0 where neither is known."""
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    # Matroska, which has none for the video, states when the file ends.
    return max((container.duration or 0) - (container.start_time or 0), 0) / av.time_base


def encode(
    path: str | Path, frames: NDArray[np.uint8], rate: float, codec: str = "libx264"
) -> None:
    """Write a video.

    Args:
        path: of the file; its ending says which container.
        frames: of (T, H, W, 3), H and W even.
        rate: frames per second.
        codec: FFmpeg's name of the encoder.
    """
    with av.open(str(path), "w", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream(
            codec, Fraction(rate).limit_denominator(1001), QUALITY.get(codec)
        )
        assert isinstance(stream, VideoStream)
        _, stream.height, stream.width, _ = frames.shape
        stream.pix_fmt = "yuv420p"
        stream.gop_size = KEYFRAMES
        # More threads would make the bytes depend on the machine.
        stream.thread_count = 1
        for pixels in frames:
            container.mux(stream.encode(VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
