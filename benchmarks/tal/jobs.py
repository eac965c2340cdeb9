"""A comparison by several processes of one thread each, for machines of a few CPU cores.

Every stage writes files and skips what is there, so the processes need not talk: first each
backbone is made ready by one of them, then the runs are shared out.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import torch

from .compare import Comparison
from .entries import ENTRIES
from .setting import VALIDATION


def run(comparison: Comparison, jobs: int, say: Callable[[str], None]) -> None:
    """Make all files that a comparison reads.

    Args:
        comparison: its videos are there.
        jobs: processes at the same time.
        say: is told what is done.
    """
    parts = [replace(comparison, backbones=[name]) for name in comparison.backbones]
    runs = [
        replace(part, localizers=[localizer], entries=[entry], seeds=[seed])
        for part in parts
        for seed in comparison.seeds
        for localizer in comparison.localizers
        for entry in comparison.entries
    ]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, torch.set_num_threads, (1,)) as pool:
        for work, given in ((_prepare, parts), (_train, runs)):
            _told(pool.map(work, given), say)


def _told(found: Iterable[list[str]], say: Callable[[str], None]) -> None:
    for words in found:
        for line in words:
            say(line)


def _prepare(comparison: Comparison) -> list[str]:
    """Pretrain and finetune one backbone, and extract its features."""
    words: list[str] = []
    (name,) = comparison.backbones
    stages = comparison.stages(name, None, words.append)
    for entry in comparison.entries:
        if ENTRIES[entry].trained:
            stages.finetune(ENTRIES[entry])
    if not all(ENTRIES[entry].trained for entry in comparison.entries):
        for subset in ("training", VALIDATION):
            stages.features(subset)
    return words


def _train(comparison: Comparison) -> list[str]:
    """One run of one localizer."""
    words: list[str] = []
    (name,), (localizer,) = comparison.backbones, comparison.localizers
    (entry,), (seed,) = comparison.entries, comparison.seeds
    comparison.stages(name, None, words.append).train(ENTRIES[entry], localizer, seed)
    return [f"{name}: {line}" for line in words]
