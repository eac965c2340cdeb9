"""The rewired network as a module: one plan, and the executor that runs it."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch._compile import _disable_dynamo
from torch.fx import Graph, GraphModule

from .budget import MEMORIES as MEMORIES
from .budget import Memory as Memory
from .budget import checked_memory, is_planned
from .coupling import Coupling
from .couplings import Couplings, change, check_conditioned, couplings_of, simplest
from .errors import OptionError, UncapturedError
from .inputs import Call, InputSpec
from .members import visit
from .memory_plan import MemoryPlan
from .plan import Plan
from .program import recording
from .rewired import History as History
from .rewired import Rewired as Rewired
from .state import put_back_on_error
from .tracing import holds, refuse_guard, register, traced_for_re2fx
from .variants import Executors as Executors
from .variants import Recipe, Variant, autocast_dtype, capture_again
from .wiring import Wiring


class LiveRoot:
    """What generated code calls ``self``: the given model, and the constants of its graphs."""

    def __init__(self, model: nn.Module, constants: dict[str, torch.Tensor]) -> None:
        self._model, self._constants = model, constants

    def __getattr__(self, name: str) -> Any:
        constants = self.__dict__["_constants"]
        return constants[name] if name in constants else getattr(self.__dict__["_model"], name)


class _Uninitialised(nn.Module):
    """Keeps `GraphModule` from calling what the given model's class does when one is made."""

    __setattr__ = nn.Module.__setattr__
    __delattr__ = nn.Module.__delattr__

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return object.__new__(cls)

    def __init__(self) -> None:
        nn.Module.__init__(self)


class RewiredModule(GraphModule):
    """A rewired network with the parameters, buffers and submodules of the given model.

    It is an instance of the model's class too, with the model's attributes: what the class offers
    beside ``forward``, such as ``config`` and ``save_pretrained``, is there and runs this network.

    The members are *shared*: what happens to one (``load_state_dict``, ``.to()``, a replaced
    submodule, ``train()``) happens to the other. ``graph`` is the plain two-stream program of the
    current mode and ``plan`` says what was rewired. Made by `re2fx.transform`. A call with other
    sizes, dtypes or optional arguments than the captured ones is captured by itself, once, and must
    have the same plan; ``graph`` stays that of the first capture.
    """

    def __new__(cls, model: nn.Module, *args: Any, **kwargs: Any) -> RewiredModule:
        kind: type[Any] = cls
        if not isinstance(model, GraphModule):
            try:
                kind = type(type(model).__name__, (cls, _Uninitialised, type(model)), {})
            except Exception:  # its class forbids it, or has a metaclass or a layout of its own
                kind = cls
        made: RewiredModule = super().__new__(kind)
        return made

    def __init__(
        self,
        model: nn.Module,
        train: Rewired,
        eval: Rewired,
        inputs: InputSpec,
        constants: dict[str, torch.Tensor],
        memory: Memory,
        executors: Executors,
        recipe: Recipe | None = None,
        variants: Sequence[Variant] = (),
    ) -> None:
        self._executors, self._recipe = executors, recipe
        held_for = (recipe.members, recipe.surroundings) if recipe is not None else ()
        self._variants = [Variant(inputs, {True: train, False: eval}, *held_for), *variants]
        self._live = LiveRoot(model, constants)
        self._number = register(self)
        self._guard: Any = None  # a DriftGuard, while one is attached
        self._edited = False  # by the user, who then called recompile
        self._coefficients = repr(self._variants[0].couplings)  # what Dynamo guards
        self._lineno_map, self._prologue_start = None, 0  # read by Dynamo
        super().__init__({}, Graph(), type(model).__name__)
        # The same dictionaries, not copies of them.
        self._parameters = model._parameters
        self._buffers = model._buffers
        self._modules = model._modules
        self._non_persistent_buffers_set = model._non_persistent_buffers_set
        self._run_as(memory)
        setattr(type(self), "forward", _with_signature(RewiredModule.forward, inputs.signature))
        for variant in self._variants:
            variant.generate(model, executors)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            live = self.__dict__.get("_live")
            own = vars(live._model) if live is not None else {}
            if name not in own:
                raise
            return own[name]

    @property
    def _rewired(self) -> dict[bool, Rewired]:
        """What is rewired in each mode, by the first capture."""
        first = self._variants[0]
        for mode in first.rewired:
            first.settled(mode, self._live._model, self._executors)
        return first.rewired

    @property
    def _inputs(self) -> InputSpec:
        return self._variants[0].inputs

    @property
    def plan(self) -> Plan:
        """What was rewired and what was refused, for the current mode."""
        return self._rewired[self.training].plan

    @property
    def wirings(self) -> tuple[Wiring, ...]:
        """Where the chains lie in ``graph``, block by block, for the current mode."""
        return self._rewired[self.training].wirings

    @property
    def history(self) -> History:
        """Name and graph of each step of the rewiring, for the current mode."""
        return (*self._rewired[self.training].history, ("final", self.graph))

    def is_made_of(self, model: object) -> bool:
        """Whether this is the rewired form of that very module."""
        return self._live._model is model

    @property
    def memory(self) -> Memory:
        """How activations are kept: as `re2fx.transform` takes it; a budget in bytes.

        Setting it sets it for rewired modules inside this one too; under a budget they run at
        their lowest. What is planned, ``"lowest"`` and budgets, is planned at the next call with
        gradients outside of torch.func's transforms, for the inputs of that call.
        """
        return self._memory

    @memory.setter
    def memory(self, value: Memory) -> None:
        value = checked_memory(value)
        inside: Memory = "lowest" if isinstance(value, int) else value
        for module in self.modules():
            if isinstance(module, RewiredModule):
                module._run_as(value if module is self else inside)

    def _run_as(self, value: Memory) -> None:
        value = checked_memory(value)
        if value != "store":
            check_conditioned(self, self._variants[0].couplings)
        for variant in self._variants:
            variant.unframe()
        self._memory = value

    @property
    def memory_plan(self) -> MemoryPlan | None:
        """How a training step was fitted into memory, in the current mode; None before it was."""
        return self._variants[0].memory_plans.get(self.training)

    def plan_memory(self, *args: Any, **kwargs: Any) -> MemoryPlan:
        """Plan a training step for inputs of some shapes; arguments as of a call.

        It takes the place of a plan that there is. Nothing is run. Autocast that is active counts,
        so plan under that of the training.

        Raises:
            OptionError: ``memory`` is no budget and not ``"lowest"``.
            BudgetError: the budget is below what a step takes at the least.
            CaptureError: what the model allocates depends on the values of tensors.
        """
        if not is_planned(self.memory):
            raise OptionError(f"memory={self.memory!r} leaves nothing to plan")
        held = self._held(args, kwargs)
        if isinstance(held, UncapturedError):
            self._capture_again(Call(args, kwargs), held)
            held = self._held(args, kwargs)
        assert not isinstance(held, UncapturedError), "what was captured for this very call"
        variant, inputs = held
        return self._framed(variant, inputs, anew=True)

    def _framed(self, variant: Variant, inputs: list[Any], anew: bool = False) -> MemoryPlan:
        """The plan for calls of one kind, in the autocast that is active; made if there is none."""
        mode = self.training
        kind = mode, autocast_dtype(self._live._model, inputs)
        if anew or kind not in variant.planned:
            given = self._live, variant, mode, inputs, self._memory, self._executors
            variant.planned[kind] = self._executors.frame(*given)
        return variant.plan_as(mode, variant.planned[kind])

    @property
    def coupling(self) -> Coupling | tuple[Coupling, ...]:
        """How the streams combine: one coupling if all chains have the same, else one per chain.

        The chains are those that `re2fx.explain` lists, those of rewired modules inside this one
        too. It may be set to anything that `re2fx.transform` takes, between any two calls, to move
        it while the network trains (see `re2fx.Schedule`); the backward of an earlier call still
        undoes what that call did. With ``readout="mean"`` setting it takes about a
        millisecond for what the reversible executor runs; the plain graph is rewired once more
        when it is next needed: in eval mode without gradients, with ``memory="store"``, or when it
        is looked at. With ``readout="sum"``, whose weights depend on the coupling, the next call
        rewires it in any case. Compiled code is traced and compiled again.

        Raises:
            OptionError: the value does not fit the chains, or the graph was edited.
            ConditioningError: a chain could not be reconstructed with it.
        """
        return simplest(couplings_of(self._parts().values()))

    @coupling.setter
    def coupling(self, value: Couplings) -> None:
        change(self._parts(), value)

    def _parts(self) -> dict[str, RewiredModule]:
        """The rewired modules in this one, itself first, by their paths."""
        return {p: m for p, m in self.named_modules() if isinstance(m, RewiredModule)}

    @property
    def training(self) -> bool:
        """The mode of the given model: its members' flags and this one never disagree."""
        return self._live._model.training

    @training.setter
    def training(self, mode: bool) -> None:
        if "_modules" in self.__dict__:  # nn.Module.__init__ sets a default before it has members
            self._live._model.training = mode

    def train(self, mode: bool = True) -> RewiredModule:
        """Set the mode the way the given model does, its own ``train`` included."""
        self._live._model.train(mode)
        return self

    @property
    def graph(self) -> Graph:
        """The two-stream program of the current mode; after editing it call `recompile`.

        Setting `coupling` makes another graph, in which an edit without that call is missing.
        """
        return self._rewired[self.training].graph

    @graph.setter
    def graph(self, graph: Graph) -> None:
        if self._variants[0].functions:
            raise OptionError("the graph of a rewired module cannot be replaced; edit it in place")

    @property
    def _graph(self) -> Graph:  # type: ignore[override]
        return self.graph

    @property
    def code(self) -> str:
        """The generated Python code of the current mode."""
        return str(self.graph.python_code("self").src)

    def __str__(self) -> str:
        return f"{super(GraphModule, self).__repr__()}\n{self.code}"

    def recompile(self) -> Any:
        """Generate the code of both modes anew from their graphs, which somebody edited.

        From then on no other way of calling the network is captured, and its coupling cannot be
        changed: the edit would be missing.

        Raises:
            OptionError: the coupling was changed after the graph was read.
        """
        if "_memory" in self.__dict__:
            first = self._variants[0]
            if any(rewired.couplings != first.couplings for rewired in first.rewired.values()):
                raise OptionError(
                    "recompile: the coupling was changed after the graph was read, so the graph "
                    "that may have been edited is not the present one. Read `graph` again first."
                )
            self._recipe, self._edited = None, True
            del self._variants[1:]
            first.generate(self._live._model, self._executors)
        return self.graph.python_code("self")

    def prepare(self, marked: bool) -> None:
        """Generate the code that Dynamo traces; for `re2fx.backend` with the streams marked."""
        mode, reversible = self.training, self.memory != "store"
        for variant in self._variants:
            if marked:
                variant.mark((mode, reversible), self._live._model, self._executors)
            else:
                variant.function(mode, self._live._model, self._executors)

    def holds(self, index: int, values: Sequence[Any] = ()) -> str | None:
        """What is not as a variant was captured: a module, a hook or a dtype."""
        return self._variants[index].differs(self._live._model, values)

    def _held(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Variant, list[Any]] | UncapturedError:
        """What was captured for such a call, and the call's placeholders, or why there is none."""
        reason = None
        compiling = torch.compiler.is_compiling()
        if compiling and self._variants[0].members is not None:
            visit(self._live._model)
        for index, variant in enumerate(self._variants):
            try:
                values = variant.inputs.flatten(args, kwargs)
            except UncapturedError as error:
                reason = reason or error
                continue
            other = holds(self._number, index) if compiling else self.holds(index, values)
            if other is None:
                return variant, values
            reason = reason or UncapturedError(other)
        assert reason is not None, "there is at least one variant"
        return reason

    def _capture_again(self, call: Call, reason: UncapturedError) -> None:
        """Capture what the model computes for a call."""
        if self._recipe is None:
            raise reason
        model, constants = self._live._model, self._live._constants
        options = replace(self._recipe.options, coupling=self._variants[0].couplings)
        recipe = replace(self._recipe, options=options)
        new = capture_again(self._variants, recipe, model, constants, call, reason)
        new.generate(model, self._executors)
        possible = [variant for variant in self._variants if not variant.replaced(model)]
        self._variants = [*possible, new]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the rewired network; takes and returns what the given model does."""
        held = self._held(args, kwargs)
        if isinstance(held, UncapturedError):
            return run_uncompiled(self, Call(args, kwargs), held)
        variant, inputs = held
        if torch.compiler.is_compiling():
            if self._guard is not None:
                refuse_guard(self._number)
            if traced_for_re2fx(self._number, self._coefficients):
                marked = variant.marked[self.training, self.memory != "store"]
                return marked(self._live, *inputs)
            return variant.functions[self.training](self._live, *inputs)
        reversible = self.memory != "store" and torch.is_grad_enabled()
        if reversible and is_planned(self._memory) and not _transforming():
            self._framed(variant, inputs)
        how = (self.training, self._live._model, self._executors)
        with put_back_on_error():
            if self._guard is not None and reversible:
                with self._guard.watch(self):
                    return variant.program(*how).run(self._live, inputs)
            if recording() or reversible:
                return variant.program(*how).run(self._live, inputs)
            return variant.function(*how)(self._live, *inputs)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """Move the graphs' constants along with the members; their dtypes stay."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        constants = self._live._constants
        for name, value in constants.items():
            if isinstance(value, torch.Tensor):
                constants[name] = value.to(fn(value).device)
            elif isinstance(value, torch.nn.Module):  # the body of a higher-order operator
                value._apply(fn)
        return self

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._live._model._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._live._model._load_from_state_dict(*args, **kwargs)

    def _state(self) -> tuple[tuple[Any, ...], dict[str, Any], list[Any]]:
        """Constructor arguments, what the user or a library attached afterwards, and plans."""
        for variant in self._variants:
            for mode in variant.rewired:
                variant.settled(mode, self._live._model, self._executors)
        arguments = (
            self._live._model,
            self._rewired[True],
            self._rewired[False],
            self._inputs,
            self._live._constants,
            self.memory,
            self._executors,
            self._recipe,
            tuple(map(copy.copy, self._variants[1:])),
        )
        extra = {k: v for k, v in self.__dict__.items() if k not in _OWN}
        plans = [(dict(v.planned), dict(v.framed), dict(v.memory_plans)) for v in self._variants]
        return arguments, extra, plans

    def __deepcopy__(self, memo: dict[int, Any]) -> RewiredModule:
        return _rebuild(*copy.deepcopy(self._state(), memo))

    def __copy__(self) -> RewiredModule:
        return _rebuild(*self._state())

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, self._state()


_OWN = {
    "_executors", "_recipe", "_variants", "_live", "_memory",
    "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "_tracer_cls",
    "_lineno_map", "_prologue_start", "_number", "_guard", "_coefficients",
}  # fmt: skip


@_disable_dynamo
def run_uncompiled(module: RewiredModule, call: Call, reason: UncapturedError) -> Any:
    """Run a call that was not captured before, once, outside of what Dynamo compiles.

    What wraps ``module.forward`` (accelerate's autocast, say) has been entered already.
    """
    module._capture_again(call, reason)
    return type(module).forward(module, *call.args, **call.kwargs)


def _transforming() -> bool:
    """Whether a transform of torch.func runs, in which no fake tensors can be made."""
    return bool(torch._C._functorch.get_interpreter_stack())


def _rebuild(
    arguments: tuple[Any, ...], extra: dict[str, Any], plans: Sequence[Any] = ()
) -> RewiredModule:
    module = RewiredModule(*arguments)
    module.__dict__.update(extra)
    for variant, (planned, framed, memory_plans) in zip(module._variants, plans, strict=False):
        variant.planned.update(planned)
        for mode in framed:
            variant.plan_as(mode, (framed[mode], memory_plans[mode]))
    return module


def _with_signature(function: Callable[..., Any], signature: inspect.Signature) -> Any:
    """A forward whose signature is the given model's, for those who look it up."""

    def forward(self: RewiredModule, *args: Any, **kwargs: Any) -> Any:
        return function(self, *args, **kwargs)

    this = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    forward.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[this, *signature.parameters.values()]
    )
    forward.__doc__ = function.__doc__
    return forward
