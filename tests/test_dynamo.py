"""Dynamo's graphs with members as attributes, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

import re2fx
from re2fx.codegen import compile_graph
from re2fx.dynamo import Lifted, Root, lift, lower, module_path
from re2fx.pipeline import make_plan

from .models import Block, ConvNet, Net, Tapped

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Compiled code does not outlive its test."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@dataclass
class Captured:
    """What Dynamo gave to a backend, one entry per compilation."""

    modules: list[GraphModule] = field(default_factory=list)
    inputs: list[list[Any]] = field(default_factory=list)
    lifted: list[Lifted] = field(default_factory=list)

    def __call__(self, module: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        """Keep everything; run the graph as it is."""
        self.modules.append(module)
        self.inputs.append(list(inputs))
        self.lifted.append(lift(module, inputs))
        run: Callable[..., Any] = module.forward
        return run

    def members(self) -> dict[str, str]:
        """Names of the last graph's members by what they are."""
        root = self.lifted[-1].root
        kinds = dict.fromkeys(root._parameters, "parameter")
        kinds.update((name, "other") for name in root._buffers)
        return kinds


def planned(lifted: Lifted) -> re2fx.Plan:
    """What would be done with a lifted graph."""
    return make_plan(lifted.graph, lifted.root)[1]


def capture(model: Any, *inputs: Any, **options: Any) -> Captured:
    """Compile and call once."""
    captured = Captured()
    torch.compile(model, backend=captured, fullgraph=True, **options)(*inputs)
    return captured


class Members(nn.Module):
    """Everything a module may hold."""

    buffer: Tensor
    transient: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.frozen = nn.Parameter(torch.randn(4), requires_grad=False)
        self.register_buffer("buffer", torch.randn(4))
        self.register_buffer("transient", torch.randn(4), persistent=False)
        self.plain = torch.randn(4, dtype=torch.float64)
        self.listed = [torch.randn(4, dtype=torch.float64)]
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = self.norm(x @ self.weight) * self.frozen + self.buffer * self.transient
        return x + y * self.plain + self.listed[0]


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    """A model in fp64 with the same parameters every time."""
    torch.manual_seed(0)
    return build().double()


# Members


def test_members_are_recognised() -> None:
    captured = capture(seeded(Members), X, -X)
    found = captured.members()
    assert sum(kind == "parameter" for kind in found.values()) == 4  # two, and the norm's
    names = " ".join(found)
    for part in ("weight", "frozen", "buffer", "transient", "plain", "listed", "running_mean"):
        assert part in names
    lifted = captured.lifted[-1]
    inputs = [name for name, member in lifted.placeholders if not member]
    assert len(inputs) == 2


def test_parameters_stay_parameters() -> None:
    captured = capture(seeded(Members), X, -X)
    root = captured.lifted[-1].root
    assert all(isinstance(p, nn.Parameter) for p in root._parameters.values())
    assert not any(isinstance(b, nn.Parameter) for b in root._buffers.values())
    assert len(list(root.parameters())) == 4


def test_inputs_of_a_function_are_no_members() -> None:
    weight = torch.randn(4, 4, dtype=torch.float64)
    captured = capture(lambda x, w: torch.tanh(x @ w) + x, X, weight)
    assert captured.members() == {}


def test_a_parameter_given_to_a_function_is_a_member() -> None:
    weight = nn.Parameter(torch.randn(4, 4, dtype=torch.float64))
    captured = capture(lambda x: torch.tanh(x @ weight) + x, X)
    assert list(captured.members().values()) == ["parameter"]


def test_a_model_behind_a_function_has_members() -> None:
    model = seeded(lambda: Net(2))
    captured = capture(lambda x: model(x).sum(), X)
    assert len(captured.members()) == len(list(model.parameters()))


def test_the_root_is_in_the_mode_of_the_graph_and_holds_its_submodules() -> None:
    class Conditional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = torch.cond(
                x[0, 0] > 0, lambda v: torch.sin(self.mix(v)), lambda v: torch.cos(v), (x,)
            )
            return out

    captured = capture(seeded(Conditional), X)
    root = captured.lifted[-1].root
    assert len(list(root.children())) == 2
    assert isinstance(root, Root)


# Round trip

MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...]]] = {
    "members": (Members, (X, -X)),
    "transformer": (lambda: Net(3, dropout=0.4), (X,)),
    "residual network": (lambda: ConvNet(2, dropout=0.4), (torch.randn(2, 3, 6, 6).double(),)),
    "taps and side inputs": (lambda: Tapped(depth=3), (X.repeat(1, 2), X.repeat(1, 2))),
}


@pytest.mark.parametrize("name", MODELS)
def test_lifted_graphs_run_as_they_were(name: str) -> None:
    build, inputs = MODELS[name]
    model = seeded(build)
    captured = capture(model, *inputs)
    module, lifted = captured.modules[-1], captured.lifted[-1]
    values = concrete(model, captured, inputs)
    results = []
    lowered = lower(lifted, lifted.graph)
    function = compile_graph(lifted.graph, "lifted")

    def run_lifted(*values: Any) -> Any:
        root, rest = lifted.split(values)
        return function(root, *rest)

    for run in (module, lowered, run_lifted):
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        torch.manual_seed(0)
        results.append(run(*values))
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
    for result in results[1:]:
        for a, b in zip(result, results[0], strict=True):
            assert torch.equal(a, b)


def concrete(model: nn.Module, captured: Captured, inputs: tuple[Tensor, ...]) -> list[Any]:
    """The values of a call, in the order of the placeholders."""
    real = captured.inputs[-1]
    assert not any("Fake" in type(value).__name__ for value in real)
    return real


@pytest.mark.parametrize("name", MODELS)
def test_lowering_keeps_the_order_of_the_call(name: str) -> None:
    build, inputs = MODELS[name]
    captured = capture(seeded(build), *inputs)
    module, lifted = captured.modules[-1], captured.lifted[-1]
    lowered = lower(lifted, lifted.graph)
    given = [node.name for node in module.graph.nodes if node.op == "placeholder"]
    assert [name for name, _ in lifted.placeholders] == given
    assert [n.name for n in lowered.graph.nodes if n.op == "placeholder"] == given
    assert not any(n.op == "get_attr" for n in lowered.graph.nodes)
    rest = [node.name for node in lifted.graph.nodes if node.op == "placeholder"]
    assert rest == [name for name, member in lifted.placeholders if not member]


def test_the_given_graph_is_left_as_it_is() -> None:
    captured = capture(seeded(Members), X, -X)
    module = captured.modules[-1]
    before = str(module.graph)
    lifted = lift(module, captured.inputs[-1])
    lower(lifted, lifted.graph)
    assert str(module.graph) == before
    assert not any(node.op == "get_attr" for node in module.graph.nodes)


def test_placeholders_keep_what_dynamo_says_of_them() -> None:
    captured = capture(seeded(Members), X, -X)
    lifted = captured.lifted[-1]
    given = {n.name: n.meta for n in captured.modules[-1].graph.nodes if n.op == "placeholder"}
    for node in lower(lifted, lifted.graph).graph.nodes:
        if node.op == "placeholder":
            assert node.meta.keys() >= given[node.name].keys()


def test_sizes_that_vary_are_inputs() -> None:
    class Sized(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = super().forward(x).view(x.shape[0], -1)
            return x * x.shape[0]

    captured = capture(seeded(lambda: Sized(2)), X, dynamic=True)
    lifted, values = captured.lifted[-1], captured.inputs[-1]
    sizes = [
        (name, member)
        for (name, member), value in zip(lifted.placeholders, values, strict=True)
        if not isinstance(value, Tensor)
    ]
    assert sizes
    assert not any(member for _, member in sizes)
    flow, plan = make_plan(lifted.graph, lifted.root)
    assert [len(chain) for chain in plan.chains] == [2]
    assert all(flow.is_shape(flow.by_name[name]) for name, _ in sizes)


# Where nodes stand


def plans(model: nn.Module, *inputs: Any) -> tuple[re2fx.Plan, re2fx.Plan]:
    """The plan of Dynamo's graph, and transform's."""
    return planned(capture(model, *inputs).lifted[-1]), re2fx.explain(model).plan


class Nested(nn.Module):
    """Residuals in several modules and in the model itself, and two that are refused."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.more = nn.Linear(4, 8), nn.Linear(8, 8)
        self.stages = nn.ModuleList([nn.Sequential(Block(8), Block(8)), nn.Sequential(Block(8))])
        self.named = nn.ModuleDict({"last one": Block(8)})

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        x = x + self.more(x)
        x = self.named["last one"](x)
        x = F.layer_norm(x, (8,))
        x = x + torch.tanh(self.more(x))
        return self.more(x) + torch.sigmoid(x)


@pytest.mark.parametrize("training", [True, False])
def test_locations_are_transforms(training: bool) -> None:
    model = seeded(Nested).train(training)
    plan, expected = plans(model, X)
    locations = [r.location for chain in plan.chains for r in chain.residuals]
    assert locations == [r.location for chain in expected.chains for r in chain.residuals]
    assert plan.signature() == expected.signature()
    assert [(r.rule, r.location) for r in plan.refusals] == [
        (r.rule, r.location) for r in expected.refusals
    ]
    first = locations[0]
    assert first.module == "stages.0.0"
    assert first.code == "return x + self.outer(self.drop(F.gelu(self.inner(self.norm(x)))))"
    assert first.function == "forward"


def test_a_function_around_a_model_shows_in_the_paths() -> None:
    model = seeded(lambda: Net(2))
    lifted = capture(lambda x: model(x), X).lifted[-1]
    plan = planned(lifted)
    paths = [residual.location.module for residual in plan.chains[0].residuals]
    assert [path.endswith(f"blocks.{i}") for i, path in enumerate(paths)] == [True, True]


@pytest.mark.parametrize(
    ("given", "path"),
    [
        ("L['self']", ""),
        ("L['self'].blocks.0", "blocks.0"),
        ('L["self"].blocks.0', "blocks.0"),
        ("L['model'].blocks.0", "model.blocks.0"),
        ("L['model']", "model"),
        ("G['net'].head", "net.head"),
        ("blocks.0", "blocks.0"),
        ("L['self']._modules['blocks']._modules['0']", "blocks.0"),
        (
            "L['self'].__dict__['_modules']['blocks'].__dict__['_modules']['0'].norm",
            "blocks.0.norm",
        ),
    ],
)
def test_module_paths(given: str, path: str) -> None:
    assert module_path(given) == path


# Spellings


class Spelled(nn.Module):
    """One network; how its additions are written is given."""

    def __init__(self, spelling: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 8)
        self.mixes = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])
        self.spelling = spelling

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        for mix in self.mixes:
            x = self.spelling(x, torch.tanh(mix(x)))
        return x


def in_place(x: Tensor, f: Tensor) -> Tensor:
    x += f
    return x


def in_place_branch(x: Tensor, f: Tensor) -> Tensor:
    f += x
    return f


SPELLINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "x + f": lambda x, f: x + f,
    "f + x": lambda x, f: f + x,
    "x += f": in_place,
    "f += x": in_place_branch,
    "torch.add": torch.add,
    "torch.add(input=, other=)": lambda x, f: torch.add(input=x, other=f),
    "x.add": lambda x, f: x.add(f),
    "f.add_": lambda x, f: f.add_(x),
    "alpha": lambda x, f: torch.add(x, f, alpha=2),
    "scaled": lambda x, f: 0.5 * x + f / 2,
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings_of_an_addition(name: str) -> None:
    model = seeded(lambda: Spelled(SPELLINGS[name]))
    plan, expected = plans(model, X)
    assert plan.signature() == expected.signature()
    assert [r.rule for r in plan.refusals] == [r.rule for r in expected.refusals]
    coefficients = [
        [(r.skip_scale, r.branch_scales) for c in p.chains for r in c.residuals]
        for p in (plan, expected)
    ]
    assert coefficients[0] == coefficients[1]
    if name != "x += f":  # which writes into what tanh needs
        assert [len(chain) for chain in plan.chains] == [3]
