"""What is rewired in models nobody here wrote: the plans, number by number."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor, nn

import re2fx

from .zoo import EACH_KIND, ZOO, one_thread

# Per model: skip-adds found, lengths of the chains, refusals by rule.
PLANS: dict[str, tuple[int, list[int], dict[str, int]]] = {
    # 4 stages of 2 basic blocks. Layers 2 to 4 open with a strided projection, which leaves one
    # block each, and one is no chain; layer 1 keeps width and size, so both its blocks chain.
    "resnet18": (8, [2], {"projection": 3, "chain of one": 3}),
    # 3 + 4 + 6 + 3 bottlenecks; the first of every stage projects (in layer 1 for the width only).
    "resnet50": (16, [2, 3, 5, 2], {"projection": 4}),
    # 12 layers of attention and MLP on one stream; the position embedding is no residual.
    "vit_b_16": (24, [24], {}),
    # 2 + 2 + 6 + 2 layers of attention and MLP; patch merging parts the stages.
    "swin_t": (24, [4, 4, 12, 4], {}),
    # The same in three dimensions.
    "swin3d_t": (24, [4, 4, 12, 4], {}),
    # Two ResNet-50s, slow and fast in turn, stage by stage; every stage of both opens with a
    # projection. Between stages the slow stream passes a concat and the fast one feeds it.
    "slowfast_r50": (32, [2, 2, 3, 3, 5, 5, 2, 2], {"projection": 8}),
    # Two ResNet-101s: 3 + 4 + 23 + 3 bottlenecks each.
    "slowfast_r101": (66, [2, 2, 3, 3, 22, 22, 2, 2], {"projection": 8}),
    # 12 blocks of attention and MLP on one stream.
    "vit_tiny_patch16_224": (24, [24], {}),
    # 3 + 3 + 9 + 3 blocks of one residual; downsampling stands between the stages, outside blocks.
    "convnext_tiny": (18, [3, 3, 9, 3], {}),
    # As resnet50, norm first: projections read the normalised value.
    "resnetv2_50": (16, [2, 3, 5, 2], {"projection": 4}),
}


def explain(model: nn.Module, name: str, full: bool = False) -> re2fx.Plan:
    """The plan of a zoo model."""
    return re2fx.explain(model, ZOO[name].example(full)).plan


@pytest.mark.parametrize("name", ZOO)
def test_plan(name: str) -> None:
    found, chains, refusals = PLANS[name]
    plan = explain(ZOO[name].build(), name)
    assert plan.found == found
    assert [len(chain) for chain in plan.chains] == chains
    assert plan.rewired == sum(chains)
    assert Counter(refusal.rule for refusal in plan.refusals) == refusals
    assert all(links == () for chain in plan.chains for links in chain.links)


def test_the_table_covers_the_zoo() -> None:
    assert PLANS.keys() == ZOO.keys()


@pytest.mark.parametrize("name", EACH_KIND)
def test_plan_depends_on_neither_seed_nor_size(name: str) -> None:
    plan = explain(ZOO[name].build(seed=0), name)
    assert explain(ZOO[name].build(seed=1), name) == plan
    assert explain(ZOO[name].build_full(), name, full=True) == plan


@pytest.mark.parametrize("name", ZOO)
def test_train_and_eval_plans_agree(name: str) -> None:
    rev = ZOO[name].rewire(ZOO[name].build())
    train, eval_ = rev.plan, rev.eval().plan
    assert train.signature() == eval_.signature()
    assert [r.rule for r in train.refusals] == [r.rule for r in eval_.refusals]


def watch(module: nn.Module, inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> None:
    """Note what a network's leaves read and return, by path."""
    for path, leaf in module.named_modules():
        if isinstance(leaf, (nn.Conv3d, nn.ReLU, nn.MaxPool3d)):

            def note(_: nn.Module, args: tuple[Tensor], output: Tensor, path: str = path) -> None:
                inputs[path], outputs[path] = args[0].clone(), output.clone()

            leaf.register_forward_hook(note)


@pytest.mark.parametrize("name", ["slowfast_r50", "slowfast_r101"])
def test_slowfast_chains_lie_within_one_pathway(name: str) -> None:
    """Slow and fast in turn, stage by stage, and each chain the blocks behind a projection."""
    plan = explain(ZOO[name].build(), name)
    for number, chain in enumerate(plan.chains):
        stage, pathway = divmod(number, 2)
        prefix = f"blocks.{stage + 1}.multipathway_blocks.{pathway}.res_blocks."
        paths = [residual.location.module for residual in chain.residuals]
        assert paths == [f"{prefix}{block}" for block in range(1, len(chain) + 1)]


@pytest.mark.parametrize("name", ["slowfast_r50", "slowfast_r101"])
def test_slowfast_fusion_is_intact(name: str) -> None:
    """Fusion reads the mean of the fast streams; the concat joins it to the mean of the slow ones.

    Five modules fuse: behind the stem and the first three stages a convolution, behind the last
    nothing.
    """
    animal = ZOO[name]
    model = animal.build()
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    watch(model, inputs, outputs)
    rev = animal.rewire(model)
    with one_thread(), re2fx.record() as calls, torch.no_grad():
        rev(animal.inputs())
    assert len(calls) == 8

    called = [node.target for node in rev.graph.nodes if node.op == "call_module"]
    for stage in range(4):
        fusion = f"blocks.{stage}.multipathway_fusion"
        assert called.count(f"{fusion}.conv_fast_to_slow") == 1
        slow, fast = (f"blocks.{stage}.multipathway_blocks.{pathway}" for pathway in (0, 1))
        if stage == 0:
            ends = [outputs[f"{path}.pool"] for path in (slow, fast)]
        else:
            pairs = [calls[2 * (stage - 1) + pathway].output for pathway in (0, 1)]
            ends = [(p[0] + p[1]) * 0.5 for p in pairs if p is not None]
        assert torch.equal(inputs[f"{fusion}.conv_fast_to_slow"], ends[1])

        fused = torch.cat([ends[0], outputs[f"{fusion}.activation"]], 1)
        following = f"blocks.{stage + 1}.multipathway_blocks"
        # Both operands of the projection residual that opens the next stage.
        for branch in ("branch1_conv", "branch2.conv_a"):
            assert torch.equal(inputs[f"{following}.0.res_blocks.0.{branch}"], fused)
            assert torch.equal(inputs[f"{following}.1.res_blocks.0.{branch}"], ends[1])


@pytest.mark.parametrize("name", ["slowfast_r50", "slowfast_r101"])
def test_slowfast_head_reads_both_pathways(name: str) -> None:
    """The last fusion is an identity on a list of two; both of its values reach the head."""
    animal = ZOO[name]
    model = animal.build().eval()
    rev = animal.rewire(model)
    seen: list[Tensor] = []
    model.get_submodule("blocks.6.dropout").register_forward_hook(
        lambda module, args, output: seen.append(args[0])
    )
    with one_thread(), re2fx.record() as calls, torch.no_grad():
        rev(animal.inputs())
    pairs = [call.output for call in calls[-2:]]
    ends = [(p[0] + p[1]) * 0.5 for p in pairs if p is not None]
    pooled = [end.mean((2, 3, 4), keepdim=True) for end in ends]
    torch.testing.assert_close(seen[0], torch.cat(pooled, 1))
