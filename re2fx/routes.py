"""The ways from a model to a graph, and which one to take.

    symbolic    torch.fx's own tracing: modules stay live, any sizes, no example inputs; stops at
                control flow on values, and keeps the submodule it stopped in whole
    dynamo      what runs, as it runs: keyword arguments, dataclasses, custom backwards, hooks;
                sizes vary, other arguments are fixed; needs example inputs

``auto`` takes symbolic tracing where it goes through. Where it had to keep a submodule whole, or
failed, and example inputs are given, Dynamo is tried, and taken if it finds more residuals.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from .capture import Captured, Leaves, mode_of
from .capture import capture as capture_symbolically
from .dynamo_capture import capture_graph
from .errors import CaptureError, OptionError
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
        return capture_symbolically(model, example_inputs, leaves)
    if route == "dynamo":
        return capture_with_dynamo(model, example_inputs)
    return capture_any(model, example_inputs, leaves, found)


def capture_any(model: nn.Module, example_inputs: Any, leaves: Leaves, found: Found) -> Captured:
    """The first route that goes through, or the better of two that do not quite."""
    failures: dict[str, str] = {}
    symbolic = None
    try:
        symbolic = capture_symbolically(model, example_inputs, leaves)
        if not symbolic.leaves:
            return symbolic
    except CaptureError as error:
        failures["symbolic"] = str(error)
    try:
        dynamo = capture_with_dynamo(model, example_inputs)
    except CaptureError as error:
        failures["dynamo"] = str(error)
    else:
        if symbolic is None or found(dynamo) > found(symbolic):
            return replace(dynamo, failures=failures)
    if symbolic is not None:
        return replace(symbolic, failures=failures)
    listed = "\n".join(f"  {name}: {reason}" for name, reason in failures.items())
    raise CaptureError(f"{type(model).__name__} cannot be captured by any route:\n{listed}")


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
