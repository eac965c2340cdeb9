"""One training situation, executed reversibly and stored: the same network, the same results.

``row`` runs a test once per executor; ``without`` names the code that makes it pass: with
``pytest tests/situations --mutants`` that code is disabled and the test has to fail.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import re2fx

from ..compare import Outcome, assert_same, weighted

Run = Callable[..., Any]
Situation = Callable[[Run, nn.Module, tuple[Any, ...]], Any]

GRAPH: dict[str, Any] = {"compiler": "aot_eager"}


def row(
    number: int, eager: str | None = "works", compiled: str | None = "works"
) -> pytest.MarkDecorator:
    """Run a test as a row of the table, in the executors for which an outcome is given."""
    given = {"eager": eager, "compiled": compiled}
    params = [
        pytest.param(name, marks=pytest.mark.situation(number, name, outcome))
        for name, outcome in given.items()
        if outcome is not None
    ]
    return pytest.mark.parametrize("executor", params)


def without(executor: str, target: str, replacement: Any) -> pytest.MarkDecorator:
    """Name what a test needs: ``package.module:Class.attribute`` and what to put in its place."""
    return pytest.mark.without(executor, target, replacement)


@dataclass
class Pair:
    """A given model under two executors; the parameters and buffers are the same tensors."""

    model: nn.Module
    reversible: Run
    store: Run

    def __iter__(self) -> Any:
        return iter((self.reversible, self.store))


def double(model: nn.Module) -> nn.Module:
    """A model in fp64 with parameters that depend on nothing but its class."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            spread = p[0].numel() ** -0.5 if p.dim() > 1 else 0.1
            mean = 1.0 if p.dim() == 1 and name.endswith("weight") else 0.0
            p.copy_(mean + spread * torch.randn(p.shape, generator=generator))
    return model.double()


def example(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """An input of a given shape."""
    made = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return made.to(dtype)


def pair(executor: str, model: nn.Module, *inputs: Any, **options: Any) -> Pair:
    """Reversible by the named executor, and stored by the eager one.

    Args:
        executor: ``"eager"`` or ``"compiled"`` (through AOTAutograd, which is what re2fx rewrites).
        model: the given model.
        inputs: examples, for models that symbolic tracing cannot capture.
        options: for both.
    """
    store = re2fx.transform(model, inputs or None, memory="store", **options)
    assert isinstance(store, re2fx.RewiredModule)
    return Pair(model, reversible(executor, model, *inputs, **options), store)


def reversible(executor: str, model: nn.Module, *inputs: Any, **options: Any) -> Run:
    """A given model rewired, to be run reversibly."""
    if executor == "eager":
        return re2fx.transform(model, inputs or None, **options)
    run: Run = torch.compile(model, backend="re2fx", options=GRAPH | options)
    return run


def train(run: Run, model: nn.Module, inputs: tuple[Any, ...]) -> Any:
    """The ordinary situation: one forward, one backward."""
    output = run(*inputs)
    weighted(output).backward()
    return output


def outcome(run: Run, model: nn.Module, inputs: tuple[Any, ...], situation: Situation) -> Outcome:
    """Everything a situation leaves behind; the model is put back as it was."""
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    state = torch.get_rng_state()
    model.zero_grad(set_to_none=True)
    fresh = tuple(
        x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x
        for x in inputs
    )
    torch.manual_seed(0)
    output = situation(run, model, fresh)
    gradients = {name: p.grad for name, p in model.named_parameters()}
    gradients.update((f"input {i}", x.grad) for i, x in enumerate(fresh) if isinstance(x, Tensor))
    result = Outcome(
        [leaf.detach() for leaf in torch.utils._pytree.tree_leaves(output)],
        gradients,
        {name: buffer.clone() for name, buffer in model.named_buffers()},
        torch.get_rng_state(),
    )
    torch.set_rng_state(state)
    model.zero_grad(set_to_none=True)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(before[name])
    return result


def compare(
    pair: Pair, *inputs: Any, situation: Situation = train, tolerance: float = 1e-10
) -> Outcome:
    """Assert that the reversible run leaves behind what the stored one does; return the latter."""
    given = tuple(
        x.detach().requires_grad_(x.is_floating_point()) if isinstance(x, Tensor) else x
        for x in inputs
    )
    expected = outcome(pair.store, pair.model, given, situation)
    got = outcome(pair.reversible, pair.model, given, situation)
    fill(got, expected)
    assert_same(got, expected, tolerance)
    return expected


def fill(got: Outcome, expected: Outcome) -> None:
    """Compiled code gives a gradient of zeros where autograd gives none."""
    for name, gradient in got.gradients.items():
        if gradient is not None and expected.gradients[name] is None and not gradient.any():
            got.gradients[name] = None


class Unmoved(AbstractContextManager[None]):
    """Puts buffers back, each time it is left.

    What a checkpoint of the user's own recomputes moves batch-norm statistics again, as far as it
    recomputes (pytorch#96136), which depends on what is saved; under this it does not move them.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.before: list[Tensor] = []

    def __enter__(self) -> None:
        self.before = [buffer.clone() for buffer in self.model.buffers()]

    def __exit__(self, *error: object) -> None:
        with torch.no_grad():
            for buffer, value in zip(self.model.buffers(), self.before, strict=True):
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


def under(context: Callable[[], AbstractContextManager[Any]] = nullcontext) -> Situation:
    """The forward inside a context, the backward outside of it."""

    def situation(run: Run, model: nn.Module, inputs: tuple[Any, ...]) -> Any:
        with context():
            output = run(*inputs)
        weighted(output).backward()
        return output

    return situation
