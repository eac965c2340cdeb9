"""The report as data: bytes kept for the backward by way of training, chain by chain."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.figure import Figure

WAYS = ("store", "checkpoint", "reversible")
LESS = 0.95  # of checkpointing's bytes: what is no smaller than that is not worth a new function


@dataclass(frozen=True)
class Kept:
    """Bytes kept for the backward in each way of training; None where there is no such way.

    Attributes:
        store: the given network as it is.
        checkpoint: with ``torch.utils.checkpoint`` around the branch of every rewired residual.
        reversible: rewired, its chains reconstructed.
    """

    store: int = 0
    checkpoint: int | None = 0
    reversible: int | None = 0

    @property
    def pays(self) -> bool:
        """Whether reversing keeps clearly less than checkpointing does."""
        if self.reversible is None or self.checkpoint is None:
            return False
        return self.reversible < LESS * self.checkpoint

    def of(self, way: str) -> int | None:
        """Bytes by the name of the way."""
        value: int | None = getattr(self, way)
        return value


@dataclass(frozen=True)
class ChainBytes:
    """What one chain keeps.

    Attributes:
        number: of the chain in the plan.
        first, last: module paths of its first and last residual.
        residuals: how many.
        kept: bytes.
        state: bytes of one stream state, of which reversing keeps two.
        dtype: of the streams.
        branch: bytes that the largest branch alone saves; they come back, one branch at a time,
            in the backward of both checkpointing and reversing.
        anchors: places in the chain where reversing keeps two states more.
        bits: what reversing keeps of each element at a block, in fixed point.
    """

    number: int
    first: str
    last: str
    residuals: int
    kept: Kept
    state: int
    dtype: str
    branch: int
    anchors: int = 0
    bits: int = 0

    @property
    def side_bytes(self) -> int:
        """What the side bits of all blocks but the first take, up to a few bytes each."""
        size = {"float32": 4, "float64": 8}.get(self.dtype, 4)
        return (self.residuals - 1) * (self.state // size) * self.bits // 8

    @property
    def pays(self) -> bool:
        """Whether reversing keeps clearly less here than checkpointing does."""
        return self.kept.pays


@dataclass(frozen=True)
class PartBytes:
    """What one part outside the chains keeps.

    Attributes:
        where: ``"inputs"``, ``"before"``, ``"between"`` or ``"behind"`` the chains, ``"readout"``,
            ``"loss"``, ``"model"`` if there are no chains, or the rule by which a residual was
            refused.
        module: module path, with ``*`` for several numbered ones.
        kept: bytes.
    """

    where: str
    module: str
    kept: Kept


@dataclass(frozen=True)
class Report:
    """Bytes kept for the backward, as the model is and after rewiring; print it.

    All sizes are bytes.

    Attributes:
        name: the model's class.
        inputs: shape and dtype of each input tensor.
        mode: the mode it was taken in, ``"train"``.
        dtype: of the parameters, and of autocast if it was active.
        parameters, buffers, gradients: what the model itself takes, not part of what is kept.
        output: the model's result, which the loss may keep.
        chains: the rewired chains.
        parts: what lies outside them, largest first.
        reason: why nothing can be reversed; empty if something can.
        refused: skip-adds left alone, as rule and number.
        untold: what keeps more than was predicted, because torch has no rule for it.
        measured: what running it for real kept, with ``measure=True``.
    """

    name: str
    inputs: tuple[str, ...]
    mode: str
    dtype: str
    parameters: int
    buffers: int
    gradients: int
    output: int
    chains: tuple[ChainBytes, ...]
    parts: tuple[PartBytes, ...]
    reason: str = ""
    refused: tuple[tuple[str, int], ...] = ()
    untold: tuple[str, ...] = ()
    measured: Kept | None = None

    @property
    def total(self) -> Kept:
        """Everything kept."""
        return _sum([self.inside, self.outside])

    @property
    def outside(self) -> Kept:
        """What is kept outside the chains, which no rewiring changes: the floor."""
        return _sum([part.kept for part in self.parts])

    @property
    def inside(self) -> Kept:
        """What the chains keep."""
        return _sum([chain.kept for chain in self.chains])

    @property
    def ceiling(self) -> float | None:
        """By what factor rewiring could lower what is kept if the chains kept nothing at all."""
        return self.total.store / self.outside.store if self.outside.store else None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {**asdict(self), "total": asdict(self.total), "outside": asdict(self.outside)}

    def __str__(self) -> str:
        from .figures import text

        return text(self)

    def __rich__(self) -> Any:
        """A table for a terminal.

        Raises:
            OptionError: rich is not installed.
        """
        from .figures import terminal

        return terminal(self)

    def _repr_html_(self) -> str:
        from .figures import html

        return html(self)

    def plot(self, path: str | Path | None = None) -> Figure:
        """Bars of what each way of training keeps, chains and the rest stacked.

        Args:
            path: where to write the picture, as ``.png``, ``.svg`` or ``.pdf``.

        Raises:
            OptionError: matplotlib is not installed.
        """
        from .chart import plot

        return plot(self, path)


def _sum(rows: list[Kept]) -> Kept:
    def total(values: list[int | None]) -> int | None:
        known = [value for value in values if value is not None]
        return sum(known) if len(known) == len(values) else None

    return Kept(
        sum(row.store for row in rows),
        total([row.checkpoint for row in rows]),
        total([row.reversible for row in rows]),
    )
