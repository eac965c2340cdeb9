"""The gradients of weights that slices read are summed in place, where that is proved right."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import re2fx
from re2fx import summing

from .compare import weighted
from .framed import Mixed
from .situations.harness import Run, compare, double, example, train, under

X = example(3, 7, 8)
FEW = 7  # slices of the largest branch
Shapes = list[tuple[int, ...]]


class Mlp(nn.Module):
    """Two linear maps around a gelu, by modules."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 32, bias), nn.Linear(32, 8, bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(F.gelu(self.up(x)))
        return out


class Added(Mlp):
    """By `torch.addmm`, with weights of shape (in, out), as GPT-2 has them."""

    def __init__(self) -> None:
        super().__init__()
        self.up.weight = nn.Parameter(torch.empty(8, 32))
        self.down.weight = nn.Parameter(torch.empty(32, 8))

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.addmm(self.up.bias, x.view(-1, 8), self.up.weight)
        out = torch.addmm(self.down.bias, F.gelu(rows), self.down.weight)
        return out.view(x.shape)


class Tied(Mlp):
    """One weight in two maps, and once more as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8)
        self.down.weight = self.up.weight

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.cat([F.gelu(self.up(x)), x.sin(), x.cos(), x.tanh()], -1).sigmoid()
        out: Tensor = self.down(wide[..., :8]) * self.up.weight[0]
        return out


class Turned(Mlp):
    """The weights are read as views of parameters."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(F.linear(x, self.down.weight.t()))
        return F.linear(hidden, self.up.weight.t())


class Residual(nn.Module):
    """A residual of a normalized branch."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.norm, self.branch = nn.LayerNorm(8), branch

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.branch(self.norm(x))
        return out


KINDS: dict[str, Callable[[], nn.Module]] = {
    "modules": Mlp,
    "no bias": lambda: Mlp(bias=False),
    "addmm": Added,
    "tied": Tied,
}
kinds = pytest.mark.parametrize("kind", KINDS)


def net(
    kind: Callable[[], nn.Module] = Mlp, change: Any = None, x: Tensor = X, **chosen: Any
) -> Mixed:
    """Three residuals whose branches run in slices."""
    model = double(nn.Sequential(nn.Linear(8, 8), *[Residual(kind()) for _ in range(3)]))
    if change is not None:
        change(model)
    found = Mixed.of(model, x)
    found.choose(**({"slices": FEW} | chosen))
    return found


@pytest.fixture(autouse=True)
def _nothing_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("re2fx.rerun.SMALL", 0)


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> Shapes:
    """The shapes of weights to whose sums something was added."""
    found: Shapes = []
    add = summing._add

    def counted(sums: Any, weight: Tensor, *rest: Any) -> None:
        found.append(tuple(weight.shape))
        add(sums, weight, *rest)

    monkeypatch.setattr(summing, "_add", counted)
    return found


@kinds
@pytest.mark.parametrize("states", [None, slice(None)], ids=["reversed", "states kept"])
def test_the_gradients_of_every_parameter_and_input(kind: str, states: Any, added: Shapes) -> None:
    found = net(KINDS[kind], states=states)
    compare(found.pair, X)
    assert len(added) == 3 * 2 * FEW


def test_batches_as_slices(added: Shapes) -> None:
    """More items than tokens: slices along the batch, and some smaller than others."""
    x = example(9, 3, 8)
    compare(net(x=x, slices=4).pair, x)
    assert len(added) == 3 * 2 * 4


def test_the_slices_are_summed_once_for_a_hook(added: Shapes) -> None:
    found, seen = net(), list[str]()
    for name, p in found.pair.model.named_parameters():
        p.register_hook(lambda gradient, name=name: seen.append(name))
        p.register_post_accumulate_grad_hook(lambda p, name=name: seen.append(f"{name} after"))
    output = found.pair.reversible(X)
    weighted(output).backward()
    names = [name for name, _ in found.pair.model.named_parameters()]
    assert sorted(seen) == sorted([*names, *(f"{name} after" for name in names)])
    assert added


def test_a_hook_that_changes_the_gradient(added: Shapes) -> None:
    """It is not linear: given a part of the gradient it would do something else."""
    found = net()
    for p in found.pair.model.parameters():
        p.register_hook(lambda gradient: gradient / (1 + gradient.norm()))
    compare(found.pair, X)
    assert added


@kinds
def test_two_backwards_through_one_graph(kind: str, added: Shapes) -> None:
    def situation(run: Run, model: nn.Module, inputs: Any) -> Any:
        output = run(*inputs)
        weighted(output).backward(retain_graph=True)
        output.square().sum().backward()
        return output

    compare(net(KINDS[kind]).pair, X, situation=situation)
    assert len(added) == 2 * 3 * 2 * FEW


@kinds
def test_a_backward_that_is_differentiated(kind: str, added: Shapes) -> None:
    """The first one sums nothing, and no more does what it has recorded."""

    def situation(run: Run, model: Any, inputs: Any) -> Any:
        output, some = run(*inputs), [*inputs, model[1].branch.up.weight]
        gradients = torch.autograd.grad(weighted(output), some, create_graph=True)
        if run is found.pair.reversible:
            assert not added
        (weighted(output) + sum(g.square().sum() for g in gradients)).backward()
        return output

    found = net(KINDS[kind])
    compare(found.pair, X, situation=situation, tolerance=1e-9)


@kinds
def test_gradients_of_some(kind: str, added: Shapes) -> None:
    """Only the wanted weights are summed; for inputs alone, none."""

    def situation(run: Run, model: Any, inputs: Any) -> Any:
        output, weight = run(*inputs), model[2].branch.down.weight
        (x,) = torch.autograd.grad(weighted(output), inputs, retain_graph=True)
        assert not added
        (w,) = torch.autograd.grad(weighted(output), [weight], retain_graph=True)
        assert set(added) <= {tuple(weight.shape)}
        weighted(output).backward(inputs=[*inputs, weight], retain_graph=True)
        added.clear()
        weighted(output).backward()
        return output, x, w

    compare(net(KINDS[kind]).pair, X, situation=situation)
    assert len(added) == 3 * 2 * FEW


def freeze(model: Any) -> None:
    """One weight, one bias, and all of the first branch."""
    model[1].branch.requires_grad_(False)
    model[2].branch.up.weight.requires_grad_(False)
    model[3].branch.down.bias.requires_grad_(False)


def test_frozen_weights(added: Shapes) -> None:
    compare(net(change=freeze).pair, X)
    assert len(added) == 3 * FEW


def test_only_weights_are_trained(added: Shapes) -> None:
    """The first branch reads what needs no gradient."""

    def situation(run: Run, model: nn.Module, inputs: Any) -> Any:
        output = run(*(x.detach() for x in inputs))
        weighted(output).backward()
        return output

    def change(model: Any) -> None:
        model[0].requires_grad_(False)
        model[1].norm.requires_grad_(False)

    compare(net(change=change).pair, X, situation=situation)
    assert added


def test_weights_that_are_views_are_left_to_autograd(added: Shapes) -> None:
    compare(net(Turned).pair, X)
    assert not added


def test_complex_numbers_are_left_to_autograd() -> None:
    weight = nn.Parameter(torch.randn(3, 2, dtype=torch.complex128))
    x = torch.randn(4, 2, dtype=torch.complex128)
    call = summing._call(F.linear, (x, weight), {})
    assert call is not None
    assert not call.fits()


@pytest.mark.filterwarnings("ignore:In CPU autocast")
def test_autocast_is_left_to_autograd(added: Shapes) -> None:
    autocast = torch.autocast("cpu", torch.bfloat16)
    model = double(nn.Sequential(nn.Linear(8, 8), *[Residual(Mlp()) for _ in range(3)])).float()
    with autocast:
        found = Mixed.of(model, X.float())
        found.choose(slices=FEW)
    situation = under(lambda: torch.autocast("cpu", torch.bfloat16))
    compare(found.pair, X.float(), situation=situation, tolerance=0.05)
    assert not added


class Counting(TorchFunctionMode):
    """Counts linear maps, as a profiler of the user's would."""

    count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is F.linear
        return func(*args, **(kwargs or {}))


class Looking(TorchDispatchMode):
    """Looks at operators."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [Counting, Looking])
def test_the_modes_of_users_see_what_they_saw(mode: Any, added: Shapes) -> None:
    compare(net().pair, X, situation=under(mode))
    assert not added


def test_a_mode_counts_the_slices(added: Shapes) -> None:
    found = net()
    with Counting() as mode:
        found.pair.reversible(X)
    assert mode.count == 1 + 3 * 2 * FEW


def test_a_default_device_is_no_mode_to_heed(added: Shapes) -> None:
    compare(net().pair, X, situation=under(lambda: torch.device("cpu")))
    assert added


def test_where_nothing_is_summed() -> None:
    assert summing.can_sum()
    with torch.no_grad():
        assert not summing.can_sum()
    with forward_ad.dual_level():
        assert not summing.can_sum()
    assert not torch.func.vmap(lambda x: x * summing.can_sum())(torch.ones(2)).any()


def test_many_gradients_at_once() -> None:
    """A backward under vmap is left to autograd."""
    weight = nn.Parameter(torch.randn(3, 2, dtype=torch.float64))
    x = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)

    def gradients(context: Any) -> Any:
        with context:
            output = F.linear(x.sin(), weight)
        seeds = torch.eye(15, dtype=torch.float64).view(15, 5, 3)
        return torch.autograd.grad(output, (x, weight), seeds, is_grads_batched=True)

    for got, expected in zip(gradients(summing.Summing()), gradients(nullcontext()), strict=True):
        torch.testing.assert_close(got, expected)


def test_a_weight_keeps_the_form_of_its_gradient() -> None:
    """The gradient has the strides of the weight, so that none is copied for it."""
    weight = nn.Parameter(torch.randn(8, 4).t())
    x = torch.randn(6, 8, requires_grad=True)
    with summing.Summing():
        parts = [F.linear(part, weight) for part in x.sin().split(2)]
    torch.cat(parts).sum().backward()
    assert weight.grad is not None
    assert weight.grad.stride() == weight.stride()


def test_the_memory_of_gradients() -> None:
    """No second gradient of the largest weight is there beside its sum; it is foreseen exactly."""
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Linear(8, 8), *[Residual(Mlp()) for _ in range(2)])
    blocks: Any = wide[1:]
    for block in blocks:
        branch = block.branch
        branch.up, branch.down = nn.Linear(8, 4096), nn.Linear(4096, 8)
    x = torch.randn(16, 4, 8)
    found = Mixed.of(wide, x)
    found.choose(slices=16)
    for p in wide.parameters():
        p.grad = torch.zeros_like(p)

    def step() -> None:
        train(found.rev, wide, (x,))

    step()
    measured, foreseen = re2fx.peak(step).peak, re2fx.foresee(found.rev, x).peak.peak
    size = 4 * 8 * 4096
    slices = 4 * 4 * 4096 * 4  # what a slice of two rows makes, and its gradient
    assert measured < 2 * size + 2 * slices
    assert measured == pytest.approx(foreseen, rel=0.02)
