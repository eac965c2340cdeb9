"""How a body is run a second time.

The first run (`Trace`) drops what autograd wants to keep and notes its shape. The second (`Again`)
brings back part by part and slice by slice what the backward asks for. A slice that was brought
back for its gradient leaves its result behind, so that nothing is run a third time for the result
of the whole, unless a later part needs that first. No FX in here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils import _pytree as pytree

from .body import Body, Function, Part
from .errors import ReplayError
from .replay import Ambient
from .summing import Summing, can_sum

Meta = tuple[torch.Size, torch.dtype, torch.device]
SMALL = 4096  # bytes
Saved = dict[int, tuple[torch.Tensor, int]]  # by slot, with the version


class Handle:
    """Stands in the autograd graph for a tensor that was not saved."""

    __slots__ = ("block", "call", "slot")

    def __init__(self, call: Any, block: int, slot: int) -> None:
        self.call, self.block, self.slot = call, block, slot

    def __del__(self) -> None:
        self.call.lost(self.block)


def unpacked(packed: Any) -> torch.Tensor:
    """What a handle stands for; other tensors were saved as they are."""
    if type(packed) is not Handle:
        return packed  # type: ignore[no-any-return]
    tensor: torch.Tensor = packed.call.unpack(packed.block, packed.slot)
    return tensor


@dataclass
class Span:
    """What the first run of a part noted.

    Attributes:
        ambient: the surroundings it ran in.
        begins: the first slot of each slice, and behind the last one.
        sizes: items per slice; empty if it was run whole.
        needs_grad: of each tensor in each of its results.
        summed: whether the gradients of weights that its slices read are summed in place.
        joined: shape and strides of the results of all its slices together.
    """

    ambient: Ambient
    begins: list[int]
    sizes: list[int] = field(default_factory=list)
    needs_grad: list[list[bool]] = field(default_factory=list)
    summed: bool = False
    joined: list[tuple[torch.Size, tuple[int, ...]]] = field(default_factory=list)


class Trace:
    """What the first run of a body leaves behind.

    Args:
        body: what is run.
        device: whose surroundings are remembered besides the CPU's.

    Attributes:
        saved: shape, dtype and device of what autograd wanted to keep, slot by slot.
        spans: one per part.
        kept_small: what is not worth making again.
        recorded: whether gradients were on.
    """

    def __init__(self, body: Body, device: torch.device) -> None:
        self.body, self.device = body, device
        self.saved: list[Meta] = []
        self.spans: list[Span] = []
        self.kept_small: list[torch.Tensor] = []
        self.recorded = torch.is_grad_enabled()

    def run(self, root: Any, inputs: Sequence[Any], call: Any, block: int) -> list[Any]:
        """Run it and keep nothing but handles.

        Args:
            root: holds the members it reads.
            inputs: its first values.
            call: brings a tensor back, ``call.unpack(block, slot)``, and is told when the graph
                lets go of one, ``call.lost(block)``.
            block: tells it which of its bodies this is.
        """
        self.body = self.body.fitting(inputs)
        values: list[Any] = [*inputs]
        for part, frees in zip(self.body.parts, self.body.frees, strict=True):
            reads = [values[place] for place in part.reads]
            span = Span(Ambient(root, part.lookup, self.device), [len(self.saved)])
            self.spans.append(span)
            with span.ambient.observers.noted(self.saved):
                results = self._run(part, span, root, reads, call, block)
            span.ambient.settle(root)
            span.needs_grad = [_needs_grad(result) for result in results]
            _put(values, part.writes, results)
            del reads, results
            for place in frees:
                values[place] = _MISSING
        return [values[place] for place in self.body.outputs]

    def _run(
        self, part: Part, span: Span, root: Any, reads: list[Any], call: Any, block: int
    ) -> list[Any]:
        small = self.cheap(len(self.spans) - 1)

        def pack(tensor: torch.Tensor) -> Any:
            if isinstance(tensor, nn.Parameter):
                return tensor
            if tensor.nbytes <= small:
                self.kept_small.append(tensor.detach())
                return self.kept_small[-1]
            self.saved.append(meta(tensor))
            return Handle(call, block, len(self.saved) - 1)

        slicing = part.slicing
        span.sizes = slicing.sizes(root, reads) if slicing is not None else []
        if slicing is None or not span.sizes:
            with saved_tensors_hooks(pack, unpacked):
                results = part.run(root, reads)
            span.begins.append(len(self.saved))
            return results
        rows = []
        span.summed = can_sum()
        summing = Summing() if span.summed else nullcontext()
        for row in slicing.cut(reads, span.sizes):
            with saved_tensors_hooks(pack, unpacked), summing:
                rows.append(slicing.function(root, *row))
            span.begins.append(len(self.saved))
        results = slicing.join(rows)
        span.joined = [(result.shape, result.stride()) for result in results]
        return results

    def cheap(self, number: int) -> int:
        """Up to how many bytes a tensor that a part saves is kept instead of made again.

        Behind slices a small one, such as the noise of a stochastic depth, would be dear: it would
        take all slices once more to come to it.
        """
        behind = any(self.body.parts[before].slicing is not None for before in range(number))
        return SMALL if behind else 0

    def place(self, slot: int) -> tuple[int, int]:
        """The part and the slice that saved something."""
        for number, span in enumerate(self.spans):
            for index, end in enumerate(span.begins[1:]):
                if slot < end:
                    return number, index
        raise AssertionError("every slot lies in a span")

    def kept(self) -> Iterator[torch.Tensor]:
        """The small tensors, generator states and buffer copies that it keeps."""
        yield from self.kept_small
        for span in self.spans:
            if span.ambient.generators is not None:
                yield from span.ambient.generators.states
            yield from span.ambient.earlier.values()


_watchers: list[Callable[[str], None]] = []


@contextmanager
def watching(watcher: Callable[[str], None]) -> Iterator[None]:
    """Be told the name of every frame that is brought back in here, by any thread."""
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)


class Enough(Exception):
    """Everything a rerun was for is there."""


class Again:
    """One body run a second time, as far as somebody asks for it.

    Args:
        trace: of the first run.
        root: holds the members it reads.
        inputs: detached, with the flags that the first run's inputs had.
        name: for messages.
        wanted: whether its result is wanted too.
        exact: whether whatever is run must be run as at first, recording gradients if it did.

    Attributes:
        saved: what was brought back and nobody has asked for yet.
    """

    def __init__(
        self,
        trace: Trace,
        root: Any,
        inputs: Sequence[Any],
        name: str,
        wanted: bool = False,
        exact: bool = False,
    ) -> None:
        self.trace, self.root, self.name, self.wanted = trace, root, name, wanted
        self.exact = exact and trace.recorded
        for watcher in _watchers:
            watcher(name)
        self.saved: Saved = {}
        self._left = set(range(len(trace.saved)))
        self._behind = len(trace.spans)  # parts in front of it may be run again for their gradient
        self._values: list[Any] = [*inputs]
        # By part, the results of slices laid together, and which are there.
        self._joined: dict[int, list[torch.Tensor]] = {}
        self._there: dict[int, set[int]] = {number: set() for number in range(len(trace.spans))}

    @property
    def exhausted(self) -> bool:
        """Whether everything has been asked for."""
        return not self._left

    @property
    def complete(self) -> bool:
        """Whether all that is dear for its result is there: every slice of every part."""
        spans = enumerate(self.trace.spans)
        return all(self._is_there(number) for number, span in spans if span.sizes or number == 0)

    @property
    def spare(self) -> bool:
        """Whether its result, once it was given away, is read by nobody else.

        What slices were laid together in is no tensor that autograd has saved.
        """
        parts = self.trace.body.parts
        return bool(self.trace.spans[-1].sizes) and parts[-1].writes == self.trace.body.outputs

    def take(self, slot: int) -> tuple[torch.Tensor, int]:
        """What the first run would have saved in a slot, and its version, brought back if need be.

        Everything that later parts and slices have saved goes: autograd runs them first.
        """
        if slot not in self.saved:
            number, index = self.trace.place(slot)
            begin = self.trace.spans[number].begins[index]
            self.saved = {key: value for key, value in self.saved.items() if key < begin}
            self._reach(number, collect=True)
            self._run(number, index, collect=True, stop=not self.wanted)
            self._behind = number + (index > 0)
            self._drop()
        self._left.discard(slot)
        return self.saved.pop(slot)

    def _drop(self) -> None:
        """Let go of what is read by nothing that is still to be run again.

        Should somebody ask for a tensor a second time, it is made once more.
        """
        if self.wanted:
            return
        parts = zip(self.trace.body.parts[: self._behind], self.trace.spans, strict=False)
        again = [part for part, span in parts if span.sizes or part.apart]
        read = {place for part in again for place in part.reads}
        for place in range(self.trace.body.inputs, len(self._values)):
            if place not in read:
                self._values[place] = _MISSING

    def result(self, collect: bool = False) -> list[Any]:
        """What the body returns, detached; it is not kept.

        Args:
            collect: whether what must be run records gradients, as for the gradient.
        """
        self._reach(len(self.trace.spans), collect)
        outputs = self.trace.body.outputs
        results = [_detached(self._values[place]) for place in outputs]
        self.wanted = False
        self._drop()
        return results

    def _is_there(self, number: int) -> bool:
        places = self.trace.body.parts[number].writes
        return len(self._values) > max(places, default=-1) and all(
            self._values[place] is not _MISSING for place in places
        )

    def _reach(self, number: int, collect: bool) -> None:
        """Have the results of all parts before one, and what they save unless run by slices."""
        for before in range(number):
            span = self.trace.spans[before]
            for index in range(max(1, len(span.sizes))):
                if not self._is_there(before) and index not in self._there[before]:
                    apart = self.trace.body.parts[before].apart
                    self._run(before, index, collect and not span.sizes and not apart)

    def _run(self, number: int, index: int, collect: bool, stop: bool = False) -> None:
        """Run one slice of a part, or all of it, and lay its results where others find them.

        With ``stop`` it ends when all that it saves is there.
        """
        part, span = self.trace.body.parts[number], self.trace.spans[number]
        reads = [self._values[place] for place in part.reads]
        if span.sizes:
            assert part.slicing is not None, "only what has a slicing was cut"
            reads = [_fresh(value) for value in part.slicing.cut(reads, span.sizes)[index]]
            function = part.slicing.function
        else:
            function = part.run
        results = self._again(function, reads, number, index, collect, stop)
        if results is None or self._is_there(number):
            return
        if span.sizes:
            self._lay(number, index, results)
            if len(self._there[number]) < len(span.sizes):
                return
            results = self._joined.pop(number)
            self._there[number] = set()
        flagged = map(_flagged, results, span.needs_grad)
        _put(self._values, part.writes, list(flagged))

    def _lay(self, number: int, index: int, results: Sequence[torch.Tensor]) -> None:
        """Put the results of a slice where they are in those of the whole part."""
        slicing, span = self.trace.body.parts[number].slicing, self.trace.spans[number]
        assert slicing is not None, "only what has a slicing was cut"
        if number not in self._joined:
            self._joined[number] = [
                value.new_empty_strided(*form)
                for value, form in zip(results, span.joined, strict=True)
            ]
        with torch.no_grad():
            slicing.lay(self._joined[number], results, span.sizes, index)
        self._there[number].add(index)

    def _again(
        self,
        function: Function,
        reads: Sequence[Any],
        number: int,
        index: int,
        collect: bool,
        stop: bool,
    ) -> Sequence[Any] | None:
        """The results of a rerun; None if what it was for came before them."""
        span = self.trace.spans[number]
        span.ambient.check_members(self.root, self.name)
        record = collect or self.exact
        expected = self.trace.saved[span.begins[index] : span.begins[index + 1]]
        found: list[tuple[torch.Tensor, int]] = []
        small = self.trace.cheap(number)

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if not isinstance(tensor, nn.Parameter) and tensor.nbytes > small:
                tensor = tensor.detach()
                found.append((tensor, tensor._version))
                if stop and len(found) == len(expected):
                    raise Enough
            return tensor

        with ExitStack() as stack:
            stack.enter_context(span.ambient.restored(record=record))
            stack.enter_context(torch.set_grad_enabled(record))
            if record:
                stack.enter_context(saved_tensors_hooks(pack, lambda tensor: tensor))
                stack.enter_context(Summing(pack) if span.summed else nullcontext())
            results: Sequence[Any] | None
            try:
                results = function(self.root, *reads) if span.sizes else function(self.root, reads)
            except Enough:
                results = None
        if record:
            compare(expected, [meta(tensor) for tensor, _ in found], self.name)
        if collect:
            begin = span.begins[index]
            self.saved.update({begin + i: noted for i, noted in enumerate(found)})
        return results


_MISSING = object()


def compare(expected: Sequence[Meta], again: Sequence[Meta], name: str) -> None:
    """A rerun must save what the first run saved.

    Raises:
        ReplayError: it saved other tensors.
    """
    if list(again) != list(expected):
        raise ReplayError(
            f"{name}: the branch saved {len(expected)} tensors in the forward and "
            f"{len(again)} other ones when it was run again: it is not deterministic (does it read "
            "something that changes between calls?). Use memory='store' or make it deterministic."
        )


def check_version(tensor: torch.Tensor, version: int, name: str) -> None:
    """Refuse a tensor that the backward of a branch wrote to.

    Raises:
        ReplayError: it is at another version than when it was brought back.
    """
    if tensor._version != version:
        raise ReplayError(
            f"{name}: one of the variables needed for gradient computation has "
            f"been modified by an inplace operation in the branch: a tensor of "
            f"{tuple(tensor.shape)} is at version {tensor._version}, expected {version}"
        )


def meta(tensor: torch.Tensor) -> Meta:
    """What is noted of a tensor that is not kept."""
    return tensor.shape, tensor.dtype, tensor.device


def _put(values: list[Any], places: Sequence[int], results: Sequence[Any]) -> None:
    for place, result in zip(places, results, strict=True):
        values.extend([_MISSING] * (place + 1 - len(values)))
        values[place] = result


def _needs_grad(value: Any) -> list[bool]:
    """Of each tensor in a value."""
    return [x.requires_grad for x in pytree.tree_leaves(value) if isinstance(x, torch.Tensor)]


def _flagged(value: Any, needs_grad: Sequence[bool]) -> Any:
    """A value with its tensors as leaves of their own; one without any stays what it is."""
    if not needs_grad:
        return value
    flags = iter(needs_grad)
    return pytree.tree_map_only(
        torch.Tensor, lambda tensor: tensor.detach().requires_grad_(next(flags)), value
    )


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, torch.Tensor) else value


def _fresh(value: Any) -> Any:
    """A slice as a leaf of its own."""
    if not isinstance(value, torch.Tensor):
        return value
    return value.detach().requires_grad_(value.requires_grad)
