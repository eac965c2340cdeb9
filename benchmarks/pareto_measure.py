"""Peak, step time and gradients of every entry, on one set of parameters in one process.

A step is forward, loss and backward. The parameters' gradients exist before it and are added to, so
that the peak is what the step itself needs above parameters and gradients. Times are taken in
rounds, each entry once a round, in an order drawn anew for every round.
"""

from __future__ import annotations

import gc
import math
import random
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import re2fx

from .common import median_ratio
from .pareto_entries import Entry, Made, Unavailable, predicted_peak
from .pareto_models import Inputs, Subject, call

WARMUP = 2

Row = dict[str, Any]
Tick = Callable[[], None]


def moved(inputs: Any, device: torch.device) -> Any:
    """The same structure on a device."""
    if isinstance(inputs, Tensor):
        return inputs.to(device)
    if isinstance(inputs, dict):
        return {key: moved(value, device) for key, value in inputs.items()}
    if isinstance(inputs, (list, tuple)):
        return type(inputs)(moved(value, device) for value in inputs)
    return inputs


class Bench:
    """A network, its inputs, and what is known of its entries.

    Args:
        subject: what to measure.
        device: where.
        mixed: under autocast to bf16.
        batch: of another size than the subject's.
    """

    def __init__(
        self,
        subject: Subject,
        device: str = "cpu",
        mixed: bool = False,
        batch: int | None = None,
    ) -> None:
        self.subject, self.device, self.mixed = subject, torch.device(device), mixed
        self.model: nn.Module = subject.model().to(self.device)
        self.inputs: Inputs = moved(subject.inputs(batch or subject.batch), self.device)
        self.peaks: dict[str, int] = {}
        self.references: dict[str, list[Tensor]] = {}
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)

    def autocast(self) -> AbstractContextManager[Any]:
        """bf16, or nothing."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.mixed else nullcontext()

    def step(self, made: Made) -> None:
        """Forward, loss and backward."""
        with self.autocast(), made.saving():
            loss = self.subject.loss(call(made.network, self.inputs))
        loss.backward()

    def clear(self) -> None:
        """Gradients are zero and stay where they are."""
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        torch._foreach_zero_(grads)

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def gradients(self, made: Made) -> list[Tensor]:
        """Of a step whose random numbers are the same for everyone."""
        self.clear()
        torch.manual_seed(1)
        self.step(made)
        return [p.grad.clone() for p in self.model.parameters() if p.grad is not None]

    def drawn(self) -> bool:
        """Whether random numbers take part, of which Inductor has its own."""
        return any(
            getattr(module, "p", 0.0) and isinstance(getattr(module, "p", None), float)
            for module in self.model.modules()
        )

    def first(self, entry: Entry) -> tuple[Made, Row]:
        """Make an entry and take everything but its times."""
        begin = time.perf_counter()
        made = entry.make(self)
        row: Row = {"entry": entry.name, "own": entry.own, "compiled": entry.compiled}
        count = generated() if entry.compiled else None
        with made.compiling():
            for _ in range(WARMUP):
                self.step(made)
        self.synchronize()
        if entry.compiled:
            row["seconds_to_compile"] = round(time.perf_counter() - begin, 2)
            row["generated_kernels"] = None if count is None else (generated() or 0) - count
        row |= self.agreement(entry, made)
        row["predicted"] = predicted_peak(made.network)
        if made.budget is not None:
            row["budget"] = made.budget
        row["peak"] = re2fx.peak(lambda: self.step(made), self.device).peak
        self.peaks[entry.name] = row["peak"]
        return made, row

    def agreement(self, entry: Entry, made: Made) -> Row:
        """How far gradients are from those they must be."""
        if not entry.reference:
            self.references[entry.name] = self.gradients(made)
            return {"reference": None, "gradient_error": None}
        known = self.references.get(entry.reference)
        if known is None or (entry.compiled and self.drawn()):
            return {"reference": entry.reference, "gradient_error": None}
        error = largest_difference(self.gradients(made), known)
        if not math.isfinite(error):
            return {"reference": entry.reference, "gradient_error": None, "not_finite": True}
        return {"reference": entry.reference, "gradient_error": error}

    def timed(self, made: Made) -> float:
        """Seconds of one step."""
        self.clear()
        self.synchronize()
        begin = time.perf_counter()
        self.step(made)
        self.synchronize()
        return round(time.perf_counter() - begin, 6)


def generated() -> int | None:
    """Kernels that Inductor has generated so far in this process."""
    from torch._inductor import metrics

    found = getattr(metrics, "generated_kernel_count", None)
    return found if isinstance(found, int) else None


def largest_difference(got: Sequence[Tensor], reference: Sequence[Tensor]) -> float:
    """Over the parameters: norm of the difference over norm of the gradient.

    Gradients that are nothing but rounding, such as those of attention's key biases, are measured
    by a thousandth of what a parameter has on average.
    """
    norms = torch.stack([g.double().norm() for g in reference])
    floor = 1e-3 * norms.square().mean().sqrt()
    pairs = zip(got, reference, strict=True)
    differences = torch.stack([(a.double() - b.double()).norm() for a, b in pairs])
    return float((differences / norms.clamp(min=floor)).max())


def explained(error: BaseException) -> str:
    """An error in one line."""
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text}"[:300]


def release(device: torch.device) -> None:
    """Give back what nobody holds."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def measure(
    bench: Bench,
    entries: Sequence[Entry],
    rounds: int,
    tick: Tick = lambda: None,
    look: Callable[[Bench, Made, Row], None] = lambda bench, made, row: None,
    deadline: float = float("inf"),
) -> list[Row]:
    """A row for every entry, also for those that cannot be measured.

    Args:
        bench: the network.
        entries: the ways to train it; "plain" must be the first.
        rounds: of timed steps; each ratio is the median over them.
        tick: called after every entry and round.
        look: adds to a row what else there is to say.
        deadline: ``time.monotonic()`` after which no entry is begun and no round.
    """
    rows: dict[str, Row] = {}
    running: dict[str, Made] = {}
    for entry in entries:
        blank: Row = {"entry": entry.name, "own": entry.own, "compiled": entry.compiled}
        try:
            if time.monotonic() > deadline:
                raise Unavailable("no time was left")
            made, row = bench.first(entry)
            look(bench, made, row)
            running[entry.name], rows[entry.name] = made, row
        except Unavailable as error:
            rows[entry.name] = {**blank, "unavailable": " ".join(str(error).split())[:300]}
        except Exception as error:
            traceback.clear_frames(error.__traceback__)
            rows[entry.name] = {**blank, "error": explained(error)}
        release(bench.device)
        tick()
    seconds = in_rounds(bench, running, rows, rounds, tick, deadline)
    for name, taken in seconds.items():
        if taken:
            row = rows[name]
            row |= {"rounds": len(taken), "median_seconds": round(median(taken), 6)}
            row["over_plain"] = (
                round(median_ratio(seconds, name, "plain"), 4) if seconds.get("plain") else None
            )
            row["seconds"] = taken
    return list(rows.values())


def in_rounds(
    bench: Bench,
    running: dict[str, Made],
    rows: dict[str, Row],
    rounds: int,
    tick: Tick,
    deadline: float,
) -> dict[str, list[float]]:
    """Seconds per entry; one that fails is dropped from all rounds."""
    drawn = random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in running}
    for _ in range(rounds):
        if time.monotonic() > deadline and all(seconds.values()):
            break
        for name in drawn.sample(sorted(running), len(running)):
            try:
                seconds[name].append(bench.timed(running[name]))
            except Exception as error:
                traceback.clear_frames(error.__traceback__)
                rows[name] = {**rows[name], "error": explained(error)}
                del running[name], seconds[name]
                release(bench.device)
        tick()
    return seconds
