"""The README's block on recomputing on a second stream."""

from __future__ import annotations

from .tables import Data, machine, table


def text_overlap(data: Data) -> str:
    """Share of a reversible step that a second stream spares at the most, by block and batch."""
    batches = list(dict.fromkeys(row["batch"] for row in data["rows"]))
    blocks = dict.fromkeys(row["block"] for row in data["rows"])
    spared = {(row["block"], row["batch"]): row["spared"] for row in data["rows"]}
    rows = [
        (block, *(f"{spared[block, batch]:.1%}" for batch in batches if (block, batch) in spared))
        for block in blocks
    ]
    head = ("spared at the most", *(f"batch {batch}" for batch in batches))
    return f"{table(head, rows)}\n\n{data['card']}; {machine(data)}"
