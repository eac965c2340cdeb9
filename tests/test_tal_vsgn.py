"""VSGN: its graph, its anchors, the stitching, and that it learns."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, fx

import re2fx
from benchmarks.tal.localizer import Found, Targets
from benchmarks.tal.vsgn import VSGN, BoundaryAdjustment, VSGNConfig
from benchmarks.tal.vsgn_anchors import anchors_of, boundary_targets, decode, encode, match
from benchmarks.tal.vsgn_graph import CrossScaleLayer, Edges, nearest, upsample
from benchmarks.tal.vsgn_stitch import Stitching, stitch, unstitch
from benchmarks.tal.vsgn_stitched import StitchedVSGN

from .tal_features import fit, recalled, targets_of, videos

CONFIG = VSGNConfig(channels=12, classes=3, width=16, levels=3, depth=1, neighbours=4)


def all_valid(batch: int, cells: int) -> Tensor:
    return torch.ones(batch, cells, dtype=torch.bool)


# Video self-stitching


def test_a_stitched_clip_by_hand() -> None:
    plan = Stitching(4, gap=2)
    assert (plan.start, plan.total) == (6, 14)
    clip = torch.tensor([[[0.0, 4.0, 8.0, 99.0]]])
    mask = torch.tensor([[True, True, True, False]])
    joined, targets = stitch(clip, mask, targets_of([[(1.0, 2.5, 3)]]), plan)
    assert joined[0, 0, :6].tolist() == [0.0, 4.0, 8.0, 99.0, 0.0, 0.0]
    # The copy's centres lie at quarters of the clip's cells; what is not valid is not mixed in.
    assert joined[0, 0, 6:12].tolist() == [0.0, 1.0, 3.0, 5.0, 7.0, 8.0]
    assert plan.mask(mask)[0].int().tolist() == [1, 1, 1, 0, 0, 0, 1, 1, 1, 1, 1, 1, 0, 0]
    assert plan.magnified(mask)[0].int().tolist() == [0] * 6 + [1] * 8
    assert targets.segments[0].tolist() == [[1.0, 2.5], [8.0, 11.0]]
    assert targets.labels[0].tolist() == [3, 3]


def test_a_stitched_vsgn_learns_the_actions_in_both_parts() -> None:
    torch.manual_seed(0)
    model = StitchedVSGN(CONFIG, gap=8)
    features, mask = torch.randn(2, 12, 16), all_valid(2, 16)
    targets = targets_of([[(1.0, 5.0, 0)], [(4.0, 12.0, 2)]])
    plan = Stitching(16, gap=8)
    joined, both = stitch(features, mask, targets, plan)
    predictions = model.vsgn(joined, plan.mask(mask), plan.magnified(mask))
    assert [len(segments) for segments in both.segments] == [2, 2]
    expected = model.vsgn.losses(predictions, both)
    for name, loss in model.losses(model(features, mask), targets).items():
        torch.testing.assert_close(loss, expected[name])


def test_frames_are_stitched_like_features() -> None:
    torch.manual_seed(0)
    frames = torch.randn(2, 3, 6, 2, 5)
    none = Targets([torch.zeros(0, 2)] * 2, [torch.zeros(0, dtype=torch.int64)] * 2)
    plan = Stitching(3, gap=2).times(2)
    assert plan == Stitching(6, gap=4)
    joined, targets = stitch(frames, all_valid(2, 6), none, plan, dim=2)
    assert joined.shape == (2, 3, 22, 2, 5)
    assert [len(s) for s in targets.segments] == [0, 0]
    one, _ = stitch(frames[:, :, :, 1, 3], all_valid(2, 6), none, plan)
    torch.testing.assert_close(joined[:, :, :, 1, 3], one)


def test_what_is_found_in_both_parts_comes_back() -> None:
    plan = Stitching(10, gap=4)
    segments = torch.tensor([[1.0, 3.0], [20.0, 26.0], [9.0, 16.0], [30.0, 34.0]])
    found = Found(segments, torch.tensor([0.9, 0.8, 0.7, 0.6]), torch.tensor([0, 1, 2, 3]))
    back = unstitch(found, plan, 9.0)
    # The third has its centre in the gap, and the last is cut where the clip ends.
    assert back.labels.tolist() == [0, 1, 3]
    assert back.segments.tolist() == [[1.0, 3.0], [3.0, 6.0], [8.0, 9.0]]
    # Short ones count in the magnified copy alone.
    assert unstitch(found, plan, 9.0, short=2.5).labels.tolist() == [3]
    assert unstitch(found, plan, 9.0, short=1.5).labels.tolist() == [0, 3]


def test_stitching_comes_back() -> None:
    torch.manual_seed(0)
    actions = targets_of([[(1.0, 2.5, 3), (4.0, 9.0, 1)]])
    plan = Stitching(10)
    _, both = stitch(torch.randn(1, 2, 10), all_valid(1, 10), actions, plan)
    scores = torch.tensor([0.9, 0.8, 0.7, 0.6])
    back = unstitch(Found(both.segments[0], scores, both.labels[0]), plan, 10.0)
    torch.testing.assert_close(back.segments, actions.segments[0].repeat(2, 1))


def test_stitchings_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="factor >= 1"):
        Stitching(4, factor=0)
    with pytest.raises(ValueError, match="a plan of 4"):
        stitch(torch.randn(1, 2, 5), all_valid(1, 5), targets_of([[]]), Stitching(4))
    features, mask = torch.randn(1, 12, 8), all_valid(1, 8)
    with pytest.raises(ValueError, match="magnified is given"):
        VSGN(CONFIG)(features, mask, mask)
    with pytest.raises(ValueError, match="magnified is not given"):
        VSGN(replace(CONFIG, stitched=True))(features, mask)
    with pytest.raises(ValueError, match="even"):
        Edges(3)


# The graph


def test_the_nearest_by_hand() -> None:
    x = torch.tensor([[[0.0, 10.0, 1.0, 4.0]]])
    allowed = ~torch.eye(4, dtype=torch.bool).unsqueeze(0)
    allowed[:, :, 2] = False
    found = nearest(x, x, allowed, 3)
    assert found.tolist() == [[[3, 1, -1], [3, 0, -1], [0, 3, 1], [0, 1, -1]]]


def test_free_and_cross_scale_edges_of_stitched_videos() -> None:
    x = torch.tensor([[[0.0, 5.0, 0.0, 0.1, 4.9, 5.2]]])
    mask = torch.tensor([[True, True, False, True, True, True]])
    magnified = torch.tensor([[False, False, False, True, True, True]])
    edges = Edges(2)(x, mask, magnified)
    assert edges[0, :, 0].tolist() == [3, 4, 0, 0, 1, 1]
    assert edges[0, :, 1].tolist() == [3, 4, 3, 0, 1, 1]


def test_cross_scale_edges_without_stitching_lead_to_upsampled_features() -> None:
    x = torch.tensor([[[0.0, 4.0, 3.4, 7.0]]])
    mask = torch.tensor([[True, True, True, False]])
    torch.testing.assert_close(
        upsample(x, mask)[0, 0, :6], torch.tensor([0.0, 1.0, 3.0, 3.85, 3.55, 3.4])
    )
    edges = Edges(4)(x, mask, None)
    assert edges[0, :3, :2].tolist() == [[2, 1], [2, 0], [1, 0]]
    # Upsampled cells come behind the four cells themselves.
    assert edges[0, :3, 2:].tolist() == [[4, 5], [7, 8], [9, 8]]


def test_a_cell_without_neighbours_has_itself() -> None:
    mask = torch.tensor([[True, False]])
    edges = Edges(4)(torch.randn(1, 3, 2), mask, torch.tensor([[False, False]]))
    assert edges[0].tolist() == [[0, 0, 0, 0], [0, 1, 1, 1]]


def test_the_graph_branch_is_an_edge_convolution() -> None:
    torch.manual_seed(0)
    layer = CrossScaleLayer(4).double()
    x, mask = torch.randn(2, 4, 6, dtype=torch.float64), all_valid(2, 6)
    edges = torch.randint(0, 18, (2, 6, 3))
    assert layer.own.bias is not None
    weight = torch.cat([layer.own.weight, layer.other.weight], 1).squeeze(-1)
    both = torch.cat([x, upsample(x, mask)], 2)
    result = layer.graph(x, mask, edges, stitched=False)
    for b in range(2):
        for i in range(6):
            pairs = [torch.cat([x[b, :, i], both[b, :, j]]) for j in edges[b, i]]
            each = torch.stack([weight @ pair + layer.own.bias for pair in pairs])
            torch.testing.assert_close(result[b, :, i], each.amax(0))


# Anchors and what they learn


def test_anchors_by_hand() -> None:
    anchors = anchors_of([all_valid(1, 4), all_valid(1, 2)], (2.0, 3.0))
    assert anchors.shape == (1, 12, 2)
    assert anchors[0, :3].tolist() == [[-0.5, 1.5], [-1.0, 2.0], [0.5, 2.5]]
    assert anchors[0, 8:].tolist() == [[-1.0, 3.0], [-2.0, 4.0], [1.0, 5.0], [0.0, 6.0]]


def test_segments_come_back_from_their_deltas() -> None:
    torch.manual_seed(0)
    anchors = anchors_of([all_valid(1, 8), all_valid(1, 4)], (2.0, 3.0))[0]
    starts = 8 * torch.rand(len(anchors), 1)
    segments = torch.cat([starts, starts + 0.1 + 9 * torch.rand(len(anchors), 1)], 1)
    torch.testing.assert_close(decode(anchors, encode(anchors, segments)), segments)
    assert decode(anchors, torch.full_like(anchors, 1e4)).isfinite().all()


def test_anchors_learn_what_they_overlap() -> None:
    anchors = torch.tensor([[0.0, 2.0], [1.0, 3.0], [2.0, 4.0], [0.0, 8.0], [20.0, 22.0]])
    valid = torch.ones(5, dtype=torch.bool)
    segments = torch.tensor([[1.0, 2.6], [0.0, 6.0]])
    # tIoU 0.38, 0.8, 0.2, 0.2 with the first, 0.33, 0.33, 0.33, 0.75 with the second.
    assert match(anchors, valid, segments, 0.5).tolist() == [-1, 0, -1, 1, -1]
    # The third would do, if asked for less.
    assert match(anchors, valid, segments, 0.3).tolist() == [0, 0, 1, 1, -1]
    valid[1] = False
    # Then the first is what is left for the first action.
    assert match(anchors, valid, segments, 0.5).tolist() == [0, -1, -1, 1, -1]


def test_no_action_goes_without_an_anchor() -> None:
    anchors = torch.tensor([[0.0, 4.0], [4.0, 8.0]])
    valid = torch.ones(2, dtype=torch.bool)
    assert match(anchors, valid, torch.tensor([[5.1, 5.2]]), 0.5).tolist() == [-1, 0]
    assert match(anchors, valid, torch.tensor([[5.0, 5.0], [4.0, 7.9]]), 0.5).tolist() == [-1, 0]
    assert match(anchors, valid, torch.tensor([[50.0, 51.0]]), 0.5).tolist() == [-1, -1]
    assert match(anchors, valid, torch.zeros(0, 2), 0.5).tolist() == [-1, -1]


def test_starts_ends_and_actions_by_hand() -> None:
    cells = torch.arange(12) + 0.5
    targets = boundary_targets(cells, torch.tensor([[2.0, 8.0], [9.2, 9.2]]))
    start = [0, 1, 1, 0, 0, 0, 0, 0, 1, 0, 0, 0]
    end = [0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 0, 0]
    action = [0, 0, 1, 1, 1, 1, 1, 1, 0, 1, 0, 0]
    assert targets.int().tolist() == [start, end, action]
    wide = boundary_targets(cells, torch.tensor([[0.0, 30.0]]))[0]
    assert wide.nonzero().flatten().tolist() == [0, 1, 2]


# The model


def test_the_adjustment_starts_as_the_identity_and_moves_by_lengths() -> None:
    torch.manual_seed(0)
    adjustment = BoundaryAdjustment(8)
    x, length = torch.randn(1, 8, 16), torch.tensor([16.0])
    segments = torch.tensor([[[2.0, 6.0], [-3.0, 30.0]]], requires_grad=True)
    torch.testing.assert_close(adjustment(x, segments, length), segments)
    adjustment.shifts.bias.data = torch.tensor([-0.25, 0.5])
    moved = adjustment(x, segments, length)
    assert moved[0, 0].tolist() == [1.0, 8.0]
    assert not torch.autograd.grad(moved.sum(), segments, allow_unused=True)[0]


def test_the_adjustment_sees_start_end_and_inside() -> None:
    torch.manual_seed(0)
    adjustment = BoundaryAdjustment(1)
    torch.nn.init.ones_(adjustment.shifts.weight)
    torch.nn.init.ones_(adjustment.hidden.weight)
    segments, length = torch.tensor([[[10.0, 20.0]]]), torch.tensor([32.0])
    x = torch.zeros(1, 1, 32, requires_grad=True)
    adjustment(x + 1, segments, length).sum().backward()
    assert x.grad is not None
    seen = x.grad.flatten().nonzero().flatten().tolist()
    # At 9, 10, 11, at 12.5, 15, 17.5 and at 19, 20, 21, each between two centres or at one.
    assert seen == [8, 9, 10, 11, 12, 14, 15, 17, 18, 19, 20, 21]


def test_a_sample_is_predicted_alike_alone_and_in_a_padded_batch() -> None:
    torch.manual_seed(0)
    model = VSGN(CONFIG).double().eval()
    torch.nn.init.normal_(model.adjustment.shifts.weight, std=0.1)
    features = torch.randn(2, 12, 29, dtype=torch.float64)
    mask = all_valid(2, 29)
    mask[0, 13:] = False
    both, alone = model(features, mask), model(features[:1, :, :13], mask[:1, :13])
    assert both.valid[0].sum() == alone.valid.sum() == 2 * (13 + 7 + 4)
    for name in ("anchors", "logits", "located", "adjusted"):
        together, single = getattr(both, name)[0], getattr(alone, name)[0]
        torch.testing.assert_close(together[both.valid[0]], single[alone.valid[0]])
    torch.testing.assert_close(both.boundaries[0, :, :13], alone.boundaries[0, :, :13])
    found, single = model.detections(both)[0], model.detections(alone)[0]
    torch.testing.assert_close(found.segments, single.segments)
    torch.testing.assert_close(found.scores, single.scores)
    assert found.segments.max() <= 13


def test_the_loss_does_not_depend_on_the_padding() -> None:
    torch.manual_seed(0)
    model = VSGN(CONFIG).double()
    features, mask = torch.randn(1, 12, 13, dtype=torch.float64), all_valid(1, 13)
    targets = targets_of([[(2.0, 5.0, 0), (4.0, 11.5, 2)]])
    short = model.losses(model(features, mask), targets)
    long = torch.cat([features, torch.randn(1, 12, 30, dtype=torch.float64)], 2)
    wide = torch.cat([mask, torch.zeros(1, 30, dtype=torch.bool)], 1)
    torch.testing.assert_close(model.losses(model(long, wide), targets), short)


def test_the_losses_by_hand() -> None:
    model = VSGN(replace(CONFIG, levels=1, anchors=(2.0,), weights=(1.0, 2.0, 3.0, 4.0)))
    predictions = model(torch.randn(1, 12, 4), torch.tensor([[True, True, True, False]]))
    exact, apart = torch.tensor([0.5, 2.5]), torch.tensor([1.5, 3.5])
    by_hand = replace(
        predictions,
        logits=torch.zeros(1, 4, 3),
        located=exact.expand(1, 4, 2),
        adjusted=apart.expand(1, 4, 2),
        boundaries=torch.zeros(1, 3, 4),
    )
    # The action is the second anchor; the others overlap it by a third.
    losses = model.losses(by_hand, targets_of([[(0.5, 2.5, 1)]]))
    focal = (0.25 + 8 * 0.75) * 0.25 * math.log(2)
    assert losses["classification"].item() == pytest.approx(focal)
    assert losses["localization"].item() == pytest.approx(0.0)
    assert losses["adjustment"].item() == pytest.approx(2 / 3)
    assert losses["boundaries"].item() == pytest.approx(2.5 * math.log(2))
    total = focal + 3 * 2 / 3 + 4 * 2.5 * math.log(2)
    assert losses["total"].item() == pytest.approx(total)


def test_boundary_scores_weigh_the_classes() -> None:
    model = VSGN(replace(CONFIG, levels=1, anchors=(2.0,)))
    predictions = model(torch.randn(1, 12, 8), all_valid(1, 8))
    boundaries = torch.full((1, 3, 8), -20.0)
    boundaries[0, 0, 2] = boundaries[0, 1, 5] = 20.0
    boundaries[0, 2, 2:6] = 20.0
    segments = torch.tensor([[1.5, 4.5], [2.5, 5.5]] * 4).unsqueeze(0)
    logits = torch.full((1, 8, 3), -20.0)
    logits[0, :2, 1] = 0.0
    by_hand = replace(predictions, logits=logits, adjusted=segments, boundaries=boundaries)
    (found,) = model.detections(by_hand)
    assert found.labels.tolist() == [1]
    assert found.segments.tolist() == [[2.5, 5.5]]
    assert found.scores.item() == pytest.approx(0.5)


def test_it_can_be_traced_for_any_length() -> None:
    torch.manual_seed(0)
    model = VSGN(CONFIG).eval()
    traced = fx.symbolic_trace(model, concrete_args={"magnified": None})
    for cells in (9, 16):
        features, mask = torch.randn(2, 12, cells), all_valid(2, cells)
        torch.testing.assert_close(
            traced(features, mask, None).adjusted, model(features, mask).adjusted
        )


def test_the_layers_of_each_grid_are_rewired() -> None:
    torch.manual_seed(0)
    model = VSGN(replace(CONFIG, depth=2)).pyramid.double()
    x = torch.randn(2, 12, 16, dtype=torch.float64)
    mask = torch.arange(16) < torch.tensor([[16], [10]])
    chains = re2fx.explain(model, (x, mask), capture="symbolic").plan.chains
    assert [len(chain) for chain in chains] == [2, 2, 2]
    gradients = []
    for memory in ("reversible", "store"):
        rewired = re2fx.transform(model, (x, mask), memory=memory, capture="symbolic")
        model.zero_grad()
        torch.cat(rewired(x, mask)[0], 2).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*gradients)


ACTIONS = [[(4.0, 10.0, 0), (14.0, 28.0, 1)], [(6.0, 9.0, 2), (16.0, 22.0, 0)]]


def test_it_learns_what_can_be_seen() -> None:
    torch.manual_seed(0)
    features, mask, targets = videos(ACTIONS, 32, 12)
    model = VSGN(CONFIG)
    assert not recalled(model.eval().detections(model(features, mask)), targets, 0.7)
    fit(model, features, mask, targets, 100, 5e-3)
    assert recalled(model.detections(model(features, mask)), targets, 0.7)


def test_it_learns_from_stitched_videos() -> None:
    torch.manual_seed(0)
    features, mask, targets = videos(ACTIONS, 32, 12)
    plan = Stitching(32, gap=8)
    stitched, both = stitch(features, mask, targets, plan)
    valid, magnified = plan.mask(mask), plan.magnified(mask)
    model = VSGN(replace(CONFIG, stitched=True))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(100):
        optimizer.zero_grad()
        model.losses(model(stitched, valid, magnified), both)["total"].backward()
        optimizer.step()
    found = model.eval().detections(model(stitched, valid, magnified))
    assert recalled([unstitch(some, plan, 32.0) for some in found], targets, 0.7)
