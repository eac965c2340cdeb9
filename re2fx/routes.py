"""The ways from a model to a graph, and which one to take.

    symbolic    torch.fx's own tracing: modules stay live, any sizes, no example inputs; stops at
                control flow on values, and keeps the submodule it stopped in whole
    dynamo      what runs, as it runs: keyword arguments, dataclasses, custom backwards, hooks;
                sizes vary (those of images from the fourth capture on) and other arguments are
                fixed; needs example inputs
    export      what runs, run in Python: prints and recurrent layers do not matter; refuses
                hooks, custom backwards and checkpointing, which it would lose; needs example inputs

``auto`` takes symbolic tracing where it loses nothing. Where it failed, had to keep a submodule
whole in which there are sums, lost hooks or met a cast, whose types it does not know, and example
inputs are given, Dynamo is tried, and where that fails export. What they capture is taken if more
residuals are rewired, or as many in fewer chains, or hooks were lost. A graph that is given, a
graph module or an exported program, is taken as it is.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.fx import Graph

from . import dynamo_capture, export_capture, ops
from .capture import Captured, Leaves, mode_of
from .capture import capture as capture_symbolically
from .errors import CaptureError, OptionError, Re2fxWarning
from .given import ProgramModule, given_graph
from .hidden import hides, tables
from .inputs import InputSpec, split
from .policy import has_tensors
from .shapes import Shapes

ROUTES = ("auto", "symbolic", "dynamo", "export")
Found = Callable[[Captured], tuple[int, ...]]
CaptureGraph = Callable[[nn.Module, InputSpec, Sequence[Any], dict[str, Any]], tuple[Graph, Shapes]]


def capture(
    model: nn.Module,
    example_inputs: Any = None,
    leaves: Leaves = (),
    route: str = "auto",
    found: Found = lambda captured: (),
    vary: bool = False,
) -> Captured:
    """Capture a model by a route, or by the one that loses least.

    Args:
        model: any module; it is not changed.
        example_inputs: as for `re2fx.transform`.
        leaves: module paths or classes to keep whole.
        route: one of `ROUTES`.
        found: how good a plan is for what a route captured; tuples are compared.
        vary: whether Dynamo lets all sizes vary, those of images too.

    Raises:
        OptionError: there is no such route.
        CaptureError: no route captures the model; says of each why not.
    """
    if route not in ROUTES:
        raise OptionError(f"capture={route!r}: expected one of {', '.join(map(repr, ROUTES))}")
    given = given_graph(model)
    if given is not None and (route == "auto" or isinstance(model, ProgramModule)):
        captured = given
    elif route == "symbolic":
        captured = capture_symbolically(model, example_inputs, leaves)
    elif route == "dynamo":
        captured = capture_with_dynamo(model, example_inputs, vary)
    elif route == "export":
        captured = capture_with_export(model, example_inputs)
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
    if captured.assigned:
        warnings.warn(
            f"{type(model).__name__} assigns tensors to {', '.join(captured.assigned)} in its "
            "forward, which the transformed model does not: they stay as they are. If it reads "
            "them in a later call, keep the module whole with leaves=[...].",
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
    if symbolic is not None and not loses(model, example_inputs, symbolic):
        return symbolic
    if example_inputs is not None or symbolic is None:
        followed = capture_call(model, example_inputs, failures)
        if followed is not None and (symbolic is None or better(followed, symbolic, found)):
            return replace(followed, failures=failures)
    if symbolic is not None:
        return replace(symbolic, failures=failures)
    if example_inputs is None:
        raise CaptureError(f"{failures['symbolic']} Or pass example_inputs=, and Dynamo is tried.")
    listed = "\n".join(f"  {name}: {reason}" for name, reason in failures.items())
    text = f"{type(model).__name__} cannot be captured by any route:\n{listed}"
    raise CaptureError(text, failures)


def capture_call(
    model: nn.Module, example_inputs: Any, failures: dict[str, str]
) -> Captured | None:
    """By Dynamo, which keeps most of what a call does, or by export, which follows more."""
    ways = {"dynamo": capture_with_dynamo, "export": capture_with_export}
    for name, way in ways.items():
        try:
            return way(model, example_inputs)
        except CaptureError as error:
            failures[name] = str(error)
    return None


def loses(model: nn.Module, example_inputs: Any, symbolic: Captured) -> bool:
    """Whether another route may see more than symbolic tracing, or keep what it lost."""
    if not has_tensors(example_inputs):
        return bool(symbolic.leaves or symbolic.hooks)
    hidden = hides(model, example_inputs, symbolic)  # which marks what cannot be run again
    shared = any(tables(symbolic.train, model))
    return hidden or shared or bool(symbolic.hooks) or casts(symbolic)


def casts(captured: Captured) -> bool:
    """Whether a graph that knows no types has casts, at which a stream may end for it."""
    return any(ops.is_cast(node) and not ops.keeps_type(node) for node in captured.train.nodes)


def better(followed: Captured, symbolic: Captured, found: Found) -> bool:
    """Whether more residuals can be rewired, or as many and more are seen or hooks are kept.

    The more are seen, the more of the model the plan speaks of: a submodule that tracing had to
    keep whole hides what is refused in it.
    """
    numbers = found(followed), found(symbolic)
    return numbers[0] > numbers[1] or (numbers[0] == numbers[1] and bool(symbolic.hooks))


def capture_with_dynamo(model: nn.Module, example_inputs: Any, vary: bool = False) -> Captured:
    """Both modes by Dynamo.

    Raises:
        CaptureError: there are no example inputs, or Dynamo cannot follow the forward.
    """
    capture_graph = partial(dynamo_capture.capture_graph, vary=vary)
    return capture_running(model, example_inputs, "Dynamo", capture_graph)


def capture_with_export(model: nn.Module, example_inputs: Any) -> Captured:
    """Both modes by `torch.export`.

    Raises:
        CaptureError: there are no example inputs, or export cannot follow the forward or would
            lose something of it.
    """
    return capture_running(model, example_inputs, "export", export_capture.capture_graph)


def capture_running(
    model: nn.Module, example_inputs: Any, title: str, capture_graph: CaptureGraph
) -> Captured:
    """Both modes by a route that follows a call with example inputs."""
    name = type(model).__name__
    if example_inputs is None:
        raise CaptureError(f"{name}: {title} needs example_inputs=")
    inputs = InputSpec.of(model, example_inputs)
    examples = inputs.flatten(*split(example_inputs))
    if not all(isinstance(value, torch.Tensor) for value in examples):
        raise CaptureError(f"{name}: {title} needs a tensor for every input")
    constants: dict[str, Any] = {}
    graphs, shapes = {}, []
    for training in (True, False):
        with mode_of(model, training):
            graphs[training], assumed = capture_graph(model, inputs, examples, constants)
        if assumed not in shapes:
            shapes.append(assumed)
    inputs = replace(inputs, shapes=tuple(shapes))
    return Captured(graphs[True], graphs[False], inputs, constants, route=title.lower())
