"""Real ranks over loopback, each a process of its own, for many small jobs at a time."""

from __future__ import annotations

import datetime
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn

Job = Callable[[int, int], Any]


def run_jobs(jobs: Mapping[str, Job], ranks: int, folder: Path) -> list[dict[str, Any]]:
    """Run each job on every rank of one group.

    Args:
        jobs: ``job(rank, ranks)`` by name; importable functions.
        ranks: how many processes.
        folder: an empty one, for the rendezvous and what comes back.

    Returns:
        per rank, what each job returned, or the error it raised as ``"Type: message"``.
    """
    spawn(work, (dict(jobs), ranks, str(folder)), nprocs=ranks)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(ranks)]


def work(rank: int, jobs: dict[str, Job], ranks: int, folder: str) -> None:
    """One rank."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=ranks,
        timeout=datetime.timedelta(seconds=60),
    )
    results: dict[str, Any] = {}
    try:
        for name, job in jobs.items():
            try:
                results[name] = job(rank, ranks)
            except Exception as error:
                inner = getattr(error, "inner_exception", error)
                results[name] = f"{type(inner).__name__}: {inner}"
                results[f"{name}, traceback"] = traceback.format_exc()
            finally:
                torch.compiler.reset()
                dist.barrier()
        torch.save(results, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def whole(value: Tensor | None) -> Tensor | None:
    """A tensor of one's own, gathered if it is sharded."""
    if value is None:
        return None
    full: Tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
    return full.detach().clone()
