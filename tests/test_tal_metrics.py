"""Average precision of detections is what the official evaluation makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.tal.annotations import Action, Annotations, Video
from benchmarks.tal.metrics import (
    ACTIVITYNET,
    THUMOS,
    Detection,
    Truths,
    average_precision,
    evaluate,
)
from benchmarks.tal.segments import tiou


def found(start: float, end: float, score: float, video: str = "v", label: str = "a") -> Detection:
    """A detection, of the one class in the one video if not said otherwise."""
    return Detection(video, label, start, end, score)


def actual(*spans: tuple[float, float], video: str = "v") -> dict[str, list[Action]]:
    """Actions of the one class."""
    return {video: [Action(start, end, "a") for start, end in spans]}


def ap(detections: Sequence[Detection], truths: Truths, *thresholds: float) -> list[float]:
    """As a list, at 0.5 if not said otherwise."""
    return average_precision(detections, truths, thresholds or (0.5,)).tolist()


# Overlap


def test_tiou() -> None:
    overlaps = tiou([(0, 10), (5, 6)], [(0, 10), (5, 15), (10, 20), (5, 5), (8, 2)])
    np.testing.assert_allclose(overlaps, [[1, 1 / 3, 0, 0, 0], [0.1, 0.1, 0, 0, 0]])
    assert tiou([], [(0, 1)]).shape == (0, 1)
    assert tiou([(0, 0)], [(0, 0)]).tolist() == [[0.0]]


# One class, by hand


def test_thresholds_are_those_of_the_benchmarks() -> None:
    np.testing.assert_allclose(ACTIVITYNET, [0.5 + 0.05 * step for step in range(10)])
    np.testing.assert_allclose(THUMOS, [0.3, 0.4, 0.5, 0.6, 0.7])


def test_all_found_is_one_and_nothing_found_is_zero() -> None:
    truths = actual((0, 10), (20, 30))
    assert ap([found(0, 10, 0.9), found(20, 30, 0.1)], truths, 0.5, 1.0) == [1.0, 1.0]
    assert ap([], truths, 0.5, 1.0) == [0.0, 0.0]
    assert ap([found(11, 19, 0.9)], truths) == [0.0]


def test_a_tiou_at_the_threshold_is_enough() -> None:
    assert ap([found(0, 5, 0.9)], actual((0, 10)), 0.5, 0.51) == [1.0, 0.0]


def test_precision_is_raised_to_the_best_at_higher_recall() -> None:
    """False, true, true, false, true of four: precisions 1/2, 2/3, 3/5, and 2/3 for the first."""
    truths = actual((0, 10), (20, 30), (40, 50), (60, 70))
    detections = [
        found(100, 110, 0.9), found(0, 10, 0.8), found(20, 30, 0.7), found(100, 110, 0.6),
        found(40, 50, 0.5),
    ]  # fmt: skip
    assert ap(detections, truths) == pytest.approx([(2 / 3 + 2 / 3 + 3 / 5) / 4])


def test_order_is_by_score_and_not_as_given() -> None:
    detections = [found(100, 110, 0.2), found(0, 10, 0.9)]
    assert ap(detections, actual((0, 10))) == [1.0]


def test_equal_scores_keep_the_order_given() -> None:
    false, true = found(100, 110, 0.5), found(0, 10, 0.5)
    assert ap([true, false], actual((0, 10))) == [1.0]
    assert ap([false, true], actual((0, 10))) == [0.5]


def test_the_second_of_two_detections_of_an_action_is_false() -> None:
    """Even where it fits better."""
    truths = actual((0, 10), (20, 30))
    detections = [found(0, 9, 0.9), found(0, 10, 0.8), found(20, 30, 0.7)]
    assert ap(detections, truths) == pytest.approx([(1 + 2 / 3) / 2])
    assert ap(detections, truths, 0.95) == pytest.approx([(2 / 3 + 2 / 3) / 2])


def test_a_repeated_detection_is_false() -> None:
    repeated = [found(0, 10, 0.9), found(0, 10, 0.9), found(20, 30, 0.9)]
    assert ap(repeated, actual((0, 10), (20, 30))) == pytest.approx([(1 + 2 / 3) / 2])


def test_a_detection_takes_the_action_that_it_overlaps_most() -> None:
    """The second then has only the first action left, which it does not reach."""
    truths = actual((0, 10), (4, 14))
    first, second = found(3, 13, 0.9), found(4, 14, 0.8)
    assert ap([first, second], truths, 0.4, 0.7) == [1.0, 0.5]


def test_a_detection_takes_the_next_best_action_that_is_free() -> None:
    truths = actual((0, 10), (1, 11))
    assert ap([found(0, 10, 0.9), found(0, 10, 0.8)], truths, 0.8, 0.9) == [1.0, 0.5]


def test_an_action_repeated_in_the_truth_counts_twice() -> None:
    assert ap([found(0, 10, 0.9)], actual((0, 10), (0, 10))) == [0.5]


def test_of_actions_overlapped_equally_the_later_is_taken() -> None:
    """The second detection reaches only the one that is left if the first took the other."""
    detections = [found(4, 16, 0.9), found(0, 10, 0.8)]
    assert ap(detections, actual((0, 10), (10, 20)), 0.3) == [1.0]
    assert ap(detections, actual((10, 20), (0, 10)), 0.3) == [0.5]


def test_a_detection_in_a_video_without_actions_is_false() -> None:
    truths = {**actual((0, 10)), "empty": []}
    assert ap([found(0, 10, 0.9, "empty"), found(0, 10, 0.8)], truths) == [0.5]
    assert ap([found(0, 10, 0.9, "other"), found(0, 10, 0.8)], truths) == [0.5]


def test_detections_that_end_before_they_start_are_false() -> None:
    assert ap([found(10, 0, 0.9), found(5, 5, 0.8)], actual((0, 10)), 0.1) == [0.0]


def test_without_truths_there_is_no_precision() -> None:
    assert np.isnan(ap([found(0, 10, 0.9)], {"v": []}, 0.5, 0.7)).tolist() == [True, True]


@pytest.mark.parametrize("numbers", [(0, 1, np.nan), (0, np.inf, 1), (-np.inf, 1, 1)])
def test_what_is_not_finite_is_refused(numbers: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="not finite"):
        ap([found(*numbers)], actual((0, 1)))


# One class, by a reference


def overlap(one: Detection, other: Action) -> float:
    """Of two segments."""
    shared = min(one.end, other.end) - max(one.start, other.start)
    return max(shared, 0.0) / ((one.end - one.start) + (other.end - other.start) - max(shared, 0.0))


def is_right(
    detection: Detection, actions: Sequence[Action], taken: list[int], least: float
) -> bool:
    """Whether it takes an action, going down the list of them; notes which."""
    order = sorted(range(len(actions)), key=lambda i: (overlap(detection, actions[i]), i))
    for index in reversed(order):
        if overlap(detection, actions[index]) < least:
            return False
        if index not in taken:
            taken.append(index)
            return True
    return False


def direct(detections: Sequence[Detection], truths: Truths, least: float) -> float:
    """Average precision at a threshold, by following its description."""
    taken: dict[str, list[int]] = {video: [] for video in truths}
    points = [(0.0, 1.0)]
    total, right = sum(map(len, truths.values())), 0
    ranked = sorted(detections, key=lambda detection: detection.score, reverse=True)
    for rank, detection in enumerate(ranked, start=1):
        if detection.video in truths:
            video = detection.video
            right += is_right(detection, truths[video], taken[video], least)
        points.append((right / total, right / rank))
    area = 0.0
    for (before, _), (recall, _) in pairwise(points):
        best = max(precision for reached, precision in points[1:] if reached >= recall)
        area += (recall - before) * best
    return area


# Few places and scores, so that many are equal.
PLACES = st.tuples(st.integers(0, 8), st.integers(1, 8)).map(lambda p: (p[0], p[0] + p[1]))
VIDEOS = st.sampled_from(["u", "v", "w"])
DETECTIONS = st.lists(
    st.builds(
        lambda video, place, score: found(place[0], place[1], score, video),
        VIDEOS,
        PLACES,
        st.integers(1, 4).map(lambda quarter: quarter / 4),
    ),
    max_size=20,
)
TRUTHS = st.dictionaries(
    st.sampled_from(["u", "v"]),
    st.lists(PLACES.map(lambda place: Action(*place, "a")), min_size=1, max_size=5),
    min_size=1,
)


@settings(max_examples=300, deadline=None)
@given(DETECTIONS, TRUTHS)
def test_average_precision_agrees_with_its_description(
    detections: list[Detection], truths: dict[str, list[Action]]
) -> None:
    for thresholds in ((0.0, *THUMOS), ACTIVITYNET):
        expected = [direct(detections, truths, least) for least in thresholds]
        np.testing.assert_allclose(ap(detections, truths, *thresholds), expected, rtol=1e-12)


# All classes


def dataset() -> Annotations:
    """Two validation videos and an empty one; class "new" is unseen in training."""
    return Annotations(
        (
            Video("t", "training", 100.0, (Action(0, 10, "b"), Action(0, 10, "a"))),
            Video("v", "validation", 100.0, (Action(0, 10, "b"), Action(20, 30, "new"))),
            Video("w", "validation", 100.0, (Action(0, 10, "c"),)),
            Video("empty", "validation", 100.0),
        ),
        ("c", "a", "b"),
    )


def test_map_is_the_mean_over_classes_with_truth() -> None:
    detections = [
        found(0, 10, 0.9, "v", "b"),
        found(0, 6, 0.9, "w", "c"),
        found(50, 60, 0.9, "v", "a"),  # a class without an action in the subset
    ]
    scores = evaluate(detections, dataset(), "validation", (0.5, 0.7))
    assert scores.labels == ("c", "b", "new")
    assert scores.thresholds == (0.5, 0.7)
    assert scores.ap.tolist() == [[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]]
    assert scores.map.tolist() == pytest.approx([2 / 3, 1 / 3])
    assert scores.average == pytest.approx(0.5)
    assert scores.ignored == 0


def test_thresholds_are_activitynets_if_not_given() -> None:
    assert evaluate([], dataset(), "validation").thresholds == ACTIVITYNET


def test_classes_do_not_take_each_others_actions() -> None:
    scores = evaluate([found(0, 10, 0.9, "v", "c")], dataset(), "validation", (0.5,))
    assert scores.average == 0.0


def test_detections_outside_the_subset_are_ignored_and_counted() -> None:
    outside = [found(0, 10, 0.95, video, "b") for video in ("t", "unheard of")]
    scores = evaluate([*outside, found(0, 10, 0.9, "v", "b")], dataset(), "validation", (0.5,))
    assert scores.ap[scores.labels.index("b")].tolist() == [1.0]
    assert scores.ignored == 2


def test_detections_in_an_empty_video_are_false() -> None:
    detections = [found(0, 10, 0.95, "empty", "b"), found(0, 10, 0.9, "v", "b")]
    scores = evaluate(detections, dataset(), "validation", (0.5,))
    assert scores.ap[scores.labels.index("b")].tolist() == [0.5]
    assert scores.ignored == 0


def test_a_subset_without_actions_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'testing'; the subsets are: training, validation"):
        evaluate([], dataset(), "testing")


def test_a_subset_of_any_size_takes_seconds() -> None:
    """2,000 videos and 100,000 detections, of which half come near an action."""
    random = np.random.default_rng(0)
    starts = random.uniform(0, 90, size=2000).tolist()
    videos = tuple(
        Video(str(i), "validation", 100.0, (Action(start, start + 10, f"{i % 20}"),))
        for i, start in enumerate(starts)
    )
    annotations = Annotations(videos, tuple(map(str, range(20))))
    shifts = random.uniform(-10, 10, size=100_000).tolist()
    detections = [
        found(starts[i % 2000] + shift, starts[i % 2000] + shift + 10, -abs(shift), f"{i % 2000}",
              f"{i % 20}")
        for i, shift in enumerate(shifts)
    ]  # fmt: skip
    assert evaluate(detections, annotations, "validation").average > 0.5
