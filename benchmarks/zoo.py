"""Every model of the zoo's catalogue, each in a process of its own: ``python -m benchmarks.zoo``.

Goes on from what ``results/zoo.json`` holds; ``--again '*swin*'`` measures some models once more,
``--fresh`` all. Reduced models in fp64: the seconds say which stage is slow, they are no measure of
training. About half an hour on two cores.
"""

from __future__ import annotations

import argparse
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from rich.console import Console

from re2fx.zoo import Results, catalogue
from re2fx.zoo.command import TIMEOUT, tour
from re2fx.zoo.tables import headline, reasons, totals

from .common import RESULTS, target, write_results

LIBRARIES = ("torchvision", "timm", "transformers", "pytorchvideo", "diffusers")
FEW, WELL_CAPTURED = 150, 0.98


def goals(results: Results) -> list[dict[str, Any]]:
    """The limits set before anything was measured; each figure should be at most its limit."""
    rows = results.rows
    lost = 1 - sum(row.captured for row in rows) / max(len(rows), 1)
    fp64 = [r.gradient_error for r in rows if r.gradient_error is not None and r.dtype == "float64"]
    slow = [row.planning for row in rows if row.nodes > 500 and row.planning is not None]
    return [
        target(f"models short of {FEW}", max(FEW - len(rows), 0), 0),
        target("part of the models that is not captured", lost, 1 - WELL_CAPTURED),
        {**target("gradient error in fp64", 0, 1e-9), **worst(max(fp64, default=0.0))},
        target("parameters without a gradient", sum(len(r.without_gradient) for r in rows), 0),
        target("skip-adds neither rewired nor refused", sum(len(r.overlooked) for r in rows), 0),
        target("planning over capture, above 500 nodes", max(slow, default=0.0), 1.0),
    ]


def worst(error: float) -> dict[str, Any]:
    """An error too small for the digits of the other figures."""
    return {"value": error, "met": error <= 1e-9}


def versions() -> dict[str, str]:
    """Of the libraries that the models come from."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def save(results: Results) -> None:
    """Write what is known so far."""
    ordered = results.only(catalogue())
    data = {"libraries": versions(), "targets": goals(ordered), **ordered.to_dict()}
    write_results("zoo", data)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fresh", action="store_true", help="measure again what is known")
    parser.add_argument("--again", nargs="+", default=[], help="models to measure again")
    parser.add_argument("--jobs", type=int, default=1, help="models at a time")
    parser.add_argument("--timeout", type=float, default=TIMEOUT, help="seconds for one")
    options = parser.parse_args()
    results = Results() if options.fresh else Results.load(RESULTS / "zoo.json")
    again = set(catalogue(options.again)) if options.again else set()
    results = Results([row for row in results.rows if row.entry not in again])
    console = Console()
    tour(results.missing(catalogue()), results, save, options.jobs, options.timeout, console)
    save(results)
    own = results.only(catalogue())
    for table in (*reasons(own), totals(own)):
        console.print(table.to_rich())
    console.print(headline(own), highlight=False)


if __name__ == "__main__":
    main()
