"""Differences as text, JSON and DOT, and in notebooks."""

from __future__ import annotations

import copy
import json
import operator
import re
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.fx import Graph, Node

import re2fx
from re2fx.capture import capture
from re2fx.diff import Diff, diff
from tests.models import Net, Tapped


def write(node: Node, module: str, line: int, code: str) -> Node:
    """Say where a node comes from, as tracing does."""
    node.meta["nn_module_stack"] = {module: (module, "Block")}
    node.meta["source_line"] = ("/home/someone/net.py", line, "forward", code)
    return node


def small() -> Graph:
    """Two residual blocks of modules and functions."""
    graph = Graph()
    value = graph.placeholder("x")
    for number in range(2):
        path = f"blocks.{number}"
        norm = write(graph.call_module(f"{path}.norm", (value,)), path, 7, "y = self.norm(x)")
        branch = write(
            graph.call_function(nn.functional.gelu, (norm,), {"approximate": "tanh"}),
            path,
            8,
            "y = F.gelu(y)",
        )
        scale = write(graph.get_attr(f"{path}.scale"), path, 9, "x + y * self.scale")
        branch = write(graph.call_function(operator.mul, (branch, scale)), path, 9, "x + y * s")
        value = write(graph.call_function(operator.add, (value, branch)), path, 9, "x + y * s")
    graph.output(graph.call_method("mean", (value, (1, 2)), {"keepdim": True}))
    return graph


def edited() -> tuple[Graph, Graph]:
    """Block 1 no longer scales, and adds to the input instead of to block 0."""
    before = small()
    after = copy.deepcopy(before)
    nodes = {node.name: node for node in after.nodes}
    nodes["add_1"].args = (nodes["x"], nodes["gelu_1"])
    after.erase_node(nodes["mul_1"])
    after.erase_node(nodes["blocks_1_scale"])
    nodes["mean"].args = (nodes["add_1"], 1)
    return before, after


GOLDEN = """\
0 nodes added, 2 removed, 1 changed, 10 kept; 0 edges added, 2 removed, 2 rewired
--- before
+++ after
@@ -7,7 +7,5 @@ blocks.1 Block
  norm = self.norm(blocks.0.add)
  gelu = F.gelu(norm, approximate='tanh')
 # net.py:9  x + y * self.scale
- scale = self.scale
 # net.py:9  x + y * s
- mul = gelu * scale
- add = blocks.0.add + mul
+ add = x + gelu
- mean = add.mean((1, 2), keepdim=True)
+ mean = add.mean(1, keepdim=True)
  return mean"""


def test_text() -> None:
    before, after = edited()
    assert diff(before, after).text() == GOLDEN


def test_context_is_what_was_asked_for() -> None:
    result = diff(*edited())
    plain = [line for line in result.text(context=0).splitlines() if line.startswith("  ")]
    assert plain == []
    assert "x = <input>" in result.text(context=100)
    assert len(result.text(context=100).splitlines()) > len(GOLDEN.splitlines())


def test_hunks_end_with_their_module() -> None:
    """Changes that lie close together in two modules are two hunks; every row stands in one."""
    before = small()
    after = copy.deepcopy(before)
    for node in after.nodes:
        if node.op == "get_attr":
            node.target = f"{node.target}s"
    for context in (0, 1, 2, 8):
        lines = diff(before, after).text(context).splitlines()
        heads = [line.split(" @@ ")[1] for line in lines if line.startswith("@@")]
        assert heads == ["blocks.0 Block", "blocks.1 Block"]
        code = [line for line in lines if line.startswith(("  ", "- ", "+ "))]
        assert len(code) == (4 + 4 * context if context < 3 else len(before.nodes) + 2)


def test_names_do_not_come_from_torch() -> None:
    """Whatever torch calls its nodes, the text is the same."""
    before, after = edited()
    for graph in (before, after):
        for number, node in enumerate(graph.nodes):
            if node.op not in ("placeholder", "output"):
                node.name = f"whatever_{number}"
    assert diff(before, after).text() == GOLDEN


def test_code_is_readable() -> None:
    graph = Graph()
    x, flag = graph.placeholder("x"), graph.placeholder("flag", default_value=None)
    first = graph.call_function(operator.getitem, (x, (slice(None), slice(1, None), 0)))
    shape = graph.call_function(getattr, (first, "shape"))
    size = graph.call_function(operator.getitem, (shape, -1))
    aten = graph.call_function(torch.ops.aten.add.Tensor, (first, size), {"alpha": 2})
    cast = graph.call_method("to", (aten,), {"dtype": torch.float16})
    softmax = graph.call_function(torch.softmax, (cast, -1))
    softmax = graph.call_function(operator.iadd, (softmax, 1))
    graph.output({"y": [softmax, flag], "z": (cast,)})
    text = diff(Graph(), graph).text().splitlines()
    assert [line[2:] for line in text if line.startswith("+ ")] == [
        "x = <input>",
        "flag = <input, default None>",
        "getitem = x[:, 1:, 0]",
        "getattr = getitem.shape",
        "getitem_1 = getattr[-1]",
        "add = aten.add.Tensor(getitem, getitem_1, alpha=2)",
        "to = add.to(dtype=torch.float16)",
        "softmax = torch.softmax(to, -1)",
        "iadd = operator.iadd(softmax, 1)",
        "return {'y': [iadd, flag], 'z': (to,)}",
    ]


def test_colours_mark_changes() -> None:
    result = diff(*edited())
    text = result.text(color=True)
    assert "\x1b[31m- mul = gelu * scale\x1b[0m" in text
    assert "\x1b[32m+ add = x + gelu\x1b[0m" in text
    assert re.sub(r"\x1b\[\d+m", "", text) == GOLDEN


@pytest.fixture(scope="module")
def rewired() -> Diff:
    """A model with taps and side inputs before and after."""
    model = Tapped()
    return diff(model, re2fx.transform(model))


def test_json_round_trip(rewired: Diff) -> None:
    data = json.loads(rewired.to_json())
    assert data == rewired.to_dict()
    assert len(data["nodes"]) == len(rewired.changes)
    assert data["summary"]["edges_rewired"] == sum(e["status"] == "rewired" for e in data["edges"])
    known = {row.name for row in rewired.rows}
    for edge in data["edges"]:
        assert {edge["reader"], edge["before"], edge["after"]} - {None} <= known
    record = next(n for n in data["nodes"] if n["status"] == "rewired")
    assert record["file"].endswith("models.py")
    assert record["code"]
    assert record["before"]["reads"] != record["after"]["reads"]


STATEMENT = re.compile(
    r'digraph diff \{|\}|rankdir=TB;|node \[.*\];|subgraph cluster_\d+ \{|label="[^"\\]*";'
    r'|"(?:[^"\\]|\\.)*"(?: -> "(?:[^"\\]|\\.)*")? '
    r'\[(?:\w+=(?:\w+|"(?:[^"\\]|\\.)*")(?:, )?)+\];'
)


def test_dot_is_well_formed(rewired: Diff) -> None:
    graph = Graph()
    quote = graph.call_function(torch.tensor, ('a "quoted" \\ string\n',))
    graph.output(quote)
    for result in (rewired, diff(*edited()), diff(Graph(), graph)):
        lines = [line.strip() for line in result.to_dot().splitlines()]
        assert [line for line in lines if not STATEMENT.fullmatch(line)] == []
        assert sum(line.endswith("{") for line in lines) == lines.count("}")
        nodes = sum(" [label=" in line for line in lines)
        assert nodes == len(result.rows)
    text = rewired.to_dot()
    assert "style=dashed" in text  # a removed edge
    assert '-> "return"' not in text


def test_notebooks_show_summary_and_text() -> None:
    result = diff(*edited())
    html = result._repr_html_()
    assert html.startswith(f"<div><strong>{result.summary}</strong>")
    assert "approximate=&#x27;tanh&#x27;" in html
    assert '<span style="color:#cf222e">- mul = gelu * scale</span>' in html
    assert "<script" not in html
    same = diff(small(), small())
    assert same._repr_html_() == f"<div><strong>{same.summary}</strong></div>"


def test_shapes_are_shown_where_known() -> None:
    model = Net(depth=1).eval()
    graph = capture(model).eval
    for node in graph.nodes:
        node.meta["val"] = torch.empty(2, 3, device="meta")
    records = diff(Graph(), graph).to_dict()["nodes"]
    assert {record["after"]["shape"] for record in records} == {"float32[2, 3]"}


def test_diffs_need_no_page_library() -> None:
    code = (
        "import sys, re2fx.diff, torch.fx as fx\n"
        "str(re2fx.diff.diff(fx.Graph(), fx.Graph()))\n"
        "print([n for n in ('jinja2', 'rich', 'matplotlib') if n in sys.modules])"
    )
    code = code.replace("re2fx.diff.diff", "sys.modules['re2fx.diff'].diff")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"
