"""The README's examples run, in order, in one namespace."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_examples_run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) == 13
    monkeypatch.chdir(tmp_path)
    source = tmp_path / "model.py"
    source.write_text("\n".join(blocks))
    exec(compile(source.read_text(), str(source), "exec"), {"__name__": "readme"})
    shown = capsys.readouterr().out
    plan, report = re.findall(r"```text\n(.*?)```", README, flags=re.DOTALL)
    assert re.sub(r"\.py:\d+", ".py", report) in re.sub(r"\.py:\d+", ".py", shown)
    assert _without_numbers(plan) in _without_numbers(shown)


def _without_numbers(text: str) -> str:
    """Of a table whose figures depend a little on the machine's threads."""
    return re.sub(r" *[\d.]+", " #", text)


def test_pictures_and_commands_exist() -> None:
    from re2fx.cli import app

    root = Path(__file__).parent.parent
    for path in re.findall(r"!\[[^]]*\]\(([^)]*)\)", README):
        assert (root / path).stat().st_size > 0
    known = {command.callback.__name__ for command in app.registered_commands if command.callback}
    assert set(re.findall(r"^re2fx (\w+)", README, flags=re.MULTILINE)) <= known


def test_every_refusal_rule_is_explained() -> None:
    rules: set[str] = set()
    root = Path(__file__).parent.parent
    for path in (*(root / "passes").glob("*.py"), *(root / "re2fx").glob("*.py")):
        rules.update(
            re.findall(r"refuse\(\s*(?:self\.)?flow,\s*[\w.]+,\s*\"([\w -]+)\"", path.read_text())
        )
    misses = {"one operand", "constant", "two sources", "nothing trained"}
    missing = {rule for rule in rules - misses if f"| {rule} |" not in README}
    assert not missing
    assert len(rules) >= 12
