"""Counts what a step on fake tensors has alive, operator by operator."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from . import workspace, workspace_cuda
from .accumulation import Holders, alike, from_engine, holders
from .workspace import Rule, nbytes

_A = torch.ops.aten
_RULES = {"cpu": workspace.rule_of, "cuda": workspace_cuda.rule_of}
_UNWRITTEN = {_A.empty, _A.empty_strided, _A.empty_like, _A.new_empty, _A.new_empty_strided}


@dataclass(frozen=True)
class _Kind:
    """What is known of an operator before it is called."""

    formula: Callable[..., int] | None
    moves: bool
    rule: Rule | None


@cache
def _kind(func: Any, device: str) -> _Kind:
    packet, rule_of = func.overloadpacket, _RULES.get(device)
    formula = _formulas().get(packet)
    moves = formula is None and not func.is_view and packet not in _UNWRITTEN
    return _Kind(formula, moves, rule_of(func) if rule_of else None)


@cache
def _formulas() -> dict[Any, Callable[..., int]]:
    """Torch's, and the same ones for what it leaves out: the CPU's attention, adding in place."""
    from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop

    return {
        **flop_registry,
        _A.addmm_: flop_registry[_A.addmm],
        _A._scaled_dot_product_flash_attention_for_cpu: sdpa_flop,
        _A._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop,
    }


def _tensors_of(values: Sequence[Any]) -> list[Tensor]:
    """Those among some values, and in lists among them."""
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (tuple, list)):
            found += [x for x in value if isinstance(x, Tensor)]
    return found


def _is_state(tensor: Tensor) -> bool:
    """Whether it is the remembered state of a generator, which is not fake."""
    return type(tensor) is Tensor and tensor.dtype == torch.uint8


class Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the storages that operators make, while they live.

    Args:
        there: tensors that are there already.
        device: whose memory.
        alone: what `holders` says of a gradient that nobody but the engine holds.

    Attributes:
        timeline: ``(operators so far, bytes)`` after each change.
        turn: where in the timeline the backward begins.
        where: the frame that was brought back last at the highest.
        device: whose memory.
        bytes: alive now.
        flops, moved: so far.
    """

    def __init__(self, there: Iterable[Tensor], device: torch.device, alone: Holders) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.timeline: list[tuple[float, int]] = [(0, 0)]
        self.turn, self.where = 0, ""
        self.flops, self.moved, self.bytes = 0, 0, 0
        self._steps, self._highest, self._place = 0, 0, ""
        self.device, self._alone = device, alone
        self._there = {id(s): s for s in (tensor.untyped_storage() for tensor in there)}
        self._live: dict[int, tuple[weakref.ref[torch.UntypedStorage], int]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # a wrapper around the dispatch, whose caller is looked at here

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "prim":  # asks for a device
            return func(*args, **(kwargs or {}))
        self._steps += 1
        kwargs, taken = kwargs or {}, _tensors_of(args)
        read = self._meet(taken, func)
        engine = func is _A.add.Tensor and from_engine(sys._getframe().f_back)
        if engine and holders(taken[0]) == self._alone and alike(*taken):
            func = _A.add_.Tensor
        result = func(*args, **kwargs)
        made = _tensors_of(result if isinstance(result, (tuple, list)) else (result,))
        written = self._note(made)
        kind = _kind(func, self.device.type)
        if kind.rule is not None:
            self._pass(self._allocated(kind.rule(args, made)))
        if kind.formula is not None:
            self.flops += kind.formula(*args, **kwargs, out_val=result)
        elif kind.moves:
            self.moved += read + written
        return result

    def _meet(self, tensors: Iterable[Tensor], func: Any) -> int:
        """Take storages that no operator made for old ones; return the bytes to read."""
        size = 0
        for tensor in tensors:
            storage = tensor.untyped_storage()
            size += min(nbytes(tensor), storage.nbytes())
            if id(storage) not in self._live and id(storage) not in self._there:
                if func is _A.equal.default and _is_state(tensor):
                    self._add(storage)
                else:
                    self._there[id(storage)] = storage
        return size

    def _note(self, tensors: Iterable[Tensor]) -> int:
        """Count the new storages; return the bytes written."""
        size = 0
        for tensor in tensors:
            storage = tensor.untyped_storage()
            size += min(nbytes(tensor), storage.nbytes())
            new = id(storage) not in self._live and id(storage) not in self._there
            if new and tensor.device.type == self.device.type:
                self._add(storage)
        return size

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), self._allocated(storage.nbytes())
        meter = weakref.ref(self)  # what outlives the step must not hold the count

        def gone(_: Any) -> None:
            own = meter()
            if own is not None:
                own._change(-own._live.pop(key)[1])

        self._live[key] = (weakref.ref(storage, gone), size)
        self._change(size)

    def _change(self, size: int) -> None:
        if size:
            self.bytes += size
            if self.bytes > self._highest:
                self._highest, self.where = self.bytes, self._place
            self.timeline.append((self._steps, self.bytes))

    def _allocated(self, size: int) -> int:
        """Bytes that a request takes."""
        return workspace_cuda.allocated(size) if self.device.type == "cuda" else size

    def enter(self, place: str) -> None:
        """Note the frame that is brought back."""
        self._place = place

    def _pass(self, size: int) -> None:
        """Bytes that are there for a moment."""
        if size > 0:
            self._change(size)
            self._change(-size)
