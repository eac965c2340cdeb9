"""How much memory a piece of code needs at its worst, and when.

On the CPU every allocation and release that torch's allocator reports is added up in the order of
time, which makes the figure exact and equal from run to run; what libraries take for themselves
(oneDNN's scratch, the interpreter) is not torch's and not counted. On CUDA the caching allocator
keeps the statistics itself.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch

from .text import amount

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Peak:
    """What a run took above what was allocated before it, in bytes; print it.

    Attributes:
        peak: at its highest.
        end: what was still there when it returned, its result included.
        device: where.
        timeline: ``(seconds, bytes)`` after each change, from the beginning; empty on CUDA.
    """

    peak: int
    end: int
    device: str = "cpu"
    timeline: tuple[tuple[float, int], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{amount(self.peak)} at the highest, {amount(self.end)} at the end ({self.device})"

    def plot(self, path: str | Path | None = None, **others: Peak) -> Figure:
        """Bytes over time, of this run and of others by their names.

        Args:
            path: where to write the picture, as ``.png``, ``.svg`` or ``.pdf``.
            others: further runs, with underscores for spaces in their names.

        Raises:
            OptionError: matplotlib is not installed, or a run was on CUDA.
        """
        from .peak_chart import plot

        return plot(self, others, path)


def peak(run: Callable[[], Any], device: torch.device | str = "cpu") -> Peak:
    """Run something and measure the most memory that it has allocated at any time.

    ::

        print(re2fx.peak(lambda: model(x).sum().backward()))

    Gradients that a backward makes count; clear them before, or fill them before to leave them out.
    The first run of a process may allocate more than those that follow, so let one go ahead.

    Args:
        run: called once.
        device: whose memory; what is on others is not counted.
    """
    device = torch.device(device)
    gc.collect()
    return _on_cuda(run, device) if device.type == "cuda" else _on_cpu(run)


def _on_cuda(run: Callable[[], Any], device: torch.device) -> Peak:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = run()
    torch.cuda.synchronize(device)
    highest, end = torch.cuda.max_memory_allocated(device), torch.cuda.memory_allocated(device)
    del result
    return Peak(highest - before, end - before, str(device))


def _on_cpu(run: Callable[[], Any]) -> Peak:
    from torch.profiler import ProfilerActivity, profile

    with profile(
        activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profiler:
        result = run()
    events = profiler.profiler.kineto_results.events()
    del result
    changes = [(event.start_ns(), event.nbytes()) for event in events if _is_on_cpu(event)]
    changes.sort(key=lambda change: change[0])
    return _summed(changes)


def _is_on_cpu(event: Any) -> bool:
    """Whether it is an allocation or a release there."""
    return event.name() == "[memory]" and str(event.device_type()) == "DeviceType.CPU"


def _summed(changes: Iterable[tuple[int, int]]) -> Peak:
    """Of changes in the order of time; those of one moment stay in the order they were told."""
    changes = list(changes)
    if not changes:
        return Peak(0, 0)
    first = changes[0][0]
    sizes = list(accumulate(size for _, size in changes))
    seconds = ((moment - first) / 1e9 for moment, _ in changes)
    return Peak(max(0, *sizes), sizes[-1], "cpu", tuple(zip(seconds, sizes, strict=True)))
