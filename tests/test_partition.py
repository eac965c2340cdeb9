"""Bodies in parts: their order, and what no part may do."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import symbolic_trace

from re2fx.body import Body, Fixed, Part
from re2fx.codegen import compile_graph
from re2fx.expand import expand
from re2fx.framing import Framing
from re2fx.partition import partition
from re2fx.replay import Lookup
from re2fx.rerun import Again, Trace
from re2fx.slicing import regions

from .situations.harness import double, example
from .slices import values_of


@pytest.fixture(autouse=True)
def _nothing_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that is saved is brought back, whatever its size."""
    monkeypatch.setattr("re2fx.rerun.SMALL", 0)


class Call:
    """Brings tensors back for a body that runs alone."""

    def __init__(self, body: Body, root: nn.Module, x: Tensor) -> None:
        self.trace, self.root, self.x = Trace(body, x.device), root, x
        self.again: Again | None = None

    def run(self) -> list[Any]:
        return self.trace.run(self.root, [self.x], self, 0)

    def unpack(self, block: int, slot: int) -> Tensor:
        x = self.x.detach().requires_grad_()
        self.again = self.again or Again(self.trace, self.root, [x], "the body")
        return self.again.take(slot)[0]

    def lost(self, block: int) -> None:
        pass


def body_of(model: nn.Module, x: Tensor) -> Body:
    """A model in parts."""
    graph = symbolic_trace(model).graph
    values = values_of(graph, model, x)
    found = regions(graph, model, values)
    return partition(graph, model, found, values, compile_graph, "the body")


def assert_same(model: nn.Module, body: Body, x: Tensor) -> None:
    """A body has the values and gradients of its model."""
    outcomes = []
    call = Call(body, model, x.clone().requires_grad_())
    for result, given in ((call.run()[0], call.x), (None, x.clone().requires_grad_())):
        result = model(given) if result is None else result
        gradients = torch.autograd.grad(result.sin().sum(), [given, *model.parameters()])
        outcomes.append([result, *gradients])
    torch.testing.assert_close(*outcomes, rtol=1e-9, atol=1e-10)


class Wide(nn.Module):
    """A wide layer, beside which something else is done."""

    def __init__(self, beside: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 64), nn.Linear(64, 4)
        self.other, self.beside = nn.Linear(4, 4), beside

    def forward(self, x: Tensor) -> Tensor:
        return self.beside(self, x)


def mixed(x: Tensor) -> Tensor:
    """Something that has no rule for slices, and that saves nothing."""
    return torch.fft.fft2(x, dim=(0, 1)).real


def wide(self: Any, x: Tensor) -> Tensor:
    """What is run slice by slice."""
    out: Tensor = self.second(torch.nn.functional.gelu(self.first(x)))
    return out


def written_first(self: Any, x: Tensor) -> Tensor:
    """What is read by the wide layer was written to before, and a view of it is read later."""
    v = self.other(x)
    v.mul_(3)
    w = wide(self, v)
    return w + v.transpose(1, 2).flip(-1).transpose(1, 2)


def written_between(self: Any, x: Tensor) -> Tensor:
    """A value is written between two reads that have nothing to do with the wide layer."""
    v = self.other(x)
    before = mixed(v)
    v.mul_(3)
    after = mixed(v)
    return wide(self, x) + before + mixed(after)


def written_later(self: Any, x: Tensor) -> Tensor:
    """The wide layer comes between a value and what overwrites it."""
    v = self.other(mixed(x))
    w = wide(self, mixed(v))
    total = mixed(v.exp())
    v.add_(mixed(w))
    return total + v.sin()


X = example(2, 6, 4)


def test_a_write_beside_a_region_stays_in_its_place() -> None:
    for beside in (written_first, written_between):
        model = double(Wide(beside))
        body = body_of(model, X)
        assert body.sliced
        assert_same(model, body, X)


def test_no_part_changes_what_it_reads() -> None:
    """A second run of it would read something else."""
    model = double(Wide(written_later))
    body = body_of(model, X)
    assert_same(model, body, X)


class Counting(nn.Module):
    """A size of a value inside of what is sliced is read elsewhere too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 64), nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).sigmoid()
        b, t, c = hidden.shape
        turned = hidden.view(b, t, 2, c // 2).transpose(2, 3).reshape(b, t, c)
        out: Tensor = mixed(self.second(turned)) * (b + t)
        return out


def test_numbers_that_are_counted_inside() -> None:
    """Whole, too, it has them."""
    model = double(Counting())
    body = body_of(model, X)
    assert body.sliced
    for x in (X, example(3, 5, 4)):
        assert_same(model, body, x)


class Later(nn.Module):
    """The size of something that is made of its own results is read inside of a region."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = x.repeat_interleave(8, -1).exp()
        count = mixed(hidden).shape[1]
        return mixed(hidden.view(x.shape[0], count, 32).sin())


def test_numbers_that_are_counted_behind() -> None:
    model = Later()
    assert_same(model, body_of(model, X), X)


def test_a_body_without_regions_is_one_part() -> None:
    model = double(Wide(written_later))
    graph = symbolic_trace(model).graph
    framing = Framing({}, model)
    body = framing.body(graph, compile_graph, "the body")
    assert len(body.parts) == 1
    assert_same(model, body, X)


def test_results_that_hold_no_tensors_stay_what_they_are() -> None:
    """The shape of a value, which a later part reads, is a `torch.Size`."""

    class Shaped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 64), nn.Linear(64, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = mixed(x)
            shape = y.size()
            z: Tensor = mixed(self.second(self.first(y).sigmoid()))
            return z.flatten().view(shape) * shape.numel()

    model = double(Shaped())
    body = body_of(model, X)
    assert body.sliced
    assert_same(model, body, X)


@torch.fx.wrap
def closed(x: Tensor, weight: Tensor) -> Tensor:
    """Kept whole by tracing."""
    return torch.tanh(x @ weight) @ weight.t()


class Closed(nn.Module):
    """Calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return closed(x, self.weight)


def test_what_is_opened_needs_gradients_as_before() -> None:
    """Else a region that others follow would be taken for one that is cheap to run once more."""
    model = torch.fx.symbolic_trace(Closed())
    x = torch.empty(3, 4, device="meta", requires_grad=True)
    weight = torch.empty(4, 4, device="meta", requires_grad=True)
    given = {"x": x, "weight": weight, "closed": x @ weight}
    values = {node: given.get(node.name) for node in model.graph.nodes}
    opened = expand(model.graph, values, torch.device("cpu"))
    assert opened is not None
    graph, known = opened
    made = [known[node] for node in graph.nodes if node.op == "call_function"]
    assert len(made) >= 3
    assert all(value.requires_grad for value in made if value.shape == (3, 4))


def test_a_body_is_fixed_to_containers_of_tensors_and_to_a_device() -> None:
    meta, real = (torch.empty(2, 3, device=device) for device in ("meta", "cpu"))
    fixed = Fixed.of([(meta, 2), 5], torch.device("cpu"))
    assert fixed.holds([(real, 2), 5])
    assert not fixed.holds([[real, 2], 5])
    assert not fixed.holds([(real, 3), 5])
    assert not fixed.holds([(real.t(), 2), 5])
    assert not fixed.holds([(meta, 2), 5])  # moved to another device since
    with torch.autocast("cpu"):
        assert not fixed.holds([(real, 2), 5])


@pytest.mark.parametrize("apart", [False, True])
def test_what_nobody_reads_again_is_let_go(apart: bool) -> None:
    """Behind a part whose gradient is there, unless one in front is run once more for its own."""
    made: list[weakref.ref[Any]] = []

    def square(root: nn.Module, x: Tensor) -> Tensor:
        squared = x * x
        made.append(weakref.ref(squared.untyped_storage()))
        return squared

    def logarithm(root: nn.Module, squared: Tensor) -> Tensor:
        return (squared + 1).log()

    def total(root: nn.Module, squared: Tensor, logs: Tensor) -> Tensor:
        return (squared + logs).sum().exp()

    def part(function: Any, reads: tuple[int, ...], write: int, **options: Any) -> Part:
        return Part(function, reads, (write,), nothing, packed=False, **options)

    root = nn.Module()
    nothing = Lookup(())
    parts = (
        part(square, (0,), 1),
        part(logarithm, (1,), 2, apart=apart),
        part(total, (1, 2), 3),
    )
    x = example(5, 3).requires_grad_()
    call = Call(Body(parts, 1, (3,)), root, x)
    (output,) = call.run()
    saved = call.trace.spans[2].begins[0]
    first = call.unpack(0, saved)
    assert torch.equal(first, output)
    assert [ref() is not None for ref in made] == [False, apart]
    assert torch.equal(call.unpack(0, saved), first)
    output.backward()
    assert x.grad is not None
    expected = output.detach() * (2 * x + 2 * x / (x * x + 1))
    torch.testing.assert_close(x.grad, expected.detach(), rtol=1e-12, atol=0)
