"""What the anchors of a chain say about the states that were reconstructed between them.

Where a backward reaches an anchor, the state it has reconstructed lies beside the true one. Looking
at both costs a pass over them and keeps nothing. Anchors are placed for what the coupling does to a
rounding error; what the branches do to it only shows here.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from .errors import Re2fxWarning
from .fixed_point import is_fake

MARGIN = 10  # times the tolerance: placing anchors is an estimate


class Drift:
    """Errors that one backward has met, looked at where it ends: a device is waited for once."""

    def __init__(self) -> None:
        self._errors: list[tuple[str, float, Tensor]] = []

    def note(self, name: str, tolerance: float, got: Tensor, true: Tensor) -> None:
        """Compare a reconstructed state with what was kept.

        Args:
            name: the block that reads it.
            tolerance: relative error that it may have.
            got: as it was reconstructed.
            true: as it was kept.
        """
        if is_fake(true):
            return
        scale = torch.linalg.vector_norm(true)
        error = torch.linalg.vector_norm(got - true) / scale.clamp_min(
            torch.finfo(scale.dtype).tiny
        )
        self._errors.append((name, tolerance, error))

    def settle(self) -> None:
        """Warn of the worst that was too large."""
        errors, self._errors = self._errors, []
        if not errors:
            return
        values = torch.stack([error.double() for *_, error in errors]).tolist()
        shares = [
            (value / tolerance if value == value else float("inf"), value, name, tolerance)
            for value, (name, tolerance, _) in zip(values, errors, strict=True)
        ]
        share, value, name, tolerance = max(shares)
        if share > MARGIN:
            warnings.warn(
                f"{name}: a stream state came back with a relative error of {value:.0e}, where "
                f"anchors were placed for drift_tolerance={tolerance:g}: the branches amplify "
                "rounding more than the coupling does. Use exact=True, a smaller drift_tolerance, "
                "or a coupling with |b| nearer to 1.",
                Re2fxWarning,
                stacklevel=2,
            )
