"""The reversible executor against stored execution of the same network."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import re2fx

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
@pytest.mark.parametrize("readout", ["mean", "sum", "last"])
def test_couplings(coupling: re2fx.Coupling, readout: str) -> None:
    rev = rewired(Net(dropout=0.3), coupling=coupling, readout=readout)
    assert_reversible_equals_store(rev, X)


@pytest.mark.parametrize("activation", ["branch", "stream"])
def test_batch_norm_in_place_activations_and_dropout(activation: str) -> None:
    rev = rewired(ConvNet(dropout=0.3), activation=activation)
    assert len(rev.plan.chains[0]) == 3
    assert_reversible_equals_store(rev, IMAGE)


def test_the_newer_stream_as_the_readout_may_be_written_to() -> None:
    """Were the readout the stream itself, the walk would begin at what the ReLU left of it."""

    class Written(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.blocks(self.stem(x))
            out: Tensor = self.head(torch.relu_(x))
            return out

    assert_reversible_equals_store(rewired(Written(), readout="last"), X)


def test_taps_read_the_newer_stream_alone() -> None:
    x, context = torch.randn(2, 3, 8, dtype=torch.float64)
    rev = rewired(Tapped(), readout="last")
    assert_reversible_equals_store(rev, x, context)
    assert_reversible_equals_store(rev, x, context, loss=lambda out: weighted(out[1]))


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


def test_a_buffer_reached_by_two_names_is_put_back() -> None:
    """Put back first to last, the second name would leave the rerun's copy behind."""
    rev = rewired(TwoNames(), leaves=["pair"])
    assert_reversible_equals_store(rev, torch.randn(6, 4, dtype=torch.float64))
    before = [b.data_ptr() for b in rev.buffers()]
    rev(torch.randn(6, 4, dtype=torch.float64)).sum().backward()
    assert [b.data_ptr() for b in rev.buffers()] == before


class TwoNames(nn.Module):
    """Calls a module kept whole, and a module inside it, in one branch."""

    def __init__(self) -> None:
        super().__init__()
        self.pair = Pair()
        self.mix = nn.ModuleList([nn.Linear(4, 4, bias=False) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        for mix in self.mix:
            x = x + self.pair.norm(self.pair(mix(x)))
        return x


class Pair(nn.Module):
    """A batch norm with company."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.scale = nn.BatchNorm1d(4), nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.scale(torch.tanh(self.norm(x)))
        return out


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
        rev.memory = memory
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
        rev.memory = memory
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


class Square(torch.autograd.Function):
    """Reads what it saved twice in its backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * (ctx.saved_tensors[0] + ctx.saved_tensors[0])


class Counted(nn.Module):
    """Counts how often it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.runs = 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        squared: Tensor = Square.apply(x)
        return squared


def test_a_second_read_of_a_saved_tensor_runs_its_branch_alone() -> None:
    model = Net(depth=5)
    counted = [Counted() for _ in range(5)]
    for block, layer in zip(model.blocks, counted, strict=True):
        block.drop = layer
    rev = rewired(model, leaves=[Counted])
    assert_reversible_equals_store(rev, X)
    for layer in counted:
        layer.runs = 0
    rev(X).sum().backward()
    assert [layer.runs for layer in counted] == [3] * 5


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
