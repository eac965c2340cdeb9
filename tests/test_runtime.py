"""The reversible executor against stored execution of the same network."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import re2fx
from re2fx.errors import ReplayError, StreamError

from .compare import assert_reversible_equals_store, assert_same, step, weighted
from .models import Block, ConvNet, Net, Tapped


def rewired(model: nn.Module, **options: Any) -> re2fx.RewiredModule:
    """Transform in fp64."""
    rev = re2fx.transform(model.double(), **options)
    assert isinstance(rev, re2fx.RewiredModule)
    return rev


X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
IMAGE = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize(
    "coupling",
    [
        re2fx.Coupling.re2tal(),
        re2fx.Coupling.consistent(0.5),
        re2fx.Coupling.midpoint(0.7, 1.2),
        re2fx.Coupling.momentum(0.9),
        re2fx.Coupling.dr2net(0.3, 0.7),
        re2fx.Coupling(0.2, -0.9, 0.8),
    ],
    ids=str,
)
@pytest.mark.parametrize("readout", ["mean", "sum"])
def test_couplings(coupling: re2fx.Coupling, readout: str) -> None:
    rev = rewired(Net(dropout=0.3), coupling=coupling, readout=readout)
    assert_reversible_equals_store(rev, X)


@pytest.mark.parametrize("activation", ["branch", "stream"])
def test_batch_norm_in_place_activations_and_dropout(activation: str) -> None:
    rev = rewired(ConvNet(dropout=0.3), activation=activation)
    assert len(rev.plan.chains[0]) == 3
    assert_reversible_equals_store(rev, IMAGE)


def test_batch_norm_counts_once() -> None:
    rev = rewired(ConvNet())
    rev(IMAGE).sum().backward()
    assert {int(b) for n, b in rev.named_buffers() if "num_batches" in n} == {1}


def test_batch_norm_with_cumulative_average() -> None:
    model = ConvNet()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    assert_reversible_equals_store(rewired(model), IMAGE)


def test_training_in_eval_mode() -> None:
    rev = rewired(ConvNet()).eval()
    assert_reversible_equals_store(rev, IMAGE)


def test_side_inputs_and_taps_get_gradients() -> None:
    rev = rewired(Tapped())
    assert rev.plan.chains[0].taps
    x, context = torch.randn(2, 3, 8, dtype=torch.float64)
    assert_reversible_equals_store(rev, x, context)


def test_only_the_tap_is_differentiated() -> None:
    rev = rewired(Tapped())
    x, context = torch.randn(2, 3, 8, dtype=torch.float64)
    assert_reversible_equals_store(rev, x, context, loss=lambda out: weighted(out[1]))


def test_shared_block() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block(8, 0.2)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(4):
                x = self.block(x)
            return x

    rev = rewired(Shared())
    assert len(rev.plan.chains[0]) == 4
    assert_reversible_equals_store(rev, torch.randn(3, 8, dtype=torch.float64))


def test_spectral_norm_moves_its_vectors_once() -> None:
    """Without the copies of buffers from before the forward the rerun iterates once more."""
    model = Net()
    for index in range(4):
        inner = model.get_submodule(f"blocks.{index}.inner")
        nn.utils.parametrizations.spectral_norm(inner)
    rev = rewired(model)
    assert_reversible_equals_store(rev, X)


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("inside", [True, False])
def test_autocast(cache: bool, inside: bool) -> None:
    """The backward usually runs outside the autocast region; the rerun must be inside one."""
    model = Net(depth=6, width=16, dropout=0.2)
    rev = re2fx.transform(model)
    assert isinstance(rev, re2fx.RewiredModule)
    grads = {}
    for memory in ("store", "reversible"):
        rev.memory = memory
        rev.zero_grad()
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=cache):
            loss = rev(X.float()).float().square().sum()
            if inside:
                loss.backward()
                second = rev(X.float()).float().square().sum()
        if not inside:
            loss.backward()
            second = rev(X.float()).float().square().sum()
        second.backward()
        grads[memory] = [p.grad.clone() for p in rev.parameters() if p.grad is not None]
    assert len(grads["store"]) == len(list(rev.parameters()))
    for a, b in zip(grads["reversible"], grads["store"], strict=True):
        # bf16 rounds the reconstructed fp32 input anew where it sits at a rounding boundary.
        assert (a - b).norm() <= 2e-3 * b.norm()


def test_half_precision_streams_are_carried_in_fp32() -> None:
    rev = re2fx.transform(Net(depth=6).bfloat16())
    with re2fx.record() as calls:
        out = rev(X.bfloat16())
    assert out.dtype == torch.bfloat16
    assert calls[0].output is not None
    assert {p.dtype for p in calls[0].output} == {torch.float32}
    assert_reversible_equals_store(rev, X.bfloat16(), tolerance=2e-2)


def test_no_grad_keeps_nothing_and_equals_training_forward() -> None:
    rev = rewired(Net())
    with torch.no_grad():
        plain = rev(X)
    assert not plain.requires_grad
    assert torch.equal(plain, rev(X))
    with torch.inference_mode():
        assert torch.equal(plain, rev(X))


def test_retain_graph_and_two_forwards_before_one_backward() -> None:
    rev = rewired(Net(dropout=0.2))

    def run(memory: str) -> list[Tensor]:
        rev.memory = memory  # type: ignore[assignment]
        rev.zero_grad()
        torch.manual_seed(3)
        first, second = rev(X).square().sum(), rev(X + 1).square().sum()
        first.backward(retain_graph=True)
        (first + second).backward()
        return [p.grad.clone() for p in rev.parameters() if p.grad is not None]

    for a, b in zip(run("reversible"), run("store"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_double_backward() -> None:
    rev = rewired(Net(depth=3))

    def run(memory: str) -> list[Tensor]:
        rev.memory = memory  # type: ignore[assignment]
        rev.zero_grad()
        x = X.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(rev(x).square().sum(), x, create_graph=True)
        gradient.square().sum().backward()
        assert x.grad is not None
        return [x.grad, *(p.grad.clone() for p in rev.parameters() if p.grad is not None)]

    for a, b in zip(run("reversible"), run("store"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_part_of_the_graph() -> None:
    rev = rewired(Net(depth=6))
    wanted = rev.get_parameter("blocks.3.inner.weight")
    results = []
    for memory in ("store", "reversible"):
        rev.memory = memory
        results.append(torch.autograd.grad(rev(X).square().sum(), wanted)[0])
    torch.testing.assert_close(*results, rtol=1e-11, atol=1e-12)


def test_frozen_backbone_with_an_input_without_gradient() -> None:
    model = Net(depth=6, dropout=0.2)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(("blocks.2.outer", "head")))
    rev = rewired(model)
    expected = step(rev, "store", X, loss=weighted)
    assert_same(step(rev, "reversible", X, loss=weighted), expected, 1e-11)
    assert sum(g is not None for g in expected.gradients.values()) == 5  # with the input's


def test_user_hooks_on_saved_tensors_nest() -> None:
    rev = rewired(Net(dropout=0.1))
    expected = step(rev, "store", X)
    with torch.autograd.graph.save_on_cpu():
        assert_same(step(rev, "reversible", X), expected, 1e-11)


def test_inside_activation_checkpointing() -> None:
    rev = rewired(Net(dropout=0.1))
    expected = step(rev, "store", X)

    class Outer(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            out = torch.utils.checkpoint.checkpoint(rev, x, use_reentrant=False)
            assert isinstance(out, Tensor)
            return out

    rev.memory = "reversible"
    x = X.clone().requires_grad_()
    torch.manual_seed(0)
    weighted(Outer()(x)).backward()
    reference = expected.gradients["input 0"]
    assert reference is not None
    torch.testing.assert_close(x.grad, reference, rtol=1e-11, atol=1e-11)


def test_anomaly_mode() -> None:
    rev = rewired(Net())
    expected = step(rev, "store", X)
    with pytest.warns(UserWarning, match="Anomaly"), torch.autograd.detect_anomaly():
        got = step(rev, "reversible", X)
    assert_same(got, expected, 1e-11)


def test_layout_links_between_blocks() -> None:
    class Layout(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = Block(6, 0.2), Block(4, 0.2), Block(30, 0.2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.b(self.a(x).permute(1, 2, 0).contiguous())
            return self.c(x.transpose(0, 2).flatten(1)).reshape(-1)

    rev = rewired(Layout())
    assert [len(links) for links in rev.plan.chains[0].links] == [0, 2, 2]
    assert_reversible_equals_store(rev, torch.randn(4, 5, 6, dtype=torch.float64))


# Reconstruction


def test_the_input_comes_back_from_the_output_alone() -> None:
    """fp32, 96 residuals, dropout on: 1e-5 relative."""
    torch.manual_seed(0)
    model = Net(depth=96, width=32, dropout=0.1)
    rev = re2fx.transform(model)
    x = torch.randn(16, 4)
    with re2fx.record() as calls:
        rev(x)
    start = model.stem(x)
    error = (calls[0].reconstruct() - start).norm() / start.norm()
    assert error <= 1e-5


def test_reconstruction_through_links_and_without_gradients() -> None:
    class Layout(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = Block(6), Block(4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.b(self.a(x).permute(1, 2, 0))
            return y

    rev = rewired(Layout())
    x = torch.randn(4, 5, 6, dtype=torch.float64)
    with torch.no_grad(), re2fx.record() as calls:
        rev(x)
    torch.testing.assert_close(calls[0].reconstruct(), x, rtol=1e-12, atol=1e-12)


# What must not happen


def test_nothing_of_a_step_stays_alive() -> None:
    """No cycle through the autograd graph: reference counting alone frees everything."""
    rev = rewired(Net(dropout=0.1))
    gc.collect()
    gc.disable()
    try:
        with re2fx.record() as calls:
            loss = rev(X).sum()
        alive = weakref.ref(calls[0])
        states = [weakref.ref(p) for p in calls[0].output or ()]
        calls.clear()
        loss.backward()
        del loss
        assert alive() is None
        assert [s() for s in states] == [None, None]
    finally:
        gc.enable()


def test_a_side_input_that_depends_on_the_chain_leaves_no_cycle() -> None:
    class Feedback(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.ModuleList([nn.Linear(8, 8) for _ in range(4)])
            self.gate = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.mix[0](x)
            gate = self.gate(x)
            x = x + self.mix[1](x)
            x = x + self.mix[2](x) * gate
            x = x + self.mix[3](x)
            return x

    rev = rewired(Feedback())
    assert rev.plan.chains[0].residuals[2].side_inputs == ("gate",)
    x = torch.randn(3, 8, dtype=torch.float64)
    assert_reversible_equals_store(rev, x)
    gc.collect()
    gc.disable()
    try:
        with re2fx.record() as calls:
            out = rev(x)
        alive = weakref.ref(calls[0])
        calls.clear()
        del out
        assert alive() is None
    finally:
        gc.enable()


def test_parameters_changed_before_the_backward() -> None:
    rev = rewired(Net())
    loss = rev(X).square().sum()
    with torch.no_grad():
        rev.get_parameter("blocks.1.outer.bias").add_(1)
    with pytest.raises(ReplayError, match=r"blocks\.1\.outer\.bias was changed in place"):
        loss.backward()
    rev.zero_grad()
    assert_reversible_equals_store(rev, X)


def test_parameters_replaced_before_the_backward() -> None:
    """Without the check the gradient would be that of a network that never ran."""
    rev = rewired(Net())
    other = {name: p.detach() * 2 for name, p in rev.named_parameters()}
    for p in other.values():
        p.requires_grad_()
    loss = torch.func.functional_call(rev, other, (X,)).sum()
    with pytest.raises(ReplayError, match=r"parameter blocks\.3\.norm\.weight was replaced"):
        loss.backward()
    loss = rev(X).sum()
    rev.get_submodule("blocks.1").inner = nn.Sequential(nn.Linear(8, 16).double())
    with pytest.raises(ReplayError, match="a submodule was replaced"):
        loss.backward()


def test_functional_call_around_a_whole_step() -> None:
    rev = rewired(Net())
    other = {name: (p.detach() * 2).requires_grad_() for name, p in rev.named_parameters()}
    gradients = []
    for memory in ("store", "reversible"):
        rev.memory = memory
        loss = functional_step(rev, other)
        gradients.append(loss)
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def functional_step(rev: nn.Module, parameters: dict[str, Tensor]) -> list[Tensor]:
    """Forward and backward while the parameters are swapped in."""

    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rev = rev

        def forward(self, x: Tensor) -> list[Tensor]:
            return list(torch.autograd.grad(self.rev(x).sum(), list(parameters.values())))

    swapped = {f"rev.{name}": p for name, p in parameters.items()}
    return torch.func.functional_call(Step(), swapped, (X,))


def test_side_inputs_in_containers() -> None:
    class Rotary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(8, 8))

        def forward(self, x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
            out: Tensor = self.inner(x) * table[0] + table[1]
            return out

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = Table()
            self.mix = nn.ModuleList([Rotary() for _ in range(3)])

        def forward(self, x: Tensor) -> Tensor:
            table = self.table(x)
            for mix in self.mix:
                x = x + mix(x, table)
            return x

    rev = rewired(Model(), leaves=[Rotary])
    assert rev.plan.chains[0].residuals[1].side_inputs == ("table",)
    assert_reversible_equals_store(rev, torch.randn(3, 8, dtype=torch.float64))


class Table(nn.Module):
    """Returns a tuple that needs gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cos(self.scale), torch.sin(self.scale)


def test_side_input_changed_before_the_backward() -> None:
    rev = rewired(Masked())
    mask = torch.ones(3, 8, dtype=torch.float64)
    loss = rev(torch.randn(3, 8, dtype=torch.float64), mask).sum()
    mask.mul_(2)
    with pytest.raises(ReplayError, match="side input"):
        loss.backward()


class Masked(nn.Module):
    """A mask that each branch multiplies by."""

    def __init__(self) -> None:
        super().__init__()
        self.mixes = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        for mix in self.mixes:
            x = x + mix(x) * mask
        return x


def test_in_place_edit_of_a_saved_tensor_is_rejected_as_in_stored_execution() -> None:
    class Bad(Block):
        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.tanh(self.inner(self.norm(x)))
            hidden.mul_(2)
            return x + self.outer(hidden)

    rev = rewired(Net(block=Bad))
    for memory in ("store", "reversible"):
        rev.memory = memory
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            rev(X).sum().backward()


class Moody(nn.Module):
    """Saves another number of tensors at every other call."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return torch.tanh(x * self.weight) if self.calls % 2 else x * self.weight


def test_a_branch_that_changes_between_runs() -> None:
    class MoodyBlock(Block):
        def __init__(self, width: int, dropout: float) -> None:
            super().__init__(width, dropout)
            self.mood = Moody()

        def forward(self, x: Tensor) -> Tensor:
            return x + self.outer(self.mood(self.inner(self.norm(x))))

    rev = rewired(Net(block=MoodyBlock))
    with pytest.raises(ReplayError, match=r"blocks\.3 .*not deterministic"):
        rev(X).sum().backward()


def test_a_branch_that_broadcasts_the_stream() -> None:
    class Broadcast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.ModuleList([nn.Linear(1, 8), nn.Linear(8, 8), nn.Linear(8, 8)])

        def forward(self, x: Tensor) -> Tensor:
            for mix in self.mix:
                x = x + mix(x)
            return x

    rev = rewired(Broadcast())
    with pytest.raises(StreamError, match=r"turns a stream of \(5, 1\)"):
        rev(torch.randn(5, 1, dtype=torch.float64))


def test_an_error_in_a_branch_leaves_the_next_step_clean() -> None:
    class Fragile(Block):
        def forward(self, x: Tensor) -> Tensor:
            return x + self.outer(self.drop(check(self.inner(self.norm(x)))))

    rev = rewired(Net(block=Fragile, dropout=0.1))
    expected = step(rev, "reversible", X)
    with pytest.raises(ValueError, match="planted"):
        rev(torch.full_like(X, float("nan")))
    assert_same(step(rev, "reversible", X), expected, 0)


@torch.fx.wrap
def check(x: Tensor) -> Tensor:
    """Fails on NaN."""
    if x.isnan().any():
        raise ValueError("planted")
    return x


def test_state_is_per_call_not_per_module() -> None:
    rev = rewired(Net(dropout=0.1))
    before = set(vars(rev))
    out = rev(X).sum()
    other = copy.deepcopy(rev)
    out.backward()
    assert set(vars(rev)) == before
    assert_reversible_equals_store(other, X)
