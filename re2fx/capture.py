"""Model to graph: `torch.fx` symbolic tracing with live modules, in train and in eval mode.

What plain ``symbolic_trace`` gets silently wrong is handled here: it bakes ``self.training`` into
functional calls (two graphs, one per mode), it loses the backward of a custom
``autograd.Function`` (its module stays a leaf), it takes the wrong branch at ``if mask is not
None`` (arguments that are not given are fixed to their defaults, and checked at every call), and it
leaves constants behind on the traced model (they are kept apart), it draws random numbers once and
keeps them, and it changes a buffer once, while tracing (such modules stay leaves). So do modules
that run operations under another state than the forward began with, such as autocast or
``no_grad``: plain tracing loses it.
"""

from __future__ import annotations

import inspect
import linecache
import operator
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .constants import make_anew
from .errors import CaptureError
from .inputs import InputSpec
from .ops import has_hooks
from .state import State, put_back, saving_stops, seeds_stop

_TORCH = os.path.dirname(torch.__file__) + os.sep
_PYTHON = os.path.dirname(os.__file__) + os.sep
_HERE = os.path.dirname(os.path.abspath(__file__))
_TRACERS = {os.path.join(_HERE, f"{name}.py") for name in ("capture", "export_capture", "state")}

Leaves = Sequence["str | type[nn.Module]"]
REMEDY = " What to try: "
_WHOLE = "leaves=[...] keeps a submodule whole"
_FOLLOWED = "capture='dynamo' keeps it"
_KEPT = dict.fromkeys(
    ("autocast", "gradient mode", "inference mode", "choice of attention kernels"), _FOLLOWED
)


@dataclass(frozen=True)
class Captured:
    """A model as one FX graph per mode.

    Attributes:
        train: the graph in train mode; ``call_module`` and ``get_attr`` name the model's members.
        eval: the graph in eval mode.
        inputs: how a call's arguments become the graphs' placeholders.
        constants: tensors made while tracing, which the graphs read by name.
        leaves: modules kept whole because tracing into them failed, with the reason.
        hooks: modules whose hooks will not run because tracing went through them.
        assigned: attributes that the forward assigns tensors to, and the graphs do not.
        route: how it was captured.
        failures: the routes that were tried before, and why they were not taken.
    """

    train: fx.Graph
    eval: fx.Graph
    inputs: InputSpec
    constants: dict[str, Any]
    leaves: dict[str, str] = field(default_factory=dict)
    hooks: tuple[str, ...] = ()
    assigned: tuple[str, ...] = ()
    route: str = "symbolic"
    failures: dict[str, str] = field(default_factory=dict)


def capture(model: nn.Module, example_inputs: Any = None, leaves: Leaves = ()) -> Captured:
    """Trace a model symbolically, once per mode, without changing it.

    Args:
        model: any module.
        example_inputs: a tuple of positional arguments, a dict of keyword arguments, or one
            argument. Needed only for inputs that are lists, tuples or dicts of tensors, and for
            optional arguments that will be given. The values are not used, their structure is.
        leaves: module paths or classes that are kept whole.

    Raises:
        CaptureError: the model cannot be traced; names the line and the remedy.
    """
    inputs = InputSpec.of(model, example_inputs)
    failed: dict[type[nn.Module], str] = {}
    constants: dict[str, torch.Tensor] = {}
    assigned: dict[str, None] = {}
    graphs = {}
    for mode in (True, False):
        with mode_of(model, mode), attributes_of(model, assigned):
            graphs[mode] = _trace(model, inputs, leaves, failed, constants)
    called = {str(n.target) for g in graphs.values() for n in g.nodes if n.op == "call_module"}
    kinds = {path: type(model.get_submodule(path)) for path in sorted(called)}
    kept = {path: failed[kind] for path, kind in kinds.items() if kind in failed}
    hooks = tuple(dissolved_hooks(model, graphs[True]))
    inside = tuple(f"{path}." for path in kept)  # traced into before it was kept whole
    lost = tuple(name for name in assigned if not name.startswith(inside))
    return Captured(graphs[True], graphs[False], inputs, constants, kept, hooks, lost)


@contextmanager
def mode_of(model: nn.Module, training: bool) -> Iterator[None]:
    """Set every training flag, and give each its own value back afterwards."""
    flags = {module: module.training for module in model.modules()}
    try:
        for module in flags:
            module.training = training
        yield
    finally:
        for module, flag in flags.items():
            module.training = flag


@contextmanager
def attributes_of(model: nn.Module, assigned: dict[str, None]) -> Iterator[None]:
    """Take back what a forward assigns to its modules while it is traced, which are proxies.

    Args:
        model: whose modules.
        assigned: the names of these attributes are added.
    """
    before = [(path, vars(module), dict(vars(module))) for path, module in model.named_modules()]
    try:
        yield
    finally:
        for path, held, values in before:
            changed = (name for name, value in held.items() if isinstance(value, fx.Proxy))
            assigned.update(dict.fromkeys(f"{path}.{name}".strip(".") for name in changed))
            for name in held.keys() - values.keys():
                del held[name]
            held.update(values)


def _trace(
    model: nn.Module,
    inputs: InputSpec,
    leaves: Leaves,
    failed: dict[type[nn.Module], str],
    constants: dict[str, torch.Tensor],
) -> fx.Graph:
    """Trace; when a submodule cannot be traced, keep its class whole and try again."""
    while True:
        tracer = Tracer(inputs, [*leaves, *failed])
        try:
            return tracer.record(model, constants)
        except _Untraceable as error:
            if error.path is None:
                raise _explained(model, error) from error.__cause__
            failed[type(model.get_submodule(error.path))] = error.reason
        finally:
            vars(tracer).clear()  # fx leaves it in a cycle, which would keep the model alive


class _Untraceable(Exception):
    """Tracing stopped inside the submodule ``path``; None for the model itself."""

    def __init__(self, path: str | None, reason: str, line: str) -> None:
        super().__init__(reason)
        self.path, self.reason, self.line = path, reason, line


class _CustomFunction(Exception):
    """A ``torch.autograd.Function`` met while tracing."""


class _Effect(Exception):
    """Something happened while tracing that should happen in every call."""


class _NoEffects(TorchDispatchMode):
    """While tracing, operations that run for real must neither draw nor write to the model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        members = (*model.parameters(), *model.buffers())
        self._storages = {tensor.untyped_storage()._cdata for tensor in members}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise _Effect("it draws random numbers, which tracing would draw once and for all")
        for argument, value in zip(func._schema.arguments, args, strict=False):
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written and self._is_member(value):
                raise _Effect(
                    "it changes one of the model's tensors in place, which tracing would do once "
                    "and for all"
                )
        return func(*args, **(kwargs or {}))

    def _is_member(self, value: Any) -> bool:
        tensor = isinstance(value, torch.Tensor)
        return tensor and value.untyped_storage()._cdata in self._storages


def python_generators() -> tuple[Any, ...]:
    """The state of the generators that torch does not know."""
    import random

    numpy = sys.modules.get("numpy")
    kind, keys, *rest = numpy.random.get_state() if numpy is not None else ("", b"")
    return random.getstate(), kind, bytes(keys), *rest


class Proxy(fx.Proxy):
    """A proxy that records ``x += y`` as what it is.

    Plain proxies fall back to ``x = x + y``, which another name of the same tensor would not see.
    """

    def _in_place(self, function: Callable[..., Any], other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    def __iadd__(self, other: Any) -> Any:
        return self._in_place(operator.iadd, other)

    def __isub__(self, other: Any) -> Any:
        return self._in_place(operator.isub, other)

    def __imul__(self, other: Any) -> Any:
        return self._in_place(operator.imul, other)

    def __itruediv__(self, other: Any) -> Any:
        return self._in_place(operator.itruediv, other)

    def __ifloordiv__(self, other: Any) -> Any:
        return self._in_place(operator.ifloordiv, other)

    def __ipow__(self, other: Any) -> Any:
        return self._in_place(operator.ipow, other)


class Tracer(fx.Tracer):
    """Keeps modules live where it can, and remembers the user's source line of every node."""

    def __init__(self, inputs: InputSpec, whole: Sequence[str | type[nn.Module]] = ()) -> None:
        super().__init__()
        self._inputs = inputs
        self._paths = {leaf for leaf in whole if isinstance(leaf, str)}
        self._classes = tuple(leaf for leaf in whole if isinstance(leaf, type))
        self._state: State | None = None

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Wrap a node."""
        return Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Torch's own modules, and childless ones whose inside must stay live.

        A childless module with parameters, buffers or hooks of its own, or whose code asks for its
        training flag, is called as a module: its flag, its hooks and its weights stay live.
        """
        if module_qualified_name in self._paths or isinstance(m, self._classes):
            return True
        if super().is_leaf_module(m, module_qualified_name):
            return True
        if any(True for _ in m.children()):
            return False
        state = any(True for _ in m.parameters()) or any(True for _ in m.buffers())
        return state or has_hooks(m) or _asks_for_mode(type(m))

    def record(self, model: nn.Module, constants: dict[str, torch.Tensor]) -> fx.Graph:
        """Trace, moving the constants that fx leaves on the model into ``constants``."""
        before = set(vars(model))
        try:
            before_all = python_generators()
            with _one_state(), _custom_functions_stop(), _NoEffects(model):
                self._state = State()
                graph = self.trace(model)
            _check_generators(before_all)
        except _Untraceable:
            raise
        except Exception as error:
            raise _Untraceable(None, reason_of(error), line_of(error)) from error
        finally:
            left = {name: vars(model)[name] for name in vars(model).keys() - before}
            for name in left:
                delattr(model, name)
        renamed = {}
        for name, value in left.items():
            renamed[name] = f"_re2fx_constant{len(constants)}"
            constants[renamed[name]] = value
        for node in graph.nodes:
            if node.op == "get_attr" and node.target in renamed:
                node.target = renamed[node.target]
        make_anew(graph, model, set(renamed.values()))
        return graph

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        """Placeholders for the tensors of the inputs, in the inputs' real structures."""

        def placeholder(name: str) -> fx.Proxy:
            return self.create_proxy("placeholder", name, (), {})

        arguments = self._inputs.arguments(placeholder)

        def call(root: nn.Module, *unused: Any) -> Any:
            return root_fn(root, *arguments.args, **arguments.kwargs)

        return call, [self.root]

    def check_state(self) -> None:
        """Raise if operations now come under another state than the forward began with."""
        changed = self._state.changed() if self._state is not None else None
        if changed is not None:
            raise _Effect(
                f"operations run under another {changed} here than the forward began with, which "
                f"symbolic tracing would lose; {_KEPT.get(changed, _WHOLE)}"
            )

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        self.check_state()
        node = super().create_node(*args, **kwargs)
        frame = user_frame(sys._getframe(1))
        if frame is not None and node.op not in ("placeholder", "output"):
            file, line, function = frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name
            code = linecache.getline(file, line).strip()
            node.meta["source_line"] = (file, line, function, code)
            node.meta["stack_trace"] = f'  File "{file}", line {line}, in {function}\n    {code}\n'
        return node

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        self.check_state()  # here, where the caller is to blame
        before = python_generators()
        try:
            result = super().call_module(m, forward, args, kwargs)
            _check_generators(before)
            return result
        except _Untraceable:
            raise
        except Exception as error:
            path = self.path_of_module(m)
            raise _Untraceable(path, reason_of(error), line_of(error)) from error


@contextmanager
def _one_state() -> Iterator[None]:
    """A forward is traced with gradients on, and what it sets is set back."""
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        put_back(),
        seeds_stop(_Effect, is_library),
        saving_stops(_Effect),
    ):
        yield


def _check_generators(before: tuple[Any, ...]) -> None:
    """Raise if Python's or numpy's generator has moved since."""
    if python_generators() != before:
        raise _Effect(
            "it draws random numbers in Python, which tracing would draw once and for all"
        )


def is_library(file: str) -> bool:
    """Whether a file is torch's, Python's own, or one that traces, and not a model's."""
    installed = "site-packages" in file or "dist-packages" in file
    own = file.startswith((_TORCH, "<")) or file in _TRACERS
    return own or (file.startswith(_PYTHON) and not installed)


def user_frame(frame: FrameType | None) -> FrameType | None:
    """The innermost frame outside torch and this package's tracers, of those being traced."""
    while frame is not None and frame.f_code is not Tracer.record.__code__:
        file = frame.f_code.co_filename
        if not is_library(file):
            return frame
        frame = frame.f_back
    return None


def _asks_for_mode(kind: type[nn.Module]) -> bool:
    """Whether a module's forward mentions its training flag."""
    try:
        return "training" in inspect.getsource(kind.forward)
    except (OSError, TypeError):
        return True


@contextmanager
def _custom_functions_stop() -> Iterator[None]:
    """While tracing, applying a custom autograd.Function to a proxy raises instead of vanishing."""
    function = torch.autograd.Function
    original = function.__dict__["apply"]

    def apply(cls: type[torch.autograd.Function], *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(value, fx.Proxy) for value in (*args, *kwargs.values())):
            raise _CustomFunction(
                f"it applies the custom autograd.Function {cls.__name__}, whose backward tracing "
                "would lose"
            )
        return original.__func__(cls, *args, **kwargs)

    function.apply = classmethod(apply)  # type: ignore[assignment]
    try:
        yield
    finally:
        function.apply = original  # type: ignore[method-assign]


def reason_of(error: Exception) -> str:
    """The first line of an error's message."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def line_of(error: Exception) -> str:
    """The innermost line of user code in a traceback."""
    trace, found = error.__traceback__, ""
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if not is_library(file):
            code = linecache.getline(file, trace.tb_lineno).strip()
            found = f"{file}:{trace.tb_lineno}: {code}"
        trace = trace.tb_next
    return found


def _explained(model: nn.Module, error: _Untraceable) -> CaptureError:
    """The error a user sees when the model itself cannot be traced."""
    where = f" at {error.line}" if error.line else ""
    return CaptureError(
        f"{type(model).__name__} cannot be traced symbolically{where}: {error.reason}.{REMEDY}"
        "pass example_inputs= if the model takes lists, tuples or dicts of tensors or "
        "needs optional arguments; move the part that depends on tensor values into a submodule of "
        "its own (a submodule that cannot be traced is kept whole); or transform the largest "
        "submodule that can be traced, such as model.backbone."
    )


def dissolved_hooks(model: nn.Module, graph: fx.Graph) -> Iterator[str]:
    """Modules whose hooks will not run because tracing went through them."""
    called = {str(node.target) for node in graph.nodes if node.op == "call_module"}
    for path, module in model.named_modules():
        if not has_hooks(module):
            continue
        parts = path.split(".")
        parents = {".".join(parts[:end]) for end in range(1, len(parts) + 1)}
        if not parents & called:
            yield path or "the model itself"
