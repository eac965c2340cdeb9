"""The marker of a situation, and what became of each, for the table in the README.

    @pytest.mark.situation(2, "eager")                 works, compared with stored execution
    @pytest.mark.situation(15, "compiled", "raises")   raises an error that says what to do

``pytest tests/situations --situations FILE`` writes the outcomes as JSON.

    @pytest.mark.without("eager", "re2fx.replay:Generators.write", lambda self: None)

names what the test needs. With ``--mutants`` only tests that say so run, each with that code
replaced, and each has to fail: a test that passes all the same tests nothing.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

EXECUTORS = ("eager", "compiled")
OUTCOMES = ("works", "raises")


def pytest_configure(config: pytest.Config) -> None:
    """Make the marker known."""
    line = "situation(row, executor, outcome='works'): a row of the table of situations"
    config.addinivalue_line("markers", line)
    line = "without(executor, target, replacement): the code a situation's test fails without"
    config.addinivalue_line("markers", line)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Where to write what became of the situations."""
    parser.addoption("--situations", type=Path, help="write the outcome of each situation as JSON")
    text = "replace the code that each situation needs, and expect its test to fail"
    parser.addoption("--mutants", action="store_true", help=text)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Dynamo hides this warning from everybody but those who make warnings errors."""
    hidden = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(hidden)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Compiled code does not outlive its test; one thread, for sums of one order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.compiler.reset()
    yield
    torch.compiler.reset()
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def mutant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put something else in the place of the code that a test names."""
    if not request.config.getoption("--mutants", default=False):
        return
    callspec = getattr(request.node, "callspec", None)
    executor = callspec.params.get("executor") if callspec is not None else None
    marks = [m for m in request.node.iter_markers("without") if m.args[0] in (executor, "any")]
    if not marks:
        pytest.skip("names no code that it needs")
    for mark in marks:
        place, path = mark.args[1].split(":")
        owner: Any = importlib.import_module(place)
        *parents, name = path.split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        monkeypatch.setattr(owner, name, mark.args[2])
    request.applymarker(pytest.mark.xfail(strict=True, reason="its code was replaced"))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: Any) -> Iterator[None]:
    """Note the outcome of a test of a situation."""
    outcome: Any = yield
    report = outcome.get_result()
    path = item.config.getoption("--situations", default=None)
    if path is None or (report.when != "call" and not report.skipped):
        return
    rows = json.loads(path.read_text()) if path.exists() else []
    for mark in item.iter_markers("situation"):
        row, executor, *expected = mark.args
        assert executor in EXECUTORS
        assert not expected or expected[0] in OUTCOMES
        rows.append(
            {
                "row": row, "executor": executor, "expected": (*expected, "works")[0],
                "test": item.nodeid, "result": report.outcome,
                "proven": hasattr(report, "wasxfail") and report.skipped,
            }
        )  # fmt: skip
    path.write_text(json.dumps(rows, indent=1) + "\n")
