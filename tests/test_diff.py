"""Which nodes are matched and what is said to differ."""

from __future__ import annotations

import copy
import operator
from collections import Counter
from collections.abc import Callable
from itertools import zip_longest
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.fx import Graph, GraphModule, Node, symbolic_trace
from torch.fx.node import map_arg

import re2fx
from re2fx.capture import capture
from re2fx.diff import Diff, Edge, diff, history
from re2fx.diff.match import aligned, ascending
from re2fx.errors import OptionError
from tests.models import ConvNet, Net, Tapped

UNARY: tuple[Callable[..., Any], ...] = (torch.relu, torch.neg, torch.tanh)
BINARY: tuple[Callable[..., Any], ...] = (operator.add, operator.mul)


def names(result: Diff, status: str) -> set[str]:
    """Names in their graphs of the nodes of one status."""
    return {row.value.name for row in result.rows if row.status == status}


def edit(graph: Graph, change: Callable[[dict[str, Node], Graph], None]) -> Graph:
    """An edited copy with equal names."""
    edited = copy.deepcopy(graph)
    change({node.name: node for node in edited.nodes}, edited)
    edited.lint()
    return edited


@pytest.mark.parametrize("build", [Net, ConvNet, Tapped])
def test_a_graph_does_not_differ_from_itself(build: Callable[[], nn.Module]) -> None:
    model = build()
    rev = re2fx.transform(model)
    for subject in (model, rev, capture(model).train):
        result = diff(subject, subject)
        assert not result
        assert result.edges == ()
        assert len(result.pairs) == len(result.before.values) == result.summary.kept
        assert len(str(result).splitlines()) == 1


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "convnext_tiny"])
def test_real_models_before_and_after(name: str) -> None:
    from tests.zoo import ZOO

    model = ZOO[name].build()
    rev = ZOO[name].rewire(model)
    assert not diff(model, model)
    assert not diff(rev, rev)
    result = diff(model, rev)
    rewired = {row.after.name for row in result.rows if row.status == "rewired" and row.after}
    # From the second residual of a chain on, every addition adds to an older state.
    older = {block.output for wiring in rev._rewired[True].wirings for block in wiring.blocks[1:]}
    kept = {row.after.name for row in result.rows if row.before and row.after}
    # The in-place additions of a ResNet are written anew, behind the activation.
    assert bool(older & kept) == (name != "resnet18")
    assert older & kept <= rewired
    assert len(result.wirings) == len(rev.plan.chains)


def test_nodes_that_only_moved_are_the_same() -> None:
    graph = Graph()
    x = graph.placeholder("x")
    a, b = graph.call_function(torch.relu, (x,)), graph.call_function(torch.tanh, (x,))
    graph.output((a, b))

    def swap(nodes: dict[str, Node], edited: Graph) -> None:
        nodes["tanh"].append(nodes["relu"])

    result = diff(graph, edit(graph, swap))
    assert not result
    assert [row.name for row in result.rows] == ["x", "tanh", "relu", "output"]


def test_exported_graphs_keep_their_modules() -> None:
    model = Net(depth=2).eval()
    exported = torch.export.export(model, (torch.randn(2, 4),)).module()
    result = diff(model, exported)
    added = {row.scope for row in result.rows if row.status == "added"}
    assert {"blocks.0.norm", "blocks.1.outer", "head"} <= added
    assert {"x", "output"} <= {row.name for row in result.rows if row.before and row.after}


def test_everything_that_has_a_graph_is_taken() -> None:
    model = Net().eval()
    graph = capture(model).eval
    for other in (GraphModule(model, graph), graph, symbolic_trace(model)):
        assert not diff(model, other), type(other)
    with pytest.raises(OptionError, match="after=str"):
        diff(model, "Net")


def test_a_model_is_captured_in_its_mode_and_left_alone() -> None:
    class Drop(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.dropout(x, 0.5, self.training)

    model = Drop()
    trained = model.train()
    captured = capture(model)
    assert not diff(trained, captured.train)
    assert names(diff(model.eval(), captured.train), "changed") == {"dropout"}
    assert not model.training


def test_rewiring_rewires() -> None:
    model = Net(depth=3)
    result = diff(model, re2fx.transform(model))
    assert not names(result, "removed")
    # The first addition adds to the input of the chain, which is widened to fp32.
    assert {"add", "add_1", "add_2"} <= names(result, "rewired")
    rewired = {(e.reader, e.before, e.after) for e in result.edges if e.status == "rewired"}
    assert ("blocks.2.add", "blocks.1.add", "blocks.0.add") in rewired
    assert len(result.wirings) == 1


def blocks(count: int, without: int | None = None) -> Graph:
    """Identical residual blocks of functions, their nodes without any provenance."""
    graph = Graph()
    value = graph.placeholder("x")
    for number in range(count):
        if number != without:
            branch = graph.call_function(torch.relu, (graph.call_method("neg", (value,)),))
            value = graph.call_function(operator.add, (value, branch))
    graph.output(graph.call_function(torch.tanh, (value,)))
    return graph


def test_a_block_removed_from_the_middle_is_one_block() -> None:
    def remove(nodes: dict[str, Node], graph: Graph) -> None:
        nodes["add_3"].replace_all_uses_with(nodes["add_2"])
        for name in ("add_3", "relu_3", "neg_3"):
            graph.erase_node(nodes[name])

    before = blocks(8)
    result = diff(before, edit(before, remove))
    assert names(result, "removed") == {"add_3", "relu_3", "neg_3"}
    assert not names(result, "added") | names(result, "changed")
    # Captured anew the blocks have other numbers, and which one is missing cannot be told.
    again = diff(before, blocks(8, without=3))
    assert again.summary.removed == 3
    assert again.summary.added == again.summary.changed == 0


def test_a_module_removed_is_that_module() -> None:
    whole = Net(depth=5)
    before = capture(whole).train
    for number in (0, 2, 4):
        part = copy.deepcopy(whole)
        part.blocks[number] = nn.Identity()
        result = diff(before, capture(part).train)
        assert {row.scope for row in result.rows if row.status == "removed"} == {f"blocks.{number}"}
        assert result.summary.removed == 6
        assert result.summary.changed == 0


def test_names_that_count_do_not_mislead() -> None:
    """An addition at the top renames all that follow; structure tells them apart."""

    def build(extra: bool) -> Graph:
        graph = Graph()
        value = graph.placeholder("x")
        if extra:
            value = graph.call_function(operator.add, (value, 1))
        for number in range(6):
            branch = graph.call_function(torch.relu, (value,))
            value = graph.call_function(operator.add, (branch, number + 2))
        graph.output(value)
        return graph

    result = diff(build(False), build(True))
    assert [row.value.literals for row in result.rows if row.status == "added"] == ["., 1"]
    assert result.summary.added == result.summary.edges_rewired == result.summary.edges_added == 1
    assert result.summary.removed == result.summary.changed == 0


def test_renamed_graphs_without_provenance_are_the_same() -> None:
    before = capture(ConvNet()).train
    after = copy.deepcopy(before)
    for number, node in enumerate(after.nodes):
        node.meta.clear()
        if node.op not in ("placeholder", "output"):
            node.name = f"value{number}"
    result = diff(before, after)
    assert not result


def test_lists_of_inputs_are_aligned() -> None:
    graph = Graph()
    parts = [graph.placeholder(name) for name in "abc"]
    joined = graph.call_function(torch.cat, (parts,))
    graph.output(joined)

    def drop(nodes: dict[str, Node], edited: Graph) -> None:
        nodes["cat"].args = ([nodes["a"], nodes["c"]],)

    result = diff(graph, edit(graph, drop))
    assert result.edges == (Edge("cat", "args[0][1]", "b", None),)
    assert names(result, "changed") == {"cat"}


@st.composite
def edits(draw: st.DrawFn) -> tuple[Graph, list[tuple[str, int]]]:
    """A random graph and a few kinds of edits with the numbers of the nodes to edit."""
    graph = Graph()
    values = [graph.placeholder("x"), graph.placeholder("y")]
    for _ in range(draw(st.integers(4, 25))):
        pick = st.sampled_from(values[-6:])
        if draw(st.booleans()):
            values.append(graph.call_function(draw(st.sampled_from(UNARY)), (draw(pick),)))
        else:
            target = draw(st.sampled_from(BINARY))
            values.append(graph.call_function(target, (draw(pick), draw(pick))))
    graph.output(tuple(values[-3:]))
    places = draw(st.lists(st.integers(2, len(values) - 1), max_size=3, unique=True))
    kinds = st.sampled_from(["insert", "remove", "target", "literal", "rewire"])
    return graph, [(draw(kinds), place) for place in places]


def insert(graph: Graph, node: Node) -> None:
    """A sigmoid behind a node, for all who read it."""
    with graph.inserting_after(node):
        new = graph.call_function(torch.sigmoid, (node,))

    def is_other(user: Node) -> bool:
        return user is not new

    node.replace_all_uses_with(new, delete_user_cb=is_other)


def apply(graph: Graph, changes: list[tuple[str, int]]) -> Graph:
    """The edited copy."""
    edited = copy.deepcopy(graph)
    nodes = list(edited.nodes)
    for kind, place in changes:
        node = nodes[place]
        if kind == "insert":
            insert(edited, node)
        elif kind == "remove":
            node.replace_all_uses_with(node.all_input_nodes[0])
            edited.erase_node(node)
        elif kind == "target":
            node.target = torch.exp if len(node.args) == 1 else torch.maximum
        elif kind == "literal":
            node.kwargs = {"out": None}
        else:
            node.replace_input_with(node.all_input_nodes[0], nodes[0])
    edited.lint()
    return edited


def test_a_sigmoid_in_the_place_of_another_function_is_a_new_target() -> None:
    """It was put behind what that function read, which then was removed: nothing tells."""
    graph = Graph()
    value = graph.call_function(torch.neg, (graph.placeholder("x"),))
    graph.output(graph.call_function(torch.relu, (value,)))
    result = diff(graph, apply(graph, [("insert", 1), ("remove", 2)]))
    assert names(result, "changed") == {"sigmoid"}
    assert not names(result, "added") | names(result, "removed")


@settings(deadline=None, max_examples=150)
@given(edits())
def test_random_edits_are_recovered_exactly_or_as_fewer(
    case: tuple[Graph, list[tuple[str, int]]],
) -> None:
    graph, changes = case
    edited = apply(graph, changes)
    result = diff(graph, edited)
    old = {node.name: node for node in graph.nodes}
    new = {node.name: node for node in edited.nodes}
    by_kind = {list(old)[place] for kind, place in changes if kind in ("target", "literal")}
    made = new.keys() - old.keys(), old.keys() - new.keys(), by_kind
    seen = tuple(names(result, kind) for kind in ("added", "removed", "changed"))
    if sum(map(len, seen)) < sum(map(len, made)):
        # What is put in and what goes nearby may be one node with a new target.
        assert {kind for kind, _ in changes} >= {"insert", "remove"}
        return
    assert seen == made
    mine = {row.name: row.value.name for row in result.rows}
    found = Counter(
        (mine[e.reader], e.before and mine[e.before], e.after and mine[e.after])
        for e in result.edges
    )
    expected: Counter[tuple[str, str | None, str | None]] = Counter()
    for name in {**old, **new}:
        was, now = reads(old.get(name)), reads(new.get(name))
        pairs = zip_longest(was, now)
        expected.update((name, left, right) for left, right in pairs if left != right)
    assert found == expected


def reads(node: Node | None) -> list[str]:
    """Names of what a node reads, slot by slot."""
    found: list[str] = []

    def keep(value: Node) -> Node:
        found.append(value.name)
        return value

    if node is not None:
        map_arg(node.args, keep)
    return found


def test_ten_thousand_nodes() -> None:
    before = blocks(3333)
    nodes = {node.name for node in before.nodes}
    assert len(nodes) > 10_000

    def change(found: dict[str, Node], graph: Graph) -> None:
        for number in range(100, 3300, 400):
            insert(graph, found[f"relu_{number}"])

    result = diff(before, edit(before, change))
    assert result.summary.added == result.summary.edges_rewired == 8
    assert result.summary.removed == result.summary.changed == 0
    # The same, told by structure alone.
    renamed = edit(before, change)
    for number, node in enumerate(renamed.nodes):
        node.name = f"value{number}" if node.op.startswith("call") else node.name
    assert diff(before, renamed).summary == result.summary


def test_long_and_short_sequences_are_aligned() -> None:
    assert aligned("abxc", "abyc") == [(0, 0), (1, 1), (3, 3)]
    long = [f"{i % 7}" for i in range(500)]
    pairs = aligned(long, long[:-1])
    assert len(pairs) == 499
    assert all(long[i] == long[j] for i, j in pairs)
    assert ascending([(0, 2), (1, 0), (2, 1), (3, 3)]) == [(1, 0), (2, 1), (3, 3)]


def passed(rev: nn.Module, *graphs: tuple[str, Graph]) -> nn.Module:
    """A rewired module that kept the graphs of its passes; each has a class of its own."""
    setattr(type(rev), "history", graphs)
    return rev


def test_history_has_a_difference_per_pass() -> None:
    model = Net(depth=2)
    rev = re2fx.transform(model)
    captured = capture(model).train
    assert isinstance(rev, re2fx.RewiredModule)
    steps = history(
        passed(rev, ("captured", captured), ("normalized", captured), ("rewired", rev.graph))
    )
    assert [name for name, _ in steps] == ["captured → normalized", "normalized → rewired"]
    assert not steps[0][1]
    assert steps[1][1].summary == diff(model, rev).summary
    assert [len(step.wirings) for _, step in steps] == [0, 1]
    with pytest.raises(OptionError, match="keeps no graphs"):
        history(model)
