"""``re2fx zoo``: a process per model, a file that a later run goes on from, what it prints."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
from torch import nn

from re2fx.errors import OptionError
from re2fx.zoo import command, keepers
from re2fx.zoo.catalogue import Entry
from re2fx.zoo.keepers import alone
from re2fx.zoo.results import Results, Row
from re2fx.zoo.tables import headline, reasons, totals

from .test_cli import run

HERE = __name__
NET = Entry("tests.models:Net?depth=3", ("3,4",), "nets")
CONVNET = Entry("tests.models:ConvNet", ("2,3,8,8",), "nets")


@pytest.fixture(autouse=True)
def light(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the libraries, which no model here is from."""
    monkeypatch.setattr(keepers, "PRELOADED", [])


def crash() -> nn.Module:
    os.kill(os.getpid(), signal.SIGSEGV)
    raise AssertionError("unreachable")


def hang() -> nn.Module:
    time.sleep(600)
    raise AssertionError("unreachable")


def test_a_crash_is_a_result() -> None:
    row = alone(Entry(f"{HERE}:crash", ("1",)), timeout=120)
    assert row.status == "crashed"
    assert row.reason.startswith("SIGSEGV; Fatal Python error: Segmentation fault")
    assert row.findings == [f"crashed: {row.reason}"]


def test_a_timeout_is_a_result() -> None:
    begin = time.monotonic()
    row = alone(Entry(f"{HERE}:hang", ("1",)), timeout=0.5)
    assert (row.status, row.reason) == ("timed out", "no result within 0.5 s")
    assert time.monotonic() - begin < 60


def test_the_command_measures_and_goes_on_from_its_file(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    entries = [NET]
    monkeypatch.setattr(command, "catalogue", lambda patterns: tuple(entries))
    path = tmp_path / "zoo.json"
    arguments = ("zoo", "--json", str(path), "--jobs", "2")
    code, out, _ = run(capfd, *arguments)
    assert code == 0
    assert "1 model: 1 rewired; findings in 0" in out
    first = json.loads(path.read_text())["rows"][0]
    assert (first["target"], first["chains"]) == (NET.target, [3])

    entries.append(CONVNET)
    code, out, _ = run(capfd, *arguments)
    assert code == 0
    assert "2 models: 2 rewired" in out
    again, other = json.loads(path.read_text())["rows"]
    assert again == first, "it was measured anew"
    assert other["target"] == CONVNET.target

    run(capfd, *arguments, "--fresh")
    assert json.loads(path.read_text())["rows"][0]["seconds"] != first["seconds"]


def test_a_finding_is_exit_code_one(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = Entry(f"{HERE}:missing", ("1",))
    monkeypatch.setattr(command, "catalogue", lambda patterns: (entry,))
    code, out, err = run(capfd, "zoo")
    assert code == 1
    assert "has no 'missing'" in out
    assert "unusable" in err


def test_the_list_measures_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capfd, "zoo", "transformers:gpt2", "--list")
    assert code == 0
    assert out.startswith("transformers:gpt2?n_layer=")
    assert "input_ids=" in out
    code, _, err = run(capfd, "zoo", "no such model")
    assert code == 2
    assert "no model fits" in err


def rows() -> list[Row]:
    refusal = {"rule": "post-norm", "count": 2, "sentence": "LN is in the way", "module": "a"}
    return [
        Row("timm:a?depth=1", ("1",), "g", "rewired", route="symbolic", found=4, chains=[4],
            dtype="float64", gradient_error=2e-15),
        Row("timm:b", ("1",), "g", "refused", route="dynamo", found=2, refusals=[refusal]),
        Row("other:c", ("1",), "h", "not captured", "a list is changed"),
    ]  # fmt: skip


def test_totals_and_sentences() -> None:
    results = Results(rows())
    table = totals(results)
    assert table.rows[0] == ("timm", "2", "2", "2", "1", "6", "4", "2", "2.0e-15")
    assert table.rows[-1][:3] == ("all", "3", "2")
    refused, lost = reasons(results)
    assert refused.rows == (("post-norm", "2", "1", "b: LN is in the way"),)
    assert lost.rows == (("c", "not captured", "a list is changed"),)
    assert headline(results).startswith("3 models: 1 rewired, 1 refused, 1 not captured")


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "zoo.json"
    results = Results(rows())
    results.save(path)
    assert Results.load(path) == results
    assert results.missing([NET, results.rows[0].entry]) == [NET]
    path.write_text("[]")
    with pytest.raises(OptionError, match="holds no results of a zoo"):
        Results.load(path)
