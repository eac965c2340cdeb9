"""Accuracy of every coupling before and after finetuning: ``python -m benchmarks.accuracy``.

Each network learns scikit-learn's digits, is rewired with every candidate and finetuned reversibly;
the original is finetuned for the same steps on the same batches at the same rate. Per seed another
split, initialisation and order. Goes on from what ``results/accuracy.json`` holds; ``--fresh``
begins anew, ``--quick`` shows in minutes that everything runs and keeps nothing.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from statistics import fmean, stdev
from typing import Any

from rich.console import Console
from rich.markdown import Markdown

from .accuracy_models import BATCH, MODELS, TRAIN
from .accuracy_runs import BY_NAME, FINETUNE_RATE, PRETRAIN_RATE, Row, finetune, pretrain
from .accuracy_tables import text_accuracy
from .common import RESULTS, advancer, environment, progress, read_results, target, write_results

SEEDS, PRETRAIN_EPOCHS, FINETUNE_EPOCHS = 5, 25, 5
QUICK = {"seeds": 2, "pretrain_epochs": 6, "finetune_epochs": 2}
GOAL_MODEL, GOAL = "ViT-12", "consistent(1/4), mean"


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
        if BY_NAME[candidate].only in ("", name)
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
