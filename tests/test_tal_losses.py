"""Losses of localizers, against values computed by hand and by finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn import functional as F

from benchmarks.tal.localizer import best, merged, widened
from benchmarks.tal.losses import (
    balanced_loss,
    diou_loss,
    diou_offset_loss,
    focal_loss,
    giou_loss,
    giou_offset_loss,
    tiou,
)

OverlapLoss = Callable[[Tensor, Tensor], Tensor]


def test_focal_loss_by_hand() -> None:
    logits = torch.tensor([0.0, math.log(3.0)])  # p = 1/2 and 3/4
    ones = focal_loss(logits, torch.ones(2))
    assert ones[0].item() == pytest.approx(0.25 * 0.25 * math.log(2))
    assert ones[1].item() == pytest.approx(0.25 * 0.0625 * math.log(4 / 3))
    zeros = focal_loss(logits, torch.zeros(2))
    assert zeros[1].item() == pytest.approx(0.75 * 0.5625 * math.log(4))


def test_focal_loss_without_focus_is_half_the_cross_entropy() -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(50), (torch.rand(50) > 0.5).float()
    plain = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    torch.testing.assert_close(focal_loss(logits, targets, 0.5, 0.0), plain / 2)


def test_focal_loss_is_finite_at_the_far_ends() -> None:
    logits = torch.tensor([-200.0, 200.0], requires_grad=True)
    loss = focal_loss(logits, torch.tensor([1.0, 0.0]))
    loss.sum().backward()
    assert loss.isfinite().all()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize(
    ("segment", "giou", "diou"),
    [
        ((0.0, 4.0), 0.0, 0.0),  # the target
        ((2.0, 6.0), 1 - 2 / 6, 1 - 2 / 6 + (2 / 6) ** 2),
        ((1.0, 3.0), 1 - 2 / 4, 1 - 2 / 4),  # inside, about the same centre
        ((6.0, 8.0), 1 + 2 / 8, 1 + (5 / 8) ** 2),  # a gap of two
        ((2.0, 2.0), 1.0, 1.0),  # empty
    ],
)
def test_overlap_losses_by_hand(segment: tuple[float, float], giou: float, diou: float) -> None:
    a, b = torch.tensor([segment]), torch.tensor([[0.0, 4.0]])
    assert giou_loss(a, b).item() == pytest.approx(giou)
    assert diou_loss(a, b).item() == pytest.approx(diou)


def test_offset_losses_are_those_of_the_segments_about_any_point() -> None:
    torch.manual_seed(0)
    offsets, targets = torch.rand(20, 2), torch.rand(20, 2)
    point = 7 * torch.rand(20)
    segments = torch.stack([point - offsets[:, 0], point + offsets[:, 1]], 1)
    truth = torch.stack([point - targets[:, 0], point + targets[:, 1]], 1)
    torch.testing.assert_close(diou_offset_loss(offsets, targets), diou_loss(segments, truth))
    torch.testing.assert_close(giou_offset_loss(offsets, targets), giou_loss(segments, truth))


def test_tiou_of_all_pairs() -> None:
    a = torch.tensor([[0.0, 2.0], [5.0, 5.0], [3.0, 1.0]])
    b = torch.tensor([[1.0, 3.0], [0.0, 2.0]])
    expected = torch.tensor([[1 / 3, 1.0], [0.0, 0.0], [0.0, 0.0]])
    torch.testing.assert_close(tiou(a, b), expected)
    assert tiou(a, b[:0]).shape == (3, 0)


def test_balanced_loss_by_hand() -> None:
    logits = torch.tensor([0.0, 0.0, math.log(3.0), 9.0])
    targets = torch.tensor([1.0, 0.0, 0.0, 1.0])
    mask = torch.tensor([True, True, True, False])
    zeros = (math.log(2) + math.log(4)) / 2
    assert balanced_loss(logits, targets, mask).item() == pytest.approx((math.log(2) + zeros) / 2)
    nothing = balanced_loss(logits, torch.zeros(4), torch.zeros(4, dtype=torch.bool))
    assert nothing.item() == 0.0


@pytest.mark.parametrize("loss", [giou_loss, diou_loss, giou_offset_loss, diou_offset_loss])
def test_gradients_of_overlap_losses(loss: OverlapLoss) -> None:
    torch.manual_seed(0)
    ends = torch.rand(12, 2, dtype=torch.float64).cumsum(1) + 0.1
    moved = ends + torch.randn(12, 1, dtype=torch.float64)
    moved = moved.abs() if "offset" in loss.__name__ else moved
    assert gradcheck(loss, (moved.requires_grad_(), ends.requires_grad_()))


def test_gradients_of_classification_losses() -> None:
    torch.manual_seed(0)
    logits = torch.randn(10, dtype=torch.float64, requires_grad=True)
    targets = (torch.rand(10) > 0.5).double()
    mask = torch.rand(10) > 0.2
    assert gradcheck(lambda x: focal_loss(x, targets), (logits,))
    assert gradcheck(lambda x: balanced_loss(x, targets, mask), (logits,))


def test_gradients_of_empty_segments_are_finite() -> None:
    empty = torch.full((3, 2), 2.0, requires_grad=True)
    (giou_loss(empty, empty.detach()) + diou_loss(empty, empty.detach())).sum().backward()
    assert empty.grad is not None
    assert empty.grad.isfinite().all()


def test_short_segments_are_widened_about_their_centre() -> None:
    segments = torch.tensor([[2.0, 2.0], [3.25, 3.75], [1.0, 5.0]])
    expected = torch.tensor([[1.5, 2.5], [3.0, 4.0], [1.0, 5.0]])
    torch.testing.assert_close(widened(segments), expected)


def test_the_best_pairs_of_segment_and_class() -> None:
    segments = torch.tensor([[-1.0, 3.0], [8.0, 12.0], [11.0, 12.0]])
    scores = torch.tensor([[0.1, 0.9], [0.8, 0.05], [1.0, 1.0]])
    found = best(segments, scores, 10.0, 3, 0.09)
    assert found.labels.tolist() == [1, 0, 0]
    assert found.segments.tolist() == [[0.0, 3.0], [8.0, 10.0], [0.0, 3.0]]
    torch.testing.assert_close(found.scores, torch.tensor([0.9, 0.8, 0.1]))
    both = merged([found, best(segments, scores / 2, 10.0, 3)], 4)
    torch.testing.assert_close(both.scores, torch.tensor([0.9, 0.8, 0.45, 0.4]))
