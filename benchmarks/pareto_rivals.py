"""Checkpointing as one would write it by hand, around branches, blocks or several blocks.

Always PyTorch's non-reentrant form, on a copy of the network that shares its parameters.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from .pareto_models import BlockForward, Subject

# Makes one module of one or several blocks.
Wrap = Callable[[Sequence[nn.Module]], nn.Module]


def run_checkpointed(function: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
    """Call a function and keep its inputs only."""
    return checkpoint(function, *inputs, use_reentrant=False, **options)


class Branches(nn.Module):
    """A block, each branch of which keeps only its input.

    Args:
        block: what is wrapped.
        forward: its forward with branches as functions.
    """

    def __init__(self, block: nn.Module, forward: BlockForward) -> None:
        super().__init__()
        self.block, self.body = block, forward

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """As the block's."""
        return self.body(run_checkpointed, self.block, *inputs, **options)


class Segment(nn.Module):
    """Blocks that run one after another and keep only the first one's inputs."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """With a checkpoint around all of them."""
        return run_checkpointed(self.run, *inputs, **options)

    def run(self, x: Any, *others: Any, **options: Any) -> Any:
        """Every block is given what the one before returned; the other arguments are the same."""
        for block in self.blocks:
            x = block(x, *others, **options)
        return x


def twin(model: nn.Module) -> nn.Module:
    """A copy with the very same parameters."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def depth(subject: Subject, model: nn.Module) -> int:
    """The number of blocks in the longest container."""
    return max(len(list(container.children())) for container in subject.containers(model))


def wrapped(subject: Subject, model: nn.Module, wrap: Wrap, size: int = 1) -> nn.Module:
    """A twin with every ``size`` blocks of a container made one module."""
    made = twin(model)
    for container in subject.containers(made):
        blocks = list(container.children())
        groups = [wrap(blocks[at : at + size]) for at in range(0, len(blocks), size)]
        container._modules.clear()
        container._modules.update({str(at): group for at, group in enumerate(groups)})
    return made


def per_branch(subject: Subject, model: nn.Module) -> nn.Module:
    """A checkpoint around every residual branch."""
    return wrapped(subject, model, lambda blocks: Branches(blocks[0], subject.branches))


def per_block(subject: Subject, model: nn.Module) -> nn.Module:
    """A checkpoint around every block."""
    return wrapped(subject, model, Segment)


def per_group(subject: Subject, model: nn.Module, size: int) -> nn.Module:
    """A checkpoint around every so many blocks."""
    return wrapped(subject, model, Segment, size)


def nested(subject: Subject, model: nn.Module, size: int) -> nn.Module:
    """A checkpoint around every so many blocks, and within it around each of them."""
    return wrapped(subject, model, lambda blocks: Segment([Segment([b]) for b in blocks]), size)


def first_half(subject: Subject, model: nn.Module) -> nn.Module:
    """A checkpoint around each of the first blocks, a half of all.

    What the last blocks keep is free again when the first ones run once more.
    """
    left = sum(len(list(c.children())) for c in subject.containers(model)) // 2

    def wrap(blocks: Sequence[nn.Module]) -> nn.Module:
        nonlocal left
        left -= 1
        return Segment(blocks) if left >= 0 else blocks[0]

    return wrapped(subject, model, wrap)
