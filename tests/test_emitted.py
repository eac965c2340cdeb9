"""The emitted graphs are the training step: they run, give the gradients, and can be read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

import re2fx

from .models import Net
from .zoo import timm, torchvision

OFF = {"drop_rate": 0.0, "proj_drop_rate": 0.0, "attn_drop_rate": 0.0, "drop_path_rate": 0.0}


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    yield
    torch.compiler.reset()


def vit(depth: int = 2, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(
        "vit_tiny_patch16_224", depth=depth, img_size=32, num_classes=5, **{**OFF, **options}
    )
    return model.train()


def run_step(program: re2fx.Emitted, outputs: int) -> tuple[list[Tensor], dict[int, Tensor]]:
    """Run both graphs by hand; the gradients by the number of the forward's input."""
    with torch.no_grad():
        results = program.forward(*[clone(value) for value in program.inputs])
        saved = results[program.reversible.outputs :]
        returned = results[program.reversible.outputs - outputs : program.reversible.outputs]
        tangents = [torch.ones_like(value) for value in returned]
        order = placeholders(program.backward)
        assert len(order) == len(saved) + len(tangents)
        gradients = program.backward(*in_order(program, saved), *tangents)
    return list(returned), {i: g for i, g in enumerate(gradients) if g is not None}


def clone(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def placeholders(module: GraphModule) -> list[Node]:
    return [node for node in module.graph.nodes if node.op == "placeholder"]


def in_order(program: re2fx.Emitted, saved: Any) -> list[Any]:
    """Sizes come before tensors in the backward; the forward returns tensors first."""
    sizes = [value for value in saved if not isinstance(value, Tensor)]
    return [*sizes, *[value for value in saved if isinstance(value, Tensor)]]


def stored_gradients(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    rev = re2fx.transform(model, memory="store")
    parameters = dict(model.named_parameters())
    out = rev(x)
    return out, dict(
        zip(parameters, torch.autograd.grad(out.sum(), list(parameters.values())), strict=True)
    )


def check_step(model: nn.Module, x: Tensor, tolerance: float) -> re2fx.Emitted:
    program = re2fx.emit(model, x)
    for graph in (program.forward, program.backward):
        graph.graph.lint()
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    returned, gradients = run_step(program, outputs=1)
    with torch.no_grad():
        for name, value in model.named_buffers():
            value.copy_(buffers[name])
    out, expected = stored_gradients(model, x)
    torch.testing.assert_close(returned[0], out, rtol=1e-5, atol=1e-6)
    names = {id(value): name for name, value in model.named_parameters()}
    found = {names[id(program.inputs[i])]: g for i, g in gradients.items() if i is not None}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        worst = (found[name] - gradient).abs().max() / gradient.abs().max().clamp_min(1e-12)
        assert worst <= tolerance, f"{name}: {worst}"
    return program


def test_a_vit_runs_by_hand_and_adds_no_fallback() -> None:
    program = check_step(vit(), torch.randn(2, 3, 32, 32), 1e-5)
    assert program.blocks == 4
    report = program.lowering_report()
    assert report.added_fallbacks == ()
    assert report.backward.generated > report.stored_backward.generated > 0
    assert report.backward.library["aten.mm"] == report.stored_backward.library["aten.mm"]
    assert "generated kernels" in str(report)
    assert "only the reversible step has: none" in str(report)


def test_a_resnet_runs_by_hand_and_adds_no_fallback() -> None:
    """Bottlenecks with batch norms and ReLUs in place, as in a ResNet-50."""
    resnet = torchvision.models.resnet
    model = resnet.ResNet(resnet.Bottleneck, [3, 3, 1, 1], num_classes=10).double()
    program = check_step(model, torch.randn(2, 3, 48, 48, dtype=torch.float64), 1e-9)
    assert program.blocks == 4
    assert program.lowering_report().added_fallbacks == ()


def test_what_is_kept_does_not_grow_with_depth() -> None:
    x = torch.randn(2, 3, 32, 32)
    programs = [re2fx.emit(vit(depth, proj_drop_rate=0.1), x) for depth in (2, 4)]
    seeds = [sum("seed" in node.name for node in p.reversible.saved) for p in programs]
    kept = [p.reversible.saved_bytes - 8 * n for p, n in zip(programs, seeds, strict=True)]
    assert seeds[1] == 2 * seeds[0] > 0
    assert kept[0] == kept[1]
    assert programs[1].stored.saved_bytes > programs[0].stored.saved_bytes > 2 * kept[0]


def test_emitting_leaves_everything_as_it_was() -> None:
    model, x = vit(proj_drop_rate=0.1), torch.randn(2, 3, 32, 32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    program = re2fx.emit(model, x)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())
    assert model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert {id(p) for p in model.parameters()} <= {id(value) for value in program.inputs}


def test_the_print_names_inputs_and_lines() -> None:
    text = str(re2fx.emit(vit(), torch.randn(2, 3, 32, 32)))
    assert text.startswith("VisionTransformer: 4 blocks reconstructed; the forward keeps")
    assert "blocks_0_norm1_weight" in text
    assert "vision_transformer.py" in text
    assert "re2fx.couple" not in text
    assert "re2fx.fork" not in text


def test_a_rewired_module_is_not_rewired_twice() -> None:
    model = Net()
    x = torch.randn(6, 4)
    direct, through = re2fx.emit(model, x), re2fx.emit(re2fx.transform(model), x)
    assert direct.blocks == through.blocks
    assert direct.reversible.saved_bytes == through.reversible.saved_bytes
    with pytest.raises(re2fx.OptionError, match="rewired already"):
        re2fx.emit(re2fx.transform(model), x, readout="sum")


def test_options_and_keyword_inputs() -> None:
    program = re2fx.emit(Net(), kwargs={"x": torch.randn(6, 4)}, readout="sum")
    assert program.blocks > 0
    with pytest.raises(re2fx.OptionError, match="no option scope"):
        re2fx.emit(Net(), torch.randn(6, 4), scope="region")


def test_what_cannot_be_emitted_says_why() -> None:
    with pytest.raises(re2fx.NoResidualError, match="nothing in Linear"):
        re2fx.emit(nn.Linear(4, 4), torch.randn(6, 4))
    with pytest.raises(re2fx.InputError, match="needs a gradient"):
        re2fx.emit(Net().requires_grad_(False), torch.randn(6, 4))
