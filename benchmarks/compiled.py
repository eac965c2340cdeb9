"""What compiled training keeps, takes and costs to compile: ``python -m benchmarks.compiled``.

One ViT and one set of parameters, compiled with Inductor in these ways:

- plain: ``torch.compile(model)``
- checkpoint: the same around every residual branch, as in `benchmarks.contenders`
- budget b: plain, with ``torch._functorch.config.activation_memory_budget = b``: the partitioner
  stores that share of what it would, and recomputes the rest from the nearest things stored
- re2fx graph, re2fx region: ``backend="re2fx"`` with either scope

Four readings each:

- bytes kept: the storages that autograd and the executor hold for the backward, each once, without
  parameters; a copy that Inductor makes of a parameter in another layout counts.
- peak: resident memory above the model during one warm step, gradients included, in a fresh
  process. Compiling leaves a far higher mark behind, so Linux is asked to forget it before the
  step; elsewhere there is no such figure.
- seconds of forward + backward, all contenders in turn in one process.
- seconds to compile: the first step less a warm one, in a fresh process with empty caches, against
  depth. A smaller network does: what takes long is the number of operations, not their size.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import math
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from re2fx.memory import saved_bytes

from .common import (
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

PATCH = 16
ROUNDS = 11
DEPTHS = (6, 12, 24)

# At 12 layers of a ViT-S the third keeps about as much as re2fx; the last keeps the input alone.
BUDGETS = (0.25, 0.1, 0.02, 0.0)

REVERSIBLE: Mapping[str, Mapping[str, str]] = {
    "re2fx graph": {"scope": "graph"},
    "re2fx region": {"scope": "region"},
}
# Whose compilation is measured against depth.
COLD = ("plain", *REVERSIBLE)

Tick = Callable[[], None]


@dataclass(frozen=True)
class Shape:
    """The size of a ViT and of its batch."""

    layers: int = 12
    width: int = 384
    heads: int = 6
    image: int = 224
    batch: int = 4

    @property
    def tokens(self) -> int:
        """Patches and the class token."""
        return (self.image // PATCH) ** 2 + 1

    @property
    def gradients(self) -> int:
        """Bytes of the parameters, and so of their gradients."""
        return sum(parameter.nbytes for parameter in self.model().parameters())

    def model(self) -> nn.Module:
        """The network, freshly initialised."""
        torch.manual_seed(0)
        sizes = {"img_size": self.image, "embed_dim": self.width, "num_heads": self.heads}
        return vit(self.layers, patch_size=PATCH, **sizes)

    def images(self) -> torch.Tensor:
        """A fixed batch."""
        generator = torch.Generator().manual_seed(1)
        return torch.randn(self.batch, 3, self.image, self.image, generator=generator)


SMALL = Shape(width=192, heads=3, image=64)
QUICK = Shape(layers=2, width=64, heads=2, image=64)


def names(budgets: Sequence[float]) -> list[str]:
    """The contenders, in the order of every table."""
    return ["plain", "checkpoint", *(f"budget {budget:g}" for budget in budgets), *REVERSIBLE]


def budget_of(name: str) -> float:
    """The share of the activations that a contender asks the partitioner to store."""
    return float(name.removeprefix("budget ")) if name.startswith("budget ") else 1.0


def compiled(name: str, model: nn.Module) -> nn.Module:
    """One of the contenders, not compiled before its first call."""
    inner = contender("checkpoint", model) if name == "checkpoint" else model
    options: dict[str, Any] = {}
    if name in REVERSIBLE:
        options = {"backend": "re2fx", "options": dict(REVERSIBLE[name])}
    # Contenders run the same code with the same backend; they must not find each other's results.
    options["isolate_recompiles"] = True
    result: Any = torch.compile(inner, **options)
    return result


def compile_now(name: str, step: Callable[[], None]) -> None:
    """The first step, which compiles forward and backward."""
    from torch._functorch import config

    with config.patch(activation_memory_budget=budget_of(name)):
        step()


@contextmanager
def empty_caches() -> Iterator[None]:
    """A directory of their own for compiled kernels, here and in the children of this process."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        before = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        try:
            yield
        finally:
            if before is None:
                del os.environ["TORCHINDUCTOR_CACHE_DIR"]
            else:
                os.environ["TORCHINDUCTOR_CACHE_DIR"] = before


# In a process of their own


def reset_peak() -> bool:
    """Return freed memory to the system and forget the highest mark; whether that is possible."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is None:
        return False
    # Otherwise the step would live in what compiling has freed and seem to need nothing.
    trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def child_peak(name: str, shape: Shape) -> dict[str, int | None]:
    """The peak of one warm step above the model; the kernels come out of the caches."""
    model, batch = shape.model(), shape.images()
    runner = compiled(name, model)
    step = training_step(runner, batch)
    compile_now(name, step)
    step()
    kept = saved_bytes(lambda: runner(batch), model).total
    model.zero_grad(set_to_none=True)
    possible = reset_peak()
    before, _ = resident()
    step()
    return {"peak": resident()[1] - before if possible else None, "kept": kept}


def child_cold(name: str, shape: Shape) -> dict[str, float]:
    """Seconds of the first step, and of one that compiles nothing."""
    from torch._functorch import config as functorch_config
    from torch._inductor import config as inductor_config

    step = training_step(compiled(name, shape.model()), shape.images())
    seconds = []
    with (
        empty_caches(),
        inductor_config.patch(fx_graph_cache=False),
        functorch_config.patch(enable_autograd_cache=False),
    ):
        for _ in range(3):
            begin = time.perf_counter()
            step()
            seconds.append(round(time.perf_counter() - begin, 4))
    return {"first": seconds[0], "warm": seconds[-1]}


def child(what: str, name: str, shape: str) -> dict[str, Any]:
    """The command line of a child."""
    functions: dict[str, Callable[[str, Shape], dict[str, Any]]]
    functions = {"peak": child_peak, "cold": child_cold}
    return functions[what](name, Shape(**json.loads(shape)))


# In this one


def time_steps(
    shape: Shape, contenders: Sequence[str], rounds: int, tick: Tick
) -> tuple[Seconds, dict[str, int]]:
    """Compile all contenders, then time their steps in turn; also the bytes each keeps."""
    model, batch = shape.model(), shape.images()
    steps, kept = {}, {}
    for name in contenders:
        runner = compiled(name, model)
        steps[name] = training_step(runner, batch)
        compile_now(name, steps[name])
        kept[name] = saved_bytes(lambda runner=runner: runner(batch), model).total  # type: ignore[misc]
        tick()
    return paired_times(steps, rounds, tick=tick), kept


def measure(
    shape: Shape, contenders: Sequence[str], rounds: int, tick: Tick
) -> tuple[list[dict[str, Any]], Seconds]:
    """Everything but the time to compile."""
    rows = []
    with empty_caches():
        seconds, kept = time_steps(shape, contenders, rounds, tick)
        for name in contenders:
            found = in_child("compiled", "peak", name, json.dumps(asdict(shape)))
            if found["kept"] != kept[name]:
                raise AssertionError(f"{name}: {found['kept']} bytes, {kept[name]} before")
            rows.append(
                {
                    "contender": name,
                    "kept": kept[name],
                    "peak": found["peak"],
                    "median_seconds": round(median(seconds[name]), 5),
                    "over_plain": round(median_ratio(seconds, name, "plain"), 4),
                    "over_checkpoint": round(median_ratio(seconds, name, "checkpoint"), 4),
                    "seconds": seconds[name],
                }
            )
            tick()
    return rows, seconds


def cold_compiles(shape: Shape, depths: Sequence[int], tick: Tick) -> list[dict[str, Any]]:
    """Seconds to compile against depth."""
    rows = []
    for layers in depths:
        for name in COLD:
            sizes = json.dumps(asdict(replace(shape, layers=layers)))
            found = in_child("compiled", "cold", name, sizes)
            seconds = round(found["first"] - found["warm"], 2)
            rows.append({"layers": layers, "contender": name, "compile": seconds, **found})
            tick()
    return rows


def equals(rows: Sequence[dict[str, Any]], seconds: Seconds) -> list[dict[str, Any]]:
    """Each scope of re2fx against the budget whose kept bytes come nearest to its own."""
    kept = {row["contender"]: row["kept"] for row in rows}
    budgets = [name for name in kept if name.startswith("budget ")]
    found = []
    for name in REVERSIBLE if budgets else ():
        near = min(budgets, key=lambda budget: abs(math.log(kept[budget] / kept[name])))
        found.append(
            {
                "contender": name,
                "kept": kept[name],
                "budget": near,
                "budget_kept": kept[near],
                "time_over_budget": round(median_ratio(seconds, name, near), 4),
            }
        )
    return found


def targets(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """At equal bytes kept, re2fx is not slower."""
    return [
        target(
            f"step time, {pair['contender']} keeping {pair['kept'] / 2**20:.2f} MiB / "
            f"{pair['budget']} keeping {pair['budget_kept'] / 2**20:.2f} MiB",
            pair["time_over_budget"],
            1.0,
        )
        for pair in found
    ]


def show(
    shape: Shape,
    rows: Sequence[dict[str, Any]],
    cold: Sequence[dict[str, Any]],
    goals: Sequence[dict[str, Any]],
) -> None:
    """Print what was found."""
    columns = ("training", "kept MiB", "peak MiB", "step s", "over plain", "over checkpoint")
    title = f"ViT, {shape.layers} layers of width {shape.width}, {shape.tokens} tokens"
    table = Table(*columns, title=f"{title}, batch {shape.batch}")
    for row in rows:
        peak = "-" if row["peak"] is None else f"{row['peak'] / 2**20:.1f}"
        ratios = (f"{row[key]:.3f}" for key in ("over_plain", "over_checkpoint"))
        sizes = (f"{row['kept'] / 2**20:.2f}", peak, f"{row['median_seconds']:.4f}")
        table.add_row(row["contender"], *sizes, *ratios)
    times = Table("layers", *COLD, title="seconds to compile, no caches")
    for layers in dict.fromkeys(row["layers"] for row in cold):
        own = {row["contender"]: row["compile"] for row in cold if row["layers"] == layers}
        times.add_row(str(layers), *(f"{own[name]:.1f}" for name in COLD))
    console = Console()
    console.print(table, times)
    for goal in goals:
        verdict = "met" if goal["met"] else "MISSED"
        line = f"{goal['claim']}: {goal['value']:.3f} (at most {goal['limit']}): {verdict}"
        console.print(line, soft_wrap=True)


def compiler_version() -> str:
    """The C++ compiler behind Inductor."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    done = subprocess.run(
        [get_cpp_compiler(), "--version"], capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()[0]


def parsed() -> argparse.Namespace:
    """Command line; ``--quick`` gives smaller defaults to everything else."""
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--quick", action="store_true", help="tiny sizes, nothing written")
    quick = first.parse_known_args()[0].quick
    shape, small = (QUICK, QUICK) if quick else (Shape(), SMALL)
    parser = argparse.ArgumentParser(description=__doc__, parents=[first])
    for name, value in asdict(shape).items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default {value}")
    budgets, depths = ((0.1,), (1,)) if quick else (BUDGETS, DEPTHS)
    parser.add_argument("--rounds", type=int, default=3 if quick else ROUNDS)
    parser.add_argument("--budgets", type=float, nargs="*", default=budgets)
    parser.add_argument("--depths", type=int, nargs="*", default=depths, help="for compile times")
    for name in ("width", "heads", "image"):
        parser.add_argument(f"--depth-{name}", type=int, default=getattr(small, name))
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Command line."""
    options = parsed()
    if options.child:
        print(json.dumps(child(*options.child)))
        return
    shape = Shape(**{name: getattr(options, name) for name in asdict(Shape())})
    small = Shape(0, options.depth_width, options.depth_heads, options.depth_image, options.batch)
    contenders = names(options.budgets)
    with progress() as bar:
        tick = advancer(bar, "steps", 2 * len(contenders) + 1 + options.rounds)
        rows, seconds = measure(shape, contenders, options.rounds, tick)
        tick = advancer(bar, "compile times", len(COLD) * len(options.depths))
        cold = cold_compiles(small, options.depths, tick)
    pairs = equals(rows, seconds)
    goals = targets(pairs)
    show(shape, rows, cold, goals)
    if options.quick:
        return
    setup = {
        "model": "ViT (timm), no dropout, fp32, forward + backward, compiled with Inductor",
        **asdict(shape),
        "tokens": shape.tokens,
        "gradients": shape.gradients,
        "rounds": options.rounds,
        "cold": {"width": small.width, "heads": small.heads, "tokens": small.tokens},
        "cpp_compiler": compiler_version(),
    }
    results = {"targets": goals, "equal_bytes": pairs, "rows": rows, "cold": cold}
    write_results("compiled", {"setup": setup, **results})


if __name__ == "__main__":
    main()
