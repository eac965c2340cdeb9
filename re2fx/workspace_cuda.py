"""What CUDA kernels allocate while they run, and how the caching allocator rounds.

Each rule was read off the allocator's statistics around single operators, and the sum's staging
buffer checked against the launch configuration of torch's reduction kernels
(``aten/src/ATen/native/cuda/Reduce.cuh``); torch 2.11 on an H100. What cuDNN takes for convolutions
is its own choice and not modelled; cuBLAS keeps its workspace between steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from .workspace import Rule, copies, nbytes, roll

MIB = 2**20
GRAIN, LARGE = 512, 10 * MIB  # bytes of a block; from where on blocks have segments of their own


def allocated(size: int) -> int:
    """Bytes that the caching allocator counts for a request, with its default settings.

    A large request gets a segment of whole 2 MiB, and the rest of it unless more than 1 MiB is left
    (``c10/cuda/CUDACachingAllocator.cpp``).
    """
    size = -(-size // GRAIN) * GRAIN
    segment = -(-size // (2 * MIB)) * 2 * MIB
    return segment if size >= LARGE and segment - size <= MIB else size


def rule_of(func: Any) -> Rule | None:
    """The rule for an operator, as `re2fx.workspace.rule_of` has them for the CPU."""
    return _RULES.get(func.overloadpacket)


def _softmax_backward(args: Sequence[Any], outputs: Sequence[Tensor]) -> int:
    """The product of the gradient and the result, besides copies."""
    return copies(0, 1)(args, outputs) + nbytes(args[0])


def _safe_softmax(args: Sequence[Any], outputs: Sequence[Tensor]) -> int:
    """A mask of the entries that are -inf, and one of the rows."""
    entries = outputs[0].numel()
    return entries + entries // max(1, int(outputs[0].shape[args[1]]))


def _in_single(place: int) -> Rule:
    """A sum in fp32, of the size of an argument in whatever dtype."""
    return lambda args, _: 4 * args[place].numel()


def _flash_backward(args: Sequence[Any], outputs: Sequence[Tensor]) -> int:
    """The query's gradient in fp32, its rows and columns padded, and a number per row."""
    batch, heads, length, width = args[1].shape
    rows, columns = -(-length // 128) * 128, -(-width // 32) * 32
    return int(4 * batch * heads * rows * (columns + 1))


def _embedding_backward(args: Sequence[Any], outputs: Sequence[Tensor]) -> int:
    """Sums over at most ten equal indices each, of the sorted ones; few are added one by one."""
    count, width = args[1].numel(), args[0].shape[-1]
    segments = count // 10 + min(count, int(args[2]))
    return 4 * segments * -(-width // 32) * 32 if count > 3072 else 0


# sums


@dataclass(frozen=True)
class Reduction:
    """What the launch of a reduction goes by: sizes and strides without those of size 1.

    Attributes:
        reduced, kept: ``(stride, size)`` of the dimensions, the fastest first, merged where one
            goes on where another ends.
        itemsize: of what is summed in.
    """

    reduced: tuple[tuple[int, int], ...]
    kept: tuple[tuple[int, int], ...]
    itemsize: int

    @classmethod
    def of(cls, tensor: Tensor, dims: Sequence[int]) -> Reduction:
        """Of a tensor along some dimensions; all of them if there are none."""
        along = {dim % tensor.ndim for dim in dims} if dims else set(range(tensor.ndim))
        sides: tuple[list[tuple[int, int]], list[tuple[int, int]]] = ([], [])
        for dim, (stride, size) in enumerate(zip(tensor.stride(), tensor.shape, strict=True)):
            if size > 1:
                sides[dim not in along].append((stride, size))
        return cls(_merged(sides[0]), _merged(sides[1]), max(4, tensor.element_size()))

    @property
    def inputs(self) -> int:
        """Summed per result."""
        return prod(size for _, size in self.reduced)

    @property
    def outputs(self) -> int:
        """Results."""
        return prod(size for _, size in self.kept)

    @property
    def along_rows(self) -> bool:
        """Whether neighbours in memory are summed."""
        return not self.kept or (bool(self.reduced) and self.reduced[0][0] < self.kept[0][0])

    @property
    def vector(self) -> int:
        """How many results a thread makes at once."""
        if self.along_rows or self.kept[0][0] != 1:
            return 1
        strides = [stride for stride, _ in (*self.kept[1:], *self.reduced)]
        numbers = (self.kept[0][1], *strides)
        return next(n for n in (4, 2, 1) if all(number % n == 0 for number in numbers))

    def staging(self, multiprocessors: int, threads: int) -> int:
        """Bytes in which blocks put their sums for one another.

        Args:
            multiprocessors: of the device.
            threads: that one of them runs.
        """
        most = 512 // self.vector
        fast, slow = self.inputs, self.outputs
        if not self.along_rows:
            fast, slow = slow // self.vector, fast
        width = min(_power(fast, most), 32)
        height = min(_power(slow, most), most // width)
        width = min(_power(fast, most), most // height)
        results = self.outputs // self.vector
        each = -(-self.inputs // width) if self.along_rows else self.inputs
        grid = results if self.along_rows else -(-results // width)
        if each < min(16 * height, 256):  # a block makes several results
            return 0
        each = -(-each // height)
        target = multiprocessors * (threads // (width * height))
        if each < 256 or grid > target:
            return 0
        blocks = max(min(-(-target // grid), -(-each // 16)), -(-each // 256))
        lanes = 1 if self.along_rows else width * self.vector
        return self.itemsize * self.outputs * blocks * lanes if blocks > 1 else 0


def _merged(dims: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """The fastest first; those that go on where another ends are one."""
    merged: list[tuple[int, int]] = []
    for stride, size in sorted(dims):
        if merged and merged[-1][0] * merged[-1][1] == stride:
            merged[-1] = (merged[-1][0], merged[-1][1] * size)
        else:
            merged.append((stride, size))
    return tuple(merged)


def _power(number: int, most: int) -> int:
    """The largest power of two that is not above either."""
    return most if number >= most else 1 << (max(1, number).bit_length() - 1)


@cache
def _threads(device: torch.device) -> tuple[int, int]:
    """Multiprocessors, and the threads that each of them runs."""
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.max_threads_per_multi_processor


def _sum(args: Sequence[Any], outputs: Sequence[Tensor]) -> int:
    """Of a bias's gradient: much more than its result."""
    dims = args[1] if len(args) > 1 and args[1] is not None else ()
    if not args[0].ndim or not args[0].is_floating_point():
        return 0
    return Reduction.of(args[0], dims).staging(*_threads(args[0].device))


_A = torch.ops.aten
_RULES: dict[Any, Rule] = {
    _A.sum: _sum,
    _A.mean: _sum,
    _A.native_layer_norm: copies(0),
    _A.native_layer_norm_backward: copies(0, 1),
    _A._softmax: copies(0),
    _A._log_softmax: copies(0),
    _A._softmax_backward_data: _softmax_backward,
    _A._log_softmax_backward_data: copies(0, 1),
    _A._safe_softmax: _safe_softmax,
    _A.logsumexp: lambda args, _: nbytes(args[0]),
    _A.roll: roll,
    _A.embedding_dense_backward: _embedding_backward,
    _A._scaled_dot_product_cudnn_attention_backward: _in_single(1),
    _A._scaled_dot_product_flash_attention_backward: _flash_backward,
}
