"""What a forward switches while it runs: every route keeps it, or says that it would lose it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import re2fx
from re2fx import routes
from re2fx.capture import Captured
from re2fx.state import State, attention_kernels

from .models import Net

X = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
Forward = Callable[[Any, Tensor], Any]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.compiler.reset()
    before = State()
    yield
    assert before.changed() is None or before.changed() == "random seed"
    torch.compiler.reset()


class Given(nn.Module):
    """A residual network, a layer, and a forward that is given."""

    def __init__(self, function: Forward) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.mix = Net(3), nn.Linear(4, 4)
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def autocast(m: Any, x: Tensor) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        return m.net(x)


def autocast_off(m: Any, x: Tensor) -> Any:
    y = m.mix(x)
    with torch.amp.autocast("cpu", enabled=False):
        y = y.float().softmax(-1)
    return m.net(y)


def autocast_without_cache(m: Any, x: Tensor) -> Any:
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        return m.net(x)


def no_grad(m: Any, x: Tensor) -> Any:
    with torch.no_grad():
        y = m.mix(x)
    return m.net(x + y)


@torch.no_grad()
def table(m: Any, x: Tensor) -> Tensor:
    out: Tensor = m.mix(x)
    return out


def decorated(m: Any, x: Tensor) -> Any:
    return m.net(x + table(m, x))


@torch.autocast("cpu", torch.bfloat16)  # type: ignore[untyped-decorator]
def half(m: Any, x: Tensor) -> Tensor:
    out: Tensor = m.mix(x)
    return out


def decorated_autocast(m: Any, x: Tensor) -> Any:
    return m.net(x + half(m, x))


def set_grad_enabled(m: Any, x: Tensor) -> Any:
    torch.set_grad_enabled(False)
    y = m.mix(x)
    torch.set_grad_enabled(True)
    return m.net(x + y)


def inference(m: Any, x: Tensor) -> Any:
    with torch.inference_mode():
        y = m.mix(x.detach())
    return m.net(x) + y.mean()


def math_kernel(m: Any, x: Tensor) -> Any:
    with sdpa_kernel(SDPBackend.MATH):
        y = F.scaled_dot_product_attention(x, x, x)
    return m.net(m.mix(y))


KEPT: dict[Forward, str] = {
    autocast: "another autocast",
    autocast_off: "another autocast",
    autocast_without_cache: "another autocast",
    no_grad: "another gradient mode",
    decorated: "another gradient mode",
    decorated_autocast: "another autocast",
    set_grad_enabled: "another gradient mode",
    inference: "another gradient mode",
    math_kernel: "another choice of attention kernels",
}


def save_on_cpu(m: Any, x: Tensor) -> Any:
    with torch.autograd.graph.save_on_cpu():
        return m.net(x)


def saved_hooks(m: Any, x: Tensor) -> Any:
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: 2 * t):
        return m.net(x)


def forked(m: Any, x: Tensor) -> Any:
    with torch.random.fork_rng(devices=[]):
        y = F.dropout(m.mix(x))
    return m.net(y)


def seeded(m: Any, x: Tensor) -> Any:
    torch.manual_seed(3)
    return m.net(F.dropout(m.mix(x)))


def default_dtype(m: Any, x: Tensor) -> Any:
    torch.set_default_dtype(torch.float64)
    y = x + torch.zeros(x.shape)
    torch.set_default_dtype(torch.float32)
    return m.net(x) + y.float().mean()


def deterministic(m: Any, x: Tensor) -> Any:
    torch.use_deterministic_algorithms(True)
    y = m.net(x)
    torch.use_deterministic_algorithms(False)
    return y


def ordered_kernels(m: Any, x: Tensor) -> Any:
    with sdpa_kernel([SDPBackend.MATH, SDPBackend.FLASH_ATTENTION], set_priority=True):
        y = F.scaled_dot_product_attention(x, x, x)
    return m.net(m.mix(y))


REFUSED: dict[Forward, str] = {
    save_on_cpu: "saved for the backward",
    saved_hooks: "saved for the backward",
    forked: "random generator",
    seeded: "random generator",
    default_dtype: "another default dtype",
    deterministic: "another choice of kernels",
    ordered_kernels: "another choice of attention kernels",
}


def record(m: Any, x: Tensor) -> Any:
    with torch.autograd.profiler.record_function("net"):
        return m.net(x)


def put_back(m: Any, x: Tensor) -> Any:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        size = len(m.net.blocks)
    return m.net(x) + size


def constant(m: Any, x: Tensor) -> Any:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        scale = torch.ones(3) * 2
    return m.net(x) * scale


def checkpointed(m: Any, x: Tensor) -> Any:
    return checkpoint(m.net, x, use_reentrant=False)


HARMLESS = [record, put_back, constant, checkpointed]


def name(function: Any) -> str:
    return str(getattr(function, "__name__", function))


def run(model: nn.Module, x: Tensor, under: Any = None) -> tuple[Tensor, list[Tensor | None]]:
    model.zero_grad()
    x = x.clone().requires_grad_()
    torch.manual_seed(1)
    if under is None:
        out = model(x)
    else:
        with under():
            out = model(x)
    out.float().square().sum().backward()
    return out.detach(), [x.grad, *(p.grad for p in model.parameters())]


def assert_same_function(captured: Captured, model: Given, under: Any = None) -> None:
    """The graph, before anything is rewired, computes what the model does."""
    root = copy.deepcopy(model)
    for key, value in captured.constants.items():
        setattr(root, key, value)
    graph = torch.fx.GraphModule(root, copy.deepcopy(captured.train))
    (out, gradients), (expected, wanted) = run(graph, X, under), run(model, X, under)
    assert out.dtype == expected.dtype
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    found = {key: p.grad for key, p in graph.named_parameters()}
    torch.testing.assert_close(gradients[0], wanted[0], rtol=1e-5, atol=1e-6)
    for (key, _), gradient in zip(model.named_parameters(), wanted[1:], strict=True):
        got = found.get(key)
        assert (got is None) == (gradient is None), key
        if gradient is not None:
            torch.testing.assert_close(got, gradient, rtol=1e-5, atol=1e-6, msg=key)


@pytest.mark.parametrize("function", [*KEPT, *REFUSED], ids=name)
def test_symbolic_tracing_refuses(function: Forward) -> None:
    message = {**KEPT, **REFUSED}[function]
    with pytest.raises(re2fx.CaptureError, match=rf"Given .* at .*{__name__[6:]}.py:\d+: ") as e:
        re2fx.transform(Given(function), X, capture="symbolic")
    assert message in str(e.value)


@pytest.mark.parametrize("function", KEPT, ids=name)
def test_auto_keeps(function: Forward) -> None:
    model = Given(function)
    captured = routes.capture(model, X)
    assert captured.route == "dynamo"
    assert list(captured.failures) == ["symbolic"]
    assert_same_function(captured, model)
    rev: Any = re2fx.transform(model, X, strict=True)
    assert sum(map(len, rev.plan.chains)) == 3, str(rev.plan)
    assert rev(X).dtype == model(X).dtype
    results = []
    for rev.memory in ("store", "reversible"):
        results.append(run(rev, X))
    for a, b in zip(results[0][1], results[1][1], strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert (a - b).norm() <= 0.02 * b.norm() + 1e-6


@pytest.mark.parametrize("function", REFUSED, ids=name)
def test_every_route_refuses(function: Forward) -> None:
    for route in ("dynamo", "export"):
        with pytest.raises(re2fx.CaptureError):
            routes.capture(Given(function), X, route=route)
    with pytest.raises(re2fx.CaptureError) as error:
        routes.capture(Given(function), X)
    assert list(error.value.failures) == ["symbolic", "dynamo", "export"]


@pytest.mark.parametrize("function", [no_grad, autocast, autocast_off, set_grad_enabled], ids=name)
def test_export_keeps(function: Forward) -> None:
    model = Given(function)
    assert_same_function(routes.capture(model, X, route="export"), model)


@pytest.mark.parametrize("function", [inference, math_kernel], ids=name)
def test_export_refuses(function: Forward) -> None:
    with pytest.raises(re2fx.CaptureError, match="export would lose"):
        routes.capture(Given(function), X, route="export")


@pytest.mark.parametrize("function", HARMLESS, ids=name)
def test_what_changes_nothing_is_traced_through(function: Forward) -> None:
    captured = routes.capture(Given(function), route="symbolic")
    assert not captured.leaves
    assert_same_function(captured, Given(function))


@pytest.mark.parametrize("around", ["autocast", "no_grad", "inference", "hooks", "kernel"])
@pytest.mark.parametrize("route", ["symbolic", "auto"])
def test_around_transform_is_no_change(around: str, route: str) -> None:
    contexts: dict[str, Callable[[], Any]] = {
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
        "no_grad": torch.no_grad,
        "inference": torch.inference_mode,
        "hooks": torch.autograd.graph.save_on_cpu,
        "kernel": lambda: sdpa_kernel(SDPBackend.MATH),
    }
    with contexts[around]():
        captured = routes.capture(Given(record), X, route=route)
    assert captured.route == "symbolic"
    assert not captured.leaves


@pytest.mark.parametrize("function", [no_grad, autocast, math_kernel], ids=name)
@pytest.mark.parametrize("under", ["same", "no_grad", "inference"])
def test_the_same_around_transform_hides_nothing(function: Forward, under: str) -> None:
    same: dict[Forward, Callable[[], Any]] = {
        no_grad: torch.no_grad,
        autocast: lambda: torch.autocast("cpu", torch.bfloat16),
        math_kernel: torch.no_grad,
    }
    around: Any = {"no_grad": torch.no_grad, "inference": torch.inference_mode}
    model = Given(function)
    with around.get(under, same[function])():
        with pytest.raises(re2fx.CaptureError, match="symbolic"):
            routes.capture(model, X, route="symbolic")
        captured = routes.capture(model, X)
    assert captured.route == "dynamo"
    assert_same_function(captured, model)


def test_an_island_in_the_autocast_of_a_caller() -> None:
    model = Given(autocast_off)
    captured = routes.capture(model, X)
    assert_same_function(captured, model, lambda: torch.autocast("cpu", torch.bfloat16))


class Island(nn.Module):
    """A part of a branch that switches autocast off, or gradients."""

    def __init__(self, width: int, kind: str) -> None:
        super().__init__()
        self.inner, self.outer, self.kind = nn.Linear(width, width), nn.Linear(width, width), kind

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "no_grad":
            with torch.no_grad():
                gate = self.inner(x).sigmoid()
        else:
            with torch.autocast("cpu", enabled=False):
                gate = self.inner(x.float()).sigmoid()
        out: Tensor = self.outer(x * gate.to(x.dtype))
        return out


@pytest.mark.parametrize("kind", ["no_grad", "autocast"])
def test_a_submodule_that_switches_is_kept_whole(kind: str) -> None:
    class Block(nn.Module):
        def __init__(self, width: int, dropout: float) -> None:
            super().__init__()
            self.norm, self.island = nn.LayerNorm(width), Island(width, kind)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = x + self.island(self.norm(x))
            return out

    def whole(m: Any, x: Tensor) -> Any:
        return m.net(x)

    model = Given(whole)
    model.net = Net(3, block=Block)
    captured = routes.capture(model)
    assert list(captured.leaves) == [f"net.blocks.{i}.island" for i in range(3)]
    assert all("under another" in reason for reason in captured.leaves.values())
    assert_same_function(captured, model)
    rev: Any = re2fx.transform(model)
    assert [len(chain) for chain in rev.plan.chains] == [3]


def test_the_module_that_switches_is_kept_and_not_one_inside() -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                out: Tensor = self.inside(x)
            return out.float()

    model = nn.Sequential(Around(), nn.Sequential(nn.Linear(4, 4)))
    captured = routes.capture(model)
    assert list(captured.leaves) == ["0"]


def test_leaves_may_switch() -> None:
    class Leaf(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(x).float()

    def whole(m: Any, x: Tensor) -> Any:
        return m.net(m.leaf(x))

    model = Given(whole)
    model.leaf = Leaf(4, 4)
    captured = routes.capture(model, route="symbolic")
    assert not captured.leaves
    assert_same_function(captured, model)


def test_attention_kernels_are_those_of_the_forward_when_a_branch_runs_again() -> None:
    seen = []

    class Attention(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(attention_kernels())
            return super().forward(x)

    class Block(nn.Module):
        def __init__(self, width: int, dropout: float) -> None:
            super().__init__()
            self.inner = Attention(width, width)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = x + self.inner(x).tanh()
            return out

    rev = re2fx.transform(Net(3, block=Block))
    with sdpa_kernel(SDPBackend.MATH):
        out = rev(X)
    before = attention_kernels()
    out.sum().backward()
    assert len(seen) == 6
    assert len(set(seen)) == 1
    assert attention_kernels() == before != seen[0]


def test_looking_is_cheap() -> None:
    import timeit

    state = State()
    assert min(timeit.repeat(state.changed, number=1000, repeat=5)) < 0.05
