"""The whole way on real data: ``python -m benchmarks.demo``.

A small vision transformer learns scikit-learn's handwritten digits (1,797 images of 8x8, part of
the package). Then it is rewired with the weights it has, finetuned without stored activations, and
compared with the original finetuned for the same steps. At the end: what training costs, plain,
checkpointed and reversible.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

import re2fx
from re2fx.memory import live_bytes

from .common import CONTENDERS, advancer, median_ratio, paired_times, progress, write_results
from .contenders import contender, training_step, vit

SEED = 0
WIDTH, HEADS, BLOCKS = 64, 4, 12
TRAIN, BATCH = 1_437, 64
PRETRAIN_EPOCHS, FINETUNE_EPOCHS = 20, 5
COST_BLOCKS, COST_REPEATS = (6, 12, 24), 7

console = Console()


@dataclass(frozen=True)
class Digits:
    """Images of (N, 1, 8, 8) and labels, split once and for all."""

    images: torch.Tensor
    labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor

    @classmethod
    def load(cls) -> Digits:
        """Read what scikit-learn ships."""
        raw = load_digits()
        images = torch.tensor(raw.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
        labels = torch.tensor(raw.target, dtype=torch.int64)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(SEED))
        images, labels = images[order], labels[order]
        return cls(images[:TRAIN], labels[:TRAIN], images[TRAIN:], labels[TRAIN:])


def digits_vit(blocks: int = BLOCKS) -> nn.Module:
    """A ViT for 8x8 images: 16 patches of 2x2 and a class token, dropout on."""
    torch.manual_seed(SEED)
    return vit(
        blocks,
        img_size=8,
        patch_size=2,
        in_chans=1,
        num_classes=10,
        embed_dim=WIDTH,
        num_heads=HEADS,
        proj_drop_rate=0.1,
    )


def fit(
    model: nn.Module, data: Digits, epochs: int, rate: float, tick: Callable[[], None]
) -> list[float]:
    """Train with AdamW on a cosine; return the test accuracy after every epoch."""
    torch.manual_seed(SEED)
    steps = epochs * (len(data.images) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps)
    accuracies = []
    for _ in range(epochs):
        model.train()
        for chosen in torch.randperm(len(data.images)).split(BATCH):
            if len(chosen) < BATCH:
                continue
            loss = cross_entropy(model(data.images[chosen]), data.labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        accuracies.append(accuracy(model, data))
        tick()
    return accuracies


def accuracy(model: nn.Module, data: Digits) -> float:
    """Share of the test images that are read right."""
    training = model.training
    with torch.no_grad():
        found = model.eval()(data.test_images).argmax(-1)
    model.train(training)
    return round((found == data.test_labels).double().mean().item(), 4)


def gradient_error(model: re2fx.RewiredModule, data: Digits, dtype: torch.dtype) -> float:
    """How far reversible gradients are from stored ones: largest difference over largest value."""
    images, labels = data.images[:BATCH].to(dtype), data.labels[:BATCH]
    gradients = {}
    for memory in ("store", "reversible"):
        rewired = copy.deepcopy(model).to(dtype)
        setattr(rewired, "memory", memory)
        torch.manual_seed(SEED)  # the same dropout masks
        cross_entropy(rewired(images), labels).backward()
        gradients[memory] = torch.cat([p.grad.flatten() for p in rewired.parameters()])  # type: ignore[union-attr]
    stored = gradients["store"]
    return float((gradients["reversible"] - stored).abs().max() / stored.abs().max())


def learn(data: Digits) -> dict[str, Any]:
    """Pretrain, rewire, finetune, compare."""
    with progress() as bar:
        original = digits_vit()
        tick = advancer(bar, "pretrain the original", PRETRAIN_EPOCHS)
        fit(original, data, PRETRAIN_EPOCHS, 2e-3, tick)
        found: dict[str, Any] = {"original": accuracy(original, data)}
        rewired = re2fx.transform(copy.deepcopy(original))
        assert isinstance(rewired, re2fx.RewiredModule), "every ViT has a chain"
        explanation = re2fx.explain(original)
        found["rewired, not finetuned"] = accuracy(rewired, data)
        found["gradient error, fp32"] = gradient_error(rewired, data, torch.float32)
        found["gradient error, fp64"] = gradient_error(rewired, data, torch.float64)
        for name, model in (("rewired", rewired), ("original", original)):
            tick = advancer(bar, f"finetune the {name}", FINETUNE_EPOCHS)
            found[f"{name}, by epoch"] = fit(model, data, FINETUNE_EPOCHS, 5e-4, tick)
    console.print(str(explanation), soft_wrap=True, highlight=False)
    table = Table("network", "test accuracy", title="digits, 360 test images")
    last = f"finetuned {FINETUNE_EPOCHS} epochs"
    for label, value in (
        ("original", found["original"]),
        ("rewired with its weights", found["rewired, not finetuned"]),
        (f"rewired, {last} reversibly", found["rewired, by epoch"][-1]),
        (f"original, {last} too", found["original, by epoch"][-1]),
    ):
        table.add_row(label, f"{value:.1%}")
    console.print(table)
    errors = [f"{found[f'gradient error, {kind}']:.0e} in {kind}" for kind in ("fp32", "fp64")]
    console.print(f"gradients, reversible against stored, apart by {', '.join(errors)}\n")
    return found


def cost(data: Digits) -> list[dict[str, Any]]:
    """Bytes kept for the backward and step time, by depth and contender."""
    rows = []
    batch = data.images[:BATCH]
    with progress() as bar:
        for blocks in COST_BLOCKS:
            model = digits_vit(blocks)
            runners = {name: contender(name, model) for name in CONTENDERS}
            steps = {name: training_step(runner, batch) for name, runner in runners.items()}
            tick = advancer(bar, f"{2 * blocks} residuals", COST_REPEATS + 1)
            seconds = paired_times(steps, COST_REPEATS, tick=tick)
            for name, runner in runners.items():
                kept = live_bytes(lambda runner=runner: runner(batch))  # type: ignore[misc]
                rows.append(
                    {
                        "residuals": 2 * blocks,
                        "contender": name,
                        "kept": kept,
                        "median_seconds": round(median(seconds[name]), 5),
                        "over_plain": round(median_ratio(seconds, name, "plain"), 3),
                        "seconds": seconds[name],
                    }
                )
    return rows


def show_cost(rows: list[dict[str, Any]]) -> None:
    """Print the table of costs."""
    table = Table(
        "residuals", "training", "kept for backward", "step", "against plain", title="cost"
    )
    for row in rows:
        name = row["contender"]
        table.add_row(
            str(row["residuals"]),
            name,
            f"{row['kept'] / 2**20:.2f} MiB",
            f"{row['median_seconds'] * 1000:.0f} ms",
            f"{row['over_plain']:.2f}x",
            end_section=name == CONTENDERS[-1],
        )
    console.print(table)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--save", action="store_true", help="write results/demo.json")
    options = parser.parse_args()
    data = Digits.load()
    accuracies = learn(data)
    rows = cost(data)
    show_cost(rows)
    if not options.save:
        return
    setup = {
        "model": f"ViT (timm), {BLOCKS} blocks of width {WIDTH}, dropout 0.1, fp32",
        "data": f"scikit-learn digits, {TRAIN} for training and {1797 - TRAIN} for testing",
        "batch": BATCH,
        "pretrain_epochs": PRETRAIN_EPOCHS,
        "finetune_epochs": FINETUNE_EPOCHS,
        "seed": SEED,
    }
    write_results("demo", {"setup": setup, "accuracy": accuracies, "cost": rows})


if __name__ == "__main__":
    main()
