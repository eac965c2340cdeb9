"""Mean average precision of detections, as ActivityNet and THUMOS-14 are evaluated.

The detections of a class, from all videos, are gone through by falling score. Each takes the
action of its video that it overlaps most among those not yet taken, if their tIoU reaches the
threshold, and is a true positive then; all others are false, a second detection of the same action
among them. The average precision is the area under precision over recall, with the precision at
each recall raised to the best at any recall as high. Facts from the official ``eval_detection.py``
(Caba Heilbron et al., "ActivityNet", CVPR 2015); THUMOS-14 is evaluated by the same rules today.

What the official code leaves to its sort is fixed here: detections of equal score keep the order
they are given in, and of two actions overlapped equally the later is taken first.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .annotations import Action, Annotations, Video
from .segments import Array, tiou

# With the rounding of the official code, which decides where a tIoU is a threshold exactly.
ACTIVITYNET: tuple[float, ...] = tuple(np.linspace(0.5, 0.95, 10).tolist())
THUMOS: tuple[float, ...] = tuple(np.linspace(0.3, 0.7, 5).tolist())

# The actions of one class by the name of their video.
Truths = Mapping[str, Sequence[Action]]


@dataclass(frozen=True)
class Detection:
    """An action that a model found: from when to when, in seconds, and how sure it is."""

    video: str
    label: str
    start: float
    end: float
    score: float


@dataclass(frozen=True, eq=False)
class Scores:
    """How good detections are.

    Attributes:
        thresholds: the tIoU that a detection has to reach.
        labels: the classes that have actions in the subset, those unseen in training last.
        ap: (labels, thresholds), each class's average precision, from 0 to 1.
        ignored: how many detections were in videos that are not in the subset.
    """

    thresholds: tuple[float, ...]
    labels: tuple[str, ...]
    ap: Array
    ignored: int

    @property
    def map(self) -> Array:
        """(thresholds,), the mean over the classes."""
        return self.ap.mean(axis=0)

    @property
    def average(self) -> float:
        """The mean over classes and thresholds, by which methods are ranked."""
        return float(self.ap.mean())


def evaluate(
    detections: Iterable[Detection],
    annotations: Annotations,
    subset: str,
    thresholds: Sequence[float] = ACTIVITYNET,
) -> Scores:
    """Score the detections in a subset.

    A class without an action in the subset is not counted, whatever was detected of it. One that
    is unseen in training is: it has actions, and no detection can name it, so its precision is 0.
    Detections in videos that are not in the subset are ignored and counted, where the official
    code takes them for false positives; those in its empty videos are false.

    Args:
        detections: of all classes and videos, in any order but for equal scores.
        annotations: with the subset.
        subset: its name.
        thresholds: of tIoU, `ACTIVITYNET` or `THUMOS`.

    Raises:
        ValueError: the subset has no actions, or a detection has a number that is not finite.
    """
    videos = annotations.subset(subset)
    truths = _by_label(videos)
    if not truths:
        there = ", ".join(sorted({video.subset for video in annotations.videos})) or "none"
        raise ValueError(f"no actions in the subset {subset!r}; the subsets are: {there}")
    found, ignored = _inside(detections, {video.name for video in videos})
    known = [label for label in annotations.labels if label in truths]
    labels = (*known, *sorted(truths.keys() - set(known)))
    ap = [average_precision(found.get(each, []), truths[each], thresholds) for each in labels]
    return Scores(tuple(thresholds), labels, np.stack(ap), ignored)


def average_precision(
    detections: Sequence[Detection], truths: Truths, thresholds: Sequence[float]
) -> Array:
    """Of the detections of one class.

    Args:
        detections: their labels are not looked at.
        truths: the actions of the class by video; nor are theirs.
        thresholds: of tIoU.

    Returns:
        (thresholds,), from 0 to 1; not a number where there are no truths.

    Raises:
        ValueError: a detection has a number that is not finite.
    """
    total = sum(len(actions) for actions in truths.values())
    if not total:
        return np.full(len(thresholds), np.nan)
    right = _right(_ranked(detections), truths, np.asarray(thresholds, dtype=np.float64))
    precision = right.cumsum(axis=0) / np.arange(1, len(right) + 1)[:, None]
    raised = np.maximum.accumulate(precision[::-1], axis=0)[::-1]
    # Recall rises by the same step at each true positive and nowhere else.
    return np.where(right, raised, 0.0).sum(axis=0) / total


def _ranked(detections: Sequence[Detection]) -> list[Detection]:
    """By falling score."""
    for each in detections:
        if not all(map(math.isfinite, (each.start, each.end, each.score))):
            raise ValueError(f"a detection is not finite: {each}")
    order = np.argsort([-each.score for each in detections], kind="stable")
    return [detections[index] for index in order]


def _right(ranked: Sequence[Detection], truths: Truths, thresholds: Array) -> npt.NDArray[np.bool_]:
    """Which detections are true positives, (detections, thresholds)."""
    right = np.zeros((len(ranked), len(thresholds)), dtype=np.bool_)
    rows: dict[str, list[int]] = defaultdict(list)
    for row, detection in enumerate(ranked):
        rows[detection.video].append(row)
    for video in rows.keys() & truths.keys():
        found = [(ranked[row].start, ranked[row].end) for row in rows[video]]
        actual = [(action.start, action.end) for action in truths[video]]
        right[rows[video]] = _matched(tiou(found, actual), thresholds)
    return right


def _matched(overlaps: Array, thresholds: Array) -> npt.NDArray[np.bool_]:
    """Which detections of a video take an action, from (detections by rank, actions)."""
    matched = np.zeros((len(overlaps), len(thresholds)), dtype=np.bool_)
    # Reversed, because the first of equals is what `argmax` finds.
    overlaps = overlaps[:, ::-1]
    taken = np.zeros((len(thresholds), overlaps.shape[1]), dtype=np.bool_)
    every = np.arange(len(thresholds))
    # Most detections reach no action at all.
    for row in np.flatnonzero((overlaps >= thresholds.min()).any(axis=1)):
        free = np.where(taken, -1.0, overlaps[row])
        best = free.argmax(axis=1)
        wins = free[every, best] >= thresholds
        taken[every[wins], best[wins]] = True
        matched[row] = wins
    return matched


def _by_label(videos: Iterable[Video]) -> dict[str, dict[str, list[Action]]]:
    """The actions by label and video."""
    truths: dict[str, dict[str, list[Action]]] = {}
    for video in videos:
        for action in video.actions:
            truths.setdefault(action.label, {}).setdefault(video.name, []).append(action)
    return truths


def _inside(
    detections: Iterable[Detection], videos: set[str]
) -> tuple[dict[str, list[Detection]], int]:
    """Those in the videos, by label, and how many are not."""
    found: dict[str, list[Detection]] = defaultdict(list)
    ignored = 0
    for detection in detections:
        if detection.video in videos:
            found[detection.label].append(detection)
        else:
            ignored += 1
    return found, ignored
