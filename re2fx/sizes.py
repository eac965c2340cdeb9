"""Example values: tensors on ``meta``, which have a size and no data."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree


def nbytes(value: Any) -> int:
    """Bytes of the tensors in a value."""
    tensors = (x for x in pytree.tree_leaves(value) if isinstance(x, torch.Tensor))
    return sum(tensor.nbytes for tensor in tensors)


def on_meta(value: Any) -> Any:
    """A value with its tensors on ``meta``, real or fake ones; they need gradients as before."""
    return pytree.tree_map_only(torch.Tensor, _on_meta, value)


def _on_meta(tensor: torch.Tensor) -> torch.Tensor:
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    with unset_fake_temporarily():  # a fake one would hold its mode, and cannot be pickled
        made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    return made.requires_grad_(tensor.requires_grad and tensor.is_floating_point())
