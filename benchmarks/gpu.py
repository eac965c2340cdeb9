"""Step time against peak on a data-centre GPU, in bf16: ``python -m benchmarks.gpu``.

The networks and entries of `benchmarks.pareto` at the sizes they are trained with, under autocast,
by the statistics of CUDA's caching allocator. A part is ``NETWORK:WHAT``:

    eager      plain, checkpoints, offloading to the host, re2fx at its budgets
    compiled   ``torch.compile`` and the partitioner's budgets
    backend    re2fx's backend in both scopes
    graphs     the same with CUDA graphs
    kernels    what Inductor makes of the emitted graphs
    largest    the largest batch that trains before memory runs out, and the throughput there

The result file is written after every part, and a second run goes on with the missing ones, so
that they can be spread over several short calls: no entry is begun after ``--seconds``. What fails
is recorded in its row. Without CUDA the exit status is 2.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatch
from typing import Any

import torch

import re2fx

from .common import RESULTS, advancer, progress, read_results, write_results
from .gpu_largest import largest_batches
from .pareto_entries import (
    Entry,
    Made,
    answering_entries,
    compiled_entries,
    eager_entries,
    graph_entries,
)
from .pareto_measure import Bench, Row, explained, measure, release
from .pareto_models import GPU, QUICK, Make

ROUNDS, SECONDS = 9, 480.0
# Rivals whose peaks re2fx is given as budgets; planning takes most of the time.
ANSWERED = ("checkpoint, branches", "checkpoint, blocks")


def reference_entries() -> list[Entry]:
    """Those whose times or gradients the others are compared with."""
    return [entry for entry in eager_entries() if entry.name in ("plain", "re2fx store")]


def backends(own: bool) -> list[Entry]:
    """The compiled entries that are re2fx's, or the others."""
    return [entry for entry in compiled_entries() if entry.own == own]


SETS: Mapping[str, Callable[[], list[Entry]]] = {
    "eager": lambda: [*eager_entries(), *answering_entries(ANSWERED)],
    "compiled": lambda: [*reference_entries(), *backends(False)],
    "backend": lambda: [*reference_entries(), *backends(True)],
    "graphs": lambda: [*reference_entries(), *graph_entries()],
}
WHATS = (*SETS, "kernels", "largest")
PARTS = tuple(f"{name}:{what}" for what in WHATS for name in GPU)


def look(bench: Bench, made: Made, row: Row) -> None:
    """Add what CUDA alone can tell: kernels launched in a step, and memory that is reserved."""
    if bench.device.type != "cuda":
        return
    row["reserved"] = torch.cuda.memory_reserved(bench.device)
    if row["compiled"]:
        row["launched_kernels"], row["launched_triton"] = launches(lambda: bench.step(made))


def launches(run: Callable[[], Any]) -> tuple[int, int]:
    """Kernels that run on the device: all, and those that Triton has compiled."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    events = [e.name for e in profiler.events() if str(e.device_type) == "DeviceType.CUDA"]
    names = [name for name in events if not name.startswith(("Memcpy", "Memset"))]
    return len(names), sum(name.startswith("triton") for name in names)


def kernels(bench: Bench) -> Row:
    """Inductor's kernels for the reversible step, and for the stored one."""
    args, kwargs = ((), bench.inputs) if isinstance(bench.inputs, dict) else (bench.inputs, None)
    with bench.autocast():
        report = re2fx.emit(bench.model, *args, kwargs=kwargs).lowering_report()
    halves = ("forward", "backward", "stored_forward", "stored_backward")
    counted = {
        half: {
            "generated": (found := getattr(report, half)).generated,
            "library": sum(found.library.values()),
            "fallback": sum(found.fallback.values()),
        }
        for half in halves
    }
    return {**counted, "added_fallbacks": list(report.added_fallbacks)}


def run_part(
    part: str,
    subjects: Mapping[str, Make] = GPU,
    device: str = "cuda",
    rounds: int = ROUNDS,
    deadline: float = float("inf"),
    tick: Callable[[], None] = lambda: None,
    limit: int = 2**16,
    known: Sequence[Row] = (),
) -> dict[str, Any]:
    """A part's result; whatever fails is said in it, and largest batches that are known stay."""
    name, what = part.split(":")
    subject = subjects[name]()
    found: dict[str, Any] = {"name": subject.name, "words": subject.words, **card(device)}
    bench: Bench | None = None
    try:
        bench = Bench(subject, device, mixed=True)
        if what == "kernels":
            found["kernels"] = kernels(bench)
        elif what == "largest":
            found["rows"] = largest_batches(bench, deadline, tick, limit, known)
        else:
            found["rounds"] = rounds
            found["rows"] = measure(bench, SETS[what](), rounds, tick, look, deadline)
    except Exception as error:
        traceback.clear_frames(error.__traceback__)
        found["error"] = explained(error)
    bench = None
    torch._dynamo.reset()  # compiled code would keep networks alive
    release(torch.device(device))
    return found


def card(device: str) -> dict[str, Any]:
    """What a part was measured on: the parts of one file may come from several."""
    if not device.startswith("cuda"):
        return {"card": device}
    properties = torch.cuda.get_device_properties(device)
    return {
        "card": properties.name,
        "card_memory": properties.total_memory,
        "cuda": torch.version.cuda,
    }


def known_parts() -> dict[str, Any]:
    """What the result file holds."""
    found = read_results("gpu")["parts"] if (RESULTS / "gpu.json").exists() else {}
    return {part: result for part, result in found.items() if part in PARTS}


def complete(result: dict[str, Any]) -> bool:
    """Whether time was enough for all of it."""
    rows = result.get("rows", [])
    return not any(row.get("unavailable") == "no time was left" for row in rows)


def save(parts: dict[str, Any]) -> None:
    """Write what is known, in the order of `PARTS`."""
    setup = {"step": "forward, loss, backward under autocast to bf16", "rounds": ROUNDS}
    write_results("gpu", {"setup": setup, "parts": {p: parts[p] for p in PARTS if p in parts}})


def chosen(patterns: Sequence[str]) -> list[str]:
    """The parts that are asked for."""
    return [part for part in PARTS if any(fnmatch(part, pattern) for pattern in patterns)]


def parsed() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", nargs="+", default=["*"], help="parts, such as vit:* or *:eager")
    parser.add_argument("--list", action="store_true", help="print the parts' names, and end")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, nothing is written")
    parser.add_argument("--fresh", action="store_true", help="measure again what is known")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"default {SECONDS:g}")
    return parser.parse_args()


def main() -> None:
    """Command line."""
    options = parsed()
    if options.list:
        print("\n".join(PARTS))
        return
    if not torch.cuda.is_available():
        print("benchmarks.gpu needs a CUDA device, and there is none", file=sys.stderr)
        sys.exit(2)
    warnings.simplefilter("ignore")
    parts = {} if options.quick else known_parts()
    deadline = time.monotonic() + options.seconds
    left = []
    with progress() as bar:
        for part in chosen(options.part):
            subjects = QUICK if options.quick else GPU
            if part.split(":")[0] not in subjects:
                continue
            if part in parts and complete(parts[part]) and not options.fresh:
                continue
            if time.monotonic() > deadline:
                left.append(part)
                continue
            tick = advancer(bar, part, 0)
            limit = 64 if options.quick else 2**16
            known = parts.get(part, {}).get("rows", ()) if not options.fresh else ()
            given = subjects, "cuda", options.rounds, deadline, tick, limit, known
            parts[part] = run_part(part, *given)
            tell(bar.console.print, part, parts[part])
            if not options.quick:
                save(parts)
            if not complete(parts[part]):
                left.append(part)
    print(f"left for another run: {' '.join(left)}" if left else "complete")


def tell(say: Callable[..., None], part: str, result: dict[str, Any]) -> None:
    """Print a part's result, a line for each row."""
    say(f"[bold]{part}[/] {result['words']}", highlight=False)
    for row in result.get("rows", []):
        name = row["entry"]
        if "median_seconds" not in row:
            reason = row.get("error") or row.get("unavailable") or "not timed"
            say(f"  {name}: {reason}", markup=False, highlight=False)
        elif "batch" in row:
            rate = row["samples_per_second"]
            say(f"  {name}: batch {row['batch']}, {rate:.1f} samples / s", highlight=False)
        else:
            peak, seconds = row["peak"] / 2**20, row["median_seconds"]
            say(
                f"  {name}: {peak:.0f} MiB, {1e3 * seconds:.1f} ms, {row['over_plain']} of plain",
                highlight=False,
            )
    for key in ("kernels", "error"):
        if key in result:
            say(f"  {result[key]}", markup=False, highlight=False)


if __name__ == "__main__":
    main()
