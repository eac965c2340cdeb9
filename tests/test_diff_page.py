"""The page of a difference: what is in the file, and how rows are arranged on it."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.fx import Graph

import re2fx
from re2fx.capture import capture
from re2fx.diff import Diff, diff, history
from re2fx.diff.layout import Section, arrange
from re2fx.diff.page import embedded
from tests.models import Net
from tests.test_diff import passed

MIB = 2**20


def data_of(html: str) -> Any:
    """The data a page shows."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)
    assert found is not None
    return json.loads(found[1])


def sections(root: Section) -> list[Section]:
    """A section and all in it."""
    inside = [
        section for item in root.items if isinstance(item, Section) for section in sections(item)
    ]
    return [root, *inside]


def numbers(root: Section) -> list[int]:
    """The rows in a section, in order."""
    return [
        number
        for item in root.items
        for number in (numbers(item) if isinstance(item, Section) else [item])
    ]


@pytest.fixture(scope="module")
def swin() -> Diff:
    """A model of four chains, from the zoo, before and after."""
    from tests.zoo import ZOO

    model = ZOO["swin_t"].build_full()
    return diff(model, re2fx.transform(model))


def test_the_page_is_one_small_file_that_needs_no_network(swin: Diff, tmp_path: Path) -> None:
    path = tmp_path / "swin.html"
    html = swin.to_html(path)
    assert path.read_text("utf-8") == html
    assert len(html.encode()) < 2 * MIB
    outside = r"https?:(?!//www\.w3\.org/2000/svg\")|<link|<img|<iframe|@import|url\((?!#)|\bsrc="
    assert re.findall(outside, html) == []
    assert "default-src 'none'" in html


def test_the_page_has_every_node_and_chain(swin: Diff) -> None:
    (data,) = data_of(swin.to_html())["diffs"]
    assert len(data["rows"]) == len(swin.rows)
    assert data["summary"]["edges_rewired"] == swin.summary.edges_rewired
    assert [len(chain["steps"]) for chain in data["chains"]] == [4, 4, 12, 4]
    for chain in data["chains"]:
        for step in chain["steps"]:
            assert data["rows"][step["row"]][1].rpartition(".")[2].startswith("add")
            assert data["rows"][step["branch"]][1].startswith(step["module"])


def test_nothing_in_a_graph_can_become_markup(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script><!-- \u2028 &amp;"
    graph = Graph()
    value = graph.call_function(torch.relu, (graph.placeholder("x"),), {"note": evil})
    value.meta["source_line"] = (f"/tmp/{evil}.py", 3, evil, evil)
    value.meta["nn_module_stack"] = {"a": (evil, evil)}
    graph.output(value)
    result = diff(Graph(), graph)
    result = Diff(result.before, type(result.after)(evil, result.after.values), result.pairs)
    html = result.to_html(tmp_path / "evil.html", [(evil, result)])
    assert html.count("<script") == 2
    assert "alert(1)</script>" not in html
    assert "<!--" not in html
    assert evil in data_of(html)["diffs"][0]["strings"]
    assert "<script" not in result._repr_html_()
    assert embedded("<&>") == '"\\u003c\\u0026\\u003e"'


def test_rows_stay_in_order_whatever_folds(swin: Diff) -> None:
    root = arrange(swin.rows)
    assert numbers(root) == list(range(len(swin.rows)))
    for section in sections(root):
        inside = numbers(section)
        assert section.size == len(inside)
        assert section.changed == sum(swin.rows[i].status != "kept" for i in inside)
        if section.sort == "module" and section.path:
            assert all(
                swin.rows[i].scope == section.path
                or swin.rows[i].scope.startswith(section.path + ".")
                for i in inside
            )


def test_identical_neighbours_and_long_runs_are_folded() -> None:
    before = capture(Net(depth=12)).train
    after = copy.deepcopy(before)
    for node in after.nodes:
        if node.name == "blocks_7_outer":
            node.kwargs = {"note": 1}
    root = arrange(diff(before, after).rows)
    alike = [section for section in sections(root) if section.sort == "alike"]
    runs = [[item.path for item in s.items if isinstance(item, Section)] for s in alike]
    assert runs == [[f"blocks.{i}" for i in range(7)], [f"blocks.{i}" for i in range(8, 12)]]
    assert [section.changed for section in alike] == [0, 0]
    flat = Graph()
    value = flat.placeholder("x")
    for _ in range(40):
        value = flat.call_function(torch.relu, (value,))
    flat.output(value)
    edited = copy.deepcopy(flat)
    next(node for node in edited.nodes if node.name == "relu_20").target = torch.tanh
    folded = [s for s in sections(arrange(diff(flat, edited).rows)) if s.sort == "same"]
    assert [section.size for section in folded] == [18, 17]
    assert not any(section.changed for section in folded)


def test_steps_are_tabs() -> None:
    model = Net(depth=2)
    rev = re2fx.transform(model)
    assert isinstance(rev, re2fx.RewiredModule)
    graph = capture(model).train
    steps = history(passed(rev, ("captured", graph), ("normalized", graph), ("rewired", rev.graph)))
    html = diff(model, rev).to_html(steps=steps)
    names = ["all", "captured → normalized", "normalized → rewired"]
    assert [entry["name"] for entry in data_of(html)["diffs"]] == names
    assert re.findall(r'role="tab" [^>]*>([^<]*)<', html) == names
