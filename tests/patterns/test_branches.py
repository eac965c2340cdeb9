"""What stands in a branch: parallel and nested sums, side inputs, routing, mixers, noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import re2fx
from tests.compare import assert_reversible_equals_store
from tests.reference import Step

from .common import (
    Block,
    Function,
    X,
    assert_not_found,
    assert_nothing_rewired,
    assert_refused,
    assert_rewired,
    assert_sound,
    layers,
    plan_of,
    rules,
    stacked,
)

Branch = Callable[[Any, Function, Tensor], Tensor]


# Parallel branches.

PARALLEL: dict[str, Block] = {
    "x + a + m": lambda m, x, f: x + f(m.norm(x)) + m.d(m.norm(x)),
    "(a + m) + x": lambda m, x, f: (f(m.norm(x)) + m.d(m.norm(x))) + x,
    "a + (x + m)": lambda m, x, f: f(m.norm(x)) + (x + m.d(m.norm(x))),
    "x - (a' - m)": lambda m, x, f: x - (-f(m.norm(x)) - m.d(m.norm(x))),
}


@pytest.mark.parametrize("spelling", PARALLEL)
def test_parallel_branches(spelling: str) -> None:
    assert_rewired(PARALLEL[spelling], lambda m, f: Step(lambda p: f(m.norm(p)) + m.d(m.norm(p))))


def test_a_sum_of_transforms_without_a_skip() -> None:
    """The same two branches, and nothing to add them to."""
    assert_refused(lambda m, x, f: f(m.norm(x)) + m.d(m.norm(x)), "projection", "not an identity")


CONSTANTS: dict[str, Block] = {
    "x + c + f": lambda m, x, f: x + m.position + f(x),
    "x + f + c": lambda m, x, f: x + f(x) + m.position,
    "x + f - (-2 c)": lambda m, x, f: x + f(x) - (m.position * -2) / 2,
    "x + (c + f)": lambda m, x, f: x + (m.position + f(x)),
}


@pytest.mark.parametrize("spelling", CONSTANTS)
def test_a_constant_goes_along_with_the_branch(spelling: str) -> None:
    """As a position that every block adds."""
    assert_rewired(CONSTANTS[spelling], lambda m, f: Step(lambda p: f(p) + m.position))


def test_a_stranger_does_not() -> None:
    """An activation from elsewhere is neither a branch nor a constant."""

    def function(m: Any, x: Tensor) -> Any:
        others = m.e(x), m.d(x).sin()
        x = m.stem(x)
        for f, other in zip((m.a, m.b), others, strict=True):
            x = x + f(x) + other
        return m.head(x)

    assert_nothing_rewired(layers(function), "chain of one", "no other residual continues")


def test_a_position_in_the_branch() -> None:
    assert_rewired(
        lambda m, x, f: x + f(x + m.position), lambda m, f: Step(lambda p: f(p + m.position))
    )


# Sums inside a branch.


def res2net(m: Any, f: Function, h: Tensor) -> Tensor:
    left, right = f(h).chunk(2, -1)
    left = m.low(left)
    return torch.cat([left, m.high(right + left)], -1)


def cross_stage_partial(m: Any, f: Function, h: Tensor) -> Tensor:
    left, right = m.d(h).chunk(2, -1)
    for inner in (m.low, m.high):
        right = right + inner(right)
    return f(torch.cat([left, right], -1))


def dense_in_residual(m: Any, f: Function, h: Tensor) -> Tensor:
    y = h
    for inner in (m.d, f, m.e):
        y = y + 0.2 * inner(y)
    return 0.2 * y


def modulated(m: Any, f: Function, h: Tensor) -> Tensor:
    shift, scale, gate = m.modulation(h.mean(1, keepdim=True)).chunk(3, -1)
    return gate * f(m.norm(h) * (1 + scale) + shift)


# Mixers and routing.


def squeeze_excite(m: Any, f: Function, h: Tensor) -> Tensor:
    h = f(h)
    return h * torch.sigmoid(m.d(h.mean(1, keepdim=True)))


def repeated_mean(m: Any, f: Function, h: Tensor) -> Tensor:
    return f(h.mean(1, keepdim=True))


def window(m: Any, f: Function, h: Tensor) -> Tensor:
    batch = h.shape[0]
    h = torch.roll(h.view(batch, 2, 2, 8), (1, 1), (1, 2))
    h = f(h.permute(0, 2, 1, 3).reshape(-1, 4, 8)).view(batch, 2, 2, 8).permute(0, 2, 1, 3)
    return torch.roll(h, (-1, -1), (1, 2)).reshape(batch, 4, 8)


def padded_and_cropped(m: Any, f: Function, h: Tensor) -> Tensor:
    return f(F.pad(h, (0, 0, 1, 2)))[:, 1:-2]


def running_sum(m: Any, f: Function, h: Tensor) -> Tensor:
    return m.d(torch.cumsum(f(m.norm(h)), 1))


def causal_convolution(m: Any, f: Function, h: Tensor) -> Tensor:
    return m.conv(F.pad(f(h), (2, 0)))


def token_shift(m: Any, f: Function, h: Tensor) -> Tensor:
    h = m.norm(h)
    before = F.pad(h, (0, 0, 1, -1))
    return f(h * m.gamma + before * (1 - m.gamma)) * torch.sigmoid(m.d(torch.lerp(h, before, 0.5)))


def unrolled_recurrence(m: Any, f: Function, h: Tensor) -> Tensor:
    state, states = torch.zeros_like(h[:, 0]), []
    for step in range(4):
        state = state * torch.sigmoid(m.gamma) + f(h[:, step])
        states.append(state)
    return m.d(torch.stack(states, 1))


def where(m: Any, f: Function, h: Tensor) -> Tensor:
    return torch.where(h > 0, f(h), m.d(h))


def best_two(m: Any, f: Function, h: Tensor) -> Tensor:
    weights, chosen = m.d(h).softmax(-1).topk(2, -1)
    return torch.zeros_like(h).scatter(-1, chosen, weights) * f(h)


def sorted_and_put_back(m: Any, f: Function, h: Tensor) -> Tensor:
    flat = h.reshape(-1, 8)
    order = flat[:, 0].argsort()
    out = torch.zeros_like(flat)
    out.index_add_(0, order, f(flat[order]))
    return out.view(h.shape)


def cut_off(m: Any, f: Function, h: Tensor) -> Tensor:
    return f(h.detach())


BRANCHES: list[tuple[Branch, dict[str, int]]] = [
    (res2net, {}),
    (cross_stage_partial, {"nested": 6}),
    (dense_in_residual, {"nested": 9}),
    (modulated, {}),
    (squeeze_excite, {}),
    (repeated_mean, {}),
    (window, {}),
    (padded_and_cropped, {}),
    (running_sum, {}),
    (causal_convolution, {}),
    (token_shift, {}),
    (unrolled_recurrence, {}),
    (where, {}),
    (best_two, {}),
    (sorted_and_put_back, {}),
    (cut_off, {}),
]


@pytest.mark.parametrize(("branch", "refused"), BRANCHES, ids=lambda v: getattr(v, "__name__", ""))
def test_branch(branch: Branch, refused: dict[str, int]) -> None:
    assert_rewired(
        lambda m, x, f: x + branch(m, f, x),
        lambda m, f: Step(lambda p: branch(m, f, p)),
        refused=refused,
    )


def test_sums_inside_a_branch_are_misses() -> None:
    """What looks like a projection in a branch is said to lie there."""
    plan = plan_of(stacked(lambda m, x, f: x + modulated(m, f, x)))
    assert {miss.rule for miss in plan.misses} == {"nested", "one operand"}
    (sentence,) = {m.sentence.split(" (")[0] for m in plan.misses[-1:] if m.rule == "nested"}
    assert sentence.startswith("it lies inside the branch of add")


def test_the_same_mixture_on_the_stream() -> None:
    """Outside a branch the token shift would multiply the stream by a learned value."""
    assert_refused(lambda m, x, f: x * m.gamma + f(F.pad(x, (0, 0, 1, -1))), "scaled skip", "(mul)")


def test_a_residual_in_a_branch_alone() -> None:
    """Nothing encloses it: the chain inside the branch of a projection is rewired."""

    def function(m: Any, x: Tensor) -> Any:
        x = m.stem(x)
        y = m.norm(x)
        for f in (m.a, m.b):
            y = y + f(y)
        return m.head(m.d(x) + y)

    plan = assert_sound(layers(function), [2])
    assert rules(plan) == {"projection": 1}


# Side inputs.


def conditioned(m: Any, x: Tensor) -> Any:
    condition = torch.tanh(m.d(x.mean(1, keepdim=True)))
    x = m.stem(x)
    for f in (m.a, m.b, m.c):
        shift, scale, gate = m.modulation(condition).chunk(3, -1)
        x = x + gate * f(m.norm(x) * (1 + scale) + shift)
    return m.head(x)


def rotary(m: Any, x: Tensor) -> Any:
    angles = torch.arange(4, dtype=x.dtype)[:, None] * torch.linspace(0.1, 1, 8, dtype=x.dtype)
    cos, sin = angles.cos(), angles.sin()
    x = m.stem(x)
    for f in (m.a, m.b, m.c):
        q = f(x)
        x = x + m.d(q * cos + torch.cat([-q[..., 4:], q[..., :4]], -1) * sin)
    return m.head(x)


def relative_positions(m: Any, x: Tensor) -> Any:
    bias = m.position[0] @ m.position[0].transpose(0, 1)  # trained, and read by every block
    x = m.stem(x)
    for f in (m.a, m.b, m.c):
        scores = f(x) @ x.transpose(1, 2) + bias
        x = x + scores.softmax(-1) @ m.d(x)
    return m.head(x)


def masked(m: Any, x: Tensor) -> Any:
    mask = (x.sum(-1) > 0)[:, None, :]
    x = m.stem(x)
    for f in (m.a, m.b, m.c):
        scores = (f(x) @ x.transpose(1, 2)).masked_fill(mask, -1e9)
        x = x + scores.softmax(-1) @ m.d(x)
    return m.head(x)


@pytest.mark.parametrize(
    "function", [conditioned, rotary, relative_positions, masked], ids=lambda f: f.__name__
)
def test_side_inputs(function: Callable[[Any, Tensor], Any]) -> None:
    plan = assert_sound(layers(function), [3])
    assert not plan.refusals, str(plan)


def test_conditioning_that_the_block_before_makes() -> None:
    """No side input: it leaves one branch and enters the next."""

    def function(m: Any, x: Tensor) -> Any:
        x, carried = m.stem(x), 0
        for f in (m.a, m.b, m.c):
            h = f(x)
            x, carried = x + h * m.gamma + carried, h
        return m.head(x)

    assert_nothing_rewired(layers(function), "branch used outside", "reads a value from inside")


def test_encoder_and_decoder() -> None:
    """Two chains; the memory of the first is a side input with gradients of the second."""

    def function(m: Any, x: Tensor) -> Any:
        memory, y = m.stem(x), m.d(x)
        for f in (m.a, m.b):
            memory = memory + f(memory)
        for f in (m.c, m.e):
            y = y + f((y @ memory.transpose(1, 2)).softmax(-1) @ memory)
        return m.head(y)

    plan = assert_sound(layers(function), [2, 2])
    assert plan.chains[0].output in plan.chains[1].residuals[0].side_inputs


# Noise.


def by_row(x: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], 1, 1)).bernoulli_(0.8) / 0.8


def by_batch(x: Tensor) -> Tensor:
    return (torch.rand_like(x[:1, :1, :1]) < 0.8).double() / 0.8


@pytest.mark.parametrize("noise", [by_row, by_batch], ids=lambda f: f.__name__)
def test_stochastic_depth(noise: Callable[[Tensor], Tensor]) -> None:
    """The backward draws the same numbers, and the generator ends where it would have."""

    def function(m: Any, x: Tensor) -> Any:
        x = m.stem(x)
        for f in (m.a, m.b, m.c):
            x = x + m.drop(f(x)) * noise(x)
        return m.head(x)

    model = layers(function)
    assert [len(chain) for chain in plan_of(model).chains] == [3]
    rev = re2fx.transform(model).train()
    assert_reversible_equals_store(rev, X)


def test_noise_on_the_stream() -> None:
    """Dropping the stream itself is no residual."""
    assert_refused(lambda m, x, f: (x + f(x)) * by_row(x), "scaled skip", "is multiplied by")


# Broadcasts that are no residuals.


def test_a_gate_and_a_position_are_not_found() -> None:
    def function(m: Any, x: Tensor) -> Any:
        x = m.stem(x) + m.position
        x = x * torch.sigmoid(m.a(x.mean(1, keepdim=True)))
        return m.head(x)

    assert_not_found(layers(function))
