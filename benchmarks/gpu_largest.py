"""The largest batch that trains before memory runs out, and how fast it does."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from torch import Tensor

from .pareto_entries import Entry, Made, Unavailable, eager_entries
from .pareto_measure import Bench, Row, explained, moved, release

ENTRIES = ("plain", "checkpoint, blocks", "re2fx reversible", "re2fx lowest")
PRECISION = 1 / 16
TIMED = 3


def largest(fits: Callable[[int], bool], start: int, limit: int) -> int:
    """The largest number that fits, but for a part of `PRECISION`; 0 if not even 1 does.

    Args:
        fits: whether a number does; all below one that does are taken to do so.
        start: tried first, then doubled.
        limit: nothing larger is tried.
    """
    low, high = 0, min(start, limit)
    while fits(high):
        low = high
        if high >= limit:
            return low
        high = min(2 * high, limit)
    while high - low > max(1, int(low * PRECISION)):
        middle = (low + high) // 2
        if fits(middle):
            low = middle
        else:
            high = middle
    return low


def repeated(inputs: Any, count: int) -> Any:
    """A batch of one sample as a batch of copies of it; a large one is slow to draw."""
    if isinstance(inputs, Tensor):
        return inputs.repeat(count, *(1 for _ in inputs.shape[1:]))
    if isinstance(inputs, dict):
        return {key: repeated(value, count) for key, value in inputs.items()}
    if isinstance(inputs, (list, tuple)):
        return type(inputs)(repeated(value, count) for value in inputs)
    return inputs


class Trials:
    """Steps of one entry with batches of several sizes.

    Args:
        bench: its inputs are replaced.
        made: the entry.
        deadline: ``time.monotonic()`` after which nothing is tried.
    """

    def __init__(self, bench: Bench, made: Made, deadline: float) -> None:
        self.bench, self.made, self.deadline = bench, made, deadline
        self.reason = "the limit of what is tried"

    def fits(self, batch: int) -> bool:
        """Whether a step runs through, whatever the reason why not.

        Raises:
            Unavailable: no time is left.
        """
        if time.monotonic() > self.deadline:
            raise Unavailable("no time was left")
        try:
            self.load(batch)
            self.bench.step(self.made)
            self.bench.synchronize()
            return True
        except Exception as error:
            # Kernels that count elements in 32 bits may give up before memory does.
            traceback.clear_frames(error.__traceback__)
            self.reason = explained(error)
            return False
        finally:
            self.bench.inputs = ()
            release(self.bench.device)

    def load(self, batch: int) -> None:
        """Make a batch."""
        bench = self.bench
        bench.inputs = repeated(moved(bench.subject.inputs(1), bench.device), batch)

    def seconds(self, batch: int) -> float:
        """Median of a few steps."""
        self.load(batch)
        taken = [self.bench.timed(self.made) for _ in range(TIMED + 1)][1:]
        self.bench.inputs = ()
        return median(taken)


def largest_batches(
    bench: Bench,
    deadline: float,
    tick: Callable[[], None],
    limit: int,
    known: Sequence[Row] = (),
) -> list[Row]:
    """A row for each of `ENTRIES`; each begins where the one before ended.

    Args:
        bench: the network.
        deadline: ``time.monotonic()`` after which nothing is tried.
        tick: called after every entry.
        limit: no larger batch is tried.
        known: rows of an earlier run, of which those are kept that were finished.
    """
    done = {row["entry"]: row for row in known if "batch" in row}
    start, example = bench.subject.batch, bench.inputs
    rows = []
    for entry in eager_entries():
        if entry.name in ENTRIES:
            bench.inputs = example
            row = done.get(entry.name) or largest_batch(bench, entry, start, deadline, limit)
            rows.append(row)
            start = max(start, row.get("batch", 0))
            release(bench.device)
            tick()
    return rows


def largest_batch(bench: Bench, entry: Entry, start: int, deadline: float, limit: int) -> Row:
    """One entry's largest batch, with the reason why a larger one does not train."""
    row: Row = {"entry": entry.name, "own": entry.own, "compiled": entry.compiled}
    try:
        trials = Trials(bench, entry.make(bench), deadline)
        batch = largest(trials.fits, start, limit)
        row |= {"batch": batch, "stopped_by": trials.reason}
        if batch:
            seconds = trials.seconds(batch)
            row["median_seconds"] = seconds
            row["samples_per_second"] = round(batch / seconds, 3)
    except Unavailable as error:
        row["unavailable"] = " ".join(str(error).split())[:300]
    except Exception as error:
        traceback.clear_frames(error.__traceback__)
        row["error"] = explained(error)
    return row
