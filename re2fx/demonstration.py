"""A short training of a model and of its rewired form, side by side, on random data."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from .memory import saved_bytes
from .tables import Table, to_html, to_rich
from .text import amount

if TYPE_CHECKING:
    from rich.console import Console, Group

RATE = 1e-3


@dataclass(frozen=True)
class Training:
    """What a few steps of one network cost and came to.

    Attributes:
        name: which network.
        kept: bytes kept for the backward of one step.
        step: median seconds of a step, the first left out where there are others.
        losses: before each step.
    """

    name: str
    kept: int
    step: float
    losses: tuple[float, ...]


@dataclass(frozen=True)
class Demonstration:
    """The trainings, side by side; print it."""

    model: str
    trainings: tuple[Training, ...]

    @property
    def headline(self) -> str:
        """One sentence."""
        plain, rewired = self.trainings[0], self.trainings[-1]
        return (
            f"{self.model}: the rewired network keeps {amount(rewired.kept)} for the backward "
            f"instead of {amount(plain.kept)}, at {rewired.step / plain.step:.2f} times the time "
            "of a step"
        )

    def tables(self) -> Iterator[Table]:
        """One row per network."""
        columns = ("network", "kept for the backward>", "step>", "first loss>", "last loss>")
        rows = [
            (
                training.name,
                amount(training.kept),
                f"{training.step * 1e3:.1f} ms",
                f"{training.losses[0]:.4f}",
                f"{training.losses[-1]:.4f}",
            )
            for training in self.trainings
        ]
        yield Table("Trained on random data", columns, tuple(rows))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; bytes and seconds."""
        return {"model": self.model, "trainings": [asdict(t) for t in self.trainings]}

    def __rich__(self) -> Group:
        return to_rich(self.headline, self.tables())

    def _repr_html_(self) -> str:
        return to_html(self.headline, self.tables())


def demonstrate(
    model: nn.Module, rev: nn.Module, inputs: Any, steps: int, console: Console
) -> Demonstration:
    """Train copies of both networks on the same inputs towards the same random targets.

    Args:
        model: the given model; it is not changed.
        rev: its rewired form; it is not changed.
        inputs: as for `re2fx.transform`.
        steps: of plain gradient descent, for each.
        console: where the progress is shown.
    """
    from rich.progress import Progress

    trainings = []
    with Progress(console=console, transient=True) as progress:
        for name, network in (("plain", model), ("rewired, reversible", rev)):
            task = progress.add_task(name, total=steps)
            advance = lambda task=task: progress.advance(task)  # noqa: E731
            trainings.append(train(name, copy.deepcopy(network), inputs, steps, advance))
    return Demonstration(type(model).__name__, tuple(trainings))


def train(
    name: str, network: nn.Module, inputs: Any, steps: int, advance: Callable[[], Any]
) -> Training:
    """A few steps of one network."""
    optimizer = torch.optim.SGD(network.parameters(), lr=RATE)
    kept = saved_bytes(lambda: call(network, inputs), network).total
    losses, times = [], []
    for _ in range(steps):
        start = time.perf_counter()
        loss = distance(call(network, inputs))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()))
        times.append(time.perf_counter() - start)
        advance()
    return Training(name, kept, median(times[1:] or times), tuple(losses))


def call(network: nn.Module, inputs: Any) -> Any:
    """Call with positional or keyword arguments."""
    if isinstance(inputs, dict):
        return network(**inputs)
    return network(*inputs) if isinstance(inputs, tuple) else network(inputs)


def distance(output: Any) -> torch.Tensor:
    """Mean squared distance of every floating output to fixed random targets."""
    total: Any = 0.0
    for value in pytree.tree_leaves(output):
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            generator = torch.Generator().manual_seed(0)
            target = torch.randn(value.shape, generator=generator).to(value)
            total = total + (value - target).square().mean()
    return torch.as_tensor(total)
