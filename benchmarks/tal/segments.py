"""How far segments of time overlap, for what is no network: arrays in float64."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from . import losses

Array = npt.NDArray[np.float64]


def tiou(segments: npt.ArrayLike, others: npt.ArrayLike) -> Array:
    """Temporal intersection over union of every segment with every other.

    Args:
        segments: (n, 2), start and end in any unit of time.
        others: (m, 2), in the same unit.

    Returns:
        (n, m), from 0 to 1; 0 for what is empty or ends before it starts.
    """
    first, second = (
        torch.tensor(np.asarray(given, dtype=np.float64).reshape(-1, 2))
        for given in (segments, others)
    )
    found: Array = losses.tiou(first, second).numpy()
    return found
