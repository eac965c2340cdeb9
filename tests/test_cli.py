"""The command, run as a person runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from re2fx import cli, cli_options

ROOT = Path(__file__).parent.parent
NET = f"{__name__.rpartition('.')[0]}.models:Net"


def run(capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, output and error output of one command."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["re2fx", *arguments])
        patch.setenv("COLUMNS", "140")
        with pytest.raises(SystemExit) as ended:
            cli.main()
    out, err = capfd.readouterr()
    code = ended.value.code
    return (code if isinstance(code, int) else 0), out, err


def test_explain(capfd: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capfd, "explain", NET)
    assert code == 0
    assert out.startswith("Net: 4 skip-adds found: 4 rewired in 1 chain, 0 refused")
    code, out, _ = run(capfd, "explain", NET, "--json")
    assert json.loads(out)["rewired"] == 4


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4))


def test_nothing_to_rewire_is_exit_code_one(capfd: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capfd, "explain", f"{__name__}:plain")
    assert (code, out.strip()) == (1, "Sequential: the graph has no addition of two activations")


def test_errors_are_messages_on_standard_error(capfd: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capfd, "explain", "torchvision:resnet500")
    assert (code, out) == (2, "")
    assert err.startswith("error: TargetError: torchvision has no model 'resnet500'; did you mean")
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "arguments",
    [
        ["explode", NET],
        ["explain"],
        ["explain", NET, "--nothing"],
        ["diff", NET, "--coupling", "b"],
        ["report", NET, "--input", "16,4", "--min-saving", "much"],
    ],
)
def test_what_is_not_understood_is_exit_code_two(
    capfd: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    code, _, err = run(capfd, *arguments)
    assert code == 2
    assert "Usage" in err


def test_help_names_every_command_and_option(capfd: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capfd, "--help")
    assert code == 0
    commands = ("explain", "diff", "report", "fit", "verify", "demo")
    assert all(command in out for command in (*commands, "calibrate"))
    for command in commands:
        code, out, _ = run(capfd, command, "-h")
        assert code == 0
        options = ("--input", "--leaf", "--capture", "--select", "--min-chain", "--min-saving")
        assert all(option in out for option in options)


CHOICES: list[tuple[list[str], list[int]]] = [
    ([], [6]),
    (["--select", "blocks.[1-4]"], [4]),
    (["--select", "blocks.*", "--select", "!blocks.2"], [2, 3]),
    (["--select", "!blocks.2", "--min-chain", "3", "--capture", "dynamo"], [3]),
    (["--min-saving", "0.05"], [6]),
]


@pytest.mark.parametrize(("options", "residuals"), CHOICES, ids=str)
def test_what_is_rewired(
    capfd: pytest.CaptureFixture[str], options: list[str], residuals: list[int]
) -> None:
    """The same for every command, as for the functions."""
    arguments = (f"{NET}?depth=6", "--input", "256,4", "--json", *options)
    _, out, _ = run(capfd, "explain", *arguments)
    assert json.loads(out)["rewired"] == sum(residuals)
    _, out, _ = run(capfd, "report", *arguments)
    assert [chain["residuals"] for chain in json.loads(out)["chains"]] == residuals
    _, out, _ = run(capfd, "verify", *arguments)
    assert json.loads(out)["verdict"] == "ok"
    assert [len(chain["blocks"]) for chain in json.loads(out)["chains"]] == residuals


def test_nothing_saves_enough(capfd: pytest.CaptureFixture[str]) -> None:
    arguments = (NET, "--input", "16,4", "--min-saving", "1000000000000")
    assert run(capfd, "explain", *arguments)[0] == 1
    code, _, err = run(capfd, "diff", *arguments)
    assert code == 2
    assert "NoResidualError" in err


def batches() -> list[torch.Tensor]:
    return [torch.randn(16, 4, generator=torch.Generator().manual_seed(n)) for n in range(3)]


def spread(output: torch.Tensor, batch: torch.Tensor) -> float:
    return float(output.std())


def test_calibrate(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ("calibrate", NET, f"{__name__}:batches", "--metric", f"{__name__}:spread")
    code, out, _ = run(capfd, *arguments, "--batches", "2", "--plot", str(tmp_path / "it.png"))
    assert code == 0
    assert "Take " in out
    assert (tmp_path / "it.png").stat().st_size > 0
    code, out, _ = run(capfd, *arguments, "--json", "--max-bits", "0")
    found = json.loads(out)
    assert (found["batches"], found["samples"], found["max_bits"]) == (3, 48, 0)
    assert found["metric"] > 0
    code, _, err = run(capfd, "calibrate", NET, f"{__name__}:nothing")
    assert code == 2
    assert "has no 'nothing'" in err


def test_blocks_and_drift(capfd: pytest.CaptureFixture[str]) -> None:
    """A coupling that takes blocks, where activations stay; a tolerance that it cannot keep."""
    near = ("--coupling", "consistent:0.125", "--activation", "block")
    code, out, _ = run(capfd, "explain", "torchvision:resnet18", *near)
    assert code == 0
    assert "whole block" in out
    arguments = ("diff", f"{NET}?depth=12", "--input", "16,4", "--coupling", "consistent:0.125")
    assert run(capfd, *arguments, "--drift-tolerance", "0.01")[0] == 0
    code, _, err = run(capfd, *arguments, "--drift-tolerance", "0.000001")
    assert code == 2
    assert "ConditioningError" in err


def test_demo(capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ("demo", f"{NET}?depth=6", "--input", "16,4", "--steps", "3")
    code, out, _ = run(capfd, *arguments)
    assert code == 0
    assert "rewired, reversible" in out
    code, out, _ = run(capfd, *arguments, "--json")
    plain, reversible = json.loads(out)["trainings"]
    assert reversible["kept"] < plain["kept"]
    assert len(plain["losses"]) == len(reversible["losses"]) == 3
    assert plain["losses"][-1] < plain["losses"][0]
    assert reversible["losses"][-1] < reversible["losses"][0]


@pytest.mark.parametrize(
    ("text", "coefficients"),
    [("re2tal", (0, 1, 1)), ("consistent:0.5", (0.5, 0.5, 1.5)), ("0.5,0.5,1", (0.5, 0.5, 1))],
)
def test_couplings(text: str, coefficients: tuple[float, ...]) -> None:
    coupling = cli_options.read_coupling(text)
    assert (coupling.a, coupling.b, coupling.c) == coefficients


def test_the_command_is_installed_and_runs_as_a_module() -> None:
    for command in ([sys.executable, "-m", "re2fx"], [str(Path(sys.executable).parent / "re2fx")]):
        done = subprocess.run(
            [*command, "explain", NET],
            cwd=ROOT, capture_output=True, text=True, env={**os.environ, "COLUMNS": "140"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("Net: 4 skip-adds")


def test_diff(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, _ = run(capfd, "diff", NET)
    assert code == 0
    assert out.startswith("9 nodes added, 0 removed")
    assert any(line.startswith("+ ") for line in out.splitlines())
    code, out, _ = run(capfd, "diff", NET, "--json")
    assert json.loads(out)["summary"]["added"] > 0
    page, dot = tmp_path / "d.html", tmp_path / "d.dot"
    code, out, err = run(
        capfd, "diff", NET, "--html", str(page), "--dot", str(dot), "--steps", "--coupling",
        "consistent:0.5",
    )  # fmt: skip
    assert (code, out) == (0, "")
    assert err.count("wrote") == 2
    assert "captured" in page.read_text()
    assert dot.read_text().startswith("digraph")


def test_the_diff_of_two_models(capfd: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capfd, "diff", f"{NET}?depth=2", f"{NET}?depth=2", "--json")
    summary = json.loads(out)["summary"]
    assert code == 0
    assert (summary["added"], summary["removed"], summary["edges_rewired"]) == (0, 0, 0)
    _, out, _ = run(capfd, "diff", f"{NET}?depth=2", f"{NET}?depth=3", "--json")
    assert json.loads(out)["summary"]["added"] > 0


def test_report(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    picture = tmp_path / "r.png"
    arguments = ("report", f"{NET}?depth=6", "--input", "16,4")
    code, out, err = run(capfd, *arguments, "--plot", str(picture))
    assert code == 0
    assert "reversible" in out
    assert "wrote" in err
    assert picture.stat().st_size > 0
    code, out, _ = run(capfd, *arguments, "--json", "--measure")
    assert code == 0
    assert json.loads(out)


def test_verify(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    picture = tmp_path / "v.svg"
    code, out, _ = run(capfd, "verify", NET, "--input", "16,4", "--plot", str(picture))
    assert code == 0
    assert out.startswith("Net: ok")
    assert picture.stat().st_size > 0
    code, out, _ = run(capfd, "verify", NET, "--input", "16,4", "--json")
    assert json.loads(out)["verdict"] == "ok"


def test_a_verdict_that_is_not_ok_is_exit_code_one(capfd: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capfd, "verify", f"{__name__}:nondeterministic", "--input", "8,4")
    assert code == 1
    assert "wrong" in out or "inexact" in out


class Noisy(nn.Module):
    """A branch with a generator of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(4, 4)
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        noise = torch.rand(4, generator=self.generator)
        out: torch.Tensor = torch.tanh(self.mix(x)) * noise
        return out


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.noisy = Noisy()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = x + self.noisy(x)
        return out


def nondeterministic() -> nn.Module:
    return nn.Sequential(Residual(), Residual(), Residual())
