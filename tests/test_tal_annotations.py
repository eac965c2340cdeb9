"""Annotations of actions are read as they are meant, and what is wrong with them is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.tal.annotations import (
    Action,
    AnnotationError,
    Annotations,
    Video,
    read,
    write,
)


def entry(*actions: tuple[float, float, str], subset: str = "training", **others: Any) -> Any:
    """A video of 10 seconds in the format of the file."""
    marks = [{"segment": [start, end], "label": label} for start, end, label in actions]
    return {"subset": subset, "duration": 10, "annotations": marks, **others}


def saved(folder: Path, **videos: Any) -> Path:
    """A file with these videos."""
    path = folder / "annotations.json"
    path.write_text(json.dumps({"version": "1.3", "taxonomy": [], "database": videos}))
    return path


def test_a_file_is_read(tmp_path: Path) -> None:
    path = saved(
        tmp_path,
        b=entry((1, 2.5, "run"), (4, 6, "jump"), fps=25, frame=250),
        a=entry((0, 10, "jump"), subset="validation"),
    )
    assert read(path) == Annotations(
        (
            Video("b", "training", 10.0, (Action(1.0, 2.5, "run"), Action(4.0, 6.0, "jump"))),
            Video("a", "validation", 10.0, (Action(0.0, 10.0, "jump"),)),
        ),
        ("jump", "run"),
    )


def test_what_is_written_is_read(tmp_path: Path) -> None:
    videos = (
        Video("ü", "training", 9.7, (Action(0.1, 1 / 3, "b"), Action(2.0, 9.7, "a"))),
        Video("empty", "testing", 1e-3),
    )
    annotations = Annotations(videos, ("a", "b"))
    write(tmp_path / "file.json", annotations)
    assert read(tmp_path / "file.json") == annotations


def test_videos_of_subsets() -> None:
    videos = tuple(Video(name, f"subset {name}", 1.0) for name in "abc")
    annotations = Annotations(videos, ())
    assert annotations.subset("subset c", "subset a") == (videos[0], videos[2])
    assert annotations.subset("subset d") == ()


def test_an_empty_video_stays(tmp_path: Path) -> None:
    path = saved(tmp_path, a=entry(), b={"subset": "testing", "duration": 3.0})
    assert read(path) == Annotations((Video("a", "training", 10.0), Video("b", "testing", 3.0)), ())


@pytest.mark.parametrize(
    ("segment", "read_as"),
    [([-1, 3], (0.0, 3.0)), ([8, 10.01], (8.0, 10.0)), ([-1, 11], (0.0, 10.0))],
)
def test_a_segment_that_reaches_outside_is_clipped(
    tmp_path: Path, segment: list[float], read_as: tuple[float, float]
) -> None:
    found = read(saved(tmp_path, clip=entry((segment[0], segment[1], "a"))))
    assert found.videos[0].actions == (Action(*read_as, "a"),)
    (problem,) = found.problems
    assert "'clip'" in problem
    assert "annotation 0 is clipped" in problem


@pytest.mark.parametrize(
    ("mark", "reason"),
    [
        ({"segment": [10, 12], "label": "a"}, "outside"),
        ({"segment": [-2, 0], "label": "a"}, "outside"),
        ({"segment": [3, 3], "label": "a"}, "starts at 3 s and ends at 3 s"),
        ({"segment": [5, 4], "label": "a"}, "starts at 5 s and ends at 4 s"),
        ({"segment": [float("nan"), 4], "label": "a"}, "two finite numbers"),
        ({"segment": [1, float("inf")], "label": "a"}, "two finite numbers"),
        ({"segment": [1, 10**400], "label": "a"}, "two finite numbers"),
        ({"segment": [False, True], "label": "a"}, "two finite numbers"),
        ({"segment": [1, 2, 3], "label": "a"}, "two finite numbers"),
        ({"segment": None, "label": "a"}, "two finite numbers"),
        ({"label": "a"}, "two finite numbers"),
        ({"segment": [1, 2]}, "no label"),
        ({"segment": [1, 2], "label": 7}, "no label"),
        ("jump", "no label"),
    ],
)
def test_an_annotation_that_is_none_is_left_out(tmp_path: Path, mark: Any, reason: str) -> None:
    video = entry((1, 2, "b"))
    video["annotations"].append(mark)
    found = read(saved(tmp_path, clip=video))
    assert found.videos[0].actions == (Action(1.0, 2.0, "b"),)
    assert found.labels == ("b",)
    (problem,) = found.problems
    assert "'clip': annotation 1 is left out" in problem
    assert reason in problem


@pytest.mark.parametrize(
    ("video", "reason"),
    [
        (entry((1, 2, "a"), duration=0), "duration"),
        (entry((1, 2, "a"), duration=-3), "duration"),
        (entry((1, 2, "a"), duration=float("nan")), "duration"),
        (entry((1, 2, "a"), duration="10"), "duration"),
        ({"subset": "training", "annotations": []}, "duration"),
        ({"duration": 3.0, "annotations": []}, "subset"),
        ([], "subset"),
    ],
)
def test_a_video_that_is_none_is_left_out(tmp_path: Path, video: Any, reason: str) -> None:
    found = read(saved(tmp_path, bad=video, good=entry((1, 2, "b"))))
    assert [each.name for each in found.videos] == ["good"]
    assert found.labels == ("b",)
    (problem,) = found.problems
    assert "'bad' is left out" in problem
    assert reason in problem


def test_annotations_that_are_no_list_count_as_none(tmp_path: Path) -> None:
    found = read(saved(tmp_path, bad=entry(annotations={"segment": [1, 2]})))
    assert found.videos == (Video("bad", "training", 10.0),)
    (problem,) = found.problems
    assert "'bad'" in problem


def test_labels_are_those_of_training(tmp_path: Path) -> None:
    path = saved(
        tmp_path,
        a=entry((1, 2, "new"), (3, 4, "new"), (5, 6, "old"), subset="validation"),
        b=entry((1, 2, "old")),
    )
    found = read(path)
    assert found.labels == ("old",)
    assert [action.label for action in found.videos[0].actions] == ["new", "new", "old"]
    (problem,) = found.problems
    assert "'a'" in problem
    assert "'new'" in problem


def test_labels_are_those_of_all_subsets_without_training(tmp_path: Path) -> None:
    path = saved(tmp_path, a=entry((1, 2, "z"), subset="Test"), b=entry((1, 2, "y"), subset="Val"))
    assert read(path).labels == ("y", "z")
    assert read(path).problems == ()


def test_labels_can_be_given(tmp_path: Path) -> None:
    found = read(saved(tmp_path, a=entry((1, 2, "z"), (3, 4, "y"))), labels=["z", "x", "z"])
    assert found.labels == ("z", "x")
    (problem,) = found.problems
    assert "'y'" in problem


def test_repeats_are_left_out_only_when_asked_for(tmp_path: Path) -> None:
    marks = [(1, 2, "a"), (1.0005, 2, "a"), (1, 2, "b"), (1, 2.01, "a")]
    found = read(saved(tmp_path, a=entry(*marks)))
    assert len(found.videos[0].actions) == 4
    actions = found.videos[0].actions
    assert found.without_repeats().videos[0].actions == (actions[0], *actions[2:])
    assert found.without_repeats(0.1).videos[0].actions == (actions[0], actions[2])


@pytest.mark.parametrize(
    ("content", "place"),
    [
        (b'{"database": {}\n, }', r"annotations.json:2:3: "),
        (b"", r"annotations.json:1:1: "),
        (b'{"database": "\xff"}', r"annotations.json: byte 14 is not UTF-8"),
        (b'{"version": 1, "videos": {}}', r'no "database" .*: version, videos'),
        (b"[1]", r'no "database" .*: list'),
        (b'{"database": []}', r'"database" is not an object'),
    ],
)
def test_a_file_without_annotations_is_refused(tmp_path: Path, content: bytes, place: str) -> None:
    path = tmp_path / "annotations.json"
    path.write_bytes(content)
    with pytest.raises(AnnotationError, match=place) as refusal:
        read(path)
    assert str(path) in str(refusal.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AnnotationError, match=r"none\.json: cannot be read: No such file"):
        read(tmp_path / "none.json")
