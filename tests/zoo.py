"""Models nobody here wrote, with inputs small enough for a test.

Every model has all of its layers and its full width; only the inputs are small. Dropout and
stochastic depth are on wherever the constructor offers them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn

import re2fx
from benchmarks.torchvision_shim import ensure_torchvision
from re2fx.zoo import steps
from re2fx.zoo.steps import Step as Step
from re2fx.zoo.steps import awaken
from re2fx.zoo.steps import one_thread as one_thread

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    ensure_torchvision()
    import timm as timm
    import torchvision as torchvision
    from pytorchvideo.models.slowfast import create_slowfast

Sizes: TypeAlias = tuple[tuple[int, ...], ...]

CLASSES = 10

leaves = steps.tensors


@dataclass(frozen=True)
class Animal:
    """A model of the zoo.

    Attributes:
        name: what its library calls it.
        small: builds it for small inputs.
        full: builds it for inputs of the size it was published with.
        small_sizes: the shapes of its small inputs; several are given as one list.
        full_sizes: the shapes of its full inputs.
    """

    name: str
    small: Callable[[], Any]
    full: Callable[[], Any]
    small_sizes: Sizes
    full_sizes: Sizes

    def build(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
        """A fresh model with generic parameters, in train mode."""
        model = _seeded(self.small, seed)
        awaken(model, seed)
        return model.to(dtype).train()

    def build_full(self, seed: int = 0) -> nn.Module:
        """A fresh model as its library gives it, for inputs of full size."""
        return _seeded(self.full, seed)

    def inputs(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
        """The model's one small argument: a tensor, or a list of clips."""
        generator = torch.Generator().manual_seed(seed)
        tensors = [
            torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)
            for size in self.small_sizes
        ]
        return tensors if len(tensors) > 1 else tensors[0]

    def example(self, full: bool = False) -> Any:
        """``example_inputs`` for re2fx: needed where the argument is a list of clips."""
        sizes = self.full_sizes if full else self.small_sizes
        return ([torch.empty(size) for size in sizes],) if len(sizes) > 1 else None

    def rewire(
        self, model: nn.Module, memory: re2fx.module.Memory = "reversible"
    ) -> re2fx.RewiredModule:
        """Transform one of its builds."""
        rev = re2fx.transform(model, self.example(), memory=memory)
        assert isinstance(rev, re2fx.RewiredModule), f"nothing in {self.name} was rewired"
        return rev


def step(
    model: nn.Module, inputs: Any, seed: int = 0, between: Callable[[], None] | None = None
) -> Step:
    """One forward and backward of a network with one argument, as `re2fx.zoo.steps.step`."""
    return steps.step(model, (inputs,), seed=seed, between=between)


def _seeded(build: Callable[[], Any], seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        model = build()
    assert isinstance(model, nn.Module)
    return model


def _image(
    name: str,
    build: Callable[..., Any],
    size: int = 48,
    small: dict[str, Any] | None = None,
    batch: int = 4,
    **options: Any,
) -> Animal:
    return Animal(
        name,
        lambda: build(num_classes=CLASSES, **options, **(small or {})),
        lambda: build(**options),
        ((batch, 3, size, size),),
        ((1, 3, 224, 224),),
    )


def _timm(name: str, small: dict[str, Any] | None = None, **options: Any) -> Animal:
    def build(**more: Any) -> Any:
        return timm.create_model(name, **more)

    return _image(name, build, small=small, **options)


def _slowfast(name: str, depth: int) -> Animal:
    # The slow pathway reads every fourth frame; five halvings leave one of 32x32 pixels.
    return Animal(
        name,
        lambda: create_slowfast(
            model_depth=depth,
            model_num_class=CLASSES,
            head_pool_kernel_sizes=((2, 1, 1), (8, 1, 1)),
        ),
        lambda: create_slowfast(model_depth=depth),
        ((2, 3, 2, 32, 32), (2, 3, 8, 32, 32)),
        ((1, 3, 8, 224, 224), (1, 3, 32, 224, 224)),
    )


def _swin3d() -> Animal:
    build = torchvision.models.video.swin3d_t
    options = {"dropout": 0.1, "attention_dropout": 0.1}
    return Animal(
        "swin3d_t",
        lambda: build(num_classes=CLASSES, **options),
        lambda: build(**options),
        ((2, 3, 4, 48, 48),),
        ((1, 3, 16, 224, 224),),
    )


_models = torchvision.models

ZOO: dict[str, Animal] = {
    animal.name: animal
    for animal in (
        _image("resnet18", _models.resnet18),
        _image("resnet50", _models.resnet50),
        _image(
            "vit_b_16",
            _models.vit_b_16,
            size=32,
            small={"image_size": 32},
            dropout=0.1,
            attention_dropout=0.1,
        ),
        _image("swin_t", _models.swin_t, batch=2, dropout=0.1, attention_dropout=0.1),
        _swin3d(),
        _slowfast("slowfast_r50", 50),
        _slowfast("slowfast_r101", 101),
        _timm(
            "vit_tiny_patch16_224",
            small={"img_size": 48},
            drop_rate=0.1,
            proj_drop_rate=0.1,
            attn_drop_rate=0.1,
            drop_path_rate=0.1,
        ),
        _timm("convnext_tiny", drop_rate=0.1, drop_path_rate=0.1),
        _timm("resnetv2_50", drop_rate=0.1, drop_path_rate=0.1),
    )
}

# Without the deeper of two networks of one kind, whose plan is in a table of its own.
EACH_KIND = [name for name in ZOO if name != "slowfast_r101"]
