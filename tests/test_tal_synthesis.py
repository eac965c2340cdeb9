"""The rendered videos: the same for a seed, and annotated with what is to be seen in them."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks.tal.annotations import Action, read

pytest.importorskip("av")
pytest.importorskip("sklearn")
actions = pytest.importorskip("benchmarks.tal.actions")
gestures = pytest.importorskip("benchmarks.tal.gestures")
scene = pytest.importorskip("benchmarks.tal.scene")
script = pytest.importorskip("benchmarks.tal.script")
synthesis = pytest.importorskip("benchmarks.tal.synthesis")
video = pytest.importorskip("benchmarks.tal.video")

SHORT = scene.Rendering(size=32, duration=(10.0, 14.0), clip=1.0)
# Nothing but actions changes the picture.
CALM = dataclasses.replace(SHORT, drift=0, jitter=0, shake=0, flicker=0, noise=0)
# Of 255: more than encoding changes in a picture that stays.
ENCODED = 12.0


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Videos in which nothing but the actions moves."""
    folder = tmp_path_factory.mktemp("calm")
    path: Path = synthesis.render_localization(
        folder, training=8, validation=4, seed=1, rendering=CALM
    )
    return path


def pixels(path: Path, entry: Any) -> NDArray[np.float32]:
    """Every frame of a rendered video."""
    count = round(entry.duration * CALM.rate)
    times = [(index + 0.5) / CALM.rate for index in range(count)]
    name = path.parent / "videos" / f"{entry.name}.mp4"
    return video.decode(name, times).numpy().astype(np.float32)


def spans(found: Sequence[Action]) -> list[tuple[int, int, str]]:
    """First frame and the one after the last, and what happens."""
    return [
        (round(action.start * CALM.rate), round(action.end * CALM.rate), action.label)
        for action in found
    ]


def changes(frames: NDArray[np.float32]) -> NDArray[np.float32]:
    """How much each frame differs from the one before it, where it differs most; first comes 0."""
    moved = np.abs(np.diff(frames.mean(3), axis=0)).reshape(len(frames) - 1, -1)
    return np.concatenate([[0.0], np.sort(moved, axis=1)[:, -20:].mean(1)])


def test_the_annotations_fit_the_videos(calm: Path) -> None:
    known = read(calm)
    assert not known.problems
    assert Counter(entry.subset for entry in known.videos) == {"training": 8, "validation": 4}
    for entry in known.videos:
        properties = video.probe(calm.parent / "videos" / f"{entry.name}.mp4")
        assert properties == video.Properties(
            round(entry.duration * 8), 8.0, entry.duration, 32, 32, ANY
        )
        assert 10 <= entry.duration <= 14
        assert len(entry.actions) >= 1


def test_actions_are_disjoint_and_as_long_as_asked(calm: Path) -> None:
    for entry in read(calm).videos:
        ends = [0.0]
        for action in entry.actions:
            assert action.start - ends[-1] >= 0.5
            assert 0.7 - 1 / 8 <= action.end - action.start <= 4.0
            ends.append(action.end)
        assert ends[-1] < entry.duration


def test_every_class_occurs(calm: Path) -> None:
    known = read(calm)
    found = {action.label for entry in known.videos for action in entry.actions}
    assert found == set(actions.MOTIONS) == set(known.labels)


def test_nothing_but_actions_changes_the_picture() -> None:
    for seed in range(6):
        digits, found = script.perform("training", CALM, np.random.default_rng(seed))
        frames = scene.draw(digits, CALM, np.random.default_rng(seed))
        change = changes(frames.astype(np.float32))
        acting = np.zeros(len(frames), bool)
        for begin, end, label in spans(found):
            if label == "blink":
                assert change[begin] > 0 < change[end]
                # What blinks comes back with the frame after its last.
                change[begin : end + 1] = 0
            else:
                acting[begin:end] = True
        assert (change[acting] > 0).all()
        assert (change[~acting] == 0).all()


def test_the_files_show_the_actions(calm: Path) -> None:
    for entry in read(calm).videos:
        frames = pixels(calm, entry)
        idle = np.ones(len(frames), bool)
        for begin, end, label in spans(entry.actions):
            idle[begin : end + (label == "blink")] = False
            moved = changes(frames[[begin - 1, end]])[1]
            if label in ("circle", "turn", "blink"):
                assert moved < ENCODED, (entry.name, label)
            else:
                assert moved > 3 * ENCODED, (entry.name, label)
        assert changes(frames)[idle].max() < ENCODED


def test_a_seed_gives_the_same_videos_whatever_else_is_rendered(tmp_path: Path) -> None:
    ticks: list[int] = []
    for folder, training, seed in (("one", 1, 5), ("two", 2, 5), ("other", 1, 6)):
        synthesis.render_localization(
            tmp_path / folder, training=training, validation=1, seed=seed, rendering=SHORT,
            progress=lambda: ticks.append(1),
        )  # fmt: skip
    assert len(ticks) == 7
    known = {
        name: {entry.name: entry for entry in read(tmp_path / name / "annotations.json").videos}
        for name in ("one", "two", "other")
    }
    for name in ("training_0000", "validation_0000"):
        files = {
            folder: (tmp_path / folder / "videos" / f"{name}.mp4").read_bytes() for folder in known
        }
        assert files["one"] == files["two"] != files["other"]
        assert known["one"][name] == known["two"][name] != known["other"][name]
    contents = [path.read_bytes() for path in (tmp_path / "two" / "videos").iterdir()]
    assert len(set(contents)) == 3


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_the_same_frames_give_the_same_bytes(tmp_path: Path, codec: str) -> None:
    rng = np.random.default_rng([5, 0, 0])
    digits, _ = script.perform("training", SHORT, rng)
    frames = scene.draw(digits, SHORT, rng)
    contents = set()
    for attempt in range(12):
        # An encoder that reads what it never wrote finds something else there each time.
        litter = [np.full(int(size), attempt, np.uint8) for size in rng.integers(500, 9_000, 2_000)]
        del litter
        video.encode(tmp_path / "again.mp4", frames, SHORT.rate, codec)
        contents.add((tmp_path / "again.mp4").read_bytes())
    assert len(contents) == 1


def test_actions_may_overlap_if_asked() -> None:
    overlapping = dataclasses.replace(SHORT, overlap=True, duration=(60.0, 60.0))
    together = 0
    for seed in range(5):
        _, found = script.perform("training", overlapping, np.random.default_rng(seed))
        for first, second in pairwise(found):
            assert first.start <= second.start
            if second.start < first.end:
                together += 1
                assert "swap" not in (first.label, second.label)
    assert together > 5


@pytest.mark.parametrize("name", sorted(actions.MOTIONS))
@pytest.mark.parametrize("count", [3, 6, 17, 32])
def test_a_motion_keeps_to_its_span_and_to_the_frame(name: str, count: int) -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        tracks = script.stage(50, rng)
        if name == "shrink":
            tracks[0].size[:] = actions.LARGE
        before = [np.stack(list(vars(track).values())) for track in tracks]
        actions.MOTIONS[name](*tracks, actions.Span(10, 10 + count), rng)
        after = [np.stack(list(vars(track).values())) for track in tracks]
        for old, new in zip(before, after, strict=True):
            assert np.array_equal(old[:, :10], new[:, :10])
            assert (new[:, 10 + count :] == new[:, 10 + count : 11 + count]).all()
            assert ((new[:2] > 0.05) & (new[:2] < 0.95)).all()
        assert not np.array_equal(before[0][:, 10], after[0][:, 10])
        # The last frame shows the end already; what blinks is still gone.
        last = 9 + count if name == "blink" else 8 + count
        assert not np.allclose(after[0][:, last], after[0][:, 10 + count])
        partner_moves = not np.array_equal(before[1], after[1])
        assert partner_moves == (name == "swap")


def test_a_swap_exchanges_places() -> None:
    rng = np.random.default_rng(0)
    first, second = script.stage(20, rng)
    places = [(track.x[0], track.y[0]) for track in (first, second)]
    actions.swap(first, second, actions.Span(4, 14), rng)
    assert np.allclose([(track.x[-1], track.y[-1]) for track in (second, first)], places)


def test_only_small_digits_grow_and_only_large_ones_shrink() -> None:
    small = script.Track.standing((0.5, 0.5), actions.SMALL, 5)
    large = script.Track.standing((0.5, 0.5), actions.LARGE, 5)
    assert "grow" in actions.possible(small, 0)
    assert "shrink" not in actions.possible(small, 0)
    assert "shrink" in actions.possible(large, 0)
    assert "grow" not in actions.possible(large, 0)


def test_no_picture_of_a_digit_is_in_both_subsets() -> None:
    rng = np.random.default_rng(0)
    seen = {
        subset: {
            script.picture(subset, digit, rng).tobytes() for digit in range(10) for _ in range(100)
        }
        for subset in ("training", "validation")
    }
    assert min(map(len, seen.values())) > 200
    assert not seen["training"] & seen["validation"]


@pytest.mark.parametrize("what", ["drift", "shake", "flicker", "noise"])
def test_each_disturbance_changes_every_frame(what: str) -> None:
    digits, _ = script.perform("training", CALM, np.random.default_rng(0))
    still = [
        dataclasses.replace(digit, track=script.Track.standing((0.5, 0.5), 0.3, 12))
        for digit in digits
    ]
    calm = scene.draw(still, CALM, np.random.default_rng(1))
    assert (calm == calm[0]).all()
    default = getattr(scene.Rendering(), what)
    disturbed = scene.draw(
        still, dataclasses.replace(CALM, **{what: default}), np.random.default_rng(1)
    )
    assert all((a != b).any() for a, b in pairwise(disturbed))


def test_some_bystanders_jitter_and_others_stand() -> None:
    rng = np.random.default_rng(0)
    spreads = [script.bystander(40, SHORT, rng).x.std() * SHORT.size for _ in range(20)]
    jitters = [spread for spread in spreads if spread > 0]
    assert 4 < len(jitters) < 16
    assert 0.3 < np.mean(jitters) < 0.7


def test_clips_have_classes_of_their_own(tmp_path: Path) -> None:
    path = synthesis.render_clips(tmp_path, per_class=5, seed=0, rendering=SHORT)
    assert path == tmp_path / "clips.json"
    clips = read(path).videos
    labels = Counter(action.label for clip in clips for action in clip.actions)
    assert labels == dict.fromkeys(gestures.GESTURES, 5)
    assert not set(labels) & set(actions.MOTIONS)
    assert Counter(clip.subset for clip in clips) == {"training": 32, "validation": 8}
    for clip in clips:
        (action,) = clip.actions
        assert (action.start, action.end, clip.duration) == (0.0, 1.0, 1.0)
        assert video.probe(tmp_path / "clips" / f"{clip.name}.mp4").frames == 8


@pytest.mark.parametrize("name", sorted(gestures.GESTURES))
def test_a_gesture_goes_on_all_the_time_inside_the_frame(name: str) -> None:
    for seed in range(20):
        track = script.Track.standing((0.3, 0.7), 0.3, 32)
        gestures.perform_gesture(name, track, 8.0, np.random.default_rng(seed))
        poses = np.stack(list(vars(track).values()))
        assert poses.shape == (5, 32)
        assert ((poses[:2] > 0.1) & (poses[:2] < 0.9)).all()
        assert ((poses[4] >= 0) & (poses[4] <= 1)).all()
        # What goes to and fro takes two seconds at most.
        second_half = poses[:, 16:]
        moves = (second_half != second_half[:, :1]).any()
        assert moves == (name != "stand")


def test_gestures_differ_in_what_they_change() -> None:
    changed = {}
    for name in gestures.GESTURES:
        track = script.Track.standing((0.5, 0.5), 0.3, 32)
        gestures.perform_gesture(name, track, 8.0, np.random.default_rng(0))
        changed[name] = {key for key, values in vars(track).items() if values.std() > 1e-3}
    assert changed["stand"] == set()
    assert changed["sway"] == {"x"}
    assert changed["bob"] == {"y"}
    assert changed["drift"] == {"x", "y"}
    assert changed["rock"] == {"angle"}
    assert changed["pulse"] == {"size"}
    assert changed["fade"] == {"opacity"}
    assert changed["hop"] in ({"x"}, {"y"})


def test_digits_are_light_or_dark_as_asked() -> None:
    for dark in (0.0, 1.0):
        rendering = dataclasses.replace(SHORT, dark=dark)
        digits, _ = script.perform("training", rendering, np.random.default_rng(0))
        assert all((digit.colour.max() < 0.5) == bool(dark) for digit in digits)


def test_a_background_without_texture_is_grey() -> None:
    plain = dataclasses.replace(CALM, texture=0.0)
    canvas = scene.background(2, np.zeros((2, 2)), plain, np.random.default_rng(0))
    assert canvas.std() < 1e-6
    assert scene.background(2, np.zeros((2, 2)), CALM, np.random.default_rng(0)).std() > 0.02


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"size": 33}, "even size"),
        ({"duration": (5.0, 2.0)}, "shortest"),
        ({"action": (0.1, 2.0)}, "under three frames"),
    ],
)
def test_a_rendering_that_cannot_be_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scene.Rendering(**wrong)
