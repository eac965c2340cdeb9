"""How far apart two tensors or states are."""

from __future__ import annotations

import math
from typing import Any

import torch


def norm(tensor: torch.Tensor) -> float:
    """The Euclidean norm, in fp32 at least; NaN and infinity stay what they are."""
    half = tensor.dtype in (torch.float16, torch.bfloat16)
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float32 if half else None))


def ratio(difference: float, scale: float) -> float:
    """Their quotient; infinite where there is none."""
    if difference == 0:
        return 0.0
    value = difference / scale if scale else math.inf
    return math.inf if math.isnan(value) else value


def relative(got: torch.Tensor, true: torch.Tensor, floor: float = 0.0) -> float:
    """Norm of the difference over the norm of the true value.

    Args:
        got: any tensor.
        true: what it should be; of another shape, dtype or device, the error is infinite.
        floor: the least norm to divide by.
    """
    if same(got, true):
        return 0.0
    if got.shape != true.shape or got.dtype != true.dtype or got.device != true.device:
        return math.inf
    if not (got.is_floating_point() or got.is_complex()):
        return ratio(float((got != true).sum()), float(got.numel()))
    return ratio(norm(got - true), max(norm(true), floor))


def same(a: Any, b: Any) -> bool:
    """Whether two states, attributes or tensors are equal, to the bit and NaN for NaN.

    Tensors on ``meta`` have no values to differ in.
    """
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        alike = a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
        return alike and bool(
            a.is_meta
            or torch.equal(a, b)
            or (
                torch.equal(torch.isnan(a), torch.isnan(b))
                and torch.equal(a.nan_to_num(), b.nan_to_num())
            )
        )
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if hasattr(a, "tobytes") and hasattr(b, "tobytes"):
        return bool(a.tobytes() == b.tobytes())
    return type(a) is type(b) and bool(a == b)
