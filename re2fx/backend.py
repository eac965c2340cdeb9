"""``torch.compile(model, backend="re2fx")``.

Found through the entry point ``torch_dynamo_backends``; nobody needs to import re2fx first. A graph
from Dynamo is lifted, rewired as `re2fx.transform` would rewire the model, and given to an inner
compiler whose backward reconstructs the streams:

    scope="graph"    the whole graph at once; the joint graph is reversed before it is partitioned
    scope="region"   the eager executor, with one compiled artifact per distinct branch
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, GraphModule

from .budget import is_planned
from .capture import Leaves
from .codegen import compile_graph
from .conditioning import check_conditioning
from .consistency import check_consistency
from .coupling import Coupling, Readout
from .couplings import Couplings, check_drawn, resolve
from .cuts import check_bodies, check_cuts, warn_of_additions, warn_of_limit
from .dynamo import Lifted, lift, lower
from .errors import NoResidualError, OptionError, Re2fxWarning
from .explanation import Explanation
from .fixed_point import FixedPoint, Kernels
from .graph import location
from .inner import SCOPES, Inner
from .module import Memory, Rewired, RewiredModule
from .ops import switches_context
from .options import Options
from .origin import Origin, find_origin
from .passes.mark import is_exact, is_marked, mark, unmark
from .passes.outline import outline
from .passes.reverse import reverse
from .pipeline import make_plan, rewire_plan
from .plan import Plan
from .policy import Policy, Select
from .program import Program, with_kernels
from .regions import Regions
from .weigh import weigh_lifted
from .wiring import DRIFT_TOLERANCE

Function = Callable[..., Any]

# What only the rewiring itself can heed.
REWIRING = (
    "coupling", "readout", "activation", "exact", "leaves", "select", "min_chain", "min_saving",
    "drift_tolerance",
)  # fmt: skip

EXACT_IN_REGIONS = (
    "a branch has to be run again by the very same kernels, and two graphs that are compiled as "
    "wholes fuse it in different ones. Use scope='region', or compiler='eager'"
)


@dataclass(frozen=True)
class Settings:
    """What ``torch.compile(..., options={...})`` may say.

    Attributes:
        coupling, readout, activation, memory, exact, leaves, strict, select, min_chain,
            min_saving, drift_tolerance: as for `re2fx.transform`; the inputs are those of the call
            that is compiled.
        compiler: ``"inductor"``, ``"aot_eager"`` or ``"eager"``.
        compiler_options: Inductor's settings, what ``options`` is for ``backend="inductor"``.
        scope: ``"graph"`` compiles forward and backward as wholes; ``"region"`` compiles each
            distinct branch once, so that compilation does not take longer for deeper networks.
    """

    coupling: Couplings | None = None
    readout: Readout = "mean"
    activation: str = "branch"
    memory: Memory = "reversible"
    exact: bool | FixedPoint = False
    leaves: Leaves = ()
    strict: bool = False
    select: Select | None = None
    min_chain: int = 2
    min_saving: int | float | None = None
    drift_tolerance: float = DRIFT_TOLERANCE
    compiler: str = "inductor"
    compiler_options: Mapping[str, Any] = field(default_factory=dict)
    scope: str = "graph"
    mode: str | None = None

    @classmethod
    def read(cls, mode: str | None, options: Mapping[str, Any] | None) -> Settings:
        """Check names and values before any work is done."""
        names = [f.name for f in fields(cls) if f.name != "mode"]
        for name in options or {}:
            if name not in names:
                raise OptionError(f"backend 're2fx' has no option {name!r}: {', '.join(names)}")
        return cls(**(options or {}), mode=mode)

    def __post_init__(self) -> None:
        if self.scope not in SCOPES:
            raise OptionError(f"scope={self.scope!r}: expected one of 'graph', 'region'")
        if self.scope == "region" and self.memory == "store":
            raise OptionError("scope='region' runs reversibly; memory='store' needs scope='graph'")
        _ = self.rewiring, self.inner
        if is_planned(self.rewiring.memory):
            raise OptionError(
                f"memory={self.memory!r} is planned for the eager executor: use re2fx.transform, "
                "or 'reversible' or 'store' here"
            )
        if self.exact and self.memory == "reversible" and self.whole:
            raise OptionError(f"exact={self.exact!r}: {EXACT_IN_REGIONS}")

    @property
    def whole(self) -> bool:
        """Whether forward and backward are compiled as wholes."""
        return self.scope == "graph" and self.compiler != "eager"

    @property
    def rewiring(self) -> Options:
        """The part that says how to rewire."""
        coupling = Coupling.re2tal() if self.coupling is None else self.coupling
        policy = Policy(self.select, self.min_chain, self.min_saving)
        how = coupling, self.readout, self.activation, self.memory
        return Options(*how, policy, self.exact, self.drift_tolerance)

    @property
    def inner(self) -> Inner:
        """The inner compiler."""
        return Inner(self.compiler, self.mode, self.compiler_options)

    @property
    def rewires(self) -> bool:
        """Whether anything is said about the rewiring itself."""
        default, names = Settings(), REWIRING
        return any(getattr(self, name) != getattr(default, name) for name in names)


def re2fx(
    module: GraphModule,
    inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Function:
    """Compile one of Dynamo's graphs; the backend function.

    Raises:
        OptionError: an option is unknown or has a value it cannot take.
        ChainCutError: the graph is a piece of a chain.
        ModeMismatchError: the model was rewired otherwise when it was compiled before.
        ConditioningError: the coupling cannot be inverted, or loses its digits in a few residuals.
        NoResidualError: nothing can be rewired, with ``strict=True``.
    """
    try:
        return compile_graph_module(module, inputs, Settings.read(mode, options))
    except Exception as error:
        if not torch._dynamo.config.suppress_errors:
            raise
        # Dynamo would run the network as it was, another function, with a line in a log.
        return partial(fail, error)


def fail(error: Exception, *inputs: Any) -> Any:
    """Raise an error when the graph is called."""
    raise error


def compile_graph_module(
    module: GraphModule, inputs: Sequence[Any], settings: Settings
) -> Function:
    """The pipeline on one page."""
    origin = find_origin(module)
    lifted = lift(module, inputs)
    if is_marked(lifted.graph) or from_rewired(lifted.graph, origin):
        return compile_rewired(module, inputs, lifted, origin, settings)
    rewired = rewire_lifted(lifted, inputs, origin, settings)
    if rewired is None:
        return settings.inner.compile(module, inputs, reverse)
    return run_rewired(lifted, rewired, inputs, settings)


def rewire_lifted(
    lifted: Lifted, inputs: Sequence[Any], origin: Origin, settings: Settings
) -> Rewired | None:
    """Rewire a graph as `re2fx.transform` would, or say that there is nothing to rewire."""
    options = settings.rewiring
    weigh = weigh_lifted(lifted, inputs, options.activation, origin.name)
    flow, plan = make_plan(
        lifted.graph, lifted.root, options.activation, settings.leaves, options.policy, weigh
    )
    check_cuts(flow, plan, origin)
    check_bodies(lifted, origin.name)
    warn_of_additions(origin)
    check_consistency(origin, (options, tuple(settings.leaves)), plan)
    if not plan.chains:
        nothing_rewired(origin, plan, settings)
        return None
    warn_of_limit(origin)
    drawn = check_drawn(resolve(options.coupling, plan.chains))
    training = not drawn or in_training(origin)
    rewired = rewire_plan(flow, plan, options, training)
    if settings.memory == "reversible":
        check_conditioning(lifted.root, rewired.wirings, origin.name)
    return rewired


def in_training(origin: Origin) -> bool:
    """The mode of the module that is compiled.

    Raises:
        OptionError: there is none.
    """
    for module in (origin.root, origin.owner):
        if isinstance(module, nn.Module):
            return module.training
    raise OptionError(f"{origin.name}: a coupling that draws needs a module, which has a mode")


def run_rewired(
    lifted: Lifted, rewired: Rewired, inputs: Sequence[Any], settings: Settings
) -> Function:
    """Give a rewired graph to the executor that the settings ask for."""
    reversible = settings.memory == "reversible"
    if not settings.whole:
        return Runner.of(lifted, rewired, settings)
    graph = rewired.graph
    if reversible:
        graph = mark(graph, lifted.root, rewired.wirings)
    return settings.inner.compile(lower(lifted, graph), inputs, reverse)


def compile_rewired(
    module: GraphModule,
    inputs: Sequence[Any],
    lifted: Lifted,
    origin: Origin,
    settings: Settings,
) -> Function:
    """A graph traced from a module that `re2fx.transform` made: nothing is rewired again."""
    if settings.rewires:
        raise OptionError(
            f"{origin.name} is rewired already; {', '.join(REWIRING)} are re2fx.transform's to say"
        )
    if not settings.whole:
        graph, wirings = unmark(lifted.graph)
        return Runner.of(lifted, Rewired(graph, Plan(), wirings), settings)
    if is_exact(lifted.graph):
        raise OptionError(f"{origin.name} was rewired with exact=True: {EXACT_IN_REGIONS}")
    return settings.inner.compile(module, inputs, reverse)


def from_rewired(graph: Graph, origin: Origin) -> bool:
    """Whether any node was traced inside a rewired module."""
    if isinstance(origin.root, RewiredModule):
        return True
    kinds = {
        kind
        for node in graph.nodes
        for _, kind in (node.meta.get("nn_module_stack") or {}).values()
    }
    return any(isinstance(kind, type) and issubclass(kind, RewiredModule) for kind in kinds)


def check_runnable(lifted: Lifted, graph: Graph, settings: Settings) -> None:
    """The executor runs pieces of a graph; what spans pieces it cannot run.

    Raises:
        OptionError: names the node and the remedy.
    """
    for node in graph.nodes:
        held = getattr(lifted.root, str(node.target), None) if node.op == "get_attr" else None
        body = isinstance(held, nn.Module) and settings.compiler != "eager"
        if switches_context(node) or body:
            what = "a higher-order operator" if body else "a switch of autocast or gradients"
            raise OptionError(
                f"{location(node)}: {node.name} is {what}, which scope='region' and "
                "compiler='eager' cannot run; use scope='graph' with another compiler"
            )


class Runner:
    """Runs a lifted graph with the eager executor.

    Args:
        lifted: where the members of a call go.
        program: branches, links and segments.
        stored: the same network as one function, for calls without gradients.
    """

    def __init__(self, lifted: Lifted, program: Program, stored: Function | None) -> None:
        self.lifted, self.program, self.stored = lifted, program, stored

    @classmethod
    def of(cls, lifted: Lifted, rewired: Rewired, settings: Settings) -> Runner:
        """Cut the graph; compile its parts for ``scope="region"``."""
        graph, root, wirings = rewired.graph, lifted.root, rewired.wirings
        check_runnable(lifted, graph, settings)
        if settings.compiler == "eager":
            stored = compile_graph(graph, "stored")
            program = outline(graph, root, wirings if settings.memory == "reversible" else ())
            return cls(lifted, program, stored)
        regions = Regions(root, settings.inner.wrap)
        program = outline(graph, root, wirings, regions.compile)
        return cls(lifted, with_kernels(program, Kernels().compiled(settings.inner.wrap)), None)

    def __call__(self, *inputs: Any) -> Any:
        """Take and return what the graph does."""
        root, activations = self.lifted.split(inputs)
        if self.stored is not None and not torch.is_grad_enabled():
            return self.stored(root, *activations)
        return self.program.run(root, activations)


def nothing_rewired(origin: Origin, plan: Plan, settings: Settings) -> None:
    """Say why a whole model stays as it is; a piece of one may well have no residual."""
    if origin.partial:
        return
    text = (
        f"nothing in {origin.name} can be rewired; it is compiled unchanged.\n"
        f"{Explanation(origin.name, plan, {})}"
    )
    if settings.strict:
        raise NoResidualError(text)
    warnings.warn(text, Re2fxWarning, stacklevel=2)
