"""The reversible executor: a checkpoint that never saves its input.

The forward builds the ordinary autograd graph, but under saved-tensor hooks: whatever a branch
wants to keep for its backward is dropped and replaced by a handle. After the chain only its last
two stream states are kept, detached::

    forward, block i     remember RNG, autocast, buffers;  under hooks  f = F_i(p_i)
                         p_{i+1} = a p_i + b p_{i-1} + c f
                         at an anchor also keep (p_i, p_{i-1}), detached

The first handle of block i that the backward asks for brings the block back::

    unpack in block i    walk to the pair (p_{i+1}, p_i), which block i+1 left behind;
                         run f = F_i(p_i) again, collecting what it saves;
                         leave behind p_{i-1} = (p_{i+1} - a p_i - c f) / b, or what is anchored

One rerun serves both the inversion and the gradient. Because the graph is the ordinary one, hooks,
shared weights, DDP, FSDP, partial and double backward work as they do without re2fx.

Invariants:
    - Handles hold the call, the call holds the frames, and nothing points back: the autograd graph
      owns everything, and it all goes when the graph goes.
    - What a frame or a rerun keeps is detached at once. A collected tensor's ``grad_fn`` would hold
      the hooks, which hold the tensor: a cycle no garbage collector sees.
    - State of a backward lives under the id of its graph task and ends with it, so a second
      backward, or one in another thread, walks on its own.

Not optimal: unpacking blocks in forward order (as double backward does) walks from the end again
for each; the last two states stay alive until the graph is freed.

After Gomez et al., The Reversible Residual Network (2017), and torch.utils.checkpoint's
non-reentrant form, whose frame and holder design this follows. No FX in here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from .coupling import Coupling
from .drift import Drift
from .errors import ReplayError, StoredOnlyError, StreamError
from .gauge import Gauge
from .kept import Anchor, recall, remember, tensors_of
from .layout import Relayout, restrided
from .replay import Ambient, Lookup
from .wiring import DRIFT_TOLERANCE

Function = Callable[..., Any]
Meta = tuple[torch.Size, torch.dtype, torch.device]


@dataclass(frozen=True)
class Reverse:
    """A block of a chain: what to run, and how to undo it.

    Attributes:
        branch: ``branch(root, p, *sides) -> f``.
        coupling: the effective coefficients.
        lookup: finds the parameters and buffers the branch uses.
        name: the source line of the residual, for messages.
        anchored: dtypes of streams for which the pair in front of the block is kept.
        tolerance: relative error that a reconstructed state may have.
    """

    branch: Function
    coupling: Coupling
    lookup: Lookup
    name: str
    anchored: frozenset[torch.dtype] = frozenset()
    tolerance: float = DRIFT_TOLERANCE


Frame = Reverse | Relayout


class _Enough(Exception):
    """Everything a rerun was for is there."""


class Handle:
    """Stands in the autograd graph for a tensor that was not saved."""

    __slots__ = ("block", "call", "slot")

    def __init__(self, call: ChainCall, block: int, slot: int) -> None:
        self.call, self.block, self.slot = call, block, slot


def _unpack(packed: Any) -> torch.Tensor:
    return packed.call.unpack(packed.block, packed.slot) if type(packed) is Handle else packed


def _meta(tensor: torch.Tensor) -> Meta:
    return tensor.shape, tensor.dtype, tensor.device


@dataclass
class Record:
    """What one frame of one call remembers."""

    frame: Frame
    sides: list[Any]
    ambient: Ambient | None = None
    needs_grad: bool = False
    strides: tuple[int, ...] = ()
    saved: list[Meta] = field(default_factory=list)
    lost: torch.Tensor | None = None
    recorded: bool = True
    shapes: list[torch.Size] = field(default_factory=list)
    anchor: Anchor | None = None
    draw: torch.Tensor | None = None


@dataclass
class Walk:
    """How far one backward has walked: the pair in front of record ``front``.

    ``whole`` runs the first block's branch to its end too, for those who want its result.
    """

    front: int
    current: torch.Tensor
    previous: torch.Tensor | None
    saved: dict[int, dict[int, tuple[torch.Tensor, int]]] = field(default_factory=dict)
    whole: bool = False
    drift: Drift = field(default_factory=Drift)


class ChainCall:
    """One forward call of one chain.

    Args:
        root: holds the members its branches read.
        start: ``p_1``, the chain's input.
        before: ``p_0`` if it is another value, as behind a graph break.

    Attributes:
        records: per block and link what is needed to run it again.
        states: the last two of the stream, ``(p_n, p_{n-1})``, detached; set by `leave`.
    """

    def __init__(self, root: Any, start: torch.Tensor, before: torch.Tensor | None = None) -> None:
        _check_transforms()
        self.root = root
        self.records: list[Record] = []
        self.states: tuple[torch.Tensor, torch.Tensor] | None = None
        self._streams: tuple[torch.Tensor, torch.Tensor] | None = (
            start,
            start if before is None else before,
        )
        self._gauge = Gauge()
        self._walks: dict[int, Walk] = {}
        self._lock = threading.RLock()

    @property
    def coupling(self) -> Coupling:
        """Of its first block; all of them carry their states alike."""
        return next(r.frame.coupling for r in self.records if isinstance(r.frame, Reverse))

    @property
    def output(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The numbers of the last two stream states, once the chain has ended."""
        if self.states is None:
            return None
        current, previous = map(self.coupling.decode, self.states)
        return current, previous

    @property
    def streams(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The current ``(p_i, p_{i-1})`` of a call that has not ended."""
        assert self._streams is not None, "the chain has ended"
        return self._streams

    # forward

    def block(self, frame: Reverse, sides: Sequence[Any]) -> torch.Tensor:
        """Run one block and return ``p_{i+1}``."""
        current, previous = self.streams
        index = len(self.records)
        record = Record(frame, remember(sides), None, current.requires_grad, current.stride())
        record.recorded = torch.is_grad_enabled()
        record.ambient = Ambient(self.root, frame.lookup, current.device)
        if index and current.dtype.to_real() in frame.anchored:
            record.anchor = Anchor.of(current, previous)
        self.records.append(record)

        def pack(tensor: torch.Tensor) -> Any:
            if isinstance(tensor, nn.Parameter):
                return tensor
            record.saved.append(_meta(tensor))
            return Handle(self, index, len(record.saved) - 1)

        with saved_tensors_hooks(pack, _unpack), record.ambient.observers.noted(record.saved):
            branch = frame.branch(self.root, current, *sides)
        record.ambient.settle(self.root)
        record.draw = frame.coupling.draw(current)
        following, lost = frame.coupling.advance(
            current, previous, branch, record.draw, self._gauge, frame.name
        )
        record.lost = lost if index else None  # nothing lies before the first block
        assert isinstance(following, torch.Tensor)
        if following.shape != current.shape or following.dtype != current.dtype:
            raise StreamError(
                f"{frame.name}: the residual turns a stream of {tuple(current.shape)} "
                f"{current.dtype} into {tuple(following.shape)} {following.dtype}; a reversible "
                "stream keeps its shape and type. Keep this block out of the chain, or use "
                "memory='store'."
            )
        self._streams = (following, current)
        return following

    def relayout(
        self, frame: Relayout, sides: Sequence[Any]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Apply shape-only operations to both streams; return the states after each."""
        record = Record(frame, [])
        self.records.append(record)
        current, previous = self.streams
        currents, previouses = [], []
        for _, function, number in frame.operations:
            own, sides = sides[:number], sides[number:]
            record.shapes.append(current.shape)
            current, previous = (function(self.root, p, *own) for p in (current, previous))
            currents.append(current)
            previouses.append(previous)
        self._streams = (current, previous)
        return currents, previouses

    def kept(self) -> Iterator[torch.Tensor]:
        """Every tensor the call keeps: streams, side inputs, generator states, buffer copies."""
        yield from self.states or ()
        for record in self.records:
            yield from tensors_of(record.sides)
            if record.anchor is not None:
                yield from (record.anchor.current.tensor, record.anchor.previous.tensor)
            if record.draw is not None:
                yield record.draw
            if record.ambient is not None:
                yield from record.ambient.generators.states if record.ambient.generators else ()
                yield from record.ambient.earlier.values()
            if record.lost is not None:
                yield record.lost

    def leave(self) -> None:
        """End the forward: keep the last two stream states and nothing else."""
        current, previous = self.streams
        self._gauge.settle()
        self.states = (current.detach(), previous.detach())
        self._streams = None

    def abandon(self) -> None:
        """End a forward that raised.

        The streams hold the autograd graph, which holds this call: a cycle that nobody collects.
        """
        self._streams = None

    # backward

    def unpack(self, block: int, slot: int) -> torch.Tensor:
        """The tensor a branch would have saved; brings its block back if need be."""
        task = torch._C._current_graph_task_id()
        with self._lock:
            walk = self._walk_of(task)
            if slot not in walk.saved.get(block, ()):
                self._bring_back(walk, block)
            tensor, version = walk.saved[block].pop(slot)
        if tensor._version != version:
            raise ReplayError(
                f"{self._name(block)}: one of the variables needed for gradient computation has "
                f"been modified by an inplace operation in the branch: a tensor of "
                f"{tuple(tensor.shape)} is at version {tensor._version}, expected {version}"
            )
        return tensor

    def reconstruct(self) -> torch.Tensor:
        """The chain's input, from its output alone, or from its first anchor.

        Returns:
            a detached tensor of the stream's shape and dtype, equal to the input up to rounding.
        """
        with self._lock, torch.no_grad():
            walk = self._start()
            self._skip_to_anchor(walk, 0)
            while walk.front > 1:
                self._step_back(walk, collect=False)
            assert walk.previous is not None, "only the first block has nothing before it"
            start: torch.Tensor = self.coupling.decode(walk.previous)
            return start

    def reconstructed(self) -> Iterator[tuple[int, torch.Tensor]]:
        """The inputs of the blocks as a backward finds them, from the last block to the first.

        Yields:
            the block's place among `records`, and the detached stream state its branch is rerun
            on; that of the last block is the stored one.
        """
        walk = self._start()
        while True:
            record, previous = self.records[walk.front - 1], walk.previous
            if isinstance(record.frame, Reverse):
                assert previous is not None, "nothing lies before the first block"
                yield walk.front - 1, restrided(previous, record.strides)
            if walk.front == 1:
                return
            with self._lock, torch.no_grad():
                self._step_back(walk, collect=True)

    def rerun(self, index: int, stream: torch.Tensor) -> torch.Tensor:
        """Run the branch of one block again as a backward does, on a stream state of one's own.

        Args:
            index: the block's place among `records`.
            stream: what the branch reads, of the shape and dtype it had in the forward.

        Returns:
            the branch's result, detached.
        """
        record = self.records[index]
        with self._lock, torch.no_grad():
            walk = Walk(index, stream, None, whole=True)
            return self._rerun(walk, record, restrided(stream, record.strides), collect=True)

    def _start(self) -> Walk:
        if self.states is None:
            raise ReplayError(
                "a gradient was asked for inside the forward of a chain that has not ended; use "
                "memory='store' for models that differentiate inside their forward"
            )
        return Walk(len(self.records), *self.states)

    def _walk_of(self, task: int) -> Walk:
        """The walk of the running backward; one of its own for an access outside of any."""
        if task == -1:
            return self._start()
        if task not in self._walks:
            self._walks[task] = self._start()
            engine = torch.autograd.Variable._execution_engine
            engine.queue_callback(partial(self._forget, task))
        return self._walks[task]

    def _forget(self, task: int) -> None:
        walk = self._walks.pop(task, None)
        if walk is not None:
            walk.drift.settle()

    def _bring_back(self, walk: Walk, block: int) -> None:
        """Walk to a block and collect what it saves, from the end again if it was passed.

        A backward that reads a tensor a second time finds the walk in front of its block: the
        branch is run again, nothing else.
        """
        if walk.front < block:
            fresh = self._start()
            walk.front, walk.current, walk.previous = fresh.front, fresh.current, fresh.previous
        with torch.no_grad():
            if walk.front == block:
                self._rerun(walk, self.records[block], walk.current, collect=True)
                return
            self._skip_to_anchor(walk, block)
            while walk.front > block + 1:
                self._step_back(walk, collect=False)
            self._step_back(walk, collect=True)

    def _skip_to_anchor(self, walk: Walk, block: int) -> None:
        """Go on from the nearest anchor behind a block, if that is nearer than where one is."""
        for front in range(block + 1, walk.front):
            anchor = self.records[front].anchor
            if anchor is not None:
                walk.front, walk.saved = front, {}
                walk.current, walk.previous = anchor.pair(self._name(front))
                return

    def _step_back(self, walk: Walk, collect: bool) -> None:
        """From the pair behind a record to the pair before it."""
        walk.front -= 1
        record = self.records[walk.front]
        current, previous = walk.current, walk.previous
        assert previous is not None, "nothing lies before the first block"
        if isinstance(record.frame, Relayout):
            undo = partial(record.frame.undo, self.root, record.shapes)
            walk.current, walk.previous = undo(current), undo(previous)
            return
        previous = restrided(previous, record.strides)
        # Autograd runs later blocks first, so what they collected and nobody asked for can go.
        walk.saved = {}
        branch = self._rerun(walk, record, previous, collect)
        if record.anchor is not None:
            name = self._name(walk.front)
            walk.current, walk.previous = record.anchor.pair(name)
            assert isinstance(record.frame, Reverse), "anchors are in front of blocks"
            walk.drift.note(name, record.frame.tolerance, previous, walk.current)
            return
        first = walk.front == 0
        walk.current = previous
        if first:
            walk.previous = None
            return
        retreat = record.frame.coupling.retreat
        walk.previous = retreat(current, previous, branch, record.draw, record.lost)

    def _rerun(
        self, walk: Walk, record: Record, stream: torch.Tensor, collect: bool
    ) -> torch.Tensor:
        """Run a branch again on its reconstructed input; collect what it saves if asked to."""
        assert record.ambient is not None, "only links have no surroundings"
        name = self._name(walk.front)
        record.ambient.check_members(self.root, name)
        sides = recall(record.sides, name)
        frame = record.frame
        assert isinstance(frame, Reverse), "only blocks have a branch"
        # Recording gradients may choose another kernel, so an exact rerun records as the first did.
        collect = collect or (frame.coupling.exact and record.recorded)
        stream = stream.detach().requires_grad_(record.needs_grad and collect)
        if not collect:
            with record.ambient.restored(record=False), torch.no_grad():
                result: torch.Tensor = frame.branch(self.root, stream, *sides)
                return result
        collected: dict[int, tuple[torch.Tensor, int]] = {}
        stop = (walk.front == 0 or record.anchor is not None) and not walk.whole

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if isinstance(tensor, nn.Parameter):
                return tensor
            tensor = tensor.detach()
            collected[len(collected)] = (tensor, tensor._version)
            if stop and len(collected) == len(record.saved):
                raise _Enough
            return tensor

        with (
            record.ambient.restored(record=True),
            torch.enable_grad(),
            saved_tensors_hooks(pack, lambda tensor: tensor),
        ):
            try:
                branch: torch.Tensor = frame.branch(self.root, stream, *sides)
            except _Enough:  # what lies before the block needs no result: nothing, or an anchor
                branch = stream
        _compare(record, collected, name)
        walk.saved = {walk.front: collected}
        return branch.detach()

    def _name(self, index: int) -> str:
        frame = self.records[index].frame
        return frame.name if isinstance(frame, Reverse) else "a shape-only link"


def _check_transforms() -> None:
    """Refuse a transform of torch.func that saves tensors: it does not run hooks on them.

    Raises:
        StoredOnlyError: before anything has run.
    """
    levels = torch._C._functorch.get_interpreter_stack() or ()
    if any(level.key() == torch._C._functorch.TransformType.Grad for level in levels):
        raise StoredOnlyError(
            "torch.func's grad, vjp, jacrev and hessian do not support the saved-tensor hooks by "
            "which a reversible network keeps nothing. Set memory='store' on the rewired module "
            "for this call (the same network and parameters), or use torch.autograd.grad; vmap and "
            "jvp work as it is."
        )


def _compare(record: Record, collected: dict[int, tuple[torch.Tensor, int]], name: str) -> None:
    """A rerun must save what the first run saved."""
    again = [_meta(tensor) for tensor, _ in collected.values()]
    if again != record.saved:
        raise ReplayError(
            f"{name}: the branch saved {len(record.saved)} tensors in the forward and "
            f"{len(again)} other ones when it was run again: it is not deterministic (does it read "
            "something that changes between calls?). Use memory='store' or make it deterministic."
        )
