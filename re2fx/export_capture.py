"""Model to graph with `torch.export`: ATen operators, every module dissolved into them.

The forward is traced in Python on fake tensors (``strict=False``), so what stops Dynamo, such as a
print, a logger or ``nn.LSTM``, does not matter here. What export would lose without a word stops
it: hooks, the backward of a custom ``autograd.Function``, checkpointing, random numbers drawn in
Python, seeds, tensors that the forward assigns to the model, and a state that operations run under
other than autocast and gradient modes.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph
from torch.overrides import TorchFunctionMode

from .capture import is_library, line_of, python_generators, reason_of, user_frame
from .dynamo_capture import unassigned
from .errors import CaptureError
from .export_graph import Assembly
from .fake import undisturbed
from .inputs import InputSpec
from .ops import has_hooks
from .outputs import OutputSpec, replaced
from .shapes import Shapes
from .state import LOST_BY_EXPORT, State, put_back, seeds_stop, swapped

NUMBERS = (torch.SymInt, torch.SymFloat, torch.SymBool)
# Operations in a size, such as those of padding to windows; the time to trace grows with them.
LONGEST = 12
# Methods and functions that may return the very tensor they are given.
_MAY_RETURN_ITSELF: set[Any] = {
    getattr(owner, name)
    for owner in (Tensor, torch, torch.nn.functional)
    for name in (
        "to", "type", "type_as", "float", "double", "half", "bfloat16", "cpu", "cuda", "contiguous",
        "flatten", "ravel", "conj", "resolve_conj", "resolve_neg", "positive", "real", "reshape",
        "dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_dropout",
        "feature_alpha_dropout", "atleast_1d", "atleast_2d", "atleast_3d", "broadcast_to", "expand",
    )
    if hasattr(owner, name)
}  # fmt: skip
_HOOKS = {Tensor.register_hook, Tensor.register_post_accumulate_grad_hook}


class Lost(Exception):
    """Export met what it would lose."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        frame = sys._getframe(1)
        user = user_frame(frame)
        self.line = f"{user.f_code.co_filename}:{user.f_lineno}" if user else ""


class LongSizes(Exception):
    """The sizes of a value have become long expressions of those of the inputs."""


@dataclass
class Call:
    """What one traced call returned.

    Attributes:
        returned: by the model.
        results: the tensors and sizes in it.
        all_sizes: whether every size of the inputs is open.
    """

    returned: Any = None
    all_sizes: bool = False
    results: list[Any] = field(default_factory=list)


class Flat(nn.Module):
    """A model as a function of tensors to a list of tensors."""

    def __init__(self, model: nn.Module, inputs: InputSpec, call: Call) -> None:
        super().__init__()
        self.model = model
        self.training = model.training
        self._inputs, self._call = inputs, call

    def forward(self, *values: Tensor) -> list[Any]:
        """Call the model and note what it returns."""
        given = iter(values)
        arguments = self._inputs.arguments(lambda name: next(given))
        with seeds_stop(Lost, is_library), put_back(), Apart(self._call.all_sizes):
            returned = self.model(*arguments.args, **arguments.kwargs)
        results: dict[int, Any] = {}

        def note(leaf: Any) -> Any:
            if isinstance(leaf, (Tensor, *NUMBERS)):
                results[id(leaf)] = leaf
            return leaf

        replaced(returned, note)
        self._call.returned, self._call.results = returned, list(results.values())
        return self._call.results


class Apart(TorchFunctionMode):
    """While a model is traced, ``y = x.float()`` leaves ``x`` and ``y`` two values.

    If the cast has nothing to do both are one tensor, and export, which knows values by their
    tensors, would say ``y`` to everyone who reads ``x`` later: the skip of a residual would pass
    through a cast that its branch makes. An alias in front of the cast, which the assembly drops
    again, keeps them apart.

    Args:
        bounded: whether sizes that have become long expressions stop the trace.
    """

    def __init__(self, bounded: bool) -> None:
        super().__init__()
        self._bounded = bounded
        self._state = State(LOST_BY_EXPORT)

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        changed = self._state.changed()
        if changed is not None:
            raise Lost(
                f"operations run under another {changed} here than the forward began with, which "
                "export would lose"
            )
        if func in _HOOKS:
            raise Lost("it registers a hook on a tensor, which export would lose")
        if func in _MAY_RETURN_ITSELF and args and isinstance(args[0], Tensor):
            args = (torch.ops.aten.alias.default(args[0]), *args[1:])
        result = func(*args, **(kwargs or {}))
        if self._bounded and isinstance(result, Tensor):
            check_sizes(result)
        return result


def check_sizes(value: Tensor) -> None:
    """Stop where the sizes of a value have become too long to go on with."""
    for size in value.shape:
        if isinstance(size, torch.SymInt) and size.node.expr.count_ops() > LONGEST:
            raise LongSizes(f"a size has become {size}")


def capture_graph(
    model: nn.Module,
    inputs: InputSpec,
    examples: Sequence[Tensor],
    constants: dict[str, Any],
) -> tuple[Graph, Shapes]:
    """One graph of a model in the mode it is in.

    Args:
        model: it is not changed.
        inputs: the structure of its inputs.
        examples: the values of the placeholders.
        constants: what the graph reads and the model does not hold under a name is added here.

    Raises:
        CaptureError: export cannot follow the forward, or would lose something of it.
    """
    hooked = [path or "the model" for path, m in model.named_modules() if has_hooks(m)]
    if hooked:
        raise CaptureError(f"export would run the hooks of {', '.join(hooked[:3])} only once")
    own = [value.detach().requires_grad_(value.requires_grad) for value in examples]
    call = Call()
    program = exported(Flat(model, inputs, call), own, call)
    spec = OutputSpec.of(call.returned, call.results)
    return Assembly(model, program, inputs.names, own, constants).graph(spec)


def exported(model: Flat, examples: Sequence[Tensor], call: Call) -> Any:
    """The program, with as many sizes left open as export can.

    Raises:
        CaptureError: export fails even with every size fixed.
    """
    from torch.export import export

    error: Exception | None = None
    for sizes in open_sizes(examples):
        call.all_sizes = error is None
        try:
            before = python_generators()
            with unassigned(model), noticing(), torch.enable_grad():
                program = export(
                    model, tuple(examples), strict=False, dynamic_shapes={"values": sizes}
                )
                if python_generators() != before:
                    raise CaptureError("it draws random numbers in Python; export would keep them")
            return program
        except Lost as lost:
            where = f" ({lost.line})" if lost.line else ""
            raise CaptureError(f"{lost}{where}") from lost
        except CaptureError:
            raise
        except Exception as failure:
            error = error or failure
            if is_final(failure):
                break
    assert error is not None, "there is at least one way to choose the sizes"
    raise CaptureError(explained(error)) from error


def open_sizes(examples: Sequence[Tensor]) -> Iterator[tuple[dict[int, Any], ...]]:
    """Which sizes to leave open: all, the first of each input, none."""
    from torch.export import Dim

    yield tuple(dict.fromkeys(range(x.dim()), Dim.AUTO) for x in examples)
    yield tuple({0: Dim.AUTO} if x.dim() else {} for x in examples)
    yield tuple({} for _ in examples)


def is_final(error: Exception) -> bool:
    """Whether fixed sizes would not help: the forward asks for a value."""
    from torch._subclasses.fake_tensor import DataDependentOutputException
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    return isinstance(error, (DataDependentOutputException, GuardOnDataDependentSymNode))


def explained(error: Exception) -> str:
    """The first sentence of export's message, and the user's line."""
    line, reason = line_of(error), reason_of(error).replace("self.model.", "self.")
    return f"{reason} ({line})" if line else reason


@contextmanager
def noticing() -> Iterator[None]:
    """While tracing, what would be lost raises; the random generators are put back."""
    function, hooks = torch.autograd.Function, torch.autograd.graph.saved_tensors_hooks

    def apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        raise Lost(
            f"it applies the custom autograd.Function {cls.__name__}, whose backward export would "
            "lose"
        )

    def enter(self: Any) -> None:
        raise Lost("it checkpoints or offloads activations, which export would drop")

    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        # A recurrent layer lists its weights anew when export puts fake ones in; `unassigned` sees
        # what the forward assigns.
        warnings.filterwarnings("ignore", ".*assigned during export")
        stack.enter_context(undisturbed())
        stack.enter_context(swapped(function, "apply", classmethod(apply)))
        stack.enter_context(swapped(hooks, "__enter__", enter))
        yield
