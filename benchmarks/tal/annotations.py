"""Which actions each video shows, in the JSON format of ActivityNet-1.3.

``{"database": {name: {"subset": "training", "duration": 12.5, "annotations": [{"segment": [0.5,
3.2], "label": "Long jump"}]}}}`` with all times in seconds. Current code bases keep THUMOS-14 in it
too. The other keys of the format ("version", "taxonomy", "fps", ...) are not read.

The files in use have slips: segments that end after the video, or before they start. One such slip
is no reason to stop, so it is repaired or left out, and `Annotations.problems` says so.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

TRAINING = "training"


class AnnotationError(ValueError):
    """A file that no annotations can be read from; says which file, and where in it."""


@dataclass(frozen=True)
class Action:
    """From when to when, in seconds, something is done, and what."""

    start: float
    end: float
    label: str


@dataclass(frozen=True)
class Video:
    """A video with its actions.

    Attributes:
        name: its key in the database.
        subset: "training", "validation" or "testing", or what else the file says.
        duration: in seconds.
        actions: in the order of the file; none in an empty video.
    """

    name: str
    subset: str
    duration: float
    actions: tuple[Action, ...] = ()


@dataclass(frozen=True)
class Annotations:
    """What `read` found.

    Attributes:
        videos: in the order of the file.
        labels: the classes, in the order in which a model numbers them.
        problems: a sentence for each thing that was wrong, naming the video.
    """

    videos: tuple[Video, ...]
    labels: tuple[str, ...]
    problems: tuple[str, ...] = ()

    def subset(self, *names: str) -> tuple[Video, ...]:
        """The videos of these subsets, in the order of the file."""
        return tuple(video for video in self.videos if video.subset in names)

    def without_repeats(self, tolerance: float = 1e-3) -> Annotations:
        """With one of the actions that have the same label, start and end.

        OpenTAD evaluates so; the official evaluation does not.

        Args:
            tolerance: how many seconds apart two starts, or two ends, are still the same.
        """
        videos = (replace(v, actions=_distinct(v.actions, tolerance)) for v in self.videos)
        return replace(self, videos=tuple(videos))


def read(path: str | Path, labels: Sequence[str] | None = None) -> Annotations:
    """Read a file in ActivityNet's format.

    A segment that reaches outside its video is clipped to it. Left out are a segment that has
    nothing inside, is empty, reversed or not finite, and a video without a positive duration. A
    video without actions stays, and so does an action of a class that is not among the labels:
    no model can find it, which is what the evaluation has to show.

    Args:
        path: of the file.
        labels: the classes; the sorted ones of the training subset if not given, of all subsets
            where there is no training subset.

    Raises:
        AnnotationError: the file cannot be read, is not JSON or has no database.
    """
    problems: list[str] = []
    read_videos = (_video(name, entry, problems) for name, entry in _database(Path(path)).items())
    videos = tuple(video for video in read_videos if video is not None)
    known = _labels(videos) if labels is None else tuple(dict.fromkeys(labels))
    problems += _unknown(videos, known)
    return Annotations(videos, known, tuple(problems))


def write(path: str | Path, annotations: Annotations) -> None:
    """Write what `read` reads the same videos from; labels and problems are not in the format."""
    database = {
        video.name: {
            "subset": video.subset,
            "duration": video.duration,
            "annotations": [
                {"segment": [action.start, action.end], "label": action.label}
                for action in video.actions
            ],
        }
        for video in annotations.videos
    }
    text = json.dumps({"database": database}, indent=1, allow_nan=False)
    Path(path).write_text(text + "\n", encoding="utf-8")


def _database(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise AnnotationError(f"{path}: cannot be read: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise AnnotationError(f"{path}:{error.lineno}:{error.colno}: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise AnnotationError(f"{path}: byte {error.start} is not UTF-8") from error
    if not isinstance(content, dict) or "database" not in content:
        keys = ", ".join(content) if isinstance(content, dict) else type(content).__name__
        raise AnnotationError(f'{path}: no "database" at the top level, which has: {keys}')
    if not isinstance(content["database"], dict):
        raise AnnotationError(f'{path}: "database" is not an object with a video for each key')
    return content["database"]


def _video(name: str, entry: object, problems: list[str]) -> Video | None:
    fields: dict[str, Any] = entry if isinstance(entry, dict) else {}
    subset, duration = fields.get("subset"), _number(fields.get("duration"))
    if not isinstance(subset, str):
        problems.append(f"Video {name!r} is left out: it has no subset.")
        return None
    if duration is None or duration <= 0:
        problems.append(f"Video {name!r} is left out: it has no positive duration.")
        return None
    entries = fields.get("annotations", [])
    if not isinstance(entries, list):
        problems.append(f"Video {name!r} has no list of annotations and counts as empty.")
        entries = []
    actions = []
    for number, each in enumerate(entries):
        action, problem = _action(each, duration)
        if problem:
            problems.append(f"Video {name!r}: annotation {number} {problem}.")
        if action is not None:
            actions.append(action)
    return Video(name, subset, duration, tuple(actions))


def _action(entry: object, duration: float) -> tuple[Action | None, str]:
    """The action that an entry stands for, if it does, and what is wrong with it, if anything."""
    if not isinstance(entry, dict) or not isinstance(entry.get("label"), str):
        return None, "is left out: it has no label"
    span = _span(entry.get("segment"))
    if span is None:
        return None, "is left out: its segment is not two finite numbers"
    start, end = span
    if end <= start:
        return None, f"is left out: it starts at {start:g} s and ends at {end:g} s"
    if end <= 0 or start >= duration:
        return None, f"is left out: {start:g} to {end:g} s is outside of the {duration:g} s"
    action = Action(max(start, 0.0), min(end, duration), entry["label"])
    if start < 0 or end > duration:
        return action, f"is clipped: {start:g} to {end:g} s reaches outside of the {duration:g} s"
    return action, ""


def _span(segment: object) -> tuple[float, float] | None:
    if not isinstance(segment, list) or len(segment) != 2:
        return None
    start, end = map(_number, segment)
    return None if start is None or end is None else (start, end)


def _number(value: object) -> float | None:
    """As a finite number; None where it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:  # JSON's integers have no limit
        return None
    return number if math.isfinite(number) else None


def _labels(videos: Sequence[Video]) -> tuple[str, ...]:
    training = [video for video in videos if video.subset == TRAINING]
    return tuple(sorted({a.label for video in training or videos for a in video.actions}))


def _unknown(videos: Sequence[Video], labels: Sequence[str]) -> list[str]:
    """A sentence for each class that a video has and a model does not know."""
    known = set(labels)
    return [
        f"Video {video.name!r} has actions of class {label!r}, which is not among the labels."
        for video in videos
        for label in sorted({action.label for action in video.actions} - known)
    ]


def _distinct(actions: Iterable[Action], tolerance: float) -> tuple[Action, ...]:
    kept: list[Action] = []
    for action in actions:
        if not any(
            action.label == other.label
            and abs(action.start - other.start) <= tolerance
            and abs(action.end - other.end) <= tolerance
            for other in kept
        ):
            kept.append(action)
    return tuple(kept)
