"""The pipeline on one page: capture, normalize, detect, chain, rewire, cleanup."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn
from torch.fx import Graph

from . import routes
from .capture import Captured, Leaves
from .choice import Weigh
from .coupling import READOUTS, Coupling, Readout
from .errors import (
    ModeMismatchError,
    NoResidualError,
    OptionError,
    Re2fxWarning,
)
from .explanation import Explanation
from .graph import Flow, copy_graph, forget_examples
from .module import MEMORIES, Executors, Memory, Rewired, RewiredModule
from .passes.chain import chain
from .passes.cleanup import cleanup
from .passes.detect import detect
from .passes.mark import mark
from .passes.normalize import normalize
from .passes.outline import outline
from .passes.rewire import rewire
from .plan import Plan
from .policy import Policy, Select, has_tensors
from .text import count
from .weigh import weigh_model

ACTIVATIONS = ("branch", "stream")


@dataclass(frozen=True)
class Options:
    """How to rewire; checked before any work is done."""

    coupling: Coupling
    readout: Readout
    activation: str
    memory: Memory
    policy: Policy = field(default_factory=Policy)

    def __post_init__(self) -> None:
        if not isinstance(self.coupling, Coupling):
            raise OptionError(f"coupling={self.coupling!r}: expected a re2fx.Coupling")
        for name, allowed in (
            ("readout", READOUTS),
            ("activation", ACTIVATIONS),
            ("memory", MEMORIES),
        ):
            value = getattr(self, name)
            if value not in allowed:
                listed = ", ".join(map(repr, allowed))
                raise OptionError(f"{name}={value!r}: expected one of {listed}")
        if self.memory == "reversible" and not self.coupling.invertible:
            raise OptionError(
                f"coupling={self.coupling}: b = 0 cannot be inverted. Use a coupling with b != 0 "
                "(Coupling.re2tal() is the default), or memory='store'."
            )


def transform(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    coupling: Coupling | None = None,
    readout: Readout = "mean",
    activation: str = "branch",
    memory: Memory = "reversible",
    leaves: Leaves = (),
    capture: str = "auto",
    strict: bool = False,
    select: Select | None = None,
    min_chain: int = 2,
    min_saving: int | float | None = None,
) -> nn.Module:
    """Rewire a residual network so that its activations can be reconstructed instead of stored.

    Args:
        model: any module whose forward can be traced; it is not changed, and the result shares its
            parameters, buffers and submodules.
        example_inputs: a tuple of positional arguments, a dict of keyword arguments, or one
            argument; needed for inputs that are lists, tuples or dicts of tensors, for optional
            arguments that will be given, and where bytes decide: for ``min_saving``, and to choose
            between chains that lie inside one another. Only structure and shapes are used.
        coupling: how the two streams combine; `Coupling.re2tal` by default.
        readout: ``"mean"`` of the two streams (Re2TAL's), or ``"sum"``, which keeps the full
            update.
        activation: where an activation behind an addition goes, ``"branch"`` or ``"stream"``.
        memory: ``"reversible"``, or ``"store"`` for ordinary autograd on the same network.
        leaves: module paths or classes to keep whole.
        capture: how the model becomes a graph: ``"symbolic"``, ``"dynamo"``, or ``"auto"`` for the
            one that loses least; see `re2fx.routes`.
        strict: raise instead of warn when nothing can be rewired.
        select: which residuals may be rewired: a function of a `Residual` that says whether, or a
            pattern of module paths as in `fnmatch`, or several, of which those with ``!`` in front
            exclude. A chain ends at a residual that is not selected.
        min_chain: number of residuals, at least 2, from which on a chain is rewired.
        min_saving: what a chain must save to be rewired: bytes, as a whole number, or a fraction
            of what it keeps for the backward; predicted for ``example_inputs`` as if every
            parameter were trained.

    Returns:
        a `torch.fx.GraphModule` that computes the rewired network, or ``model`` itself, with a
        warning, if nothing can be rewired.

    Raises:
        OptionError: an argument has a value it cannot take.
        CaptureError: the model cannot be traced.
        ModeMismatchError: train and eval mode would be rewired differently.
        ConditioningError: the coupling loses too many digits over a chain's depth.
        NoResidualError: nothing can be rewired, with ``strict=True``.
    """
    if isinstance(model, RewiredModule):
        raise OptionError(f"{type(model).__name__} is rewired already")
    policy = Policy(select, min_chain, min_saving)
    options = Options(coupling or Coupling.re2tal(), readout, activation, memory, policy)
    policy.check_shapes(example_inputs)
    captured = capture_model(model, example_inputs, activation, leaves, capture)
    weigh = weigher(model, example_inputs, captured, activation)
    train = rewire_graph(captured.train, model, options, leaves, weigh=weigh)
    eval_ = rewire_graph(captured.eval, model, options, leaves, weigh=weigh)
    agree(type(model).__name__, train.plan, eval_.plan)
    if not train.plan.chains:
        nothing_rewired(model, train.plan, captured, strict)
        return model
    executors = Executors(outline, mark)
    return RewiredModule(
        model, train, eval_, captured.inputs, captured.constants, memory, executors
    )


def capture_model(
    model: nn.Module, example_inputs: Any, activation: str, leaves: Leaves, route: str
) -> Captured:
    """The model's graphs, by the route in which most residuals are rewired."""

    def found(captured: Captured) -> int:
        return make_plan(captured.train, model, activation, leaves)[1].rewired

    return routes.capture(model, example_inputs, leaves, route, found)


def weigher(
    model: nn.Module, example_inputs: Any, captured: Captured, activation: str
) -> Weigh | None:
    """What predicts the bytes that a model's chains keep; None without shapes."""
    if not has_tensors(example_inputs):
        return None
    return weigh_model(model, example_inputs, captured.inputs, captured.constants, activation)


def make_plan(
    graph: Graph,
    model: nn.Module,
    activation: str = "branch",
    leaves: Leaves = (),
    policy: Policy | None = None,
    weigh: Weigh | None = None,
) -> tuple[Flow, Plan]:
    """What would be done with a captured graph, and the normalised graph it speaks of.

    Args:
        graph: the captured graph; left as it is.
        model: the module its targets are looked up in.
        activation: where an activation behind an addition goes.
        leaves: modules to leave alone in a graph that was traced into them.
        policy: what is rewired of that which can be; everything by default.
        weigh: predicts what chains keep; the same for the graphs of both modes.
    """
    flow = Flow(normalize(graph, model), model)  # one spelling of add, writes as dataflow
    found = detect(flow, leaves)  # find skip-adds
    return flow, chain(flow, found, activation, policy or Policy(), weigh)  # group and choose


def rewire_graph(
    graph: Graph,
    model: nn.Module,
    options: Options,
    leaves: Leaves = (),
    weigh: Weigh | None = None,
) -> Rewired:
    """The passes in their order.

    Args:
        graph: the captured graph; left as it is.
        model: the module its targets are looked up in.
        options: how to rewire.
        leaves: modules to leave alone in a graph that was traced into them.
        weigh: as for `make_plan`.
    """
    flow, plan = make_plan(graph, model, options.activation, leaves, options.policy, weigh)
    rewired = rewire_plan(flow, plan, options)
    history = (("captured", graph), ("normalized", flow.graph), *rewired.history)
    for _, step in (*history, ("final", rewired.graph)):
        forget_examples(step)
    return replace(rewired, history=history)


def rewire_plan(flow: Flow, plan: Plan, options: Options) -> Rewired:
    """Rewire what was planned."""
    rewired, wirings = rewire(
        flow, plan, options.coupling, options.readout, options.activation
    )  # the two-stream form
    before = copy_graph(rewired)
    cleanup(rewired)  # dead tuple elements and shape reads
    return Rewired(rewired, plan, wirings, (("rewired", before),))


def explain(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    activation: str = "branch",
    leaves: Leaves = (),
    capture: str = "auto",
    select: Select | None = None,
    min_chain: int = 2,
    min_saving: int | float | None = None,
) -> Explanation:
    """List every skip-add: rewired, or refused and why, with its source line.

    Args:
        model: any module whose forward can be traced; it is not changed.
        example_inputs: as for `transform`.
        activation: as for `transform`.
        leaves: as for `transform`.
        capture: as for `transform`.
        select: as for `transform`.
        min_chain: as for `transform`.
        min_saving: as for `transform`.

    Raises:
        OptionError: an argument has a value it cannot take.
        CaptureError: the model cannot be traced.
    """
    policy = Policy(select, min_chain, min_saving)
    if isinstance(model, RewiredModule):
        return Explanation(type(model).__name__, model.plan, {})
    policy.check_shapes(example_inputs)
    captured = capture_model(model, example_inputs, activation, leaves, capture)
    weigh = weigher(model, example_inputs, captured, activation)
    _, plan = make_plan(captured.train, model, activation, leaves, policy, weigh)
    return explanation(model, plan, captured)


def explanation(model: nn.Module, plan: Plan, captured: Captured) -> Explanation:
    """What is done with a captured model."""
    name = type(model).__name__
    return Explanation(name, plan, captured.leaves, captured.route, captured.failures)


def agree(name: str, train: Plan, eval_: Plan) -> None:
    """One function in train and in eval mode, or none at all."""
    if train.signature() == eval_.signature():
        return
    for number, (a, b) in enumerate(zip(train.signature(), eval_.signature(), strict=False)):
        if a != b:
            detail = f"chain {number} is {a} in train mode and {b} in eval mode"
            break
    else:
        detail = (
            f"{count(len(train.chains), 'chain')} in train mode, {len(eval_.chains)} in eval mode"
        )
    raise ModeMismatchError(
        f"{name} would be rewired differently in train and in eval mode, which "
        f"would make two different networks of it: {detail}. Keep the modules that differ whole "
        "with leaves=[...]."
    )


def nothing_rewired(model: nn.Module, plan: Plan, captured: Captured, strict: bool) -> None:
    """Say why, as an error or as a warning."""
    text = (
        f"nothing in {type(model).__name__} can be rewired; the model is returned unchanged.\n"
        f"{explanation(model, plan, captured)}"
    )
    if strict:
        raise NoResidualError(text)
    warnings.warn(text, Re2fxWarning, stacklevel=3)
