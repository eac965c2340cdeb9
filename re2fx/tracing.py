"""What a rewired module does while Dynamo traces it, which depends on who will compile the graph.

For ``backend="re2fx"`` it is traced with marks, so that the joint graph can be reversed; for any
other backend as the plain two-stream program, which stores its activations, with a warning.
"""

from __future__ import annotations

import itertools
import warnings
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

import torch

from .errors import OptionError, Re2fxWarning

BACKENDS = ("re2fx.backend", "re2fx.emitted")

_numbers = itertools.count()
_modules: WeakValueDictionary[int, Any] = WeakValueDictionary()


def register(module: Any) -> int:
    """A number to call a rewired module by: Dynamo passes numbers, not modules, to Python."""
    number = next(_numbers)
    _modules[number] = module
    return number


def traced_for_re2fx(number: int, coefficients: str) -> bool:
    """Whether the graph being traced goes to this project's backend or to `re2fx.emit`.

    The module's code is made ready, with marks if so.
    Runs once per trace, in Python: Dynamo takes the result as a constant.

    Args:
        number: the module's, from `register`.
        coefficients: the module's, as text; because Dynamo reads them it guards them, and traces
            again when they are others.
    """
    output, module = _output_graph(), _modules.get(number)
    if module is None:
        return False
    ours = output is not None and _is_ours(output.compiler_fn)
    module.prepare(ours)
    if ours or output is None:
        return ours
    if module.memory != "store" and torch.is_grad_enabled() and not output.export:
        warnings.warn(
            f"{type(module).__name__}: torch.compile with this backend stores the activations of a "
            "rewired model; only backend='re2fx' reconstructs them. The results are the same. Use "
            "torch.compile(model, backend='re2fx'), or set model.memory = 'store' to say that this "
            "is meant.",
            Re2fxWarning,
            stacklevel=2,
        )
    return False


def holds(number: int, index: int) -> str | None:
    """What is not as a variant was captured: a module, a hook or a dtype.

    Dynamo guards the dtypes and autocast by itself.

    Args:
        number: the module's, from `register`.
        index: of the variant.
    """
    reason: str | None = _modules[number].holds(index)
    return reason


def refuse_guard(number: int) -> None:
    """Say that a `DriftGuard` sees nothing of compiled code.

    Raises:
        OptionError: always.
    """
    raise OptionError(
        f"{type(_modules[number]).__name__}: a DriftGuard watches the eager executor only. Detach "
        "it before the module is compiled, and check with re2fx.verify from time to time."
    )


# What torch.compiler.assume_constant_result sets; calling it would import the compiler.
for _function in (traced_for_re2fx, holds, refuse_guard):
    setattr(_function, "_dynamo_marked_constant", True)


def _output_graph() -> Any:
    """The graph Dynamo is writing in this thread, if it is writing one."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        return InstructionTranslator.current_tx().output
    except AttributeError:
        return None


def _is_ours(compiler: Any) -> bool:
    """Whether a compiler function is the backend, behind torch's wrappers around it."""
    seen: set[int] = set()
    stack = [compiler]
    while stack:
        value = stack.pop()
        if value is None or id(value) in seen:
            continue
        seen.add(id(value))
        if getattr(value, "__module__", None) in BACKENDS:
            return True
        stack += [
            getattr(value, name, None)
            for name in ("compiler_fn", "backend_compile_fn", "_torchdynamo_orig_backend")
        ]
        stack += [getattr(value, "__wrapped__", None), getattr(value, "__self__", None)]
        if isinstance(value, partial):
            stack.append(value.func)
    return False
