"""Planning time against graph size: ``python -m benchmarks.scale``.

Synthetic networks of pre-norm MLP blocks, every one with a side input computed from a second
argument, and a tap every eighth block, so that no question the passes ask is trivially short. One
graph is planned, that of train mode; `re2fx.transform` does it twice and captures once for both.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.fx import Graph

import re2fx
from re2fx.capture import capture
from re2fx.coupling import Coupling
from re2fx.passes.cleanup import cleanup
from re2fx.passes.outline import outline
from re2fx.passes.rewire import rewire
from re2fx.pipeline import make_plan

from .common import advancer, growth, progress, target, write_results

NODES = (1_000, 2_000, 5_000, 10_000)
QUICK = (500, 1_000)
REPEATS = 5
WIDTH = 8
TAP_EVERY = 8

# One growth figure decides what "about linearly" means: 1 is linear, 2 quadratic.
LINEAR = 1.2

PLANNING = ("plan", "rewire", "outline")
COLUMNS = ("capture", *PLANNING, "planning")


class Block(nn.Module):
    """``x + mlp(norm(x) * gate(condition))``."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.gate = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.rise, self.fall = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """One residual with a side input."""
        hidden = self.norm(x) * self.gate(condition)
        return x + self.fall(nn.functional.gelu(self.rise(hidden)))


class Network(nn.Module):
    """Blocks, a tap now and then, and a sum of what was tapped."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """A network with ``len(blocks) // TAP_EVERY`` auxiliary heads."""
        taps = []
        for number, block in enumerate(self.blocks, 1):
            x = block(x, condition)
            if number % TAP_EVERY == 0:
                taps.append(self.head(x))
        return self.head(x) + torch.cat(taps, -1).mean()


def network(nodes: int) -> Network:
    """A network whose captured graph has about that many nodes."""
    per_block = 7 + 1 / TAP_EVERY
    return Network(round((nodes - 6) / per_block))


@contextmanager
def clocked(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Note how long the body took."""
    begin = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - begin, 6)


def once(model: nn.Module) -> tuple[dict[str, float], Graph, int]:
    """Capture and plan one network; seconds per column, the graph, and residuals rewired."""
    seconds: dict[str, float] = {}
    gc.collect()
    with clocked(seconds, "capture"):
        graph = capture(model).train
    with clocked(seconds, "plan"):
        flow, plan = make_plan(graph, model)
    with clocked(seconds, "rewire"):
        rewired, wirings = rewire(flow, plan, Coupling.re2tal())
        cleanup(rewired)
    with clocked(seconds, "outline"):
        outline(rewired, model, wirings)
    seconds["planning"] = sum(seconds[name] for name in PLANNING)
    return seconds, graph, plan.rewired


def measure(nodes: int, repeats: int, tick: Callable[[], None]) -> dict[str, Any]:
    """The least times at one size: the work is always the same, so the rest is the machine's."""
    model = network(nodes)
    runs = []
    for _ in range(repeats):
        seconds, graph, rewired = once(model)
        runs.append(seconds)
        tick()
    if rewired != len(model.blocks):
        raise AssertionError(f"{rewired} of {len(model.blocks)} residuals were rewired")
    whole: dict[str, float] = {}
    with clocked(whole, "transform"):
        re2fx.transform(model)
    least = {name: round(min(run[name] for run in runs), 4) for name in COLUMNS}
    return {"nodes": len(graph.nodes), "residuals": rewired, **least, **whole, "runs": runs}


def targets(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The limits set before anything was measured."""
    sizes = [row["nodes"] for row in rows]
    exponent = growth(sizes, [row["planning"] for row in rows])
    goals = [target("exponent k of planning time ~ nodes^k", exponent, LINEAR)]
    near = [row for row in rows if abs(row["nodes"] - 5_000) < 100]
    goals += [target("seconds to plan 5,000 nodes", row["planning"], 5.0) for row in near]
    return goals


def show(rows: list[dict[str, Any]], goals: list[dict[str, Any]]) -> None:
    """Print what was found."""
    table = Table("nodes", "residuals", *COLUMNS, "transform", title="seconds")
    for row in rows:
        times = [f"{row[name]:.3f}" for name in (*COLUMNS, "transform")]
        table.add_row(str(row["nodes"]), str(row["residuals"]), *times)
    console = Console()
    console.print(table)
    exponents = {
        name: growth([row["nodes"] for row in rows], [row[name] for row in rows])
        for name in COLUMNS
    }
    console.print("exponents:", ", ".join(f"{k} {v:.2f}" for k, v in exponents.items()))
    for goal in goals:
        verdict = "met" if goal["met"] else "MISSED"
        console.print(f"{goal['claim']}: {goal['value']:.2f} (at most {goal['limit']}): {verdict}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two small sizes, nothing written")
    options = parser.parse_args()
    rows = []
    with progress() as bar:
        for nodes in QUICK if options.quick else NODES:
            rows.append(measure(nodes, REPEATS, advancer(bar, f"{nodes} nodes", REPEATS)))
    goals = targets(rows)
    show(rows, goals)
    if not options.quick:
        setup = {"model": f"pre-norm MLP blocks, one side input each, a tap every {TAP_EVERY}"}
        write_results("scale", {"setup": setup, "targets": goals, "rows": rows})


if __name__ == "__main__":
    main()
