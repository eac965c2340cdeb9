"""Accuracy of every coupling before and after finetuning: ``python -m benchmarks.accuracy``.

Each network learns scikit-learn's digits, is rewired with every candidate and finetuned reversibly;
the original is finetuned for the same steps on the same batches at the same rate. Per seed another
split, initialisation and order. Goes on from what ``results/accuracy.json`` holds; ``--fresh``
begins anew, ``--quick`` shows in minutes that everything runs and keeps nothing.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from rich.console import Console
from rich.markdown import Markdown
from torch import nn
from torch.nn.functional import cross_entropy

import re2fx
from re2fx.deviation import relative_distance

from .accuracy_models import BATCH, MODELS, TRAIN, Digits
from .accuracy_tables import text_accuracy
from .common import RESULTS, advancer, environment, progress, read_results, target, write_results

SEEDS, PRETRAIN_EPOCHS, FINETUNE_EPOCHS = 5, 25, 5
PRETRAIN_RATE, FINETUNE_RATE = 2e-3, 5e-4
EPOCH = TRAIN // BATCH  # steps
QUICK = {"seeds": 2, "pretrain_epochs": 6, "finetune_epochs": 2}
GOAL_MODEL, GOAL = "ViT-12", "consistent(1/4), mean"

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
    """

    name: str
    coupling: Callable[[], re2fx.Coupling] | None = None
    readout: Any = "mean"
    options: dict[str, Any] = field(default_factory=dict)
    schedule: Callable[[nn.Module, int], Any] | None = None

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


ENTRIES = (
    Entry("original"),
    Entry("re2tal, mean", re2fx.Coupling.re2tal),
    Entry("re2tal, sum", re2fx.Coupling.re2tal, "sum"),
    Entry("dr2net(0.3, 0.7), mean", lambda: re2fx.Coupling.dr2net(0.3, 0.7)),
    Entry("consistent(1/2), mean", lambda: re2fx.Coupling.consistent(1 / 2)),
    Entry("consistent(1/4), mean", quarter),
    Entry("consistent(1/8), mean", lambda: re2fx.Coupling.consistent(1 / 8)),
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


# the whole


def key(row: Row) -> tuple[str, int, str]:
    """What a row is of."""
    return row["model"], row["seed"], row["candidate"]


def ordered(rows: Iterable[Row]) -> list[Row]:
    """Rows in the order of the tables; those of entries that are no more left out."""
    models, names = list(MODELS), list(BY_NAME)
    known = [row for row in rows if row["model"] in MODELS and row["candidate"] in BY_NAME]
    return sorted(
        known, key=lambda r: (models.index(r["model"]), names.index(r["candidate"]), r["seed"])
    )


def goals(rows: list[Row]) -> list[dict[str, Any]]:
    """The limits set before anything was measured."""
    own = [r for r in rows if (r["model"], r["candidate"]) == (GOAL_MODEL, GOAL)]
    plain = [r for r in rows if (r["model"], r["candidate"]) == (GOAL_MODEL, "original")]
    if len(own) < 2 or len(plain) < 2 or any(r["distance"][0] is None for r in own):
        return []
    lost = fmean(r["pretrained"] - r["accuracy"][0] for r in own)
    behind = fmean(r["accuracy"][-1] for r in plain) - fmean(r["accuracy"][-1] for r in own)
    what = f"{GOAL_MODEL}, {GOAL}"
    return [
        target(f"{what}: accuracy lost at the start", lost, 0.01),
        target(f"{what}: distance at the start", fmean(r["distance"][0] for r in own), 0.12),
        target(
            f"{what}: accuracy behind the original, both finetuned; limit: its standard deviation",
            behind,
            round(stdev(r["accuracy"][-1] for r in plain), 4),
        ),
    ]


def setup(options: argparse.Namespace) -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "models": {name: model.words for name, model in MODELS.items()},
        "data": f"scikit-learn digits, {TRAIN} for training and {1797 - TRAIN} for testing",
        "batch": BATCH,
        "pretrain_epochs": options.pretrain_epochs,
        "finetune_epochs": options.finetune_epochs,
        "pretrain_rate": PRETRAIN_RATE,
        "finetune_rate": FINETUNE_RATE,
    }


def known(wanted: dict[str, Any]) -> list[Row]:
    """The rows of earlier runs with the same setup."""
    if not (RESULTS / "accuracy.json").exists():
        return []
    found = read_results("accuracy")
    return found["rows"] if found["setup"] == wanted else []


def results(wanted: dict[str, Any], rows: Iterable[Row]) -> dict[str, Any]:
    """What is written."""
    rows = ordered(rows)
    return {"setup": wanted, "targets": goals(rows), "rows": rows}


def work(options: argparse.Namespace, rows: list[Row], save: Callable[[], None]) -> None:
    """Fill in the rows that are missing, two processes at a time, under a bar."""
    done = {key(row) for row in rows}
    todo = [
        one
        for seed in range(options.seeds)
        for name in options.models
        for candidate in options.candidates
        if (one := (name, seed, candidate)) not in done
    ]
    fresh = list(dict.fromkeys(one[:2] for one in todo))
    pool = ProcessPoolExecutor(options.jobs, get_context("spawn"))
    with progress() as bar, pool, tempfile.TemporaryDirectory() as folder:
        tick = advancer(bar, "pretrain", len(fresh))
        jobs: list[Any] = [
            pool.submit(pretrain, *o, options.pretrain_epochs, folder) for o in fresh
        ]
        for job in as_completed(jobs):
            job.result()
            tick()
        tick = advancer(bar, "finetune", len(todo))
        jobs = [pool.submit(finetune, *o, options.finetune_epochs, folder) for o in todo]
        try:
            for job in as_completed(jobs):
                rows.append(job.result())
                save()
                tick()
        finally:
            pool.shutdown(cancel_futures=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two seeds, few epochs; saves nothing")
    parser.add_argument("--fresh", action="store_true", help="forget the runs before")
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--candidates", nargs="+", choices=BY_NAME, default=list(BY_NAME))
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.set_defaults(pretrain_epochs=PRETRAIN_EPOCHS, finetune_epochs=FINETUNE_EPOCHS)
    options = parser.parse_args()
    if options.quick:
        vars(options).update(QUICK)
    wanted = setup(options)
    rows = [] if options.fresh or options.quick else known(wanted)

    def save() -> None:
        if not options.quick:
            write_results("accuracy", results(wanted, rows))

    work(options, rows, save)
    save()
    shown = {**results(wanted, rows), "environment": environment()}
    Console().print(Markdown(text_accuracy(shown)))


if __name__ == "__main__":
    main()
