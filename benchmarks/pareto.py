"""Step time against measured peak, re2fx next to checkpointing: ``python -m benchmarks.pareto``.

Four networks as their libraries give them, dropout and stochastic depth included: ViT-B, Video
Swin-T, SlowFast-R50 and GPT-2. For each the entries of `benchmarks.pareto_entries`, with
``--compiled`` those that Inductor compiles too. Of each

- peak: what a step (forward, loss, backward) allocates at its highest, by `re2fx.peak`, above the
  parameters and their gradients, which exist before it
- gradient error: of checkpoints against plain training, of re2fx against stored execution of the
  rewired network, with the same random numbers; the worst parameter
- seconds of a step, in rounds: every entry once a round, in an order drawn anew

A network's entries are measured in one process, and the result file is written after each network.
A second run goes on with those that are missing or were measured otherwise; what was unavailable
is tried again with ``--fresh`` only.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from .common import RESULTS, advancer, progress, read_results, write_results
from .pareto_entries import (
    PARTITIONS,
    Entry,
    answering_entries,
    compiled_entries,
    eager_entries,
)
from .pareto_measure import Bench, Row, Tick, measure
from .pareto_models import CPU, QUICK, Subject

ROUNDS, QUICK_ROUNDS = 7, 3


def measured(subject: Subject, entries: Sequence[Entry], rounds: int, tick: Tick) -> dict[str, Any]:
    """One network with all its entries."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = measure(Bench(subject), entries, rounds, tick)
    return {"name": subject.name, "words": subject.words, "rounds": rounds, "rows": rows}


def holds(known: dict[str, Any] | None, subject: Subject, entries: Sequence[Entry]) -> bool:
    """Whether a network was measured as it would be now, at least with these entries."""
    if known is None or known["words"] != subject.words:
        return False
    return {entry.name for entry in entries} <= {row["entry"] for row in known["rows"]}


def known_models() -> dict[str, Any]:
    """What the result file holds."""
    found = read_results("pareto")["models"] if (RESULTS / "pareto.json").exists() else {}
    return {name: model for name, model in found.items() if name in CPU}


def cells(row: Row) -> tuple[str, ...]:
    """An entry's peak, predicted peak, time, ratio, gradient error."""
    predicted, ratio, error = row["predicted"], row["over_plain"], row["gradient_error"]
    return (
        f"{row['peak'] / 2**20:.1f}",
        "" if predicted is None else f"{predicted / 2**20:.1f}",
        f"{row['median_seconds']:.4f}",
        "" if ratio is None else f"{ratio:.3f}",
        "" if error is None else f"{error:.1e}",
    )


def show(console: Console, model: dict[str, Any]) -> None:
    """Print a network's entries, and why others are missing."""
    columns = ("peak MiB", "predicted", "step s", "/ plain", "gradients")
    table = Table(Column("training", no_wrap=True), *columns, title=model["words"])
    for row in model["rows"]:
        if "median_seconds" in row:
            table.add_row(row["entry"], *cells(row))
    console.print(table)
    missing: dict[str, list[str]] = {}
    for row in model["rows"]:
        if "median_seconds" not in row:
            reason = row.get("error") or row.get("unavailable") or "not timed"
            missing.setdefault(reason, []).append(row["entry"])
    for reason, names in missing.items():
        console.print(f"{', '.join(names)}: {reason}", style="dim", markup=False)


def parsed() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, nothing is written")
    parser.add_argument("--fresh", action="store_true", help="measure again what is known")
    parser.add_argument("--models", nargs="+", choices=list(CPU), default=list(CPU))
    parser.add_argument("--rounds", type=int, help=f"default {ROUNDS}, quick {QUICK_ROUNDS}")
    parser.add_argument("--compiled", action="store_true", help="compile too, which takes long")
    parser.add_argument(
        "--partitions",
        type=float,
        nargs="*",
        default=PARTITIONS,
        help="activation_memory_budget of compiled training; none: leave it out",
    )
    return parser.parse_args()


def main() -> None:
    """Command line."""
    options = parsed()
    rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    entries = [*eager_entries(), *answering_entries()]
    if options.compiled:
        entries += compiled_entries(tuple(options.partitions))
    models = {} if options.quick else known_models()
    console = Console()
    with progress() as bar:
        for name in options.models:
            subject = (QUICK if options.quick else CPU)[name]()
            tick = advancer(bar, subject.name, len(entries) + rounds)
            if options.fresh or not holds(models.get(name), subject, entries):
                models[name] = measured(subject, entries, rounds, tick)
                if not options.quick:
                    write_results("pareto", results(models))
            show(bar.console, models[name])
    if not options.quick:
        console.print(f"[dim]{RESULTS / 'pareto.json'}[/]", highlight=False)


def results(models: dict[str, Any]) -> dict[str, Any]:
    """The result file, with networks in the order of `CPU`."""
    setup = {"step": "forward, loss, backward; fp32", "peak": "above parameters and gradients"}
    return {"setup": setup, "models": {name: models[name] for name in CPU if name in models}}


if __name__ == "__main__":
    main()
