"""The gradient of a weight that every slice of a part reads, summed in one place.

    forward     y_i = F.linear(x_i, W)     for each slice i, with a place for the sum beside W
    backward    sum += dy_i^T x_i          slice by slice, in place; W itself gets nothing from it
                W.grad += sum              once, when the last slice is done

Autograd would make a gradient of the weight's size for every slice and add it to those before: the
more slices, the more time, and two of that size are there at once. The place is a node of the graph
in front of all slices, so that the engine knows when the sum is whole and whether it is wanted.
Whatever is not proved to give what autograd gives is left to autograd. No FX in here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

_A = torch.ops.aten
_LINEAR, _ADDMM = (F.linear, _A.linear.default), (torch.addmm, _A.addmm.default)
_FAKE = "torch._subclasses.fake_tensor"

Sums = dict[int, Tensor]  # by graph task: the backward that sums


def can_sum() -> bool:
    """Whether what slices record now may be summed: gradients are on, and nobody looks on.

    Not while torch compiles, under a transform of torch.func, in a dual level, or under a mode of
    the user's; but on fake tensors and under the modes that predict memory.
    """
    functions = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    modes = map(type, _get_current_dispatch_mode_stack())
    known = all(m.__module__ == _FAKE or m.__module__.startswith("re2fx.") for m in modes)
    devices = all(type(mode) is DeviceContext for mode in functions)
    compiles = torch.compiler.is_compiling()
    return torch.is_grad_enabled() and known and devices and not compiles and not _transformed()


class Summing(TorchFunctionMode):
    """In here the linear maps of slices have the gradients of their weights summed in place.

    One for all slices of a part, in a forward for which `can_sum` holds; and one for each that is
    run again, which saves the same tensors and has no backward of its own.

    Args:
        note: is told in a rerun what the first run saved, before anything is computed with it.
    """

    def __init__(self, note: Callable[[Tensor], Any] | None = None) -> None:
        super().__init__()
        self._note = note
        self._places: dict[int, tuple[Tensor, Sums]] = {}  # by the weight

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        call = _call(func, args, kwargs or {})
        if call is None or not call.fits():
            return func(*args, **(kwargs or {}))
        if self._note is None:
            return _linear(*call, *self._place(call.weight))
        self._note(call.x)
        return _linear(*call, None, None)

    def _place(self, weight: Tensor) -> tuple[Tensor, Sums]:
        """One for each weight, however many maps have it."""
        if id(weight) not in self._places:
            sums: Sums = {}
            self._places[id(weight)] = _place(weight, sums), sums
        return self._places[id(weight)]


class _Call(NamedTuple):
    """A linear map of rows.

    Attributes:
        x: of shape (..., in).
        weight: of shape (out, in), or (in, out) if it is turned.
        bias: of shape (out,).
        turned: whether it is ``x @ weight`` instead of ``x @ weight.t()``.
    """

    x: Any
    weight: Any
    bias: Any
    turned: bool

    def fits(self) -> bool:
        """Whether the weight is a parameter to be trained, and all is of one plain kind."""
        x, weight, bias, turned = self
        given = (x, weight) if bias is None else (x, weight, bias)
        if not all(map(_is_plain, given)) or not isinstance(weight, nn.Parameter):
            return False
        wide = weight.ndim == 2 and x.ndim >= 2
        own = bias is None or (wide and bias.shape == (weight.shape[1 if turned else 0],))
        alike = all(y.dtype == weight.dtype and y.device == weight.device for y in given)
        casts = torch.is_autocast_enabled(weight.device.type)
        return wide and own and alike and weight.is_leaf and weight.requires_grad and not casts


def _call(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> _Call | None:
    """The linear map that a function computes, if it computes one."""
    if func in _ADDMM and len(args) == 3 and not kwargs:
        return _Call(args[1], args[2], args[0], True)
    if func in _LINEAR:
        given = {**dict(zip(("input", "weight", "bias"), args, strict=False)), **kwargs}
        return _Call(given.get("input"), given.get("weight"), given.get("bias"), False)
    return None


def _is_plain(value: Any) -> bool:
    """Whether it is a dense tensor of real numbers and of torch's own kind, fake or not."""
    kind = type(value)
    known = kind in (Tensor, nn.Parameter) or kind.__module__ == _FAKE
    dense = known and value.layout is torch.strided and value.is_floating_point()
    return dense and not torch._C._functorch.is_legacy_batchedtensor(value)


def _transformed() -> bool:
    """Whether a transform of torch.func, or a dual level, sees the operations."""
    functorch = torch._C._functorch.get_interpreter_stack()
    return bool(functorch) or forward_ad._current_level >= 0


class _Place(torch.autograd.Function):
    """An empty tensor that goes along with a weight; its backward gives the sum to the weight."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, sums: Sums) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.sums = sums
        return weight.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[Tensor | None, None]:
        return ctx.sums.pop(torch._C._current_graph_task_id(), None), None


class _Linear(torch.autograd.Function):
    """A `_Call`, which adds the gradient of its weight to a sum if it has a place."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        turned: bool,
        place: Tensor | None,
        sums: Sums | None,
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.turned, ctx.sums = turned, sums
        if place is not None:
            ctx.save_for_backward(x, weight)
        if turned:
            assert bias is not None, "what adds has something to add to"
            return torch.addmm(bias, x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        (gradient,) = gradients
        if gradient is None:
            return (None,) * 6
        x, weight = ctx.saved_tensors
        shape, rows, given = x.shape, _rows(x), _rows(gradient)
        del x
        left, right = (rows, given) if ctx.turned else (given, rows)
        to_weight = None
        if not _sums_in(gradient):
            to_weight = left.t() @ right
        elif _is_wanted(ctx.next_functions[-1][0]):
            _add(ctx.sums, weight, left, right)
        del rows, left, right
        to_x = None
        if _is_wanted(ctx.next_functions[0][0]):
            to_x = (given @ (weight.t() if ctx.turned else weight)).reshape(shape)
        to_bias = given.sum(0) if ctx.needs_input_grad[2] else None
        return to_x, to_weight, to_bias, None, None, None


_place: Callable[..., Any] = _Place.apply
_linear: Callable[..., Any] = _Linear.apply


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _sums_in(gradient: Tensor) -> bool:
    """Whether the running backward may sum in place.

    Not if it is differentiated itself or transformed, or if no engine runs it.
    """
    plain = _is_plain(gradient) and not torch.is_grad_enabled() and not _transformed()
    return plain and torch._C._current_graph_task_id() != -1


def _is_wanted(node: Any) -> bool:
    """Whether the running backward goes on to a node; to leaves it is taken to."""
    if node is None or hasattr(node, "variable") or torch._C._current_graph_task_id() == -1:
        return node is not None
    return torch._C._will_engine_execute_node(node)


def _add(sums: Sums, weight: Tensor, left: Tensor, right: Tensor) -> None:
    """Add ``left.t() @ right`` to the sum of the running backward, which has the weight's form."""
    task = torch._C._current_graph_task_id()
    first = task not in sums
    if first:
        sums[task] = torch.empty_like(weight)
    sums[task].addmm_(left.t(), right, beta=0 if first else 1)
