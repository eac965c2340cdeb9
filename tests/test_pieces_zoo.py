"""Models of libraries whose own forward decides by values, rewired in pieces."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import re2fx
from re2fx.torchvision_shim import ensure_torchvision

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)
WAVE = torch.randn(2, 400, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
IDS = torch.randint(3, 40, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def fresh() -> Any:
    yield
    torch.compiler.reset()


def library() -> Any:
    ensure_torchvision()
    return pytest.importorskip("transformers")


def wav2vec2() -> tuple[nn.Module, dict[str, Any], dict[str, list[int]]]:
    """LayerDrop, and a feature extractor that asks its input for gradients."""
    transformers = library()
    config = transformers.Wav2Vec2Config(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48,
        conv_dim=(16, 16), conv_stride=(5, 2), conv_kernel=(10, 3), num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4, do_stable_layer_norm=True, feat_extract_norm="layer",
        layerdrop=0.3, mask_time_prob=0.0,
    )  # fmt: skip
    wanted = {f"encoder.layers.{i}": [2] for i in range(3)}
    return transformers.Wav2Vec2Model(config), {"input_values": WAVE}, wanted


def opt(**inputs: Any) -> tuple[nn.Module, dict[str, Any], dict[str, list[int]]]:
    """LayerDrop in a decoder."""
    transformers = library()
    config = transformers.OPTConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, ffn_dim=48, vocab_size=40,
        max_position_embeddings=32, word_embed_proj_dim=32, layerdrop=0.3,
    )  # fmt: skip
    wanted = {f"model.decoder.layers.{i}": [2] for i in range(3)}
    return transformers.OPTForCausalLM(config), {"input_ids": IDS, "use_cache": False}, wanted


def run(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Outputs, gradients, buffers and the random state of one step."""
    model.zero_grad()
    wave = "input_values" in inputs  # Wav2Vec2 sets the flag itself, which only a leaf can bear
    inputs = {
        name: x.clone().requires_grad_(x.is_floating_point() and not wave)
        if isinstance(x, Tensor)
        else x
        for name, x in inputs.items()
    }
    torch.manual_seed(3)
    leaves = [x for x in pytree.tree_leaves(model(**inputs)) if isinstance(x, Tensor)]
    loss = torch.stack([x.square().mean() for x in leaves if x.requires_grad]).sum()
    loss.backward()
    results = {
        **{f"output {i}": x.detach() for i, x in enumerate(leaves)},
        **{f"gradient {name}": p.grad for name, p in model.named_parameters()},
        **{f"input {name}": x.grad for name, x in inputs.items() if isinstance(x, Tensor)},
        **{f"buffer {name}": x.clone() for name, x in model.named_buffers()},
        "random state": torch.get_rng_state().double(),
    }
    return {name: value for name, value in results.items() if value is not None}


def assert_same(rev: Any, inputs: dict[str, Any], given: nn.Module) -> None:
    """Reversible against stored execution; gradients where the given model has them."""
    found = {}
    for rev.memory in ("store", "reversible"):
        found[rev.memory] = run(rev, inputs)
    trained = run(given, inputs).keys()
    assert all(results.keys() == trained for results in found.values())
    largest = max(float(g.norm()) for n, g in found["store"].items() if n.startswith("gradient"))
    for name in trained:
        a, b = found["reversible"][name], found["store"][name]
        assert float((a - b).norm()) <= 1e-10 * max(float(b.norm()), 1e-4 * largest), name


@pytest.mark.parametrize("make", [wav2vec2, opt])
def test_layer_drop(make: Any) -> None:
    torch.manual_seed(0)
    model, inputs, wanted = make()
    model.double().train()
    rev: Any = re2fx.transform(model, inputs)
    assert isinstance(rev, re2fx.PiecewiseModule)
    assert isinstance(rev, type(model))
    assert {p: [len(c) for c in piece.plan.chains] for p, piece in rev.pieces.items()} == wanted
    assert rev.config is model.config
    assert list(rev.state_dict()) == list(model.state_dict())
    assert_same(rev, inputs, model)


def test_a_cache_among_the_arguments_is_named() -> None:
    model, inputs, _ = opt()
    del inputs["use_cache"]
    with pytest.raises(re2fx.NoResidualError, match="past_key_values holds a DynamicCache"):
        re2fx.transform(model.double(), inputs, strict=True)


def test_post_norm_layers_are_refused_with_their_rule() -> None:
    transformers = library()
    config = transformers.BartConfig(
        d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, vocab_size=40,
        max_position_embeddings=32, encoder_layerdrop=0.1, decoder_layerdrop=0.1,
    )  # fmt: skip
    inputs = {"input_ids": IDS, "decoder_input_ids": IDS, "use_cache": False}
    explanation = re2fx.explain(transformers.BartModel(config), inputs)
    assert {refusal.rule for refusal in explanation.plan.refusals} == {"post-norm"}
    assert len(explanation.plan.refusals) == 10


def test_detr() -> None:
    transformers = library()
    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[3, 1, 1, 1], layer_type="basic",
        out_features=["stage4"],
    )  # fmt: skip
    config = transformers.DetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None,
        backbone_config=backbone, d_model=32, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48,
        decoder_ffn_dim=48, num_queries=5, num_labels=3,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.DetrForObjectDetection(config).double().train()
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    inputs = {"pixel_values": images, "pixel_mask": torch.ones(2, 64, 64, dtype=torch.long)}
    rev: Any = re2fx.transform(model, inputs)
    assert [len(chain) for chain in re2fx.explain(rev).plan.chains] == [3]
    assert_same(rev, inputs, model)


@pytest.fixture
def operators(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Plain forms of torchvision's compiled operators, where they are not there."""
    ensure_torchvision()
    torchvision = pytest.importorskip("torchvision")
    if torchvision.extension._has_ops():
        yield
        return
    from torchvision.ops import boxes, poolers

    def nms(rows: Tensor, scores: Tensor, threshold: float) -> Tensor:
        kept: list[int] = []
        for i in scores.argsort(descending=True).tolist():
            if not kept or boxes.box_iou(rows[i : i + 1], rows[kept]).max() <= threshold:
                kept.append(i)
        return torch.tensor(kept, dtype=torch.long)

    def roi_align(x: Tensor, rois: Tensor, output_size: Any, **options: Any) -> Tensor:
        pooled = nn.functional.adaptive_avg_pool2d(x, output_size)
        return pooled[rois[:, 0].long()]

    monkeypatch.setattr(boxes, "nms", nms)
    monkeypatch.setattr(boxes, "_batched_nms_coordinate_trick", lambda b, s, i, t: nms(b, s, t))
    monkeypatch.setattr(boxes, "_batched_nms_vanilla", lambda b, s, i, t: nms(b, s, t))
    monkeypatch.setattr(poolers, "roi_align", roi_align)
    yield


def test_faster_rcnn(operators: None) -> None:
    import torchvision

    torch.manual_seed(0)
    model = torchvision.models.detection.fasterrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=4, min_size=64, max_size=96,
        rpn_pre_nms_top_n_train=40, rpn_pre_nms_top_n_test=40,
    ).double().train()  # fmt: skip
    images = [torch.rand(3, 64, 80, dtype=torch.float64), torch.rand(3, 70, 64).double()]
    box = torch.tensor([[5.0, 5, 40, 40]], dtype=torch.float64)
    targets = [{"boxes": box, "labels": torch.tensor([1])} for _ in images]
    rev: Any = re2fx.transform(model, (images, targets))
    assert isinstance(rev, type(model))
    chains = {p: [len(c) for c in piece.plan.chains] for p, piece in rev.pieces.items()}
    assert chains == {"backbone": [2, 3, 5, 2]}
    found = {}
    for rev.memory in ("store", "reversible"):
        rev.zero_grad()
        torch.manual_seed(3)
        torch.stack(list(rev(images, targets).values())).sum().backward()
        found[rev.memory] = {n: p.grad for n, p in rev.named_parameters() if p.grad is not None}
    assert found["store"].keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    assert found["reversible"].keys() == found["store"].keys()
    largest = max(float(g.norm()) for g in found["store"].values())
    for name, wanted in found["store"].items():
        error = float((found["reversible"][name] - wanted).norm())
        assert error <= 1e-9 * max(float(wanted.norm()), 1e-4 * largest), name
