"""What kernels allocate while they run, beyond their results.

A fake operator makes its results and nothing else; a real kernel also reorders, casts and copies.
Each rule here was read off torch's profiler: the operator was run alone under
``torch.profiler.profile(profile_memory=True)`` for several shapes and strides, and the allocations
inside it were matched with the sizes of its operands (torch 2.13, x86 with AVX-512, one thread and
two). Operators without a rule were seen to allocate their results only, or a few values per row.

This is the CPU's; CUDA's kernels are in `re2fx.workspace_cuda`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

Rule = Callable[[Sequence[Any], Sequence[Tensor]], int]

LANES = 16  # channels of a block in oneDNN's layouts, fp32 with AVX-512


def rule_of(func: Any) -> Rule | None:
    """The rule for an operator, if it allocates more than its results.

    The rule is ``rule(args, outputs) -> bytes`` beyond the outputs, at the operator's worst moment.
    """
    found = _RULES.get(func.overloadpacket)
    if found is None and torch.Tag.pointwise in func.tags:
        return _casts
    return found


def nbytes(tensor: Tensor) -> int:
    """Of its entries, as if it were contiguous."""
    return tensor.numel() * tensor.element_size()


def _copy(tensor: Tensor) -> int:
    """What ``tensor.contiguous()`` allocates."""
    return 0 if tensor.is_contiguous() else nbytes(tensor)


def copies(*places: int) -> Rule:
    """The kernel makes some of its arguments contiguous first."""
    return lambda args, _: sum(_copy(args[place]) for place in places)


def _casts(args: Sequence[Any], outputs: Sequence[Tensor]) -> int:
    """An elementwise kernel on mixed dtypes casts each operand that has not the common one."""
    tensors = [x for x in args if isinstance(x, Tensor)]
    if len(tensors) < 2 or all(x.dtype == tensors[0].dtype for x in tensors):
        return 0
    wide = [x for x in tensors if x.ndim] or tensors
    common = wide[0].dtype
    for tensor in wide:
        common = torch.promote_types(common, tensor.dtype)
    return sum(x.numel() for x in wide if x.dtype != common) * common.itemsize


def _where(args: Sequence[Any], outputs: Sequence[Tensor]) -> int:
    return _casts(args[1:], outputs)  # the condition is not cast


def _safe_softmax(args: Sequence[Any], outputs: Sequence[Tensor]) -> int:
    """A mask of the entries that are -inf, and one of the rows; before, the softmax's own copy."""
    entries = outputs[0].numel()
    rows = entries // max(1, int(outputs[0].shape[args[1]]))
    return max(_copy(args[0]), entries + rows)


def roll(args: Sequence[Any], outputs: Sequence[Tensor]) -> int:
    """One dimension after the other; the intermediate results are held until the last."""
    return max(0, len(args[1]) - 1) * nbytes(outputs[0])


def _bilinear(args: Sequence[Any], outputs: Sequence[Tensor]) -> int:
    """Both ends in channels-last and back."""
    x = args[0]
    last = x.is_contiguous(memory_format=torch.channels_last)
    return 0 if last else nbytes(x) + nbytes(outputs[0])


def _flash_blocks(query: Tensor, key: Tensor) -> tuple[int, int]:
    """Rows and columns of the scores that a thread holds."""
    length = query.shape[2]
    rows = 256 if length >= 768 else 64 if length >= 192 else 32
    return min(rows, length), min(512, key.shape[2])


def _flash(args: Sequence[Any], outputs: Sequence[Tensor]) -> int:
    """Per thread a block of scores, its maxima and sums, and a block of the result."""
    rows, columns = _flash_blocks(args[0], args[1])
    size = 4 * rows * (columns + 2 + int(args[2].shape[3]))
    if args[0].dtype.itemsize < 4:  # and the scores in the lower precision
        size += rows * columns * args[0].dtype.itemsize
    return torch.get_num_threads() * size


def _flash_backward(args: Sequence[Any], outputs: Sequence[Tensor]) -> int:
    """Per thread two blocks of scores; the gradient is copied unless its heads are interleaved."""
    rows, columns = _flash_blocks(args[1], args[2])
    numbers = rows * (2 * columns + 1)
    return torch.get_num_threads() * 4 * numbers + _copy(args[0].transpose(1, 2))


# convolutions


def _up(channels: int) -> int:
    return -(-channels // LANES) * LANES


class _Convolution:
    """One call: its backend and the sizes of what is reordered.

    Args:
        source: the input.
        weight: of shape (out, in / groups, ...), or the other way round if transposed.
        result: the output or its gradient.
        options: stride, padding, dilation, transposed, output padding, groups.
    """

    def __init__(
        self, source: Tensor, weight: Tensor, result: Tensor, options: Sequence[Any]
    ) -> None:
        self.source, self.weight, self.result = source, weight, result
        self.groups, self.transposed = int(options[5]), bool(options[3])
        self.strided = any(step > 1 for step in options[0])
        backend = torch._C._select_conv_backend(source, weight, None, *options)
        self.backend = str(backend).rsplit(".", 1)[-1]
        self.kernel = tuple(weight.shape[2:])
        plain = all(
            all(value == wanted for value in values)
            for values, wanted in ((self.kernel, 1), (options[0], 1), (options[1], 0))
        )
        self._unfolded = not plain

    @property
    def last(self) -> bool:
        """Whether it runs in channels-last."""
        if self.source.ndim != 4:
            return False
        form = torch.channels_last
        return any(
            x.is_contiguous(memory_format=form) and not x.is_contiguous()
            for x in (self.source, self.weight)
        )

    @property
    def onednn(self) -> bool:
        return self.backend.startswith("Mkldnn")

    @property
    def depthwise(self) -> bool:
        return self.groups > 1 and self.weight.shape[1] == 1

    def columns(self) -> int:
        """The unfolded input of a kernel that is a matrix product."""
        if not self.backend.startswith("Slow") or not self._unfolded:
            return 0
        return self.source.shape[0] * self._unfolded_sample()

    def gradient_columns(self) -> int:
        """The unfolded gradient of the input; in three dimensions even where that is no other."""
        if self.backend == "Slow3d":
            return self.source.shape[0] * self._unfolded_sample()
        return self.columns()

    def thinned(self) -> int:
        """Per thread the pixels of a sample that a strided 1x1 kernel reads."""
        if not self.strided or prod(self.kernel) > 1 or self.transposed:
            return 0
        pixels = self.source.shape[1] * prod(self.result.shape[2:])
        return torch.get_num_threads() * pixels * self.source.dtype.itemsize

    def _unfolded_sample(self) -> int:
        entries = self.source.shape[1] * prod(self.kernel) * prod(self.result.shape[2:])
        return entries * self.source.dtype.itemsize

    def products(self) -> int:
        """Of the weight's gradient, if its kernel is too wide for oneDNN's own and has few inputs.

        Per thread an unfolded sample and four weights. Patch embeddings of 16 pixels have it.
        """
        if self.source.shape[1] >= LANES or self.kernel[-1] < 15:
            return 0
        return torch.get_num_threads() * (self._unfolded_sample() + 4 * nbytes(self.weight))

    def blocked(self, tensor: Tensor) -> int:
        """An activation in blocks of channels; one with few channels stays as it is."""
        channels = tensor.shape[1]
        return 0 if channels < LANES else nbytes(tensor) // channels * _up(channels)

    def blocked_weight(self) -> int:
        weight = self.weight
        if self.groups > 1:
            return nbytes(weight)
        first, second = weight.shape[:2]
        padded = _up(first) * (second if second < LANES else _up(second))
        return padded * prod(self.kernel) * weight.element_size()

    def padded_weight(self) -> int:
        """In channels-last every group is padded by itself; 1x1 kernels are not reordered."""
        if prod(self.kernel) == 1:
            return 0
        first, second = self.weight.shape[0] // self.groups, self.weight.shape[1]
        padded = self.groups * _up(first) * _up(second) * prod(self.kernel)
        return padded * self.weight.element_size()

    def weight_copy(self) -> int:
        form = torch.channels_last
        return 0 if self.weight.is_contiguous(memory_format=form) else nbytes(self.weight)


def _convolution(args: Sequence[Any], outputs: Sequence[Tensor]) -> int:
    """Blocked operands, then the blocked result and the plain one."""
    call = _Convolution(args[0], args[1], outputs[0], args[3:9])
    result = nbytes(outputs[0])
    if not call.onednn:
        return call.columns()
    if call.last:
        own = 0 if call.depthwise else call.padded_weight()
        return call.weight_copy() + (own or nbytes(call.weight))
    blocked = call.blocked(outputs[0])
    reordered = call.blocked(call.source) + call.blocked_weight() + blocked + call.thinned()
    return max(reordered - result, 2 * result if call.transposed else blocked)


def _convolution_backward(args: Sequence[Any], outputs: Sequence[Tensor]) -> int:
    """First the input's gradient, then the weight's; each blocked, then plain."""
    gradient, source, weight = args[:3]
    call = _Convolution(source, weight, gradient, args[4:10])
    to_source, to_weight = args[10][0], args[10][1]
    if not call.onednn:
        return call.gradient_columns() if to_source else call.columns()
    held = nbytes(source) if to_source else 0
    made = held + (nbytes(weight) if to_weight else 0)
    moments = [made]
    if call.last:
        copied = call.weight_copy()
        if to_source:
            own = nbytes(weight) if call.depthwise else call.padded_weight()
            moments.append(held + copied + own)
        if to_weight:
            moments.append(held + copied + call.padded_weight() + 2 * nbytes(weight))
        return max(moments) - made
    copied = _copy(gradient)
    given, taken = call.blocked(gradient), call.blocked(source)
    weights = call.blocked_weight()
    if to_source:
        strided = call.strided and call.groups == 1 and not call.transposed
        samples = torch.get_num_threads() * given // len(source) if strided else 0
        again = held if strided else 0
        moments += [given + weights + taken + samples, taken + held + again]
    if to_weight:
        scratch = call.products() or given + taken
        if call.depthwise:
            scratch = 0  # neither end is reordered again
        if weight.dtype.itemsize < 4:
            scratch += 4 * weight.numel()  # summed in fp32
        moments += [held + scratch + weights, held + weights + nbytes(weight)]
    return copied + max(moments) - made


_A = torch.ops.aten
_RULES: dict[Any, Rule] = {
    _A.native_layer_norm: copies(0),
    _A.native_layer_norm_backward: copies(0, 1),
    _A.native_batch_norm_backward: lambda args, _: nbytes(args[0]),  # a second gradient
    _A._softmax: copies(0),
    _A._log_softmax: copies(0),
    _A._softmax_backward_data: copies(0, 1),
    _A._log_softmax_backward_data: copies(0, 1),
    _A._safe_softmax: _safe_softmax,
    _A.logsumexp: lambda args, _: nbytes(args[0]),
    _A.native_dropout: lambda args, _: nbytes(args[0]),
    _A.roll: roll,
    _A.index_select: copies(0),
    _A.embedding_dense_backward: copies(0),
    _A.reflection_pad2d: copies(0),
    _A.upsample_bilinear2d: _bilinear,
    _A.where: _where,
    _A._scaled_dot_product_flash_attention_for_cpu: _flash,
    _A._scaled_dot_product_flash_attention_for_cpu_backward: _flash_backward,
    _A.convolution: _convolution,
    _A.convolution_backward: _convolution_backward,
}
