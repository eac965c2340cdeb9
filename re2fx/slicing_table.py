"""The rules of slicing by what is called: by one name for a function, a method and an operator.

What is not in these tables has no rule. Modules are known by their exact class, without hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from . import ops
from .overloads import overload
from .slicing_calls import Call, State, functions, name_of
from .slicing_rules import (
    addmm,
    attention,
    batch_norm,
    convolution,
    dropout,
    einsum,
    elementwise,
    embedding,
    instance_norm,
    layer_norm,
    linear,
    matmul,
    multihead,
    padding,
    pooling,
    prelu,
    samples,
    shuffled,
)  # fmt: skip
from .slicing_shapes import (
    attribute,
    beside,
    cut,
    expanded,
    flipped,
    indexed,
    joined,
    kept,
    like,
    permuted,
    reduced,
    reshaped,
    separated,
    stacked,
)  # fmt: skip

Rule = Callable[[Call], "State | None"]

_ELEMENTWISE = (
    "add", "sub", "subtract", "rsub", "mul", "multiply", "div", "divide", "true_divide",
    "floor_divide", "remainder", "fmod", "pow", "neg", "negative", "abs", "absolute", "exp",
    "exp2", "expm1", "log", "log1p", "log2", "log10", "sqrt", "rsqrt", "square", "reciprocal",
    "sign", "sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "tanh", "asinh",
    "acosh", "atanh", "atan2", "sigmoid", "logit", "erf", "erfc", "erfinv", "floor", "ceil",
    "round", "trunc", "frac", "clamp", "clip", "clamp_min", "clamp_max", "maximum", "minimum",
    "fmax", "fmin", "where", "masked_fill", "lerp", "addcmul", "addcdiv", "eq", "ne", "lt",
    "le", "gt", "ge", "logical_and", "logical_or", "logical_xor", "logical_not", "bitwise_and",
    "bitwise_or", "bitwise_xor", "bitwise_not", "isnan", "isinf", "isfinite", "nan_to_num",
    "relu", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish", "hardswish",
    "hardtanh", "hardsigmoid", "softplus", "softsign", "tanhshrink", "softshrink", "hardshrink",
    "logsigmoid", "threshold", "xlogy",
)  # fmt: skip
_KEPT = (
    "to", "type", "type_as", "float", "double", "half", "bfloat16", "int", "long", "bool",
    "clone", "contiguous", "detach",
)  # fmt: skip
_POOLS = [
    f"{kind}{rank}d"
    for kind in ("max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool", "lp_pool")
    for rank in (1, 2, 3)
]
_CONVOLUTIONS = [f"{kind}{rank}d" for kind in ("conv", "conv_transpose") for rank in (1, 2, 3)]


def _table() -> Iterator[tuple[Rule, tuple[str, ...]]]:
    yield elementwise, _ELEMENTWISE
    yield kept, _KEPT
    yield like, ("zeros_like", "ones_like", "full_like")
    yield reshaped, ("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze")
    yield reshaped, ("view_as", "reshape_as", "ravel")
    yield expanded, ("expand", "expand_as", "broadcast_to")
    yield permuted, ("permute", "transpose", "t", "swapaxes", "swapdims", "movedim", "moveaxis")
    yield permuted, ("numpy_T", "mT")
    yield attribute, ("getattr",)
    yield separated, ("unbind", "select")
    yield beside(1), ("softmax", "log_softmax", "cumsum", "cumprod", "index_select", "narrow")
    yield beside(1, -1), ("glu",)
    yield beside(2, 0), ("chunk", "split", "split_with_sizes", "tensor_split")
    yield beside(2, names=("dims",)), ("roll",)
    yield beside(2, 1), ("normalize",)
    yield flipped, ("flip",)
    yield cut, ("slice",)
    yield indexed, ("getitem",)
    yield joined, ("cat", "concat", "concatenate")
    yield stacked, ("stack",)
    yield reduced(1), ("sum", "mean", "var", "std", "amax", "amin", "prod", "logsumexp")
    yield reduced(1), ("all", "any")
    yield reduced(2), ("norm", "vector_norm")
    yield prelu, ("prelu",)
    yield linear, ("linear",)
    yield matmul, ("matmul", "mm", "bmm")
    yield addmm, ("addmm", "baddbmm")
    yield einsum, ("einsum",)
    yield embedding, ("embedding",)
    yield layer_norm, ("layer_norm", "rms_norm")
    yield samples, ("group_norm",)
    yield instance_norm, ("instance_norm",)
    yield batch_norm, ("batch_norm",)
    yield dropout, ("dropout", "dropout1d", "dropout2d", "dropout3d")
    yield attention, ("scaled_dot_product_attention",)
    yield multihead, ("multi_head_attention_forward",)
    yield convolution, ("conv", *_CONVOLUTIONS)
    yield pooling, (*_POOLS, "interpolate")
    yield padding, ("pad",)
    yield shuffled, ("pixel_shuffle", "pixel_unshuffle")


_RULES: dict[str, Rule] = {name: rule for rule, names in _table() for name in names}
_FUNCTIONS = functions(_RULES)

_ACTIVATIONS = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish,
    nn.Hardswish, nn.Hardtanh, nn.Hardsigmoid, nn.Softplus, nn.Softsign, nn.Tanh, nn.Sigmoid,
    nn.LogSigmoid, nn.Tanhshrink, nn.Softshrink, nn.Hardshrink, nn.Threshold,
)  # fmt: skip
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_MODULES: dict[type[nn.Module], Rule] = {
    **dict.fromkeys(_ACTIVATIONS, elementwise),
    **dict.fromkeys(_DROPOUTS, dropout),
    **dict.fromkeys((nn.Flatten, nn.Unflatten), reshaped),
    **dict.fromkeys((nn.Softmax, nn.LogSoftmax), beside(1)),
    **dict.fromkeys((nn.LayerNorm, nn.RMSNorm), layer_norm),
    **dict.fromkeys((nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d), instance_norm),
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), convolution),
    **dict.fromkeys((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), convolution),
    **dict.fromkeys((nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d), padding),
    **dict.fromkeys((nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d), padding),
    **dict.fromkeys((nn.PixelShuffle, nn.PixelUnshuffle), shuffled),
    **dict.fromkeys((nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d), pooling),
    **dict.fromkeys((nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.Upsample), pooling),
    **dict.fromkeys((nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d), pooling),
    **dict.fromkeys((nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d), pooling),
    nn.Identity: kept,
    nn.GLU: beside(1, -1),
    nn.PReLU: prelu,
    nn.Linear: linear,
    nn.GroupNorm: samples,
    nn.Embedding: embedding,
    nn.MultiheadAttention: multihead,
}


def called(node: Node, root: nn.Module) -> tuple[Rule | None, str | None, nn.Module | None]:
    """The rule for a node, if there is one, what the node calls, and the module."""
    if node.kwargs.get("out") is not None or "assigns" in node.meta:
        return None, None, None
    module = ops.module_of(node, root)
    if module is not None:
        kind = type(module).__name__
        single = len(node.args) == 1 and not node.kwargs
        known = (single or type(module) is nn.MultiheadAttention) and runs_plainly(module)
        return (_MODULES.get(type(module)) if known else None), kind, module
    name = name_of(node, _FUNCTIONS) if node.op.startswith("call_") else None
    rule = _RULES.get(name) if name is not None else None
    op = overload(node)
    if op is not None and torch.Tag.nondeterministic_seeded in op.tags:
        rule = rule if rule in (dropout, attention) else None
    return rule, name, None


def is_quiet(module: nn.Module) -> bool:
    """Whether a module named in a region's `quiet` still draws no random numbers."""
    return bool((module.dropout if isinstance(module, nn.MultiheadAttention) else module.p) == 0)


def may_draw(module: nn.Module | None) -> bool:
    """Whether a module would draw random numbers with another probability."""
    return isinstance(module, (*_DROPOUTS, nn.MultiheadAttention))


def runs_plainly(module: nn.Module) -> bool:
    """Whether calling a module runs the forward of its class and nothing else."""
    parts = list(module.modules())
    plain = all(type(part).__module__.startswith("torch.nn.modules.") for part in parts)
    own = not any(ops.has_hooks(part) or "forward" in vars(part) for part in parts)
    return plain and own and all(map(is_plain, module.parameters()))


def is_plain(value: Any) -> bool:
    """Whether a value is a dense tensor of torch's own kind, fake or not, and not empty."""
    fake = type(value).__module__ == "torch._subclasses.fake_tensor"
    if not (fake or type(value) in (Tensor, nn.Parameter)) or value.layout is not torch.strided:
        return False
    return all(type(size) is int and size > 0 for size in value.shape)
