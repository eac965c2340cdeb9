"""Features that a backbone gives once and for all, for localizers on fixed features."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from .batches import Batch, Key, Sample


@torch.no_grad()
def extract(
    backbone: nn.Module, loader: Iterable[Batch], device: torch.device
) -> list[dict[str, Any]]:
    """The features of all samples that could be read.

    Args:
        backbone: put into eval mode.
        loader: its samples are whole videos, or windows of them.
        device: where the backbone runs.

    Returns:
        the fields of a `Sample` each, with features ``(C, cells)`` for frames.
    """
    backbone.to(device).eval()
    found = []
    for batch in loader:
        if not len(batch):
            continue
        features = backbone(batch.to(device).frames).cpu()
        rows = zip(
            batch.videos, features, batch.offsets, batch.steps, batch.segments, batch.labels,
            batch.lengths.tolist(), strict=True,
        )  # fmt: skip
        found += [asdict(Sample(video, own.clone(), *rest)) for video, own, *rest in rows]
    return found


class FeatureSet(Dataset[Sample]):
    """Samples with features in the place of frames.

    Args:
        samples: of `extract`.
    """

    def __init__(self, samples: list[dict[str, Any]]) -> None:
        self.samples = [Sample(**sample) for sample in samples]

    @classmethod
    def read(cls, path: Path) -> FeatureSet:
        """From the file that they were saved in."""
        return cls(torch.load(path, weights_only=True))

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: Key) -> Sample:
        return self.samples[key if isinstance(key, int) else key[1]]
