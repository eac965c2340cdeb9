"""What `benchmarks.tal` has found, as the README's tables."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from benchmarks.tables import Data, machine, table

from .entries import ENTRIES, LOCALIZERS

WAYS = {"store": "plain", "checkpoint": "checkpoint per branch", "reversible": "rewired"}
# Ways to run a step at the papers' sizes.
PEAKS = {"plain": "plain", "reversible": "rewired", "lowest": 'rewired, `memory="lowest"`'}

# Whose difference the comparison is about.
PAIRS = (
    ("original", "fixed"),
    ("re2tal", "fixed"),
    ("consistent", "fixed"),
    ("re2tal", "original"),
    ("consistent", "original"),
)


def text_tal(data: Data) -> str:
    """Average mAP per backbone and localizer, and accuracy on clips."""
    rows = data["localization"]
    parts = [_localization(rows), _differences(rows), _classification(data["classification"])]
    return "\n\n".join([*parts, machine(data)])


def _localization(rows: Iterable[dict[str, Any]]) -> str:
    found = {(row["entry"], row["localizer"], row["backbone"]): row for row in rows}
    places = list(dict.fromkeys(key[1:] for key in found))
    header = ["average mAP", *(f"{LOCALIZERS[loc].words}, {body}" for loc, body in places)]
    entries = [name for name in ENTRIES if any(key[0] == name for key in found)]
    return table(
        header,
        [
            [ENTRIES[name].words, *(_map(found.get((name, *place))) for place in places)]
            for name in entries
        ],
    )


def _differences(rows: Iterable[dict[str, Any]]) -> str:
    """Points of average mAP between ways, means over seeds."""
    found = {(row["backbone"], row["localizer"], row["entry"]): row["mean"] for row in rows}
    places = list(dict.fromkeys(key[:2] for key in found))
    pairs = [(a, b) for a, b in PAIRS if any({(*p, a), (*p, b)} <= found.keys() for p in places)]
    header = [
        "points of average mAP", *(f"{LOCALIZERS[loc].words}, {body}" for body, loc in places)
    ]  # fmt: skip
    return table(
        header,
        [
            [
                f"{ENTRIES[a].words}, over {ENTRIES[b].words}",
                *(_points(found.get((*p, a)), found.get((*p, b))) for p in places),
            ]
            for a, b in pairs
        ],
    )


def _points(one: float | None, other: float | None) -> str:
    return "not run" if one is None or other is None else f"{100 * (one - other):+.1f}"


def _map(row: dict[str, Any] | None) -> str:
    return "not run" if row is None else f"{row['mean']:.1%} ({row['deviation']:.1%})"


def _classification(rows: Iterable[dict[str, Any]]) -> str:
    header = ("clips named rightly", "pretrained", "rewired", "finetuned")
    return table(
        header,
        [
            (
                f"{row['backbone']}, {ENTRIES[row['entry']].words}",
                f"{row['pretrained']:.1%}",
                f"{row['start']:.1%}",
                f"{row['end']:.1%}",
            )
            for row in rows
        ],
    )


def text_tal_costs(data: Data) -> str:
    """Bytes kept against depth, at both sizes."""
    header = (
        "backbone, frames", "chains", *(f"{name}, MiB" for name in WAYS.values()),
        *(f"{name}, inside the chains" for name in WAYS.values()),
    )  # fmt: skip
    rows = [_kept(row) for row in (*data["small"], *data["papers"])]
    return "\n\n".join([_steps(data["steps"]), table(header, rows), machine(data)])


def text_tal_peaks(data: Data) -> str:
    """Predicted peaks of a training step at the papers' sizes."""
    header = ("backbone, frames", *(f"{words}, GiB" for words in PEAKS.values()), "of plain")
    rows = [
        (
            f"{row['words']}, {row['frames']} x {row['pixels']} px",
            *(f"{row['peak'][way] / 2**30:.1f}" for way in PEAKS),
            f"{row['peak']['plain'] / row['peak']['lowest']:.1f}x less",
        )
        for row in data["peaks"]
    ]
    return f"{table(header, rows)}\n\n{machine(data)}"


def _steps(rows: Iterable[dict[str, Any]]) -> str:
    """Bytes that training steps keep, and their times over those of the original backbone."""
    found = {(row["entry"], row["localizer"], row["backbone"]): row for row in rows}
    places = list(dict.fromkeys(key[1:] for key in found))
    header = ["a training step", *(f"{LOCALIZERS[loc].words}, {body}" for loc, body in places)]
    return table(
        header,
        [
            [ENTRIES[name].words, *(_step(found[(name, *place)]) for place in places)]
            for name in dict.fromkeys(key[0] for key in found)
        ],
    )


def _step(row: dict[str, Any]) -> str:
    return f"{row['kept'] / 2**20:,.1f} MiB, {row['time']:.2f}x"


def _kept(row: dict[str, Any]) -> tuple[str, ...]:
    sizes = f"{row['words']}, {row['frames']} x {row['pixels']} px"
    chains = ", ".join(map(str, row["chains"]))
    bytes_ = [row[part][way] or 0 for part in ("total", "inside") for way in WAYS]
    return (sizes, chains, *(f"{size / 2**20:,.1f}" for size in bytes_))
