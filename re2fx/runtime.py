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
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from .body import Body
from .coupling import Coupling
from .drift import Drift
from .errors import ReplayError, StoredOnlyError, StreamError
from .gauge import Gauge
from .kept import Anchor, Held, recall, remember, state_of, tensors_of
from .layout import Relayout, restrided
from .replay import Lookup
from .rerun import Again, Trace, check_version
from .wiring import DRIFT_TOLERANCE

Function = Callable[..., Any]


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
        body: the branch in parts, some of them run slice by slice; one part by default.
        stored: whether ordinary autograd keeps what the branch saves; the same must hold for all
            blocks behind it.
        checkpoint: whether the state in front of it is kept instead of reconstructed: nothing that
            its branch makes behind the last tensor that it saves need be made again.
    """

    branch: Function
    coupling: Coupling
    lookup: Lookup
    name: str
    anchored: frozenset[torch.dtype] = frozenset()
    tolerance: float = DRIFT_TOLERANCE
    body: Body | None = None
    stored: bool = False
    checkpoint: bool = False

    def parts(self, sides: int) -> Body:
        """What is run, with so many side inputs."""
        return self.body or Body.whole(self.branch, 1 + sides, self.lookup)


Frame = Reverse | Relayout


@dataclass
class Record:
    """What one frame of one call remembers."""

    frame: Frame
    sides: list[Any]
    trace: Trace | None = None
    needs_grad: bool = False
    strides: tuple[int, ...] = ()
    lost: torch.Tensor | None = None
    shapes: list[torch.Size] = field(default_factory=list)
    anchor: Anchor | None = None
    before: Held | None = None
    draw: torch.Tensor | None = None


@dataclass
class Walk:
    """How far one backward has walked: the pair in front of record ``front``.

    Attributes:
        again: the block that is being brought back, ``block``; the walk is behind it until its
            result is there.
    """

    front: int
    current: torch.Tensor
    previous: torch.Tensor | None
    block: int = -1
    again: Again | None = None
    drift: Drift = field(default_factory=Drift)


class ChainCall:
    """One forward call of one chain.

    Args:
        root: holds the members its branches read.
        start: ``p_1``, the chain's input.
        before: ``p_0`` if it is another value, as behind a graph break.

    Attributes:
        records: per block and link what is needed to run it again.
        states: the last two of the stream, ``(p_n, p_{n-1})``, detached; set by `leave`. As a
            backward frees the graph they move along with it, and the records behind them go; in
            front of the first block there is no second one.
        recorded: whether somebody else looks at the call, so that its states stay where they are.
    """

    def __init__(self, root: Any, start: torch.Tensor, before: torch.Tensor | None = None) -> None:
        check_transforms()
        self.root = root
        self.records: list[Record] = []
        self.states: tuple[torch.Tensor, torch.Tensor | None] | None = None
        self._front = 0  # the record that the states lie in front of
        self._streams: tuple[torch.Tensor, torch.Tensor] | None = (
            start,
            start if before is None else before,
        )
        self._coupling: Coupling | None = None
        self._gauge = Gauge()
        self._walks: dict[int, Walk] = {}
        self._alive: list[int] = []  # per record, handles in the autograd graph
        self.recorded = False
        self._lock = threading.RLock()

    @property
    def coupling(self) -> Coupling:
        """Of its first block; all of them carry their states alike."""
        assert self._coupling is not None, "every chain has blocks"
        return self._coupling

    @property
    def output(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The numbers of the last two stream states, once the chain has ended."""
        if self.states is None:
            return None
        current, previous = self.states
        assert previous is not None, "the states of a recorded call do not move"
        decode = self.coupling.decode
        return decode(current), decode(previous)

    @property
    def streams(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The current ``(p_i, p_{i-1})`` of a call that has not ended."""
        assert self._streams is not None, "the chain has ended"
        return self._streams

    # forward

    def block(self, frame: Reverse, sides: Sequence[Any]) -> torch.Tensor:
        """Run one block and return ``p_{i+1}``."""
        self._coupling = self._coupling or frame.coupling
        if frame.stored and torch.is_grad_enabled():
            return self._store(frame, sides)
        current, previous = self.streams
        index = len(self.records)
        record = Record(frame, remember(sides), None, current.requires_grad, current.stride())
        if index and current.dtype.to_real() in frame.anchored:
            record.anchor = Anchor.of(current, previous)
        elif index and frame.checkpoint:
            record.before = Held.of(previous)
        self._append(record)
        record.trace = Trace(frame.parts(len(sides)), current.device)
        (branch,) = record.trace.run(self.root, [current, *sides], self, index)
        self._alive[index] += len(record.trace.saved)
        record.draw = frame.coupling.draw(current)
        following, lost = frame.coupling.advance(
            current, previous, branch, record.draw, self._gauge, frame.name
        )
        if index and record.before is None:  # else what lies before it is not reconstructed
            record.lost = lost
        return self._follow(frame, following)

    def _append(self, record: Record) -> None:
        self.records.append(record)
        self._alive.append(0)

    def _store(self, frame: Reverse, sides: Sequence[Any]) -> torch.Tensor:
        """Run one of the last blocks as it is written; what is undone ends in front of it."""
        self._end()
        current, previous = self.streams
        branch = frame.branch(self.root, current, *sides)
        draw = frame.coupling.draw(current)
        following, _ = frame.coupling.advance(
            current, previous, branch, draw, self._gauge, frame.name
        )
        return self._follow(frame, following)

    def _follow(self, frame: Reverse, following: torch.Tensor) -> torch.Tensor:
        """Go on with the next state of the stream."""
        current, _ = self.streams
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
        if self.states is None:
            self._append(record)
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
        yield from (state for state in self.states or () if state is not None)
        for record in self.records:
            yield from tensors_of(record.sides)
            if record.anchor is not None:
                yield from (record.anchor.current.tensor, record.anchor.previous.tensor)
            if record.before is not None:
                yield record.before.tensor
            if record.draw is not None:
                yield record.draw
            if record.trace is not None:
                yield from record.trace.kept()
            if record.lost is not None:
                yield record.lost

    def leave(self) -> None:
        """End the forward: keep the last two stream states and nothing else."""
        self._end()
        self._gauge.settle()
        self._streams = None

    def _end(self) -> None:
        """Keep the states behind the blocks that are undone."""
        if self.states is None:
            current, previous = self.streams
            self.states, self._front = (current.detach(), previous.detach()), len(self.records)

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
            if walk.again is None or walk.block != block:
                self._bring_back(walk, block)
            assert walk.again is not None, "what was brought back"
            tensor, version = walk.again.take(slot)
            if walk.front > block and (walk.again.complete or not walk.again.wanted):
                with torch.no_grad():
                    self._step_back(walk)
                self._let_go(walk)
            if walk.again.exhausted:
                walk.again = None
        check_version(tensor, version, self._name(block))
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
                self._step_back(walk)
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
        with self._lock, torch.no_grad():
            again = self._again(index, restrided(stream, self.records[index].strides), wanted=True)
            result: torch.Tensor = again.result(collect=True)[0]
            return result

    def _start(self) -> Walk:
        if self.states is None:
            raise ReplayError(
                "a gradient was asked for inside the forward of a chain that has not ended; use "
                "memory='store' for models that differentiate inside their forward"
            )
        return Walk(self._front, *self.states)

    def _walk_of(self, task: int) -> Walk:
        """The walk of the running backward; one of its own for an access outside of any."""
        if task == -1:
            return self._start()
        if task not in self._walks:
            self._walks[task] = self._start()
            engine = torch.autograd.Variable._execution_engine
            engine.queue_callback(partial(ChainCall._forget, weakref.ref(self), task))
            engine.queue_callback(self._walks[task].drift.settle)
        return self._walks[task]

    @staticmethod
    def _forget(call: weakref.ref[ChainCall], task: int) -> None:
        """The end of a backward; the call itself may have gone with the graph."""
        alive = call()
        if alive is not None:
            alive._walks.pop(task, None)

    def lost(self, block: int) -> None:
        """The graph has let go of a handle of a block."""
        self._alive[block] -= 1

    def _let_go(self, walk: Walk) -> None:
        """Keep the pair that a walk has come to instead of the last one.

        Unless somebody can still ask for what lies between them: of a block in front of which the
        walk stands, whose input it has, even that does no harm.
        """
        front = walk.front
        if not self.recorded and len(self._walks) == 1 and not any(self._alive[front + 1 :]):
            self.states, self._front = (walk.current, walk.previous), front
            del self.records[front + 1 :], self._alive[front + 1 :]

    def _bring_back(self, walk: Walk, block: int) -> None:
        """Walk to a block and collect what it saves, from the end again if it was passed.

        A backward that reads a tensor a second time finds the walk in front of its block: the
        branch is run again, nothing else.
        """
        if walk.front < block:
            fresh = self._start()
            walk.front, walk.current, walk.previous = fresh.front, fresh.current, fresh.previous
            walk.again = None
        with torch.no_grad():
            if walk.front == block:
                walk.block, walk.again = block, self._again(block, walk.current)
                return
            self._skip_to_anchor(walk, block)
            while walk.front > block + 1:
                self._step_back(walk)
            self._begin(walk)

    def _begin(self, walk: Walk) -> None:
        """Prepare to run the block in front of the walk again, as far as it is asked for."""
        index = walk.front - 1
        record = self.records[index]
        assert walk.previous is not None, "nothing lies before the first block"
        walk.previous = restrided(walk.previous, record.strides)
        # Autograd runs later blocks first, so what they collected and nobody asked for can go.
        walk.again = None
        wanted = index > 0 and record.anchor is None and record.before is None
        walk.block, walk.again = index, self._again(index, walk.previous, wanted)

    def _again(self, index: int, stream: torch.Tensor, wanted: bool = False) -> Again:
        """A block's branch on its reconstructed input."""
        record, name = self.records[index], self._name(index)
        assert isinstance(record.frame, Reverse), "only blocks have a branch"
        assert record.trace is not None, "every block has been run"
        stream = stream.detach().requires_grad_(record.needs_grad)
        inputs = [stream, *recall(record.sides, name)]
        # Recording gradients may choose another kernel, so an exact rerun records as the first did.
        return Again(record.trace, self.root, inputs, name, wanted, record.frame.coupling.exact)

    def _skip_to_anchor(self, walk: Walk, block: int) -> None:
        """Go on from the nearest anchor behind a block, if that is nearer than where one is."""
        for front in range(block + 1, walk.front):
            anchor = self.records[front].anchor
            if anchor is not None:
                walk.front, walk.again = front, None
                walk.current, walk.previous = anchor.pair(self._name(front))
                return

    def _step_back(self, walk: Walk, collect: bool = False) -> None:
        """From the pair behind a record to the pair before it.

        Args:
            walk: what moves.
            collect: whether a branch that has not been brought back records gradients, too.
        """
        record, frame = self.records[walk.front - 1], self.records[walk.front - 1].frame
        assert walk.previous is not None, "nothing lies before the first block"
        if isinstance(frame, Relayout):
            walk.front, walk.again = walk.front - 1, None
            undo = partial(frame.undo, self.root, record.shapes)
            walk.current, walk.previous = undo(walk.current), undo(walk.previous)
            return
        if walk.again is None or walk.block != walk.front - 1:
            self._begin(walk)
        assert walk.again is not None, "what has begun"
        following, walk.current, walk.previous = walk.current, walk.previous, None
        walk.front -= 1
        if record.anchor is not None:
            name, found = self._name(walk.front), walk.current
            walk.current, walk.previous = record.anchor.pair(name)
            walk.drift.note(name, frame.tolerance, found, walk.current)
        elif record.before is not None:
            walk.previous = state_of(record.before, self._name(walk.front))
        elif walk.front > 0:
            (branch,) = walk.again.result(collect)
            walk.previous = frame.coupling.retreat(
                following, walk.current, branch, record.draw, record.lost, walk.again.spare
            )

    def _name(self, index: int) -> str:
        frame = self.records[index].frame
        return frame.name if isinstance(frame, Reverse) else "a shape-only link"


def check_transforms() -> None:
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
