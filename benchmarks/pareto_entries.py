"""The ways to train one network that are compared, and how each is made.

plain, checkpoint ...     as it is; PyTorch's checkpoint in several places
offload                   ``torch.autograd.graph.save_on_cpu``; on CUDA alone
compiled ...              ``torch.compile``, with the partitioner's budget, and re2fx's backend
re2fx ...                 the eager executor: stored, reversible, lowest, and at budgets between
                          its lowest peak and that of plain training
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn

import re2fx
from re2fx import errors

from . import pareto_rivals as rivals
from .pareto_models import Inputs, Subject

Contexts = Callable[[], AbstractContextManager[Any]]

# Until it is there, nothing raises it.
BudgetError: type[Exception] = getattr(errors, "BudgetError", errors.OptionError)

# Of the way from the lowest peak to that of plain training.
SHARES = (0.25, 0.5, 0.75)
# In front of the name of the rival whose peak is the budget.
ANSWER = "re2fx at "
PARTITIONS = (0.1, 0.3, 0.5, 0.8)


class Unavailable(Exception):
    """An entry cannot be measured here; says why."""


class Bench(Protocol):
    """What an entry is made of."""

    subject: Subject
    model: nn.Module
    inputs: Inputs
    device: torch.device
    peaks: dict[str, int]

    def autocast(self) -> AbstractContextManager[Any]:
        """That every step runs under."""


@dataclass(frozen=True)
class Made:
    """A network to train.

    Attributes:
        network: shares its parameters with the bench's.
        saving: around every forward.
        compiling: around the first steps.
        budget: bytes that it was asked to stay within.
    """

    network: Any
    saving: Contexts = nullcontext
    compiling: Contexts = nullcontext
    budget: int | None = None


@dataclass(frozen=True)
class Entry:
    """A way to train a network.

    Attributes:
        name: in tables.
        make: does it.
        own: whether it is re2fx's.
        compiled: whether a compiler is needed.
        reference: whose gradients it must have; "" for none.
    """

    name: str
    make: Callable[[Bench], Made] = field(repr=False)
    own: bool = False
    compiled: bool = False
    reference: str = "plain"


def rival(make: Callable[..., nn.Module], size: bool = False) -> Callable[[Bench], Made]:
    """One of `pareto_rivals`; a ``size`` is the root of the longest container's length."""

    def made(bench: Bench) -> Made:
        length = rivals.depth(bench.subject, bench.model)
        sizes = {"size": round(length**0.5)} if size else {}
        return Made(make(bench.subject, bench.model, **sizes))

    return made


def offload(bench: Bench) -> Made:
    """Everything that autograd saves goes to pinned memory of the host."""
    if bench.device.type != "cuda":
        raise Unavailable("save_on_cpu moves nothing where the network is on the CPU")
    return Made(bench.model, partial(torch.autograd.graph.save_on_cpu, pin_memory=True))


def rewired(memory: str | int, bench: Bench) -> Made:
    """The eager executor.

    Raises:
        Unavailable: this version of re2fx has no such memory, or it is below the floor.
    """
    wanted: Any = memory
    try:
        with bench.autocast():
            network = re2fx.transform(bench.model, bench.inputs, memory=wanted)
    except (errors.OptionError, BudgetError) as error:
        raise Unavailable(str(error)) from error
    if not hasattr(network, "memory"):
        raise Unavailable("nothing was rewired")
    return Made(network, budget=memory if isinstance(memory, int) else None)


def budgeted(share: float, bench: Bench) -> Made:
    """A budget of bytes between the lowest peak and plain training's."""
    low = bench.peaks.get("re2fx lowest")
    if low is None:
        raise Unavailable("without memory='lowest' there is no floor to put budgets above")
    return rewired(round(low + share * (bench.peaks["plain"] - low)), bench)


def answering(name: str, bench: Bench) -> Made:
    """With the bytes that a rival takes as the budget."""
    peak = bench.peaks.get(name)
    if peak is None:
        raise Unavailable(f"the peak of {name} is not known")
    return rewired(peak, bench)


def predicted_peak(network: Any) -> int | None:
    """What a rewired network's plan of its memory says of a step's peak; None without a plan."""
    found = getattr(getattr(network, "memory_plan", None), "predicted", None)
    return None if found is None else int(found.peak.peak)


def compiled(
    bench: Bench, share: float = 1.0, scope: str | None = None, graphs: bool = False
) -> Made:
    """By Inductor; ``scope`` is that of re2fx's backend, ``graphs`` are CUDA graphs."""
    options: dict[str, Any] = {"isolate_recompiles": True}
    cudagraphs = {"triton.cudagraphs": True} if graphs else {}
    if scope:
        settings = {"scope": scope, **({"compiler_options": cudagraphs} if graphs else {})}
        options |= {"backend": "re2fx", "options": settings}
    elif graphs:
        options |= {"mode": "reduce-overhead"}
    network = torch.compile(rivals.twin(bench.model), **options)
    return Made(network, compiling=partial(compiling, share))


def compiling(share: float) -> AbstractContextManager[Any]:
    """With a budget for the partitioner, and without caches, so that kernels are counted."""
    from torch._functorch import config as functorch_config
    from torch._inductor import config as inductor_config

    stack = ExitStack()
    patch = functorch_config.patch(activation_memory_budget=share, enable_autograd_cache=False)
    stack.enter_context(patch)
    stack.enter_context(inductor_config.patch(fx_graph_cache=False))
    return stack


def eager_entries() -> list[Entry]:
    """Without a compiler, in the order of every table."""
    return [
        Entry("plain", lambda bench: Made(bench.model), reference=""),
        Entry("checkpoint, branches", rival(rivals.per_branch)),
        Entry("checkpoint, blocks", rival(rivals.per_block)),
        Entry("checkpoint, first half", rival(rivals.first_half)),
        Entry("checkpoint, k blocks", rival(rivals.per_group, size=True)),
        Entry("checkpoint, nested", rival(rivals.nested, size=True)),
        Entry("offload", offload),
        Entry("re2fx store", partial(rewired, "store"), own=True, reference=""),
        Entry("re2fx reversible", partial(rewired, "reversible"), True, reference="re2fx store"),
        Entry("re2fx lowest", partial(rewired, "lowest"), True, reference="re2fx store"),
        *(
            Entry(f"re2fx budget {share:.0%}", partial(budgeted, share), True, False, "re2fx store")
            for share in SHARES
        ),
    ]


def answering_entries(names: Sequence[str] = ()) -> list[Entry]:
    """re2fx at the peak of each of some rivals, which must be measured before.

    By default plain training and every checkpoint.
    """
    known = [e.name for e in eager_entries() if e.name.split(",")[0] in ("plain", "checkpoint")]
    return [
        Entry(ANSWER + name, partial(answering, name), True, False, "re2fx store")
        for name in names or known
    ]


def compiled_entries(partitions: tuple[float, ...] = PARTITIONS) -> list[Entry]:
    """With Inductor."""
    return [
        Entry("compiled", compiled, compiled=True),
        *(
            Entry(f"compiled, budget {share:g}", partial(compiled, share=share), compiled=True)
            for share in partitions
        ),
        *(
            Entry(
                f"re2fx compiled, {scope}",
                partial(compiled, scope=scope),
                True,
                True,
                "re2fx store",
            )
            for scope in ("region", "graph")
        ),
    ]


def graph_entries() -> list[Entry]:
    """With Inductor and CUDA graphs."""
    return [
        Entry("compiled, CUDA graphs", partial(compiled, graphs=True), compiled=True),
        *(
            Entry(
                f"re2fx compiled, {scope}, CUDA graphs",
                partial(compiled, scope=scope, graphs=True),
                True,
                True,
                "re2fx store",
            )
            for scope in ("region", "graph")
        ),
    ]
