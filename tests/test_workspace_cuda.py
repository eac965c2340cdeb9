"""What a GPU's kernels allocate, as far as it can be said without one; figures of an H100."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from re2fx import workspace
from re2fx.workspace_cuda import MIB, Reduction, allocated, rule_of

H100 = 132, 2048  # multiprocessors, threads of each


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.mark.parametrize(
    ("shape", "dims", "mebibytes"),
    [
        ((12544, 768), [0], 73.5),
        ((50176, 384), [0], 132.0),
        ((50176, 288), [0], 99.0),
        ((12544, 192), [0], 18.375),
        ((6304, 3072), [0], 132.0),
        ((197, 32, 2304), [0, 1], 111.375),
        ((4096, 2304), [-2], 72.0),
        ((8, 3072), [0], 0.0),
        ((4096, 768), [1], 0.0),
    ],
)
def test_sums_over_rows(shape: tuple[int, ...], dims: list[int], mebibytes: float) -> None:
    """Measured by the allocator's statistics around the operator."""
    assert Reduction.of(empty(*shape), dims).staging(*H100) == mebibytes * MIB


def test_a_mean_of_channels_last() -> None:
    images = empty(1, 16, 28, 28, 192, dtype=torch.float32).permute(0, 4, 1, 2, 3)
    assert Reduction.of(images, [2, 3, 4]).staging(*H100) == 18.375 * MIB


def test_results_that_are_no_multiple_of_four_are_made_one_by_one() -> None:
    assert Reduction.of(empty(4096, 771), [0]).vector == 1
    assert Reduction.of(empty(4096, 770), [0]).vector == 2
    assert Reduction.of(empty(4096, 772)[:, ::2], [0]).vector == 1


def test_sums_of_everything_take_next_to_nothing() -> None:
    assert Reduction.of(empty(10_000_000), []).staging(*H100) < MIB
    assert Reduction.of(empty(1, 1), []).staging(*H100) == 0


@pytest.mark.parametrize(
    ("size", "expected"),
    [(1, 512), (513, 1024), (9 * MIB, 9 * MIB), (225 * MIB + MIB // 8, 226 * MIB),
     (224 * MIB + MIB // 8, 224 * MIB + MIB // 8), (12 * MIB, 12 * MIB)],
)  # fmt: skip
def test_blocks_of_the_caching_allocator(size: int, expected: int) -> None:
    assert allocated(size) == expected


def test_each_device_has_its_rules() -> None:
    aten: Any = torch.ops.aten
    assert rule_of(aten.sum.dim_IntList) is not None
    assert workspace.rule_of(aten.sum.dim_IntList) is None
    grad = empty(4, 8, 8, dtype=torch.float32)
    rule = rule_of(aten._softmax_backward_data.default)
    assert rule is not None
    assert rule([grad, grad, -1, grad.dtype], [grad]) == 4 * grad.numel()
    turned = grad.transpose(0, 1)
    assert rule([turned, grad, -1, grad.dtype], [grad]) == 8 * grad.numel()
