"""How far segments of time overlap."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def tiou(segments: npt.ArrayLike, others: npt.ArrayLike) -> Array:
    """Temporal intersection over union of every segment with every other.

    Args:
        segments: (n, 2), start and end in any unit of time.
        others: (m, 2), in the same unit.

    Returns:
        (n, m), from 0 to 1; 0 for what is empty or ends before it starts.
    """
    first = np.asarray(segments, dtype=np.float64).reshape(-1, 1, 2)
    second = np.asarray(others, dtype=np.float64).reshape(1, -1, 2)
    ends = np.minimum(first[..., 1], second[..., 1])
    shared = (ends - np.maximum(first[..., 0], second[..., 0])).clip(min=0)
    union = (second[..., 1] - second[..., 0]) + (first[..., 1] - first[..., 0]) - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=shared > 0)
