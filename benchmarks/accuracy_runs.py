"""Candidates of `benchmarks.accuracy`, and what its workers do: pretrain, rewire, finetune."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import re2fx
from re2fx.deviation import relative_distance

from .accuracy_models import BATCH, MODELS, TRAIN, Digits

PRETRAIN_RATE, FINETUNE_RATE = 2e-3, 5e-4
EPOCH = TRAIN // BATCH  # steps

Row = dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """One way to go on from a pretrained network.

    Attributes:
        name: of the row.
        coupling: makes the coupling; None leaves the network as it is.
        readout: as for `re2fx.transform`.
        options: further arguments of `re2fx.transform`.
        schedule: makes, for a rewired network and a number of steps, what moves its coupling: its
            ``step`` is called after each. None keeps the coupling.
        only: the network it is for, if not for all.
    """

    name: str
    coupling: Callable[[], re2fx.Coupling] | None = None
    readout: Any = "mean"
    options: dict[str, Any] = field(default_factory=dict)
    schedule: Callable[[nn.Module, int], Any] | None = None
    only: str = ""

    def made_of(self, model: nn.Module, inputs: torch.Tensor) -> tuple[nn.Module, str]:
        """The network to finetune, and how its activations are kept.

        Where reconstruction would lose too many digits the rewired network is stored: the same
        function and gradients, none of the saving.
        """
        if self.coupling is None:
            return model, "plain"
        given = {"coupling": self.coupling(), "readout": self.readout, **self.options}
        for memory in ("reversible", "store"):
            try:
                return re2fx.transform(model, (inputs,), **{"memory": memory, **given}), memory
            except re2fx.ConditioningError:
                continue
        raise AssertionError("stored execution has no condition")


def quarter() -> re2fx.Coupling:
    """The coupling that the targets speak of."""
    return re2fx.Coupling.consistent(1 / 4)


def towards_re2tal(rev: nn.Module, steps: int) -> re2fx.Schedule:
    """From near the pretrained function to the coupling that costs nothing, by powers of two."""
    return re2fx.Schedule(rev, quarter(), re2fx.Coupling.re2tal(), over=steps // 2, snap=True)


def eighth() -> re2fx.Coupling:
    """Nearer, for one bit more."""
    return re2fx.Coupling.consistent(1 / 8)


EXACT = {"exact": True}
BLOCKS = {"exact": True, "activation": "block"}
ENTRIES = (
    Entry("original"),
    Entry("re2tal, mean", re2fx.Coupling.re2tal),
    Entry("re2tal, sum", re2fx.Coupling.re2tal, "sum"),
    Entry("double, mean", re2fx.Coupling.double),
    Entry("dr2net(0.3, 0.7), mean", lambda: re2fx.Coupling.dr2net(0.3, 0.7)),
    Entry("consistent(1/2), mean", lambda: re2fx.Coupling.consistent(1 / 2), "mean", EXACT),
    Entry("consistent(1/4), mean", quarter, "mean", EXACT),
    Entry("consistent(1/4), last", quarter, "last", EXACT),
    Entry("consistent(1/8), last", eighth, "last", EXACT),
    Entry("bdia, last", re2fx.Coupling.bdia, "last", EXACT),
    Entry("consistent(1/4) to re2tal, mean", quarter, "mean", EXACT, towards_re2tal),
    Entry("consistent(1/4), mean, activation='block'", quarter, "mean", BLOCKS, only="ResNet"),
    Entry("consistent(1/8), last, activation='block'", eighth, "last", BLOCKS, only="ResNet"),
)
BY_NAME = {entry.name: entry for entry in ENTRIES}


def train(
    model: nn.Module,
    data: Digits,
    epochs: int,
    rate: float,
    seed: int,
    moved: Callable[[], Any] = lambda: None,
    after: Callable[[], None] = lambda: None,
) -> None:
    """AdamW on a cosine with a short warm-up.

    Args:
        model: is trained.
        data: for every epoch the same batches for one seed.
        epochs: how often it sees all of them.
        rate: the highest.
        seed: of the batches' order and of dropout.
        moved: called after every step.
        after: called after every epoch.
    """
    torch.manual_seed(seed)  # the same dropout for everybody
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    steps = epochs * EPOCH
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.1)
    for epoch in range(epochs):
        model.train()
        for images, labels in data.batches(epoch, seed):
            loss = cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rates.step()
            moved()
        after()


def logits(model: nn.Module, data: Digits) -> torch.Tensor:
    """What the network says of the test images."""
    with torch.no_grad():
        found: torch.Tensor = model.eval()(data.test_images)
    return found


def right(found: torch.Tensor, data: Digits) -> float:
    """Share of the test images that are read right."""
    return round(float((found.argmax(-1) == data.test_labels).double().mean()), 4)


# the jobs of the workers


def weights(folder: str, name: str, seed: int) -> Path:
    """Where the pretrained weights of a network are kept during a run."""
    return Path(folder) / f"{name}-{seed}.pt"


def pretrain(name: str, seed: int, epochs: int, folder: str) -> None:
    """Train a network from its initialisation and keep its weights."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model, data = MODELS[name].build(), Digits.load(MODELS[name].size, seed)
    train(model, data, epochs, PRETRAIN_RATE, seed + 10_000)
    torch.save(model.state_dict(), weights(folder, name, seed))


def finetune(name: str, seed: int, candidate: str, epochs: int, folder: str) -> Row:
    """Rewire a pretrained network, finetune it, and measure it before and after every epoch."""
    torch.set_num_threads(1)
    begin, entry = time.perf_counter(), BY_NAME[candidate]
    model, data = MODELS[name].build(), Digits.load(MODELS[name].size, seed)
    model.load_state_dict(torch.load(weights(folder, name, seed)))
    pretrained = logits(model, data)
    network, memory = entry.made_of(model, data.images[:BATCH])
    schedule = entry.schedule(network, epochs * EPOCH) if entry.schedule else None
    accuracies: list[float] = []
    distances: list[float | None] = []

    def measure() -> None:
        found = logits(network, data)
        distance = relative_distance(found, pretrained)
        accuracies.append(right(found, data))
        distances.append(round(distance, 5) if math.isfinite(distance) else None)

    measure()
    moved = schedule.step if schedule else lambda: None
    train(network, data, epochs, FINETUNE_RATE, seed, moved, measure)
    return {
        "model": name, "seed": seed, "candidate": candidate, "memory": memory,
        "pretrained": right(pretrained, data), "accuracy": accuracies, "distance": distances,
        "seconds": round(time.perf_counter() - begin, 1),
    }  # fmt: skip
