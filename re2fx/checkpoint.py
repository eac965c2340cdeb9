"""Checkpoint frames: what lies outside the chains, kept as its inputs and run again.

The mechanism is the executor's: the forward builds the ordinary graph with handles in place of what
it would save, and the first of them that a backward asks for runs the nodes again. What a block of
a chain reconstructs, a checkpoint has kept: its inputs. Batch norms move their statistics once,
unlike in ``torch.utils.checkpoint``. No FX in here.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils import _pytree as pytree

from .body import Body
from .kept import recall, remember, tensors_of
from .rerun import Again, Trace, check_version
from .runtime import check_transforms


@dataclass(frozen=True)
class Checkpoint:
    """Nodes that are run again from their inputs.

    Attributes:
        body: what is run.
        name: for messages.
    """

    body: Body
    name: str


class CheckpointCall:
    """One forward call of one checkpoint frame.

    Args:
        root: holds the members its nodes read.
        frame: what is run.
    """

    def __init__(self, root: Any, frame: Checkpoint) -> None:
        check_transforms()
        self.root, self.frame = root, frame
        self._inputs: list[Any] = []
        self._trace: Trace | None = None
        self._agains: dict[int, Again] = {}
        self._lock = threading.RLock()

    def run(self, inputs: Sequence[Any]) -> list[Any]:
        """Run it and keep its inputs."""
        self._inputs = remember(inputs)
        tensors = (x for x in pytree.tree_leaves(inputs) if isinstance(x, torch.Tensor))
        device = next((tensor.device for tensor in tensors), torch.device("cpu"))
        self._trace = Trace(self.frame.body, device)
        return self._trace.run(self.root, inputs, self, 0)

    def unpack(self, block: int, slot: int) -> torch.Tensor:
        """The tensor that would have been saved in a slot; runs again what is needed for it."""
        task = torch._C._current_graph_task_id()
        with self._lock:
            again = self._again(task)
            tensor, version = again.take(slot)
            if again.exhausted:
                self._agains.pop(task, None)
        check_version(tensor, version, self.frame.name)
        return tensor

    def lost(self, block: int) -> None:
        """The graph has let go of a handle; nothing depends on it here."""

    def kept(self) -> Iterator[torch.Tensor]:
        """Every tensor the call keeps: inputs, generator states, buffer copies."""
        yield from tensors_of(self._inputs)
        if self._trace is not None:
            yield from self._trace.kept()

    def _again(self, task: int) -> Again:
        """The rerun of the running backward; one of its own for an access outside of any."""
        if task in self._agains:
            return self._agains[task]
        assert self._trace is not None, "handles are made by the first run"
        again = Again(
            self._trace, self.root, recall(self._inputs, self.frame.name), self.frame.name
        )
        if task != -1:
            self._agains[task] = again
            engine = torch.autograd.Variable._execution_engine
            engine.queue_callback(partial(_forget, weakref.ref(self), task))
        return again


def _forget(call: weakref.ref[CheckpointCall], task: int) -> None:
    """The end of a backward; the call itself may have gone with the graph."""
    alive = call()
    if alive is not None:
        alive._agains.pop(task, None)
