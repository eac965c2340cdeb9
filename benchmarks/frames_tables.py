"""What `benchmarks.frames` has found: the README's table."""

from __future__ import annotations

from typing import Any

from .tables import Data, machine, table

KINDS = ("plain", "checkpoint", "reversed", "checkpoints", "slices", "part by part")
HALF = "half of checkpoint"
COLUMNS = (
    "network, input", "plain MiB", "checkpoint per branch", "chains reversed", "and checkpoints",
    "and slices", "and part by part", "plain / lowest", "checkpoint / lowest",
    "measured plain / lowest", "step time of plain", "at half of checkpoint",
)  # fmt: skip


def text_frames(data: Data) -> str:
    """A row for each network."""
    rows = [_row(model) for model in data["models"].values()]
    return f"{table(COLUMNS, rows)}\n\n{machine(data)}"


def _row(model: dict[str, Any]) -> tuple[str, ...]:
    peaks = {kind: model["predicted"][kind]["peak"] for kind in KINDS}
    lowest, plain, checkpoint = peaks["part by part"], peaks["plain"], peaks["checkpoint"]
    found = model.get("measured")
    ratio, time, half = "not run", "not run", "not run"
    if found:
        ratio = f"{found['plain']['peak'] / found['lowest']['peak']:.1f}"
        time = f"{found['lowest']['over_plain']:.2f}x"
        half = _half(found)
    sizes = (f"{peak / 2**20:,.0f}" for peak in peaks.values())
    ratios = f"{plain / lowest:.1f}", f"{checkpoint / lowest:.1f}"
    return (model["words"], *sizes, *ratios, ratio, time, half)


def _half(found: dict[str, Any]) -> str:
    if HALF not in found:
        return "not run"
    return f"{found[HALF]['over_plain']:.2f}x" if found[HALF] else "not as low"
