"""Rewired networks with frames of chosen kinds, next to the same networks stored."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import re2fx
from benchmarks.torchvision_shim import ensure_torchvision
from re2fx.codegen import compile_graph
from re2fx.frames import Frames, blocks, checkpoints
from re2fx.framing import Framing
from re2fx.program import Program, RunBlock

from .situations.harness import Pair, double, example

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    ensure_torchvision()
    import torchvision as torchvision
    from transformers import GPT2Config, GPT2LMHeadModel

ENOUGH = 1 << 60  # bytes


def largest(rev: re2fx.RewiredModule, *inputs: Any) -> Program:
    """What a network runs if everything that can be a frame is one; it is planned anew."""
    rev.memory = ENOUGH
    rev.plan_memory(*inputs)
    held = rev._held(inputs, {})
    assert isinstance(held, tuple)
    variant, mode, model = held[0], rev.training, rev._live._model
    rewired = variant.settled(mode, model, rev._executors)
    framing = Framing(variant.framed[mode].values, model)
    given = rewired.graph, model, rewired.wirings
    return rev._executors.outline(*given, compile_graph, framing)


def force(rev: re2fx.RewiredModule, frames: Frames, *inputs: Any) -> None:
    """Let the next calls of a network, which was planned for some inputs, run with some frames."""
    held = rev._held(inputs, {})
    assert isinstance(held, tuple)
    variant, mode = held[0], rev.training
    variant.framed[mode] = replace(variant.framed[mode], frames=frames)
    variant.programs.pop(mode, None)


@dataclass
class Mixed:
    """A network whose frames are chosen, and what there is to choose from.

    Attributes:
        pair: the network and the same one stored.
        inputs: that it was planned for.
        blocks: how many each chain has.
        checkpoints: the steps that can be.
        states: the steps of blocks, in front of which the state can be kept.
    """

    pair: Pair
    inputs: tuple[Any, ...]
    blocks: list[int]
    checkpoints: list[int]
    states: list[int]

    @property
    def rev(self) -> re2fx.RewiredModule:
        """The network whose frames are chosen."""
        assert isinstance(self.pair.reversible, re2fx.RewiredModule)
        return self.pair.reversible

    @classmethod
    def of(cls, model: nn.Module, *inputs: Any, **options: Any) -> Mixed:
        """A model, rewired by some options."""
        rev = re2fx.transform(model, inputs, **options)
        assert isinstance(rev, re2fx.RewiredModule)
        store = copy.copy(rev)
        store.memory = "store"
        program = largest(rev, *inputs)
        states = [i for i, step in enumerate(program.steps) if isinstance(step, RunBlock)]
        found = blocks(program), checkpoints(program), states
        return cls(Pair(model, rev, store), inputs, *found)

    def frames(
        self,
        stored: float = 0,
        checkpointed: bool | Sequence[int] = True,
        slices: int = 1,
        states: slice | None = None,
        apart: float = 0,
    ) -> Frames:
        """Frames of some kinds.

        Args:
            stored: a share of the blocks of each chain, of which any is at least one block.
            checkpointed: whether what can be is a checkpoint, or which of them.
            slices: at most so many.
            states: of which blocks the state in front is kept.
            apart: part of what the largest frame makes, from which on they come part by part.
        """
        own = self.checkpoints if checkpointed is True else checkpointed or ()
        some = tuple(max(round(n * stored), int(stored > 0)) for n in self.blocks)
        kept = self.states[states] if states is not None else []
        return Frames(some, frozenset((*own, *kept)), slices, apart)

    def choose(self, **kinds: Any) -> Pair:
        """Both networks, the first with frames of some kinds."""
        force(self.rev, self.frames(**kinds), *self.inputs)
        return self.pair


class Attention(nn.Module):
    """Of several heads, written out."""

    def __init__(self, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, 2, c // 2).permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q @ k.transpose(-2, -1) * (c // 2) ** -0.5).softmax(-1)
        out: Tensor = self.proj((self.drop(weights) @ v).transpose(1, 2).reshape(b, t, c))
        return out


class Whole(nn.Module):
    """Torch's own attention."""

    def __init__(self, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(width, 2, dropout, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out, _ = self.inner(x, x, x, need_weights=False)
        return out


class Layer(nn.Module):
    """Of a pre-norm transformer."""

    def __init__(
        self, width: int, attention: Callable[..., nn.Module] = Attention, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = attention(width, dropout)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(dropout), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class Transformer(nn.Module):
    """A stem that makes much, layers, and a head that does."""

    def __init__(
        self,
        attention: Callable[..., nn.Module] = Attention,
        dropout: float = 0.0,
        depth: int = 2,
        width: int = 8,
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Linear(4, 8 * width), nn.GELU(), nn.Dropout(dropout), nn.Linear(8 * width, width)
        )
        self.layers = nn.Sequential(*[Layer(width, attention, dropout) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 8 * width)
        self.drop, self.out = nn.Dropout(dropout), nn.Linear(8 * width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.layers(self.stem(x)))
        out: Tensor = self.out(self.drop(self.head(x).sigmoid())).mean(1)
        return out


class Basic(nn.Module):
    """A residual of a ResNet, with a projection where the width changes."""

    def __init__(self, before: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.down: nn.Module = nn.Identity()
        if before != width:
            self.down = nn.Sequential(
                nn.Conv2d(before, width, 1, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        activated: Tensor = self.relu(out + self.down(x))
        return activated


class ConvStages(nn.Module):
    """A ResNet of two stages."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width),
            nn.ReLU(inplace=True), nn.MaxPool2d(2),
        )  # fmt: skip
        self.first = nn.Sequential(*[Basic(width, width) for _ in range(3)])
        self.second = nn.Sequential(
            Basic(width, 2 * width), *[Basic(2 * width, 2 * width) for _ in range(2)]
        )
        self.head = nn.Linear(2 * width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(self.stem(x)))
        out: Tensor = self.head(x.mean((2, 3)))
        return out


class Last(nn.Module):
    """Gives one value of what a model returns."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.model(x).logits
        return out


def gpt2() -> nn.Module:
    """A tiny one."""
    config = GPT2Config(
        n_layer=3, n_embd=16, n_head=2, vocab_size=11, n_positions=8, use_cache=False,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def swin3d() -> nn.Module:
    """A tiny one, whose windows are shifted in every second layer."""
    return torchvision.models.video.SwinTransformer3d(
        patch_size=[2, 4, 4], embed_dim=8, depths=[2, 2], num_heads=[2, 2],
        window_size=[2, 2, 2], num_classes=3, dropout=0.1, attention_dropout=0.1,
        stochastic_depth_prob=0.1,
    )  # fmt: skip


def tokens(count: int) -> Tensor:
    """Numbers of words."""
    return torch.arange(2 * count).view(2, count) * 7 % 11


Given = tuple[nn.Module, tuple[Any, ...]]
MODELS: dict[str, Callable[[], Given]] = {
    "written attention": lambda: (Transformer(), (example(2, 7, 4),)),
    "torch's attention": lambda: (Transformer(Whole), (example(2, 7, 4),)),
    "dropout": lambda: (Transformer(dropout=0.3), (example(3, 7, 4),)),
    "dropout, torch's": lambda: (Transformer(Whole, 0.3), (example(3, 7, 4),)),
    "convolutions": lambda: (ConvStages(), (example(3, 3, 8, 8),)),
    "gpt2": lambda: (gpt2(), (tokens(7),)),
    "swin3d": lambda: (swin3d(), (example(1, 3, 4, 24, 24),)),
}


def mixed(name: str, **options: Any) -> Mixed:
    """One of the models in fp64, rewired."""
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    return Mixed.of(double(model), *inputs, **options)
