"""What `explain` says, in a terminal, in a notebook and as data."""

from __future__ import annotations

import copy
import io
import json
import pickle

import pytest
import torch
from rich.console import Console
from torch import nn

import re2fx

from .models import Net
from .test_api import Mixed, Plain


def printed(explanation: re2fx.Explanation, width: int = 160) -> str:
    """As a terminal shows it."""
    stream = io.StringIO()
    Console(file=stream, width=width).print(explanation)
    return stream.getvalue()


def cells(line: str) -> list[str]:
    """A table's line as its cells."""
    return [cell.strip() for cell in line.split("  ") if cell.strip()]


def test_a_terminal_shows_chains_refusals_and_modules_kept_whole() -> None:
    lines = printed(re2fx.explain(Mixed())).splitlines()
    rows = [cells(line) for line in lines]
    assert rows[0] == ["Mixed: 5 skip-adds found: 2 rewired in 1 chain, 3 refused"]
    (chain,) = [row for row in rows if row[-1:] == ["x = F.relu(x + mix(x))"]]
    assert chain[:4] == ["0", "2", "the model itself", "post-activation"]
    assert [row[:2] for row in rows if row[1:2] in (["post-norm"], ["projection"])] == [
        ["2", "post-norm"],
        ["1", "projection"],
    ]
    assert any(row[:1] == ["gate"] for row in rows)


def test_a_narrow_terminal_loses_no_text() -> None:
    text = printed(re2fx.explain(Net(depth=2)), width=70)
    assert "…" not in text
    assert "self.outer(self.drop(F.gelu(self.inner(self.norm(x)))))" in "".join(text.split())


def test_big_models_stay_short() -> None:
    assert len(printed(re2fx.explain(Net(depth=60))).splitlines()) < 12


def test_the_nearest_misses_are_shown_when_nothing_is_found() -> None:
    text = printed(re2fx.explain(Plain()))
    assert "Nearest misses" in text
    nothing = re2fx.explain(nn.Sequential(nn.Linear(2, 2)))
    assert printed(nothing).strip() == "Sequential: the graph has no addition of two activations"


def test_the_data_is_complete_and_goes_through_json() -> None:
    explanation = re2fx.explain(Mixed())
    data = json.loads(json.dumps(explanation.to_dict()))
    assert (data["found"], data["rewired"]) == (5, 2)
    first = data["chains"][0]["residuals"][0]
    assert first["kind"] == "post-activation"
    assert first["location"]["code"] == "x = F.relu(x + mix(x))"
    assert {refusal["rule"] for refusal in data["refusals"]} == {"post-norm", "projection"}
    assert list(data["kept_whole"]) == ["gate"]


def test_a_notebook_shows_tables_with_everything_escaped() -> None:
    class Odd(Net):
        pass

    Odd.__name__ = "<script>"
    page = re2fx.explain(Odd(depth=2))._repr_html_()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert page.count("<table>") == 1


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("x + mix(x)", "pre-activation"),
        ("torch.relu(x + mix(x))", "post-activation"),
        ("x + mix(x) + mix(2 * x)", "pre-activation, 2 parallel branches"),
        ("0.5 * x + 0.5 * mix(x)", "pre-activation, scaled"),
        ("x + side * mix(x)", "pre-activation, side inputs"),
    ],
)
def test_kinds(code: str, kind: str) -> None:
    class Kind(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mixes = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])
            self.stem = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            side = torch.sigmoid(x)
            x = self.stem(x)
            for mix in self.mixes:
                x = eval(code, {"x": x, "mix": mix, "torch": torch, "side": side})
            return x

    plan = re2fx.explain(Kind()).plan
    assert [r.kind for chain in plan.chains for r in chain.residuals] == [kind] * 2


def test_a_rewired_module_keeps_its_history() -> None:
    rev = re2fx.transform(Net(depth=2))
    assert isinstance(rev, re2fx.RewiredModule)
    names = [name for name, _ in rev.history]
    assert names == ["captured", "normalized", "rewired", "final"]
    assert rev.history[-1][1] is rev.graph
    for other in (copy.deepcopy(rev), pickle.loads(pickle.dumps(rev))):
        assert [len(graph.nodes) for _, graph in other.history] == [
            len(graph.nodes) for _, graph in rev.history
        ]
    rev.eval()
    assert [name for name, _ in rev.history] == names
