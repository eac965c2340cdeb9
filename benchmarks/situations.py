"""What became of the 35 situations: ``python -m benchmarks.situations``.

Runs ``tests/situations`` twice: as they are, and with the code replaced that each says it needs,
which its test has to notice. Writes ``results/situations.json``.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .common import write_results

ROOT = Path(__file__).parents[1]
EXECUTORS = ("eager", "compiled")


def run(*options: str) -> list[dict[str, Any]]:
    """The outcome of every test that names a situation."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "situations.json"
        subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "tests/situations", "--situations", str(path),
             *options],
            cwd=ROOT, check=False,
        )  # fmt: skip
        found: list[dict[str, Any]] = json.loads(path.read_text())
        return found


def summary(tests: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """What a cell of the table says."""
    tests = list(tests)
    results = Counter(test["result"] for test in tests)
    passed = [test["expected"] for test in tests if test["result"] == "passed"]
    return {
        "outcomes": sorted(set(passed), reverse=True),
        "passed": results["passed"],
        "skipped": results["skipped"],
        "failed": results["failed"],
    }


def rows(tests: list[dict[str, Any]], mutants: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One for each situation: its outcome in each executor, and how many tests were shown to fail.

    Args:
        tests: of the run as it is.
        mutants: of the run with code replaced, where a failure was expected and seen is "skipped"
            with a reason (an expected failure).
    """
    proven = Counter(test["row"] for test in mutants if test["proven"])
    return [
        {
            "row": number,
            **{
                executor: summary(
                    test for test in tests if test["row"] == number and test["executor"] == executor
                )
                for executor in EXECUTORS
            },
            "proven": proven[number],
        }
        for number in sorted({test["row"] for test in tests})
    ]


def main() -> None:
    """Run both, and write the results."""
    tests, mutants = run(), run("--mutants")
    unnoticed = [test["test"] for test in mutants if test["result"] == "failed"]
    table = rows(tests, mutants)
    path = write_results(
        "situations",
        {
            "rows": table,
            "tests": len(tests),
            "failed": [test["test"] for test in tests if test["result"] == "failed"],
            "replaced": sum(test["proven"] for test in mutants),
            "unnoticed": unnoticed,
        },
    )
    print(f"{len(table)} situations, {len(tests)} tests: {path}")


if __name__ == "__main__":
    main()
