"""Who may import whom, read off the source without running it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOORS = {
    "api",
    "pipeline",
    "backend",
    "calibrate",
    "emitted",
    "cli",
    "diff",
    "columns",
    "course",
    "report",
    "weigh",
    "zoo",
    "__init__",
}
GROUND = sorted(p for p in (ROOT / "re2fx").glob("*.py"))
DIFF = sorted((ROOT / "re2fx" / "diff").glob("*.py"))
ZOO = sorted(p for p in (ROOT / "re2fx" / "zoo").glob("*.py"))
PASSES = sorted(p for p in (ROOT / "passes").glob("*.py") if p.name != "__init__.py")


def imported(path: Path) -> set[str]:
    """Full names of the modules a file imports, relative ones resolved."""
    package = ["re2fx"] if path.parent.name == "re2fx" else ["re2fx", path.parent.name]
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names.add(module)
            names.update(f"{module}.{alias.name}" for alias in node.names)
    return names


def own_modules(names: set[str], package: str) -> set[str]:
    """The modules of one package among imported names."""
    return {name.split(".")[1] for name in names if name.startswith(package + ".")}


@pytest.mark.parametrize("path", PASSES, ids=lambda p: p.stem)
def test_passes_import_the_ground_only(path: Path) -> None:
    names = imported(path)
    assert not own_modules(names, "re2fx") & (DOORS - {"__init__"}), "a pass imports a door"
    modules = {p.stem for p in GROUND} - DOORS
    assert own_modules(names, "re2fx") <= modules, "a pass imports from the package front"
    others = {name for name in names if name.startswith("re2fx.passes")}
    assert not others, f"a pass imports another pass: {others}"


@pytest.mark.parametrize("path", GROUND, ids=lambda p: p.stem)
def test_only_the_doors_import_passes(path: Path) -> None:
    uses_passes = any(name.startswith("re2fx.passes") for name in imported(path))
    assert not uses_passes or path.stem in DOORS


@pytest.mark.parametrize("path", DIFF, ids=lambda p: p.stem)
def test_diff_stands_on_the_ground(path: Path) -> None:
    names = own_modules(imported(path), "re2fx")
    assert not names & (DOORS - {"diff"}), "diff imports another door"


@pytest.mark.parametrize("path", GROUND, ids=lambda p: p.stem)
def test_only_the_command_opens_the_zoo(path: Path) -> None:
    assert "zoo" not in own_modules(imported(path), "re2fx") or path.stem == "cli"


@pytest.mark.parametrize("name", ["program", "runtime", "replay", "layout", "coupling"])
def test_the_runtime_knows_no_fx(name: str) -> None:
    names = imported(ROOT / "re2fx" / f"{name}.py")
    assert not {n for n in names if n.startswith("torch.fx")}
    fx_side = {"graph", "ops", "aliases", "match", "legality", "capture", "codegen", "module"}
    assert not own_modules(names, "re2fx") & fx_side


def test_importing_re2fx_is_light() -> None:
    code = """
import sys, re2fx
heavy = (
    "torch._dynamo", "torch._inductor", "rich", "matplotlib", "re2fx.diff.page",
    "transformers", "lightning", "pytorch_lightning",
)
print([name for name in heavy if name in sys.modules])
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"


def test_passes_cannot_be_imported_twice() -> None:
    run = subprocess.run(
        [sys.executable, "-c", "import passes"], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 1
    assert "import the passes as re2fx.passes" in run.stderr


def test_every_file_says_what_it_is() -> None:
    for path in (*GROUND, *DIFF, *ZOO, *PASSES):
        assert ast.get_docstring(ast.parse(path.read_text())), path
