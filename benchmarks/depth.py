"""Memory and step time against depth: ``python -m benchmarks.depth``.

A ViT-S of 6 to 96 residuals, trained plain, checkpointed and reversible. Three readings each:

- bytes kept: what the forward has allocated and is still alive when it returns, by the allocator.
  ``kept`` is the whole network; ``kept_chain`` the transformer blocks alone, called with a tensor
  that exists already, so neither patch embedding nor head (the same for everyone) blur the ratio.
  Both include the returned tensor.
- peak: resident memory above the model and its gradients during one step, in a fresh process.
- seconds of forward + backward, the three contenders in turn.

Time is taken with and without dropout, because checkpointing gains from its absence: PyTorch stops
a recompute at the last tensor it needs, so the matrix product that ends a branch is not repeated.
Reconstruction needs that product's value. With dropout behind it both repeat the whole branch.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from re2fx.memory import live_bytes

from .common import (
    CONTENDERS,
    Seconds,
    advancer,
    in_child,
    median_ratio,
    paired_times,
    progress,
    resident,
    target,
    write_results,
)
from .contenders import contender, training_step, vit

WIDTH, HEADS, IMAGE, PATCH, BATCH = 384, 6, 224, 16, 4
TOKENS = (IMAGE // PATCH) ** 2 + 1

# Timed rounds per number of blocks; 24 blocks, 48 residuals, are the case with the targets.
REPEATS = {3: 9, 6: 9, 12: 9, 24: 21, 48: 5}
QUICK = {3: 3, 6: 3}

# A second timing of the case with the targets, with this much dropout behind every branch.
DROPOUT, DROPOUT_BLOCKS, DROPOUT_REPEATS = 0.1, 24, 15


def small(depth: int, dropout: float = 0.0) -> nn.Module:
    """ViT-S, freshly initialised."""
    torch.manual_seed(0)
    return vit(
        depth,
        img_size=IMAGE,
        patch_size=PATCH,
        embed_dim=WIDTH,
        num_heads=HEADS,
        proj_drop_rate=dropout,
    )


def images() -> torch.Tensor:
    """A fixed batch."""
    return torch.randn(BATCH, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(1))


def kept(model: nn.Module, batch: torch.Tensor) -> int:
    """Bytes alive after the forward, the second time: caches filled by the first do not count."""
    model(batch)
    return live_bytes(lambda: model(batch))


def kept_by_chain(name: str, model: nn.Module) -> int:
    """Bytes that the blocks keep, without what lies around them."""
    blocks = model.get_submodule("blocks")
    tokens = torch.randn(BATCH, TOKENS, WIDTH, requires_grad=True)
    return kept(contender(name, blocks), tokens)


def child(name: str, depth: int) -> dict[str, int]:
    """The peak of one step, above a model with gradients; run in a process of its own."""
    batch = images()
    training_step(contender(name, small(1)), batch)()  # thread pools and kernel caches
    model = small(depth)
    runner = contender(name, model)
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter).fill_(0)
    before, _ = resident()
    runner(batch).square().mean().backward()
    return {"peak": resident()[1] - before}


def time_steps(model: nn.Module, repeats: int, tick: Callable[[], None]) -> Seconds:
    """Training steps of all contenders in turn."""
    batch = images()
    steps = {name: training_step(contender(name, model), batch) for name in CONTENDERS}
    return paired_times(steps, repeats, tick=tick)


def with_dropout(repeats: int, tick: Callable[[], None]) -> dict[str, Any]:
    """The step times of the case with the targets, with dropout."""
    seconds = time_steps(small(DROPOUT_BLOCKS, DROPOUT), repeats, tick)
    return {
        "residuals": 2 * DROPOUT_BLOCKS,
        "dropout": DROPOUT,
        "time_over_checkpoint": round(median_ratio(seconds, "re2fx", "checkpoint"), 4),
        "time_over_plain": round(median_ratio(seconds, "re2fx", "plain"), 4),
        "seconds": seconds,
    }


def measure(
    depth: int, repeats: int, tick: Callable[[], None]
) -> tuple[list[dict[str, Any]], Seconds]:
    """All readings at one depth."""
    model, batch = small(depth), images()
    seconds = time_steps(model, repeats, tick)
    runners = {name: contender(name, model) for name in CONTENDERS}
    rows = []
    for name, runner in runners.items():
        rows.append(
            {
                "residuals": 2 * depth,
                "contender": name,
                "kept": kept(runner, batch),
                "kept_chain": kept_by_chain(name, model),
                "peak": in_child("depth", name, str(depth))["peak"],
                "median_seconds": round(median(seconds[name]), 4),
                "over_plain": round(median_ratio(seconds, name, "plain"), 4),
                "seconds": seconds[name],
            }
        )
        tick()
    return rows, seconds


def ratios(rows: Sequence[dict[str, Any]], seconds: Seconds) -> dict[str, Any]:
    """re2fx against the others at one depth."""
    chain = {row["contender"]: row["kept_chain"] for row in rows}
    return {
        "residuals": rows[0]["residuals"],
        "time_over_checkpoint": round(median_ratio(seconds, "re2fx", "checkpoint"), 4),
        "time_over_plain": round(median_ratio(seconds, "re2fx", "plain"), 4),
        "kept_chain_over_checkpoint": round(chain["re2fx"] / chain["checkpoint"], 4),
        "kept_chain_over_plain": round(chain["re2fx"] / chain["plain"], 4),
    }


def targets(found: Sequence[dict[str, Any]], dropped: dict[str, Any]) -> list[dict[str, Any]]:
    """The limits; those with dropout were added when the recompute of checkpoint was understood."""
    at = {ratio["residuals"]: ratio for ratio in found}
    goals = [
        target(f"step time at 48 residuals, {how}, re2fx / {name}", ratio[f"time_over_{name}"], top)
        for how, ratio in (("no dropout", at[48]), (f"dropout {DROPOUT}", dropped))
        for name, top in (("checkpoint", 1.05), ("plain", 1.45))
    ]
    kept = "bytes kept by the chain at 96 residuals, re2fx / checkpoint"
    return [*goals, target(kept, at[96]["kept_chain_over_checkpoint"], 0.05)]


def show(rows: Sequence[dict[str, Any]], goals: Sequence[dict[str, Any]]) -> None:
    """Print what was found."""
    columns = ("residuals", "contender", "kept MiB", "in the chain MiB", "peak MiB", "step s")
    table = Table(*columns, title=f"ViT-S, batch {BATCH}, {TOKENS} tokens")
    for row in rows:
        sizes = [f"{row[key] / 2**20:.1f}" for key in ("kept", "kept_chain", "peak")]
        name = row["contender"]
        table.add_row(
            str(row["residuals"]),
            name,
            *sizes,
            f"{row['median_seconds']:.3f}",
            end_section=name == CONTENDERS[-1],
        )
    console = Console()
    console.print(table)
    for goal in goals:
        verdict = "met" if goal["met"] else "MISSED"
        console.print(f"{goal['claim']}: {goal['value']:.3f} (at most {goal['limit']}): {verdict}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two small depths, nothing written")
    parser.add_argument("--child", nargs=2, metavar=("CONTENDER", "DEPTH"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(options.child[0], int(options.child[1]))))
        return
    rows: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    repeats = QUICK if options.quick else REPEATS
    with progress() as bar:
        for depth, count in repeats.items():
            tick = advancer(bar, f"{2 * depth} residuals", count + 1 + len(CONTENDERS))
            new, seconds = measure(depth, count, tick)
            rows += new
            found.append(ratios(new, seconds))
        if not options.quick:
            tick = advancer(bar, f"dropout {DROPOUT}", DROPOUT_REPEATS + 1)
            dropped = with_dropout(DROPOUT_REPEATS, tick)
    goals = [] if options.quick else targets(found, dropped)
    show(rows, goals)
    setup = {
        "model": "ViT-S/16 (timm), no dropout unless stated, fp32, forward + backward",
        "batch": BATCH,
        "tokens": TOKENS,
        "width": WIDTH,
        "heads": HEADS,
    }
    if not options.quick:
        results = {"targets": goals, "ratios": found, "with_dropout": dropped, "rows": rows}
        write_results("depth", {"setup": setup, **results})


if __name__ == "__main__":
    main()
