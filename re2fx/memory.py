"""What a forward keeps alive for its backward, as exact numbers.

Two independent readings. `live_bytes` asks the allocator: everything allocated by a call and still
alive while its result is held, whoever holds it. `saved_bytes` asks autograd and the executor: the
storages they keep, each counted once, parameters and buffers left out. They differ by the result
itself and by what Python objects hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from .program import record


@dataclass(frozen=True)
class Saved:
    """Bytes kept for the backward.

    Attributes:
        chains: per reversible chain call, bytes kept by the executor.
        outside: bytes kept by autograd outside the chains.
        checkpoints: per checkpoint frame, bytes that it keeps and no chain does.
    """

    chains: tuple[int, ...]
    outside: int
    checkpoints: tuple[int, ...] = ()

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self.chains) + sum(self.checkpoints) + self.outside


def saved_bytes(run: Callable[[], Any], model: nn.Module) -> Saved:
    """Run a forward and count what is kept for its backward.

    Args:
        run: calls the model and returns its output.
        model: its parameters and buffers are not counted.
    """
    kept: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    seen = {storage_key(t) for t in (*model.parameters(), *model.buffers())}
    with record() as calls, saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    chains = tuple(_count(call.kept(), seen) for call in calls)
    checkpoints = tuple(_count(call.kept(), seen) for call in calls.checkpoints)
    outside = _count(kept, seen)
    del result
    return Saved(chains, outside, checkpoints)


def live_bytes(run: Callable[[], Any]) -> int:
    """Bytes a call has allocated on the CPU and not freed while its result is held."""
    from torch.profiler import ProfilerActivity, profile

    with profile(
        activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profiler:
        result = run()
    results = profiler.profiler.kineto_results
    total = sum(event.nbytes() for event in results.events() if event.name() == "[memory]")
    del result
    return int(total)


def _count(tensors: Iterable[torch.Tensor], seen: set[int]) -> int:
    """Bytes of the storages not seen before; marks them as seen."""
    total = 0
    for tensor in tensors:
        key = storage_key(tensor)
        if key not in seen:
            seen.add(key)
            total += tensor.untyped_storage().nbytes()
    return total


def storage_key(tensor: torch.Tensor) -> int:
    """Tells storages apart while they are alive, those of fake tensors too, which have no data."""
    return int(tensor.untyped_storage()._cdata)
