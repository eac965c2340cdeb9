"""Two ways to a graph behind one door."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections import namedtuple
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import re2fx
from re2fx.outputs import OutputSpec, build

from .compare import assert_reversible_equals_store
from .models import ConvNet, Net

X = torch.randn(3, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Pair = namedtuple("Pair", ["first", "second"])


@pytest.fixture(autouse=True)
def fresh() -> Any:
    yield
    torch.compiler.reset()


@dataclasses.dataclass
class Output:
    """What a model of one's own may return."""

    logits: Tensor
    sizes: tuple[int, str]
    hidden: list[Tensor] | None = None


class Branching(nn.Module):
    """Control flow on sizes and optional arguments: no symbolic tracing."""

    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        self.net = Net(depth)
        self.config = {"depth": depth}

    def forward(self, x: Tensor, *, mask: Tensor | None = None, wide: bool = False) -> Output:
        if x.shape[1] > 100:
            x = x.mean(1, keepdim=True)
        x = x.reshape(len(x) * x.shape[1], -1).reshape(x.shape)
        if mask is not None:
            x = x * mask
        x = self.net.stem(x)
        for block in self.net.blocks:
            x = block(x)
        positions = torch.arange(x.shape[1], device=x.device).to(x.dtype)
        return Output(self.net.head(x) + positions[:, None], (7, "b"), [x, x] if wide else None)

    def helper(self) -> Tensor:
        """Beside forward; calls it through self."""
        return self(X).logits


def model() -> Branching:
    torch.manual_seed(0)
    return Branching().double().train()


def test_auto_takes_the_route_that_goes_through() -> None:
    given = model()
    with pytest.raises(re2fx.CaptureError, match=r"Or pass example_inputs=, and Dynamo is tried"):
        re2fx.transform(given)
    rev = re2fx.transform(given, X)
    assert isinstance(rev, re2fx.RewiredModule)
    assert [len(chain) for chain in rev.plan.chains] == [4]
    reference = re2fx.transform(given.net)
    got = rev(X)
    assert isinstance(got, Output)
    assert (got.sizes, got.hidden) == ((7, "b"), None)
    positions = torch.arange(5, dtype=torch.float64)[:, None]
    torch.testing.assert_close(got.logits, reference(X) + positions, rtol=0, atol=1e-12)


def test_symbolic_tracing_goes_first_where_it_loses_nothing() -> None:
    rev = re2fx.transform(Net(), torch.randn(3, 4))
    assert any(node.op == "call_module" for node in rev.graph.nodes)  # type: ignore[union-attr]


def test_both_routes_make_the_same_network() -> None:
    torch.manual_seed(0)
    net = Net(5, dropout=0.0).double()
    x = X.requires_grad_(False)
    symbolic = re2fx.transform(net, x, capture="symbolic")
    dynamo = re2fx.transform(net, x, capture="dynamo")
    assert isinstance(symbolic, re2fx.RewiredModule)
    assert isinstance(dynamo, re2fx.RewiredModule)
    assert symbolic.plan.signature() == dynamo.plan.signature()
    torch.testing.assert_close(symbolic(x), dynamo(x), rtol=0, atol=1e-12)
    assert_reversible_equals_store(dynamo, x)


@pytest.mark.parametrize("shape", [(2, 7, 4), (5, 2, 4), (8, 30, 4)])
def test_sizes_may_vary(shape: tuple[int, ...]) -> None:
    given = model()
    rev, reference = re2fx.transform(given, X), re2fx.transform(given.net)
    x = torch.randn(shape, dtype=torch.float64)
    positions = torch.arange(shape[1], dtype=torch.float64)[:, None]
    torch.testing.assert_close(rev(x).logits, reference(x) + positions, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.randn(2, 120, 4).double(), "may take another path there"),
        (torch.randn(2, 1, 4).double(), "sizes below 2"),
        (torch.randn(2, 5, 6).double(), "dimension 2 of x of size 4, and called with"),
        (torch.randn(2, 5, 4), "torch.float64, and called with .* of torch.float32"),
        (torch.randn(5, 4).double(), "3 dimensions"),
    ],
)
def test_other_sizes_are_no_case_for_the_graph(x: Tensor, message: str) -> None:
    rev = re2fx.transform(model(), X)
    rev.recompile()  # type: ignore[operator] # as if edited
    with pytest.raises(re2fx.InputError, match=message):
        rev(x)


class Doubled(Branching):
    """One input is twice as long as the other."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        if y.shape[1] != 2 * x.shape[1]:
            return x
        out: Tensor = self.net(x + y[:, ::2])
        return out


@pytest.mark.parametrize("swapped", [False, True])
def test_sizes_that_depend_on_each_other(swapped: bool) -> None:
    class Order(Doubled):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(b, a) if swapped else super().forward(a, b)

    def order(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return (y, x) if swapped else (x, y)

    given = Order().double()
    x, y = X, torch.cat([X, X], 1)
    rev, reference = re2fx.transform(given, order(x, y)), re2fx.transform(given.net)
    torch.testing.assert_close(rev(*order(x, y)), reference(x + y[:, ::2]))
    longer = torch.cat([x, x[:, :2]], 1)
    double = torch.cat([longer, longer], 1)
    torch.testing.assert_close(rev(*order(longer, double)), reference(longer + double[:, ::2]))
    rev.recompile()  # type: ignore[operator]
    with pytest.raises(re2fx.InputError):
        rev(*order(longer, y))


def test_sizes_that_a_pooling_depends_on() -> None:
    """Dynamo asks whether sizes are unequal, which is written ``Ne(a, b)``."""
    torch.manual_seed(0)
    given = nn.Sequential(nn.MaxPool2d(3, 2, 1), ConvNet()).double()
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    rev, reference = re2fx.transform(given, x, capture="dynamo"), re2fx.transform(given)
    for part in (x, x[:3], x[..., :7], x[..., :6, :]):
        torch.testing.assert_close(rev(part), reference(part), rtol=0, atol=1e-12)


def test_optional_arguments_are_those_of_the_example() -> None:
    given, mask = model(), torch.ones(3, 5, 4).double()
    rev = re2fx.transform(given, {"x": X, "mask": mask, "wide": True})
    got = rev(X, mask=mask, wide=True)
    assert got.hidden[0] is got.hidden[1]
    plain = re2fx.transform(given, X)
    torch.testing.assert_close(got.logits, plain(X).logits)
    plain.recompile()  # type: ignore[operator]
    with pytest.raises(re2fx.InputError, match="mask"):
        plain(X, mask=mask)


def test_one_tensor_twice_is_two_inputs() -> None:
    class Two(Branching):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
            if x.shape[0] > 100:
                return x
            out: Tensor = self.net(x + 2 * y)
            return out

    rev = re2fx.transform(Two().double(), (X, X))
    x, y = torch.randn(2, 2, 3, 4, dtype=torch.float64)
    torch.testing.assert_close(rev(x, y), rev(x + 2 * y, torch.zeros_like(y)))


def test_the_result_is_of_the_models_class_and_has_what_it_has() -> None:
    given = model()
    rev = re2fx.transform(given, X)
    assert isinstance(rev, Branching)
    assert rev.config is given.config
    torch.testing.assert_close(rev.helper(), rev(X).logits)
    assert not torch.allclose(rev.helper(), given.helper())
    with pytest.raises(AttributeError, match="nothing"):
        rev.nothing  # noqa: B018


def test_the_device_of_the_example_is_not_written_in() -> None:
    class Placing(Branching):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            if x.shape[0] > 100:
                return x
            y = self.net(x.to(x.device))
            out: Tensor = y + torch.arange(3, device=y.device).to(y.device, y.dtype)
            return out

    given = Placing().to("meta")
    rev: Any = re2fx.transform(given, X.float().to("meta"), capture="dynamo")
    rev.to_empty(device="cpu")
    for parameter in rev.parameters():
        nn.init.normal_(parameter)
    assert rev(X.float()).device.type == "cpu"


class Peculiar(Net):
    """Its class has opinions on how it is made, changed and derived from."""

    strict = False

    def __new__(cls, depth: int) -> Peculiar:
        made: Peculiar = super().__new__(cls)
        return made

    def __init__(self, depth: int) -> None:
        super().__init__(depth)
        self.sealed = True

    def __setattr__(self, name: str, value: Any) -> None:
        if vars(self).get("sealed") and name.startswith("_re"):
            raise AttributeError(name)
        super().__setattr__(name, value)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        if Peculiar.strict:
            raise RuntimeError("final")

    @property
    def depth(self) -> int:
        return len(self.blocks)


@pytest.mark.parametrize("strict", [False, True], ids=["open", "final"])
def test_classes_with_opinions(strict: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Peculiar, "strict", strict)
    given = Peculiar(3)
    rev = re2fx.transform(given)
    assert isinstance(rev, Peculiar) is not strict
    assert strict or rev.depth == 3
    rev(torch.randn(2, 4)).sum().backward()


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_gradients(training: bool) -> None:
    given = model()
    rev = re2fx.transform(given, X).train(training)
    assert isinstance(rev, re2fx.RewiredModule)
    gradients: dict[str, list[Tensor | None]] = {}
    for rev.memory in ("store", "reversible"):
        rev.zero_grad()
        rev(X).logits.square().mean().backward()
        gradients[rev.memory] = [p.grad for p in given.parameters()]
    torch.testing.assert_close(gradients["reversible"], gradients["store"], rtol=1e-10, atol=1e-14)


def through_pickle(module: nn.Module) -> nn.Module:
    restored: nn.Module = pickle.loads(pickle.dumps(module))
    return restored


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle])
def test_copies(copied: Any) -> None:
    rev = re2fx.transform(model(), X)
    other = copied(rev)
    assert isinstance(other, Branching)
    torch.testing.assert_close(other(X).logits, rev(X).logits, rtol=0, atol=0)
    assert other.state_dict().keys() == rev.state_dict().keys()


def test_a_deep_graph_is_pickled() -> None:
    rev = re2fx.transform(Net(depth=300))
    assert len(through_pickle(rev).graph.nodes) == len(rev.graph.nodes)  # type: ignore[union-attr,arg-type]


class Scale(torch.autograd.Function):
    """Its gradient is not that of its forward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return 5 * grads[0]


class Custom(nn.Module):
    """A residual inside a part whose custom function stops symbolic tracing."""

    def __init__(self) -> None:
        super().__init__()
        self.mixes = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sin(x)
        for mix in self.mixes:
            x = x + torch.tanh(Scale.apply(mix(x)))
        return x


# Dynamo makes one of its own.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_custom_backward_is_kept() -> None:
    given = nn.Sequential(Custom()).double()
    rev = re2fx.transform(given, X)
    assert isinstance(rev, re2fx.RewiredModule)
    assert [len(chain) for chain in rev.plan.chains] == [3]
    mixes = given.get_submodule("0.mixes").children()
    stored = re2fx.transform(nn.Sequential(Sine(), *map(Residual, mixes)), X)
    for module in (rev, stored):
        given.zero_grad()
        module(X).square().mean().backward()
        gradients = [p.grad.clone() for p in given.parameters() if p.grad is not None]
        if module is rev:
            first = gradients
    torch.testing.assert_close(first, gradients, rtol=1e-10, atol=1e-14)


class Sine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x)


class Part(nn.Module):
    """A branch with the custom function, kept whole by symbolic tracing."""

    def __init__(self, mix: nn.Module) -> None:
        super().__init__()
        self.mix = mix

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.tanh(Scale.apply(self.mix(x)))
        return out


class Residual(nn.Module):
    def __init__(self, mix: nn.Module) -> None:
        super().__init__()
        self.part = Part(mix)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.part(x)
        return out


def test_hooks_are_captured_where_tracing_would_lose_them() -> None:
    def double(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        return 2 * out

    given = Net(3).double()
    given.blocks[1].register_forward_hook(double)
    rev = re2fx.transform(given, X)
    with_hook = rev(X)
    given.blocks[1]._forward_hooks.clear()
    plain = re2fx.transform(given, X)
    assert not torch.allclose(with_hook, plain(X))
    torch.testing.assert_close(rev(X), plain(X))
    given.blocks[1].register_forward_hook(double)
    with pytest.warns(re2fx.Re2fxWarning, match=r"hooks registered on blocks\.1 will not run"):
        re2fx.transform(given)


def test_a_forward_that_assigns_to_the_model_is_no_case_for_dynamo() -> None:
    class Assigning(Branching):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            if x.shape[0] > 100:
                return x
            self.last = self.net(x)
            return self.last

    given = Assigning().double()
    with pytest.raises(re2fx.CaptureError, match=r"assigns tensors to Assigning\.last"):
        re2fx.transform(given, X, capture="dynamo")
    assert "last" not in vars(given)


def test_the_error_of_all_routes_names_the_lines() -> None:
    class Values(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(re2fx.CaptureError) as caught:
        re2fx.transform(Values(), X)
    text = str(caught.value)
    assert "cannot be captured by any route" in text
    symbolic, dynamo = text.split("\n  dynamo: ")
    assert f"{__file__}:" in symbolic
    assert "test_routes.py" in dynamo


def test_an_unknown_route() -> None:
    with pytest.raises(re2fx.OptionError, match="capture='trace': expected one of 'auto'"):
        re2fx.transform(Net(), capture="trace")


def test_nothing_of_the_users_is_touched() -> None:
    given = model()
    given.net.blocks[0].eval()
    flags = [m.training for m in given.modules()]
    state = torch.get_rng_state()
    settings = torch._dynamo.config.specialize_float
    re2fx.transform(given, X)
    assert [m.training for m in given.modules()] == flags
    assert torch.equal(torch.get_rng_state(), state)
    assert torch._dynamo.config.specialize_float == settings
    assert X._version == 0
    assert not vars(X)


@pytest.mark.parametrize(
    "make",
    [
        lambda a, b: a,
        lambda a, b: (a, [b, None], {"k": a}),
        lambda a, b: Pair(a, b),
        lambda a, b: Output(a, (1, "s"), [b]),
        lambda a, b: {"o": Output(a, (1, "s"), None), "n": 3},
    ],
)
def test_outputs(make: Any) -> None:
    a, b, c, d = (torch.zeros(1) for _ in range(4))
    got = build(OutputSpec.of(make(a, b), [a, b]), [c, d])
    wanted = make(c, d)
    assert type(got) is type(wanted)
    assert repr(got) == repr(wanted)
    leaves: list[Any] = []
    from re2fx.outputs import replaced

    replaced(got, leaves.append)
    assert any(leaf is c for leaf in leaves)
    assert not any(leaf is a for leaf in leaves)


class Cache:
    """No container that pytree knows."""

    def __init__(self) -> None:
        self.keys: list[Tensor] = []


class Caching(nn.Module):
    """Collects keys on its way, and returns them or not."""

    def __init__(self, returned: bool) -> None:
        super().__init__()
        self.mixes = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
        self.returned = returned

    def forward(self, x: Tensor, cache: Any = None) -> Any:
        if len(x) > 100:
            return x
        cache = Cache()
        for mix in self.mixes:
            key = mix(x)
            cache.keys.append(key)
            x = x + torch.tanh(key)
        return (x, cache) if self.returned else x


def test_what_is_not_returned_is_no_output() -> None:
    rev = re2fx.transform(Caching(False).double(), X, capture="dynamo")
    assert [len(chain) for chain in rev.plan.chains] == [3]  # type: ignore[union-attr]
    assert_reversible_equals_store(rev, X)
    with pytest.raises(re2fx.CaptureError, match=r"it returns a Cache, which holds tensors"):
        re2fx.transform(Caching(True).double(), X, capture="dynamo")


def test_a_returned_value_of_a_branch_is_said_to_be_returned() -> None:
    class Telling(Caching):
        def forward(self, x: Tensor, cache: Any = None) -> Any:
            x, cache = super().forward(x)
            return x, cache.keys

    model = Telling(True).double()
    refusals = re2fx.explain(model, X, capture="dynamo").plan.refusals
    assert {refusal.rule for refusal in refusals} == {"branch used outside"}
    assert "the model returns a value from inside the branch" in refusals[0].sentence
