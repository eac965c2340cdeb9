"""Running a region by slices and as it is written, to compare the two."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Interpreter, Node
from torch.fx.node import map_arg

from re2fx.codegen import compile_graph
from re2fx.graph import lookup
from re2fx.slicing import Facts, Region, order

Values = dict[Node, Any]


def values_of(graph: Graph, root: nn.Module, *inputs: Any) -> Values:
    """What each node of a graph is for some inputs."""
    found: Values = {}

    class Recorder(Interpreter):
        def run_node(self, node: Node) -> Any:
            found[node] = super().run_node(node)
            return found[node]

    Recorder(root, graph=graph).run(*inputs)
    return found


def run_sliced(
    function: Callable[..., Any],
    root: nn.Module,
    sliced: Sequence[Tensor],
    whole: Sequence[Tensor],
    region: Region,
    slices: int,
) -> list[Tensor]:
    """The outputs of a region, run on as even slices as there can be."""
    counts = [len(part) for part in torch.arange(region.items).tensor_split(slices)]
    pieces = []
    for value, (dim, factor) in zip(sliced, region.sliced.values(), strict=True):
        pieces.append(value.split([count * factor for count in counts], dim))
    results = [function(root, *parts, *whole) for parts in zip(*pieces, strict=True)]
    columns = zip(*results, strict=True)
    joined = zip(columns, region.outputs.values(), strict=True)
    return [torch.cat(parts, dim) for parts, (dim, _) in joined]


def run_written(region: Region, root: nn.Module, given: Mapping[Node, Any]) -> list[Tensor]:
    """The outputs of a region's nodes one after another, as they are written."""
    known: Values = {**region.constants, **given}

    def value(node: Node) -> Any:
        if node not in known:
            assert node.op == "get_attr", node
            known[node] = lookup(root, str(node.target))
        return known[node]

    for node in region.nodes:
        if node in region.constants:
            continue
        taken: Any = map_arg((node.args, node.kwargs), value)
        args, kwargs = taken
        if node.op == "call_module":
            known[node] = root.get_submodule(str(node.target))(*args, **kwargs)
        elif node.op == "call_method":
            known[node] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        else:
            target: Any = node.target
            known[node] = target(*args, **kwargs)
    return [known[node] for node in region.outputs]


def run_contracted(
    graph: Graph, root: nn.Module, values: Values, found: Sequence[Region], *inputs: Any
) -> Any:
    """What a graph returns with regions run by slices, in the order that they can be run in."""
    items = order(Facts(graph, root, values), found)
    assert items is not None
    known: Values = dict(
        zip((n for n in graph.nodes if n.op == "placeholder"), inputs, strict=True)
    )
    runner = Interpreter(root, graph=graph)
    runner.env = known
    for item in items:
        if isinstance(item, Region):
            members = {n: lookup(root, str(n.target)) for n in item.sliced if n.op == "get_attr"}
            sliced = [members[n] if n in members else known[n] for n in item.sliced]
            whole = [known[n] for n in item.whole]
            function = compile_graph(item.graph(), "slice")
            results = run_sliced(function, root, sliced, whole, item, min(3, item.items))
            known.update(zip(item.outputs, results, strict=True))
        elif item.op != "placeholder":
            known[item] = runner.run_node(item)
    (output,) = (node for node in graph.nodes if node.op == "output")
    return known[output]


def leaf(value: Tensor) -> Tensor:
    """A copy that gradients are asked of."""
    return value.detach().clone().requires_grad_(value.is_floating_point())


def assert_slices(region: Region, root: nn.Module, values: Values, slices: int) -> None:
    """A region by slices has the values and gradients that it has as written."""
    inputs = [leaf(values[node]) for node in (*region.sliced, *region.whole)]
    members = [p for p in root.parameters() if p.requires_grad]
    asked = [value for value in (*inputs, *members) if value.requires_grad]
    named = dict(zip((*region.sliced, *region.whole), inputs, strict=True))
    count = len(region.sliced)
    function = compile_graph(region.graph(), "slice")
    got = run_sliced(function, root, inputs[:count], inputs[count:], region, slices)
    wanted = run_written(region, root, named)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-11)
    pair = gradients(got, asked), gradients(wanted, asked)
    torch.testing.assert_close(*pair, rtol=1e-9, atol=1e-10)


def gradients(outputs: Sequence[Tensor], asked: Sequence[Tensor]) -> list[Tensor | None]:
    """Of a weighted sum of some outputs."""
    floats = [value for value in outputs if value.requires_grad]
    if not floats or not asked:
        return []
    torch.manual_seed(1)
    weights = [torch.randn(value.shape, dtype=value.dtype) for value in floats]
    options = {"allow_unused": True, "materialize_grads": True}
    return list(torch.autograd.grad(floats, asked, weights, **options))


def assert_order(graph: Graph, root: nn.Module, values: Values, found: Sequence[Region]) -> None:
    """Regions are disjoint, and with them as units everything comes after what it reads."""
    owner = {node: region for region in found for node in region.nodes}
    assert len(owner) == sum(len(region.nodes) for region in found)
    items = order(Facts(graph, root, values), found)
    assert items is not None
    done: set[Node] = set()
    for item in items:
        if isinstance(item, Region):
            assert all(node in done for node in (*item.sliced, *item.whole))
            done.update(item.nodes)
        else:
            for node in item.all_input_nodes:
                assert node in done
                assert node not in owner or node in owner[node].outputs
            done.add(item)
