"""One network for every way it is called.

A capture holds for the arguments it was made with: which of them were given, the sizes it fixed,
and with Dynamo the dtypes of the members and autocast; and for the modules it went through. A call
that it does not hold for is captured again, as it is called, and rewired by the same options. The
new graph must have the plan of the first, chain by chain: what a model computes may depend on how
it is called, what was rewired not.
"""

from __future__ import annotations

import enum
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.fx import Graph

from .codegen import compile_graph
from .couplings import PerChain
from .errors import CaptureError, InputError, ModeMismatchError, Re2fxWarning, UncapturedError
from .frames import Framed
from .graph import lookup
from .inputs import Call, InputSpec
from .members import Members, dissolved
from .memory_plan import MemoryPlan
from .plan import Plan, Residual
from .program import Program
from .rewired import Rewired
from .sharding import check_dissolved
from .text import count, shorten
from .wiring import Wiring

MAX_CAPTURES = 16  # of one module, the first included
FEW = 2  # that are made each for its own sizes of images, which is faster

_PLAIN = (
    type(None), bool, int, str, bytes, enum.Enum, torch.dtype, torch.device, torch.layout
)  # fmt: skip
_LOCK = threading.RLock()


@dataclass(frozen=True)
class Surroundings:
    """What Dynamo writes into a graph besides the inputs' sizes.

    Attributes:
        dtypes: of the members that the graphs read.
        autocast: the dtype of active autocast on the inputs' device.
    """

    dtypes: tuple[tuple[str, torch.dtype], ...]
    autocast: torch.dtype | None

    @classmethod
    def of(
        cls, model: nn.Module, graphs: Sequence[torch.fx.Graph], values: Sequence[Any]
    ) -> Surroundings:
        """Those of a capture that is being made."""
        reads = (n for graph in graphs for n in graph.nodes if n.op == "get_attr")
        names = dict.fromkeys(str(node.target) for node in reads)
        found = ((name, lookup(model, name)) for name in names)
        dtypes = tuple((name, x.dtype) for name, x in found if isinstance(x, torch.Tensor))
        return cls(dtypes, autocast_dtype(model, values))

    def differ(self, model: nn.Module, values: Sequence[Any]) -> str | None:
        """What is another dtype now, in words."""
        autocast = autocast_dtype(model, values)
        if autocast != self.autocast:
            return f"autocast to {self.autocast}, and called with autocast to {autocast}"
        for name, dtype in self.dtypes:
            now = getattr(lookup(model, name), "dtype", dtype)
            if now != dtype:
                return f"{name} of {dtype}, and called with {now}"
        return None


def autocast_dtype(model: nn.Module, values: Sequence[Any]) -> torch.dtype | None:
    """What autocast casts to where the model is, if it is active."""
    tensors = (x for x in (*islice(model.parameters(), 1), *values) if isinstance(x, torch.Tensor))
    device = next((tensor.device.type for tensor in tensors), "cpu")
    if device == "meta" or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


Recouple = Callable[[Rewired, nn.Module, PerChain], Rewired]


def constant(rewired: Rewired, model: nn.Module, couplings: PerChain) -> Rewired:
    """For modules whose couplings nobody changes."""
    raise AssertionError("this module was made without the means to change its coupling")


Frame = Callable[..., tuple[Framed, MemoryPlan]]
Planned = dict[tuple[bool, "torch.dtype | None"], tuple[Framed, MemoryPlan]]


def unplanned(*arguments: Any) -> tuple[Framed, MemoryPlan]:
    """For modules whose memory nobody plans."""
    raise AssertionError("this module was made without a planner")


@dataclass(frozen=True)
class Executors:
    """What runs a rewired graph besides its own code.

    Attributes:
        outline: ``outline(graph, model, wirings)`` cuts it for the eager executor; with a
            `Framing` behind, everything that can be a frame is one.
        mark: writes its streams as marks, for the compiled one.
        recouple: rewires it once more, with another coupling per chain.
        frame: plans the frames of one of its programs.
    """

    outline: Callable[..., Program]
    mark: Callable[[Graph, nn.Module, tuple[Wiring, ...], bool], Graph]
    recouple: Recouple = constant
    frame: Frame = unplanned


@dataclass
class Variant:
    """The network as captured for one way of calling it.

    Attributes:
        inputs: what it holds for.
        rewired: per mode, train or not.
        members: the modules that its graphs have in them; None if the graphs were given.
        surroundings: what else it holds for; None if the graphs call live modules.
        couplings: per chain, as they are wanted now; `settled` brings the graphs up to them.
        functions: per mode the stored network.
        programs: per mode what the eager executor runs.
        marked: per mode and memory the network that the compiled executor traces.
        framed: per mode the frames that were planned.
        memory_plans: per mode what was planned, to be read.
        planned: both per mode and dtype of autocast, also those that are not in use now.
    """

    inputs: InputSpec
    rewired: dict[bool, Rewired]
    members: Members | None = None
    surroundings: Surroundings | None = None
    couplings: PerChain = field(init=False)
    functions: dict[bool, Callable[..., Any]] = field(default_factory=dict)
    programs: dict[bool, Program] = field(default_factory=dict)
    marked: dict[tuple[bool, bool], Callable[..., Any]] = field(default_factory=dict)
    framed: dict[bool, Framed] = field(default_factory=dict)
    memory_plans: dict[bool, MemoryPlan] = field(default_factory=dict)
    planned: Planned = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.couplings = self.rewired[True].couplings

    def __getstate__(self) -> dict[str, Any]:
        names = ("inputs", "members", "surroundings")
        return {name: getattr(self, name) for name in names} | {"rewired": dict(self.rewired)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def differs(self, model: nn.Module, values: Sequence[Any]) -> str | None:
        """What is another module, hook or dtype than in the capture, in a sentence."""
        reason = self.changed(model)
        if reason is None and self.surroundings is not None:
            reason = self.surroundings.differ(model, values)
        return reason and f"{self.inputs.owner} was captured with {reason}."

    def replaced(self, model: nn.Module) -> str | None:
        """Which of the modules that the graphs have in them are others now, in words."""
        if self.members is None:
            return None
        return self.members.replaced(Members.beside(model, self.members.live))

    def changed(self, model: nn.Module) -> str | None:
        """What became of the modules that the graphs have in them, in words.

        Warns of hooks that symbolic tracing would lose again, once.
        """
        if self.members is None:
            return None
        now = Members.beside(model, self.members.live)
        hooked = self.members.hooked(now)
        replaced = self.members.replaced(now)
        if replaced is not None:
            check_dissolved(dissolved(model, self.members.live), self.inputs.owner)
        if replaced is not None or not hooked:
            return replaced
        if self.surroundings is not None:
            return f"other hooks on {shorten(hooked)}"
        self.members = now
        warnings.warn(
            f"{self.inputs.owner}: hooks on {shorten(hooked)} were registered after the capture. "
            "Its graph has these modules dissolved, and they do not run. Register them before "
            "re2fx.transform with example_inputs=, or on modules that the graph calls.",
            Re2fxWarning,
            stacklevel=4,
        )
        return None

    def generate(self, model: nn.Module, executors: Executors) -> None:
        """Make the code of both modes from their graphs."""
        self.forget()
        for mode in self.rewired:
            self.function(mode, model, executors)
            self.program(mode, model, executors)

    def forget(self) -> None:
        """Drop all code; it is made anew where it is needed."""
        for made in (self.functions, self.programs, self.marked):
            made.clear()

    def recouple(self, couplings: PerChain) -> None:
        """Want other couplings: the programs have them at once, all else when it is needed."""
        programs = {
            mode: program.recoupled(*self.rewired[mode].recoupled(couplings))
            for mode, program in self.programs.items()
            if self.rewired[mode].swaps(couplings)
        }
        self.forget()
        if len(programs) < len(self.rewired):
            self.framed, self.memory_plans, self.planned = {}, {}, {}
        self.programs.update(programs)
        self.couplings = couplings

    def settled(self, mode: bool, model: nn.Module, executors: Executors) -> Rewired:
        """What is rewired in a mode, with the couplings that are wanted."""
        with _LOCK:
            rewired = self.rewired[mode]
            if rewired.couplings != self.couplings:
                rewired = executors.recouple(rewired, model, self.couplings)
                self.rewired[mode] = rewired
            return rewired

    def function(self, mode: bool, model: nn.Module, executors: Executors) -> Callable[..., Any]:
        """The stored network of a mode."""
        if mode not in self.functions:
            graph = self.settled(mode, model, executors).graph
            self.functions[mode] = compile_graph(graph, self.inputs.owner)
        return self.functions[mode]

    def program(self, mode: bool, model: nn.Module, executors: Executors) -> Program:
        """What the eager executor runs in a mode."""
        if mode not in self.programs:
            rewired = self.settled(mode, model, executors)
            given = rewired.graph, model, rewired.wirings
            if mode in self.framed:
                self.programs[mode] = self.framed[mode].program(executors.outline, *given)
            else:
                self.programs[mode] = executors.outline(*given)
        return self.programs[mode]

    def plan_as(self, mode: bool, planned: tuple[Framed, MemoryPlan]) -> MemoryPlan:
        """Use what was planned for a mode."""
        framed, plan = planned
        if self.memory_plans.get(mode) is not plan:
            self.programs.pop(mode, None)
            self.framed[mode], self.memory_plans[mode] = framed, plan
        return plan

    def unframe(self) -> None:
        """Forget what was planned."""
        for mode in self.framed:
            self.programs.pop(mode, None)
        self.framed, self.memory_plans, self.planned = {}, {}, {}

    def mark(self, key: tuple[bool, bool], model: nn.Module, executors: Executors) -> None:
        """Make the code of a mode and a memory with the streams marked."""
        if key not in self.marked:
            rewired = self.settled(key[0], model, executors)
            graph = executors.mark(rewired.graph, model, rewired.wirings, key[1])
            self.marked[key] = compile_graph(graph, f"{self.inputs.owner} with marks")


@dataclass(frozen=True)
class Chosen:
    """Selects what a plan rewires, whatever the inputs weigh now."""

    places: frozenset[tuple[str, int, int]]

    @classmethod
    def of(cls, plan: Plan) -> Chosen:
        """What a plan rewires."""
        places = (place for chain in plan.signature() for place in chain)
        # Residuals are selected before those of a layer become one block, each with one branch.
        return cls(frozenset((module, line, number or 1) for module, line, number in places))

    def __call__(self, residual: Residual) -> bool:
        return self.places.issuperset(residual.places)


@dataclass(frozen=True)
class Recipe:
    """How to capture and rewire the model once more.

    Attributes:
        rewire: ``rewire(model, call, recipe, vary)`` makes the inputs' structure, both modes
            and the constants that they read; all sizes may vary if ``vary``.
        options: how to rewire.
        leaves: modules to keep whole.
        route: how to capture.
        members: dissolved in the first capture.
        surroundings: of the first capture.
    """

    rewire: Callable[..., tuple[InputSpec, dict[bool, Rewired], dict[str, Any]]]
    options: Any
    leaves: tuple[Any, ...]
    route: str
    members: Members | None = None
    surroundings: Surroundings | None = None


def capture_again(
    variants: Sequence[Variant],
    recipe: Recipe,
    model: nn.Module,
    constants: dict[str, Any],
    call: Call,
    why: UncapturedError,
) -> Variant:
    """A variant for a call that no other holds for.

    Args:
        variants: those there are, the first the one that all must agree with.
        recipe: how to make another.
        model: captured in the state and the surroundings it is in.
        constants: what the graphs read beside the model's members; those of the new one join.
        call: the arguments.
        why: why the first variant does not hold.

    Raises:
        InputError: the model cannot be captured as it is called, or has been too often.
        ModeMismatchError: it would be rewired differently.
    """
    with _LOCK:
        first = variants[0]
        check_possible(variants, call, why)
        try:
            vary = len(variants) > FEW
            inputs, rewired, read = recipe.rewire(model, call, recipe, vary)
        except CaptureError as error:
            raise InputError(f"{why} Capturing it as it is called now failed: {error}") from None
        check_plan(first, rewired, why)
        graphs = [mode.graph for mode in rewired.values()]
        members, surroundings = Members.of(model, graphs), None
        if recipe.route != "symbolic":
            surroundings = Surroundings.of(model, graphs, call.leaves)
        elif first.members is not None:  # hooks that are new are lost again, which is to be said
            members = replace(members, hooks=first.members.hooks)
        rename(rewired, constants, read)
        return Variant(inputs, rewired, members, surroundings)


def check_possible(variants: Sequence[Variant], call: Call, why: UncapturedError) -> None:
    """Raise the reason why a model cannot be captured again for a call, if there is one."""
    if len(variants) >= MAX_CAPTURES:
        raise InputError(
            f"{why} It has been captured for {len(variants)} ways of calling it, and no more are "
            "tried: transform the model once per way, or call it in fewer ways."
        )
    for value in call.leaves:
        if not isinstance(value, (torch.Tensor, float, *_PLAIN)):
            raise InputError(f"{why} An argument of {type(value).__name__} cannot be captured.")


def check_plan(first: Variant, rewired: dict[bool, Rewired], why: UncapturedError) -> None:
    """Compare what is rewired with the first capture.

    Raises:
        ModeMismatchError: names the first chain that differs.
    """
    for mode, expected in first.rewired.items():
        before, now = expected.plan.signature(), rewired[mode].plan.signature()
        if before == now:
            continue
        pairs = enumerate(zip(before, now, strict=False))
        places = {(module, line) for chain in before for module, line, _ in chain}
        refused = rewired[mode].plan.refusals
        refused = tuple(r for r in refused if (r.location.module, r.location.line) in places)
        refusals = "".join(f"; refused now: {r}" for r in refused[:1])
        detail = f"{count(len(before), 'chain')} then, {len(now)} now{refusals}"
        detail = next((f"chain {i} was {a}, is {b}" for i, (a, b) in pairs if a != b), detail)
        raise ModeMismatchError(
            f"{why} Captured as it is called now it would be rewired differently, which would make "
            f"two different networks of it: {detail}. Transform the model with example_inputs= as "
            "you call it."
        )


def rename(rewired: dict[bool, Rewired], constants: dict[str, Any], read: dict[str, Any]) -> None:
    """Add the constants of new graphs to those there are, under names that are free."""
    names = {}
    for name, value in read.items():
        known = next((n for n, other in constants.items() if other is value), None)
        names[name] = known or f"_re2fx_constant{len(constants)}"
        constants[names[name]] = value
    graphs = (graph for mode in rewired.values() for graph in (mode.graph, mode.normalized))
    for graph in {id(graph): graph for graph in graphs}.values():
        for node in graph.nodes:
            if node.op == "get_attr" and node.target in names:
                node.target = names[str(node.target)]
