"""How the autograd engine adds up the gradients that reach one value.

It adds the next gradient into the one it has, if nobody else holds that one; but while a dispatch
mode is active, always out of place. A mode that foretells an ordinary run looks here whether the
engine would have added in place. How often a gradient is held that only the engine has is found out
by trying, since it depends on how torch calls modes.
"""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward
from torch.utils._python_dispatch import TorchDispatchMode

Holders = tuple[int, int, int]

_ENGINE = _engine_run_backward.__code__


def holders(tensor: Tensor) -> Holders:
    """How many hold the Python object, the tensor and its storage."""
    storage: int = torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)
    uses: int = tensor._use_count()  # type: ignore[attr-defined]
    return sys.getrefcount(tensor), uses, storage


def from_engine(caller: FrameType | None) -> bool:
    """Whether the engine itself calls an operator, and no backward written in Python."""
    return not torch.is_grad_enabled() and (caller is None or caller.f_code is _ENGINE)


def alike(old: Tensor, new: Tensor) -> bool:
    """Whether one gradient can be added into another, which fills its storage."""
    dense = old.numel() * old.element_size() == old.untyped_storage().nbytes()
    return dense and old.shape == new.shape and old.dtype == new.dtype


class _Probe(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Looks at a gradient that the engine adds to, as a mode that counts does."""

    found: Holders = (0, 0, 0)  # of nothing

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        taken = [value for value in args if isinstance(value, Tensor)]
        if func is torch.ops.aten.add.Tensor and from_engine(sys._getframe().f_back):
            self.found = holders(taken[0])
        return func(*args, **(kwargs or {}))


def alone() -> Holders:
    """What `holders` says, called by a mode on an argument, if nobody else holds a gradient."""
    with _Probe() as probe:  # type: ignore[no-untyped-call]
        middle = torch.ones(2, requires_grad=True).sin()
        torch.autograd.backward((middle.exp() + middle.cos()).sum())
    found: Holders = probe.found
    return found
