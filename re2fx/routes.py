"""The ways from a model to a graph, and which one to take.

    symbolic    torch.fx's own tracing: modules stay live, any sizes, no example inputs; stops at
                control flow on values, and keeps the submodule it stopped in whole
    dynamo      what runs, as it runs: keyword arguments, dataclasses, custom backwards, hooks;
                sizes vary, other arguments are fixed; needs example inputs

``auto`` takes symbolic tracing where it loses nothing. Where it failed, had to keep a submodule
whole or lost hooks, and example inputs are given, Dynamo is tried, and taken if it finds more
residuals, or as many and hooks were lost.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from .capture import Captured, Leaves, mode_of
from .capture import capture as capture_symbolically
from .dynamo_capture import capture_graph
from .errors import CaptureError, OptionError, Re2fxWarning
from .inputs import InputSpec, split

ROUTES = ("auto", "symbolic", "dynamo")
Found = Callable[[Captured], int]


def capture(
    model: nn.Module,
    example_inputs: Any = None,
    leaves: Leaves = (),
    route: str = "auto",
    found: Found = lambda captured: 0,
) -> Captured:
    """Capture a model by a route, or by the one that loses least.

    Args:
        model: any module; it is not changed.
        example_inputs: as for `re2fx.transform`.
        leaves: module paths or classes to keep whole.
        route: one of `ROUTES`.
        found: how many residuals can be rewired in what a route captured.

    Raises:
        OptionError: there is no such route.
        CaptureError: no route captures the model; says of each why not.
    """
    if route not in ROUTES:
        raise OptionError(f"capture={route!r}: expected one of {', '.join(map(repr, ROUTES))}")
    if route == "symbolic":
        captured = capture_symbolically(model, example_inputs, leaves)
    elif route == "dynamo":
        captured = capture_with_dynamo(model, example_inputs)
    else:
        captured = capture_any(model, example_inputs, leaves, found)
    if captured.hooks:
        warnings.warn(
            f"hooks registered on {', '.join(captured.hooks)} will not run in the transformed "
            "model: tracing dissolved these modules into their operations. Register hooks on their "
            "leaves, pass leaves=[...] to keep a module whole, or pass example_inputs=, with which "
            "Dynamo captures hooks too.",
            Re2fxWarning,
            stacklevel=4,
        )
    return captured


def capture_any(model: nn.Module, example_inputs: Any, leaves: Leaves, found: Found) -> Captured:
    """Symbolic tracing if it loses nothing, else the route in which most can be rewired."""
    failures: dict[str, str] = {}
    symbolic = None
    try:
        symbolic = capture_symbolically(model, example_inputs, leaves)
    except CaptureError as error:
        failures["symbolic"] = str(error)
    if symbolic is not None and not symbolic.leaves and not symbolic.hooks:
        return symbolic
    if example_inputs is not None or symbolic is None:
        try:
            dynamo = capture_with_dynamo(model, example_inputs)
        except CaptureError as error:
            failures["dynamo"] = str(error)
        else:
            if symbolic is None or better(dynamo, symbolic, found):
                return replace(dynamo, failures=failures)
    if symbolic is not None:
        return replace(symbolic, failures=failures)
    if example_inputs is None:
        raise CaptureError(f"{failures['symbolic']} Or pass example_inputs=, and Dynamo is tried.")
    listed = "\n".join(f"  {name}: {reason}" for name, reason in failures.items())
    raise CaptureError(f"{type(model).__name__} cannot be captured by any route:\n{listed}")


def better(dynamo: Captured, symbolic: Captured, found: Found) -> bool:
    """Whether Dynamo finds more residuals, or as many and keeps hooks that tracing lost."""
    numbers = found(dynamo), found(symbolic)
    return numbers[0] > numbers[1] or (numbers[0] == numbers[1] and bool(symbolic.hooks))


def capture_with_dynamo(model: nn.Module, example_inputs: Any) -> Captured:
    """Both modes by Dynamo.

    Raises:
        CaptureError: there are no example inputs, or Dynamo cannot follow the forward.
    """
    name = type(model).__name__
    if example_inputs is None:
        raise CaptureError(f"{name}: Dynamo needs example_inputs=")
    inputs = InputSpec.of(model, example_inputs)
    examples = inputs.flatten(*split(example_inputs))
    if not all(isinstance(value, torch.Tensor) for value in examples):
        raise CaptureError(f"{name}: Dynamo needs a tensor for every input")
    constants: dict[str, Any] = {}
    graphs, shapes = {}, []
    for training in (True, False):
        with mode_of(model, training):
            graphs[training], assumed = capture_graph(model, inputs, examples, constants)
        if assumed not in shapes:
            shapes.append(assumed)
    inputs = replace(inputs, shapes=tuple(shapes))
    return Captured(graphs[True], graphs[False], inputs, constants, route="dynamo")
