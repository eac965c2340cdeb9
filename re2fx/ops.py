"""What single FX nodes do: the vocabulary of operations that detection and legality ask about.

Every predicate takes a node and the root module its ``call_module`` targets live in. Nothing here
looks further than the node itself.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Node

from .arithmetic import calls as calls
from .arithmetic import constant_factor as constant_factor
from .arithmetic import is_add as is_add
from .arithmetic import is_fused_addition as is_fused_addition
from .arithmetic import is_product as is_product
from .arithmetic import is_subtraction as is_subtraction
from .arithmetic import is_sum as is_sum
from .arithmetic import negates as negates
from .arithmetic import subtracts_from_second as subtracts_from_second
from .observers import has_hooks as has_hooks
from .overloads import is_check, overload, returns_view, writes
from .shuffles import shuffles

_EXTENT_ATTRIBUTES = {"shape", "ndim", "device", "is_cuda"}
_EXTENT_CALLS = {"size", "dim", "ndimension", "numel", "nelement", "get_device", torch.numel}
_SHAPE_ATTRIBUTES = _EXTENT_ATTRIBUTES | {"dtype", "layout", "itemsize"}
_FRESH_CALLS = {
    "new_zeros", "new_ones", "new_empty", "new_full", torch.zeros_like, torch.ones_like,
    torch.empty_like, torch.full_like, torch.rand_like, torch.randn_like,
}  # fmt: skip
_SHAPE_CALLS = _EXTENT_CALLS | _FRESH_CALLS | {
    "stride", "is_floating_point", torch.is_tensor, torch.is_floating_point,
}  # fmt: skip
_NUMBER_MODULES = {"_operator", "operator", "math", "builtins"}

_PERMUTATIONS = {
    "permute", "transpose", "t", "swapaxes", "swapdims", "movedim", "moveaxis",
    torch.permute, torch.transpose, torch.t, torch.swapaxes, torch.movedim, torch.moveaxis,
}  # fmt: skip
_RESHAPES = {
    "reshape", "view", "flatten", "unflatten", "squeeze", "unsqueeze",
    torch.reshape, torch.flatten, torch.unflatten, torch.squeeze, torch.unsqueeze,
}  # fmt: skip
_COPIES = {"contiguous", "clone", torch.clone}
_CASTS = {"to", "type", "type_as", "float", "double", "half", "bfloat16"}
_SLICES = {
    "narrow", "select", "chunk", "split", "tensor_split", "unbind", "index_select", torch.narrow,
    torch.select, torch.chunk, torch.split, torch.tensor_split, torch.unbind, torch.index_select,
    operator.getitem,
}  # fmt: skip
_OTHER_VIEWS = _CASTS | _SLICES - {"index_select", torch.index_select} | {
    "expand", "expand_as", "detach", "view_as", "diagonal", "unfold", "real", "imag", "contiguous",
    "reshape_as", "squeeze_", "unsqueeze_", "T", "mT", "ravel", "broadcast_to", "as_strided", "cpu",
    "cuda", "hsplit", "vsplit", "dsplit", "adjoint", "conj", torch.detach, torch.diagonal,
    torch.real, torch.imag, torch.broadcast_to, torch.ravel, torch.as_strided, torch.hsplit,
    torch.vsplit, torch.dsplit, torch.adjoint, torch.conj, getattr,
}  # fmt: skip
_ASSIGNMENTS = {"fill_", "copy_", "zero_"}
_VIEWS = _PERMUTATIONS | _RESHAPES | _OTHER_VIEWS
_DROPOUTS = {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout}

_ACTIVATION_MODULES = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish,
    nn.Hardswish, nn.Hardtanh, nn.Hardsigmoid, nn.Softplus, nn.Softsign, nn.Tanh, nn.Sigmoid,
)  # fmt: skip
_ACTIVATION_CALLS = {
    F.relu, F.relu6, F.leaky_relu, F.elu, F.selu, F.celu, F.gelu, F.silu, F.mish, F.hardswish,
    F.hardtanh, F.hardsigmoid, F.softplus, F.softsign, F.prelu, F.tanh, F.sigmoid, torch.relu,
    torch.relu_, torch.tanh, torch.sigmoid, torch.selu, torch.celu, torch.prelu, F.relu_, F.elu_,
    F.leaky_relu_, F.hardtanh_, F.selu_, F.celu_, "relu", "relu_", "tanh", "tanh_", "sigmoid",
    "sigmoid_", "prelu",
}  # fmt: skip
_NORM_MODULES = (
    nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm, nn.modules.batchnorm._NormBase,
)  # fmt: skip
_NORM_CALLS = {F.layer_norm, F.group_norm, F.batch_norm, F.instance_norm, F.rms_norm, F.normalize}

# Outputs of these are not kept for their own backward, so the next operation may overwrite them.
_OUTPUT_NOT_SAVED = (
    nn.Linear, nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm,
)  # fmt: skip
_OUTPUT_NOT_SAVED_CALLS = {
    F.linear, F.conv1d, F.conv2d, F.conv3d, F.batch_norm, F.layer_norm, F.group_norm,
}  # fmt: skip


def module_of(node: Node, root: nn.Module) -> nn.Module | None:
    """The module a ``call_module`` node calls."""
    if node.op != "call_module":
        return None
    return root.get_submodule(str(node.target))


def is_inplace_sum(node: Node) -> bool:
    """``x += y``, ``x.add_(y)``, ``x -= y`` or ``x.sub_(y)``."""
    return is_sum(node) and is_inplace(node, None)


def is_identity(node: Node, root: nn.Module) -> bool:
    """``nn.Identity`` of one value and without hooks, or a cast to the type it has.

    The output is that very value.
    """
    if is_cast(node):
        return keeps_type(node)
    module = module_of(node, root)
    values = [*node.args, *node.kwargs.values()]
    single = len(values) == 1 and isinstance(values[0], Node)
    return single and type(module) is nn.Identity and not has_hooks(module)


def is_activation(node: Node, root: nn.Module) -> bool:
    """An elementwise activation, which may move into the branch."""
    return isinstance(module_of(node, root), _ACTIVATION_MODULES) or calls(node, _ACTIVATION_CALLS)


def is_norm(node: Node, root: nn.Module) -> bool:
    """A normalisation layer."""
    module = module_of(node, root)
    named = module is not None and "norm" in type(module).__name__.lower()
    return named or isinstance(module, _NORM_MODULES) or calls(node, _NORM_CALLS)


def is_dropout(node: Node, root: nn.Module) -> bool:
    """Dropout of elements or channels."""
    module = module_of(node, root)
    return isinstance(module, nn.modules.dropout._DropoutNd) or calls(node, _DROPOUTS)


def reads_shape_only(node: Node) -> bool:
    """A use of a tensor that sees its shape, dtype or device, never its values."""
    if node.op == "call_function" and node.target is getattr:
        return len(node.args) > 1 and node.args[1] in _SHAPE_ATTRIBUTES
    return calls(node, _SHAPE_CALLS)


def reads_extent_only(node: Node) -> bool:
    """A use of a tensor that sees its shape or device only, not even its dtype."""
    if node.op == "call_function" and node.target is getattr:
        return len(node.args) > 1 and node.args[1] in _EXTENT_ATTRIBUTES
    return calls(node, _EXTENT_CALLS)


def is_number_op(node: Node) -> bool:
    """Arithmetic that stays in Python numbers when its inputs are, a check, or ``x[i] = n``."""
    if overload(node) is not None:
        return is_check(node) or is_slice(node) or calls(node, _ASSIGNMENTS)
    if node.op != "call_function" or not callable(node.target):
        return False
    target: Callable[..., Any] = node.target
    return (
        is_check(node)
        or target is torch._assert
        or getattr(target, "__module__", "") in _NUMBER_MODULES
    )


def switches_context(node: Node) -> bool:
    """Switches gradients, autocast or another state that later operations run under."""
    name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
    words = (
        "set_grad_enabled",
        "grad_mode",
        "_autocast",
        "_nesting",
        "inference_mode",
        "functorch",
        "sdpa_kernel",
    )
    return any(word in name for word in words)


def is_pure(node: Node) -> bool:
    """A computation known to do nothing but make its result: it neither writes nor draws."""
    if node.op not in ("call_function", "call_method") or is_inplace(node, None):
        return False
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        drawn = torch.Tag.nondeterministic_seeded in target.tags
        return not (drawn or target._schema.is_mutable)
    number = node.op == "call_function" and getattr(target, "__module__", "") in _NUMBER_MODULES
    if number or is_sum(node) or is_product(node) or calls(node, _VIEWS | _COPIES):
        return True
    owner = getattr(target, "__module__", None) or "torch"
    plain = node.op == "call_function" and owner in ("torch", "torch._functorch.predispatch")
    plain = plain or isinstance(target, torch._ops.OpOverloadPacket)
    return plain and "out" not in node.kwargs and _is_pure_operator(target.__name__)


@functools.cache
def _is_pure_operator(name: str) -> bool:
    """Whether every form of an ATen operator only makes a result; norms may count batches."""
    packet = getattr(torch.ops.aten, name, None)
    if packet is None or "norm" in name:
        return False
    forms = [getattr(packet, overload) for overload in packet.overloads()]
    forms = [form for form in forms if not any(a.is_out for a in form._schema.arguments)]
    drawn = torch.Tag.nondeterministic_seeded
    return all(not form._schema.is_mutable and drawn not in form.tags for form in forms)


def is_number_input(node: Node) -> bool:
    """An input that is known to be a number, such as a size that varies between calls."""
    known = node.op == "placeholder" and "example_value" in node.meta
    return known and not isinstance(node.meta["example_value"], torch.Tensor)


def is_cast(node: Node) -> bool:
    """May change the type or the device of its first operand."""
    return calls(node, _CASTS)


def keeps_type(node: Node) -> bool:
    """Whether a cast returns the very tensor it was given, as ``x.to(x.dtype)``.

    By its arguments, or by the types in a graph that was captured with them. Such a graph is for
    these types alone: with others the model is captured again.
    """
    known = cast_types(node)
    if known is not None:
        return known[0] == known[1] and not _may_copy(node)
    if node.kwargs or len(node.args) != 2 or node.target not in ("to", "type_as"):
        return False
    value, like = node.args
    if not isinstance(value, Node) or not isinstance(like, Node):
        return False
    asks = calls(like, {getattr}) and like.args[0] is value
    return like is value or (asks and like.args[1] in ("dtype", "device"))


def widens(node: Node) -> bool:
    """Whether a cast is known to change the type, and casting back to give the very values."""
    known = cast_types(node)
    if known is None or known[0] == known[1] or not all(t.is_floating_point for t in known):
        return False
    return torch.promote_types(*known) == known[1]


def cast_types(node: Node) -> tuple[torch.dtype, torch.dtype] | None:
    """The types before and after a cast on one device, where they are known."""
    value = node.args[0] if node.args else None
    if not is_cast(node) or not isinstance(value, Node):
        return None
    before, after = example(value), example(node)
    if before is None or after is None or before.device != after.device:
        return None
    return before.dtype, after.dtype


def _may_copy(node: Node) -> bool:
    """Whether a cast is told to copy, or to another layout, as any flag may say."""
    values = (*node.args[1:], *node.kwargs.values())
    return any(value is True or isinstance(value, torch.memory_format) for value in values)


def type_change(node: Node) -> str:
    """What a cast may do to a stream, in words."""
    known = cast_types(node)
    if known is None:
        return f"{node.name}, which may change its type; captured by Dynamo its types are known"
    return f"{node.name}, which turns {known[0]} into {known[1]}"


def example(node: Node) -> torch.Tensor | None:
    """The tensor that stood for a value while it was captured, if one is known."""
    value = node.meta.get("example_value", node.meta.get("val"))
    return value if isinstance(value, torch.Tensor) else None


def makes_tensor(node: Node) -> bool:
    """Makes a new tensor of which at most the shape comes from another."""
    return calls(node, _FRESH_CALLS)


def is_slice(node: Node) -> bool:
    """Takes a part of a tensor."""
    return calls(node, _SLICES)


def permutes(node: Node) -> bool:
    """Moves dimensions, by constant numbers."""
    return calls(node, _PERMUTATIONS) and len(node.all_input_nodes) == 1


def reshapes(node: Node) -> bool:
    """Renames dimensions without moving or repeating an element."""
    return calls(node, _RESHAPES) and not (calls(node, {"view"}) and _has_dtype(node))


def copies(node: Node) -> bool:
    """Same values, maybe in new memory."""
    return calls(node, _COPIES)


def is_bijection(node: Node) -> bool:
    """A shape-only operation that can be undone."""
    return permutes(node) or reshapes(node) or copies(node) or shuffles(node)


def _has_dtype(node: Node) -> bool:
    values = (*node.args, *node.kwargs.values())
    return any(isinstance(value, torch.dtype) for value in values)


def is_inplace(node: Node, root: nn.Module | None) -> bool:
    """Writes into its first argument."""
    op = overload(node)
    if op is not None:
        return writes(op)
    if node.op == "call_method":
        name = str(node.target)
        return (name.endswith("_") and not name.endswith("__")) or name in ("__iadd__", "__imul__")
    if node.op == "call_function":
        if node.kwargs.get("inplace") is True:
            return True
        target: Any = node.target
        name, module = getattr(target, "__name__", ""), getattr(target, "__module__", "") or ""
        if target is operator.setitem:
            return True
        if module in ("_operator", "operator"):
            return name in _INPLACE_OPERATORS
        return name.endswith("_") and not name.endswith("__") and name != "_"
    if node.op == "call_module" and root is not None:
        return getattr(module_of(node, root), "inplace", False) is True
    return False


_INPLACE_OPERATORS = {
    "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor",
    "ilshift", "irshift", "imatmul",
}  # fmt: skip


def may_alias(node: Node, root: nn.Module) -> bool:
    """Whether the output may share memory with an input.

    Torch's own modules and functions are known; of anything else the worst is assumed.
    """
    if is_inplace(node, root) or is_identity(node, root):
        return True
    module = module_of(node, root)
    if module is not None:
        builtin = type(module).__module__.startswith("torch.nn.modules")
        views = isinstance(
            module, (nn.Identity, nn.Flatten, nn.Unflatten, nn.modules.dropout._DropoutNd)
        )
        return views or not builtin
    if calls(node, _VIEWS):
        return True
    op = overload(node)
    if op is not None:
        return returns_view(op) or calls(node, _DROPOUTS)
    if node.op == "call_function":
        target: Any = node.target
        owner = getattr(target, "__module__", None) or "torch"
        return target in _DROPOUTS or owner.split(".")[0] not in (
            "torch",
            "_operator",
            "operator",
            "math",
        )
    return False


def keeps_output(node: Node, root: nn.Module) -> bool:
    """Whether the backward of this operation may need its output unchanged."""
    module = isinstance(module_of(node, root), _OUTPUT_NOT_SAVED)
    return not (is_sum(node) or module or calls(node, _OUTPUT_NOT_SAVED_CALLS))


def wrapped(node: Node) -> tuple[Node, float] | None:
    """``(x, k)`` where a node is ``k * x``: also ``-x``, a copy of ``x``, and ``x + 0``."""
    if negates(node) and len(node.args) == 1 and isinstance(node.args[0], Node):
        return node.args[0], -1.0
    if copies(node) and node.args and isinstance(node.args[0], Node):
        return node.args[0], 1.0
    if is_add(node) and len(node.args) == 2 and not node.kwargs:
        nodes = [value for value in node.args if isinstance(value, Node)]
        zeros = [value for value in node.args if isinstance(value, (int, float)) and value == 0]
        return (nodes[0], 1.0) if nodes and zeros else None
    return constant_factor(node)
