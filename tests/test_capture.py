"""Symbolic capture: inputs in their structures, live leaves, nothing left on the model."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

import re2fx
from re2fx.capture import capture

from .compare import assert_reversible_equals_store
from .models import Block, Net


class Double(torch.autograd.Function):
    """y = 2x with a deliberately odd gradient of 5."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return 5 * grads[0]


class Custom(nn.Module):
    """Applies a custom function between two children, so it is no leaf by itself."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(Double.apply(self.a(x)))
        return out


class CustomBlock(Block):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__(width, dropout)
        self.custom = Custom(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.custom(self.norm(x))


def test_the_backward_of_a_custom_function_is_kept() -> None:
    """Traced through, the function would give 2 where its own backward gives 5."""
    torch.manual_seed(0)
    model = nn.Sequential(CustomBlock(4, 0), CustomBlock(4, 0)).double()
    x = torch.randn(3, 4, dtype=torch.float64)
    rev = re2fx.transform(model)
    assert set(re2fx.explain(model).leaves) == {"0.custom", "1.custom"}
    assert_reversible_equals_store(rev, x)
    rev(x).sum().backward()
    got = model.get_parameter("1.custom.a.bias").grad
    # The readout halves the branch's output; its three rows have gradient 1/2 each.
    expected = 5 * 3 * 0.5 * model.get_parameter("1.custom.b.weight").sum(0)
    torch.testing.assert_close(got, expected)


def test_a_custom_function_in_the_model_itself_is_refused() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.net(Double.apply(x))
            return out

    with pytest.raises(re2fx.CaptureError, match=r"custom autograd\.Function Double"):
        re2fx.transform(Root())
    assert "apply" in vars(torch.autograd.Function)
    assert Double.apply(torch.ones(1)).item() == 2


class Clips(nn.Module):
    """Takes a list of clips, a dict and an optional mask."""

    def __init__(self) -> None:
        super().__init__()
        self.slow, self.fast = Net(), Net()

    def forward(
        self, clips: list[Tensor], extra: dict[str, Tensor], mask: Tensor | None = None
    ) -> dict[str, Any]:
        assert isinstance(clips, list)
        assert isinstance(extra, dict)
        slow, fast = self.slow(clips[0]), self.fast(clips[1])
        if mask is not None:
            slow = slow * mask
        return {"out": (slow, fast + extra["bias"])}


def clips() -> tuple[list[Tensor], dict[str, Tensor]]:
    x = torch.randn(3, 3, 4, dtype=torch.float64)
    return [x[0], x[1]], {"bias": torch.randn(3, dtype=torch.float64)}


def test_real_structures() -> None:
    rev = re2fx.transform(Clips().double(), clips())
    a, b = clips()
    out = rev(a, extra=b)
    assert isinstance(out["out"], tuple)
    assert_reversible_equals_store(rev, a, b)
    assert isinstance(rev, re2fx.RewiredModule)
    names = [node.name for node in rev.graph.nodes if node.op == "placeholder"]
    assert names == ["clips_0", "clips_1", "extra_bias"]


def test_optional_arguments_are_fixed_or_captured() -> None:
    a, b = clips()
    mask = torch.randn(3, 3, dtype=torch.float64)
    rev = re2fx.transform(Clips().double(), (a, b))
    given: re2fx.RewiredModule = copy.deepcopy(rev)  # type: ignore[assignment]
    given.recompile()  # as if edited, so that nothing is captured again
    with pytest.raises(re2fx.InputError, match="mask=None and called with another value"):
        given(a, b, mask)
    masked = re2fx.transform(Clips().double(), {"clips": a, "extra": b, "mask": mask})
    assert_reversible_equals_store(masked, a, b, mask)
    masked.load_state_dict(rev.state_dict())
    torch.testing.assert_close(rev(a, b, mask), masked(a, b, mask))
    torch.testing.assert_close(masked(a, b), rev(a, b))
    masked.recompile()  # type: ignore[operator]
    masked = copy.deepcopy(masked)
    with pytest.raises(re2fx.InputError, match="a tensor for mask and called with None"):
        masked(a, b)


def test_wrong_inputs_are_named() -> None:
    rev = re2fx.transform(Clips().double(), clips())
    rev.recompile()  # type: ignore[operator]
    a, b = clips()
    with pytest.raises(re2fx.InputError, match="another structure"):
        rev([*a, a[0]], b)
    with pytest.raises(re2fx.InputError, match="another structure"):
        rev(tuple(a), b)
    with pytest.raises(re2fx.InputError, match="missing a required argument"):
        rev(a)
    with pytest.raises(re2fx.CaptureError, match="example_inputs="):
        re2fx.transform(Clips())


def test_source_lines_are_recorded() -> None:
    captured = capture(Net())
    add = next(node for node in captured.train.nodes if node.name == "add")
    assert add.meta["source_line"][0].endswith("models.py")
    assert add.meta["source_line"][3].startswith("return x + self.outer")
    assert "models.py" in add.meta["stack_trace"]


class Noisy(nn.Module):
    """A childless module that asks for its training flag."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if self.training else x


def test_childless_modules_with_a_mode_stay_live() -> None:
    class NoisyBlock(Block):
        def __init__(self, width: int, dropout: float) -> None:
            super().__init__(width, dropout)
            self.noisy = Noisy()

        def forward(self, x: Tensor) -> Tensor:
            return x + self.noisy(self.inner(x)).sum(-1, keepdim=True)

    model = Net(block=NoisyBlock)
    rev = re2fx.transform(model)
    x = torch.randn(2, 4)
    before = rev(x)
    for block in model.blocks:
        block.noisy.eval()  # type: ignore[union-attr]
    assert not torch.allclose(rev(x), before)


class Effect(nn.Module):
    """A part whose forward does something that tracing would do once."""

    steps: Tensor

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.mix = kind, nn.Sequential(nn.Linear(4, 4))
        self.register_buffer("steps", torch.zeros(1))
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mix(x)
        if self.kind == "torch":
            return x * torch.rand(4)
        if self.kind == "own generator":
            return x + torch.randn(4, generator=self.generator)
        if self.kind == "python":
            return x * random.random()
        if self.kind == "numpy":
            return x * float(numpy.random.rand())
        if self.kind == "buffer":
            self.steps += 1
        if self.kind == "view of a buffer":
            self.steps[0].mul_(2)
        return x + self.steps


def drawn() -> list[int]:
    """The state of numpy's generator."""
    state: Any = numpy.random.get_state()
    numbers: list[int] = state[1].tolist()
    return [*numbers, state[2]]


KINDS = ["torch", "own generator", "python", "numpy", "buffer", "view of a buffer"]


@pytest.mark.parametrize("kind", KINDS)
def test_effects_happen_in_every_call(kind: str) -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.effect = Effect(kind)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = torch.tanh(self.effect(x))
            return out

    model = Around()
    states = torch.get_rng_state(), random.getstate(), drawn()
    captured = capture(model)
    again = torch.get_rng_state(), random.getstate(), drawn()
    assert torch.equal(states[0], again[0])
    assert list(captured.leaves) == ["effect"]
    assert "once and for all" in captured.leaves["effect"]
    if "python" != kind != "numpy":  # which have drawn by the time it is noticed
        assert states[1:] == again[1:]
    assert model.effect.steps == 0
    with pytest.raises(re2fx.CaptureError, match="once and for all"):
        capture(Effect(kind))


def test_effects_that_are_in_the_graph_are_none() -> None:
    class Drawing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            noise = torch.rand_like(x) + torch.rand(x.shape)
            table = torch.zeros(4)
            table[1:].add_(1)  # its own
            return x * noise * table

    assert not capture(Drawing()).leaves


def test_hooks_that_would_be_lost_are_named() -> None:
    model = Net()
    model.blocks[2].register_forward_hook(lambda *_: None)
    with pytest.warns(re2fx.Re2fxWarning, match=r"hooks registered on blocks\.2 will not run") as w:
        re2fx.transform(model)
    assert w[0].filename == __file__
