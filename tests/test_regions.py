"""``scope="region"``: one compiled artifact per distinct piece of a network."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph

import re2fx
from re2fx.coupling import Coupling
from re2fx.dynamo import Lifted, lift
from re2fx.options import Options
from re2fx.passes.outline import outline
from re2fx.pipeline import make_plan, rewire_plan
from re2fx.program import Program
from re2fx.regions import Regions, structure

from .compare import assert_same
from .models import Block, ConvNet, Net, Tapped
from .test_backend import REGION, compiled, example, rewired, seeded, step

Function = Callable[..., Any]

# Dynamo hides this warning from everybody but those who make warnings errors.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Compiled code does not outlive its test."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Counted:
    """Wraps functions without compiling them, and counts how often each is called."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def __call__(self, function: Function) -> Function:
        """Wrap one."""
        index = len(self.calls)
        self.calls.append(0)

        def counted(*args: Any) -> Any:
            self.calls[index] += 1
            return function(*args)

        return counted


class Cut:
    """A backend that cuts a model into regions and keeps all it made.

    Attributes:
        counted: the wrapped functions of the last graph.
        regions: which of its pieces are shared.
        program, lifted: what runs.
    """

    counted: Counted
    regions: Regions
    program: Program
    lifted: Lifted

    def __call__(self, module: torch.fx.GraphModule, inputs: list[Any]) -> Function:
        """Compile one of Dynamo's graphs."""
        lifted = lift(module, inputs)
        flow, plan = make_plan(lifted.graph, lifted.root)
        done = rewire_plan(flow, plan, Options(Coupling.re2tal(), "mean", "branch", "reversible"))
        self.counted = Counted()
        self.regions = Regions(lifted.root, self.counted)
        self.lifted = lifted
        self.program = outline(done.graph, lifted.root, done.wirings, self.regions.compile)

        def call(*values: Any) -> Any:
            return self.program.run(*lifted.split(values))

        return call


def cut(model: nn.Module, *inputs: Tensor) -> Cut:
    """Cut a model and run a step."""
    backend = Cut()
    run: Any = torch.compile(model, backend=backend, fullgraph=True)
    output = run(*inputs)
    (output[0] if isinstance(output, tuple) else output).sum().backward()
    return backend


X = example(5, 4)


# How many artifacts


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_artifacts_do_not_depend_on_depth(dropout: float) -> None:
    numbers = []
    for depth in (2, 12):
        torch.compiler.reset()
        model = seeded(lambda depth=depth: Net(depth, dropout=dropout))  # type: ignore[misc]
        regions = cut(model, X).regions
        numbers.append(len(regions))
    assert numbers == [3, 3]  # stem, branch, head


def test_forward_and_rerun_are_one_artifact() -> None:
    backend = cut(seeded(lambda: Net(6)), X)
    assert sorted(backend.counted.calls) == [1, 1, 12]


def test_blocks_of_several_kinds() -> None:
    class Mixed(nn.Module):
        """Every other branch has an activation of its own."""

        def __init__(self) -> None:
            super().__init__()
            self.mixes = nn.ModuleList([nn.Linear(4, 4) for _ in range(8)])

        def forward(self, x: Tensor) -> Tensor:
            for number, mix in enumerate(self.mixes):
                x = x + (torch.tanh(mix(x)) if number % 2 else torch.sigmoid(mix(x)))
            return x

    backend = cut(seeded(Mixed), X)
    assert backend.counted.calls.count(8) == 2  # four branches and their reruns, of each kind


def test_blocks_of_one_structure_and_two_widths() -> None:
    """Sizes belong to the inputs, not to the structure."""

    class Widening(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])
            self.wide = nn.Linear(4, 12)
            self.second = nn.ModuleList([nn.Linear(12, 12) for _ in range(2)])

        def forward(self, x: Tensor) -> Tensor:
            for mix in self.first:
                x = x + torch.tanh(mix(x))
            x = torch.tanh(self.wide(x))
            for mix in self.second:
                x = x + torch.tanh(mix(x))
            return x

    model = seeded(Widening)
    expected = step(rewired(model, memory="store"), model, X)
    assert_same(step(compiled(model, REGION), model, X), expected, 1e-10)


def test_many_widths_are_not_too_many() -> None:
    """Dynamo gives up on a function that it has compiled too often."""

    class Pyramid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            widths = range(4, 14)
            self.steps = nn.ModuleList([nn.Linear(w, w + 1) for w in widths])
            self.first = nn.ModuleList([nn.Linear(w, w) for w in widths])
            self.second = nn.ModuleList([nn.Linear(w, w) for w in widths])

        def forward(self, x: Tensor) -> Tensor:
            for first, second, widen in zip(self.first, self.second, self.steps, strict=True):
                x = x + first(x)
                x = x + second(x)
                x = torch.tanh(widen(x))
            return x

    model = seeded(Pyramid)
    expected = step(rewired(model, memory="store"), model, X)
    options = {**REGION, "compiler": "aot_eager"}
    assert_same(step(compiled(model, options), model, X), expected, 1e-10)


# What is equal


def graph(*operations: tuple[Any, tuple[Any, ...], dict[str, Any]]) -> Graph:
    """A chain of operations on one input; a 0 among the arguments stands for it."""
    made = Graph()
    source = value = made.placeholder("x")
    for target, args, kwargs in operations:
        given = [source if isinstance(a, Input) else a for a in args]
        value = made.call_function(target, (value, *given), kwargs)
    made.output(value)
    return made


class Input:
    """Stands for the graph's input."""


def test_equal_structures() -> None:
    one = graph((torch.add, (Input(),), {"alpha": 2}), (F.gelu, (), {"approximate": "tanh"}))
    other = Graph()
    source = other.placeholder("another_name")
    value = other.call_function(torch.add, (source, source), {"alpha": 2})
    value = other.call_function(F.gelu, (value,), {"approximate": "tanh"})
    other.output(value)
    assert structure(one) == structure(other)


def other_gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """Another function of the same name."""
    return torch.relu(x)


other_gelu.__name__ = other_gelu.__qualname__ = "gelu"
other_gelu.__module__ = "torch.nn.functional"

DIFFERENT: dict[str, tuple[tuple[Any, tuple[Any, ...], dict[str, Any]], ...]] = {
    "constants": ((torch.mul, (2.0,), {}), (torch.mul, (3.0,), {})),
    "the sign of zero": ((torch.copysign, (0.0,), {}), (torch.copysign, (-0.0,), {})),
    "number and truth": ((torch.mul, (1,), {}), (torch.mul, (True,), {})),
    "number types": ((torch.mul, (1,), {}), (torch.mul, (1.0,), {})),
    "dtypes": ((torch.Tensor.to, (torch.float16,), {}), (torch.Tensor.to, (torch.float32,), {})),
    "devices": (
        (torch.Tensor.to, (torch.device("cpu"),), {}),
        (torch.Tensor.to, (torch.device("meta"),), {}),
    ),
    "keywords": ((torch.sum, (), {"dim": 0}), (torch.sum, (), {"dim": 1})),
    "keyword names": ((torch.softmax, (0,), {}), (torch.softmax, (), {"dim": 0})),
    "functions": ((torch.tanh, (), {}), (torch.sigmoid, (), {})),
    "functions of one name": ((F.gelu, (), {}), (other_gelu, (), {})),
    "operands": ((operator.sub, (Input(),), {}), (operator.sub, (1,), {})),
    "slices": (
        (operator.getitem, (slice(0, 2),), {}),
        (operator.getitem, (slice(0, 3),), {}),
    ),
    "a text and a number": ((F.gelu, (), {"approximate": "0"}), (F.gelu, (), {"approximate": 0})),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_different_structures(name: str) -> None:
    one, other = DIFFERENT[name]
    assert structure(graph(one)) != structure(graph(other))
    assert structure(graph(one)) == structure(graph(one))


def test_different_wiring_is_a_different_structure() -> None:
    def wired(second: int) -> Graph:
        made = Graph()
        values = [made.placeholder("x"), made.placeholder("y")]
        values.append(made.call_function(torch.tanh, (values[0],)))
        made.output(made.call_function(torch.add, (values[2], values[second])))
        return made

    texts = {structure(wired(second)) for second in range(3)}
    assert len(texts) == 3


def test_different_outputs_are_different_structures() -> None:
    texts = set()
    for number in range(3):
        made = Graph()
        x, y = made.placeholder("x"), made.placeholder("y")
        z = made.call_function(torch.add, (x, y))
        made.output((z, (x, y, (x, y))[number]))
        texts.add(structure(made))
    assert len(texts) == 3


def test_a_method_is_not_a_function_of_its_name() -> None:
    def made(op: str, target: Any) -> Graph:
        graph = Graph()
        x = graph.placeholder("x")
        graph.output(getattr(graph, op)(target, (x,)))
        return graph

    assert structure(made("call_method", "tanh")) != structure(made("call_function", torch.tanh))


def test_a_constant_decides_what_is_shared() -> None:
    class Scaled(nn.Module):
        """Branches that differ in a number only."""

        def __init__(self) -> None:
            super().__init__()
            self.mixes = nn.ModuleList([nn.Linear(4, 4) for _ in range(4)])

        def forward(self, x: Tensor) -> Tensor:
            for number, mix in enumerate(self.mixes):
                x = x + torch.tanh(mix(x) + number)
            return x

    model = seeded(Scaled)
    assert cut(model, X).counted.calls.count(2) == 4
    torch.compiler.reset()
    expected = step(rewired(model, memory="store"), model, X)
    assert_same(step(compiled(model, REGION), model, X), expected, 1e-10)


# What a call reads and writes


def test_batch_norm_statistics_move_once() -> None:
    model, images = seeded(lambda: ConvNet(4)), example(3, 3, 6, 6)
    expected = step(rewired(model, memory="store"), model, images)
    run = compiled(model, REGION)
    assert_same(step(run, model, images), expected, 1e-9)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    run(images).sum().backward()
    for name, buffer in model.named_buffers():
        if name.endswith("num_batches_tracked"):
            assert buffer == before[name] + 1
        else:
            assert not torch.equal(buffer, before[name])


def test_replaced_parameters_are_used() -> None:
    model = seeded(lambda: Net(3))
    run = compiled(model, REGION)
    run(X)
    fresh = Net(3).double()
    model.load_state_dict(fresh.state_dict(), assign=True)
    expected = step(rewired(fresh, memory="store"), fresh, X)
    assert_same(step(run, model, X), expected, 1e-10)
    setattr(model.get_submodule("blocks.1"), "inner", nn.Linear(8, 16).double())
    assert_same(step(run, model, X), step(rewired(model, memory="store"), model, X), 1e-10)


def test_changed_parameters_are_used() -> None:
    model = seeded(lambda: Net(3))
    run = compiled(model, REGION)
    run(X)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    assert_same(step(run, model, X), step(rewired(model, memory="store"), model, X), 1e-10)


def test_a_parameter_changed_before_the_backward_is_noticed() -> None:
    model = seeded(lambda: Net(3))
    loss = compiled(model, REGION)(X).sum()
    with torch.no_grad():
        model.get_submodule("blocks.1").inner.weight.mul_(2)  # type: ignore[union-attr,operator]
    with pytest.raises((re2fx.ReplayError, RuntimeError)):
        loss.backward()


def test_side_inputs() -> None:
    model, inputs = seeded(Tapped), (example(5, 8), 2 * example(5, 8))
    expected = step(rewired(model, memory="store"), model, *inputs)
    assert_same(step(compiled(model, REGION), model, *inputs), expected, 1e-10)
    torch.compiler.reset()
    calls = cut(model, *inputs).counted.calls
    assert 10 in calls  # five branches and their reruns


class Chains(nn.Module):
    """Two chains one behind the other, and one beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.middle = nn.Linear(4, 8), nn.Linear(8, 8)
        self.first, self.second, self.third = (
            nn.Sequential(Block(8, 0.3), Block(8, 0.3)) for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        out: Tensor = self.second(torch.tanh(self.middle(self.first(x)))) * self.third(-x)
        return out


def test_several_chains() -> None:
    model = seeded(Chains)
    assert len(rewired(model).plan.chains) == 3
    expected = step(rewired(model, memory="store"), model, X)
    assert_same(step(compiled(model, REGION), model, X), expected, 1e-10)
    torch.compiler.reset()
    assert 12 in cut(model, X).counted.calls  # one artifact for the branches of all three


def test_links_between_blocks() -> None:
    class Linked(nn.Module):
        """Tokens are mixed in every other block, behind a transpose."""

        def __init__(self) -> None:
            super().__init__()
            self.channels = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])
            self.tokens = nn.ModuleList([nn.Linear(5, 5) for _ in range(2)])

        def forward(self, x: Tensor) -> Tensor:
            for channel, token in zip(self.channels, self.tokens, strict=True):
                x = x + torch.tanh(channel(x))
                x = x.transpose(1, 2)
                x = x + torch.tanh(token(x))
                x = x.transpose(1, 2)
            return x

    model, x = seeded(Linked), example(3, 5, 4)
    assert [len(chain) for chain in rewired(model).plan.chains] == [4]
    expected = step(rewired(model, memory="store"), model, x)
    assert_same(step(compiled(model, REGION), model, x), expected, 1e-10)


def test_a_call_between_a_forward_and_its_backward() -> None:
    """A new size makes a new artifact; the backward of the old call must not see it."""
    model = seeded(lambda: Net(3, dropout=0.4))
    store, run = rewired(model, memory="store"), compiled(model, REGION)
    results = []
    for function in (store, run):
        model.zero_grad(set_to_none=True)
        torch.manual_seed(0)
        losses = [function(example(batch, 4)).square().sum() for batch in (5, 7, 3)]
        for loss in losses:
            loss.backward()
        results.append({name: p.grad for name, p in model.named_parameters()})
    torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=1e-12)


def test_eval_mode_and_training_in_turn() -> None:
    model = seeded(lambda: Net(3, dropout=0.4))
    store, run = rewired(model, memory="store"), compiled(model, REGION)
    for training in (True, False, True):
        model.train(training)
        assert_same(step(run, model, X), step(store, model, X), 1e-10)
        with torch.no_grad():
            torch.manual_seed(0)
            got = run(X)
            torch.manual_seed(0)
            torch.testing.assert_close(got, store(X), rtol=0, atol=1e-12)
