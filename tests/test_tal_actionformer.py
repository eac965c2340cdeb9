"""ActionFormer: its attention, its targets, and that it learns."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, fx

import re2fx
from benchmarks.tal.actionformer import ActionFormer, ActionFormerConfig
from benchmarks.tal.actionformer_targets import Points, assign, decode, points_of
from benchmarks.tal.local_attention import LocalAttention, band_of, local_attention

from .tal_features import fit, recalled, targets_of, videos

CONFIG = ActionFormerConfig(channels=12, classes=3, width=16, stem=1, levels=3, window=5)


def full_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, heads: int, reach: int) -> Tensor:
    """Attention of all cells with all, in which those out of reach are masked."""
    batch, width, cells = q.shape
    q, k, v = (x.reshape(batch, heads, width // heads, cells) for x in (q, k, v))
    logits = torch.einsum("bhdi,bhdj->bhij", q, k) / math.sqrt(width // heads)
    i = torch.arange(cells)
    near = (i[:, None] - i).abs() <= reach
    seen = near & mask[:, None, None, :] | torch.eye(cells, dtype=torch.bool)
    weights = logits.masked_fill(~seen, -math.inf).softmax(-1)
    return torch.einsum("bhij,bhdj->bhdi", weights, v).reshape(batch, width, cells)


@pytest.mark.parametrize("cells", [1, 3, 8, 21])
@pytest.mark.parametrize("reach", [1, 4])
def test_local_attention_is_masked_full_attention(cells: int, reach: int) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 6, cells, dtype=torch.float64)
    mask = torch.rand(2, cells) > 0.3
    local = local_attention(q, k, v, mask, 2, band_of(reach))
    torch.testing.assert_close(local, full_attention(q, k, v, mask, 2, reach))


def test_local_attention_does_not_see_beyond_its_window() -> None:
    torch.manual_seed(0)
    attention = LocalAttention(8, 2, 5)
    x = torch.randn(1, 8, 20)
    x[0, :, 19] = 0
    changed = x.clone()
    changed[0, 0, 10] += 1
    mask = torch.ones(1, 20, dtype=torch.bool)
    apart = (attention(x, mask) - attention(changed, mask)).abs().amax((0, 1)) > 0
    # Two cells of attention, and one of the projections' convolutions.
    assert apart.nonzero().flatten().tolist() == list(range(7, 14))


@pytest.mark.parametrize("window", [1, 4])
def test_windows_that_cannot_be(window: int) -> None:
    with pytest.raises(ValueError, match="odd"):
        LocalAttention(8, 2, window)


def test_widths_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="no multiple"):
        LocalAttention(9, 2, 3)


def test_points_of_three_levels() -> None:
    points = points_of([4, 2, 1], 4.0)
    assert points.centres.tolist() == [0.5, 1.5, 2.5, 3.5, 1.0, 3.0, 2.0]
    assert points.strides.tolist() == [1.0] * 4 + [2.0] * 2 + [4.0]
    assert points.ranges[[0, 4, 6]].tolist() == [[0.0, 4.0], [4.0, 8.0], [8.0, math.inf]]


def learners(points: Points, segment: tuple[float, float]) -> list[tuple[float, float]]:
    """(stride, centre) of the cells that learn an action."""
    index, _ = assign(points, torch.tensor([segment]), 1.5)
    chosen = index >= 0
    return list(zip(points.strides[chosen].tolist(), points.centres[chosen].tolist(), strict=True))


def test_centre_sampling_and_ranges_by_hand() -> None:
    points = points_of([32, 16, 8], 4.0)
    # Four cells on the first grid: within 1.5 of the centre, the farther end nearer than 4.
    fine = [(1.0, 7.5), (1.0, 8.5), (1.0, 9.5), (1.0, 10.5)]
    assert learners(points, (7.25, 10.75)) == fine
    # Of a longer one the outer two are too far from an end, which the second grid sees well.
    both = [(1.0, 8.5), (1.0, 9.5), (2.0, 7.0), (2.0, 11.0)]
    assert learners(points, (6.0, 12.0)) == both
    # The second grid alone: within 3 of the centre, the farther end from 4 to below 8.
    assert learners(points, (7.0, 17.0)) == [(2.0, 11.0), (2.0, 13.0)]
    # The third: within 6, the farther end from 8 on.
    assert learners(points, (6.0, 26.0)) == [(4.0, 10.0), (4.0, 14.0), (4.0, 18.0), (4.0, 22.0)]


def test_the_shorter_action_wins() -> None:
    points = points_of([16], 4.0)
    index, offsets = assign(points, torch.tensor([[4.0, 9.0], [6.0, 8.0]]), 1.5)
    assert index.tolist() == [-1] * 5 + [0, 1, 1] + [-1] * 8
    assert offsets[6].tolist() == [0.5, 1.5]
    assert offsets[5].tolist() == [1.5, 3.5]


def test_an_action_within_a_cell_is_learned_as_a_cell() -> None:
    index, offsets = assign(points_of([8], 4.0), torch.tensor([[3.1, 3.3]]), 1.5)
    assert index.tolist() == [-1, -1, -1, 0, -1, -1, -1, -1]
    torch.testing.assert_close(offsets[3], torch.tensor([0.8, 0.2]))


def test_segments_come_back_from_their_distances() -> None:
    torch.manual_seed(0)
    points = points_of([64, 32, 16, 8], 4.0)
    starts = 20 * torch.rand(30, 1)
    segments = torch.cat([starts, starts + 1 + 40 * torch.rand(30, 1)], 1)
    index, offsets = assign(points, segments, 1.5)
    chosen = index >= 0
    assert chosen.sum() > 10
    torch.testing.assert_close(decode(points, offsets)[chosen], segments[index[chosen]])


def test_a_sample_is_predicted_alike_alone_and_in_a_padded_batch() -> None:
    torch.manual_seed(0)
    model = ActionFormer(CONFIG).double().eval()
    features = torch.randn(2, 12, 29, dtype=torch.float64)
    mask = torch.ones(2, 29, dtype=torch.bool)
    mask[0, 13:] = False
    both, alone = model(features, mask), model(features[:1, :, :13], mask[:1, :13])
    for level in range(3):
        valid = both.masks[level][0].nonzero().flatten()
        assert len(valid) == alone.masks[level].sum() == math.ceil(13 / 2**level)
        for name in ("logits", "offsets"):
            together, single = getattr(both, name)[level], getattr(alone, name)[level]
            torch.testing.assert_close(together[0][:, valid], single[0][:, valid])
    found, single = model.detections(both)[0], model.detections(alone)[0]
    torch.testing.assert_close(found.segments, single.segments)
    assert found.segments.max() <= 13


def test_the_loss_does_not_depend_on_the_padding() -> None:
    torch.manual_seed(0)
    model = ActionFormer(CONFIG).double().eval()
    features = torch.randn(1, 12, 13, dtype=torch.float64)
    mask = torch.ones(1, 13, dtype=torch.bool)
    targets = targets_of([[(2.0, 5.0, 0), (4.0, 11.5, 2)]])
    short = model.losses(model(features, mask), targets)
    long = torch.cat([features, torch.randn(1, 12, 30, dtype=torch.float64)], 2)
    wide = torch.cat([mask, torch.zeros(1, 30, dtype=torch.bool)], 1)
    torch.testing.assert_close(model.losses(model(long, wide), targets), short)


def test_the_losses_by_hand() -> None:
    model = ActionFormer(replace(CONFIG, levels=1, normaliser=8.0))
    logits = torch.zeros(1, 3, 4)
    offsets = torch.tensor([[[0.0, 0.5, 1.5, 0.0], [0.0, 1.5, 0.5, 0.0]]])
    mask = torch.tensor([[True, True, True, False]])
    predictions = type(model(torch.randn(1, 12, 4), mask))(
        [logits], [offsets], [mask], torch.tensor([3.0])
    )
    losses = model.losses(predictions, targets_of([[(1.0, 3.0, 2)]]))
    # Both cells in the action learn it, and their distances are right.
    count = 0.9 * 8 + 0.1 * 2
    focal = (2 * 0.25 + 7 * 0.75) * 0.25 * math.log(2) / count
    assert losses["classification"].item() == pytest.approx(focal)
    assert losses["regression"].item() == pytest.approx(0.0, abs=1e-6)
    assert model.normaliser.item() == pytest.approx(count)
    worse = replace(predictions, offsets=[offsets + 1])
    assert model.eval().losses(worse, targets_of([[(1.0, 3.0, 2)]]))["regression"].item() == (
        pytest.approx(2 * 0.5 / count)
    )
    assert model.normaliser.item() == pytest.approx(count)


def test_it_can_be_traced_for_any_length() -> None:
    torch.manual_seed(0)
    model = ActionFormer(CONFIG).eval()
    traced = fx.symbolic_trace(model)
    for cells in (9, 16):
        features, mask = torch.randn(2, 12, cells), torch.ones(2, cells, dtype=torch.bool)
        torch.testing.assert_close(traced(features, mask).logits, model(features, mask).logits)


def test_the_blocks_of_each_grid_are_rewired() -> None:
    torch.manual_seed(0)
    model = ActionFormer(replace(CONFIG, stem=2)).pyramid.double()
    x = torch.randn(2, 12, 16, dtype=torch.float64)
    mask = torch.arange(16) < torch.tensor([[16], [10]])
    # Three blocks of two residuals on the first grid, one on the second.
    chains = re2fx.explain(model, (x, mask)).plan.chains
    assert [len(chain) for chain in chains] == [6, 2]
    gradients = []
    for memory in ("reversible", "store"):
        rewired = re2fx.transform(model, (x, mask), memory=memory)
        model.zero_grad()
        torch.cat(rewired(x, mask)[0], 2).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*gradients)


def test_it_learns_what_can_be_seen() -> None:
    torch.manual_seed(0)
    actions = [[(4.0, 10.0, 0), (14.0, 28.0, 1)], [(6.0, 9.0, 2), (16.0, 22.0, 0)]]
    features, mask, targets = videos(actions, 32, 12)
    model = ActionFormer(CONFIG)
    assert not recalled(model.eval().detections(model(features, mask)), targets, 0.7)
    fit(model, features, mask, targets, 100, 5e-3)
    assert recalled(model.detections(model(features, mask)), targets, 0.7)
