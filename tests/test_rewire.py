"""Rewiring equals the reference loop, bit for bit, and changes nothing about the given model."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any, get_args

import expecttest
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import Graph

import re2fx
from benchmarks.torchvision_shim import ensure_torchvision
from re2fx import Coupling, Re2fxWarning, RewiredModule
from re2fx.capture import capture
from re2fx.coupling import Readout

from .compare import assert_same, step
from .programs import (
    BEHIND,
    KINDS,
    LINKS,
    PARALLEL,
    SPELLINGS,
    Block,
    Program,
    Stage,
    build,
    couplings,
    fits,
    programs,
)
from .reference import Rewiring, Step, expected, follow_original, run_chain

COMMON = settings(
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def state(model: nn.Module) -> object:
    """What `transform` must leave alone."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [
        (name, sorted(vars(module)), module.training, [list(getattr(module, h)) for h in hooks])
        for name, module in model.named_modules(remove_duplicate=False)
    ]


def equal(got: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    """The same bits, in the same places."""
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def run(model: nn.Module, x: Tensor, cond: Tensor) -> tuple[Tensor, ...]:
    """Call the model; errors in generated code are raised from here, where shrinking knows them."""
    try:
        return model(x.clone(), cond)
    except RuntimeError as error:
        message = str(error)
    raise AssertionError(message)


def check(program: Program, coupling: Coupling, readout: Readout, activation: str) -> None:
    """Store equals the loop, reversible equals store, the model is as it was."""
    network, x, cond = build(program)
    with torch.no_grad():
        before, members = network(x.clone(), cond), state(network)
        rewiring = Rewiring(
            (coupling.a, coupling.b, coupling.c), readout, activation, coupling.evaluations
        )
        wanted = expected(network, rewiring, x, cond)
        try:
            rev = re2fx.transform(
                network, coupling=coupling, readout=readout, activation=activation, memory="store"
            )
        except Re2fxWarning:
            rev = network
        equal(run(rev, x, cond), wanted)
        equal(run(network, x, cond), before)
    assert state(network) == members
    if isinstance(rev, RewiredModule):
        assert_same(step(rev, "reversible", x, cond), step(rev, "store", x, cond), 1e-9)


def label(block: Block) -> str:
    """What is special about a block."""
    plain = vars(Block())
    return ", ".join(str(v) for k, v in vars(block).items() if v != plain[k]) or "plain"


EVERY_SPELLING = [
    *(Block(spelling=name) for name in SPELLINGS),
    *(Block(("linear", "pre-norm"), spelling=name) for name in PARALLEL),
    *(Block((kind,)) for kind in (*KINDS, "nested", "nested one")),
    *(Block(behind=name) for name in BEHIND),
    *(Block(link=name) for name in LINKS if fits(name, (2, 4, 4))),
    Block(side="cond"), Block(side="context"), Block(tap="raw"), Block(tap="sin"),
    Block(shared=True), Block(("saved output",), behind="relu_"),
]  # fmt: skip


@pytest.mark.parametrize("coupling", [Coupling.re2tal(), Coupling.consistent(0.5)], ids=str)
@pytest.mark.parametrize("readout", ["mean", "sum", "last"])
@pytest.mark.parametrize("block", EVERY_SPELLING, ids=label)
def test_one_thing_at_a_time(block: Block, readout: Readout, coupling: Coupling) -> None:
    """Small programs that name what is wrong where random ones mix everything."""
    blocks = (replace(block, link=None), Block(("mlp",)), block, block)
    check(Program((2, 4, 4), (Stage("linear", blocks),)), coupling, readout, "branch")


def test_vision_transformer() -> None:
    """A ViT, against a loop over its own blocks, written by hand."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ensure_torchvision()
        import timm

        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=3).double().eval()
    image = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    steps = []
    for block in model.blocks:
        steps.append(Step(lambda p, b=block: b.attn(b.norm1(p))))  # type: ignore[misc]
        steps.append(Step(lambda p, b=block: b.mlp(b.norm2(p))))  # type: ignore[misc]
    with torch.no_grad():
        before = model(image)
        start = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(image))))
        for coupling in (Coupling.re2tal(), Coupling.consistent(0.5), Coupling.original()):
            for readout in get_args(Readout):
                rev = re2fx.transform(model, coupling=coupling, readout=readout, memory="store")
                triple = (coupling.a, coupling.b, coupling.c)
                end = run_chain(start, steps, triple, readout)[-1]
                torch.testing.assert_close(
                    rev(image), model.forward_head(model.norm(end)), rtol=0, atol=0
                )
        torch.testing.assert_close(model(image), before, rtol=0, atol=0)
        torch.testing.assert_close(follow_original(model, image), before, rtol=1e-12, atol=1e-12)
    reversible = re2fx.transform(model)
    assert isinstance(reversible, RewiredModule)
    assert reversible.plan.rewired == 6
    assert_same(step(reversible, "reversible", image), step(reversible, "store", image), 1e-9)


@pytest.mark.parametrize("rank", [2, 3, 4])
@settings(COMMON, max_examples=70)
@given(data=st.data(), coupling=couplings(), readout=st.sampled_from(("mean", "sum", "last")))
def test_random_programs(
    rank: int, data: st.DataObject, coupling: Coupling, readout: Readout
) -> None:
    check(data.draw(programs(rank)), coupling, readout, "branch")


@pytest.mark.parametrize("rank", [2, 3, 4])
@settings(COMMON, max_examples=30)
@given(data=st.data(), coupling=couplings(), readout=st.sampled_from(("mean", "sum", "last")))
def test_random_programs_with_activations_on_the_stream(
    rank: int, data: st.DataObject, coupling: Coupling, readout: Readout
) -> None:
    check(data.draw(programs(rank, "stream")), coupling, readout, "stream")


class Two(nn.Module):
    """The smallest chain."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.f(x)
        return torch.relu(x + self.g(x))


def listing(graph: Graph) -> str:
    """One line per node, named by its place."""
    names = {node: f"v{number}" for number, node in enumerate(graph.nodes)}
    lines = []
    for node in graph.nodes:
        target = str(getattr(node.target, "__name__", node.target))
        arguments = ", ".join(str(names.get(a, a)) for a in node.args)
        if node.op == "output":
            lines.append(f"return {arguments}")
        else:
            lines.append(
                f"{names[node]} = {target}" + f"({arguments})" * (node.op != "placeholder")
            )
    return "\n".join(lines) + "\n"


def show(**options: Any) -> str:
    """The rewired graph of the smallest chain."""
    rev = re2fx.transform(Two(), memory="store", **options)
    assert isinstance(rev, RewiredModule)
    return listing(rev.graph)


def test_before_and_after() -> None:
    expecttest.assert_expected_inline(
        listing(capture(Two()).train),
        """\
v0 = x
v1 = f(v0)
v2 = add(v0, v1)
v3 = g(v2)
v4 = add(v2, v3)
v5 = relu(v4)
return v5
""",
    )
    expecttest.assert_expected_inline(
        show(),
        """\
v0 = x
v1 = getattr(v0, dtype)
v2 = widen(v0)
v3 = to(v2, v1)
v4 = f(v3)
v5 = add(v2, v4)
v6 = to(v5, v1)
v7 = g(v6)
v8 = add(v2, v7)
v9 = add(v8, v5)
v10 = mul(v9, 0.5)
v11 = to(v10, v1)
v12 = relu(v11)
return v12
""",
    )


def test_after_with_another_coupling() -> None:
    expecttest.assert_expected_inline(
        show(coupling=Coupling.consistent(0.25), readout="sum"),
        """\
v0 = x
v1 = getattr(v0, dtype)
v2 = widen(v0)
v3 = to(v2, v1)
v4 = f(v3)
v5 = mul(v2, 0.75)
v6 = mul(v2, 0.25)
v7 = add(v5, v6)
v8 = mul(v4, 1.25)
v9 = add(v7, v8)
v10 = to(v9, v1)
v11 = g(v10)
v12 = mul(v9, 0.75)
v13 = mul(v2, 0.25)
v14 = add(v12, v13)
v15 = mul(v11, 1.25)
v16 = add(v14, v15)
v17 = add(v16, v9)
v18 = mul(v2, -1.0)
v19 = add(v17, v18)
v20 = to(v19, v1)
v21 = relu(v20)
return v21
""",
    )
