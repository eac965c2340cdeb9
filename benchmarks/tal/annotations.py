"""Videos and the actions in them, in the JSON format of ActivityNet 1.3."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Action:
    """What happens from ``start`` to ``end``, in seconds."""

    start: float
    end: float
    label: str


@dataclass(frozen=True)
class Video:
    """An untrimmed video of ``duration`` seconds."""

    name: str
    subset: str
    duration: float
    actions: tuple[Action, ...]


@dataclass(frozen=True)
class Annotations:
    """Videos, the labels of their actions and what was wrong with the file."""

    videos: tuple[Video, ...]
    labels: tuple[str, ...]
    problems: tuple[str, ...] = ()


def read(path: str | Path, labels: Sequence[str] | None = None) -> Annotations:
    """Read a file of annotations; ``labels`` sets their order."""
    database = json.loads(Path(path).read_text())["database"]
    videos = tuple(
        Video(
            name,
            entry["subset"],
            float(entry["duration"]),
            tuple(
                Action(a["segment"][0], a["segment"][1], a["label"]) for a in entry["annotations"]
            ),
        )
        for name, entry in database.items()
    )
    found = sorted({action.label for video in videos for action in video.actions})
    return Annotations(videos, tuple(found if labels is None else labels))


def write(path: str | Path, annotations: Annotations) -> None:
    """Write what `read` reads."""
    database = {
        video.name: {
            "subset": video.subset,
            "duration": video.duration,
            "annotations": [{"segment": [a.start, a.end], "label": a.label} for a in video.actions],
        }
        for video in annotations.videos
    }
    Path(path).write_text(json.dumps({"version": "VERSION 1.3", "database": database}, indent=1))
