"""A calibration in words and as a table."""

from __future__ import annotations

import textwrap

from .calibration import AS_NEAR, Calibrated, Calibration
from .tables import Table
from .text import count
from .verdict import size

WIDTH = 100
MISSED = 2  # candidates that are nearer and not acceptable, named with the reason


def head(found: Calibration) -> str:
    """What the figures are of."""
    line = (
        f"{found.model}: the pretrained function against its rewired forms on "
        f"{count(found.samples, 'sample')}"
    )
    if found.metric is not None:
        line += f"; metric of the pretrained {found.metric:.4g}"
    if found.now is not None:
        line += f"; ordinary training keeps {size(found.now)} for the backward of a batch"
    if found.checkpoint is not None:
        line += f", checkpointed {size(found.checkpoint)}"
    if any(row.bits is not None for row in found.rows):
        line += "; bits per element and block are those of the exact form, in brackets without it"
    return f"{line}; {found.note}" if found.note else line


def table(found: Calibration) -> Table:
    """A row per candidate; columns that say nothing are left out."""
    differ = len({row.step for row in found.rows}) > 1
    columns: dict[str, list[str]] = {
        "coupling, readout": [f"{r.candidate.name}, {r.candidate.readout}" for r in found.rows],
        "distance>": [f"{row.distance:.4f}" for row in found.rows],
        "top-1>": [share(row.agreement) for row in found.rows],
        "metric>": ["" if row.metric is None else f"{row.metric:.4g}" for row in found.rows],
        "bits>": [bits(row) for row in found.rows],
        "growth>": [f"{row.growth:.3g}" for row in found.rows],
        "kept>": [size(row.kept) for row in found.rows],
        "step>": [f"{row.step:.2f}x" if differ else "" for row in found.rows],
        "": [remark(row, found) for row in found.rows],
    }
    shown = {name: cells for name, cells in columns.items() if any(cells)}
    return Table("how far the output moves", tuple(shown), tuple(zip(*shown.values(), strict=True)))


def share(value: float | None) -> str:
    """Per cent, or nothing."""
    return "" if value is None else f"{value:.1%}"


def bits(row: Calibrated) -> str:
    """What the exact form keeps, in brackets where the streams are floats."""
    if row.bits is None:
        return "float"
    return str(row.bits) if row.candidate.exact else f"({row.bits})"


def remark(row: Calibrated, found: Calibration) -> str:
    """What the table says behind a row."""
    if row is found.recommended:
        return "recommended"
    if row.obstacle(found.max_bits):
        return "refused"
    return "frontier" if row in found.frontier else ""


def recommendation(found: Calibration) -> str:
    """What to take and why, and what could not be tried."""
    left_out = ", ".join(found.left_out)
    rest = f" With {left_out} nothing can be rewired here." if left_out else ""
    return f"{_choice(found)}{rest}"


def _choice(found: Calibration) -> str:
    best, number = found.recommended, len(found.acceptable)
    if best is None:
        reasons = "; ".join(f"{row.name}: {row.obstacle(found.max_bits)}" for row in found.rows)
        return f"None of the candidates can be recommended ({reasons})."
    why = "the nearest"
    if any(row.distance < best.distance for row in found.acceptable):
        why = f"within {AS_NEAR - 1:.0%} of the nearest, at the least cost,"
    of = f"of the {number} that can be trained reversibly" if number > 1 else "that can be"
    return f"Take {best.name}: {why} {of}, {_figures(best, found)}.{_missed(best, found)}"


def _figures(best: Calibrated, found: Calibration) -> str:
    """Distance and bytes of the recommended candidate."""
    line = f"moves the output by {best.distance:.1%}"
    if best.kept is not None and found.now is not None:
        line += f" and keeps {size(best.kept)} for the backward instead of {size(found.now)}"
    if best.candidate.exact and best.bits:
        line += f", {count(best.bits, 'side bit')} per element and block included"
    return line


def _missed(best: Calibrated, found: Calibration) -> str:
    """Who would be nearer, and why it is not taken."""
    nearer = sorted(
        (row for row in found.rows if row.distance < best.distance and row not in found.acceptable),
        key=lambda row: row.distance,
    )
    if not nearer:
        return ""
    named = "; ".join(
        f"{row.name}, {row.distance:.1%} ({row.obstacle(found.max_bits)})"
        for row in nearer[:MISSED]
    )
    return f" Nearer, but not to be had: {named}."


def text(found: Calibration) -> str:
    """Plain text."""
    lines = [textwrap.fill(x, WIDTH) for x in (head(found), found.recommendation)]
    return f"{lines[0]}\n\n{table(found).to_text()}\n\n{lines[1]}"
