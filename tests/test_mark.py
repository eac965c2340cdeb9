"""Marks: the operators, writing them into a graph, and taking them away again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.fx.node import map_arg
from torch.library import opcheck

import re2fx
from re2fx import Coupling
from re2fx.codegen import compile_graph
from re2fx.marks import COUPLE, FORK, LINK, MARKS
from re2fx.passes.mark import is_marked, mark, unmark
from re2fx.wiring import Link, Wiring

from .compare import Outcome, assert_same, step, weighted
from .joint import Marked, outcome
from .models import ConvNet, Net, Tapped
from .programs import Block, Program, Stage, build

COUPLINGS = [
    Coupling.re2tal(),
    Coupling.consistent(0.5),
    Coupling.midpoint(0.7, 1.2),
    Coupling.momentum(0.9),
    Coupling.momentum(0.5),
    Coupling.dr2net(0.3, 0.7),
    Coupling(0.2, -0.9, 0.8),
]


# The operators.


def normal(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Some numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "contiguous": lambda: normal(2, 3, 4),
    "transposed": lambda: normal(2, 4, 3).transpose(1, 2),
    "channels last": lambda: normal(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "slice": lambda: normal(2, 5, 4)[:, 1:],
    "every second": lambda: normal(2, 8)[:, ::2],
    "expanded": lambda: normal(1, 4).expand(3, 4),
    "half precision": lambda: normal(3, 4, dtype=torch.bfloat16),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck_fork(layout: str) -> None:
    opcheck(FORK, (LAYOUTS[layout]().requires_grad_(),))
    opcheck(FORK, (LAYOUTS[layout](),))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck_link(layout: str) -> None:
    opcheck(LINK, (normal(2, 3).requires_grad_(), LAYOUTS[layout]().requires_grad_()))


@pytest.mark.parametrize(
    "coupling",
    [*COUPLINGS, Coupling.original(), Coupling(0, 1, 0), Coupling(1, 0, 0), Coupling(0, 0, 1)],
    ids=str,
)
def test_opcheck_couple(coupling: Coupling) -> None:
    tensors = [normal(3, 4).requires_grad_() for _ in range(4)]
    opcheck(COUPLE, (*tensors, *coefficients(coupling)))
    opcheck(COUPLE, (*tensors, *coefficients(coupling), False))


@pytest.mark.parametrize(
    "branch",
    [
        normal(1, 4),
        normal(4),
        normal(4, 3).t(),
        normal(3, 4, dtype=torch.float32),
        normal(3, 4, dtype=torch.bfloat16),
    ],
    ids=["one row", "fewer dimensions", "transposed", "float", "half precision"],
)
def test_opcheck_couple_with_other_branches(branch: Tensor) -> None:
    streams = [normal(3, 4).requires_grad_() for _ in range(3)]
    for grad in (True, False):
        branch = branch.detach().clone().requires_grad_(grad)
        opcheck(COUPLE, (*streams, branch, *coefficients(Coupling.consistent(0.5))))


def coefficients(coupling: Coupling) -> tuple[float, float, float]:
    """As a mark carries them."""
    return float(coupling.a), float(coupling.b), float(coupling.c)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_marks_keep_the_memory_layout(layout: str) -> None:
    value = LAYOUTS[layout]()
    for result in (FORK(value), LINK(normal(2, 3), value)):
        assert torch.equal(result, value)
        assert result.stride() == value.stride()
        assert result.untyped_storage().data_ptr() != value.untyped_storage().data_ptr()


@pytest.mark.parametrize("coupling", COUPLINGS, ids=str)
def test_couple_is_a_step_of_the_coupling(coupling: Coupling) -> None:
    current, previous, branch = normal(3, 3, 4)
    got = COUPLE(current, previous, current, branch, *coefficients(coupling))
    torch.testing.assert_close(got, coupling.step(current, previous, branch), rtol=0, atol=0)


# Networks.


class Wired(nn.Module):
    """Eight branches, and a function that says how they lie."""

    def __init__(self, wire: Callable[[Wired, Tensor], Any], width: int = 8) -> None:
        super().__init__()
        self.wire = wire
        self.stem, self.head = nn.Linear(width, width), nn.Linear(width, 3)
        self.branches = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.Tanh()) for _ in range(8)
        )

    def forward(self, x: Tensor) -> Any:
        return self.wire(self, x)

    def run(self, x: Tensor, first: int, last: int) -> Tensor:
        """Some of the residuals in turn."""
        for branch in self.branches[first:last]:
            x = x + branch(x)
        return x


def two_chains_from_one_value(net: Wired, x: Tensor) -> Tensor:
    """In parallel, one of them with a link."""
    x = net.stem(x)
    a, b = net.run(x, 0, 1), net.run(x, 4, 5)
    a = net.run(a.transpose(1, 2), 1, 4)
    return net.head(a * net.run(b, 5, 8))


def three_in_sequence(net: Wired, x: Tensor) -> Tensor:
    """Chains with something else between them."""
    x = net.run(net.stem(x), 0, 3)
    x = net.run(torch.tanh(net.stem(x)), 3, 5)
    return net.head(net.run(torch.tanh(net.stem(x)), 5, 8))


def links_everywhere(net: Wired, x: Tensor) -> Tensor:
    """Several in a row, and blocks between."""
    x = net.run(net.stem(x), 0, 1).permute(0, 2, 1).contiguous()
    x = net.run(x, 1, 3).flatten(0, 1)
    x = net.run(x, 3, 6).unflatten(0, (2, 8)).unsqueeze(1).squeeze(1).transpose(1, 2)
    return net.head(net.run(x, 6, 8))


def entry_is_a_slice(net: Wired, x: Tensor) -> Tensor:
    """A chain input with gaps in memory."""
    return net.head(net.run(net.stem(x)[:, 1:], 0, 8))


def entry_is_read_again(net: Wired, x: Tensor) -> tuple[Tensor, Tensor]:
    """A skip to the head, and a tap."""
    x = net.stem(x)
    y = net.run(x, 0, 4)
    return net.head(net.run(y, 4, 8) * x), y.sin()


WIRES = [
    two_chains_from_one_value,
    three_in_sequence,
    links_everywhere,
    entry_is_a_slice,
    entry_is_read_again,
]
X = normal(2, 8, 8)


def rewired(model: nn.Module, **options: Any) -> re2fx.RewiredModule:
    """Transform in fp64."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
    rev = re2fx.transform(model.double(), memory="store", **options)
    assert isinstance(rev, re2fx.RewiredModule)
    return rev


def parts(rev: re2fx.RewiredModule) -> tuple[Graph, nn.Module, tuple[Wiring, ...]]:
    """What `mark` is given."""
    rewired = rev._rewired[rev.training]
    return rewired.graph, rev._live._model, rewired.wirings


def assert_equal_runs(got: Outcome, expected: Outcome) -> None:
    """The same bits, except that gradients that meet in a stream may be summed in another order."""
    for a, b in zip(got.outputs, expected.outputs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert_same(got, expected, 1e-13)


def assert_marks_change_nothing(rev: re2fx.RewiredModule, *inputs: Any) -> None:
    """The same network with marks, and after taking them away."""
    before = str(parts(rev)[0])
    expected = step(rev, "store", *inputs)
    marked = Marked(rev)
    assert_equal_runs(outcome(rev, marked, *inputs), expected)
    assert str(parts(rev)[0]) == before, "the given graph is left alone"
    graph, wirings = unmark(marked.marked)
    assert not is_marked(graph)
    assert is_marked(marked.marked), "the given graph is left alone"
    marked.function = compile_graph(graph, "unmarked")
    assert_equal_runs(outcome(rev, marked, *inputs), expected)
    assert described(graph, wirings) == described(parts(rev)[0], parts(rev)[2])


def described(graph: Graph, wirings: tuple[Wiring, ...]) -> list[Any]:
    """Wirings with values instead of names: two nodes that compute the same are the same."""
    numbers: dict[str, int] = {}
    found: dict[Node, Any] = {}
    for node in graph.nodes:
        target = node.name if node.op == "placeholder" else str(node.target)
        arguments = map_arg((node.args, node.kwargs), found.__getitem__)
        found[node] = numbers.setdefault(f"{node.op} {target} {arguments}", len(numbers))
    named = {node.name: found[node] for node in graph.nodes}
    return [
        (named[wiring.entry], [steps_of(step, named) for step in wiring.steps])
        for wiring in wirings
    ]


def steps_of(step: Any, named: dict[str, Any]) -> tuple[Any, ...]:
    """A block or a link with numbers for names."""
    if isinstance(step, Link):
        states = [[named[name] for name in names] for names in (step.currents, step.previouses)]
        return "link", named[step.current], named[step.previous], states
    values = [named[n] for n in (step.current, step.previous, step.branch, step.output)]
    return "block", values, step.coupling, step.location


@pytest.mark.parametrize("coupling", COUPLINGS, ids=str)
@pytest.mark.parametrize("readout", ["mean", "sum", "last"])
def test_couplings_and_readouts(coupling: Coupling, readout: str) -> None:
    rev = rewired(Net(dropout=0.3), coupling=coupling, readout=readout)
    assert_marks_change_nothing(rev, normal(5, 4))


@pytest.mark.parametrize("activation", ["branch", "stream"])
@pytest.mark.parametrize("readout", ["mean", "sum", "last"])
def test_activations_batch_norm_and_dropout(activation: str, readout: str) -> None:
    rev = rewired(ConvNet(dropout=0.3), activation=activation, readout=readout)
    assert_marks_change_nothing(rev, normal(4, 3, 6, 6))
    assert_marks_change_nothing(rev.eval(), normal(4, 3, 6, 6))


def test_sides_and_taps() -> None:
    assert_marks_change_nothing(rewired(Tapped()), *normal(2, 3, 8))


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("readout", ["mean", "sum", "last"])
def test_wirings(wire: Callable[[Wired, Tensor], Any], readout: str) -> None:
    rev = rewired(Wired(wire), coupling=Coupling.consistent(0.5), readout=readout)
    assert len(rev.plan.chains) == {"two_chains_from_one_value": 2, "three_in_sequence": 3}.get(
        wire.__name__, 1
    )
    assert_marks_change_nothing(rev, X)


FEATURES = [
    Block(("attention",)), Block(("in place",)), Block(("conv",)), Block(("nested",)),
    Block(("dead element",)), Block(("shape reader",)), Block(spelling="x += f"),
    Block(spelling="x * 0.9 + f"), Block(behind="relu_"), Block(behind="half"), Block(tap="raw"),
    Block(tap="sin"), Block(side="cond"), Block(side="context"), Block(shared=True),
    Block(link="permute, contiguous"), Block(link="unflatten"), Block(link="clone"),
    Block(("linear", "pre-norm"), spelling="x + a + m"),
]  # fmt: skip


@pytest.mark.parametrize("block", FEATURES, ids=str)
def test_one_thing_at_a_time(block: Block) -> None:
    activation = "branch" if block.link else "stream"
    shape = (2, 4, 2, 3) if block.branches == ("conv",) else (2, 4, 4)
    blocks = (replace(block, link=None), Block(("mlp",)), block, block)
    network, x, cond = build(Program(shape, (Stage("linear", blocks), Stage("relu", blocks[:2]))))
    rev = re2fx.transform(network, activation=activation, memory="store")
    assert isinstance(rev, re2fx.RewiredModule)
    assert_marks_change_nothing(rev, x, cond)


def test_one_mark_per_place() -> None:
    """A fork and a coupling per block, a link per operation and stream."""
    rev = rewired(Wired(links_everywhere))
    graph = mark(*parts(rev))
    targets = [node.target for node in graph.nodes if node.target in MARKS]
    assert [targets.count(target) for target in (FORK, COUPLE, LINK)] == [8, 8, 14]
    for node in graph.nodes:
        if node.target is COUPLE:
            current, _, read, _, a, b, c, reversible, tolerance, block = node.args
            assert read.target is FORK
            assert read.args == (current,)
            assert (a, b, c, reversible, tolerance, block) == (0, 1, 1, True, 1e-3, False)


def test_marks_keep_the_place_in_the_code() -> None:
    rev = rewired(Net())
    graph, root, wirings = parts(rev)
    _, after = unmark(mark(graph, root, wirings))
    places = [block.location for wiring in wirings for block in wiring.blocks]
    assert [block.location for wiring in after for block in wiring.blocks] == places
    assert all(place.file.endswith("models.py") for place in places)


@torch.fx.wrap
def kept_whole(x: Tensor) -> Tensor:
    """A function that tracing does not look into."""
    return x.sin()


def test_marks_are_not_taken_for_wrapped_functions() -> None:
    """A branch that ends in a function known to `torch.fx.wrap`."""

    class Block(nn.Module):
        def __init__(self, width: int, dropout: float) -> None:
            super().__init__()
            self.inner = nn.Linear(width, width)

        def forward(self, x: Tensor) -> Tensor:
            return x + kept_whole(self.inner(x))

    graph = mark(*parts(rewired(Net(block=Block))))
    assert not any(node.meta.get("is_wrapped") for node in graph.nodes if node.target in MARKS)
    assert_marks_change_nothing(rewired(Net(block=Block)), normal(5, 4))


def parallel_with_marks(x: Tensor) -> Tensor:
    """Two chains from the same value, as Dynamo sees them: without a node of its own for each."""
    plain = (0.0, 1.0, 1.0)
    read_a, read_b = FORK(x), FORK(x)
    a1 = COUPLE(x, x, read_a, read_a.sin(), *plain)
    b1 = COUPLE(x, x, read_b, read_b.cos(), *plain)
    a1, a0 = LINK(a1, a1.t()), LINK(x, x.t())
    b1, b0 = LINK(b1, b1.flatten()), LINK(x, x.flatten())
    read_a, read_b = FORK(a1), FORK(b1)
    a2 = COUPLE(a1, a0, read_a, read_a.sin(), *plain)
    b2 = COUPLE(b1, b0, read_b, read_b.cos(), *plain)
    read_a = FORK(a2)
    a3 = COUPLE(a2, a1, read_a, read_a.sin(), *plain)
    return a3 + a2 + (b2 + b1).view(3, 3)


def test_unmark_parallel_chains_with_a_common_input() -> None:
    traced = torch.fx.symbolic_trace(parallel_with_marks)
    graph, wirings = unmark(traced.graph)
    kinds = [[type(step).__name__ for step in wiring.steps] for wiring in wirings]
    assert kinds == [["Block", "Link", "Block", "Block"], ["Block", "Link", "Block"]]
    assert [wiring.entry for wiring in wirings] == ["x", "x"]
    names = {node.name for node in graph.nodes}
    links = [step for wiring in wirings for step in wiring.steps if isinstance(step, Link)]
    for link in links:
        assert {link.current, link.previous, *link.currents, *link.previouses} <= names
        assert len(link.currents) == len(link.previouses) == 1
    x = normal(3, 3)
    got = compile_graph(graph, "unmarked")(None, x)
    torch.testing.assert_close(got, parallel_with_marks(x), rtol=0, atol=0)


def test_unmark_leaves_stored_chains_alone() -> None:
    """Marks that forbid reconstruction: `Coupling.original` cannot be inverted."""
    rev = rewired(Net(), coupling=Coupling.original())
    graph, wirings = unmark(mark(*parts(rev), False))
    assert wirings == ()
    assert not is_marked(graph)


@pytest.mark.parametrize("options", [{"compiler": "eager"}, {"scope": "region"}], ids=str)
def test_stored_chains_through_the_backend(options: dict[str, Any]) -> None:
    rev = rewired(Net(), coupling=Coupling.original())
    options = {"compiler": "aot_eager", **options}
    compiled = torch.compile(rev, backend="re2fx", options=options)
    x = normal(5, 4)
    expected = step(rev, "store", x)
    weighted(compiled(x)).backward()
    for name, parameter in rev.named_parameters():
        torch.testing.assert_close(parameter.grad, expected.gradients[name])


def test_marks_in_inference_mode_and_without_gradients() -> None:
    rev = rewired(ConvNet()).eval()
    image, marked = normal(4, 3, 6, 6), Marked(rev)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            torch.testing.assert_close(marked(image), rev(image), rtol=0, atol=0)


def test_marks_under_autocast() -> None:
    """Streams in fp32, branches in half precision."""
    rev = rewired(Net()).float()
    x = normal(5, 4, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(outcome(rev, Marked(rev), x), step(rev, "store", x), 0)


def test_second_derivatives() -> None:
    """Marks differentiate like the arithmetic they stand for."""
    rev = rewired(Net(), coupling=Coupling.consistent(0.5))
    x = normal(5, 4).requires_grad_()
    found = []
    for run in (rev, Marked(rev)):
        (first,) = torch.autograd.grad(F.gelu(run(x)).sum(), x, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), x)[0])
    torch.testing.assert_close(found[1], found[0])
