"""Step time against peak: rivals compute what plain training does, and rows become tables."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu, gpu_largest, gpu_tables, pareto, pareto_tables, render
from benchmarks.pareto_entries import (
    Entry,
    Made,
    Unavailable,
    answering_entries,
    eager_entries,
)
from benchmarks.pareto_measure import Bench, largest_difference, measure
from benchmarks.pareto_models import Subject, call, gpt2, slowfast, swin3d, vit

from .planning import few_slices as few_slices
from .planning import single as single

ROOT = Path(__file__).parent.parent

TINY = {
    "vit": partial(vit, 32, 3, 2, width=64),
    "swin3d": partial(swin3d, 2, 32, 2, width=32, depths=(1, 3)),
    "slowfast": partial(slowfast, 8, 32, 2),
    "gpt2": partial(gpt2, 16, 3, 2, width=64, vocabulary=64),
}
ENTRIES = {entry.name: entry for entry in eager_entries()}
RIVALS = [name for name in ENTRIES if name.startswith("checkpoint")]
ENVIRONMENT = {"cpu": "one", "cores": 1, "torch": "2", "python": "3", "date": "today"}


@pytest.fixture(autouse=True)
def _seeds() -> Iterator[None]:
    """Random numbers go on as if nothing had been drawn."""
    with torch.random.fork_rng():
        yield


def tiny(name: str) -> Subject:
    """A network; its library warns when it is imported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return TINY[name]()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", list(TINY))
def test_rivals_have_the_gradients_of_plain_training(name: str) -> None:
    bench = Bench(tiny(name))
    plain = bench.gradients(Made(bench.model))
    assert all(float(g.abs().max()) > 0 for g in plain)
    for rival in RIVALS if name != "slowfast" else RIVALS[:1]:
        made = ENTRIES[rival].make(bench)
        assert {id(p) for p in made.network.parameters()} == {
            id(p) for p in bench.model.parameters()
        }
        assert largest_difference(bench.gradients(made), plain) == 0, rival


def test_rivals_run_their_blocks_again() -> None:
    bench = Bench(tiny("vit"))
    runs = {}
    for name in ("plain", *RIVALS):
        made = ENTRIES[name].make(bench)
        calls: list[int] = []
        norms = [m for path, m in made.network.named_modules() if path.endswith("ln_1")]
        note = lambda *_, calls=calls: calls.append(1)  # noqa: E731
        hooks = [norm.register_forward_hook(note) for norm in norms]
        bench.step(made)
        for hook in hooks:
            hook.remove()
        runs[name] = len(calls)
    # A recompute ends at the last tensor that is needed, which of two nested blocks is the second
    # one's input.
    assert runs == {
        "plain": 3, "checkpoint, branches": 6, "checkpoint, blocks": 6,
        "checkpoint, first half": 4, "checkpoint, k blocks": 6, "checkpoint, nested": 7,
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore")
def test_a_network_becomes_rows_and_what_fails_says_so() -> None:
    def fail(bench: Any) -> Made:
        raise RuntimeError("out of\nmemory")

    def late(bench: Any) -> Made:
        calls: list[int] = []

        def network(*inputs: Any) -> Any:
            calls.append(1)
            if len(calls) > 4:
                raise RuntimeError("too late")
            return bench.model(*inputs)

        return Made(network)

    wanted = ["plain", "checkpoint, blocks", "offload", "re2fx store", "re2fx reversible"]
    entries = [ENTRIES[name] for name in wanted]
    entries += [Entry("failing", fail), Entry("late", late)]
    bench = Bench(tiny("vit"))
    rows = {row["entry"]: row for row in measure(bench, entries, rounds=2)}
    assert list(rows) == [entry.name for entry in entries]
    for name in ("plain", "checkpoint, blocks", "re2fx store", "re2fx reversible"):
        assert rows[name]["peak"] > 0
        assert (rows[name]["rounds"], len(rows[name]["seconds"])) == (2, 2)
    assert rows["plain"]["over_plain"] == 1
    assert rows["checkpoint, blocks"]["gradient_error"] == 0
    assert 0 < rows["re2fx reversible"]["gradient_error"] < 1e-4
    assert "CPU" in rows["offload"]["unavailable"]
    assert rows["failing"]["error"] == "RuntimeError: out of memory"
    assert rows["late"]["error"] == "RuntimeError: too late"
    assert "median_seconds" not in rows["late"]


def test_a_peak_does_not_count_gradients() -> None:
    bench = Bench(tiny("vit"))
    made = Made(bench.model)
    _, row = bench.first(ENTRIES["plain"])
    before = [p.grad for p in bench.model.parameters()]
    bench.step(made)
    assert all(p.grad is g for p, g in zip(bench.model.parameters(), before, strict=True))
    _, again = bench.first(ENTRIES["plain"])
    assert again["peak"] == row["peak"]


def test_budgets_need_a_floor() -> None:
    bench = Bench(tiny("vit"))
    bench.peaks["plain"] = 10**6
    with pytest.raises(Unavailable, match="floor"):
        ENTRIES["re2fx budget 50%"].make(bench)
    del bench.peaks["plain"]
    first = answering_entries()[0]
    assert first.name == "re2fx at plain"
    with pytest.raises(Unavailable, match="not known"):
        first.make(bench)


def test_a_network_is_measured_again_only_where_something_is_new() -> None:
    subject, entries = tiny("vit"), eager_entries()
    known = {"words": subject.words, "rows": [{"entry": entry.name} for entry in entries]}
    assert pareto.holds(known, subject, entries[:3])
    assert not pareto.holds(known, subject, [*entries, Entry("new", lambda bench: Made(None))])
    assert not pareto.holds({**known, "words": "larger"}, subject, entries)
    assert not pareto.holds(None, subject, entries)


def row(entry: str, peak: int, *seconds: float, own: bool = False, **more: Any) -> dict[str, Any]:
    """A row of invented figures; plain training takes a second."""
    return {
        "entry": entry, "own": own, "compiled": "compiled" in entry, "reference": None,
        "gradient_error": 0.0, "predicted": None, "peak": peak * 2**20, "rounds": len(seconds),
        "median_seconds": seconds[0], "over_plain": seconds[0], "seconds": list(seconds), **more,
    }  # fmt: skip


ROWS = [
    row("plain", 100, 1.0, 1.0),
    row("checkpoint, blocks", 40, 1.3, 1.3),
    row("compiled, budget 0.3", 30, 1.2, 1.2),
    row("checkpoint, nested", 5, 1.6, 1.6),
    row("re2fx store", 100, 1.0, 1.1, own=True),
    row("re2fx reversible", 20, 1.2, 1.4, own=True),
    row("re2fx lowest", 8, 1.7, 1.7, own=True, predicted=9 * 2**20, gradient_error=1e-6),
    row("re2fx compiled, graph", 25, 0.9, 0.9, own=True),
    {"entry": "offload", "own": False, "compiled": False, "unavailable": "no device"},
]
MODEL = {"name": "Net", "words": "a net of invented size", "rounds": 2, "rows": ROWS}
DATA = {"setup": {}, "models": {"vit": MODEL}, "environment": ENVIRONMENT}


def test_a_rival_is_answered_at_its_peak_or_below() -> None:
    found = {r["entry"]: own and own["entry"] for _, r, own in pareto_tables.comparisons([MODEL])}
    assert found == {
        "plain": "re2fx store",
        "checkpoint, blocks": "re2fx reversible",
        "compiled, budget 0.3": "re2fx compiled, graph",
        "checkpoint, nested": None,
    }
    meant = row("re2fx at checkpoint, blocks", 39, 1.25, 1.25, own=True)
    assert pareto_tables.answer([*ROWS, meant], ROWS[1]) == meant
    text = pareto_tables.text_pareto(DATA)
    assert "| checkpoint, blocks | 1.00x |" in text
    assert "| compiled, budget 0.3 | 0.75x |" in text
    assert "| checkpoint, nested | needs more |" in text
    assert "in 2 of 4 comparisons, more in 1 (at most 1.05x), and cannot go as low in 1" in text
    assert "| re2fx lowest | 8%, 1.70x |" in text
    assert "of re2fx against stored at most 1e-06" in text


def test_page_and_picture() -> None:
    text = pareto_tables.page_pareto(DATA)
    assert "| re2fx lowest | 8.0 | 9.0 | 8.0% | 1.7000 | 1.700 | 1.0e-06 |" in text
    assert "- offload: no device" in text
    axes = pareto_tables.plot_pareto({**DATA, "models": {"a": MODEL, "b": MODEL, "c": MODEL}}).axes
    assert [bool(panel.get_title(loc="left") or panel.get_title()) for panel in axes] == [
        True, True, True, False,
    ]  # fmt: skip


def gpu_data() -> dict[str, Any]:
    """Invented results of several parts."""
    own = [
        row("re2fx compiled, region", 22, 0.8, own=True, launched_kernels=90, launched_triton=40)
    ]
    largest = [
        {"entry": "plain", "batch": 64, "samples_per_second": 10.5, "median_seconds": 6.1},
        {"entry": "re2fx lowest", "error": "RuntimeError: no"},
    ]
    common = {"name": "Net", "words": "a net", "card": "a card"}
    parts = {
        "vit:eager": {**common, "rows": ROWS, "rounds": 2},
        "vit:backend": {**common, "rows": [row("plain", 100, 1.0), *own], "rounds": 1},
        "vit:graphs": {**common, "error": "RuntimeError: no graphs"},
        "vit:largest": {**common, "rows": largest},
    }
    return {"setup": {}, "parts": parts, "environment": ENVIRONMENT}


def test_parts_of_a_gpu_run_become_one_network() -> None:
    (model,) = gpu_tables.models_of(gpu_data())
    assert [r["entry"] for r in model["rows"]].count("plain") == 1
    text, page = gpu_tables.text_gpu(gpu_data()), gpu_tables.page_gpu(gpu_data())
    assert "| Net | plain | 64 | 10.5 |" in text
    assert "| Net | re2fx lowest | unknown |  |" in text
    assert "| compiled, budget 0.3 | 0.67x |" in text
    assert "| Net | re2fx compiled, region |  | 90 | 40 |" in page
    assert "- vit:graphs: RuntimeError: no graphs" in page
    assert len(gpu_tables.plot_gpu(gpu_data()).axes) == 1


def test_blocks_without_results_say_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(render, "RESULTS", tmp_path)
    readme = "<!-- results:gpu -->\nold\n<!-- /results:gpu -->"
    assert gpu_tables.NOT_YET in render.rewritten(readme)
    depth = "<!-- results:depth -->\nold\n<!-- /results:depth -->"
    assert render.rewritten(depth) == depth


@pytest.mark.parametrize("bound", [0, 1, 7, 8, 100, 1000])
@pytest.mark.parametrize("start", [1, 8, 64])
def test_the_largest_batch_is_found(bound: int, start: int) -> None:
    tried: list[int] = []

    def fits(batch: int) -> bool:
        tried.append(batch)
        return batch <= bound

    found = gpu_largest.largest(fits, start, 512)
    assert found <= bound
    assert min(bound, 512) <= found * (1 + gpu_largest.PRECISION) + (bound > 0)
    assert max(tried) <= 512
    assert len(tried) < 20


@pytest.mark.filterwarnings("ignore")
def test_parts_of_a_gpu_run_on_the_cpu() -> None:
    result = gpu.run_part("vit:largest", TINY, "cpu", limit=2)
    rows = {r["entry"]: r for r in result["rows"]}
    assert rows["plain"]["batch"] == rows["re2fx reversible"]["batch"] == 2
    assert rows["plain"]["samples_per_second"] > 0
    result = gpu.run_part("vit:eager", TINY, "cpu", rounds=1, deadline=time.monotonic() - 1)
    assert {r["unavailable"] for r in result["rows"]} == {"no time was left"}
    assert not gpu.complete(result)
    said: list[str] = []
    gpu.tell(lambda text, **_: said.append(text), "vit:eager", result)
    assert len(said) == 1 + len(result["rows"])
    broken = {"vit": partial(vit, 33, 3, 2)}  # no multiple of a patch
    assert "indivisible" in gpu.run_part("vit:eager", broken, "cpu")["error"]


def test_parts_are_chosen_by_patterns() -> None:
    assert gpu.chosen(["vit:*"]) == [f"vit:{what}" for what in gpu.WHATS]
    assert gpu.chosen(["*"]) == list(gpu.PARTS)


def test_without_cuda_the_exit_status_is_2() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu"],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "CUDA" in done.stderr


def test_inputs_are_not_changed_by_a_network_that_writes_into_them() -> None:
    given: list[int] = [1]
    call(lambda x: x.append(2), (given,))
    assert given == [1]
