"""The peak of a training step, predicted against measured."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import re2fx
from benchmarks.torchvision_shim import ensure_torchvision
from re2fx.errors import CaptureError, OptionError
from re2fx.foresight import Foreseen, foresee, total
from re2fx.peak import Peak
from re2fx.workspace import nbytes, rule_of

from .models import ConvNet, Net
from .planning import single as single

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    ensure_torchvision()
    import torchvision
    from transformers import GPT2Config, GPT2LMHeadModel

# On the machine it was written on, at most 0.0004 are missed, but for two: 0.015 where the twin
# remembers generator states for attention without dropout, and 0.016 under autocast (oneDNN's
# scratch for products in bfloat16).
TOLERANCE = 0.03

A = torch.ops.aten
Given = tuple[Any, Any]


def vit(dropout: float = 0.1) -> Given:
    model = torchvision.models.VisionTransformer(
        image_size=64, patch_size=8, num_layers=6, num_heads=4, hidden_dim=96, mlp_dim=384,
        num_classes=10, dropout=dropout, attention_dropout=dropout,
    )  # fmt: skip
    return model, torch.randn(4, 3, 64, 64)


def resnet18(batch: int = 4) -> Given:
    return torchvision.models.resnet18(num_classes=10), torch.randn(batch, 3, 64, 64)


def resnet18_last() -> Given:
    model, x = resnet18()
    form = torch.channels_last
    return model.to(memory_format=form), x.contiguous(memory_format=form)


def swin3d() -> Given:
    model = torchvision.models.video.SwinTransformer3d(
        patch_size=[2, 4, 4], embed_dim=48, depths=[2, 2, 4, 2], num_heads=[2, 4, 8, 16],
        window_size=[4, 4, 4], num_classes=10, dropout=0.1, attention_dropout=0.1,
        stochastic_depth_prob=0.1,
    )  # fmt: skip
    return model, torch.randn(1, 3, 8, 96, 96)


def gpt2() -> Given:
    config = GPT2Config(
        n_layer=6, n_embd=128, n_head=4, vocab_size=500, n_positions=128, use_cache=False,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config), torch.randint(0, 500, (4, 96))


MODELS: dict[str, Callable[[], Given]] = {
    "vit": vit,
    "vit without dropout": lambda: vit(0.0),  # flash attention
    "resnet18": resnet18,
    "resnet18 of one image": lambda: resnet18(1),  # torch's own convolutions
    "resnet18 channels last": resnet18_last,
    "swin3d": swin3d,
    "gpt2": gpt2,
}


def measured(model: nn.Module, x: Any, grads: bool, autocast: bool = False) -> Peak:
    """A second step."""

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            loss = total(model(x))
        torch.autograd.backward(loss)

    step()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if grads else None
    return re2fx.peak(step)


@cache
def _rewired(name: str) -> Given:
    torch.manual_seed(0)
    model, x = MODELS[name]()
    return re2fx.transform(model, x), x


def rewired(name: str, memory: re2fx.module.Memory) -> Given:
    rev, x = _rewired(name)
    rev.memory = memory
    return rev, x


@pytest.mark.parametrize(
    ("memory", "grads"), [("store", True), ("reversible", True), ("reversible", False)]
)
@pytest.mark.parametrize("name", MODELS)
def test_the_peak_is_what_is_measured(name: str, memory: re2fx.module.Memory, grads: bool) -> None:
    rev, x = rewired(name, memory)
    real, found = measured(rev, x, grads), foresee(rev, (x,), grads=grads)
    assert found.peak.peak == pytest.approx(real.peak, rel=TOLERANCE)
    assert found.peak.end == real.end
    assert found.phase == "backward"


def _nesting() -> int:
    """How many autocast regions lie around this."""
    torch.autocast_increment_nesting()
    return torch.autocast_decrement_nesting()


@pytest.mark.parametrize("memory", ["store", "reversible"])
@pytest.mark.parametrize("name", ["gpt2", "vit"])
def test_autocast_counts_in_the_forward(name: str, memory: re2fx.module.Memory) -> None:
    rev, x = rewired(name, memory)
    real = measured(rev, x, True, autocast=True)
    with torch.autocast("cpu", torch.bfloat16):
        before = _nesting()
        found = foresee(rev, x)
        assert torch.is_autocast_enabled("cpu")
        assert _nesting() == before
    assert not torch.is_autocast_enabled("cpu")
    assert found.peak.peak == pytest.approx(real.peak, rel=TOLERANCE)


@pytest.mark.parametrize("memory", ["store", "reversible"])
def test_nothing_is_touched(memory: re2fx.module.Memory) -> None:
    torch.manual_seed(0)
    rev = re2fx.transform(ConvNet(dropout=0.1), torch.randn(2, 3, 8, 8), memory=memory)
    for index, parameter in enumerate(rev.parameters()):
        parameter.grad = torch.ones_like(parameter) if index % 2 else None
    grads = [parameter.grad for parameter in rev.parameters()]
    before = {name: value.clone() for name, value in rev.state_dict().items()}
    states = torch.get_rng_state(), random.getstate()
    foresee(rev, torch.randn(2, 3, 8, 8, generator=torch.Generator()))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert all(torch.equal(value, before[name]) for name, value in rev.state_dict().items())
    after = [parameter.grad for parameter in rev.parameters()]
    assert all(one is other for one, other in zip(grads, after, strict=True))
    assert all(grad is None or bool((grad == 1).all()) for grad in after)
    assert not any(type(tensor).__name__ == "FakeTensor" for tensor in rev.state_dict().values())


def test_a_step_larger_than_the_machine() -> None:
    x = torch.empty(2**26, 4, device="meta")
    rev = re2fx.transform(Net(24, width=32))
    found = {}
    for memory in ("store", "reversible"):
        setattr(rev, "memory", memory)
        found[memory] = foresee(rev, x).peak.peak
    assert found["store"] > 200 * 2**30
    assert found["reversible"] < found["store"] / 4


class Reads(nn.Module):
    """One value that many read, whose gradients the engine adds up."""

    def __init__(self, sliced: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1000))
        self.sliced = sliced

    def forward(self, x: Tensor) -> Tensor:
        y = (x * self.weight).sin()
        if self.sliced:
            first, second = y.chunk(2)
            return (first.exp() * second.sin()).sum() + (y + y.cos()).sum()
        return y.mul(2).sum() + y.mul(3).sum() + y.mul(4).sum() + y.mul(5).sum()


@pytest.mark.parametrize("sliced", [False, True])
@pytest.mark.parametrize("grads", [False, True])
def test_gradients_are_added_as_in_an_ordinary_run(sliced: bool, grads: bool) -> None:
    model, x = Reads(sliced), torch.randn(100, 1000)
    real, found = measured(model, x, grads), foresee(model, x, grads=grads)
    assert found.peak.peak == real.peak
    large = [[size for _, size in peak.timeline if size > 5e5] for peak in (real, found.peak)]
    ends = [[n for i, n in enumerate(line[1:-1]) if line[i] < n > line[i + 2]] for line in large]
    assert ends[0][-5:] == pytest.approx(ends[1][-5:], abs=100), "the backward's last rises"


class Wide(nn.Module):
    """Needs most in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = x.repeat(1, 1000).exp().mean(1, keepdim=True)
        out: Tensor = self.head(x * y)
        return out


def test_where_the_peak_lies() -> None:
    found = foresee(Wide(), torch.randn(64, 8))
    assert found.phase == "forward"
    sizes = [size for _, size in found.peak.timeline]
    assert max(sizes[: found.turn]) == found.peak.peak > 2 * max(sizes[found.turn :])
    steps = [step for step, _ in found.peak.timeline]
    assert steps == sorted(steps)
    assert "in the forward; " in str(found)
    other = foresee(Net(8), torch.randn(64, 4))
    assert other.phase == "backward"
    assert 0 < other.turn < len(other.peak.timeline)


class Cyclic(nn.Module):
    """Leaves a tensor in a cycle behind at each call."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        cycle: list[Any] = [torch.zeros(1000)]
        cycle.append(cycle)
        out: Tensor = self.inner(x)
        return out


def test_garbage_does_not_distort() -> None:
    model, x = Net(8), torch.randn(64, 4)
    plain = foresee(model, x).peak
    for _ in range(3):
        found = foresee(Cyclic(model), x).peak
        assert found.peak - plain.peak in (0, 4000)  # unless it is collected in between
        assert found.end - plain.end in (0, 4000)
    assert foresee(model, x).peak == plain


def test_the_flops_are_torchs() -> None:
    torch.manual_seed(0)
    model, x = vit()
    with FlopCounterMode(display=False) as counter:
        total(model(x)).backward()
    found = foresee(model, x)
    assert found.flops == counter.get_total_flops()
    rev: Any = re2fx.transform(model, x)
    assert 1.2 < foresee(rev, x).flops / found.flops < 1.4, "the forward is run again"
    assert foresee(vit(0.0)[0], x).flops == pytest.approx(found.flops, rel=0.05)


def test_bytes_that_are_moved() -> None:
    class Once(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1000))

        def forward(self) -> Tensor:
            return self.weight.view(10, 100).exp().sum()

    found: Foreseen = foresee(Once(), ())
    # exp reads and writes, sum reads; exp's result times one number; added to the gradient
    assert found.moved == pytest.approx(8_000 + 4_000 + 8_000 + 12_000, abs=50)
    assert found.flops == 0


def test_what_cannot_be_foreseen() -> None:
    class Frozen(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2

    class Asking(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if x.sum() > 0 else x

    with pytest.raises(OptionError, match="requires a gradient"):
        foresee(Frozen(), torch.ones(2))
    with pytest.raises(CaptureError, match="Asking"):
        foresee(Asking(), torch.ones(2, requires_grad=True))


# kernels, run alone


def options(*values: int, rank: int = 2) -> list[Any]:
    stride, padding, groups = values
    return [[stride] * rank, [padding] * rank, [1] * rank, False, [0] * rank, groups]


def convolution(source: Any, weight: Any, *values: int, last: bool = False) -> list[Any]:
    x, rank = torch.randn(source), len(source) - 2
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    return [x, torch.randn(weight), None, *options(*values, rank=rank)]


def backward_of(arguments: list[Any], mask: tuple[bool, bool] = (True, True)) -> list[Any]:
    gradient = torch.randn_like(A.convolution(*arguments))
    return [gradient, *arguments[:2], None, *arguments[3:], [*mask, False]]


CONVOLUTIONS = {
    "3x3": convolution((4, 64, 16, 16), (64, 64, 3, 3), 1, 1, 1),
    "narrow image": convolution((4, 512, 2, 2), (512, 512, 3, 3), 1, 1, 1),
    "odd channels": convolution((4, 24, 16, 16), (40, 24, 3, 3), 1, 1, 1),
    "1x1": convolution((4, 64, 16, 16), (256, 64, 1, 1), 1, 0, 1),
    "one image": convolution((1, 64, 16, 16), (64, 64, 3, 3), 1, 1, 1),
    "depthwise": convolution((2, 96, 14, 14), (96, 1, 7, 7), 1, 3, 96),
    "last": convolution((4, 64, 16, 16), (64, 64, 3, 3), 1, 1, 1, last=True),
    "depthwise last": convolution((2, 96, 14, 14), (96, 1, 7, 7), 1, 3, 96, last=True),
    "strided": convolution((4, 64, 17, 17), (128, 64, 3, 3), 2, 1, 1),
    "strided 1x1": convolution((4, 256, 16, 16), (512, 256, 1, 1), 2, 0, 1),
    "strided in groups": convolution((4, 64, 17, 17), (64, 16, 3, 3), 2, 1, 4),
    "strided, last": convolution((4, 64, 17, 17), (128, 64, 3, 3), 2, 1, 1, last=True),
    "strided 3d": convolution((2, 64, 4, 16, 16), (64, 64, 3, 3, 3), 2, 1, 1),
    "3d 1x1": convolution((2, 128, 4, 16, 16), (64, 128, 1, 1, 1), 1, 0, 1),
    "3d": convolution((2, 64, 4, 16, 16), (64, 64, 3, 3, 3), 1, 1, 1),
}
STEMS = {
    "patches": convolution((4, 3, 64, 64), (96, 3, 8, 8), 8, 0, 1),
    "large patches": convolution((4, 3, 64, 64), (192, 3, 16, 16), 16, 0, 1),
    "7x7": convolution((4, 3, 64, 64), (64, 3, 7, 7), 2, 3, 1),
}


def kernels() -> dict[str, tuple[Any, list[Any]]]:
    x = torch.randn(8, 64, 32, 32)
    turned, w, v = x.transpose(1, 2), torch.ones(64), torch.ones(32)
    q = torch.randn(2, 300, 4, 64).transpose(1, 2)
    half = x.bfloat16()
    norm = A.native_layer_norm(turned, [32], v, v, 1e-5)
    flash = A._scaled_dot_product_flash_attention_for_cpu(q, q, q)
    found: dict[str, tuple[Any, list[Any]]] = {
        "layer norm": (A.native_layer_norm.default, [x, [32], v, v, 1e-5]),
        "layer norm, turned": (A.native_layer_norm.default, [turned, [32], v, v, 1e-5]),
        "layer norm backward": (
            A.native_layer_norm_backward.default,
            [turned, turned, [32], norm[1], norm[2], v, v, [True] * 3],
        ),
        "batch norm backward": (
            A.native_batch_norm_backward.default,
            [x, x, w, w, w, w, w, True, 1e-5, [True] * 3],
        ),
        "softmax": (A._softmax.default, [turned, -1, False]),
        "safe softmax": (A._safe_softmax.default, [x, -1]),
        "softmax backward": (A._softmax_backward_data.default, [turned, turned, -1, x.dtype]),
        "logsumexp": (A.logsumexp.default, [x, [1]]),
        "roll": (A.roll.default, [x, [1, 0, 2], [1, 2, 3]]),
        "add of two dtypes": (A.add.Tensor, [x, half]),
        "multiplication in place": (A.mul_.Tensor, [x.clone(), half]),
        "comparison of two dtypes": (A.lt.Tensor, [x, half]),
        "where": (A.where.self, [x > 0, x, x]),
        "gelu backward": (A.gelu_backward.default, [x, x]),
        "bilinear": (A.upsample_bilinear2d.default, [x, [64, 64], False]),
        "flash": (A._scaled_dot_product_flash_attention_for_cpu.default, [q, q, q]),
        "flash backward": (
            A._scaled_dot_product_flash_attention_for_cpu_backward.default,
            [q.contiguous(), q, q, q, flash[0], flash[1], 0.0, False],
        ),
    }
    for name, arguments in {**CONVOLUTIONS, **STEMS}.items():
        found[f"convolution, {name}"] = (A.convolution.default, arguments)
        mask = (name not in STEMS, True)
        backward = backward_of(arguments, mask)
        found[f"convolution backward, {name}"] = (A.convolution_backward.default, backward)
    return found


KERNELS = kernels()


@pytest.mark.parametrize("name", KERNELS)
def test_what_a_kernel_takes(name: str) -> None:
    func, args = KERNELS[name]
    func(*args)  # the first call may allocate more
    result = func(*args)
    outputs = [x for x in (result if isinstance(result, tuple) else (result,)) if x is not None]
    own = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
    made = sum(nbytes(x) for x in outputs if x.untyped_storage().data_ptr() not in own)
    rule = rule_of(func)
    expected = made + (rule(args, outputs) if rule else 0)
    real = re2fx.peak(lambda: func(*args)).peak
    assert real == pytest.approx(expected, rel=TOLERANCE)


def test_a_planned_network_is_foreseen_as_it_was_planned() -> None:
    """Its program is made anew inside the step: attention that tracing kept whole is opened."""
    from torchvision.models.video.swin_transformer import SwinTransformer3d

    model = SwinTransformer3d([2, 4, 4], 24, [2], [3], [8, 7, 7])
    x = torch.randn(1, 3, 16, 56, 56)
    rev: Any = re2fx.transform(model, x, memory="lowest")
    found, planned = foresee(rev, x).peak, rev.memory_plan.predicted.peak
    assert found.peak == pytest.approx(planned.peak, rel=1e-3)
