"""The README shows what the result files say, and the measurements run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a benchmark as a user would."""
    return subprocess.run(
        [sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_the_readme_is_rendered_from_the_results() -> None:
    result = run("benchmarks.render", "--check")
    assert result.returncode == 0, result.stdout + result.stderr


def test_results_name_their_machine() -> None:
    results = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
    assert {path.stem for path in results} >= {"demo", "depth", "scale"}
    for path in results:
        environment = json.loads(path.read_text())["environment"]
        assert {"cpu", "cores", "torch", "python", "date"} <= environment.keys()


@pytest.mark.parametrize("contender", ["plain", "checkpoint", "re2fx"])
def test_contenders_agree_on_the_bytes_they_are_measured_by(contender: str) -> None:
    """Each contender's peak of one step is measured in a process of its own."""
    result = run("benchmarks.depth", "--child", contender, "1")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["peak"] > 0
