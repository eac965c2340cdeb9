"""One forward of a model in each way of training it, and what it keeps, place by place.

    store       run the captured graph, and note what autograd saves at each node
    checkpoint  the same, but of each residual's branch only its inputs
    reversible  run the executor's program, and note what its calls keep, and autograd outside

A fake twin predicts, a real one measures.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.fx import Graph
from torch.utils import _pytree as pytree

from .capture import Captured
from .errors import Re2fxError
from .fake import Fakes, predicting, private_twin, undisturbed
from .footprint import Kept
from .memory import saved_bytes
from .module import Executors, LiveRoot, Rewired, RewiredModule
from .passes.mark import mark
from .passes.outline import outline
from .plan import Plan
from .program import Leave, record
from .runtime import ChainCall
from .tally import Place, Region, Tally, Walker, by_module

Loss = Callable[[Any], Any]


@dataclass(frozen=True)
class Route:
    """A model's graph, its plan and its rewired forms, as far as one got."""

    plan: Plan = field(default_factory=Plan)
    captured: Captured | None = None
    graph: Graph | None = None
    regions: tuple[Region, ...] = ()
    rewired: tuple[Rewired, Rewired] | None = None
    constants: dict[str, torch.Tensor] | None = None
    reason: str = ""

    def with_constants(self, convert: Callable[[torch.Tensor], torch.Tensor]) -> Route:
        """The same with other tensors for those that tracing made."""
        made = self.captured.constants if self.captured else {}
        constants = {
            name: convert(value) if isinstance(value, torch.Tensor) else value
            for name, value in made.items()
        }
        return replace(self, constants=constants)


@dataclass(frozen=True)
class Run:
    """A model to run, fake or real, and what to run it on."""

    model: nn.Module
    given: tuple[tuple[Any, ...], dict[str, Any]]
    route: Route
    loss: Loss | None

    @property
    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments in new containers, since a model may write into a list it is given."""
        args, kwargs = pytree.tree_map(lambda leaf: leaf, self.given)
        return args, kwargs

    @property
    def root(self) -> LiveRoot:
        """What graphs look their targets up on."""
        return LiveRoot(self.model, self.route.constants or {})

    def tally(self) -> Tally:
        """An empty count."""
        return Tally(self.model, self.arguments)

    def placeholders(self) -> list[Any]:
        """The graphs' inputs."""
        assert self.route.captured is not None, "only captured models have a graph"
        args, kwargs = self.arguments
        return self.route.captured.inputs.flatten(args, kwargs)

    def finish(self, tally: Tally, result: Any) -> Any:
        """Apply the loss."""
        tally.place = Place("loss")
        return result if self.loss is None else self.loss(result)

    def module(self) -> Any:
        """The given model, called as a user does."""
        args, kwargs = self.arguments
        result = self.model(*args, **kwargs)
        return result if self.loss is None else self.loss(result)


@dataclass(frozen=True)
class Found:
    """Bytes by place in each way of training, and the chains' calls."""

    store: Counter[Place]
    checkpoint: Counter[Place] | None
    reversible: Counter[Place] | None
    states: dict[int, torch.Tensor]
    output: int
    untold: tuple[str, ...]
    reason: str


def predict(run: Run, fakes: Fakes) -> Found:
    """All columns, on fake tensors."""
    checkpointed, reversed_, reason = None, None, ""
    states: dict[int, torch.Tensor] = {}
    with predicting(fakes, type(run.model).__name__):
        store, output = _store(run)
        if run.route.plan.chains:
            checkpointed = _checkpoint(run, _forgetting)
        if run.route.rewired is not None:
            try:
                reversed_, states = _reversible(run)
            except Re2fxError as error:
                reason = str(error)
    untold = tuple(sorted(fakes.untold))
    return Found(store, checkpointed, reversed_, states, output, untold, reason)


def predict_stored(run: Run, fakes: Fakes) -> Counter[Place]:
    """What ordinary training keeps, on fake tensors."""
    with predicting(fakes, type(run.model).__name__):
        return _store(run)[0]


def _store(run: Run) -> tuple[Counter[Place], int]:
    """The model as it is: what it keeps, and the size of its result."""
    tally = run.tally()
    with tally.watching(), by_module(run.model, tally):
        if run.route.graph is None:
            args, kwargs = run.arguments
            result = run.model(*args, **kwargs)
        else:
            result = Walker(run.root, run.route.graph, tally).run(*run.placeholders())
        size = nbytes(pytree.tree_leaves(result))
        run.finish(tally, result)
    return tally.bytes(), size


def _checkpoint(run: Run, checkpoint: Callable[..., Any]) -> Counter[Place]:
    """The model with a checkpoint around the branch of every residual of a chain."""
    tally, graph = run.tally(), run.route.graph
    assert graph is not None, "a model with chains has a graph"
    walker = Walker(run.root, graph, tally, run.route.regions, checkpoint)
    with tally.watching(), by_module(run.model, tally):
        run.finish(tally, walker.run(*run.placeholders()))
    return tally.bytes()


def _forgetting(function: Callable[..., Any], *inputs: Any) -> Any:
    """What a checkpoint's forward comes to: nothing that the function saves is kept."""
    with saved_tensors_hooks(lambda tensor: None, lambda packed: packed):
        return function(*inputs)


def _reversible(run: Run) -> tuple[Counter[Place], dict[int, torch.Tensor]]:
    """The rewired model under the executor: what it keeps, and a state of each chain."""
    assert run.route.rewired is not None, "only rewired models have a program"
    train, tally = run.route.rewired[0], run.tally()

    def interpreted(graph: Graph, name: str) -> Callable[..., Any]:
        return lambda root, *values: Walker(root, graph, tally).run(*values)

    program = outline(train.graph, run.model, train.wirings, interpreted)
    order = [step.chain for step in program.steps if isinstance(step, Leave)]
    with record() as calls, tally.watching(), by_module(run.model, tally):
        run.finish(tally, program.run(run.root, run.placeholders()))
    ended = dict(zip(order, calls, strict=True))
    for number, call in ended.items():
        tally.keep_first(call.kept(), Place("chain", chain=number))
    return tally.bytes(), {number: _state(call) for number, call in ended.items()}


def _state(call: ChainCall) -> torch.Tensor:
    assert call.output is not None, "the chain has ended"
    return call.output[0]


def measured_kept(model: nn.Module, arguments: Any, route: Route, loss: Loss | None) -> Kept:
    """Run it for real, each way, on a copy with the same parameters."""
    model = in_training(private_twin(model))
    run = Run(model, arguments, route.with_constants(torch.clone), loss)
    with undisturbed():
        store = saved_bytes(run.module, model).total
        checkpointed, reversible = None, None
        if route.plan.chains:
            from torch.utils.checkpoint import checkpoint

            checkpointed = _checkpoint(run, partial(checkpoint, use_reentrant=False)).total()
        if route.rewired is not None and route.captured is not None:
            executors = Executors(outline, mark)
            rev = RewiredModule(
                model, *route.rewired, route.captured.inputs, run.route.constants or {},
                "reversible", executors,
            )  # fmt: skip
            reversible = saved_bytes(Run(rev, arguments, route, loss).module, model).total
    return Kept(store, checkpointed, reversible)


def in_training(model: nn.Module) -> nn.Module:
    """A twin in train mode; the flags of one that is in it already stay as they are."""
    return model if model.training else model.train()


def nbytes(values: Iterable[Any]) -> int:
    """Bytes of the distinct storages of the tensors among some values."""
    tensors = [x for x in values if isinstance(x, torch.Tensor)]
    storages = {s._cdata: s for s in (x.untyped_storage() for x in tensors)}
    return sum(storage.nbytes() for storage in storages.values())
