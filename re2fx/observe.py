"""What the submodules of a model are called with, and where it adds, seen in a run of each mode.

The model is run on its example inputs, once in train and once in eval mode, since a part may run in
one of them only (LayerDrop, losses). Autograd keeps nothing of it, and what the run leaves behind
is put back. Of each call the structure of the arguments and the sizes of the tensors are
remembered, never the tensors.
"""

from __future__ import annotations

import enum
import inspect
import types
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from .capture import mode_of
from .errors import CaptureError
from .inputs import bind, split
from .module import RewiredModule
from .snapshot import Snapshot

PLAIN = (
    bool, int, float, complex, str, bytes, type(None), type, enum.Enum, slice, torch.dtype,
    torch.device, torch.layout, torch.memory_format, torch.Size, types.FunctionType,
    types.BuiltinFunctionType,
)  # fmt: skip
SUMS = {"aten::add", "aten::add_", "aten::sub", "aten::sub_", "aten::rsub"}
HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_backward_hooks",
    "_backward_pre_hooks", "_state_dict_hooks", "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
)  # fmt: skip


@dataclass(frozen=True)
class TensorLike:
    """All that is remembered of a tensor."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool

    def make(self, device: torch.device | str | None = None) -> torch.Tensor:
        """A tensor like it, whose values are anything."""
        made = torch.empty_strided(
            self.shape, self.stride, dtype=self.dtype, device=device or self.device
        )
        return made.requires_grad_(self.requires_grad)


@dataclass(frozen=True)
class Opaque:
    """An argument that is neither a tensor nor a value that could be compared at a call."""

    kind: str


@dataclass(frozen=True)
class Call:
    """The arguments of one call, with a `TensorLike` for each tensor."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def made(self, device: str | None = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments like those of the call."""
        args, kwargs = pytree.tree_map(
            lambda x: x.make(device) if isinstance(x, TensorLike) else x, (self.args, self.kwargs)
        )
        return args, kwargs

    def structure(self, module: nn.Module) -> Any:
        """What must be the same in all calls: nesting, plain values, and which are tensors.

        Raises:
            InputError: the arguments are not those of the module's forward.
        """
        signature = inspect.signature(module.forward)
        arguments = bind(type(module).__name__, signature, self.args, self.kwargs)
        return pytree.tree_map(lambda x: TensorLike if isinstance(x, TensorLike) else x, arguments)

    def opaque(self) -> str | None:
        """The first argument that cannot be told from another."""
        for path, leaf in pytree.tree_flatten_with_path((self.args, self.kwargs))[0]:
            if isinstance(leaf, Opaque):
                where = getattr(path[1], "key", getattr(path[1], "idx", path[1]))
                return f"the argument {where} holds a {leaf.kind}"
        return None


@dataclass
class Observed:
    """What the runs showed, by the paths of the submodules.

    Attributes:
        calls: the distinct calls of each.
        additions: how many sums of two tensors a run makes in it, those of its submodules included.
        assigned: submodules that assign tensors to themselves in a run, and to which attribute.
        failures: the modes in which the model did not run, with the reason.
    """

    calls: dict[str, list[Call]] = field(default_factory=dict)
    additions: Counter[str] = field(default_factory=Counter)
    assigned: dict[str, str] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)


def observe(model: nn.Module, example_inputs: Any) -> Observed:
    """Run a model in both modes and watch its submodules.

    Args:
        model: it is left as it was.
        example_inputs: as for `re2fx.transform`.

    Raises:
        CaptureError: it runs in neither mode.
    """
    observed = Observed()
    tensors = [x for x in pytree.tree_leaves(example_inputs) if isinstance(x, torch.Tensor)]
    devices = {x.device for x in (*tensors, *model.parameters(), *model.buffers())}
    hooks = [(place, dict(place)) for place in hook_places(model)]
    for training, mode in ((True, "train"), (False, "eval")):
        snapshot = Snapshot(model, {}, devices)
        held = dict(held_tensors(model))
        try:
            with mode_of(model, training):
                run(model, example_inputs, observed)
                observed.assigned.update(assigned(model, held))
        except Exception as error:  # whatever a forward may raise
            lines = str(error).strip().splitlines()
            observed.failures[mode] = f"{type(error).__name__}: {lines[0] if lines else ''}"
        finally:
            snapshot.restore()
            for place, before in hooks:
                place.clear()
                place.update(before)
    if len(observed.failures) == 2:
        reasons = "; ".join(f"in {mode} mode {why}" for mode, why in observed.failures.items())
        raise CaptureError(
            f"{type(model).__name__} does not run on example_inputs=, so nothing is known of its "
            f"submodules: {reasons}"
        )
    return observed


def held_tensors(model: nn.Module) -> Iterator[tuple[tuple[str, str], Tensor]]:
    """Tensors that submodules hold as attributes or buffers, by path and name."""
    for path, module in model.named_modules():
        for place in (vars(module), module._buffers):
            for name, value in place.items():
                if isinstance(value, Tensor):
                    yield (path, name), value


def assigned(model: nn.Module, before: dict[tuple[str, str], Tensor]) -> Iterator[tuple[str, str]]:
    """The submodules that hold other tensors than before a run."""
    for place, value in held_tensors(model):
        if before.get(place) is not value:
            yield place


def hook_places(model: nn.Module) -> Iterator[dict[Any, Any]]:
    """The dictionaries that hold the hooks of a model."""
    for module in model.modules():
        for name in HOOKS:
            place = vars(module).get(name)
            if place is not None:
                yield place


def run(model: nn.Module, example_inputs: Any, observed: Observed) -> None:
    """One forward in the mode the model is in."""

    def fresh(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        copy = value.detach().clone().requires_grad_(value.requires_grad)
        return copy.view_as(copy)  # which the model may write to

    args, kwargs = pytree.tree_map(fresh, split(example_inputs))
    with torch.inference_mode(False), torch.enable_grad(), watched(model, observed):
        model(*args, **kwargs)


@contextmanager
def watched(model: nn.Module, observed: Observed) -> Iterator[None]:
    """Note every call of a submodule, and the sums made in it."""
    stack: list[str] = []
    additions: Counter[str] = Counter()
    handles = []
    for path, module in walk(model):
        if isinstance(module, torch.jit.ScriptModule):
            continue
        watcher = Watcher(path, stack, observed.calls.setdefault(path, []))
        handles += [
            module.register_forward_pre_hook(watcher.enter, prepend=True, with_kwargs=True),
            module.register_forward_hook(watcher.leave, always_call=True),
        ]
    try:
        forget = saved_tensors_hooks(lambda tensor: None, lambda nothing: nothing)
        with forget, Additions(stack, additions):
            yield
    finally:
        for handle in handles:
            handle.remove()
        for path, number in additions.items():
            observed.additions[path] = max(observed.additions[path], number)


def walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All submodules but those inside rewired modules; each once, under its first path."""
    inside = tuple(f"{p}." for p, m in model.named_modules() if isinstance(m, RewiredModule))
    for path, module in model.named_modules():
        if not path.startswith(inside):
            yield path, module


@dataclass
class Watcher:
    """The hooks of one submodule."""

    path: str
    stack: list[str]
    calls: list[Call]

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Remember the arguments."""
        self.stack.append(self.path)
        call = Call(*pytree.tree_map(sketch, (args, kwargs)))
        if call not in self.calls:
            self.calls.append(call)

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """The call has ended, or failed."""
        if self.path in self.stack:
            del self.stack[len(self.stack) - 1 - self.stack[::-1].index(self.path) :]


def sketch(value: Any) -> Any:
    """What is remembered of an argument."""
    if isinstance(value, PLAIN):
        return value
    if type(value) not in (torch.Tensor, nn.Parameter) or value.layout is not torch.strided:
        return Opaque(type(value).__name__)
    differentiable = value.is_floating_point() and value.requires_grad
    return TensorLike(
        tuple(value.shape), tuple(value.stride()), value.dtype, value.device, differentiable
    )


class Additions(TorchDispatchMode):
    """Counts the sums of two floating-point tensors in every module that is running."""

    def __init__(self, stack: list[str], additions: Counter[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._stack, self._additions = stack, additions

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in SUMS and all(map(is_activation, args[:2])):
            self._additions.update(set(self._stack))
        return func(*args, **(kwargs or {}))


def is_activation(value: Any) -> bool:
    """Whether a residual could add it."""
    return isinstance(value, torch.Tensor) and value.dim() > 0 and value.is_floating_point()
