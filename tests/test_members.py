"""What somebody attaches to a model after it was rewired must not be ignored."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import re2fx
from re2fx import RewiredModule
from re2fx.members import Members

from .compare import assert_reversible_equals_store

ROUTES = ("symbolic", "dynamo", "export")


@pytest.fixture(autouse=True)
def fresh() -> Any:
    yield
    torch.compiler.reset()


class Act(nn.Module):
    """Without members, so that no graph calls it."""

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x)


class Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * torch.tanh(x)


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(6, 8), Act(), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(self.act(self.up(x)))
        return out


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(6), Inner()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.inner(self.norm(x))
        return out


class Adapter(nn.Module):
    """Low-rank, beside a layer that is frozen."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Linear(layer.in_features, 2, bias=False)
        self.up = nn.Linear(2, layer.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x) + self.up(self.down(x))
        return out


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), *(Block() for _ in range(3)), nn.Linear(6, 2)).double()


def example() -> Tensor:
    return torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def rewired(model: nn.Module, route: str) -> RewiredModule:
    rev = re2fx.transform(model, example(), capture=route)
    assert isinstance(rev, RewiredModule)
    assert [len(chain) for chain in rev.plan.chains] == [3]
    return rev


def adapt(model: Any) -> None:
    for block in model[1:4]:
        block.inner.up = Adapter(block.inner.up).double()


def swap_activation(model: Any) -> None:
    model[2].inner.act = Twice()


def swap_container(model: Any) -> None:
    model[1].inner = nn.Sequential(nn.Linear(6, 6), nn.Tanh()).double()


def parametrize(model: Any) -> None:
    parametrizations.orthogonal(model[3].inner.down)


def give_forward(model: Any) -> None:
    inner = model[2].inner
    inner.forward = lambda x: torch.sin(type(inner).forward(inner, x))


CHANGES: tuple[Callable[[Any], None], ...] = (
    adapt, swap_activation, swap_container, parametrize, give_forward
)  # fmt: skip


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("change", CHANGES)
def test_replaced_after_the_transform(change: Callable[[Any], None], route: str) -> None:
    """As if it had been replaced before. Without `Members` the first graph goes on."""
    first, second = network(), network()
    rev = rewired(first, route)
    before = rev(example())
    torch.manual_seed(2)
    change(first)
    torch.manual_seed(2)
    change(second)
    expected = re2fx.transform(second, example(), capture=route)
    got = rev(example())
    torch.testing.assert_close(got, expected(example()), rtol=0, atol=1e-12)
    assert not torch.allclose(got, before)
    assert_reversible_equals_store(rev, example(), tolerance=1e-10)
    trainable = [p for p in rev.parameters() if p.requires_grad]
    rev.zero_grad()
    rev(example()).sum().backward()
    assert all(p.grad is not None for p in trainable)
    assert str(rev.plan) == str(expected.plan)


def test_replaced_under_a_compiler() -> None:
    rev = rewired(network(), "symbolic")
    compiled: Any = torch.compile(rev, backend="re2fx", options={"compiler": "aot_eager"})
    compiled(example()).sum().backward()
    swap_activation(rev)
    torch.testing.assert_close(compiled(example()), rev(example()), rtol=0, atol=1e-12)


def test_copies_remember() -> None:
    """What was captured is compared, not what there was when it was copied."""
    for duplicate in (copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))):
        rev = rewired(network(), "symbolic")
        swap_activation(rev)
        changed = duplicate(rev)
        torch.testing.assert_close(changed(example()), rev(example()), rtol=0, atol=1e-12)
        swap_activation(other := rewired(network(), "symbolic"))
        torch.testing.assert_close(other(example()), changed(example()), rtol=0, atol=1e-12)


def test_put_back() -> None:
    """A module that was taken out and put back costs no capture."""
    rev = rewired(network(), "symbolic")
    inner: Any = rev[2].inner  # type: ignore[index]
    act, inner.act = inner.act, Twice()
    inner.act = act
    rev(example())
    assert len(rev._variants) == 1


def test_another_plan_is_refused() -> None:
    rev = rewired(network(), "symbolic")
    rev[2] = nn.Linear(6, 6).double()
    with pytest.raises(re2fx.ModeMismatchError, match=r"captured with 2 of .*Block(.|\n)*Linear"):
        rev(example())


def test_hooks_after_the_transform() -> None:
    """Dynamo captures them; what symbolic tracing loses is said, once."""
    rev = rewired(network(), "dynamo")
    plain = rev(example())
    handle = rev[1].inner.register_forward_hook(  # type: ignore[index]
        lambda module, given, out: 2 * out
    )
    assert not torch.allclose(rev(example()), plain)
    handle.remove()
    torch.testing.assert_close(rev(example()), plain, rtol=0, atol=0)

    rev = rewired(network(), "symbolic")
    rev[1].inner.register_forward_hook(lambda module, given, out: 2 * out)  # type: ignore[index]
    with pytest.warns(
        re2fx.Re2fxWarning, match=r"hooks on 1\.inner were registered after the capture"
    ):
        rev(example())
    calls = []
    rev[1].inner.up.register_forward_hook(lambda *_: calls.append(1))  # type: ignore[index]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rev(example())
    assert calls == [1]


def test_live_modules_are_not_compared() -> None:
    """By whatever path a shared one is called."""
    model: Any = network()
    model[3].inner.down = model[1].inner.down
    rev = rewired(model, "symbolic")
    members = rev._variants[0].members
    assert members is not None
    assert {"0", "1.norm", "1.inner.up", "4"} <= members.live
    found = {path for path, _ in members.forwards}
    assert found == {
        "",
        *(f"{i}{rest}" for i in (1, 2, 3) for rest in ("", ".inner", ".inner.act")),
    }
    assert members == Members.beside(model, members.live)
