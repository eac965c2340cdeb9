"""A piece of a chain is never rewired on its own: an error, or the network `transform` makes."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo import graph_break
from torch._dynamo.exc import BackendCompilerFailed
from torch.utils.checkpoint import checkpoint

import re2fx
from re2fx.errors import ChainCutError

from .models import Block, ConvNet

OPTIONS = {"compiler": "eager"}
X = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

# Dynamo hides this warning from everybody but those who make warnings errors.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Compiled code does not outlive its test."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(model: Any, **options: Any) -> Any:
    """A compiled model that may have graph breaks."""
    dynamic = options.pop("dynamic", None)
    return torch.compile(model, backend="re2fx", options={**OPTIONS, **options}, dynamic=dynamic)


def run(function: Callable[..., Any], x: Tensor = X) -> Tensor:
    """A call with equal random numbers."""
    torch.manual_seed(0)
    value: Tensor = function(x)
    return value


def refused(model: nn.Module, x: Tensor = X) -> str:
    """The message with which a compiled model is refused."""
    with pytest.raises(BackendCompilerFailed) as caught:
        run(compiled(model.double()), x).sum().backward()
    assert isinstance(caught.value.inner_exception, ChainCutError)
    return str(caught.value.inner_exception)


def never_another_function(model: nn.Module, x: Tensor = X, **options: Any) -> None:
    """Refused, or the network that `transform` makes; said aloud if it is not rewired at all."""
    model = model.double()
    expected = run(re2fx.transform(model), x)
    try:
        got = run(compiled(model, **options), x)
    except BackendCompilerFailed as error:
        assert isinstance(error.inner_exception, (ChainCutError, re2fx.Re2fxWarning))  # noqa: PT017
        return
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def is_transformed(
    model: nn.Module, x: Tensor = X, example_inputs: Any = None, **options: Any
) -> None:
    """Not refused, and the network that `transform` makes."""
    model = model.double()
    rev = re2fx.transform(model, example_inputs)
    assert isinstance(rev, re2fx.RewiredModule)
    expected = run(rev, x)
    assert not torch.allclose(run(model, x), expected)
    torch.testing.assert_close(run(compiled(model, **options), x), expected, rtol=0, atol=1e-12)


# Breaks inside a chain


class Pair(nn.Module):
    """Two residuals, and a graph break somewhere."""

    def __init__(self, where: str | None = None) -> None:
        super().__init__()
        self.norm, self.f = nn.LayerNorm(8), nn.Linear(8, 8)
        self.norm2, self.g = nn.LayerNorm(8), nn.Linear(8, 8)
        self.where = where

    def stop(self, where: str) -> None:
        if self.where == where:
            graph_break()

    def forward(self, x: Tensor) -> Tensor:
        self.stop("start")
        h = self.norm(x)
        self.stop("in the branch")
        h = torch.tanh(self.f(h))
        self.stop("before the addition")
        x = x + h
        self.stop("between")
        return x + self.g(torch.tanh(self.norm2(x)))


class Loop(nn.Module):
    """Stem, pairs, norm and head."""

    def __init__(self, where: str | None = None, which: tuple[int, ...] = (1,)) -> None:
        super().__init__()
        self.stem, self.norm, self.head = nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3)
        self.pairs = nn.ModuleList([Pair(where if i in which else None) for i in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        return self.finish(self.chain(self.stem(x)))

    def chain(self, x: Tensor) -> Tensor:
        for pair in self.pairs:
            x = pair(x)
        return x

    def finish(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(x))
        return out


class Unrolled(Loop):
    """The same without a loop."""

    def chain(self, x: Tensor) -> Tensor:
        x = self.pairs[0](x)
        x = self.pairs[1](x)
        out: Tensor = self.pairs[2](x)
        return out


class InSequential(Loop):
    """The same with torch's container."""

    def __init__(self, where: str | None = None, which: tuple[int, ...] = (1,)) -> None:
        super().__init__(where, which)
        self.sequence = nn.Sequential(*self.pairs)

    def chain(self, x: Tensor) -> Tensor:
        out: Tensor = self.sequence(x)
        return out


PLACES = ("start", "in the branch", "before the addition", "between")
WHICH = {"first": (0,), "middle": (1,), "all": (0, 1, 2)}
CASES = [(kind, place, which) for kind in (Loop, Unrolled) for place in PLACES for which in WHICH]
CASES += [(InSequential, place, "middle") for place in PLACES]


@pytest.mark.parametrize(("kind", "where", "which"), CASES)
def test_a_break_in_a_chain_is_refused(kind: type[Loop], where: str, which: str) -> None:
    message = refused(kind(where, WHICH[which]))
    assert message.startswith(f"{kind.__name__}: the residual at {__file__}:")
    assert re.search(r"which Dynamo cut at \S+\.py:\d+", message)
    assert "Remove the graph break (fullgraph=True shows what it is)" in message
    assert "torch.compile(re2fx.transform(model), backend='re2fx')" in message


class Direct(Loop):
    """The break stands in the model itself."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.pairs[0](self.stem(x))
        graph_break()
        x = self.pairs[1](x)
        return self.finish(x)


def line(function: Any, text: str) -> int:
    """Where a text stands in this file."""
    lines, first = inspect.getsourcelines(function)
    return first + next(index for index, code in enumerate(lines) if text in code)


def test_the_message_names_the_lines() -> None:
    message = refused(Direct())
    residuals = (line(Pair.forward, "x + h"), line(Pair.forward, "x + self.g"))
    assert any(f"the residual at {__file__}:{number} " in message for number in residuals)
    where = f"{__file__}:{line(Direct.forward, 'graph_break()')}"
    assert f"which Dynamo cut at {where} (Call to `torch._dynamo.graph_break()`)." in message


def test_the_message_names_the_caller_of_a_piece() -> None:
    class Caller(Direct):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for pair in self.pairs:
                x = pair(x)
                graph_break()
            return self.finish(x)

    message = refused(Caller())
    assert f"which Dynamo cut at {__file__}:{line(Caller.forward, 'x = pair(x)')}." in message


def test_the_remedy_works() -> None:
    model = Direct().double()
    with pytest.raises(BackendCompilerFailed):
        run(compiled(model))
    torch.compiler.reset()
    rev = re2fx.transform(model)
    torch.testing.assert_close(run(compiled(rev)), run(rev), rtol=0, atol=1e-12)


@pytest.mark.parametrize("where", ["start", "between"])
def test_a_break_between_blocks_with_activations(where: str) -> None:
    class Stage(ConvNet):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            x = self.blocks[0](x)
            if where == "between":
                graph_break()
            x = self.blocks[2](self.blocks[1](x))
            out: Tensor = self.head(x.mean((2, 3)))
            if where == "start":
                graph_break()
            return out

    images = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    if where == "between":
        refused(Stage(), images)
    else:
        is_transformed(Stage().eval(), images)


# What a stream passes where it is cut


class Joined(nn.Module):
    """Two residuals, an operation, two residuals; cut before or after the operation."""

    def __init__(self, operation: Any, width: int, before: bool) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 8)
        self.left = nn.Sequential(Block(8), Block(8))
        self.right = nn.Sequential(Block(width), Block(width))
        self.operation, self.before = operation, before

    def forward(self, x: Tensor) -> Tensor:
        x = self.left(self.stem(x))
        if self.before:
            graph_break()
        x = self.operation(x)
        if not self.before:
            graph_break()
        out: Tensor = self.right(x).flatten(1).sum(1)
        return out


OPERATIONS: dict[str, tuple[Any, int]] = {
    "relu": (F.relu, 8),
    "an activation module": (nn.Softsign(), 8),
    "permute": (lambda x: x.permute(0, 2, 1), 5),
    "reshape": (lambda x: x.reshape(-1, 8), 8),
    "a module that reshapes": (nn.Unflatten(2, (2, 4)), 4),
    "scale": (lambda x: 0.5 * x, 8),
    "clone": (lambda x: x.clone(), 8),
    "contiguous": (lambda x: x.contiguous(), 8),
    "identity": (nn.Identity(), 8),
    "several": (lambda x: (F.relu(x) * 0.5).permute(0, 2, 1).contiguous(), 5),
    "dropout": (lambda x: F.dropout(x, 0.5), 8),
    "a dropout that is off": (nn.Dropout(0.0), 8),
    "norm": (nn.LayerNorm(8), 8),
    "layer scale": (lambda x: x * torch.linspace(0.5, 1, 8, dtype=x.dtype), 8),
    "detach": (lambda x: x.detach(), 8),
    "cast": (lambda x: x.to(torch.float64), 8),
    "index": (lambda x: x[:, None], 8),
    "split": (lambda x: torch.cat(x.split(4, -1), -1), 8),
}


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_cut_next_to_an_operation(name: str, before: bool) -> None:
    operation, width = OPERATIONS[name]
    never_another_function(Joined(operation, width, before))


class Parts(nn.Module):
    """What the models below are made of."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.head = nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3)
        self.blocks = nn.ModuleList([Block(8) for _ in range(4)])

    def finish(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(x))
        return out

    def chain(self, x: Tensor, *numbers: int) -> Tensor:
        for number in numbers:
            x = self.blocks[number](x)
        return x

    def branch(self, number: int, x: Tensor) -> Tensor:
        block: Any = self.blocks[number]
        hidden: Tensor = block.outer(torch.tanh(block.inner(block.norm(x))))
        return hidden


# How a stream gets from piece to piece


@dataclass
class Box:
    """A container of the user's own."""

    x: Tensor


class InTuple(Parts):
    def forward(self, x: Tensor) -> Tensor:
        pair = (self.chain(self.stem(x), 0), 1)
        graph_break()
        return self.finish(self.chain(pair[0], 1, 2, 3))


class InDict(Parts):
    def forward(self, x: Tensor) -> Tensor:
        state = {"x": self.chain(self.stem(x), 0)}
        graph_break()
        return self.finish(self.chain(state["x"], 1, 2, 3))


class InContainer(Parts):
    def forward(self, x: Tensor) -> Tensor:
        box = Box(self.stem(x))
        graph_break()
        box.x = self.chain(box.x, 0, 1)
        return self.finish(self.chain(box.x, 2, 3))


class InGenerator(Parts):
    def items(self) -> Iterator[nn.Module]:
        yield self.blocks[0]
        graph_break()
        yield self.blocks[1]
        yield self.blocks[2]

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.items():
            x = block(x)
        return self.finish(x)


class InRecursion(Parts):
    def descend(self, x: Tensor, number: int) -> Tensor:
        if number == 0:
            return x
        graph_break()
        return self.descend(x + self.branch(number, x), number - 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.finish(self.descend(self.stem(x), 3))


class InTry(Parts):
    def forward(self, x: Tensor) -> Tensor:
        x = self.chain(self.stem(x), 0)
        try:
            x = self.chain(x, 1)
            graph_break()
            x = self.chain(x, 2)
        finally:
            self.last = 1
        return self.finish(x)


class InContext(Parts):
    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        with torch.autocast("cpu", enabled=False):
            x = self.chain(x, 0, 1)
            graph_break()
            x = self.chain(x, 2)
        return self.finish(x)


class InFunctions(Parts):
    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for number in range(3):
            x = (lambda value, n=number: value + self.branch(n, value))(x)
            graph_break()
        return self.finish(x)


class InCheckpoint(Parts):
    def inner(self, x: Tensor) -> Tensor:
        x = self.chain(x, 1)
        graph_break()
        return self.chain(x, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.chain(self.stem(x), 0)
        x = checkpoint(self.inner, x, use_reentrant=False)
        return self.finish(self.chain(x, 3))


class InHook(Parts):
    def __init__(self) -> None:
        super().__init__()
        self.blocks[1].register_forward_hook(lambda *_: graph_break())

    def forward(self, x: Tensor) -> Tensor:
        return self.finish(self.chain(self.stem(x), 0, 1, 2, 3))


class InBranchHook(Parts):
    def __init__(self) -> None:
        super().__init__()
        self.blocks[1].norm.register_forward_hook(lambda *_: graph_break())  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        return self.finish(self.chain(self.stem(x), 0, 1, 2, 3))


class DisabledBlock(Parts):
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def hidden(self, x: Tensor) -> Tensor:
        return self.chain(x, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.hidden(self.chain(self.stem(x), 0, 1))
        return self.finish(self.chain(x, 3))


class DisabledBranch(Parts):
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def hidden(self, number: int, x: Tensor) -> Tensor:
        return self.branch(number, x)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.hidden(0, x)
        x = x + self.hidden(1, x)
        return self.finish(x + self.hidden(2, x))


class Everywhere(Parts):
    """Every piece sees at most half a residual."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        h = self.branch(0, x)
        graph_break()
        x = x + h
        h = self.branch(1, x)
        graph_break()
        x = x + h
        h = self.branch(2, x)
        graph_break()
        return self.finish(x + h)


class Gated(Everywhere):
    """The addition sees the skip on both sides."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        h = self.branch(0, x)
        graph_break()
        x = x + h * torch.sigmoid(x)
        h = self.branch(1, x)
        graph_break()
        return self.finish(x + h * torch.sigmoid(x))


class Dropping(Everywhere):
    """A dropout and a layer scale behind the break."""

    def forward(self, x: Tensor) -> Tensor:
        scale = self.norm.weight
        x = self.stem(x)
        h = self.branch(0, x)
        graph_break()
        x = x + F.dropout(h, 0.1) * scale
        h = self.branch(1, x)
        graph_break()
        return self.finish(x + F.dropout(h, 0.1) * scale)


CARRIERS = (
    InTuple, InDict, InContainer, InGenerator, InRecursion, InTry, InContext, InFunctions,
    InCheckpoint, InHook, InBranchHook, DisabledBlock, DisabledBranch, Everywhere, Gated, Dropping,
)  # fmt: skip


@pytest.mark.parametrize("kind", CARRIERS)
def test_a_stream_is_followed_however_it_is_carried(kind: type[nn.Module]) -> None:
    refused(kind())


def test_a_stream_without_a_batch_dimension() -> None:
    refused(Everywhere(), X[0, 0])


def test_a_number_that_decides_is_a_cut() -> None:
    class Deciding(Parts):
        def forward(self, x: Tensor) -> Tensor:
            x = self.chain(self.stem(x), 0, 1)
            if x.sum().item() > 1e9:
                return x
            return self.finish(self.chain(x, 2, 3))

    refused(Deciding())


# Additions that Python runs


class LoopOfBranches(Parts):
    """Dynamo gives up on a loop with a break: its additions never reach a backend."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for number in range(3):
            x = x + self.branch(number, x)
            graph_break()
        return self.finish(x)


class BranchModule(nn.Module):
    """A branch with a break, and no residual of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        graph_break()
        out: Tensor = self.mix(torch.tanh(x))
        return out


class LoopOfModules(Parts):
    """The addition stands in the loop, the break in a module."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList([BranchModule() for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for branch in self.branches:
            x = x + branch(x)
        return self.finish(x)


@pytest.mark.parametrize("kind", [LoopOfBranches, LoopOfModules])
def test_additions_that_python_runs_are_not_left_out_silently(kind: type[nn.Module]) -> None:
    never_another_function(kind())


def test_the_warning_names_the_additions() -> None:
    model = LoopOfBranches().double()
    number = line(LoopOfBranches.forward, "x + self.branch")
    with pytest.warns(re2fx.Re2fxWarning, match=f"the addition at {__file__}:{number}. If that"):
        run(compiled(model))


def test_numbers_that_python_adds_are_no_reason_to_warn() -> None:
    class Counting(Parts):
        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(self.stem(x))
            for number in range(2):
                graph_break()
                x = torch.tanh(x) if number + 1 > 1 else torch.sin(x)
            return x

    run(compiled(Counting().double()))


@pytest.mark.parametrize("carried", [0, 1, 2])
def test_a_stream_kept_on_the_module(carried: int) -> None:
    """It looks like a buffer to the piece that reads it."""

    class Kept(Parts):
        state: Tensor

        def forward(self, x: Tensor) -> Tensor:
            self.state = self.chain(self.stem(x), *range(carried))
            graph_break()
            for number in range(carried, 4):
                self.state = self.blocks[number](self.state)
            return self.finish(self.state)

    never_another_function(Kept())


# Residuals inside other operators


class Checkpointed(Parts):
    """Some of the blocks are checkpointed; Dynamo keeps those in a graph of their own."""

    def __init__(self, *numbers: int) -> None:
        super().__init__()
        self.numbers = numbers

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for number, block in enumerate(self.blocks):
            kept = number not in self.numbers
            x = block(x) if kept else checkpoint(block, x, use_reentrant=False)
        return self.finish(x)


@pytest.mark.parametrize("numbers", [(0,), (1,), (2, 3), (0, 1, 2, 3)])
def test_checkpointed_blocks_are_rewired_or_refused(numbers: tuple[int, ...]) -> None:
    never_another_function(Checkpointed(*numbers))


def test_a_region_compiled_once_is_rewired_or_refused() -> None:
    class Region(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.Sequential(Block(8), Block(8))

        @torch.compiler.nested_compile_region
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.blocks(x)
            return out

    class Regions(Parts):
        def __init__(self) -> None:
            super().__init__()
            self.regions = nn.ModuleList([Region(), Region()])

        def forward(self, x: Tensor) -> Tensor:
            x = self.chain(self.stem(x), 0, 1)
            for region in self.regions:
                x = region(x)
            return self.finish(self.chain(x, 2, 3))

    never_another_function(Regions())


# The same plan as transform's for what torch's modules do


ACTIVATIONS = (
    nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(), nn.LeakyReLU(), nn.PReLU(), nn.ELU(), nn.SELU(),
    nn.CELU(), nn.GELU(), nn.SiLU(), nn.Mish(), nn.Hardswish(), nn.Hardtanh(), nn.Hardsigmoid(),
    nn.Softplus(), nn.Softsign(), nn.Tanh(), nn.Sigmoid(), nn.LogSigmoid(), nn.Softshrink(),
)  # fmt: skip


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda module: type(module).__name__)
def test_an_activation_module_behind_the_addition(activation: nn.Module) -> None:
    class Activated(Parts):
        def __init__(self) -> None:
            super().__init__()
            self.activation = activation

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for number in range(2):
                x = self.activation(x + self.branch(number, x))
            x = self.chain(self.norm(x), 2, 3)  # a chain in any case
            return self.finish(x)

    is_transformed(Activated())


SHAPES: dict[str, tuple[Any, int]] = {
    "flatten": (nn.Flatten(), 40),
    "unflatten": (nn.Unflatten(2, (2, 4)), 4),
    "transpose": (lambda x: x.transpose(1, 2), 5),
    "mT": (lambda x: x.mT, 5),
    "movedim": (lambda x: x.movedim(1, 2), 5),
    "view with sizes": (lambda x: x.view(x.shape[0], -1), 40),
    "unsqueeze": (lambda x: x.unsqueeze(1), 8),
    "index": (lambda x: x[:, None], 8),
    "dropout": (nn.Dropout(0.5), 8),
    "double": (lambda x: x.double(), 8),
    "scale": (lambda x: x / 2, 8),
    "roll": (lambda x: x.roll(1, 1), 8),
}


@pytest.mark.parametrize("name", SHAPES)
def test_an_operation_between_residuals(name: str) -> None:
    operation, width = SHAPES[name]

    class Whole(Joined):
        def forward(self, x: Tensor) -> Tensor:
            x = self.operation(self.left(self.stem(x)))
            out: Tensor = self.right(x).flatten(1).sum(1)
            return out

    example_inputs = X if name == "double" else None  # which say that it changes nothing
    is_transformed(Whole(operation, width, True), example_inputs=example_inputs)


# Breaks that cut no chain


class BeforeStem(Parts):
    def forward(self, x: Tensor) -> Tensor:
        graph_break()
        return self.finish(self.chain(self.stem(x), 0, 1, 2))


class WithPositions(Parts):
    """Sums of members and of embeddings are no residuals."""

    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(1, 5, 8))
        self.register_buffer("table", torch.randn(1, 5, 8))

    def forward(self, x: Tensor) -> Tensor:
        graph_break()
        x = self.stem(x) + self.positions + self.table
        return self.finish(self.chain(x, 0, 1, 2))


class WithSizes(Parts):
    """Sizes go from piece to piece, and into a view of the stream."""

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens = x.shape[:2]
        graph_break()
        x = self.stem(x).view(batch, tokens, -1)
        return self.finish(self.chain(x, 0, 1, 2))


class AfterNorm(Parts):
    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.chain(self.stem(x), 0, 1, 2))
        graph_break()
        out: Tensor = self.head(x)
        return out


class AfterHead(Parts):
    def forward(self, x: Tensor) -> Tensor:
        x = self.finish(self.chain(self.stem(x), 0, 1, 2))
        graph_break()
        return 2 * x


class BothSides(Parts):
    def forward(self, x: Tensor) -> Tensor:
        graph_break()
        x = self.finish(self.chain(self.stem(x), 0, 1, 2))
        graph_break()
        return 2 * x


class TwoHeads(Parts):
    """A sum of two heads is a projection, and no stream goes on behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.chain(self.stem(x), 0, 1, 2))
        x = self.head(x) + self.other(x)
        graph_break()
        return 2 * x


class TwoLosses(TwoHeads):
    """Nor behind a sum of losses."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.chain(self.stem(x), 0, 1, 2))
        loss = self.head(x).square().mean() + 0.1 * self.other(x).square().mean()
        graph_break()
        return 2 * loss


class HookedRoot(Parts):
    def __init__(self) -> None:
        super().__init__()
        self.register_forward_pre_hook(lambda *_: graph_break())
        self.register_forward_hook(lambda *_: graph_break())

    def forward(self, x: Tensor) -> Tensor:
        return self.finish(self.chain(self.stem(x), 0, 1, 2))


UNCUT = (BeforeStem, WithPositions, WithSizes, AfterNorm, AfterHead, BothSides)


@pytest.mark.parametrize("kind", [*UNCUT, TwoHeads, TwoLosses])
def test_a_break_outside_the_chain_is_harmless(kind: type[nn.Module]) -> None:
    is_transformed(kind())


@pytest.mark.parametrize("kind", [BeforeStem, WithPositions, WithSizes])
def test_a_break_outside_the_chain_is_harmless_for_sizes_that_vary(kind: type[nn.Module]) -> None:
    is_transformed(kind(), dynamic=True)


@pytest.mark.filterwarnings("ignore:hooks on")
def test_breaks_in_hooks_of_the_model_are_harmless() -> None:
    model = HookedRoot().double()
    got = run(compiled(model))
    plain = BeforeStem().double()
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(got, run(re2fx.transform(plain)), rtol=0, atol=1e-12)


def test_a_stream_at_the_border_of_the_whole_model_is_no_cut() -> None:
    model = nn.Sequential(Block(4), Block(4), Block(4))
    is_transformed(model)
    torch.compiler.reset()
    rev = re2fx.transform(model)
    function = compiled(lambda x: 2 * model(x))
    torch.testing.assert_close(run(function), 2 * run(rev), rtol=0, atol=1e-12)


def test_a_training_step_with_breaks() -> None:
    model = BothSides().double()
    rev = re2fx.transform(model)

    def train(network: nn.Module, x: Tensor) -> float:
        graph_break()
        loss = network(x).square().mean()
        loss.backward()
        return float(loss.detach())

    results = []
    for network, function in ((rev, train), (model, compiled(train))):
        model.zero_grad(set_to_none=True)
        loss = function(network, X)
        results.append([torch.tensor(loss), *[p.grad for p in model.parameters()]])
    torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=1e-12)


def test_a_submodule_between_breaks() -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = AfterHead()

        def forward(self, x: Tensor) -> Tensor:
            graph_break()
            y: Tensor = self.model(x)
            graph_break()
            return 2 * y

    is_transformed(Around())


def test_a_leaf_at_a_cut_is_no_residual() -> None:
    """It is not rewired, so no chain goes on through it."""

    class Ending(Parts):
        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(self.chain(self.stem(x), 0, 1))
            x = self.chain(x, 2)
            graph_break()
            out: Tensor = self.head(x)
            return out

    is_transformed(Ending(), leaves=["blocks.2"])


def test_a_chain_of_a_rewired_module_may_be_cut() -> None:
    """What is rewired already keeps its function however it is cut."""

    class Around(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            graph_break()
            y: Tensor = self.inner(x)
            graph_break()
            return 2 * y

    rev = re2fx.transform(nn.Sequential(Block(4), Block(4), Block(4)).double())
    torch.testing.assert_close(run(compiled(Around(rev))), 2 * run(rev), rtol=0, atol=1e-12)
