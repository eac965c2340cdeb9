"""Where streams run: links, tuples, taps, concats, stages, pathways, shared weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import re2fx
from tests.compare import assert_reversible_equals_store
from tests.reference import Step

from .common import (
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
)

# Shape-only operations in front of a block; whatever they do, the stream goes through them.
LINKS: dict[str, Function] = {
    "roll": lambda x: torch.roll(x, 1, 1),
    "x.roll by keywords": lambda x: x.roll(shifts=(1, -3), dims=(1, 2)),
    "roll of all elements": lambda x: torch.roll(x, 5),
    "flip": lambda x: x.flip(1, 2),
    "torch.flip": lambda x: torch.flip(x, (1,)),
    "windows": lambda x: x.view(-1, 2, 2, 8).transpose(1, 2).reshape(-1, 4, 8),
    "rolled windows": lambda x: (
        torch.roll(x.view(-1, 2, 2, 8), (1, 1), (1, 2)).transpose(1, 2).reshape(-1, 4, 8)
    ),
    "unsqueeze, squeeze": lambda x: x.unsqueeze(1).squeeze(1),
    "clone": lambda x: x.clone(),
}


@pytest.mark.parametrize("link", LINKS)
def test_link(link: str) -> None:
    """The stem's output passes it once before the chain, which begins behind it."""

    def block(m: Any, x: Tensor, f: Function) -> Tensor:
        x = LINKS[link](x)
        return x + f(x)

    plan = assert_rewired(block, lambda m, f: Step(f, 1.0, LINKS[link]))
    assert all(plan.chains[0].links[1:]), plan.chains[0].links


@pytest.mark.parametrize("link", [name for name in LINKS if "roll" in name or "flip" in name])
def test_the_input_comes_back_through_a_link(link: str) -> None:
    def function(m: Any, x: Tensor) -> Any:
        x = m.stem(x)
        for f in (m.a, m.b, m.c):
            x = x + f(x)
            x = LINKS[link](x)
        return m.head(x + m.d(x))

    model = layers(function)
    rev = re2fx.transform(model)
    with re2fx.record() as calls:
        rev(X.clone())
    torch.testing.assert_close(calls[0].reconstruct(), model.stem(X), rtol=1e-11, atol=1e-11)


NO_LINKS: dict[str, Function] = {
    "crop and pad": lambda x: F.pad(x[:, 1:], (0, 0, 0, 1)),
    "pooling": lambda x: F.avg_pool1d(x, 3, 1, 1),
    "roll by a size": lambda x: torch.roll(x, x.shape[1] // 2, 1),
    "sort": lambda x: x.sort(1).values,
}


@pytest.mark.parametrize("link", NO_LINKS)
def test_no_link(link: str) -> None:
    assert_refused(
        lambda m, x, f: (lambda y: y + f(y))(NO_LINKS[link](x)), "chain of one", "next: "
    )


# Modules that return tuples.


class Layer(nn.Module):
    """A block that carries the size of its image along, and returns what else it computed."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, state: tuple[Tensor, int, int], extra: Any = None) -> Any:
        x, height, width = state
        mixed = self.mix(self.norm(x).view(-1, height, width, 8)).flatten(1, 2)
        return (x + mixed, height, width), {"extra": extra}


class Tuples(nn.Module):
    """The stream flows through nested tuples."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(8, 8), nn.Linear(8, 3)
        self.blocks = nn.ModuleList(Layer() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        state, extra = (self.stem(x), 2, 2), None
        for block in self.blocks:
            state, extra = block(state, extra)
        out: Tensor = self.head(state[0])
        return out


def test_streams_in_tuples() -> None:
    plan = assert_sound(Tuples().double().eval(), [3])
    assert not plan.refusals


def test_a_tuple_whose_other_element_is_used() -> None:
    def function(m: Any, x: Tensor) -> Any:
        x = m.stem(x)
        for f in (m.a, m.b):
            pair = (x, f(x))
            x = pair[0] + pair[1]
        return m.head(x), pair[1]

    assert_nothing_rewired(layers(function), "branch used outside", "returns a value from inside")


# Networks.


def pyramid(m: Any, x: Tensor) -> Any:
    first = m.stem(x)
    second = first + m.a(first)
    third = second + m.b(second)
    fourth = third + m.c(third)
    return m.head(second), m.head(third).sin(), m.head(fourth)


def shared_weights(m: Any, x: Tensor) -> Any:
    x = m.stem(x)
    for _ in range(4):
        x = x + m.a(m.norm(x))
    return m.head(x)


def positions(m: Any, x: Tensor) -> Any:
    x = m.stem(x) + m.position
    for f in (m.a, m.b):
        x = x + f(x)
    return m.head(x)


def unet(m: Any, x: Tensor) -> Any:
    down = m.stem(x)
    for f in (m.a, m.b):
        down = down + f(down)
    up = m.merge(torch.cat([m.c(down), down], -1))
    for f in (m.d, m.e):
        up = up + f(up)
    return m.head(up)


def stages(m: Any, x: Tensor) -> Any:
    x = m.stem(x)
    for f in (m.a, m.b):
        x = x + f(x)
    x = F.avg_pool1d(x, 2)
    for f in (m.low, m.high):
        x = x + f(x)
    return x.mean(1)


def lateral(m: Any, x: Tensor) -> Any:
    """The fast pathway feeds the slow one, within its branches."""
    slow, fast = m.stem(x), m.d(x)
    for f, g in ((m.a, m.b), (m.c, m.e)):
        fast = fast + g(fast)
        slow = slow + f(torch.cat([slow, fast], -1)[..., 4:12])
    return m.head(slow) + m.head(fast)


NETWORKS: list[tuple[Callable[[Any, Tensor], Any], list[int], dict[str, int]]] = [
    (pyramid, [3], {}),
    (shared_weights, [4], {}),
    (positions, [2], {}),
    (unet, [2, 2], {}),
    (stages, [2, 2], {}),
    (lateral, [2, 2], {"projection": 1}),
]


@pytest.mark.parametrize(
    ("function", "chains", "refused"), NETWORKS, ids=lambda v: getattr(v, "__name__", "")
)
def test_network(
    function: Callable[[Any, Tensor], Any], chains: list[int], refused: dict[str, int]
) -> None:
    assert rules(assert_sound(layers(function), chains)) == refused


def test_dense_connections_are_not_found() -> None:
    def function(m: Any, x: Tensor) -> Any:
        x = m.stem(x)
        for f in (m.a, m.b):
            x = m.merge(torch.cat([x, f(x)], -1))
        return m.head(x)

    assert_not_found(layers(function))


def test_pathways_that_are_added_at_their_end() -> None:
    """The last sum encloses what feeds it; the rest of the other pathway is rewired."""

    def function(m: Any, x: Tensor) -> Any:
        slow, fast = m.stem(x), m.d(x)
        for f in (m.a, m.b, m.low):
            if f is m.low:
                fast = fast + m.e(fast)
                slow = slow + m.c(slow + fast)
            else:
                fast = fast + f(fast)
                slow = slow + f(m.norm(slow))
        return m.head(slow + fast)

    plan = assert_sound(layers(function), [4, 2])
    nested = [r for r in plan.refusals if r.rule == "nested"]
    assert len(nested) == 1, str(plan)
    assert "it lies inside the branch of" in nested[0].sentence


def test_a_residual_left_between_chains() -> None:
    """One residual before what another chain encloses is a chain of one, and is told why."""

    def function(m: Any, x: Tensor) -> Any:
        slow, fast = m.stem(x), m.d(x)
        for f, g in ((m.a, m.b), (m.c, m.e)):
            fast = fast + g(fast)
            slow = slow + f(slow + fast)
        return m.head(slow + fast)

    model = layers(function)
    plan = assert_sound(model, [3])
    (alone,) = [r for r in plan.refusals if r.rule == "chain of one"]
    assert "its stream goes on inside the branch of add_6" in alone.sentence


def test_reversible_couplings_by_hand_are_left_alone() -> None:
    """Halves that update each other, as in a RevNet."""

    def function(m: Any, x: Tensor) -> Any:
        left, right = m.stem(x).chunk(2, -1)
        for _ in range(2):
            left = left + m.low(right)
            right = right + m.high(left)
        return m.head(torch.cat([left, right], -1))

    plan = plan_of(layers(function))
    assert plan.chains == (), str(plan)


# Images.


class Images(nn.Module):
    """A post-activation stage, written with in-place operations throughout."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.convs = nn.ModuleList(nn.Conv2d(6, 6, 3, padding=1, bias=False) for _ in range(6))
        self.norms = nn.ModuleList(nn.BatchNorm2d(6) for _ in range(6))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for i in range(0, 6, 2):
            identity = x
            out = self.relu(self.norms[i](self.convs[i](x)))
            out = self.norms[i + 1](self.convs[i + 1](out))
            out += identity
            x = F.relu_(out)
        return x.mean((2, 3))


def test_in_place_post_activation() -> None:
    torch.manual_seed(0)
    model = Images().double()
    plan = plan_of(model)
    assert [len(chain) for chain in plan.chains] == [3]
    assert {r.kind for r in plan.chains[0].residuals} == {"post-activation"}
    images = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    assert_reversible_equals_store(re2fx.transform(model).train(), images)


def test_a_mask_computed_from_sizes_is_no_stream() -> None:
    """Added in every branch, it would be an ancestor of what it is added to."""

    def function(m: Any, x: Tensor) -> Any:
        mask = torch.arange(x.shape[1], dtype=x.dtype, device=x.device)[:, None].expand(-1, 8)
        x = m.stem(x)
        for f in (m.a, m.b, m.c):
            x = x + torch.tanh(f(x) + mask)
        return m.head(x)

    plan = assert_sound(layers(function), [3])
    assert plan.found == 3, str(plan)


def test_a_mask_computed_from_the_input_may_be_a_stream() -> None:
    def function(m: Any, x: Tensor) -> Any:
        mask = m.e(x)
        x = m.stem(mask)
        for f in (m.a, m.b):
            x = x + torch.tanh(f(x) + mask)
        return m.head(x)

    plan = assert_sound(layers(function), [2])
    assert plan.found == 4, str(plan)


def test_sizes_read_off_a_tap() -> None:
    """A table of the size of a state in the middle, read by a branch and behind the chain."""

    def function(m: Any, x: Tensor) -> Any:
        x = m.stem(x)
        x = x + torch.tanh(m.a(x))
        table = F.pad(x.new_ones([x.shape[1] - 1, 8]), (0, 0, 1, 0))
        x = x + torch.tanh(m.b(x) * table)
        return m.head(m.norm(x) * table)

    assert_sound(layers(function), [2])
