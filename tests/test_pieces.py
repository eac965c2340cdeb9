"""Models that no route captures as a whole: their largest submodules that can be, in place."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import random
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import re2fx
from re2fx.observe import observe
from re2fx.twins import make_twin

from .compare import assert_reversible_equals_store, step
from .models import Block, ConvNet, Net

X = torch.randn(3, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def fresh() -> Any:
    yield
    torch.compiler.reset()


class Layer(nn.Module):
    """Two residuals."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first, self.second = Block(width, 0.1), Block(width, 0.1)

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        x = self.first(x)
        if shift is not None:
            x = x * shift
        out: Tensor = self.second(x)
        return out


class Dropping(nn.Module):
    """LayerDrop."""

    def __init__(self, depth: int = 4, layer: Callable[[], nn.Module] = Layer) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 8)
        self.layers = nn.ModuleList([layer() for _ in range(depth)])
        self.head = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 3))
        self.calls: Tensor
        self.register_buffer("calls", torch.zeros(1, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = self.stem(x)
        for layer in self.layers:
            if self.training and torch.rand([]) < 0.3:
                continue
            x = layer(x)
        out: Tensor = self.head(x)
        return out


class Finite(Net):
    """A check of values in the middle."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x))
        if not torch.isfinite(x).all():
            x = x.clamp(-1e4, 1e4)
        out: Tensor = self.head(x)
        return out


class Middle(nn.Module):
    """Two stages with a branch on values between them, of the second's type on both sides."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 8)
        self.stages = nn.ModuleList([Layer(), Layer(), Layer()])

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.stages[0](self.stem(x))
        x = self.stages[1](x) if x.mean() > 0 else self.stages[2](-x)
        return {"out": x}


class Nested(nn.Module):
    """A model that cannot be captured inside another."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Dropping()
        self.decoder = nn.Sequential(nn.Linear(3, 8), Layer(), Finite(3, 8))
        self.decoder[2].stem = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.encoder(x)
        return self.decoder(x if bool((x.sum() > 0).item()) else -x)


class Statistics(nn.Module):
    """Batch norm in the chains, and images."""

    def __init__(self) -> None:
        super().__init__()
        self.net = ConvNet(4, dropout=0.1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x / x.std() if x.std() > 10 else x)
        return out


def made(kind: Callable[[], nn.Module]) -> Any:
    torch.manual_seed(0)
    return kind().double().train()


def pieces(model: nn.Module, x: Any = X, **options: Any) -> Any:
    rev = re2fx.transform(model, x, **options)
    assert isinstance(rev, re2fx.PiecewiseModule)
    return rev


MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor, dict[str, list[int]]]] = {
    "layer drop": (Dropping, X, {f"layers.{i}": [2] for i in range(4)}),
    "finite": (Finite, X, {"blocks": [4]}),
    "middle": (Middle, X, {f"stages.{i}": [2] for i in range(2)}),
    "nested": (
        Nested,
        X,
        {**{f"encoder.layers.{i}": [2] for i in range(4)}, "decoder": [2], "decoder.2.blocks": [3]},
    ),
    "statistics": (
        Statistics, torch.randn(2, 3, 6, 6, dtype=torch.float64,
                                generator=torch.Generator().manual_seed(1)), {"net": [4]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_the_largest_submodules_are_rewired(name: str) -> None:
    kind, x, wanted = MODELS[name]
    model = made(kind)
    rev = pieces(model, x)
    assert isinstance(rev, kind)  # type: ignore[arg-type]
    assert {p: [len(c) for c in piece.plan.chains] for p, piece in rev.pieces.items()} == wanted
    assert_reversible_equals_store(rev, x)
    assert_reversible_equals_store(rev.eval(), x)


@pytest.mark.parametrize("name", MODELS)
def test_around_its_pieces_it_is_the_given_network(name: str) -> None:
    kind, x, paths = MODELS[name]
    model = made(kind)
    rev, other = pieces(model, x), copy.deepcopy(model)
    for path in sorted(paths, key=len, reverse=True):
        parent, _, child = path.rpartition(".")
        part = re2fx.transform(other.get_submodule(path), leaves=[Finite])
        setattr(other.get_submodule(parent), child, part)
    for mode in (True, False):
        rev.train(mode)
        other.train(mode)
        torch.manual_seed(5)
        expected = other(x)
        torch.manual_seed(5)
        torch.testing.assert_close(rev(x), expected, rtol=1e-12, atol=1e-12)
        trained = gradients(rev, x)
        assert trained == gradients(other, x)
        if kind is not Middle:  # which takes another way where its values have another sign
            assert trained == gradients(copy.deepcopy(model), x)


def gradients(model: nn.Module, x: Tensor) -> set[str]:
    """The parameters that get a gradient."""
    model.zero_grad()
    torch.manual_seed(5)
    output = model(x)
    sum(leaf.sum() for leaf in torch.utils._pytree.tree_leaves(output)).backward()
    return {name for name, p in model.named_parameters() if p.grad is not None}


def test_other_sizes() -> None:
    rev = pieces(made(Dropping))
    assert_reversible_equals_store(rev, torch.randn(2, 7, 4).double())


def test_nothing_of_the_given_model_changes() -> None:
    import numpy

    model = made(Dropping)
    model.layers[1].eval()
    model.head.register_forward_hook(lambda module, args, out: None)
    before = [(m, dict(vars(m)), dict(m._modules), m.training) for m in model.modules()]
    hooks = [dict(m._forward_hooks) for m in model.modules()]
    states = torch.get_rng_state(), random.getstate(), str(numpy.random.get_state())
    re2fx.transform(model, X)
    assert [(m, dict(vars(m)), dict(m._modules), m.training) for m in model.modules()] == before
    assert [dict(m._forward_hooks) for m in model.modules()] == hooks
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert model.calls == 0
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (random.getstate(), str(numpy.random.get_state()))


def test_members_are_shared() -> None:
    model = made(Nested)
    rev = pieces(model)
    assert list(rev.state_dict()) == list(model.state_dict())
    for (name, p), (other, q) in zip(rev.named_parameters(), model.named_parameters(), strict=True):
        assert name == other
        assert p is q
    assert [id(b) for b in rev.buffers()] == [id(b) for b in model.buffers()]
    assert rev.encoder.head is model.encoder.head
    assert rev.encoder is not model.encoder
    rev.load_state_dict(made(Nested).state_dict())
    model.load_state_dict(rev.state_dict(), assign=True)
    assert next(rev.parameters()) is next(model.parameters())


def test_modes_are_shared() -> None:
    model = made(Nested)
    rev = pieces(model)
    for changed, other in ((rev, model), (model, rev)):
        changed.eval()
        assert not any(m.training for m in (*changed.modules(), *other.modules()))
        changed.train()
        assert all(m.training for m in (*changed.modules(), *other.modules()))
    rev.encoder.eval()
    assert not model.encoder.layers[0].first.training
    assert model.decoder.training


def test_moving() -> None:
    rev = pieces(made(Dropping)).float()
    assert {p.dtype for p in rev.parameters()} == {torch.float32}
    assert rev.eval()(X.float()).dtype == torch.float32


def test_memory_is_set_for_all() -> None:
    rev = pieces(made(Dropping))
    assert rev.memory == "reversible"
    rev.memory = "store"
    assert {piece.memory for piece in rev.pieces.values()} == {"store"}
    rev.pieces["layers.1"].memory = "reversible"
    with pytest.raises(re2fx.OptionError, match=r"'store' for layers\.0 and 'reversible' for"):
        rev.memory  # noqa: B018
    with pytest.raises(re2fx.OptionError, match="memory='none'"):
        rev.memory = "none"


def test_it_saves_memory() -> None:
    from re2fx.memory import saved_bytes

    model = made(lambda: Finite(12))
    rev = pieces(model)
    stored = saved_bytes(lambda: model(X), model).total
    assert saved_bytes(lambda: rev(X), model).total < stored / 4


def through_pickle(module: nn.Module) -> nn.Module:
    restored: nn.Module = pickle.loads(pickle.dumps(module))
    return restored


def through_file(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    restored: nn.Module = torch.load(file, weights_only=False)
    return restored


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_file])
def test_copies(copied: Any) -> None:
    rev = pieces(made(Nested)).eval()
    other = copied(rev)
    assert isinstance(other, Nested)
    assert isinstance(other, re2fx.PiecewiseModule)
    assert other.plan == rev.plan
    assert other.account == rev.account
    torch.testing.assert_close(other(X), rev(X), rtol=0, atol=0)
    assert not {id(p) for p in other.parameters()} & {id(p) for p in rev.parameters()}
    other.train()
    assert other.encoder.layers[0].training
    assert not rev.encoder.layers[0].training
    assert_reversible_equals_store(other, X)


class Referring(Dropping):
    """Refers to its modules in other ways than as children."""

    def __init__(self, way: str) -> None:
        super().__init__(2)
        self.way = way
        layers = self.layers
        ways: dict[str, Any] = {
            "list": [layers[0]],
            "tuple": (layers[0],),
            "dict": {"a": {"b": layers[0]}},
            "set": {layers[0]},
            "plain": None,
            "method": layers[0].forward,
            "partial": partial(layers[0], shift=None),
            "weak": weakref.ref(layers[0]),
            "root": [self],
            "sibling": None,
        }
        if way == "plain":
            object.__setattr__(self, "kept", layers[0])
        else:
            self.kept = ways[way]
        self.back = nn.Linear(8, 8)
        vars(self.back)["owner"] = [self.layers]

    def first(self) -> Any:
        if self.way == "set":
            return next(iter(self.kept))
        if self.way == "weak":
            return self.kept()
        if self.way == "root":
            return self.kept[0].layers[0]
        if self.way == "sibling":
            return self.back.owner[0][0]  # type: ignore[index]
        kept = self.kept
        if self.way == "dict":
            return kept["a"]["b"]
        return kept[0] if self.way in ("list", "tuple") else kept

    def forward(self, x: Tensor) -> Tensor:
        x = self.back(self.stem(x))
        if x.sum() > 1e9:
            return x
        x = self.first()(x)
        out: Tensor = self.head(self.layers[1](self.layers[0](x)))
        return out


@pytest.mark.parametrize(
    "way",
    ["list", "tuple", "dict", "set", "plain", "method", "partial", "weak", "root", "sibling"],
)
def test_other_references_are_those_of_the_twin(way: str) -> None:
    model = made(lambda: Referring(way)).eval()
    rev = pieces(model)
    assert list(rev.pieces) == ["layers.0", "layers.1"]
    layers = rev.layers
    stem = rev.back(rev.stem(X))
    expected = rev.head(layers[1](layers[0](layers[0](stem))))
    torch.testing.assert_close(rev(X), expected, rtol=0, atol=1e-14)
    assert not torch.allclose(rev(X), model(X))
    torch.testing.assert_close(copy.deepcopy(rev)(X), expected, rtol=0, atol=1e-14)


def test_hooks_of_the_modules_around_run() -> None:
    class Noting(Dropping):
        def note(self, module: nn.Module, args: Any) -> None:
            self.noted = (self, module)

    model = made(Noting)
    model.register_forward_pre_hook(model.note)
    rev = pieces(model)
    rev(X)
    assert rev.noted == (rev, rev)
    assert "noted" not in vars(model)
    rev.register_forward_hook(lambda module, args, out: 2 * out)
    assert not model._forward_hooks


def test_a_piece_whose_hooks_would_be_lost_is_opened_or_captured_with_them() -> None:
    def double(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        return 2 * out

    model = made(lambda: Dropping(2))
    model.layers[0].register_forward_hook(double)
    rev = pieces(model).eval()
    stem = rev.stem(X)
    plain = pieces(made(lambda: Dropping(2))).eval()
    torch.testing.assert_close(rev.layers[0](stem), 2 * plain.layers[0](stem))


@pytest.mark.parametrize("kind", ["closure", "object"])
def test_what_cannot_be_followed_is_told(kind: str) -> None:
    class Helper:
        def __init__(self, model: nn.Module) -> None:
            self.model = model

    model = made(Dropping)
    layers = model.layers
    model.helper = Helper(model) if kind == "object" else lambda x: layers[0](x)
    with pytest.warns(re2fx.Re2fxWarning, match=r"Dropping\.helper refers to the model as it was"):
        re2fx.transform(model, X)


def test_a_submodule_under_two_names_is_one() -> None:
    model = made(lambda: Dropping(3))
    model.layers[2] = model.layers[0]
    rev = pieces(model)
    assert rev.layers[2] is rev.layers[0]
    assert list(rev.state_dict()) == list(model.state_dict())
    assert_reversible_equals_store(rev, X)


class Two(Dropping):
    """Calls its layers in two ways."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if x.sum() > 1e9:
            return x
        x = self.layers[1](self.layers[0](x, torch.ones(8).double()))
        out: Tensor = self.head(self.layers[0](x))
        return out


def test_calls_of_two_structures_are_no_piece() -> None:
    model = made(lambda: Two(2))
    rev = pieces(model)
    assert list(rev.pieces) == ["layers.1"]
    assert "its calls differ in structure" in rev.account.left["layers.0"]
    assert_reversible_equals_store(rev, X)


def test_a_call_that_would_be_rewired_differently_is_an_error() -> None:
    rev = pieces(made(Dropping))
    x = rev.stem(X)
    with pytest.raises(re2fx.ModeMismatchError, match=r"Layer was captured with shift=None"):
        rev.layers[0](x, torch.ones(8).double())


class Box:
    """No value that could be compared."""


def test_an_opaque_argument_is_no_constant() -> None:
    class Boxed(Layer):
        def forward(self, x: Tensor, box: Any = None) -> Tensor:
            return super().forward(x)

    class Handing(Dropping):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            if x.sum() > 1e9:
                return x
            for layer in self.layers:
                x = layer(x, box=Box())
            return self.head(x)

    model = made(lambda: Handing(2, Boxed))
    with pytest.raises(
        re2fx.CaptureError, match=r"submodule layers\.0: the argument box holds a Box"
    ):
        re2fx.transform(model, X)


def test_the_error_when_all_fail_names_the_lines_of_all() -> None:
    class Values(Layer):
        def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
            x = super().forward(x)
            return x if x.sum() > 0 else -x

    model = made(lambda: Dropping(3, Values))
    with pytest.raises(re2fx.CaptureError) as caught:
        re2fx.transform(model, X)
    text = str(caught.value)
    assert "  symbolic: Dropping cannot be traced symbolically at " in text
    assert "  dynamo: Data-dependent branching" in text
    for number in range(3):
        assert f"  submodule layers.{number}: symbolic: Values cannot be traced" in text
    assert text.count("test_pieces.py") >= 4


def test_a_class_that_keeps_failing_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from re2fx import pieces as module

    class Values(Layer):
        def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
            x = super().forward(x)
            return x if x.sum() > 0 else -x

    tried = []
    original = module.Search.replace

    def replace(self: Any, path: str, *rest: Any) -> bool:
        tried.append(path)
        return original(self, path, *rest)

    monkeypatch.setattr(module.Search, "replace", replace)
    model = made(lambda: Dropping(4, Values))
    with pytest.raises(re2fx.CaptureError):
        re2fx.transform(model, X)
    assert [path for path in tried if path.count(".") == 1] == ["layers.0", "layers.1"]


def test_a_model_that_does_not_run_on_its_examples() -> None:
    with pytest.raises(re2fx.CaptureError, match=r"does not run on example_inputs=.*in train mode"):
        re2fx.transform(made(Dropping), torch.randn(2, 3).double())


def test_without_examples_the_whole_is_all_there_is() -> None:
    with pytest.raises(re2fx.CaptureError, match="Or pass example_inputs="):
        re2fx.transform(made(Dropping))
    with pytest.raises(re2fx.CaptureError, match="cannot be traced symbolically"):
        re2fx.transform(made(Dropping), X, capture="symbolic")


def test_paths_of_options_are_those_of_the_whole() -> None:
    model = made(Nested)
    rev = pieces(model, select="encoder.*", leaves=["encoder.layers.2", Finite])
    assert list(rev.pieces) == [f"encoder.layers.{i}" for i in (0, 1, 3)]
    part = re2fx.transform(model, X, select=lambda r: r.location.module.startswith("decoder.1"))
    assert [len(chain) for chain in re2fx.explain(part).plan.chains] == [2]
    modules = {r.location.module for chain in rev.plan.chains for r in chain.residuals}
    assert "encoder.layers.0.first" in modules
    with pytest.raises(re2fx.CaptureError, match="no other one makes 3 additions"):
        re2fx.transform(made(Dropping), X, min_chain=3)


def test_explanations() -> None:
    model = made(Nested)
    explanation = re2fx.explain(model, X)
    text = str(explanation)
    assert text.startswith("Nested: 13 skip-adds found: 13 rewired in 6 chains, 0 refused")
    assert (
        "captured by submodules: encoder.layers.0 .. decoder (6 of them), by symbolic tracing"
        in text
    )
    assert "captured by submodules, because symbolic failed: Nested cannot be traced" in text
    assert "captured by submodules, because dynamo failed: " in text
    assert "runs as it is written: encoder (symbolic: Dropping cannot be traced" in text
    plain = explanation.to_dict()
    assert plain["submodules"]["decoder.2.blocks"] == "symbolic"
    assert set(plain["submodules_left"]) == {"encoder", "decoder.2"}
    assert "Rewired by themselves" in explanation._repr_html_()
    assert str(re2fx.explain(pieces(model))) == text


def test_it_is_not_rewired_twice() -> None:
    with pytest.raises(re2fx.OptionError, match="is rewired already"):
        re2fx.transform(pieces(made(Dropping)), X)


class Part(nn.Module):
    """The middle of a residual: has residuals, and control flow on values."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(Layer(), nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        return torch.tanh(x) if bool(x.isfinite().all()) else x


class Holding(nn.Module):
    """A chain whose branches are traced but for a part that is kept whole."""

    def __init__(self, outside: bool) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 8)
        self.parts = nn.ModuleList([Part() for _ in range(3)])
        self.outside = outside

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for part in self.parts:
            x = part(x) if self.outside else x + part(x)
        return x


def test_parts_that_a_capture_keeps_whole_are_looked_into() -> None:
    model = made(lambda: Holding(False))
    rev = re2fx.transform(model, X)
    assert isinstance(rev, re2fx.RewiredModule)
    assert [len(chain) for chain in rev.plan.chains] == [3]
    inner = re2fx.explain(rev).plan.chains
    assert [len(chain) for chain in inner] == [3, 2, 2, 2]
    assert inner[1].residuals[0].location.module == "parts.0.inner.0.first"
    assert_reversible_equals_store(rev, X, tolerance=1e-10)
    rev.memory = "store"
    modules = [m for m in rev.modules() if isinstance(m, re2fx.RewiredModule)]
    assert [m.memory for m in modules] == ["store"] * 4
    assert "captured by submodules: parts.0.inner .. parts.2.inner" in str(re2fx.explain(model, X))
    assert list(rev.state_dict()) == list(model.state_dict())


def test_parts_of_a_captured_model_that_has_nothing_else() -> None:
    rev = pieces(made(lambda: Holding(True)))
    assert list(rev.pieces) == [f"parts.{i}.inner" for i in range(3)]
    assert_reversible_equals_store(rev, X)


def test_a_diff_is_one_of_a_piece() -> None:
    model = made(Finite)
    rev = pieces(model)
    for asked in (lambda: re2fx.diff(model, rev), lambda: re2fx.history(rev)):
        with pytest.raises(re2fx.OptionError, match=r"rev\.pieces\['blocks'\]"):
            asked()
    assert "9 nodes added" in str(re2fx.diff(model.blocks, rev.pieces["blocks"]))


def test_what_is_rewired_is_not_reported() -> None:
    with pytest.raises(re2fx.OptionError, match="rewired already"):
        re2fx.report(pieces(made(Finite)), X)


def test_verify() -> None:
    rev = pieces(made(Nested))
    torch.manual_seed(1)
    checked = re2fx.verify(rev, X)
    assert checked.ok, str(checked)
    assert checked.chains
    assert rev.memory == "reversible"


def test_verify_finds_a_branch_in_a_piece_that_does_not_repeat() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix, self.times = nn.Linear(8, 8), [0]

        def forward(self, x: Tensor) -> Tensor:
            self.times[0] += 1
            out: Tensor = self.mix(x) * self.times[0]
            return out

    class Growing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = Counting(), Counting()

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.a(x)
            out: Tensor = x + self.b(x)
            return out

    model = made(lambda: Dropping(2, Growing))
    rev = pieces(model, leaves=[Counting])
    checked = re2fx.verify(rev.eval(), X)
    assert not checked.ok
    assert "layers.0" in str(checked)


# Dynamo asks a stream for its gradient where it resumes.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_compiled() -> None:
    rev = pieces(made(Finite))
    compiled = torch.compile(rev, backend="re2fx", options={"compiler": "aot_eager"})
    expected = step(rev, "store", X)
    x = X.clone().requires_grad_()
    torch.manual_seed(0)
    rev.memory = "reversible"
    out = compiled(x)
    torch.testing.assert_close(out, expected.outputs[0], rtol=1e-12, atol=1e-12)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    (out * weights).sum().backward()
    for name, parameter in rev.named_parameters():
        torch.testing.assert_close(parameter.grad, expected.gradients[name])


def test_a_twin_goes_when_nobody_holds_it() -> None:
    model = made(Dropping)
    new = nn.Identity()
    twin = weakref.ref(make_twin(model, {model.layers[0]: new}))
    gc.collect()
    assert twin() is None


def test_what_is_observed() -> None:
    model = made(Dropping)
    seen = observe(model, X)
    (call,) = seen.calls["layers.1"]
    assert call.args[0].shape == (3, 5, 8)
    assert call.args[0].requires_grad
    assert seen.additions["layers.1"] == 2
    assert seen.additions["head"] == 0
    assert seen.failures == {}


def test_what_a_forward_assigns_while_it_is_traced_is_taken_back() -> None:
    class Remembering(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.last = Net(), None

        def forward(self, x: Tensor) -> Any:
            self.last = self.net(x)
            return self.last

    model = nn.Sequential(Remembering())
    with pytest.warns(re2fx.Re2fxWarning, match=r"Sequential assigns tensors to 0\.last"):
        re2fx.transform(model)
    assert model[0].last is None
