"""What was found in the zoo, as data and as a file that a later run goes on from."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..errors import OptionError
from .catalogue import Entry

STATUSES = {
    "rewired": "captured, and rewired in one chain or more",
    "refused": "captured, and every skip-add refused",
    "no residual": "captured, and no skip-add in it",
    "not captured": "no route gives a graph of its blocks",
    "unusable": "the model itself cannot be built or run as the catalogue says",
    "failed": "re2fx raised an error after the capture",
    "crashed": "the process ended without a result",
    "timed out": "no result in the time given",
}
EXACT = {"float64": 1e-9, "float32": 1e-4}  # relative errors that are rounding
PARTS = "submodules"  # the route of a model that no other takes as a whole
LARGE = 500  # nodes, from which on planning is compared with capture


@dataclass
class Row:
    """What re2fx did with one model.

    Attributes:
        target, inputs, group: as in the catalogue.
        status: one of `STATUSES`.
        reason: why it is neither rewired nor refused; empty otherwise.
        dtype: that it was run in.
        route: how it was captured.
        routes_failed: the routes that did not go through, with the reason.
        kept_whole: submodules that could not be traced, with the reason.
        hidden: those of them that hold a stack of blocks, whose skip-adds are not seen.
        parts: submodules that are rewired by themselves, and how each was captured.
        nodes: of the captured graph in train mode.
        chains: the number of residuals in each chain.
        found: skip-adds in the graph.
        refusals: per rule and sentence how often: ``{"rule", "count", "sentence", "module"}``.
        misses: additions that are no skip-adds, by rule.
        overlooked: skip-adds that are neither rewired nor refused.
        stored: bytes that ordinary training keeps for the backward, predicted.
        in_chains: of these, in the chains.
        output_error, gradient_error: largest relative errors of reversible execution.
        worst: the tensor with the largest gradient error.
        without_gradient: parameters that get one in the given model only.
        disturbed: buffers, and the random state, that differ after a step.
        seconds: by stage.
        findings: what is wrong, in sentences.
    """

    target: str
    inputs: tuple[str, ...] = ()
    group: str = ""
    status: str = ""
    reason: str = ""
    dtype: str = ""
    route: str = ""
    routes_failed: dict[str, str] = field(default_factory=dict)
    kept_whole: dict[str, str] = field(default_factory=dict)
    hidden: list[str] = field(default_factory=list)
    parts: dict[str, str] = field(default_factory=dict)
    nodes: int = 0
    chains: list[int] = field(default_factory=list)
    found: int = 0
    refusals: list[dict[str, Any]] = field(default_factory=list)
    misses: dict[str, int] = field(default_factory=dict)
    overlooked: list[str] = field(default_factory=list)
    stored: int | None = None
    in_chains: int | None = None
    output_error: float | None = None
    gradient_error: float | None = None
    worst: str = ""
    without_gradient: list[str] = field(default_factory=list)
    disturbed: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    findings: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, entry: Entry, status: str = "", reason: str = "") -> Row:
        """A row that has no more than a name yet."""
        return cls(entry.target, entry.inputs, entry.group, status, reason)

    @classmethod
    def read(cls, data: dict[str, Any]) -> Row:
        """What `to_dict` gave; what a newer version added is left out."""
        known = {item.name for item in fields(cls)}
        row = cls(**{key: value for key, value in data.items() if key in known})
        row.inputs = tuple(row.inputs)
        return row

    @property
    def entry(self) -> Entry:
        """The model in the catalogue."""
        return Entry(self.target, tuple(self.inputs), self.group)

    @property
    def rewired(self) -> int:
        """Residuals in chains."""
        return sum(self.chains)

    @property
    def refused(self) -> int:
        """Skip-adds left alone."""
        return sum(refusal["count"] for refusal in self.refusals)

    @property
    def captured(self) -> bool:
        """Whether there are graphs of the model's blocks, whatever came after it."""
        return bool(self.route) and self.status != "not captured"

    @property
    def whole(self) -> bool:
        """Whether there is one graph that holds all blocks."""
        return self.captured and self.route != PARTS and not (self.hidden or self.parts)

    @property
    def share(self) -> float | None:
        """Part of the kept bytes that lies in chains."""
        return None if not self.stored or self.in_chains is None else self.in_chains / self.stored

    @property
    def planning(self) -> float | None:
        """Seconds of planning and rewiring over those of the capture, of the whole."""
        capture, plan = self.seconds.get("capture"), self.seconds.get("plan")
        return None if not capture or plan is None else plan / capture

    def judge(self) -> None:
        """Write down in sentences what is wrong."""
        say = self.findings.append
        if self.status in ("failed", "crashed", "timed out", "unusable"):
            say(f"{self.status}: {self.reason}")
        if self.overlooked:
            say(f"neither rewired nor refused: {', '.join(self.overlooked)}")
        if self.without_gradient:
            say(f"no gradient after rewiring: {', '.join(self.without_gradient)}")
        if self.disturbed:
            say(f"differs from stored execution after a step: {', '.join(self.disturbed)}")
        for name, error in (("output", self.output_error), ("gradient", self.gradient_error)):
            exact = EXACT.get(self.dtype, 0.0)
            if error is not None and not error <= exact:
                where = f" in {self.worst}" if name == "gradient" else ""
                say(f"relative {name} error {error:.1e}{where}, more than {exact:g}")
        if self.nodes > LARGE and self.planning is not None and self.planning > 1:
            say(f"planning took {self.planning:.2f} times as long as the capture")

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; an infinite error becomes text."""
        data = asdict(self)
        for key in ("output_error", "gradient_error"):
            if data[key] is not None and data[key] == float("inf"):
                data[key] = 1e308  # JSON has no infinity
        return data


@dataclass
class Results:
    """The rows of one visit to the zoo, in the catalogue's order."""

    rows: list[Row] = field(default_factory=list)

    @classmethod
    def load(cls, path: Path) -> Results:
        """What `save` wrote; empty if there is no such file.

        Raises:
            OptionError: the file holds something else.
        """
        if not path.exists():
            return cls()
        try:
            return cls([Row.read(row) for row in json.loads(path.read_text())["rows"]])
        except (ValueError, KeyError, TypeError) as error:
            raise OptionError(
                f"{path} holds no results of a zoo ({error}); name another file, or pass --fresh"
            ) from error

    def save(self, path: Path) -> None:
        """Write everything, so that a reader never finds half a file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".part")
        partial.write_text(json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n")
        os.replace(partial, path)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"rows": [row.to_dict() for row in self.rows]}

    def put(self, row: Row) -> None:
        """Add a row, in place of an older one of the same model."""
        self.rows = [old for old in self.rows if old.entry != row.entry] + [row]

    def missing(self, entries: Iterable[Entry]) -> list[Entry]:
        """The models that have no row yet."""
        known = {row.entry for row in self.rows}
        return [entry for entry in entries if entry not in known]

    def only(self, entries: Iterable[Entry]) -> Results:
        """The rows of some models, in their order."""
        by_entry = {row.entry: row for row in self.rows}
        return Results([by_entry[entry] for entry in entries if entry in by_entry])

    @property
    def findings(self) -> list[tuple[Row, str]]:
        """Everything that is wrong."""
        return [(row, sentence) for row in self.rows for sentence in row.findings]
