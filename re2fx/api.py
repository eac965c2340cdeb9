"""`transform` and `explain`: from a model to its rewired form, and to what is said of it."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from . import routes
from .budget import is_planned
from .capture import Captured, Leaves
from .choice import Weigh
from .coupling import Coupling, Readout
from .couplings import (
    Couplings,
    given,
)
from .errors import (
    CaptureError,
    NoResidualError,
    OptionError,
    Re2fxWarning,
)
from .explanation import Explanation, explanation, explanation_of_pieces
from .fixed_point import FixedPoint
from .given import as_module
from .inputs import Call, InputSpec, split
from .members import Members
from .module import Executors, Memory, Rewired, RewiredModule
from .options import Options
from .passes.mark import mark
from .passes.outline import outline
from .pieces import Part, Pieces, Rewire, rewire_inside, rewire_pieces
from .piecewise import Account, PiecewiseModule, check_whole, merged_plan
from .pipeline import make_plan, recouple, rewire_modes, rewire_plan
from .plan import Plan
from .planner import plan_frames
from .policy import Policy, Select, has_tensors
from .sharding import check_not_sharded
from .twins import say_given_classes
from .variants import Chosen, Recipe, Surroundings
from .weigh import weigh_model
from .wiring import DRIFT_TOLERANCE

if TYPE_CHECKING:
    from torch.export import ExportedProgram


def transform(
    model: nn.Module | ExportedProgram,
    example_inputs: Any = None,
    *,
    coupling: Couplings | None = None,
    readout: Readout = "mean",
    activation: str = "branch",
    memory: Memory = "reversible",
    exact: bool | FixedPoint = False,
    leaves: Leaves = (),
    capture: str = "auto",
    strict: bool = False,
    select: Select | None = None,
    min_chain: int = 2,
    min_saving: int | float | None = None,
    drift_tolerance: float = DRIFT_TOLERANCE,
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
        coupling: how the two streams combine; `Coupling.re2tal` by default. One for all chains, a
            sequence with one per chain in the order in which `explain` lists them, or a function
            of a `Chain` that returns one.
        readout: ``"mean"`` of the two streams (Re2TAL's), ``"sum"``, which keeps the full
            update, or ``"last"``, the newer stream alone.
        activation: where an activation behind an addition goes: into the ``"branch"``, to where
            the ``"stream"`` is read, or nowhere: ``"block"`` couples whole blocks and starts
            nearest to the given network, for couplings such as `Coupling.consistent` with b < 1/3.
            Norms behind additions stay where they are in the same way, under such couplings alone.
        memory: ``"reversible"``, ``"store"`` for ordinary autograd on the same network, or what a
            training step is to fit into: ``"lowest"``, or a budget in bytes, as a whole number or
            as text such as ``"6GiB"`` or ``"500MB"``. Which blocks are reversed and which stored,
            what outside the chains is run again and what runs in slices is then planned for the
            shapes of ``example_inputs``, before this returns if the model is in train mode; see
            `RewiredModule.memory_plan`. A budget is for what a step has alive at its highest above
            parameters, gradients, buffers and inputs. Autocast that is active counts, so call this
            under the one you train with; a loss outside the model does not. Steps are planned for
            the eager executor.
        exact: carry the streams in fixed point, so that they are reconstructed to the bit at any
            depth; needs ``|b| = 2^-j`` and keeps ``j`` bits per element and block. A `FixedPoint`
            says how fine and how wide the numbers are.
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
        drift_tolerance: relative rounding error that a reconstructed state may have. A chain whose
            coupling amplifies rounding keeps a true pair of states (an anchor) often enough.

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
        ConditioningError: the coupling cannot be inverted, or loses its digits in a few residuals.
        NoResidualError: nothing can be rewired, with ``strict=True``.
        BudgetError: the budget is below what a training step takes at the least.
    """
    if isinstance(model, (RewiredModule, PiecewiseModule)):
        raise OptionError(f"{type(model).__name__} is rewired already")
    model = as_module(model)
    policy = Policy(select, min_chain, min_saving)
    if coupling is None:
        coupling = Coupling.re2tal()
    how = coupling, readout, activation, memory
    options = Options(*how, policy, exact, drift_tolerance)
    policy.check_shapes(example_inputs)
    check_budget(options.memory, example_inputs)
    check_not_sharded(model)
    pieces, captured = take(model, example_inputs, options, leaves, capture)
    if pieces.module is not None:
        check_whole(pieces.module, options.memory)
        couple_pieces(pieces.module, options)
        return pieces.module
    assert captured is not None
    part = rewire_captured(model, example_inputs, captured, options, leaves)
    if part.module is None:
        nothing_rewired(model, part.plan, captured, strict, pieces.account)
        return model
    if is_planned(options.memory) and has_tensors(example_inputs) and model.training:
        args, kwargs = split(example_inputs)
        part.module.plan_memory(*args, **kwargs)
    return part.module


def check_budget(memory: Memory, example_inputs: Any) -> None:
    """A budget is for a step on inputs of some shapes.

    Raises:
        OptionError: there are none.
    """
    if isinstance(memory, int) and not has_tensors(example_inputs):
        raise OptionError(
            f"memory={memory!r}: a budget needs example_inputs, because what a step takes depends "
            "on the inputs' shapes. Pass tensors of the shape you train with."
        )


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
    found = found or counter(model, options, leaves)
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
    """What rewires a submodule as a model of its own.

    Where the couplings differ, they are given to the chains when all are known.
    """
    if isinstance(options.memory, int):
        options = replace(options, memory="lowest")
    if not isinstance(options.coupling, Coupling):
        stand_in = Coupling.consistent(0.125) if options.policy.post_norm else Coupling.re2tal()
        options = replace(options, coupling=stand_in, memory="store")

    def rewire(path: str, module: nn.Module, example_inputs: Any, leaves: Leaves) -> Part:
        own = replace(options, policy=replace(options.policy, below=path))
        found = counter(module, options, leaves)
        captured = routes.capture_any(module, example_inputs, leaves, found)
        for graph in (captured.train, captured.eval):
            say_given_classes(graph)
        return rewire_captured(module, example_inputs, captured, own, leaves)

    return rewire


def couple_pieces(module: nn.Module, options: Options) -> None:
    """Give the chains of a model's pieces the couplings and the memory that `rewirer` left out.

    Raises:
        OptionError: there are not as many as chains, or a budget is to hold for pieces.
        ConditioningError: one loses too many digits over a chain's depth.
    """
    assert isinstance(module, (RewiredModule, PiecewiseModule)), "what `take` makes"
    if not isinstance(options.coupling, Coupling):
        module.coupling = options.coupling
    if module.memory != options.memory:
        module.memory = options.memory


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
    inputs, constants = captured.inputs, captured.constants
    executors = Executors(outline, mark, recouple, plan_frames)
    traced = captured.route in routes.ROUTES  # else the graph was given, and is all there is
    again = recipe(model, captured, options, leaves, train.plan) if traced else None
    rev = RewiredModule(model, train, eval_, inputs, constants, options.memory, executors, again)
    return Part(rev, train.plan, captured)


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
    model: nn.Module, example_inputs: Any, options: Options, leaves: Leaves, route: str
) -> Captured:
    """The model's graphs, by the route in which most residuals are rewired."""
    found = counter(model, options, leaves)
    return routes.capture(model, example_inputs, leaves, route, found)


def counter(model: nn.Module, options: Options, leaves: Leaves) -> routes.Found:
    """What tells how good a plan is for what a route captured.

    More residuals that are rewired come first, then fewer chains, then more that are seen.
    """

    def found(captured: Captured) -> tuple[int, ...]:
        policy = Policy(post_norm=options.policy.post_norm)
        plan = make_plan(captured.train, model, options.activation, leaves, policy)[1]
        return plan.rewired, -len(plan.chains), plan.found

    return found


def weigher(
    model: nn.Module, example_inputs: Any, captured: Captured, activation: str
) -> Weigh | None:
    """What predicts the bytes that a model's chains keep; None without shapes."""
    if not has_tensors(example_inputs):
        return None
    return weigh_model(model, example_inputs, captured.inputs, captured.constants, activation)


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
    coupling: Couplings | None = None,
    drift_tolerance: float = DRIFT_TOLERANCE,
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
        coupling: as for `transform`; what it means for each chain is said, errors included.
        drift_tolerance: as for `transform`.

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
    used = Coupling.re2tal() if coupling is None else coupling
    readout: Readout = "last" if any(c.draws for c in given(used)) else "mean"
    how = used, readout, activation
    options = Options(*how, "store", policy, drift_tolerance=drift_tolerance)
    pieces, captured = take(model, example_inputs, options, leaves, capture)
    if pieces.module is not None:
        return explanation_of_pieces(type(model).__name__, pieces.module, pieces.account)
    assert captured is not None
    weigh = weigher(model, example_inputs, captured, activation)
    flow, plan = make_plan(captured.train, model, activation, leaves, options.policy, weigh)
    if coupling is not None:
        plan = rewire_plan(flow, plan, options).plan
    return explanation(model, plan, captured, pieces.account)


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
