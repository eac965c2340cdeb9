"""Suppression keeps the best of what overlaps, and says how good it still is."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.tal.suppression import Method, soft_nms, vote

# The second overlaps the first by a tIoU of 0.8 / 1.2 and the third by none.
SEGMENTS = np.array([[0.0, 1.0], [0.2, 1.2], [5.0, 6.0]])
SCORES = np.array([0.9, 0.8, 0.7])
SAME = np.zeros(3, dtype=np.int64)
OVERLAP = 0.8 / 1.2


def kept(method: Method, labels: Any = SAME, **others: Any) -> list[tuple[float, float]]:
    """The start and score of each of the three, if kept."""
    options = {"sigma": 0.5, "threshold": 0.5, "least": 0.0, "most": 10, **others}
    segments, scores, _ = soft_nms(SEGMENTS, SCORES, labels, method=method, **options)
    return [
        (float(start), float(score)) for start, score in zip(segments[:, 0], scores, strict=True)
    ]


def test_gaussian_decay() -> None:
    low = 0.8 * math.exp(-(OVERLAP**2) / 0.5)
    assert kept("gaussian") == [(0.0, 0.9), (5.0, 0.7), (0.2, pytest.approx(low))]
    low = 0.8 * math.exp(-(OVERLAP**2) / 2.0)
    assert kept("gaussian", sigma=2.0) == [(0.0, 0.9), (5.0, 0.7), (0.2, pytest.approx(low))]


def test_linear_decay_is_above_the_threshold_only() -> None:
    low = 0.8 * (1 - OVERLAP)
    assert kept("linear") == [(0.0, 0.9), (5.0, 0.7), (0.2, pytest.approx(low))]
    assert kept("linear", threshold=0.7) == [(0.0, 0.9), (0.2, 0.8), (5.0, 0.7)]


def test_hard_suppression_drops_what_is_above_the_threshold() -> None:
    assert kept("hard") == [(0.0, 0.9), (5.0, 0.7)]
    assert kept("hard", threshold=0.7) == [(0.0, 0.9), (0.2, 0.8), (5.0, 0.7)]


@pytest.mark.parametrize("method", ["gaussian", "linear", "hard"])
def test_classes_suppress_each_other_only_when_told_to(method: Method) -> None:
    labels = np.array([3, 4, 3])
    assert kept(method, labels) == [(0.0, 0.9), (0.2, 0.8), (5.0, 0.7)]
    assert kept(method, labels, per_class=False) == kept(method, SAME)


def test_what_falls_below_the_least_score_is_left_out() -> None:
    assert kept("gaussian", least=0.5) == [(0.0, 0.9), (5.0, 0.7)]
    assert kept("gaussian", least=0.7) == [(0.0, 0.9), (5.0, 0.7)]
    assert kept("gaussian", least=0.85) == [(0.0, 0.9)]
    assert kept("gaussian", least=1.0) == []


def test_no_more_than_the_most_are_kept() -> None:
    """The most of all classes together, and the best of them after suppression."""
    assert kept("gaussian", most=2) == [(0.0, 0.9), (5.0, 0.7)]
    assert kept("gaussian", np.array([0, 1, 2]), most=2) == [(0.0, 0.9), (0.2, 0.8)]
    assert kept("gaussian", most=0) == []


def test_of_equal_scores_the_first_is_kept() -> None:
    _, scores, labels = soft_nms(
        [(0, 1), (0, 1), (0, 1)], [0.5, 0.5, 0.5], [7, 8, 9], per_class=False, method="hard"
    )
    assert (scores.tolist(), labels.tolist()) == ([0.5], [7])


def test_what_falls_to_nothing_is_not_kept() -> None:
    _, scores, _ = soft_nms([(0, 1), (0, 1)], [0.5, 0.4], [0, 0], least=0.0, method="linear")
    assert scores.tolist() == [0.5]


def test_labels_go_with_their_segments_and_inputs_stay() -> None:
    segments, scores, labels = soft_nms(SEGMENTS, SCORES, ["x", "y", "z"], per_class=False)
    assert labels.tolist() == ["x", "z", "y"]
    assert segments.tolist() == SEGMENTS[[0, 2, 1]].tolist()
    assert (scores[1], SCORES.tolist()) == (0.7, [0.9, 0.8, 0.7])


@pytest.mark.parametrize("method", ["gaussian", "linear", "hard"])
def test_nothing_in_is_nothing_out(method: Method) -> None:
    segments, scores, labels = soft_nms([], [], [], method=method)
    assert (segments.shape, scores.shape, labels.shape) == ((0, 2), (0,), (0,))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"scores": [0.5]}, "3 segments, 1 scores and 3 labels"),
        ({"labels": [0]}, "3 segments, 3 scores and 1 labels"),
        ({"scores": [0.5, math.nan, 0.4]}, "finite"),
        ({"segments": [(0, 1), (0, math.inf), (0, 1)]}, "finite"),
        ({"scores": [0.5, -0.1, 0.4]}, "not negative"),
        ({"sigma": 0.0}, "sigma must be positive, not 0"),
        ({"method": "median"}, "no method 'median'"),
    ],
)
def test_what_makes_no_sense_is_refused(change: dict[str, Any], reason: str) -> None:
    given = {"segments": SEGMENTS, "scores": SCORES, "labels": SAME, **change}
    with pytest.raises(ValueError, match=reason):
        soft_nms(**given)


# By a reference


def overlap(one: tuple[int, int], other: tuple[int, int]) -> float:
    """Of two segments."""
    shared = max(0, min(one[1], other[1]) - max(one[0], other[0]))
    return shared / (one[1] - one[0] + other[1] - other[0] - shared)


def factor(tiou: float, method: str) -> float:
    """What a score falls by, for sigma and threshold 0.4."""
    if method == "gaussian":
        return math.exp(-tiou * tiou / 0.4)
    if tiou <= 0.4:
        return 1.0
    return 1.0 - tiou if method == "linear" else 0.0


Row = tuple[tuple[int, int], float, int]


def direct(rows: list[Row], method: str, per_class: bool) -> list[Row]:
    """One class after the other, then the best of all."""
    done: list[Row] = []
    for labels in ({0}, {1}, {2}) if per_class else ({0, 1, 2},):
        done += listed([row for row in rows if row[2] in labels], method)
    return sorted(done, key=lambda row: -row[1])[:6]


def listed(left: list[Row], method: str) -> list[Row]:
    """As the paper lists it."""
    done: list[Row] = []
    while left:
        best = max(left, key=lambda row: row[1])
        done.append(best)
        left = [
            (span, score * factor(overlap(best[0], span), method), label)
            for span, score, label in left
            if (span, score, label) != best
        ]
        left = [row for row in left if row[1] >= 0.05]
    return done


SPANS = st.tuples(st.integers(0, 12), st.integers(1, 6)).map(lambda p: (p[0], p[0] + p[1]))
ROWS = st.lists(
    st.tuples(SPANS, st.integers(1, 97).map(lambda score: score / 97 + 0.05), st.integers(0, 2)),
    max_size=12,
    unique_by=lambda row: row[1],
)


@settings(max_examples=200, deadline=None)
@given(ROWS, st.sampled_from(["gaussian", "linear", "hard"]), st.booleans())
def test_suppression_agrees_with_the_paper(
    rows: list[Row], method: Method, per_class: bool
) -> None:
    segments, scores, labels = soft_nms(
        [row[0] for row in rows],
        [row[1] for row in rows],
        [row[2] for row in rows],
        sigma=0.4,
        threshold=0.4,
        least=0.05,
        most=6,
        per_class=per_class,
        method=method,
    )
    expected = direct(rows, method, per_class)
    np.testing.assert_allclose(scores, [row[1] for row in expected], rtol=1e-12)
    assert segments.tolist() == [list(row[0]) for row in expected]
    assert labels.tolist() == [row[2] for row in expected]


# Voting


def test_voting_is_the_mean_by_score() -> None:
    voted = vote([[0.0, 1.0]], SEGMENTS, SCORES, threshold=0.5)
    np.testing.assert_allclose(voted, [[0.8 * 0.2 / 1.7, (0.9 * 1.0 + 0.8 * 1.2) / 1.7]])


def test_only_what_overlaps_far_enough_votes() -> None:
    assert vote([[0.0, 1.0]], SEGMENTS, SCORES, threshold=0.7).tolist() == [[0.0, 1.0]]
    assert vote([[0.0, 1.0]], [(0.0, 2.0)], [0.3], threshold=0.5).tolist() == [[0.0, 2.0]]


def test_without_votes_a_segment_stays() -> None:
    assert vote([[2.0, 3.0]], SEGMENTS, SCORES, threshold=0.5).tolist() == [[2.0, 3.0]]
    assert vote([[2.0, 3.0]], [], [], threshold=0.5).tolist() == [[2.0, 3.0]]
    assert vote([[0.0, 1.0]], SEGMENTS, np.zeros(3), threshold=0.5).tolist() == [[0.0, 1.0]]
    assert vote([], SEGMENTS, SCORES, threshold=0.5).shape == (0, 2)
