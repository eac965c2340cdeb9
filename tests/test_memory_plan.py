"""Memory plans as text, data and pictures, memory over a step, and who asks for a plan when."""

from __future__ import annotations

import io
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import re2fx
from re2fx import planner
from re2fx.foresight import Foreseen
from re2fx.memory_plan import brief
from re2fx.peak import Peak

from .models import Block, ConvNet, Net
from .planning import few_slices as few_slices
from .planning import single as single
from .test_cli import NET, run

MIB = 2**20
X = torch.randn(2048, 4)


def net(depth: int = 4, **options: Any) -> Net:
    torch.manual_seed(0)
    return Net(depth, 32, **options)


@cache
def course(memory: str | int = "lowest") -> re2fx.MemoryCourse:
    return re2fx.memory_course(net(), X, memory=memory)


def plan(memory: str | int = "lowest") -> re2fx.MemoryPlan:
    made = course(memory).plan
    assert made is not None
    return made


def step(highest: int, turn: int = 2) -> Foreseen:
    line = ((0.0, 0), (1.0, MIB), (2.0, highest), (3.0, 0))
    return Foreseen(Peak(highest, 0, "cpu", line), "backward", turn, 10, 10)


# what a plan says


def test_the_text_of_the_lowest_plan() -> None:
    lines = str(plan()).splitlines()
    assert lines[0] == "Net: a training step in as little memory as it takes"
    assert "at the highest, predicted; with everything stored" in lines[1]
    assert lines[1].endswith("times as much")
    assert lines[2].endswith("times the work of a stored step")
    assert lines[3].startswith("  highest in the backward, at ")
    assert "/" not in lines[3]
    row = next(line for line in lines if line.startswith("chain 0, blocks.0 .. blocks.3"))
    assert row.split()[5] == "4"
    assert lines[-1].startswith("outside the chains")
    assert len(lines) == 9


def test_the_text_of_a_budget() -> None:
    made = plan(4 * MIB)
    assert str(made).startswith("Net: a training step within 4.00 MiB\n")
    chain = made.chains[0]
    assert 0 < chain.reversed < 4
    assert chain.reversed + chain.checkpoints + chain.stored == 4
    assert made.predicted.peak.peak <= 4 * MIB < made.stored.peak.peak
    assert made.counts["blocks stored"] == chain.stored == made.frames.stored[0]
    row = next(line for line in str(made).splitlines() if line.startswith("chain 0"))
    numbers = (chain.reversed, chain.checkpoints, chain.stored)
    told = [str(number) for number in numbers if number]
    assert row.split()[5 : 5 + len(told)] == told


def test_what_is_not_kept_is_what_storing_would_keep() -> None:
    lowest, some = plan(), plan(4 * MIB)
    each, chain = lowest.chains[0].spared / 4, some.chains[0]
    assert chain.spared == pytest.approx(each * (chain.reversed + chain.checkpoints))
    spared = chain.spared + sum(f.size for f in some.outside if f.checkpoint)
    assert spared < some.stored.peak.peak


def test_everything_fits() -> None:
    made = plan(2**40)
    assert made.work == 1
    assert made.chains[0].stored == 4
    assert made.predicted == made.stored
    assert "times as much" not in str(made)


def test_the_frames_outside_are_in_the_tables() -> None:
    made = plan()
    first, second = made.tables()
    assert len(first.rows) == 2
    assert len(second.rows) == len(made.outside) >= 1
    assert {row[1] for row in second.rows} == {"checkpoint"}
    assert "outside the chains" in made._repr_html_()
    from rich.console import Console

    console = Console(record=True, width=140, file=io.StringIO())
    console.print(made)
    assert "checkpoint" in console.export_text()


def test_slices_are_named() -> None:
    made = plan()
    if made.sliced:
        assert f"in up to {made.frames.slices} slices" in str(made)
    assert "in slices" in str(plan(2**40))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("blocks.1 (/a/b/model.py:9)", "blocks.1 (model.py:9)"),
        ("stem to stem (stem)", "stem"),
        ("a to b (C:\\x\\y.py:3)", "a to b (y.py:3)"),
        ("blocks.1", "blocks.1"),
        ("", ""),
    ],
)
def test_names_are_brief(name: str, said: str) -> None:
    assert brief(name) == said


def test_plain_data() -> None:
    made = plan(4 * MIB)
    data = json.loads(json.dumps(made.to_dict()))
    assert data["model"] == "Net"
    assert data["memory"] == 4 * MIB
    assert data["predicted"]["peak"]["peak"] == made.predicted.peak.peak
    assert "timeline" not in data["predicted"]["peak"]
    assert data["chains"][0]["reversed"] == made.chains[0].reversed
    long = made.to_dict(timeline=True)
    assert len(long["stored"]["peak"]["timeline"]) == len(made.stored.peak.timeline)
    assert long["stored"]["turn"] == made.stored.turn


def test_the_planner_still_has_it() -> None:
    assert planner.MemoryPlan is re2fx.MemoryPlan


# pictures


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_the_picture_of_a_plan(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"plan.{suffix}"
    figure = plan(4 * MIB).plot(path)
    assert path.stat().st_size > 1000
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert [label.split(":")[0] for label in labels] == [
        "stored", "planned", "budget", "the backward begins",
    ]  # fmt: skip
    assert labels[2] == "budget: 4.00 MiB"


def test_the_picture_keeps_the_highest_point_of_a_long_step() -> None:
    from re2fx.course_chart import COLUMNS, plot

    line = tuple((float(index), MIB + 64 * (index % 7)) for index in range(20 * COLUMNS))
    top = (line[777][0], 3 * MIB)
    line = (*line[:777], top, *line[778:])
    long = Foreseen(Peak(3 * MIB, 0, "cpu", line), "forward", len(line), 1, 1)
    figure = plot("long", {"plain": long}, None, None)
    drawn = list(np.asarray(figure.axes[0].lines[0].get_ydata()))
    assert max(drawn) == 3
    assert len(drawn) <= 2 * (COLUMNS + 1)


def test_a_step_that_makes_nothing_has_a_picture() -> None:
    from re2fx.course_chart import plot

    nothing = Foreseen(Peak(0, 0, "cpu", ((0.0, 0),)), "backward", 0, 0, 0)
    assert plot("nothing", {"plain": nothing, "re2fx": step(5)}, None, None).axes


# memory over the course of a step


class ByHand(nn.Module):
    """A block under a checkpoint as a user writes it."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        b = self.block
        out: Tensor = x + checkpoint(
            lambda y: b.outer(b.drop(nn.functional.gelu(b.inner(b.norm(y))))), x,
            use_reentrant=False,
        )  # fmt: skip
        return out


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_checkpointed_step_is_that_of_checkpoints_by_hand(dropout: float) -> None:
    model = net(dropout=dropout)
    found = re2fx.memory_course(model, X, memory="reversible")
    hand = net(dropout=dropout)
    blocks = [ByHand(block) for block in hand.blocks]  # type: ignore[arg-type]
    hand.blocks = nn.Sequential(*blocks)
    expected = re2fx.foresee(hand, X)
    assert found.checkpointed.peak.peak == pytest.approx(expected.peak.peak, rel=1e-3)
    assert found.checkpointed.flops == expected.flops
    assert found.plain == re2fx.foresee(model, X)
    assert found.plan is None
    assert "re2fx, reversible" in str(found)
    assert str(found).startswith("Net: a training step, memory='reversible'")


def test_the_course_of_a_convolutional_network() -> None:
    model = ConvNet(dropout=0.1)
    found = re2fx.memory_course(model, torch.randn(8, 3, 32, 32))
    plain, *less = (s.peak.peak for s in found.steps.values())
    assert max(less) < 0.7 * plain


def test_the_course_as_text_data_and_picture(tmp_path: Path) -> None:
    found = course(4 * MIB)
    assert list(found.steps) == ["plain", "checkpointed", "re2fx, planned"]
    assert str(found).startswith(str(plan(4 * MIB)))
    assert str(found).splitlines()[-1].startswith("re2fx, planned")
    assert json.loads(json.dumps(found.to_dict()))["plan"]["memory"] == 4 * MIB
    assert "re2fx, planned" in found._repr_html_()
    figure = found.plot(tmp_path / "course.png")
    assert (tmp_path / "course.png").stat().st_size > 1000
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels[1].startswith("checkpointed: ")


def test_the_model_stays_as_it_is() -> None:
    model = net().eval()
    model.blocks[0].train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    found = re2fx.memory_course(model, torch.empty(2048, 4, device="meta"))
    assert found.plan is not None
    assert found.rewired == plan().predicted
    assert [m.training for m in model.blocks] == [True, *[False] * 3]
    assert not model.training
    assert all(map(torch.equal, state.values(), model.state_dict().values()))
    assert all(p.grad is None for p in model.parameters())


def test_a_model_without_data() -> None:
    with torch.device("meta"):
        model, x = Net(4, 4096), torch.empty(2**20, 4)
    found = re2fx.memory_course(model, x)
    assert found.plain.peak.peak > 400 * 2**30 > 2 * found.rewired.peak.peak


def test_what_has_no_course() -> None:
    with pytest.raises(re2fx.OptionError, match="rewired already"):
        re2fx.memory_course(re2fx.transform(net()), X)
    with pytest.raises(re2fx.OptionError, match="holds no tensor"):
        re2fx.memory_course(net(), None)
    with pytest.raises(re2fx.NoResidualError, match="nothing in Sequential can be rewired"):
        re2fx.memory_course(nn.Sequential(nn.Linear(4, 4)), X)
    with pytest.raises(re2fx.BudgetError, match="below the least"):
        re2fx.memory_course(net(), X, memory=1000)


# when a plan is made


def planned(rev: nn.Module) -> re2fx.MemoryPlan | None:
    assert isinstance(rev, re2fx.RewiredModule)
    return rev.memory_plan


def test_transform_plans_at_once_and_keeps_within_the_budget() -> None:
    rev = re2fx.transform(net(), X, memory="4MiB")
    made = planned(rev)
    assert made is not None
    assert made.memory == 4 * MIB
    assert made.frames == plan(4 * MIB).frames

    def one() -> None:
        rev(X).sum().backward()

    one()
    assert planned(rev) is made
    for parameter in rev.parameters():
        parameter.grad = torch.zeros_like(parameter)
    assert re2fx.peak(one).peak <= 4 * MIB


def test_a_budget_that_is_too_small_is_known_before_training() -> None:
    with pytest.raises(re2fx.BudgetError, match=r"Net: a budget of 10\.00 KiB is below the least"):
        re2fx.transform(net(), X, memory="10KiB")


def test_a_budget_needs_shapes() -> None:
    for inputs in (None, {"x": None}):
        with pytest.raises(re2fx.OptionError, match="a budget needs example_inputs"):
            re2fx.transform(net(), inputs, memory="4MiB")


def test_the_lowest_needs_none() -> None:
    rev = re2fx.transform(net(), memory="lowest")
    assert planned(rev) is None
    rev(X).sum().backward()
    assert planned(rev) is not None


def test_in_eval_mode_the_plan_waits() -> None:
    model = net().eval()
    rev = re2fx.transform(model, {"x": X}, memory="4MiB")
    assert planned(rev) is None
    rev(X)
    assert planned(rev.train()) is None


def test_nothing_to_plan_where_nothing_is_rewired() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.warns(re2fx.Re2fxWarning, match="nothing in Sequential"):
        assert re2fx.transform(model, X, memory="4MiB") is model


def test_asked_for_a_plan_makes_another_one() -> None:
    rev: Any = re2fx.transform(net(), X, memory="lowest")
    small = rev.memory_plan.predicted.peak.peak
    large = rev.plan_memory(torch.randn(4096, 4))
    assert large.predicted.peak.peak > 1.5 * small
    assert rev.memory_plan is large


class Looks(nn.Module):
    """Decides by a value, so that only its blocks can be captured."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out if out.isfinite().all() else out.nan_to_num()


def test_pieces_share_no_budget() -> None:
    with pytest.raises(re2fx.OptionError, match="could not be captured as a whole"):
        re2fx.transform(Looks(), X, memory="4MiB")
    rev = re2fx.transform(Looks(), X, memory="lowest")
    assert isinstance(rev, re2fx.PiecewiseModule)
    with pytest.raises(re2fx.OptionError, match="a budget is planned for one graph"):
        rev.memory = 4 * MIB
    assert rev.memory == "lowest"
    rev(X).sum().backward()
    assert rev.pieces["net"].memory_plan is not None


# the command


def test_fit(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    picture = tmp_path / "step.png"
    arguments = ("fit", f"{NET}?depth=4&width=32", "--input", "2048,4")
    code, out, err = run(capfd, *arguments, "--memory", "4MiB", "--plot", str(picture))
    assert code == 0
    assert out.startswith("Net: a training step within 4.00 MiB")
    assert "re2fx, planned" in out
    assert "wrote" in err
    assert picture.stat().st_size > 1000
    code, out, _ = run(capfd, *arguments, "-m", str(4 * MIB), "--json")
    assert code == 0
    assert json.loads(out) == json.loads(json.dumps(course(4 * MIB).to_dict()))


def test_what_does_not_fit(capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ("fit", NET, "--input", "2048,4", "--memory")
    code, _, err = run(capfd, *arguments, "1KB")
    assert code == 2
    assert err.startswith("error: BudgetError: Net: a budget of 1000 B is below the least")
    code, _, err = run(capfd, *arguments, "plenty")
    assert code == 2
    assert "Usage" in err
