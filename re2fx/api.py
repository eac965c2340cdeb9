"""The pipeline on one page: capture, normalize, detect, chain, rewire, cleanup."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.fx import Graph

from . import routes
from .capture import Captured, Leaves
from .choice import Weigh
from .coupling import READOUTS, Coupling, Readout
from .errors import (
    CaptureError,
    ModeMismatchError,
    NoResidualError,
    OptionError,
    Re2fxWarning,
)
from .explanation import Explanation
from .given import as_module
from .graph import Flow, copy_graph, forget_examples, same_graph
from .inputs import Call, InputSpec
from .members import Members
from .module import MEMORIES, Executors, Memory, Rewired, RewiredModule
from .passes.chain import chain
from .passes.cleanup import cleanup
from .passes.detect import detect
from .passes.mark import mark
from .passes.normalize import normalize
from .passes.outline import outline
from .passes.rewire import rewire
from .pieces import Part, Pieces, Rewire, rewire_inside, rewire_pieces
from .piecewise import Account, PiecewiseModule, merged_plan
from .plan import Plan
from .policy import Policy, Select, has_tensors
from .sharding import check_not_sharded
from .text import count
from .twins import say_given_classes
from .variants import Chosen, Recipe, Surroundings
from .weigh import weigh_model

if TYPE_CHECKING:
    from torch.export import ExportedProgram

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
        if self.coupling.c == 0:
            raise OptionError(f"coupling={self.coupling}: c = 0 leaves the branches out")
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
    model: nn.Module | ExportedProgram,
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
            parameters, buffers and submodules. A `torch.fx.GraphModule` and a
            `torch.export.ExportedProgram` are taken as they are.
        example_inputs: a tuple of positional arguments, a dict of keyword arguments, or one
            argument; needed for inputs that are lists, tuples or dicts of tensors, for optional
            arguments that will be given, and where bytes decide: for ``min_saving``, and to choose
            between chains that lie inside one another. A model in which submodules are kept whole
            is run on them, to see what they hide; otherwise only structure and shapes are used.
        coupling: how the two streams combine; `Coupling.re2tal` by default.
        readout: ``"mean"`` of the two streams (Re2TAL's), or ``"sum"``, which keeps the full
            update.
        activation: where an activation behind an addition goes, ``"branch"`` or ``"stream"``.
        memory: ``"reversible"``, or ``"store"`` for ordinary autograd on the same network.
        leaves: module paths or classes to keep whole.
        capture: how the model becomes a graph: ``"symbolic"``, ``"dynamo"``, ``"export"``, or
            ``"auto"`` for the one that loses least, or its parts if none goes through; see
            `re2fx.routes`.
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
        warning, if nothing can be rewired. Of a model that cannot be captured as a whole, with
        ``example_inputs``: a module of its class in which the largest submodules that can be are
        rewired (`re2fx.PiecewiseModule`); the model is run on the example inputs to find them.

    Raises:
        OptionError: an argument has a value it cannot take.
        ShardingError: the model was given to ``fully_shard`` before.
        CaptureError: neither the model nor a part of it with residuals can be captured.
        ModeMismatchError: train and eval mode would be rewired differently.
        ConditioningError: the coupling loses too many digits over a chain's depth.
        NoResidualError: nothing can be rewired, with ``strict=True``.
    """
    if isinstance(model, (RewiredModule, PiecewiseModule)):
        raise OptionError(f"{type(model).__name__} is rewired already")
    model = as_module(model)
    policy = Policy(select, min_chain, min_saving)
    options = Options(coupling or Coupling.re2tal(), readout, activation, memory, policy)
    policy.check_shapes(example_inputs)
    check_not_sharded(model)
    pieces, captured = take(model, example_inputs, options, leaves, capture)
    if pieces.module is not None:
        return pieces.module
    assert captured is not None
    part = rewire_captured(model, example_inputs, captured, options, leaves)
    if part.module is None:
        nothing_rewired(model, part.plan, captured, strict, pieces.account)
        return model
    return part.module


def take(
    model: nn.Module,
    example_inputs: Any,
    options: Options,
    leaves: Leaves = (),
    capture: str = "auto",
    found: routes.Found | None = None,
) -> tuple[Pieces, Captured | None]:
    """A model as a whole, or rewired in pieces where a capture of the whole loses residuals.

    Raises:
        CaptureError: neither the whole nor a submodule worth rewiring can be captured.
    """
    divisible = capture == "auto" and has_tensors(example_inputs)
    rewire, least = rewirer(options), options.policy.min_chain
    found = found or counter(model, options.activation, leaves)
    try:
        captured = routes.capture(model, example_inputs, leaves, capture, found)
    except CaptureError as error:
        if not divisible:
            raise
        return rewire_pieces(model, example_inputs, error, rewire, leaves, least), None
    if divisible and captured.leaves and captured.failures:
        pieces = rewire_inside(model, example_inputs, captured, rewire, leaves, least)
        return pieces, captured
    return Pieces(None, Account()), captured


def rewirer(options: Options) -> Rewire:
    """What rewires a submodule as a model of its own."""

    def rewire(path: str, module: nn.Module, example_inputs: Any, leaves: Leaves) -> Part:
        own = replace(options, policy=replace(options.policy, below=path))
        found = counter(module, options.activation, leaves)
        captured = routes.capture_any(module, example_inputs, leaves, found)
        for graph in (captured.train, captured.eval):
            say_given_classes(graph)
        return rewire_captured(module, example_inputs, captured, own, leaves)

    return rewire


def rewire_captured(
    model: nn.Module,
    example_inputs: Any,
    captured: Captured,
    options: Options,
    leaves: Leaves = (),
) -> Part:
    """The rewired module of what was captured, or its plan alone if nothing is rewired.

    Raises:
        ModeMismatchError: train and eval mode would be rewired differently.
    """
    weigh = weigher(model, example_inputs, captured, options.activation)
    train, eval_ = rewire_modes(model, captured, options, leaves, weigh)
    if not train.plan.chains:
        return Part(None, train.plan, captured)
    inputs, constants, executors = captured.inputs, captured.constants, Executors(outline, mark)
    traced = captured.route in routes.ROUTES  # else the graph was given, and is all there is
    again = recipe(model, captured, options, leaves, train.plan) if traced else None
    rev = RewiredModule(model, train, eval_, inputs, constants, options.memory, executors, again)
    return Part(rev, train.plan, captured)


def rewire_modes(
    model: nn.Module,
    captured: Captured,
    options: Options,
    leaves: Leaves = (),
    weigh: Weigh | None = None,
) -> tuple[Rewired, Rewired]:
    """The rewired graphs of train and eval mode; planned once if the captured ones are equal.

    Raises:
        ModeMismatchError: they would be rewired differently.
    """
    equal = same_graph(captured.train, captured.eval)  # before rewiring, which looks at examples
    train = rewire_graph(captured.train, model, options, leaves, weigh)
    if equal:
        forget_examples(captured.eval)
        history = (("captured", captured.eval), *train.history[1:])
        return train, replace(train, graph=copy_graph(train.graph), history=history)
    eval_ = rewire_graph(captured.eval, model, options, leaves, weigh)
    agree(type(model).__name__, train.plan, eval_.plan)
    return train, eval_


def recipe(
    model: nn.Module, captured: Captured, options: Options, leaves: Leaves, plan: Plan
) -> Recipe:
    """How to capture and rewire a model for another way of calling it."""
    options = replace(options, policy=Policy(Chosen.of(plan)))
    graphs, surroundings = (captured.train, captured.eval), None
    if captured.route != "symbolic":
        surroundings = Surroundings.of(model, graphs, ())
    members = Members.of(model, graphs)
    return Recipe(rewire_again, options, tuple(leaves), captured.route, members, surroundings)


def rewire_again(
    model: nn.Module, call: Call, recipe: Recipe, vary: bool
) -> tuple[InputSpec, dict[bool, Rewired], dict[str, Any]]:
    """A model captured once more, as it is called; see `re2fx.variants`."""
    with torch.inference_mode(False), torch.enable_grad():
        captured = routes.capture(model, call, recipe.leaves, recipe.route, vary=vary)
    train, eval_ = rewire_modes(model, captured, recipe.options, recipe.leaves)
    return captured.inputs, {True: train, False: eval_}, captured.constants


def capture_model(
    model: nn.Module, example_inputs: Any, activation: str, leaves: Leaves, route: str
) -> Captured:
    """The model's graphs, by the route in which most residuals are rewired."""
    found = counter(model, activation, leaves)
    return routes.capture(model, example_inputs, leaves, route, found)


def counter(model: nn.Module, activation: str, leaves: Leaves) -> routes.Found:
    """What tells how good a plan is for what a route captured.

    More residuals that are rewired come first, then fewer chains, then more that are seen.
    """

    def found(captured: Captured) -> tuple[int, ...]:
        plan = make_plan(captured.train, model, activation, leaves)[1]
        return plan.rewired, -len(plan.chains), plan.found

    return found


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
    model: nn.Module | ExportedProgram,
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
    model = as_module(model)
    policy = Policy(select, min_chain, min_saving)
    if isinstance(model, RewiredModule):
        return Explanation(type(model).__name__, merged_plan(model), {})
    if isinstance(model, PiecewiseModule):
        return explanation_of_pieces(type(model).__name__, model, model.account)
    policy.check_shapes(example_inputs)
    options = Options(Coupling.re2tal(), "mean", activation, "store", policy)
    pieces, captured = take(model, example_inputs, options, leaves, capture)
    if pieces.module is not None:
        return explanation_of_pieces(type(model).__name__, pieces.module, pieces.account)
    assert captured is not None
    weigh = weigher(model, example_inputs, captured, activation)
    _, plan = make_plan(captured.train, model, activation, leaves, policy, weigh)
    return explanation(model, plan, captured, pieces.account)


def explanation(
    model: nn.Module, plan: Plan, captured: Captured, account: Account | None = None
) -> Explanation:
    """What is done with a captured model; the account says what was tried with its parts."""
    name, account = type(model).__name__, account or Account()
    plan = Plan.merged([plan, *account.refused])
    shapes = captured.inputs.shapes
    return Explanation(
        name, plan, captured.leaves, captured.route, captured.failures, account,
        shapes[0].in_words() if shapes else {},
    )  # fmt: skip


def explanation_of_pieces(name: str, module: nn.Module, account: Account) -> Explanation:
    """What is done with a model of which submodules were rewired by themselves."""
    plan = Plan.merged([merged_plan(module), *account.refused])
    return Explanation(name, plan, {}, account.route, account.failures, account)


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


def nothing_rewired(
    model: nn.Module, plan: Plan, captured: Captured, strict: bool, account: Account
) -> None:
    """Say why, as an error or as a warning."""
    text = (
        f"nothing in {type(model).__name__} can be rewired; the model is returned unchanged.\n"
        f"{explanation(model, plan, captured, account)}"
    )
    if strict:
        raise NoResidualError(text)
    warnings.warn(text, Re2fxWarning, stacklevel=3)
