"""How a training step was fitted into memory, to read and to process."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from .budget import Memory
from .foresight import Foreseen
from .frames import Frames, framed
from .program import Program, RunBlock, Segment
from .tables import Table, to_html, to_rich
from .text import amount, span

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.figure import Figure
    from rich.console import Group

OPERATIONS = {"cpu": 10, "cuda": 100}  # floating-point operations in the time of one byte moved
COLUMNS = ("frames", "reversed>", "checkpoints>", "stored>", "in slices>", "not kept>")
CHECKPOINT_COLUMNS = ("outside the chains", "kind", "in slices", "kept if stored>")


@dataclass(frozen=True)
class ChainFrames:
    """The blocks of one chain.

    Attributes:
        first, last: what its first and last block are called.
        reversed: how many are undone in the backward.
        checkpoints: in front of how many the state is kept.
        stored: how many keep what ordinary autograd keeps, the last ones.
        sliced: how many of the others are run again in slices, at least in part.
        spared: bytes that the others would keep if they were stored.
    """

    first: str
    last: str
    reversed: int
    checkpoints: int
    stored: int
    sliced: int
    spared: int


@dataclass(frozen=True)
class OutsideFrame:
    """What may be run again outside the chains.

    Attributes:
        name: what it is called.
        checkpoint: whether it is run again from its inputs; otherwise it is stored.
        sliced: whether it is run again in slices, at least in part.
        size: bytes that it keeps if it is stored.
    """

    name: str
    checkpoint: bool
    sliced: bool
    size: int


@dataclass(frozen=True)
class MemoryPlan:
    """How a training step was fitted into memory; print it.

    Attributes:
        memory: what was asked for: a name, or a budget in bytes.
        frames: the kind of every frame.
        predicted: the step as planned.
        stored: the step with nothing run again.
        where: the frame that the backward was in at the peak; empty if it was in none.
        name: of the model.
        chains: their blocks.
        outside: what may be run again outside of them.
    """

    memory: Memory
    frames: Frames
    predicted: Foreseen
    stored: Foreseen
    where: str
    name: str = ""
    chains: tuple[ChainFrames, ...] = ()
    outside: tuple[OutsideFrame, ...] = ()

    @property
    def work(self) -> float:
        """Operations of the step, of those of the stored one."""
        return weigh(self.predicted) / weigh(self.stored)

    @property
    def counts(self) -> dict[str, int]:
        """How many frames there are of each kind."""
        checkpoints = [frame for frame in self.outside if frame.checkpoint]
        return {
            "blocks reversed": sum(chain.reversed for chain in self.chains),
            "blocks with their state kept": sum(chain.checkpoints for chain in self.chains),
            "blocks stored": sum(chain.stored for chain in self.chains),
            "checkpoints": len(checkpoints),
            "segments stored": len(self.outside) - len(checkpoints),
            f"of them in up to {self.frames.slices} slices": self.sliced,
        }

    @property
    def sliced(self) -> int:
        """How many frames are run again in slices, at least in part."""
        outside = sum(frame.sliced for frame in self.outside)
        return outside + sum(chain.sliced for chain in self.chains)

    @property
    def heading(self) -> list[str]:
        """What the figures are, in a few lines."""
        peak, stored = self.predicted.peak.peak, self.stored.peak.peak
        share = f", {stored / peak:.1f} times as much" if peak < stored else ""
        less = stored if peak < stored else peak
        lines = [
            f"{self.name or 'a model'}: {asked(self.memory)}",
            f"  {amount(peak)} at the highest, predicted; with everything stored "
            f"{amount(less)}{share}",
            f"  {self.work:.2f} times the work of a stored step",
            f"  highest in the {self.predicted.phase}{self.where and ', at ' + brief(self.where)}",
        ]
        if self.predicted.untold:
            lines.append(f"  more than predicted is kept by {', '.join(self.predicted.untold)}")
        return lines

    def __str__(self) -> str:
        table = self._table()
        if not table.rows:
            return "\n".join(self.heading)
        return "\n".join([*self.heading, "", *table.to_text().splitlines()[1:]])

    def tables(self) -> Iterator[Table]:
        """The frames by chain, and each of those outside."""
        if self.chains or self.outside:
            yield self._table()
        if self.outside:
            yield Table("", CHECKPOINT_COLUMNS, tuple(map(self._row, self.outside)))

    def _table(self) -> Table:
        rows = []
        for number, chain in enumerate(self.chains):
            label = f"chain {number}, {span(map(_module, (chain.first, chain.last)))}"
            cells = chain.reversed, chain.checkpoints, chain.stored, chain.sliced, chain.spared
            rows.append((label, *_cells(*cells)))
        if self.outside:
            again = [frame for frame in self.outside if frame.checkpoint]
            numbers = (
                0, len(again), len(self.outside) - len(again),
                sum(frame.sliced for frame in again), sum(frame.size for frame in again),
            )  # fmt: skip
            rows.append(("outside the chains", *_cells(*numbers)))
        columns = COLUMNS
        if self.sliced:
            columns = (*COLUMNS[:4], f"in up to {self.frames.slices} slices>", COLUMNS[5])
        return Table("", columns, tuple(rows))

    def _row(self, frame: OutsideFrame) -> tuple[str, ...]:
        kind = "checkpoint" if frame.checkpoint else "stored"
        sliced = f"up to {self.frames.slices}" if frame.sliced else ""
        return brief(frame.name), kind, sliced, amount(frame.size)

    def to_dict(self, timeline: bool = False) -> dict[str, Any]:
        """Plain data, ready for JSON.

        Args:
            timeline: include the bytes after every change.
        """
        return {
            "model": self.name,
            "memory": self.memory,
            "predicted": step_dict(self.predicted, timeline),
            "stored": step_dict(self.stored, timeline),
            "work": self.work,
            "where": self.where,
            "slices": self.frames.slices,
            "chains": [asdict(chain) for chain in self.chains],
            "outside": [asdict(frame) for frame in self.outside],
        }

    def __rich__(self) -> Group:
        return to_rich("\n".join(self.heading), self.tables())

    def _repr_html_(self) -> str:
        return to_html("; ".join(line.strip() for line in self.heading), self.tables())

    def plot(self, path: str | Path | None = None) -> Figure:
        """What is alive over the course of the step, as planned and with everything stored.

        Args:
            path: where to write the picture, as ``.png``, ``.svg`` or ``.pdf``.

        Raises:
            OptionError: matplotlib is not installed.
        """
        from .course_chart import plot

        return plot(
            f"{self.name}: memory over the course of one step",
            {"stored": self.stored, "planned": self.predicted},
            self.memory if isinstance(self.memory, int) else None,
            path,
        )


def weigh(step: Foreseen) -> float:
    """Work of a step, in floating-point operations."""
    device = step.peak.device.split(":")[0]
    return step.flops + OPERATIONS.get(device, OPERATIONS["cpu"]) * step.moved


def told(
    program: Program, frames: Frames, kept: Mapping[int, int]
) -> tuple[tuple[ChainFrames, ...], tuple[OutsideFrame, ...]]:
    """The frames of a program by their names.

    Args:
        program: every part of it that can be a frame is one.
        frames: what they are.
        kept: bytes that a step keeps if it is stored, by its place in the program.
    """
    blocks: dict[int, list[tuple[RunBlock, int]]] = {}
    outside = []
    made = framed(program, frames)
    for index, (step, given) in enumerate(zip(made.steps, program.steps, strict=True)):
        size = kept.get(index, 0)
        if isinstance(step, RunBlock):
            blocks.setdefault(step.chain, []).append((step, size))
        elif isinstance(given, Segment) and given.frame is not None:
            body = step.frame.body if isinstance(step, Segment) and step.frame else None
            sliced = body is not None and body.sliced
            outside.append(OutsideFrame(given.frame.name, body is not None, sliced, size))
    return tuple(_chain(blocks[chain]) for chain in sorted(blocks)), tuple(outside)


def _chain(blocks: Iterable[tuple[RunBlock, int]]) -> ChainFrames:
    blocks = list(blocks)
    again = [(step.frame, size) for step, size in blocks if not step.frame.stored]
    checkpoints = sum(frame.checkpoint for frame, _ in again)
    return ChainFrames(
        first=blocks[0][0].frame.name,
        last=blocks[-1][0].frame.name,
        reversed=len(again) - checkpoints,
        checkpoints=checkpoints,
        stored=len(blocks) - len(again),
        sliced=sum(frame.body is not None and frame.body.sliced for frame, _ in again),
        spared=sum(size for _, size in again),
    )


def step_dict(step: Foreseen, timeline: bool) -> dict[str, Any]:
    """A predicted step as plain data."""
    data = asdict(step)
    if not timeline:
        del data["peak"]["timeline"], data["turn"]
    return data


def asked(memory: Memory) -> str:
    """What was asked for, in words."""
    if isinstance(memory, int):
        return f"a training step within {amount(memory)}"
    if memory == "lowest":
        return "a training step in as little memory as it takes"
    return f"a training step, memory={memory!r}"


def brief(name: str) -> str:
    """A frame's name with its file reduced to a name, and nothing said twice."""
    name = re.sub(r"\([^()]*[/\\]([^()/\\]+)\)$", r"(\1)", name)
    name = re.sub(r"^(\S+) to \1(?= |$)", r"\1", name)
    return re.sub(r"^(\S+) \(\1\)$", r"\1", name)


def _module(name: str) -> str:
    return name.partition(" (")[0]


def _cells(*numbers: int) -> tuple[str, ...]:
    """Counts, and bytes at last; nothing for none."""
    *counts, size = numbers
    return (*(str(number or "") for number in counts), amount(size) if size else "")
