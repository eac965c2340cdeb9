"""Random residual programs in random situations, for long: ``python -m benchmarks.fuzz``.

Every program is trained reversibly and stored, and both must agree (``tests/fuzz``). Runs add up in
``results/fuzz.json``; each takes other seeds. A disagreement is shrunk, printed and recorded. The
next run tries it again first, and counts it as mended if it has become an agreement or a refusal.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
from collections import Counter
from collections.abc import Iterator
from multiprocessing import get_context
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .common import RESULTS, write_results

CHUNK = 250
COMPILED = 25  # one chunk in so many is a compiled one


def chunk(seed: int, examples: int, executor: str) -> dict[str, Any]:
    """Try some programs; how many ended in which way, and the smallest disagreement."""
    from hypothesis import HealthCheck, given, settings
    from hypothesis import seed as seeded

    from tests.fuzz.cases import Case, cases, check

    torch.set_num_threads(1)
    counts: Counter[str] = Counter()
    precisions: Counter[str] = Counter()
    last: list[Case] = []

    @seeded(seed)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=cases(executor))  # type: ignore[arg-type]
    def attempt(case: Case) -> None:
        try:
            verdict: str = check(case)
        except Exception:
            last.append(case)
            raise
        if not last:  # what comes behind a disagreement shrinks it
            counts[verdict] += 1
            precisions[case.precision] += 1

    found = []
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            attempt()
    except Exception as error:
        found = [{"case": repr(last[-1]) if last else "", "error": f"{error!r}"[:500]}]
        counts["disagrees"] += 1
    return {
        "seed": seed, "executor": executor, "tried": counts.total(), "verdicts": dict(counts),
        "precisions": dict(precisions), "found": found,
    }  # fmt: skip


def chunk_of(arguments: tuple[int, int, str]) -> dict[str, Any]:
    """`chunk` of the arguments that `work` gives."""
    return chunk(*arguments)


def mended(case: str) -> bool:
    """Whether a disagreement of an earlier run is none any more."""
    import re2fx
    from tests.fuzz import cases
    from tests.programs import Block, Program, Stage

    names = {**vars(cases), "Coupling": re2fx.Coupling}
    names |= {kind.__name__: kind for kind in (Block, Program, Stage)}
    try:
        cases.check(eval(case, names))
    except re2fx.OptionError:
        return True
    except Exception:
        return False
    return True


def work(examples: int, first: int, executor: str | None = None) -> Iterator[tuple[int, int, str]]:
    """Seeds, numbers of examples and executors; a compiled chunk is a tenth as long.

    Args:
        examples: how many programs.
        first: seed.
        executor: of all of them; both by default.
    """
    number = 0
    while examples > 0:
        compiled = number % COMPILED == COMPILED - 1
        if executor is not None:
            compiled = executor == "compiled"
        size = min(CHUNK // 10 if compiled else CHUNK, examples)
        yield first + number, size, "compiled" if compiled else "eager"
        examples, number = examples - size, number + 1


def known() -> dict[str, Any]:
    """What earlier runs have counted."""
    path = RESULTS / "fuzz.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return {key: found.get(key, value) for key, value in nothing().items()}


def added(total: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The counts of all runs."""
    executors = Counter(total["executors"]) + Counter({new["executor"]: new["tried"]})
    return {
        "tried": total["tried"] + new["tried"],
        "seeds": max(total["seeds"], new["seed"] + 1),
        "executors": dict(executors),
        "verdicts": dict(Counter(total["verdicts"]) + Counter(new["verdicts"])),
        "precisions": dict(Counter(total["precisions"]) + Counter(new["precisions"])),
        "found": [*total["found"], *new["found"]],
        "mended": total["mended"],
    }


def main() -> None:
    """Command line; the exit status is 1 if there was a disagreement."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=20_000)
    parser.add_argument("--seed", type=int, help="the first; by default one that was not tried")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--fresh", action="store_true", help="forget the runs before")
    parser.add_argument("--executor", choices=("eager", "compiled"), help="of all programs")
    options = parser.parse_args()
    total = known() if not options.fresh else nothing()
    for one in [one for one in total["found"] if mended(one["case"])]:
        total["found"].remove(one)
        total["mended"].append(one)
    before = len(total["found"])
    first = total["seeds"] if options.seed is None else options.seed
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    # A worker ends after some chunks, with whatever has gathered in its caches.
    pool = get_context("spawn").Pool(options.jobs, maxtasksperchild=8)
    with Progress(*columns, TimeElapsedColumn()) as progress, pool:
        task = progress.add_task("programs", total=options.examples)
        for result in pool.imap_unordered(
            chunk_of, work(options.examples, first, options.executor)
        ):
            total = added(total, result)
            write_results("fuzz", total)
            progress.advance(task, result["tried"])
            for disagreement in result["found"]:
                progress.console.print(disagreement["case"], disagreement["error"], markup=False)
    print(f"{total['tried']} programs tried in all: {total['verdicts']}")
    sys.exit(len(total["found"]) > before)


def nothing() -> dict[str, Any]:
    """The counts before anything was tried."""
    return {
        "tried": 0,
        "seeds": 0,
        "executors": {},
        "verdicts": {},
        "precisions": {},
        "found": [],
        "mended": [],
    }


if __name__ == "__main__":
    main()
