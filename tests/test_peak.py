"""Peaks of memory: exact on the CPU, and what the process says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import re2fx
from re2fx.memory import live_bytes

from .models import Net

X = torch.randn(256, 4, generator=torch.Generator().manual_seed(0))


def in_turns() -> torch.Tensor:
    """One megabyte, two more, then a smaller one instead of the first."""
    first, second = torch.empty(250_000), torch.empty(500_000)
    del first
    third = torch.empty(100_000)
    del second
    return third


def test_every_allocation_counts_in_its_turn() -> None:
    found = re2fx.peak(in_turns)
    assert (found.peak, found.end, found.device) == (3_000_000, 400_000, "cpu")
    assert [size for _, size in found.timeline] == [
        1_000_000, 3_000_000, 2_000_000, 2_400_000, 400_000
    ]  # fmt: skip
    moments = [moment for moment, _ in found.timeline]
    assert moments == sorted(moments)
    assert moments[0] == 0
    assert str(found) == "2.86 MiB at the highest, 390.62 KiB at the end (cpu)"


def test_what_was_there_before_does_not_count() -> None:
    held = [torch.empty(1_000_000)]
    assert re2fx.peak(lambda: held.clear()).peak == 0
    assert re2fx.peak(lambda: None) == re2fx.Peak(0, 0)


def training(memory: str) -> Any:
    """A step of a deep network that has its gradients already."""
    torch.manual_seed(0)
    rev: Any = re2fx.transform(Net(24))
    rev.memory = memory
    for parameter in rev.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return lambda: rev(X).square().mean().backward()


def test_a_reversible_step_needs_less_and_the_figure_repeats() -> None:
    found = {}
    for memory in ("store", "reversible"):
        run = training(memory)
        run()
        found[memory] = re2fx.peak(run)
        assert re2fx.peak(run).peak == found[memory].peak
        assert found[memory].end == 0
    assert found["reversible"].peak * 3 < found["store"].peak


def test_the_end_is_what_the_allocator_says_of_a_forward() -> None:
    rev: Any = re2fx.transform(Net(6))
    assert re2fx.peak(lambda: rev(X)).end == live_bytes(lambda: rev(X))


PROCESS = """
import json, re, torch, re2fx
from pathlib import Path
torch.set_num_threads(1)

def highest():
    return int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

def run(size):
    a = torch.ones(size)
    b = a * 2
    del a
    return b.exp().sum()

re2fx.peak(lambda: run(1000))  # what the first use brings along
before = highest()
found = re2fx.peak(lambda: run(50_000_000))
print(json.dumps([found.peak, highest() - before]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's own figure")
def test_against_the_process() -> None:
    variables = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**18), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROCESS], env=variables, capture_output=True, text=True, check=True
    )
    found, process = json.loads(done.stdout.splitlines()[-1])
    assert found == pytest.approx(400_000_000, rel=1e-6)
    assert process == pytest.approx(found, rel=0.03)


def test_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    stored, reversible = (re2fx.peak(training(memory)) for memory in ("store", "reversible"))
    path = tmp_path / "peak.png"
    figure = stored.plot(path, re2fx_reversible=reversible)
    assert path.stat().st_size > 0
    legend = figure.axes[0].get_legend()
    assert legend is not None
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels[1].startswith("re2fx reversible: ")
    many = {f"run_{number}": reversible for number in range(7)}
    assert len(stored.plot(None, **many).axes[0].get_legend_handles_labels()[1]) == 8
    with pytest.raises(re2fx.OptionError, match="timeline"):
        re2fx.Peak(1, 1, "cuda").plot()
    assert json.loads(json.dumps(stored.to_dict()))["peak"] == stored.peak


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_cuda() -> None:
    def run() -> torch.Tensor:
        first = torch.empty(2**20, device="cuda")
        second = torch.empty(2**21, device="cuda")
        del first
        return second

    found = re2fx.peak(run, "cuda")
    # A block is not divided for the sake of less than 1 MiB.
    assert (found.peak, found.end) == pytest.approx((3 * 2**22, 2 * 2**22), abs=2**21)
