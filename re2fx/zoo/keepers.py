"""One process per model, so that a crash, a leak or an endless loop is a result and no more.

The processes are forked from a server that has imported the libraries and run nothing, which saves
the seconds that importing them takes; where there is no forking, each imports them anew.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from .catalogue import Entry
from .results import Row

PRELOADED = ["re2fx.zoo.preload"]
GRACE = 5.0  # seconds for a process that has sent its row to end


def visit(entries: Iterable[Entry], jobs: int = 1, timeout: float = 300.0) -> Iterator[Row]:
    """Measure models, each in a process of its own.

    Args:
        entries: which.
        jobs: how many at a time.
        timeout: seconds for one.

    Yields:
        the row of a model as soon as it is there.
    """
    context = _context()
    with ThreadPoolExecutor(jobs) as threads:
        waiting = [threads.submit(alone, entry, timeout, context) for entry in entries]
        try:
            for done in as_completed(waiting):
                yield done.result()
        finally:
            for future in waiting:
                future.cancel()


def alone(entry: Entry, timeout: float, context: Any = None) -> Row:
    """Measure one model in a process; whatever becomes of the process, there is a row."""
    context = context or _context()
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "output"
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(there, entry, str(log)), daemon=True)
        process.start()
        there.close()
        try:
            row = _await(here, process, entry, timeout, log)
        finally:
            if process.is_alive():
                process.kill()
            process.join()
            here.close()
    row.seconds["total"] = round(time.monotonic() - begin, 3)
    return row


def _await(here: Connection, process: Any, entry: Entry, timeout: float, log: Path) -> Row:
    try:
        if not here.poll(timeout):
            row = Row.of(entry, "timed out", f"no result within {timeout:g} s")
            row.judge()
            return row
        received: Row = here.recv()
        process.join(GRACE)
        return received
    except EOFError:
        process.join(GRACE)
        row = Row.of(entry, "crashed", _last_words(process.exitcode, log))
        row.judge()
        return row


def _last_words(code: int | None, log: Path) -> str:
    """How a process ended, and what it last said of itself."""
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    lines = [line for line in lines if line.startswith("Fatal")] or lines
    how = f"exit code {code}"
    if code is not None and code < 0:
        how = signal.Signals(-code).name
    return f"{how}; {lines[-1]}" if lines else how


def _work(there: Connection, entry: Entry, log: str) -> None:
    """In the process: measure, and send the row."""
    import faulthandler

    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 1)  # libraries talk
    os.dup2(descriptor, 2)
    faulthandler.enable()
    from .measure import measure

    there.send(measure(entry))
    there.close()


def _context() -> Any:
    if "forkserver" not in mp.get_all_start_methods():
        return mp.get_context("spawn")
    context: Any = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context
