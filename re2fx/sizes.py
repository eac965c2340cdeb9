"""How large example values are."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree


def nbytes(value: Any) -> int:
    """Bytes of the tensors in a value."""
    tensors = (x for x in pytree.tree_leaves(value) if isinstance(x, torch.Tensor))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
