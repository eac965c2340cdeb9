"""The frames that are read from video files, and what is said of files that cannot be read."""

from __future__ import annotations

import pickle
import wave
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import numpy as np
import pytest
from numpy.typing import NDArray
from torch import Tensor

av = pytest.importorskip("av")
video = pytest.importorskip("benchmarks.tal.video")

COUNT, RATE, GOP = 60, 8, 12
FILES = {
    "h264.mp4": "libx264",
    "h264.mkv": "libx264",
    "mpeg4.mp4": "mpeg4",
    "mpeg4.avi": "mpeg4",
}
OPEN_FILES = Path("/proc/self/fd")


def numbered(number: int) -> NDArray[np.uint8]:
    """A number in black and white columns, its lowest bit on the left."""
    bits = number >> np.arange(6) & 1
    return np.broadcast_to(255 * bits.repeat(8)[:, None], (32, 48, 3)).astype(np.uint8)


def record(path: Path, codec: str, first: int = 0, **options: str) -> Path:
    """Write frames that show their number, the first at ``first / RATE``."""
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, RATE)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        stream.gop_size, stream.thread_count = GOP, 1
        for number in range(COUNT):
            frame = av.VideoFrame.from_ndarray(numbered(number), format="rgb24")
            frame.pts, frame.time_base = first + number, Fraction(1, RATE)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One recording per kind of file."""
    folder: Path = tmp_path_factory.mktemp("recordings")
    for name, codec in FILES.items():
        record(folder / name, codec)
    return folder


@pytest.fixture
def _files_are_closed() -> Iterator[None]:
    if not OPEN_FILES.exists():
        pytest.skip("needs /proc to count open files")
    before = len(list(OPEN_FILES.iterdir()))
    yield
    assert len(list(OPEN_FILES.iterdir())) == before


def numbers(frames: Tensor) -> list[int]:
    """Which frames these are, by the brightness of their columns."""
    columns = frames.float().mean((1, 3)).unflatten(1, (6, -1)).mean(2) > 127
    return [sum(bit << place for place, bit in enumerate(bits)) for bits in columns.tolist()]


@pytest.mark.parametrize("name", FILES)
def test_every_frame_is_found_at_its_start_middle_and_end(folder: Path, name: str) -> None:
    for part in (0.0, 0.5, 0.9):
        times = [(number + part) / RATE for number in range(COUNT)]
        assert numbers(video.decode(folder / name, times)) == list(range(COUNT))


@pytest.mark.parametrize("name", FILES)
def test_every_frame_is_found_alone(folder: Path, name: str) -> None:
    for number in range(COUNT):
        assert numbers(video.decode(folder / name, [number / RATE])) == [number]


@pytest.mark.parametrize("name", FILES)
def test_times_come_in_any_order_and_repeat(folder: Path, name: str) -> None:
    wanted = [50, 3, 3, 59, 0, 26, 25, 50]
    assert numbers(video.decode(folder / name, [number / RATE for number in wanted])) == wanted


@pytest.mark.parametrize("name", FILES)
def test_times_are_clamped(folder: Path, name: str) -> None:
    assert numbers(video.decode(folder / name, [-3.0, 7.5, 100.0])) == [0, 59, 59]


@pytest.mark.parametrize("name", ["late.mp4", "late.mkv"])
def test_times_count_from_the_first_frame(tmp_path: Path, name: str) -> None:
    late = record(tmp_path / name, "libx264", first=40)
    assert numbers(video.decode(late, [0.0, 2.0, 7.49, 100.0])) == [0, 16, 59, 59]


@pytest.mark.parametrize("name", FILES)
def test_remembered_frames_are_those_of_the_file(folder: Path, name: str) -> None:
    memory = video.Memory((32, 48))
    times = [-3.0, 0.0, 1.0, 3.31, 3.375, 2.0, 7.49, 7.5, 100.0]
    wanted = video.decode(folder / name, times)
    for _ in range(2):
        assert numbers(memory.decode(folder / name, times)) == numbers(wanted)


def test_a_remembered_file_is_not_read_again(tmp_path: Path) -> None:
    path, memory = record(tmp_path / "once.mp4", "libx264"), video.Memory((16, 24))
    first = memory.decode(path, [1.0])
    assert first.shape == (1, 16, 24, 3)
    path.unlink()
    assert numbers(memory.decode(path, [2.0])) == [16]
    with pytest.raises(video.VideoError):
        memory.decode(tmp_path / "other.mp4", [1.0])


def test_frames_are_scaled(folder: Path) -> None:
    path = folder / "h264.mp4"
    assert video.decode(path, [0.0, 1.0]).shape == (2, 32, 48, 3)
    scaled = video.decode(path, [5.0, 1.0], (20, 24))
    assert scaled.shape == (2, 20, 24, 3)
    assert numbers(scaled) == [40, 8]
    assert video.decode(path, []).shape == (0, 32, 48, 3)


class Counting:
    """A container that counts the frames taken from it and the jumps."""

    def __init__(self, container: Any) -> None:
        self.container, self.decoded, self.jumps = container, 0, 0
        self.duration, self.start_time = container.duration, container.start_time

    def decode(self, stream: Any) -> Iterator[Any]:
        for frame in self.container.decode(stream):
            self.decoded += 1
            yield frame

    def seek(self, *where: Any, **how: Any) -> None:
        self.jumps += 1
        self.container.seek(*where, **how)


def counted(path: Path, times: list[float]) -> tuple[int, int]:
    """Frames taken and jumps."""
    with av.open(str(path)) as container:
        counting = Counting(container)
        reader = video._Reader(path, counting, container.streams.video[0])
        for time in times:
            reader.at(time)
    return counting.decoded, counting.jumps


@pytest.mark.parametrize("name", ["h264.mp4", "mpeg4.mp4", "mpeg4.avi"])
def test_a_reader_jumps_over_what_nobody_asked_for(folder: Path, name: str) -> None:
    decoded, jumps = counted(folder / name, [0.0, 6.5])
    # Two at the start, then at most those between two keyframes and the one after.
    assert jumps >= 1
    assert decoded <= 2 + GOP + 2


def test_a_reader_jumps_far_where_it_knows_no_keyframes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert counted(folder / "h264.mkv", [0.0, 6.5]) == (54, 0)
    monkeypatch.setattr(video, "FAR", 4.0)
    decoded, jumps = counted(folder / "h264.mkv", [0.0, 6.5])
    assert jumps == 1
    assert decoded <= 2 + GOP + 2


def test_a_jump_that_leads_too_far_is_taken_back(folder: Path) -> None:
    class Overshooting(Counting):
        def seek(self, target: int, stream: Any) -> None:
            super().seek(target + round(2.5 / stream.time_base), stream=stream)

    with av.open(str(folder / "h264.mp4")) as container:
        counting = Overshooting(container)
        reader = video._Reader(folder, counting, container.streams.video[0])
        frame = reader.at(4.0)
        assert frame.pts * frame.time_base == 4
    # To 6.5 s, 5.5 s and 3.5 s, and on from the keyframe before.
    assert counting.jumps == 3


@pytest.mark.parametrize("name", FILES)
def test_a_reader_decodes_no_frame_twice(folder: Path, name: str) -> None:
    assert counted(folder / name, [number / RATE for number in range(COUNT)]) == (COUNT, 0)
    # A jump over one frame to a keyframe may be worth it, but not one backwards.
    assert counted(folder / name, [number / RATE for number in range(0, COUNT, 2)])[0] <= COUNT


@pytest.mark.parametrize("name", FILES)
def test_probe_tells_what_the_file_says(folder: Path, name: str) -> None:
    assert video.probe(folder / name) == video.Properties(COUNT, 8.0, 7.5, 48, 32, ANY)


def broken(folder: Path, target: Path, kind: str) -> Path:
    """A file that is not a whole video."""
    path = target / f"{kind}.mp4"
    if kind == "empty":
        path.touch()
    elif kind == "garbage":
        path.write_bytes(bytes(range(256)) * 40)
    elif kind == "truncated":
        whole = (folder / "h264.mp4").read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
    elif kind == "sound":
        with wave.open(str(path), "wb") as sound:
            sound.setparams((1, 2, 8000, 0, "NONE", "NONE"))
            sound.writeframes(bytes(1600))
    elif kind == "folder":
        path.mkdir()
    elif kind == "frameless":
        path.write_bytes((folder / "h264.mkv").read_bytes()[:800])
    return path


REASONS = {
    "missing": "No such file",
    "empty": "Invalid data",
    "garbage": "Invalid data",
    "truncated": "Invalid data",
    "sound": "has no video",
    "folder": "Is a directory",
    "frameless": "has no frames",
}


@pytest.mark.usefixtures("_files_are_closed")
@pytest.mark.parametrize("kind", REASONS)
def test_a_broken_file_is_named_with_the_reason(
    folder: Path, tmp_path: Path, kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path = broken(folder, tmp_path, kind)
    with pytest.raises(video.VideoError) as caught:
        video.decode(path, [0.0])
    assert str(caught.value).startswith(f"{path}: ")
    assert REASONS[kind] in caught.value.reason
    assert capfd.readouterr() == ("", "")
    if kind != "frameless":
        with pytest.raises(video.VideoError, match=REASONS[kind]):
            video.probe(path)


@pytest.mark.usefixtures("_files_are_closed")
def test_a_video_that_ends_early_is_read_up_to_there(folder: Path, tmp_path: Path) -> None:
    whole = (folder / "h264.mkv").read_bytes()
    path = tmp_path / "short.mkv"
    path.write_bytes(whole[: len(whole) // 2])
    assert numbers(video.decode(path, [0.0, 1.0])) == [0, 8]
    with pytest.raises(video.VideoError, match=r"ends at \d\.\d s of 7\.5 s"):
        video.decode(path, [7.0])


@pytest.mark.usefixtures("_files_are_closed")
def test_a_download_that_broke_off_is_read_up_to_there(tmp_path: Path) -> None:
    path = record(tmp_path / "part.mp4", "libx264", movflags="+faststart")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 3 // 4])
    assert numbers(video.decode(path, [0.0, 1.0])) == [0, 8]
    with pytest.raises(video.VideoError, match=r"has no frames near 7\.0 s"):
        video.decode(path, [7.0])
    with pytest.raises(video.VideoError):
        video.decode(path, [number / RATE for number in range(COUNT)])


@pytest.mark.usefixtures("_files_are_closed")
def test_read_files_are_closed(folder: Path) -> None:
    for name in FILES:
        video.probe(folder / name)
        video.decode(folder / name, [0.0, 5.0])


def test_an_error_can_be_sent_between_processes() -> None:
    error = pickle.loads(pickle.dumps(video.VideoError("a.mp4", "is broken")))
    assert (str(error), error.path, error.reason) == ("a.mp4: is broken", "a.mp4", "is broken")


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_what_is_encoded_is_read_back(tmp_path: Path, codec: str) -> None:
    frames = np.stack([numbered(number) for number in range(30)])
    noisy = np.clip(np.random.default_rng(0).normal(128, 20, frames.shape), 0, 255)
    frames = (0.5 * frames + 0.5 * noisy).astype(np.uint8)
    for name in ("one.mp4", "two.mp4"):
        video.encode(tmp_path / name, frames, 12.5, codec)
    assert video.probe(tmp_path / "one.mp4") == video.Properties(30, 12.5, 2.4, 48, 32, ANY)
    read = video.decode(tmp_path / "one.mp4", [number / 12.5 for number in range(30)])
    assert numbers(read) == list(range(30))
    # Of grey, so that what is lost is not the colours' resolution.
    grey = np.abs(read.numpy().mean(3) - frames.mean(3)).mean()
    assert grey < 4
    assert (tmp_path / "one.mp4").read_bytes() == (tmp_path / "two.mp4").read_bytes()
