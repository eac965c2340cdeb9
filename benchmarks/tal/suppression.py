"""One detection for each action: what overlaps a better one loses score.

Non-maximum suppression goes through the segments by falling score. Hard, it drops every later one
that overlaps a kept one too far; soft, it lowers their scores (Bodla et al., "Soft-NMS", ICCV 2017,
equations 1 to 3), so that two actions close together both stay.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from .segments import Array, tiou

Method = Literal["gaussian", "linear", "hard"]
Labels = npt.NDArray[Any]


def soft_nms(
    segments: npt.ArrayLike,
    scores: npt.ArrayLike,
    labels: npt.ArrayLike,
    *,
    sigma: float = 0.5,
    threshold: float = 0.5,
    least: float = 0.001,
    most: int = 200,
    per_class: bool = True,
    method: Method = "gaussian",
) -> tuple[Array, Array, Labels]:
    """Suppress what overlaps a better segment of the same video.

    Args:
        segments: (n, 2), start and end.
        scores: (n,), not negative; of equal ones the first is the best.
        labels: (n,), the class of each.
        sigma: of the Gaussian: a score is multiplied by ``exp(-tiou**2 / sigma)``.
        threshold: the tIoU above which the linear method multiplies it by ``1 - tiou``, and the
            hard one by 0.
        least: segments whose score is or falls below it are left out.
        most: how many are kept, of all classes together.
        per_class: whether only segments of the same class suppress each other.
        method: how scores fall.

    Returns:
        the segments, scores and labels kept, by falling score. What fell to 0 is not kept.

    Raises:
        ValueError: the lengths differ, a number is not finite, a score is negative, sigma is not
            positive or the method unknown.
    """
    segments, scores, labels = _checked(segments, scores, labels)
    kept: list[int] = []
    rest = np.flatnonzero(scores >= least)
    while rest.size and len(kept) < most:
        best = rest[scores[rest].argmax()]
        kept.append(int(best))
        rest = rest[rest != best]
        overlaps = tiou(segments[best], segments[rest])[0]
        if per_class:
            overlaps = np.where(labels[rest] == labels[best], overlaps, 0.0)
        factors = _factors(overlaps, method, sigma, threshold)
        scores[rest] *= factors
        rest = rest[(factors > 0) & (scores[rest] >= least)]
    # Scores only fall, so that what was kept earlier is at least as good.
    return segments[kept], scores[kept], labels[kept]


def vote(
    kept: npt.ArrayLike, segments: npt.ArrayLike, scores: npt.ArrayLike, threshold: float
) -> Array:
    """Move what was kept to the mean, weighted by score, of what it was kept instead of.

    As box voting does for images; ActionFormer (Zhang et al., ECCV 2022) votes so when classes are
    suppressed together.

    Args:
        kept: (m, 2), from `soft_nms`.
        segments: (n, 2), before it.
        scores: (n,), before it.
        threshold: the tIoU from which a segment votes.

    Returns:
        (m, 2); where nothing votes, a segment stays as it is.
    """
    kept = np.asarray(kept, dtype=np.float64).reshape(-1, 2)
    segments, scores, _ = _checked(segments, scores, scores)
    weights = np.where(tiou(kept, segments) >= threshold, scores, 0.0)
    total = weights.sum(axis=1, keepdims=True)
    return np.where(total > 0, weights @ segments / np.where(total > 0, total, 1.0), kept)


def _checked(
    segments: npt.ArrayLike, scores: npt.ArrayLike, labels: npt.ArrayLike
) -> tuple[Array, Array, Labels]:
    """As arrays that may be written to."""
    spans = np.array(segments, dtype=np.float64).reshape(-1, 2)
    values, classes = np.array(scores, dtype=np.float64), np.asarray(labels)
    if not len(spans) == len(values) == len(classes):
        raise ValueError(
            f"{len(spans)} segments, {len(values)} scores and {len(classes)} labels do not match"
        )
    if not (np.isfinite(spans).all() and np.isfinite(values).all() and (values >= 0).all()):
        raise ValueError("segments and scores must be finite, and scores not negative")
    return spans, values, classes


def _factors(overlaps: Array, method: Method, sigma: float, threshold: float) -> Array:
    """What the scores are multiplied by."""
    if method == "gaussian":
        if sigma <= 0:
            raise ValueError(f"sigma must be positive, not {sigma}")
        return np.exp(-(overlaps**2) / sigma)
    if method == "linear":
        return np.where(overlaps > threshold, 1.0 - overlaps, 1.0)
    if method == "hard":
        return np.where(overlaps > threshold, 0.0, 1.0)
    raise ValueError(f"no method {method!r}: gaussian, linear or hard")
