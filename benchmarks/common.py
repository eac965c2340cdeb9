"""What the measurements share: machine, clocks, memory readings and result files.

Times are taken in turn (A B C A B C ...) in one process and compared pair by pair, so that a
machine that slows down for a while slows every contender down. Peaks are taken in a fresh process
each, because a peak cannot be reset and freed memory lingers in the allocator.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

RESULTS = Path(__file__).parent / "results"

# The profiler behind `re2fx.memory.live_bytes` reports its own comings and goings below this level.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")

# In the order of every table; `benchmarks.contenders` makes them.
CONTENDERS = ("plain", "checkpoint", "re2fx")

Seconds = dict[str, list[float]]


def environment() -> dict[str, Any]:
    """The machine and the versions that the figures hold for."""
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "openmp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "timm": version("timm"),
    }


def cpu_name() -> str:
    """The processor's marketing name, where the system tells it."""
    try:
        match = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        match = None
    return match.group(1) if match else platform.processor()


def write_results(name: str, data: Mapping[str, Any]) -> Path:
    """Write ``results/<name>.json``: keys in the order given, lists of numbers on one line."""
    text = json.dumps({**data, "environment": environment()}, indent=2, allow_nan=False)
    numbers = re.compile(r"\[\s*([^\[\]{}]*?)\s*\]")
    text = numbers.sub(lambda match: f"[{' '.join(match[1].split())}]", text)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(text + "\n")
    return path


def read_results(name: str) -> dict[str, Any]:
    """What `write_results` wrote."""
    data: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return data


def target(claim: str, value: float, limit: float) -> dict[str, Any]:
    """A figure with the limit it was given beforehand."""
    return {"claim": claim, "value": round(value, 4), "limit": limit, "met": value <= limit}


def progress() -> Progress:
    """A bar that redraws only when told to: a drawing thread would disturb the clock."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        auto_refresh=False,
    )


def advancer(bar: Progress, description: str, total: int) -> Callable[[], None]:
    """A new task of the bar, as a function that moves it on by one and redraws."""
    task = bar.add_task(description, total=total)
    bar.refresh()

    def advance() -> None:
        bar.advance(task)
        bar.refresh()

    return advance


def paired_times(
    functions: Mapping[str, Callable[[], Any]],
    repeats: int,
    warmup: int = 1,
    tick: Callable[[], None] = lambda: None,
) -> Seconds:
    """Time functions in turn.

    Args:
        functions: by name; each is called ``warmup + repeats`` times.
        repeats: number of timed rounds.
        warmup: number of rounds before them.
        tick: called after every round, outside the clock.

    Returns:
        per name the seconds of each timed call, in order of the rounds.
    """
    seconds: Seconds = {name: [] for name in functions}
    for number in range(warmup + repeats):
        for name, function in functions.items():
            begin = time.perf_counter()
            function()
            if number >= warmup:
                seconds[name].append(round(time.perf_counter() - begin, 6))
        tick()
    return seconds


def median_ratio(seconds: Seconds, over: str, under: str) -> float:
    """Median over the rounds of the ratio of two functions' times."""
    return median(a / b for a, b in zip(seconds[over], seconds[under], strict=True))


def growth(sizes: list[float], values: list[float]) -> float:
    """The exponent k of ``value ~ size ** k``, by least squares over all points."""
    xs, ys = [math.log(s) for s in sizes], [math.log(v) for v in values]
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / sum(
        (a - x) ** 2 for a in xs
    )


def resident() -> tuple[int, int]:
    """Resident bytes of this process: now, and at their highest.

    Linux's own counter is preferred because ``ru_maxrss`` of a child starts at its parent's.
    """
    try:
        status = Path("/proc/self/status").read_text()
        now, peak = (
            int(re.search(rf"{key}:\s*(\d+) kB", status)[1])  # type: ignore[index]
            for key in ("VmRSS", "VmHWM")
        )
        return now * 1024, peak * 1024
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return 0, peak if platform.system() == "Darwin" else peak * 1024


def in_child(module: str, *arguments: str) -> dict[str, Any]:
    """Run ``python -m benchmarks.<module> --child ...`` and return the JSON of its last line."""
    # A fixed threshold makes the C allocator return freed tensors at once, so that resident memory
    # is what is in use; left alone, it begins to hoard after the first large free.
    variables = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**18)}
    command = [sys.executable, "-m", f"benchmarks.{module}", "--child", *arguments]
    done = subprocess.run(
        command,
        cwd=Path(__file__).parents[1],
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[1:])} failed:\n{done.stderr}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result
