"""What both localizers promise, whatever they are inside."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks.tal.actionformer import ActionFormer, ActionFormerConfig
from benchmarks.tal.localizer import Localizer, Targets
from benchmarks.tal.vsgn import VSGN, VSGNConfig
from benchmarks.tal.vsgn_stitched import StitchedVSGN

from .tal_features import gradients_are_finite, targets_of

FORMER = ActionFormerConfig(channels=12, classes=3, width=16, stem=1, levels=3, window=5)
GRAPH = VSGNConfig(channels=12, classes=3, width=16, levels=3, depth=1, neighbours=4)
Make = Callable[..., Localizer[Any]]
LOCALIZERS: dict[str, Make] = {
    "actionformer": lambda **changes: ActionFormer(replace(FORMER, **changes)),
    "exponential": lambda **changes: ActionFormer(replace(FORMER, distance="exp", **changes)),
    "vsgn": lambda **changes: VSGN(replace(GRAPH, **changes)),
    "stitched": lambda **changes: StitchedVSGN(replace(GRAPH, **changes)),
}
each = pytest.mark.parametrize("name", LOCALIZERS)


@each
def test_gradients_are_finite_without_actions_and_with_tiny_ones(name: str) -> None:
    torch.manual_seed(0)
    features = torch.randn(3, 12, 21)
    mask = torch.arange(21) < torch.tensor([[21], [1], [9]])
    tiny = targets_of([[(3.2, 3.3, 0), (7.0, 7.0, 1)], [], [(8.0, 9.0, 2)]])
    none = Targets([torch.zeros(0, 2)] * 3, [torch.zeros(0, dtype=torch.int64)] * 3)
    for targets in (tiny, none):
        assert gradients_are_finite(LOCALIZERS[name](), features, mask, targets)


@each
def test_detections_are_sorted_clipped_and_few(name: str) -> None:
    torch.manual_seed(0)
    model = LOCALIZERS[name](prior=0.5).eval()
    mask = torch.arange(20) < torch.tensor([[20], [7]])
    found = model.detections(model(torch.randn(2, 12, 20), mask), most=15)
    assert [len(some.scores) for some in found] == [15, 15]
    for some, length in zip(found, (20, 7), strict=True):
        assert (some.scores.diff() <= 0).all()
        assert some.segments.min() >= 0
        assert some.segments.max() <= length
        assert (some.segments[:, 1] > some.segments[:, 0]).all()


@each
def test_scores_up_to_the_threshold_are_dropped(name: str) -> None:
    torch.manual_seed(0)
    model = LOCALIZERS[name](prior=0.01, threshold=0.9).eval()
    mask = torch.ones(1, 20, dtype=torch.bool)
    (found,) = model.detections(model(torch.randn(1, 12, 20), mask))
    assert len(found.scores) == 0
