"""The measurement of couplings' accuracy: what is counted, resumed and shown."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import re2fx

pytest.importorskip("sklearn")
accuracy = pytest.importorskip("benchmarks.accuracy")
runs = pytest.importorskip("benchmarks.accuracy_runs")
models = pytest.importorskip("benchmarks.accuracy_models")
tables = pytest.importorskip("benchmarks.accuracy_tables")

ENVIRONMENT = {"cpu": "one", "cores": 1, "torch": "2", "python": "3", "date": "today"}


def row(candidate: str, seed: int, *accuracies: float, **more: Any) -> dict[str, Any]:
    """A row of invented figures."""
    distances = [0.1 for _ in accuracies]
    return {
        "model": "ViT-12", "seed": seed, "candidate": candidate, "memory": "reversible",
        "pretrained": 0.9, "accuracy": list(accuracies), "distance": distances, "seconds": 1.0,
        **more,
    }  # fmt: skip


ROWS = [
    row("original", 0, 0.90, 0.91, 0.94),
    row("original", 1, 0.90, 0.91, 0.96),
    row(accuracy.GOAL, 0, 0.89, 0.90, 0.93),
    row(accuracy.GOAL, 1, 0.90, 0.92, 0.95, memory="store"),
]


def wanted() -> dict[str, Any]:
    """A setup."""
    described = {name: model.words for name, model in models.MODELS.items()}
    return {
        "models": described, "data": "digits", "pretrain_epochs": 3, "finetune_epochs": 2,
        "finetune_rate": 1e-3,
    }  # fmt: skip


def test_targets() -> None:
    lost, distance, behind = accuracy.goals(ROWS)
    assert (lost["value"], lost["met"]) == (0.005, True)
    assert (distance["value"], distance["met"]) == (0.1, True)
    assert (behind["value"], behind["limit"], behind["met"]) == (0.01, 0.0141, True)
    assert accuracy.goals(ROWS[:2]) == []


def test_rows_are_ordered_and_those_of_former_entries_left_out() -> None:
    given = [*reversed(ROWS), row("former", 0, 0.5)]
    assert accuracy.ordered(given) == ROWS


def test_tables_and_picture() -> None:
    data = {**accuracy.results(wanted(), ROWS), "environment": ENVIRONMENT}
    text = tables.text_accuracy(data)
    assert "| original | 0.100 ± 0.000 | 90.0 ± 0.0 | 91.0 ± 0.0 | 95.0 ± 1.4 |" in text
    assert f"| {accuracy.GOAL} (stored) |" in text
    assert f"| {accuracy.GOAL} | 89.5 / 91.0 / 94.0 |" in text
    (axis,) = tables.plot_accuracy(data).axes
    assert [label.get_text() for label in axis.get_yticklabels()] == ["original", accuracy.GOAL]
    diverged = [{**r, "distance": [0.1, None, None]} for r in ROWS]
    assert "diverged" in tables.text_accuracy({**data, "rows": diverged})


def test_names_are_unique_and_the_goal_is_one() -> None:
    assert len(runs.BY_NAME) == len(runs.ENTRIES)
    assert accuracy.GOAL in runs.BY_NAME


def test_splits_and_batches_are_the_seed_s() -> None:
    first, again, other = (models.Digits.load(8, seed) for seed in (0, 0, 1))
    assert torch.equal(first.images, again.images)
    assert not torch.equal(first.labels, other.labels)
    assert len(first.labels) + len(first.test_labels) == 1797
    for (a, x), (b, y) in zip(first.batches(0, 3), again.batches(0, 3), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(x, y)
    assert not torch.equal(next(first.batches(0, 3))[1], next(first.batches(1, 3))[1])


def test_training_moves_the_schedule_every_step() -> None:
    data = models.Digits.load(8, 0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    moves, epochs = [], []
    with torch.random.fork_rng():
        runs.train(model, data, 2, 1e-2, 0, lambda: moves.append(1), lambda: epochs.append(1))
    assert (len(moves), len(epochs)) == (2 * runs.EPOCH, 2)
    assert runs.right(runs.logits(model, data), data) > 0.5


@pytest.mark.parametrize("name", ["Swin", "ResNet"])
def test_couplings_that_cannot_be_reversed_are_stored(name: str) -> None:
    model = models.MODELS[name].build()
    x = models.Digits.load(models.MODELS[name].size, 0).images[:2]
    network, memory = runs.BY_NAME["re2tal, mean"].made_of(model, x)
    assert isinstance(network, re2fx.RewiredModule)
    assert memory == network.memory == "reversible"
    assert min(len(chain) for chain in network.plan.chains) >= 2
    ill = runs.Entry("ill", lambda: re2fx.Coupling.consistent(2**-24))
    assert ill.made_of(model, x)[1] == "store"
