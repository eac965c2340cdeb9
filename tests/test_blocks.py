"""Whole blocks: norms and activations behind additions that stay where they are."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import re2fx
from re2fx import Coupling, OptionError
from re2fx.memory import live_bytes
from re2fx.torchvision_shim import ensure_torchvision

from .compare import assert_reversible_equals_store, assert_same, step
from .models import ConvNet
from .reference import combine
from .test_backend import EXECUTORS
from .test_backend import step as compiled_step

NEAR = Coupling.consistent(0.125)
RE2TAL = Coupling.re2tal()
X = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
IMAGE = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def fresh() -> Any:
    torch.manual_seed(0)
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Sublayer(nn.Module):
    """``norm(x + f(x))``."""

    def __init__(self, width: int = 6, dropout: float = 0.0) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.drop, self.norm = nn.Dropout(dropout), nn.LayerNorm(width)

    def branch(self, x: Tensor) -> Tensor:
        out: Tensor = self.drop(self.outer(torch.tanh(self.inner(x))))
        return out

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(x + self.branch(x))
        return out


class Layer(nn.Module):
    """Two residuals at different lines, each with a norm behind it."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.one, self.two = Sublayer(dropout=dropout), Sublayer(dropout=dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one.norm(x + self.one.branch(x))
        x = self.two.norm(x + self.two.branch(x))
        return x


class Encoder(nn.Module):
    """Post-norm layers between a stem and a head."""

    def __init__(self, make: Callable[[], nn.Module] = Layer, depth: int = 4) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(4, 6), nn.Linear(6, 3)
        self.layers = nn.ModuleList([make() for _ in range(depth)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        out: Tensor = self.head(x)
        return out


def noisy() -> Encoder:
    return Encoder(lambda: Layer(dropout=0.2))


def by_hand(model: Encoder, x: Tensor, coupling: Coupling, readout: str = "mean") -> Tensor:
    """``p_{i+1} = (a - c) p_i + b p_{i-1} + c T_i(p_i)``, layer by layer."""
    p = q = model.stem(x)
    a, b, c = coupling.a - coupling.c, coupling.b, coupling.c
    for layer in model.layers:
        p, q = combine((a, p), (b, q), (c, layer(p))), p
    out: Tensor = model.head((p + q) * 0.5 if readout == "mean" else p)
    return out


def plan_of(model: nn.Module, coupling: Coupling = NEAR, **options: Any) -> re2fx.Plan:
    return re2fx.explain(model, coupling=coupling, **options).plan


# which couplings


@pytest.mark.parametrize(
    ("coupling", "takes"),
    [
        (RE2TAL, False),
        (Coupling.consistent(0.5), False),
        (Coupling.consistent(0.34), False),
        (Coupling.consistent(0.33), True),
        (NEAR, True),
        (Coupling.momentum(0.9), True),
        (Coupling.original(), True),
        (Coupling.double(), False),
        (Coupling.bdia(), False),
    ],
)
def test_couplings_that_take_blocks(coupling: Coupling, takes: bool) -> None:
    assert coupling.takes_blocks is takes


@pytest.mark.parametrize("b", [0.3, 0.36, -0.9])
def test_where_a_block_forgets_the_streams_stay_bounded_or_not(b: float) -> None:
    """The recurrence itself, with a block that always gives 1."""
    coupling, p, q = Coupling.consistent(b).of_block(), 1.5, 1.0
    for _ in range(2000):
        p, q = coupling.step(p, q, 1.0), p
    settled = abs(p - 1.0) < 1e-6
    assert settled is Coupling.consistent(b).takes_blocks


def test_conditioning_takes_a_block_for_near_the_identity() -> None:
    assert NEAR.of_block().growth == pytest.approx(NEAR.growth) == pytest.approx(8)
    assert NEAR.of_block().gain == pytest.approx(NEAR.gain)
    assert str(NEAR.of_block()) == str(NEAR)


# the plan


def test_layers_are_the_blocks() -> None:
    plan = plan_of(Encoder())
    (chain,) = plan.chains
    assert [(r.block, len(r.inside)) for r in chain.residuals] == [(True, 1)] * 4
    assert (plan.rewired, plan.found, plan.refusals) == (8, 8, ())
    assert "4 blocks of 2 residuals" in str(plan)
    assert chain.residuals[0].kind == "whole block, 2 residuals"


def test_a_layer_as_one_block_and_as_two_are_told_apart() -> None:
    """Train and eval mode, and every capture, must agree on it."""
    plan = plan_of(Encoder())
    (chain,) = plan.chains
    apart = tuple(
        part
        for residual in chain.residuals
        for part in (
            replace(residual, inside=(), location=residual.inside[0].location),
            replace(residual, inside=()),
        )
    )
    assert plan.signature() != re2fx.Plan((replace(chain, residuals=apart),)).signature()


def test_residuals_of_one_line_are_a_block_each() -> None:
    plan = plan_of(Encoder(Sublayer))
    assert [len(chain) for chain in plan.chains] == [4]
    assert "4 residuals" in str(plan)


def test_a_coupling_that_takes_no_blocks_is_told_which_does() -> None:
    plan = plan_of(Encoder(), RE2TAL)
    assert {refusal.rule for refusal in plan.refusals} == {"post-norm"}
    assert str(plan).endswith("consistent(0.125), which takes whole blocks, norms included")
    assert "try coupling" not in str(plan_of(Encoder(), select="!layers.0*"))


class Looped(nn.Module):
    """Both residuals of a layer are written in one line."""

    def __init__(self) -> None:
        super().__init__()
        self.subs = nn.ModuleDict({"attention": Sublayer(), "mlp": Sublayer()})

    def forward(self, x: Tensor) -> Tensor:
        for sub in self.subs.values():
            x = sub(x)
        return x


@pytest.mark.parametrize("capture", ["symbolic", "dynamo", "export"])
def test_layers_are_told_by_their_norms_where_the_line_is_one(capture: str) -> None:
    plan = plan_of(Encoder(Looped), example_inputs=(X.float(),), capture=capture)
    assert [(len(c), len(c.residuals[0].inside)) for c in plan.chains] == [(4, 1)], str(plan)


class Tapped(Layer):
    """What is between its two residuals is read elsewhere."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.one.norm(x + self.one.branch(x))
        seen.append(x)
        x = self.two.norm(x + self.two.branch(x))
        return x


seen: list[Tensor] = []


class Pyramid(Encoder):
    """Returns what its layers are tapped for."""

    def __init__(self) -> None:
        super().__init__(Tapped, 3)

    def forward(self, x: Tensor) -> Any:
        seen.clear()
        return super().forward(x), torch.stack(seen)


def test_a_layer_that_is_read_in_its_middle_is_two_blocks() -> None:
    model = Pyramid().double()
    plan = plan_of(model)
    assert [len(chain) for chain in plan.chains] == [6]
    assert len(plan.chains[0].taps) == 3
    rev: Any = re2fx.transform(model, coupling=Coupling.original(), memory="store", readout="last")
    torch.testing.assert_close(rev(X), model(X), rtol=0, atol=0)
    assert_reversible_equals_store(re2fx.transform(model, coupling=NEAR), X, tolerance=1e-8)


class Looked(Sublayer):
    """The sum in front of the norm is read elsewhere too."""

    def forward(self, x: Tensor) -> Tensor:
        total = x + self.branch(x)
        seen.append(total)
        out: Tensor = self.norm(total)
        return out


class Scaled(Sublayer):
    """A norm whose scale is computed from the network's input."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = F.layer_norm(x + self.branch(x), (6,), seen[0].mean() + self.norm.weight)
        return out


class Conditioned(Encoder):
    """Its blocks read a value from outside behind their additions."""

    def __init__(self) -> None:
        super().__init__(Scaled)

    def forward(self, x: Tensor) -> Tensor:
        seen[:] = [x]
        return super().forward(x)


class Leaking(Encoder):
    """Its sums are returned."""

    def __init__(self) -> None:
        super().__init__(Looked)

    def forward(self, x: Tensor) -> Any:
        seen.clear()
        return super().forward(x), seen[0], seen[1], seen[2], seen[3]


def test_a_sum_that_is_read_elsewhere_closes_no_block() -> None:
    assert plan_of(Leaking()).rewired == 0


def test_side_inputs_behind_the_addition() -> None:
    """They are the block's: gradients reach them, and the block is run again with them."""
    model = Conditioned().double()
    (chain,) = plan_of(model).chains
    assert all(residual.side_inputs for residual in chain.residuals)
    assert_reversible_equals_store(re2fx.transform(model, coupling=NEAR), X, tolerance=1e-8)


@pytest.mark.parametrize(
    "behind",
    [
        lambda x: x @ torch.eye(6),
        lambda x: x * torch.ones(3, 1, 6),
        lambda x: x[:, :3].repeat(1, 2),
    ],
)
def test_what_may_change_shapes_behind_the_norm_closes_no_block(
    behind: Callable[[Tensor], Tensor],
) -> None:
    class Behind(Sublayer):
        def forward(self, x: Tensor) -> Tensor:
            return behind(self.norm(x + self.branch(x)))

    (chain,) = plan_of(Encoder(Sublayer)).chains
    assert len(chain) == 4
    assert all(not r.block for c in plan_of(Encoder(Behind)).chains for r in c.residuals[:-1])


class Layouts(Sublayer):
    """The stream is a vector in one block, a matrix in the next."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(x + self.branch(x))
        return out.unflatten(1, (2, 3)).flatten(1)


def test_shape_only_operations_link_blocks() -> None:
    model = Encoder(Layouts).double()
    (chain,) = plan_of(model).chains
    assert [len(link) for link in chain.links] == [0, 2, 2, 2]
    rev = re2fx.transform(model, coupling=NEAR, readout="last")
    torch.testing.assert_close(rev(X), by_hand(model, X, NEAR, "last"), rtol=0, atol=1e-12)
    assert_reversible_equals_store(rev, X, tolerance=1e-8)


# what is computed


@pytest.mark.parametrize("readout", ["mean", "last"])
@pytest.mark.parametrize("coupling", [NEAR, Coupling.momentum(0.5), Coupling(0.6, 0.3, 1.1)])
def test_equal_to_the_recurrence_by_hand(coupling: Coupling, readout: Any) -> None:
    model = Encoder().double()
    rev = re2fx.transform(model, coupling=coupling, readout=readout)
    torch.testing.assert_close(rev(X), by_hand(model, X, coupling, readout), rtol=0, atol=1e-12)
    assert_reversible_equals_store(rev, X, tolerance=1e-8)


def test_the_original_coupling_is_the_given_network_to_the_bit() -> None:
    model = Encoder().double()
    rev: Any = re2fx.transform(model, coupling=Coupling.original(), readout="last", memory="store")
    assert len(rev.plan.chains[0]) == 4
    assert torch.equal(rev(X), model(X))


@pytest.mark.parametrize("mixed", [False, True])
def test_exact_streams(mixed: bool) -> None:
    """Equal to stored execution to the bit, dropout and autocast included; kept are the bits."""
    rev: Any = re2fx.transform(noisy(), coupling=NEAR, exact=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        stored, got = (step(rev, memory, X.float()) for memory in ("store", "reversible"))
    assert_same(got, stored, 0.0)


def test_bytes_kept_do_not_grow_with_depth_but_by_the_side_bits() -> None:
    kept = {}
    x = torch.randn(64, 4)
    for depth in (4, 8):
        rev = re2fx.transform(Encoder(depth=depth), coupling=NEAR, exact=True)
        kept[depth] = live_bytes(lambda rev=rev: rev(x))  # type: ignore[misc]
    assert kept[8] - kept[4] == 4 * 64 * 6 * 3 // 8


@pytest.mark.parametrize("options", EXECUTORS.values(), ids=EXECUTORS)
@pytest.mark.parametrize("given", ["model", "rewired"])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_compiled(options: dict[str, Any], given: str) -> None:
    model = noisy().double()
    rev: Any = re2fx.transform(model, coupling=NEAR)
    expected = compiled_step(rev, model, X)
    said = {"coupling": NEAR} if given == "model" else {}
    run = torch.compile(
        model if given == "model" else rev, backend="re2fx", options={**options, **said}
    )
    assert_same(compiled_step(run, model, X), expected, 1e-8)


def test_anchors_or_a_refusal_with_the_figure() -> None:
    """Rounding grows by 1/b per block; where anchors can hold it they do."""
    far = Coupling.consistent(1 / 64)
    with pytest.raises(re2fx.ConditioningError, match="grows 64-fold per block"):
        re2fx.transform(Encoder(depth=16), coupling=far, drift_tolerance=1e-5)
    rev: Any = re2fx.transform(Encoder(depth=16).double(), coupling=NEAR)
    assert "anchor" in rev.plan.chains[0].notes[0]
    assert_reversible_equals_store(rev, X, tolerance=1e-2)


# changing the coupling


def test_another_coupling_later() -> None:
    rev: Any = re2fx.transform(Encoder().double(), coupling=NEAR, exact=True)
    rev.coupling = Coupling.consistent(0.25)
    again = re2fx.transform(rev._live._model, coupling=Coupling.consistent(0.25), exact=True)
    assert torch.equal(rev(X), again(X))
    with pytest.raises(OptionError, match="consists of whole blocks"):
        rev.coupling = RE2TAL
    with pytest.raises(OptionError, match="consists of whole blocks"):
        re2fx.Schedule(rev, NEAR, RE2TAL, over=10, snap=True)
    assert rev.coupling == Coupling.consistent(0.25)
    copied = pickle.loads(pickle.dumps(rev))
    assert torch.equal(copied(X), rev(X))


def test_a_coupling_per_chain() -> None:
    model = Encoder().double()
    rev: Any = re2fx.transform(model, coupling=lambda chain: NEAR)
    torch.testing.assert_close(rev(X), by_hand(model, X, NEAR), rtol=0, atol=1e-12)
    with pytest.raises(OptionError, match=r"coupling=\(0, 1, 1\): chain 0 consists of whole"):
        re2fx.transform(model, coupling=lambda chain: RE2TAL)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_captured_again_for_another_way_of_calling_it() -> None:
    """Layers that are one block stay one."""
    model = Encoder().double()
    rev: Any = re2fx.transform(model, (X,), coupling=NEAR, capture="dynamo")
    other = torch.stack([X, X.flip(0)])
    torch.testing.assert_close(rev(X), by_hand(model, X, NEAR), rtol=0, atol=1e-12)
    torch.testing.assert_close(rev(other), by_hand(model, other, NEAR), rtol=0, atol=1e-12)
    assert len(rev._variants) == 2


# activations


class Post(nn.Module):
    """``relu(x + f(x))``, in place if asked to."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.inner, self.norm = nn.Linear(6, 6), nn.BatchNorm1d(6)
        self.act = nn.ReLU(inplace)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(self.norm(self.inner(x)) + x)
        return out


@pytest.mark.parametrize("inplace", [False, True])
def test_an_activation_stays_where_it_is(inplace: bool) -> None:
    model = Encoder(lambda: Post(inplace)).double()
    rev: Any = re2fx.transform(model, coupling=NEAR, activation="block")
    assert [len(chain) for chain in rev.plan.chains] == [4]
    assert not any(residual.activation for residual in rev.plan.chains[0].residuals)
    with torch.no_grad():
        expected = by_hand(model.eval(), X, NEAR)
        torch.testing.assert_close(rev.eval()(X), expected, rtol=0, atol=1e-12)
    assert_reversible_equals_store(rev.train(), X, tolerance=1e-8)
    same = re2fx.transform(
        model, coupling=Coupling.original(), activation="block", readout="last", memory="store"
    )
    assert torch.equal(same.eval()(X), model.eval()(X))


def test_an_exact_convolutional_network() -> None:
    rev: Any = re2fx.transform(ConvNet(dropout=0.2), coupling=NEAR, activation="block", exact=True)
    stored, got = (step(rev, memory, IMAGE) for memory in ("store", "reversible"))
    assert_same(got, stored, 0.0)


@pytest.mark.parametrize("wrong", [{"coupling": RE2TAL}, {"coupling": NEAR, "readout": "sum"}])
def test_activations_in_blocks_ask_for_a_coupling_and_a_readout(wrong: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="activation='block' needs"):
        re2fx.transform(Encoder(Post), activation="block", **wrong)


def test_a_readout_that_means_nothing_for_norms_leaves_them_alone() -> None:
    rev = re2fx.transform
    with pytest.warns(re2fx.Re2fxWarning, match="post-norm"):
        assert isinstance(rev(Encoder(), coupling=NEAR, readout="sum"), Encoder)


def test_select_takes_residuals_out_of_blocks() -> None:
    """Two layers before what is left out, and the two residuals of the one behind."""
    plan = plan_of(Encoder(), select="!layers.2*")
    assert [(len(chain), chain.residuals[0].inside == ()) for chain in plan.chains] == [
        (2, False), (2, True)
    ]  # fmt: skip
    assert (plan.rewired, len(plan.refusals)) == (6, 2)


# a model of somebody else's


def test_bert() -> None:
    """Captured by Dynamo, with a mask on the side."""
    ensure_torchvision()
    from transformers import BertConfig, BertModel

    config = BertConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64,
        vocab_size=50,
    )  # fmt: skip
    model = BertModel(config)
    inputs = {
        "input_ids": torch.randint(0, 50, (2, 9)),
        "attention_mask": torch.ones(2, 9, dtype=torch.long),
    }
    rev: Any = re2fx.transform(model, inputs, coupling=NEAR, exact=True, readout="last")
    assert [len(chain) for chain in rev.plan.chains] == [3]
    gradients = {}
    for memory in ("store", "reversible"):
        rev.memory = memory
        model.zero_grad()
        torch.manual_seed(1)
        rev(**inputs).last_hidden_state.square().mean().backward()
        gradients[memory] = [p.grad for p in model.parameters() if p.grad is not None]
    for got, expected in zip(gradients["reversible"], gradients["store"], strict=True):
        assert torch.equal(got, expected)
