"""What `transform` returns: one set of members, two modes, a module like any other."""

from __future__ import annotations

import copy
import gc
import inspect
import io
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import re2fx

from .compare import assert_reversible_equals_store, assert_same, step
from .models import ConvNet, Net, Tapped

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


class Modal(nn.Module):
    """Dropout and batch norm as functions of the training flag, as many models write them."""

    mean: Tensor
    var: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.ModuleList([nn.Linear(4, 4, bias=False) for _ in range(3)])
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("var", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        for mix in self.mix:
            hidden = F.batch_norm(mix(x), self.mean, self.var, training=self.training)
            x = x + F.dropout(hidden, 0.5, self.training)
        return x


def rewired(model: nn.Module) -> re2fx.RewiredModule:
    """Transform and narrow the type."""
    rev = re2fx.transform(model)
    assert isinstance(rev, re2fx.RewiredModule)
    return rev


@pytest.mark.parametrize("route", ["symbolic", "dynamo"])
def test_a_model_nobody_holds_is_freed_at_once(route: str) -> None:
    """A cycle would keep its parameters until the next full collection."""
    gc.collect()
    gc.disable()
    try:
        model = Net(2)
        rev = re2fx.transform(model, X, capture=route)
        rev(X).sum().backward()
        alive = weakref.ref(model), weakref.ref(rev)
        del model, rev
        assert [reference() for reference in alive] == [None, None]
    finally:
        gc.enable()


def test_train_and_eval_graphs_switch() -> None:
    model = Modal()
    rev = rewired(model)
    assert_reversible_equals_store(rev, X, tolerance=1e-5)
    assert not torch.equal(rev(X), rev(X))
    rev.eval()
    assert torch.equal(rev(X), rev(X))
    assert_reversible_equals_store(rev, X, tolerance=1e-5)
    assert "training = True" in rev.train().code
    assert "training = False" in rev.eval().code


def test_the_mode_is_one_with_the_given_model() -> None:
    model = Net()
    rev = rewired(model)
    model.eval()
    assert not rev.training
    rev.train()
    assert model.training
    assert model.blocks.training


def test_a_train_method_that_freezes_batch_norm_is_honoured() -> None:
    class Frozen(ConvNet):
        def train(self, mode: bool = True) -> Frozen:
            super().train(mode)
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.training = False
            return self

    rev = rewired(Frozen())
    rev.eval().train()
    assert rev.training
    before = {name: b.clone() for name, b in rev.named_buffers()}
    rev(torch.randn(2, 3, 6, 6)).sum().backward()
    assert all(torch.equal(b, before[name]) for name, b in rev.named_buffers())


def test_the_given_model_is_not_changed() -> None:
    model = Modal()
    attributes, modes = set(vars(model)), [m.training for m in model.modules()]
    model.eval()
    expected = model(X)
    model.train()
    rewired(model)
    assert set(vars(model)) == attributes
    assert [m.training for m in model.modules()] == modes
    model.eval()
    assert torch.equal(model(X), expected)


def test_a_mixed_training_state_survives() -> None:
    model = Net()
    model.blocks[1].eval()
    rewired(model)
    assert [m.training for m in model.blocks] == [True, False, True, True]


def test_members_are_shared() -> None:
    model = ConvNet()
    rev = rewired(model)
    assert list(rev.state_dict()) == list(model.state_dict())
    for (name, a), (other, b) in zip(rev.named_parameters(), model.named_parameters(), strict=True):
        assert name == other
        assert a is b
    rev.load_state_dict(ConvNet().state_dict(), strict=True)
    model.load_state_dict(rev.state_dict(), strict=True)


def test_assigned_and_replaced_members_are_used() -> None:
    model = Net()
    rev = rewired(model)
    fresh = Net()
    rev.load_state_dict({k: v.clone() for k, v in fresh.state_dict().items()}, assign=True)
    assert_close(rev(X), rewired(fresh)(X))

    class LoRA(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base = base
            self.down = nn.Linear(base.in_features, 2, bias=False)
            self.up = nn.Linear(2, base.out_features, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.base(x) + self.up(self.down(x))
            return out

    before = rev(X)
    block = rev.get_submodule("blocks.1")
    block.inner = LoRA(block.inner)  # type: ignore[arg-type]
    assert not torch.allclose(rev(X), before)
    assert_reversible_equals_store(rev, X, tolerance=1e-5)
    outcome = step(rev, "reversible", X)
    assert outcome.gradients["blocks.1.inner.up.weight"] is not None


def test_a_replaced_first_level_module_is_found_again() -> None:
    """Where members live is remembered between calls; a replacement has to be noticed."""
    rev = rewired(Net().double())
    x = X.double()
    assert_reversible_equals_store(rev, x)
    rev.blocks = Net(width=8).double().blocks
    rev.blocks[2].norm = nn.BatchNorm1d(8).double()
    assert_reversible_equals_store(rev, x)


def test_leaf_hooks_run() -> None:
    rev = rewired(Net())
    calls: list[str] = []
    handle = rev.get_submodule("blocks.1.inner").register_forward_hook(
        lambda *_: calls.append("forward")
    )
    with torch.no_grad():
        rev(X)
    assert calls == ["forward"]
    handle.remove()


def through_pickle(module: nn.Module) -> nn.Module:
    restored = pickle.loads(pickle.dumps(module))
    assert isinstance(restored, nn.Module)
    return restored


def through_save(module: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    restored = torch.load(buffer, weights_only=False)
    assert isinstance(restored, nn.Module)
    return restored


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_save])
@pytest.mark.parametrize("mode", [True, False])
def test_copies(copied: Callable[[nn.Module], nn.Module], mode: bool) -> None:
    rev = rewired(Modal().double()).train(mode)
    rev.meta["note"] = "kept"
    other = copied(rev)
    assert isinstance(other, re2fx.RewiredModule)
    assert other.plan == rev.plan
    assert other.meta == {"note": "kept"}
    assert not {p.data_ptr() for p in other.parameters()} & {p.data_ptr() for p in rev.parameters()}
    x = X.double()
    assert_same(step(other, "reversible", x), step(rev, "reversible", x), 0)
    other.train(not mode)
    assert rev.training == mode


def test_moving_and_casting() -> None:
    class WithConstant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])

        def forward(self, x: Tensor) -> Tensor:
            for mix in self.mix:
                x = x + mix(x) * torch.tensor([1.0, 2.0, 3.0, 4.0])
            return x

    model = WithConstant()
    rev = rewired(model)
    assert not [name for name in vars(model) if "constant" in name]
    assert list(rev.state_dict()) == list(model.state_dict())
    assert rev(X).dtype == torch.float32
    assert rev.double()(X.double()).dtype == torch.float64
    rev.half()
    assert next(model.parameters()).dtype == torch.float16
    assert rev.to("meta")(X.half().to("meta")).shape == (5, 4)


def test_channels_last_is_kept() -> None:
    rev = rewired(ConvNet())
    x = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    rev.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert_reversible_equals_store(rev, x, tolerance=1e-4)
    out = step(rev, "reversible", x).gradients["input 0"]
    reference = step(rev, "store", x).gradients["input 0"]
    assert out is not None
    assert reference is not None
    assert out.stride() == reference.stride()


@pytest.mark.parametrize("batch", [0, 1, 7])
def test_any_batch_size(batch: int) -> None:
    rev = rewired(Tapped().double())
    x, context = torch.randn(2, batch, 8, dtype=torch.float64)
    if batch:
        assert_reversible_equals_store(rev, x, context)
    else:
        assert rev(x, context)[1]["side"].shape == (0, 2)


def test_it_is_a_graph_module() -> None:
    rev = rewired(Net())
    assert isinstance(rev, torch.fx.GraphModule)
    readable = rev.print_readable(print_output=False)
    assert "self.blocks" in readable
    assert "test_" not in readable
    rev.graph.lint()
    assert inspect.signature(rev.forward) == inspect.signature(rev.forward)
    assert list(inspect.signature(rev.forward).parameters) == ["x"]
    assert type(rev).__name__ == "Net"
    assert "self.blocks" in str(rev)
    assert repr(rev).startswith("Net(\n  (stem): Linear")


def test_an_edited_graph_runs_after_recompile() -> None:
    rev = rewired(Net().double())
    for node in rev.graph.nodes:
        if node.op == "call_function" and node.target is F.gelu:
            node.target = F.silu
    rev.recompile()
    assert "silu" in rev.code
    assert_reversible_equals_store(rev, X.double())


def test_under_torch_compile_it_is_correct_and_stores() -> None:
    rev = rewired(Net().double())
    expected = step(rev, "reversible", X.double())
    try:
        rev.compile(backend="eager", fullgraph=True)
        with pytest.warns(re2fx.Re2fxWarning, match="stores the activations"):
            got = step(rev, "reversible", X.double())
        assert_same(got, expected, 1e-11)
    finally:
        torch.compiler.reset()


def assert_close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b)
