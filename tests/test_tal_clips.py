"""The datasets: where windows lie, what is in them, and what happens to videos that are broken."""

from __future__ import annotations

import dataclasses
import itertools
import pickle
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.tal.annotations import Action, Annotations, Video

pytest.importorskip("av")
batches = pytest.importorskip("benchmarks.tal.batches")
clips = pytest.importorskip("benchmarks.tal.clips")
cuts = pytest.importorskip("benchmarks.tal.cuts")
video = pytest.importorskip("benchmarks.tal.video")

RATE = 8
# A pixel x of 0 to 1 becomes x.
VIEW = clips.View(frames=16, size=16, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
# Of "long": 40 frames, three windows of 16 at a stride of 12.
ACTIONS = (Action(0.5, 1.5, "b"), Action(1.0, 3.0, "a"), Action(3.5, 4.5, "unseen"))
VIDEOS = (
    Video("long", "training", 5.0, ACTIONS),
    Video("short", "training", 1.25, (Action(0.25, 1.0, "a"),)),
    Video("nothing", "validation", 2.0, ()),
)
KNOWN = Annotations(VIDEOS, ("a", "b"), ())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Frame k is as bright as 4 k of 255, and its right half is black."""
    folder: Path = tmp_path_factory.mktemp("videos")
    for entry in VIDEOS:
        count = round(entry.duration * RATE)
        frames = np.zeros((count, 16, 16, 3), np.uint8)
        frames[:, :, :8] = 4 * np.arange(count)[:, None, None, None]
        video.encode(folder / f"{entry.name}.mp4", frames, RATE)
    return folder


def numbers(frames: torch.Tensor) -> list[int]:
    """Which frames of its video a sample has, by their brightness."""
    return (frames[:, :, :, 2:6].mean((0, 2, 3)) * 255 / 4).round().int().tolist()


def labelled(sample: Any) -> list[tuple[float, float, int]]:
    """Segments with their labels, to compare."""
    return [
        (*segment, label)
        for segment, label in zip(sample.segments.tolist(), sample.labels.tolist(), strict=True)
    ]


def test_a_whole_video_is_resampled(folder: Path) -> None:
    data = clips.ResizedVideos(KNOWN, folder, VIEW, subset="training")
    assert len(data) == 2
    sample = data[0]
    assert (sample.video, sample.offset, sample.step) == ("long", 0.0, 5 / 16)
    assert sample.frames.shape == (3, 16, 16, 16)
    assert sample.frames.dtype == torch.float32
    # Frame i of 16 stands for 2.5 frames of the video and shows the one in their middle.
    assert numbers(sample.frames) == [int(2.5 * index + 1.25) for index in range(16)]
    # 0.5 s is 1.6 of the 16 frames; "unseen" is no class.
    assert sample.segments.dtype == torch.float32
    assert sample.labels.dtype == torch.int64
    assert np.allclose(labelled(sample), [(1.6, 4.8, 1), (3.2, 9.6, 0)])
    assert sample.length == 16
    # Ten frames are shown as sixteen.
    assert numbers(data[1].frames) == [int(0.625 * index + 0.3125) for index in range(16)]


def test_frames_are_normalised(folder: Path) -> None:
    plain = clips.ResizedVideos(KNOWN, folder, VIEW)[0].frames
    view = dataclasses.replace(VIEW, mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 2.0))
    frames = clips.ResizedVideos(KNOWN, folder, view)[0].frames
    for colour, (mean, std) in enumerate(zip(view.mean, view.std, strict=True)):
        assert torch.allclose(frames[colour], (plain[colour] - mean) / std, atol=1e-6)


def test_windows_cover_a_video_and_the_last_is_padded(folder: Path) -> None:
    data = clips.Windows(KNOWN, folder, VIEW, rate=RATE, stride=12)
    samples = [data[index] for index in range(len(data))]
    found = [(s.video, s.offset, s.length) for s in samples]
    assert found == [
        ("long", 0.0, 16), ("long", 1.5, 16), ("long", 3.0, 16),
        ("short", 0.0, 10), ("nothing", 0.0, 16),
    ]  # fmt: skip
    assert [s.step for s in samples] == [1 / 8] * 5
    assert [numbers(s.frames) for s in samples[:3]] == [
        list(range(start, start + 16)) for start in (0, 12, 24)
    ]
    assert numbers(samples[3].frames)[:10] == list(range(10))
    assert (samples[3].frames[:, 10:] == 0).all()
    assert samples[3].frames.shape == samples[0].frames.shape
    # Of "a", from frame 8 to 24, the first window has half and the second three quarters.
    assert [labelled(s) for s in samples] == [
        [(4.0, 12.0, 1)], [(0.0, 12.0, 0)], [], [(2.0, 8.0, 0)], [],
    ]  # fmt: skip
    assert samples[4].segments.shape == (0, 2)
    assert samples[4].labels.shape == (0,)


@pytest.mark.parametrize(
    ("seconds", "starts"),
    [(0.5, [0]), (2.0, [0]), (2.1, [0, 12]), (3.5, [0, 12]), (3.6, [0, 12, 24])],
)
def test_windows_go_on_until_the_end_is_inside(seconds: float, starts: list[int]) -> None:
    known = Annotations((Video("v", "training", seconds, ()),), ("a",), ())
    data = clips.Windows(known, Path(), VIEW, rate=RATE, stride=12)
    assert data.starts == [(0, start) for start in starts]


def test_windows_may_have_another_rate_than_the_video(folder: Path) -> None:
    data = clips.Windows(KNOWN, folder, VIEW, rate=RATE / 2, stride=16)
    assert [(data[k].video, data[k].length) for k in (0, 1)] == [("long", 16), ("long", 4)]
    assert numbers(data[0].frames) == list(range(1, 33, 2))
    assert labelled(data[0]) == [(2.0, 6.0, 1), (4.0, 12.0, 0)]


@pytest.mark.parametrize(
    ("kept", "expected"),
    [
        (0.75, [(0.0, 3.0, 1), (4.0, 8.0, 0)]),
        (0.76, [(4.0, 8.0, 0)]),
        (0.25, [(0.0, 3.0, 1), (4.0, 8.0, 0), (7.0, 8.0, 1)]),
    ],
)
def test_an_action_cut_by_a_window_is_kept_if_enough_is_inside(
    kept: float, expected: list[tuple[float, float, int]]
) -> None:
    # Frames of 0.5 s from 10 s on: eight of them, of which the last action has one of four inside.
    actions = [
        Action(9.5, 11.5, "b"), Action(12.0, 14.0, "a"), Action(13.5, 15.5, "b"),
        Action(2.0, 10.0, "a"), Action(14.0, 15.0, "a"), Action(11.0, 12.0, "c"),
    ]  # fmt: skip
    segments, labels = cuts.targets(actions, cuts.Cut(10.0, 0.5, 8), ("a", "b"), kept)
    assert [(*s, c) for s, c in zip(segments.tolist(), labels.tolist(), strict=True)] == expected


def test_targets_end_where_padding_begins() -> None:
    segments, _ = cuts.targets([Action(0.0, 10.0, "a")], cuts.Cut(0.0, 1.0, 6), ("a",), 0.5)
    assert segments.tolist() == [[0.0, 6.0]]


def offsets(data: Any, epoch: int) -> list[float]:
    """Where the samples of an epoch start."""
    return [data[epoch, index].offset for index in range(len(data))]


def test_random_windows_differ_between_epochs_and_seeds_but_not_between_runs(folder: Path) -> None:
    def windows(seed: int) -> Any:
        return clips.Windows(KNOWN, folder, VIEW, rate=RATE, stride=None, seed=seed)

    data = windows(0)
    assert len(data) == 3
    drawn = [offsets(data, epoch) for epoch in range(12)]
    assert drawn == [offsets(windows(0), epoch) for epoch in range(12)]
    assert drawn != [offsets(windows(1), epoch) for epoch in range(12)]
    assert len({starts[0] for starts in drawn}) > 4
    for starts in drawn:
        # A start is a frame's, and neither video is longer than a window.
        assert (starts[0] * RATE).is_integer()
        assert 0 <= starts[0] <= 3
        assert starts[1:] == [0.0, 0.0]
    sample = data[3, 0]
    assert numbers(sample.frames)[0] == round(drawn[3][0] * RATE)
    assert offsets(data, 0)[0] == data[0].offset


def test_a_random_window_has_an_action_in_it() -> None:
    known = Annotations((Video("v", "training", 40.0, (Action(20.0, 24.0, "a"),)),), ("a",), ())
    view = dataclasses.replace(VIEW, frames=40)
    data = clips.Windows(known, Path(), view, rate=RATE, stride=None)
    entry = known.videos[0]
    windows = [data.cut(entry, 0, batches.generator(seed)) for seed in range(100)]
    found = [len(cuts.targets(entry.actions, window, ("a",), 0.75)[1]) for window in windows]
    # One window in twelve has it.
    assert sum(found) > 40


def test_clips_are_cut_from_the_middle_of_their_actions(folder: Path) -> None:
    view = dataclasses.replace(VIEW, frames=8)
    data = clips.TrimmedClips(KNOWN, folder, view, rate=RATE)
    samples = [data[index] for index in range(len(data))]
    # The second action has 16 frames, from 8 on; the third is "unseen"; the fourth has six.
    assert [numbers(s.frames) for s in samples] == [
        [4, 5, 6, 7, 8, 9, 10, 11],
        [12, 13, 14, 15, 16, 17, 18, 19],
        [2, 3, 4, 5, 6, 7, 7, 7],
    ]
    assert [labelled(s) for s in samples] == [[(0, 8, 1)], [(0, 8, 0)], [(0, 6, 0)]]
    assert [s.length for s in samples] == [8, 8, 6]
    assert offsets(data, 0) == offsets(data, 1)


def test_clips_are_cropped_and_mirrored_at_random(folder: Path) -> None:
    view = dataclasses.replace(VIEW, frames=8)
    data = clips.TrimmedClips(KNOWN, folder, view, rate=RATE, random=True, flip=True, seed=2)
    samples = [data[epoch, 1] for epoch in range(16)]
    starts = {sample.offset for sample in samples}
    assert len(starts) > 8
    assert min(starts) >= 1.0
    assert max(starts) <= 2.0
    black = [bool((sample.frames[..., :7] < 0.05).all()) for sample in samples]
    assert 3 < sum(black) < 13
    again = [data[epoch, 1] for epoch in range(16)]
    for one, two in zip(samples, again, strict=True):
        assert torch.equal(one.frames, two.frames)
    # What is not to be mirrored has its black half on the right.
    plain = clips.TrimmedClips(KNOWN, folder, view, rate=RATE, random=True, seed=2)
    assert all((plain[epoch, 1].frames[..., 9:] < 0.05).all() for epoch in range(16))


@pytest.fixture
def damaged(folder: Path, tmp_path: Path) -> tuple[Annotations, Path]:
    """The videos, and others that cannot be read."""
    shutil.copytree(folder, tmp_path / "videos")
    whole = (folder / "long.mp4").read_bytes()
    (tmp_path / "videos" / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "videos" / "empty.mp4").touch()
    shutil.copy(folder / "long.mp4", tmp_path / "videos" / "timeless.mp4")
    names = ("missing", "cut", "empty")
    others = (*(Video(name, "training", 5.0, ACTIONS) for name in names),)
    timeless = Video("timeless", "training", 0.0, ())
    return Annotations((*others, timeless, *VIDEOS), ("a", "b"), ()), tmp_path / "videos"


def datasets(known: Annotations, folder: Path) -> list[Any]:
    """One of each kind."""
    return [
        clips.ResizedVideos(known, folder, VIEW),
        clips.Windows(known, folder, VIEW, rate=RATE, stride=100),
        clips.Windows(known, folder, VIEW, rate=RATE, stride=None),
        clips.TrimmedClips(known, folder, VIEW, rate=RATE),
    ]


def test_a_broken_video_is_a_value_with_a_reason(damaged: tuple[Annotations, Path]) -> None:
    for data in datasets(*damaged):
        values = [data[index] for index in range(len(data))]
        broken = {value.video: value.reason for value in values if isinstance(value, clips.Broken)}
        assert "no such file" in broken["missing"]
        assert "Invalid data" in broken["cut"]
        assert "Invalid data" in broken["empty"]
        if not isinstance(data, clips.TrimmedClips):
            assert "lasts 0.0 s" in broken["timeless"]
        assert {value.video for value in values} >= {"long", "short"}
        assert not broken.keys() & {"long", "short", "nothing"}


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_goes_on_past_broken_videos(
    damaged: tuple[Annotations, Path], workers: int
) -> None:
    data = clips.ResizedVideos(*damaged, VIEW)
    found = list(clips.loader(data, batch=2, workers=workers, seed=0, shuffle=False))
    assert [len(batch) for batch in found] == [0, 0, 2, 1]
    assert [[b.video for b in batch.broken] for batch in found] == [
        ["missing", "cut"], ["empty", "timeless"], [], [],
    ]  # fmt: skip
    assert found[0].frames.shape[:2] == (0, 3)
    assert found[0].lengths.shape == (0,)
    assert found[2].videos == ("long", "short")
    assert found[2].frames.shape == (2, 3, 16, 16, 16)


def test_a_batch_keeps_samples_apart(folder: Path) -> None:
    data = clips.Windows(KNOWN, folder, VIEW, rate=RATE, stride=12)
    samples = [data[0], data[3]]
    batch = clips.collate([samples[0], clips.Broken("gone", "why"), samples[1]])
    assert batch.broken == (clips.Broken("gone", "why"),)
    assert batch.videos == ("long", "short")
    assert batch.offsets == (0.0, 0.0)
    assert batch.steps == (1 / 8, 1 / 8)
    assert batch.lengths.tolist() == [16, 10]
    for place, sample in enumerate(samples):
        assert torch.equal(batch.frames[place], sample.frames)
        assert torch.equal(batch.segments[place], sample.segments)
        assert torch.equal(batch.labels[place], sample.labels)
    moved = batch.to("meta")
    assert moved.frames.is_meta
    assert moved.segments[1].is_meta
    assert moved.labels[0].is_meta
    assert moved.lengths.is_meta
    assert moved.videos == batch.videos


def test_a_file_is_found_by_its_name(tmp_path: Path) -> None:
    for name in ("one.mkv", "v_two.webm", "three.txt"):
        (tmp_path / name).touch()
    assert cuts.find(tmp_path, "one") == tmp_path / "one.mkv"
    assert cuts.find(tmp_path, "two") == tmp_path / "v_two.webm"
    with pytest.raises(video.VideoError, match="no such file"):
        cuts.find(tmp_path, "three")


def epoch_of(data: Any, epoch: int, workers: int = 0, **options: Any) -> list[Any]:
    """The batches of an epoch."""
    loader = clips.loader(data, 2, workers, **{"seed": 0, "shuffle": True, **options})
    loader.set_epoch(epoch)
    return list(loader)


def assert_same(ones: Sequence[Any], twos: Sequence[Any]) -> None:
    """Two epochs are equal to the last bit."""
    for one, two in zip(ones, twos, strict=True):
        assert (one.videos, one.offsets) == (two.videos, two.offsets)
        assert torch.equal(one.frames, two.frames)
        for a, b in zip(one.segments, two.segments, strict=True):
            assert torch.equal(a, b)


def test_workers_change_nothing(folder: Path) -> None:
    data = clips.Windows(KNOWN, folder, VIEW, rate=RATE, stride=None)
    # The same workers read one epoch after the other.
    loader = clips.loader(data, batch=2, workers=2, seed=0, shuffle=True)
    for epoch in (0, 3):
        loader.set_epoch(epoch)
        assert_same(list(loader), epoch_of(data, epoch))


def order_of(count: int, epoch: int = 0, **options: Any) -> list[int]:
    """In which order the samples come."""
    order = batches.Order(count, **{"seed": 0, "shuffle": True, "rank": 0, "world": 1, **options})
    order.set_epoch(epoch)
    keys = list(order)
    assert len(keys) == len(order)
    assert all(key[0] == epoch for key in keys)
    return [index for _, index in keys]


def test_each_epoch_has_its_order() -> None:
    orders = [order_of(20, epoch) for epoch in range(5)]
    assert orders == [order_of(20, epoch) for epoch in range(5)]
    assert all(sorted(order) == list(range(20)) for order in orders)
    assert len({tuple(order) for order in orders}) == 5
    assert order_of(20, seed=1) != orders[0]
    assert order_of(20, shuffle=False) == list(range(20))


@pytest.mark.parametrize("shuffle", [True, False])
def test_ranks_share_the_samples(shuffle: bool) -> None:
    parts = [order_of(12, epoch=2, shuffle=shuffle, rank=rank, world=3) for rank in range(3)]
    assert [len(part) for part in parts] == [4, 4, 4]
    assert sorted(itertools.chain(*parts)) == list(range(12))


def test_ranks_train_for_equally_many_steps_and_evaluate_nothing_twice() -> None:
    for count in (1, 2, 10, 11):
        parts = [order_of(count, rank=rank, world=4) for rank in range(4)]
        assert len({len(part) for part in parts}) == 1
        assert set(itertools.chain(*parts)) == set(range(count))
        parts = [order_of(count, shuffle=False, rank=rank, world=4) for rank in range(4)]
        assert sorted(itertools.chain(*parts)) == list(range(count))
    assert order_of(0, rank=1, world=2) == []
    with pytest.raises(ValueError, match="rank 2"):
        order_of(4, rank=2, world=2)


def test_loaders_of_ranks_read_their_own_samples(folder: Path) -> None:
    data = clips.Windows(KNOWN, folder, VIEW, rate=RATE, stride=12)
    parts = [
        [
            (name, offset)
            for batch in epoch_of(data, 0, shuffle=False, rank=rank, world=2)
            for name, offset in zip(batch.videos, batch.offsets, strict=True)
        ]
        for rank in (0, 1)
    ]
    assert parts == [
        [("long", 0.0), ("long", 3.0), ("nothing", 0.0)], [("long", 1.5), ("short", 0.0)],
    ]  # fmt: skip


def test_reading_leaves_torchs_generator_alone(folder: Path) -> None:
    before = torch.get_rng_state()
    data = clips.Windows(KNOWN, folder, VIEW, rate=RATE, stride=None)
    epoch_of(data, 1)
    assert torch.equal(torch.get_rng_state(), before)


def test_generators_differ_by_every_number() -> None:
    draws = {
        float(torch.rand((), generator=batches.generator(*numbers)))
        for numbers in itertools.product(range(4), repeat=3)
    }
    assert len(draws) == 64


def test_an_index_outside_is_refused(folder: Path) -> None:
    data = clips.ResizedVideos(KNOWN, folder, VIEW)
    for index in (-1, 3):
        with pytest.raises(IndexError):
            data[index]


def test_a_dataset_can_be_sent_to_a_process(folder: Path) -> None:
    for data in datasets(KNOWN, folder):
        assert torch.equal(pickle.loads(pickle.dumps(data))[0].frames, data[0].frames)
