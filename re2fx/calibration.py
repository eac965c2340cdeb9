"""A calibration as data: how far each way of rewiring moves a model, and which one to take."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from .candidates import Candidate

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.figure import Figure
    from rich.console import Group

MAX_BITS = 3
AS_NEAR = 1.05  # times the least distance: who is no farther competes by bytes


@dataclass(frozen=True)
class Calibrated:
    """What one candidate does to the model, and what it costs.

    Attributes:
        candidate: the coupling and its readout.
        distance: norm of the change of the model's output over the norm of the output, the mean
            over the data; infinite where the rewired output is not finite.
        agreement: share of the outputs whose largest class score is the same class; None where
            the output is no class scores.
        metric: the mean of what ``metric`` gave; None without one.
        bits: bits per element and block of the exact inverse; None if it has no fixed-point form.
        growth: by how much one step of the inverse amplifies a rounding error, at the most.
        kept: bytes kept for the backward, side bits included if it is exact; None if unknown, or if
            it cannot be trained reversibly.
        refusal: why it cannot be trained reversibly; empty if it can.
    """

    candidate: Candidate
    distance: float
    agreement: float | None
    metric: float | None
    bits: int | None
    growth: float
    kept: int | None
    refusal: str = ""

    @property
    def name(self) -> str:
        """The candidate's name with its readout."""
        return str(self.candidate)

    @property
    def step(self) -> float:
        """The work of a training step in the chains, over that of ordinary training."""
        return self.candidate.step

    @property
    def weight(self) -> float:
        """Bytes to compare by: as many as there may be where they are not known."""
        return math.inf if self.kept is None else self.kept

    def obstacle(self, max_bits: int = MAX_BITS) -> str:
        """Why it is not to be recommended, in a few words; empty if it may be."""
        if self.refusal and not math.isfinite(self.growth):
            return "b = 0 cannot be inverted"
        if self.refusal and self.growth > 1 and not self.candidate.exact:
            return f"ill-conditioned, rounding grows {self.growth:.3g}-fold per block"
        if self.refusal:
            return self.refusal
        if not math.isfinite(self.distance):
            return "its output is not finite"
        if self.candidate.exact and (self.bits is None or self.bits > max_bits):
            return f"more than {max_bits} side bits"
        return ""

    def to_dict(self) -> dict[str, Any]:
        """Plain data; None for what is infinite."""
        coupling = self.candidate.coupling
        values = {
            "name": self.candidate.name,
            "coupling": [coupling.a, coupling.b, coupling.c],
            "readout": self.candidate.readout,
            "exact": self.candidate.exact,
            **{key: value for key, value in asdict(self).items() if key != "candidate"},
            "step": self.step,
        }
        return {k: None if v in (math.inf, -math.inf) else v for k, v in values.items()}


@dataclass(frozen=True)
class Calibration:
    """How far each candidate moves a model's output, what it costs, and which to take; print it.

    Attributes:
        model: its class.
        batches: of data it was measured on.
        samples: rows in them.
        rows: the candidates in the order given.
        metric: the mean of what ``metric`` gave for the pretrained model; None without one.
        now: bytes that ordinary training keeps for the backward of a batch; None if unknown.
        checkpoint: bytes with a checkpoint around every branch; None if unknown.
        max_bits: side bits per element and block that are acceptable.
        note: why bytes are unknown; empty if they are not.
        left_out: names of the candidates with which nothing can be rewired.
    """

    model: str
    batches: int
    samples: int
    rows: tuple[Calibrated, ...]
    metric: float | None = None
    now: int | None = None
    checkpoint: int | None = None
    max_bits: int = MAX_BITS
    note: str = ""
    left_out: tuple[str, ...] = ()

    @property
    def acceptable(self) -> tuple[Calibrated, ...]:
        """The candidates that can be trained reversibly, with ``max_bits`` side bits at most."""
        return tuple(row for row in self.rows if not row.obstacle(self.max_bits))

    @cached_property
    def recommended(self) -> Calibrated | None:
        """The nearest of the acceptable candidates, or None.

        Of those no more than 5 % farther than the nearest, the one that keeps the fewest bytes,
        then the one with the cheapest step, then the nearest.
        """
        if not self.acceptable:
            return None
        least = min(row.distance for row in self.acceptable)
        near = [row for row in self.acceptable if row.distance <= AS_NEAR * least]
        return min(near, key=lambda row: (row.weight, row.step, row.distance))

    @property
    def frontier(self) -> tuple[Calibrated, ...]:
        """The acceptable candidates none of which another beats in distance and bytes together.

        From the fewest bytes to the least distance.
        """
        found: list[Calibrated] = []
        for row in sorted(self.acceptable, key=lambda row: (row.weight, row.distance)):
            if not found or row.distance < found[-1].distance:
                found.append(row)
        return tuple(found)

    @property
    def recommendation(self) -> str:
        """What to take and why, in a sentence or two."""
        from .calibration_views import recommendation

        return recommendation(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        recommended = self.recommended
        return {
            **{k: v for k, v in vars(self).items() if k in _PLAIN},
            "rows": [row.to_dict() for row in self.rows],
            "frontier": [row.name for row in self.frontier],
            "recommended": recommended.name if recommended else None,
            "recommendation": self.recommendation,
        }

    def __str__(self) -> str:
        from .calibration_views import text

        return text(self)

    def __rich__(self) -> Group:
        from .calibration_views import head, table
        from .tables import to_rich

        return to_rich(head(self), [table(self)], self.recommendation)

    def _repr_html_(self) -> str:
        from .calibration_views import head, table
        from .tables import to_html

        return to_html(head(self), [table(self)], self.recommendation)

    def plot(self, path: str | Path | None = None) -> Figure:
        """Distance against bytes kept, the frontier as a line.

        Args:
            path: where to write the picture, as ``.png``, ``.svg`` or ``.pdf``.

        Raises:
            OptionError: matplotlib is not installed.
        """
        from .calibration_chart import plot

        return plot(self, path)


_PLAIN = (
    "model",
    "batches",
    "samples",
    "metric",
    "now",
    "checkpoint",
    "max_bits",
    "note",
    "left_out",
)
