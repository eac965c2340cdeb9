"""What stands on the skip or between blocks: scales, copies, casts, norms, slices, projections."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.reference import Step

from .common import (
    Block,
    Function,
    assert_nothing_rewired,
    assert_refused,
    assert_rewired,
    assert_sound,
    layers,
    name,
)


def plain(m: Any, f: Function) -> Step:
    """``x + f(x)``."""
    return Step(f)


def normed(m: Any, f: Function) -> Step:
    """``x + f(norm(x))``."""
    return Step(lambda p: f(m.norm(p)))


# Rewired.


def pre_norm(m: Any, x: Tensor, f: Function) -> Tensor:
    return x + f(m.norm(x))


def identity_cast(m: Any, x: Tensor, f: Function) -> Tensor:
    return x.to(x.dtype) + f(x)


def cast_to_itself(m: Any, x: Tensor, f: Function) -> Tensor:
    x = x.to(x)
    return x + f(x.type_as(x))


def device_of_itself(m: Any, x: Tensor, f: Function) -> Tensor:
    x = x.to(x.device)
    return x + f(x)


def branch_cast(m: Any, x: Tensor, f: Function) -> Tensor:
    return x + f(x.float().double()).type_as(x)


def contiguous_behind_the_sum(m: Any, x: Tensor, f: Function) -> Tensor:
    return (x + f(x)).contiguous()


def cloned_first(m: Any, x: Tensor, f: Function) -> Tensor:
    residual = x.clone()
    return residual + f(m.relu(m.norm(x)))


SAME = [
    (pre_norm, normed),
    (identity_cast, plain),
    (cast_to_itself, plain),
    (device_of_itself, plain),
    (branch_cast, lambda m, f: Step(lambda p: f(p.float().double()))),
    (contiguous_behind_the_sum, plain),
    (cloned_first, lambda m, f: Step(lambda p: f(torch.relu(m.norm(p))))),
]


@pytest.mark.parametrize(("block", "step"), SAME, ids=name)
def test_the_skip_is_an_identity(block: Block, step: Callable[[Any, Function], Step]) -> None:
    assert_rewired(block, step)


SCALED: list[tuple[str, Block, Callable[[Any, Function], Step]]] = [
    (
        "layer scale",
        lambda m, x, f: x + m.gamma * f(m.norm(x)),
        lambda m, f: Step(lambda p: m.gamma * f(m.norm(p))),
    ),
    ("rezero", lambda m, x, f: x + m.rate * f(x), lambda m, f: Step(lambda p: m.rate * f(p))),
    (
        "highway with a full skip",
        lambda m, x, f: x + torch.sigmoid(m.d(x)) * f(x),
        lambda m, f: Step(lambda p: torch.sigmoid(m.d(p)) * f(p)),
    ),
    (
        "scaled sum",
        lambda m, x, f: (x + f(x)) * 0.7,
        lambda m, f: Step(lambda p: 0.7 * f(p), 0.7),
    ),
]


@pytest.mark.parametrize(
    ("block", "step"), [case[1:] for case in SCALED], ids=[c[0] for c in SCALED]
)
def test_scales(block: Block, step: Callable[[Any, Function], Step]) -> None:
    assert_rewired(block, step)


def test_post_activation() -> None:
    assert_rewired(
        lambda m, x, f: F.gelu(x + f(x)),
        lambda m, f: Step(lambda p: F.gelu(f(p))),
        moved=True,
    )


# Refused.

REFUSED: list[tuple[str, Block, str, str]] = [
    ("post-norm", lambda m, x, f: m.norm(x + f(x)), "post-norm", "the norm norm"),
    (
        "post-norm as a function",
        lambda m, x, f: F.layer_norm(x + f(x), (8,)),
        "post-norm",
        "the norm layer_norm, which cannot be inverted",
    ),
    ("DeepNorm", lambda m, x, f: m.norm(1.5 * x + f(x)), "post-norm", "the norm norm"),
    ("learned skip", lambda m, x, f: m.gamma * x + f(x), "scaled skip", "(mul)"),
    (
        "highway",
        lambda m, x, f: (1 - torch.sigmoid(m.d(x))) * x + torch.sigmoid(m.d(x)) * f(x),
        "scaled skip",
        "its inverse would divide by it",
    ),
    (
        "learned scale behind the sum",
        lambda m, x, f: m.gamma * (x + f(x)),
        "scaled skip",
        "the stream is multiplied by a value that is not a constant (mul)",
    ),
    ("zero", lambda m, x, f: 0 * x + f(x), "zero scale", "multiplied by zero"),
    ("projection", lambda m, x, f: m.d(x) + f(x), "projection", "it passes through d"),
    ("cut gradient", lambda m, x, f: x.detach() + f(x), "projection", "passes through detach"),
    (
        "clamp",
        lambda m, x, f: (x + f(x)).clamp(-1, 1),
        "chain of one",
        "no other residual continues its stream (next: clamp)",
    ),
    ("dropout", lambda m, x, f: m.drop(x + f(x)), "chain of one", "(next: drop)"),
    ("cast on the skip", lambda m, x, f: x.double() + f(x), "type change", "through double"),
    (
        "cast between blocks",
        lambda m, x, f: (x + f(x)).to(torch.float64),
        "type change",
        "the stream passes through to, which may change its type",
    ),
    (
        "copied cast",
        lambda m, x, f: x.to(x.dtype, copy=True) + f(x),
        "type change",
        "the skip passes through to",
    ),
    (
        "like another value",
        lambda m, x, f: x.type_as(m.gamma) + f(x),
        "type change",
        "the skip passes through type_as",
    ),
    (
        "slice without a class token",
        lambda m, x, f: torch.cat([x[:, :1], x[:, 1:] + f(x[:, 1:])], 1),
        "sliced skip",
        "the skip is a part of stem only: it passes through getitem_1",
    ),
    (
        "half of the channels",
        lambda m, x, f: torch.cat([x.narrow(2, 0, 4), x.narrow(2, 4, 4) + f(x)[..., 4:]], -1),
        "sliced skip",
        "it passes through narrow_1",
    ),
    (
        "pad and crop",
        lambda m, x, f: (F.pad(x, (0, 0, 1, 1)) + f(F.pad(x, (0, 0, 1, 1))))[:, 1:-1],
        "projection",
        "it passes through pad",
    ),
    (
        "another view of the stream",
        lambda m, x, f: (x.transpose(1, 2) + f(x).transpose(1, 2)).transpose(1, 2),
        "projection",
        "it passes through transpose",
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("block", "rule", "words"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED]
)
def test_refused(block: Block, rule: str, words: str) -> None:
    assert_refused(block, rule, words)


def test_a_stage_behind_a_cast_is_rewired() -> None:
    """Only the cast itself parts the chains."""

    def function(m: Any, x: Tensor) -> Any:
        x = m.stem(x)
        x = x + m.a(x)
        x = x + m.b(x)
        x = x.double()
        x = x + m.c(x)
        x = x + m.d(x)
        return m.head(x)

    assert_sound(layers(function), [2, 2])


# Writes.


def test_a_copy_that_guards_against_a_write() -> None:
    """The stream itself is overwritten by the branch; only the copy keeps it."""

    def block(m: Any, x: Tensor, f: Function) -> Tensor:
        residual = x.clone()
        return residual + f(m.relu(x))

    assert_refused(
        block, "in-place write", "writes in place into stem, which the branch does not own"
    )


def test_a_cast_to_its_own_type_is_the_same_memory() -> None:
    """Adding to it in place adds to the stream, which is read again."""

    def function(m: Any, x: Tensor) -> Any:
        x = m.stem(x)
        y = x.to(x.dtype)
        y += m.a(x)
        x = x + m.b(x)  # sees the write
        return m.head(x + m.c(x))

    model = layers(function)
    assert_nothing_rewired(model, "in-place write", "iadd")


def test_scratch_memory_of_the_branch_may_be_written() -> None:
    """Made from a shape or from numbers, written, and read by the branch only."""

    def block(m: Any, x: Tensor, f: Function) -> Tensor:
        h = f(m.norm(x))
        out = torch.zeros_like(h)
        out.add_(h)
        other = torch.zeros(4, 8, dtype=torch.float64)
        other.add_(m.gamma)
        return x + out * other

    assert_rewired(block, lambda m, f: Step(lambda p: f(m.norm(p)) * m.gamma))


def test_scratch_memory_written_through_a_view() -> None:
    """The branch reads the scratch, and only the write knows what is in it."""

    def block(m: Any, x: Tensor, f: Function) -> Tensor:
        h = f(m.norm(x))
        out = torch.zeros_like(h)
        out[:, 1:].add_(h[:, :-1])
        return x + out

    assert_refused(block, "branch used outside", "reads a value from inside the branch")


def test_memory_written_by_every_block() -> None:
    """Scratch of the whole network is no block's own."""

    def function(m: Any, x: Tensor) -> Any:
        x = m.stem(x)
        scratch = torch.zeros_like(x)
        for f in (m.a, m.b, m.c):
            scratch.add_(f(x))
            x = x + m.d(scratch)
        return m.head(x)

    assert_nothing_rewired(layers(function), "branch used outside", "add_")
