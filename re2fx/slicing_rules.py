"""Which operations that compute treat the items of a slicing one by one.

A rule gets a call and how its arguments are sliced. It answers how the result is sliced, if the
call on some items of all of them gives these items of the result, and None if it need not.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.fx import Node

from .overloads import overload
from .slicing_calls import Along, Call, State
from .slicing_shapes import kept


def elementwise(call: Call) -> State | None:
    """Element by element, operands broadcast."""
    return call.broadcast(call.tensors) if isinstance(call.out, Tensor) else None


def prelu(call: Call) -> State | None:
    """A slope for all, or one for each channel, which is dimension 1."""
    along, weight = call.along(call.x), call.arg(1, "weight")
    if along is None or not call.alone(call.x):
        return None
    return along if call.shape(weight) in ((), (1,)) or along.dim != 1 else None


def linear(call: Call) -> State | None:
    """Any dimension of the input but the last."""
    along = call.along(call.x)
    if along is None or not call.alone(call.x):
        return None
    return along if along.dim < len(call.shape(call.x)) - 1 else None


def matmul(call: Call) -> State | None:
    """A batch dimension of both operands, or rows or columns of the result."""
    return _product(call, call.x, call.arg(1, "other", "mat2", "tensor2"))


def _product(call: Call, a: Any, b: Any) -> State | None:
    left, right = call.along(a), call.along(b)
    if len(call.shape(b)) == 1 and len(call.shape(a)) > 1:
        inner = left is None or right is not None or left.dim == len(call.shape(a)) - 1
        return None if inner else left
    if min(len(call.shape(a)), len(call.shape(b))) < 2:
        return None
    row = None if left is None else len(call.shape(a)) - left.dim
    column = None if right is None else len(call.shape(b)) - right.dim
    if row == 1 or column == 2:
        return None
    if row == 2 or column == 1:
        if left is not None and right is not None:
            return None
        return left.at(call.rank - 2) if left is not None else right and right.at(call.rank - 1)
    return call.broadcast((a, b))


def addmm(call: Call) -> State | None:
    """A product and what is added to it."""
    state = _product(call, call.arg(1, "mat1", "batch1"), call.arg(2, "mat2", "batch2"))
    return state if isinstance(state, Along) and call.joins(call.x, state) else None


def einsum(call: Call) -> State | None:
    """A letter of the result; operands that have it are sliced along it, the others whole."""
    equation, operands = call.x, call.args[1:]
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = tuple(operands[0])
    if not isinstance(equation, str) or "..." in equation or "->" not in equation:
        return None
    given, result = equation.replace(" ", "").split("->")
    terms = given.split(",")
    if any(len(set(term)) < len(term) for term in terms) or len(terms) != len(operands):
        return None
    found = {
        (term[along.dim], along.at(0))
        for term, x in zip(terms, operands, strict=True)
        if (along := call.along(x)) is not None
    }
    if len(found) != 1:
        return None
    ((letter, along),) = found
    parts = zip(terms, operands, strict=True)
    fine = all(call.also(x, along.at(t.index(letter))) for t, x in parts if letter in t)
    return along.at(result.index(letter)) if fine and letter in result else None


def embedding(call: Call) -> State | None:
    """Each index by itself; no renorm of the weights, no scaling by how often one occurs."""
    indices = call.arg(1, "indices") if overload(call.node) is not None else call.x
    if call.arg(3, "max_norm") is not None:
        return None
    if call.arg(5, "scale_grad_by_freq", default=False) is not False:
        return None
    return call.along(indices) if call.alone(indices) else None


def layer_norm(call: Call) -> State | None:
    """Dimensions before those normalized over."""
    along, shape = call.along(call.x), call.arg(1, "normalized_shape")
    if along is None or not call.alone(call.x) or shape is None:
        return None
    count = 1 if isinstance(shape, int) else len(shape)
    return _each(call, along) if along.dim < len(call.shape(call.x)) - count else None


def samples(call: Call) -> State | None:
    """The first dimension, if nothing but the input has it."""
    along = call.along(call.x)
    fine = along is not None and along.dim == 0 and call.alone(call.x)
    return along if fine else None


def instance_norm(call: Call) -> State | None:
    """Samples, if no statistics are kept of them."""
    if call.module is not None:
        tracks, rank = call.arg(1, "track_running_stats"), len(call.shape(call.x))
        return samples(call) if tracks is False and rank == _batch_rank(call) else None
    means = call.arg(1, "running_mean"), call.arg(2, "running_var")
    own = call.arg(5, "use_input_stats", default=True) is True
    return samples(call) if means == (None, None) and own else None


def batch_norm(call: Call) -> State | None:
    """With the statistics that are given, which is seen only in a constant argument."""
    training = call.arg(5, "training", default=False)
    along = call.along(call.x)
    if call.module is not None or training is not False or along is None:
        return None
    return along if along.dim != 1 and call.alone(call.x) else None


def dropout(call: Call) -> State | None:
    """None that drops: numbers would be drawn in another order."""
    off = call.arg(2, "training", "train", default=True) is False and call.module is None
    p = call.arg(1, "p", default=0.5)
    return kept(call) if off or (isinstance(p, (int, float)) and p == 0) else None


def attention(call: Call) -> State | None:
    """``scaled_dot_product_attention`` along batches, heads, or queries that see all keys."""
    query, key, value = call.x, call.arg(1, "key"), call.arg(2, "value")
    mask, dropped = call.arg(3, "attn_mask"), call.arg(4, "dropout_p", default=0.0)
    along, causal = call.along(query), call.arg(5, "is_causal", default=False)
    rank = len(call.shape(query))
    others = [v for v in (key, value) if isinstance(v, Node)]
    if along is None or dropped != 0 or len(others) != 2:
        return None
    if along.dim == rank - 2:
        if causal is not False or any(call.along(v) for v in others):
            return None
        return along if call.joins(mask, along) else None
    if along.dim == rank - 1 or any(len(call.shape(v)) != rank for v in others):
        return None
    fine = all(call.also(v, along) for v in others) and call.joins(mask, along)
    return along if fine else None


def multihead(call: Call) -> State | None:
    """Attention with its projections, along the batch, without padding masks."""
    inner: Any = call.module
    query, key, value = call.x, call.arg(1, "key"), call.arg(2, "value")
    if inner is not None:
        key, value = (_given(call, place, name) for place, name in ((1, "key"), (2, "value")))
        mask, padding = _given(call, 5, "attn_mask"), _given(call, 3, "key_padding_mask")
        batch, dropped, extra = 0 if inner.batch_first else 1, inner.dropout, inner.bias_k
    else:
        mask, padding = call.arg(16, "attn_mask"), call.arg(14, "key_padding_mask")
        batch, dropped, extra = 1, call.arg(10, "dropout_p"), call.arg(7, "bias_k")
        statics = call.arg(21, "static_k"), call.arg(22, "static_v")
        extra = extra if statics == (None, None) else statics
    along = call.along(query)
    operands = [v for v in (query, key, value) if isinstance(v, Node)]
    if along is None or along.dim != batch or padding is not None or extra is not None:
        return None
    if dropped != 0 or len(operands) != 3 or any(len(call.shape(v)) != 3 for v in operands):
        return None
    if mask is not None and len(call.shape(mask)) != 2:
        return None
    if not call.alone(*operands) or not all(call.also(v, along) for v in operands):
        return None
    return along, None if call.out[1] is None else along.at(0)


def _given(call: Call, place: int, name: str) -> Any:
    """An argument in a call of a module."""
    return call.args[place] if place < len(call.args) else call.kwargs.get(name)


def _each(call: Call, along: Along) -> State:
    """The same for every tensor of a result."""
    return (along,) * len(call.out) if isinstance(call.out, (tuple, list)) else along


def convolution(call: Call) -> State | None:
    """Samples; and a dimension that no window reaches across, with steps of one."""
    along, weight = call.along(call.x), call.arg(1, "weight")
    if along is None or not call.alone(call.x):
        return None
    kernel = call.shape(weight)[2:]
    if len(call.shape(call.x)) != len(kernel) + 2 or along.dim == 1:
        return None
    if along.dim == 0:
        return along
    if call.arg(6, "transposed", default=False) is True or _transposes(call):
        return None
    place = along.dim - 2
    steps = call.arg(3, "stride", default=1), call.arg(4, "padding", default=0)
    stride, padding = (s if isinstance(s, (int, str)) else s[place % len(s)] for s in steps)
    return along if (kernel[place], stride) == (1, 1) and padding in (0, "valid") else None


def _transposes(call: Call) -> bool:
    name = str(getattr(call.node.target, "__name__", call.node.target))
    return "transpose" in name or isinstance(call.module, nn.modules.conv._ConvTransposeNd)


def pooling(call: Call) -> State | None:
    """Samples and channels, where the input is a batch."""
    along = call.along(call.x)
    if along is None or not call.alone(call.x) or along.dim > 1:
        return None
    return _each(call, along) if len(call.shape(call.x)) == _batch_rank(call) else None


def _batch_rank(call: Call) -> int:
    """Dimensions of a batch, as the digit in an operation's name has it; without one, any three."""
    op = overload(call.node)
    name = getattr(call.node.target, "__name__", "") if op is None else op._schema.name
    name = name if call.module is None else type(call.module).__name__
    digits = next((int(c) for c in name if c in "123"), None)
    return digits + 2 if digits is not None else max(3, len(call.shape(call.x)))


def padding(call: Call) -> State | None:
    """Dimensions that nothing is added to."""
    along, pad = call.along(call.x), call.arg(1, "pad", "padding")
    if along is None or not call.alone(call.x) or not isinstance(pad, (list, tuple)):
        return None
    if not all(isinstance(size, int) for size in pad):
        return None
    place = 2 * (len(call.shape(call.x)) - 1 - along.dim)
    return along if not any(pad[place : place + 2]) else None


def shuffled(call: Call) -> State | None:
    """``pixel_shuffle``: dimensions before the last three."""
    along = call.along(call.x)
    return along if along is not None and along.dim < len(call.shape(call.x)) - 3 else None
