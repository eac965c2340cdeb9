"""In-place writes as dataflow: the same values from another spelling."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph

from re2fx.capture import capture
from re2fx.codegen import compile_graph
from re2fx.passes.normalize import normalize

from .test_detect import Toy, X, toy


def graphs(function: Any) -> tuple[Toy, Graph, Graph]:
    """The toy, and its graph before and after."""
    model = toy(function)
    graph = capture(model).eval
    return model, graph, normalize(graph, model)


def spelled(graph: Graph) -> list[str]:
    """The operations in order, without module calls."""
    return [
        str(getattr(node.target, "__name__", node.target))
        for node in graph.nodes
        if node.op in ("call_function", "call_method")
    ]


def assert_equal_programs(model: Toy, *graphs: Graph) -> None:
    """All graphs compute what the model computes, bit for bit."""
    with torch.no_grad():
        wanted = model(X.clone())
        for graph in graphs:
            got = compile_graph(graph, "test")(model, X.clone())
            torch.testing.assert_close(got, wanted, rtol=0, atol=0)


def augmented(m: Any, x: Tensor) -> Tensor:
    x = m.s(x)
    x += m.a(x)
    return x


def method(m: Any, x: Tensor) -> Tensor:
    return m.s(x).add_(m.a(x))


def alpha(m: Any, x: Tensor) -> Tensor:
    return m.s(x).add_(m.a(x), alpha=2)


def keyword(m: Any, x: Tensor) -> Tensor:
    return m.s(x).add_(other=m.a(x))


def behind_a_view(m: Any, x: Tensor) -> Tensor:
    x = m.s(x).transpose(1, 2)
    x.add_(m.a(x.transpose(1, 2)).transpose(1, 2))
    return x


def in_place_activation_added(m: Any, x: Tensor) -> Tensor:
    x = m.s(x)
    return x.add_(m.relu(m.a(x)))


FREE = [augmented, method, alpha, keyword, behind_a_view, in_place_activation_added]


@pytest.mark.parametrize("function", FREE)
def test_addition_is_written_out_of_place(function: Any) -> None:
    model, before, after = graphs(function)
    assert "add" in spelled(after)
    assert not set(spelled(after)) & {"iadd", "add_"}
    assert_equal_programs(model, before, after)


def argument(m: Any, x: Tensor) -> Tensor:
    x.add_(m.a(x))
    return x


def view_read_later(m: Any, x: Tensor) -> Any:
    x = m.s(x)
    view = x[:, 1:]
    x.add_(m.a(x))
    return x, view


def through_a_view(m: Any, x: Tensor) -> Tensor:
    x = m.s(x)
    x[:, 1:].add_(m.a(x)[:, 1:])
    return m.c(x)


def parameter(m: Any, x: Tensor) -> Tensor:
    return m.a(x) + m.g.detach().add_(0.0)


@pytest.mark.parametrize("function", [argument, view_read_later, through_a_view, parameter])
def test_addition_that_others_can_see_stays(function: Any) -> None:
    """The negative twins: the caller's tensor, or a view that is read later."""
    model, before, after = graphs(function)
    assert spelled(after) == spelled(before)
    assert set(spelled(after)) & {"iadd", "add_"}
    assert_equal_programs(model, before, after)


def augmented_and_a_view(m: Any, x: Tensor) -> Any:
    x = m.s(x)
    view = x[:, 1:]
    x += m.a(x)
    return x, view


def augmented_and_an_old_name(m: Any, x: Tensor) -> Any:
    old = x = m.s(x)
    x += m.a(x)
    return m.b(old), x


@pytest.mark.parametrize("function", [augmented_and_a_view, augmented_and_an_old_name])
def test_augmented_assignment_is_seen_through_other_names(function: Any) -> None:
    """A tracer's proxies know no ``+=`` of their own; a plain addition would be another program."""
    assert_equal_programs(*graphs(function))


def old_name(m: Any, x: Tensor) -> Any:
    x = m.s(x)
    y = x
    y.add_(m.a(x))
    return m.b(x), y


def activation(m: Any, x: Tensor) -> Tensor:
    h = m.s(x)
    F.relu(h, inplace=True)
    return m.b(h)


def module(m: Any, x: Tensor) -> Tensor:
    h = m.s(x)
    m.relu(h)
    return m.b(h)


@pytest.mark.parametrize("function", [old_name, activation, module])
def test_reads_go_through_the_write(function: Any) -> None:
    model, before, after = graphs(function)
    (read_before,), (read_after,) = (
        [n.all_input_nodes[0].name for n in g.nodes if n.target == "b"] for g in (before, after)
    )
    assert read_before == "s"
    assert read_after != "s"
    assert_equal_programs(model, before, after)


def test_reads_before_the_write_are_left_alone() -> None:
    def function(m: Any, x: Tensor) -> Any:
        h = m.s(x)
        early = m.b(h)
        return early, F.relu(h, inplace=True)

    model, before, after = graphs(function)
    (reader,) = (n for n in after.nodes if n.target == "b")
    assert reader.all_input_nodes[0].name == "s"
    assert_equal_programs(model, before, after)


def test_modules_that_reshape_are_methods() -> None:
    class Reshaping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flat, self.hooked = nn.Flatten(1), nn.Flatten(1)
            self.split = nn.Unflatten(-1, (2, -1))
            self.hooked.register_forward_hook(lambda module, args, out: 2 * out)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.hooked(self.split(self.flat(x)))
            return out

    model = Reshaping()
    graph = capture(model).eval
    new = normalize(graph, model)
    assert [str(n.target) for n in new.nodes][1:-1] == ["flatten", "unflatten", "hooked"]
    x = torch.randn(2, 3, 4)
    result = compile_graph(new, "new")(model, x)
    torch.testing.assert_close(result, model(x), rtol=0, atol=0)


def test_chained_in_place_additions() -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        x = m.s(x)
        for f in (m.a, m.b, m.c):
            x += f(x)
        return x

    model, before, after = graphs(function)
    assert spelled(after) == ["add"] * 3
    assert_equal_programs(model, before, after)
