"""How far couplings and readouts move a model's output, measured on the user's data untrained.

rewire    a module per candidate, all on the parameters of the model
weigh     what each of them keeps for the backward, on fake tensors
measure   one pass over the data: the model and every candidate on each batch
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any

from torch import nn

from .api import transform
from .calibration import MAX_BITS, Calibrated, Calibration
from .candidates import Candidate, as_candidates, side_bits
from .capture import Leaves
from .coupling import Coupling
from .deviation import Means, Metric
from .errors import ConditioningError, NoResidualError, OptionError, Re2fxError
from .evaluation import Forward, Subject, call, shown
from .footprint import Kept
from .module import RewiredModule
from .piecewise import PiecewiseModule
from .policy import Select
from .report import report

# Of what a candidate passes to `transform`, what `report` takes too.
REPORTED = frozenset(inspect.signature(report).parameters)


def calibrate(
    model: nn.Module,
    data: Iterable[Any],
    *,
    metric: Metric | None = None,
    candidates: Iterable[Candidate | Coupling] | None = None,
    forward: Forward | None = None,
    batches: int | None = None,
    max_bits: int = MAX_BITS,
    progress: bool = False,
    activation: str = "branch",
    leaves: Leaves = (),
    capture: str = "auto",
    select: Select | None = None,
    min_chain: int = 2,
    min_saving: int | float | None = None,
) -> Calibration:
    """Measure how far each coupling and readout moves a pretrained model's output, untrained.

    The model and all its rewired forms run once on each batch, in eval mode and without gradients.
    Parameters, gradients, buffers, flags and random states are as before afterwards. Autocast that
    is active counts.

    The recommendation: of the candidates that can be trained reversibly (reconstruction loses less
    than 1 %, or is exact with at most ``max_bits`` side bits per element and block) the one nearest
    to the pretrained function; of those no more than 5 % farther than that, the one that keeps the
    fewest bytes for the backward, then the one with the cheapest step.

    Args:
        model: as for `transform`; it is not changed.
        data: batches, such as a `DataLoader`, of the size you train with: an argument of the model;
            a dict of keyword arguments; or a tuple or list whose first item is one of these or a
            tuple of positional arguments, and whose other items are targets.
        metric: called with a model's output and the batch, gives a number; averaged over the data.
        candidates: what to compare; `re2fx.CANDIDATES` by default. A coupling is read by the mean.
        forward: called with a model and a batch where ``model(batch)`` is not as above; returns
            what is compared. It must call the model once.
        batches: how many to take, all by default.
        max_bits: how many side bits per element and block are acceptable.
        progress: show a bar.
        activation: as for `transform`.
        leaves: as for `transform`.
        capture: as for `transform`.
        select: as for `transform`.
        min_chain: as for `transform`.
        min_saving: as for `transform`.

    Raises:
        OptionError: an argument has a value it cannot take, or there is no data.
        NoResidualError: nothing can be rewired with any of the candidates.
        CaptureError, ModeMismatchError: as for `transform`.
    """
    if isinstance(model, (RewiredModule, PiecewiseModule)):
        raise OptionError(
            f"{type(model).__name__} is rewired already; calibrate the model it was made of"
        )
    chosen = as_candidates(candidates)
    if batches is not None and batches < 1:
        raise OptionError(f"batches={batches!r}: expected a number of at least 1")
    size = len(data) if isinstance(data, Sized) else batches
    size = size if size is None or batches is None else min(size, batches)
    subject = Subject(model, forward or call)
    options = {
        "activation": activation, "leaves": leaves, "capture": capture, "select": select,
        "min_chain": min_chain, "min_saving": min_saving,
    }  # fmt: skip
    with subject.borrowed():
        given = islice(data, batches)
        first = _first(given)
        with subject.evaluating():
            inputs = subject.inputs(first)
        rewired, left_out = rewire_all(model, inputs, chosen, options)
        base, kept = (
            baseline(model, inputs, rewired, options),
            weigh(model, inputs, rewired, options),
        )
        means = Means(len(rewired), metric)
        models = [model, *(one.module for one in rewired)]
        with subject.evaluating(), shown(progress, size) as advance:
            for batch in chain([first], given):
                means.add(batch, subject.outputs(models, batch))
                advance()
    found = _calibration(type(model).__name__, rewired, base, kept, means, max_bits)
    return replace(found, left_out=tuple(left_out))


def _first(batches: Iterator[Any]) -> Any:
    """The first batch.

    Raises:
        OptionError: there is none.
    """
    for batch in batches:
        return batch
    raise OptionError("data holds no batch: there is nothing to measure on")


# rewire


@dataclass(frozen=True)
class One:
    """A candidate with its module, and why that cannot be trained reversibly."""

    candidate: Candidate
    module: nn.Module
    refusal: str


def rewire_all(
    model: nn.Module, inputs: Any, chosen: Sequence[Candidate], options: Mapping[str, Any]
) -> tuple[list[One], list[str]]:
    """The rewired forms, and the names of the candidates with which nothing can be rewired.

    Not every coupling takes norms behind additions.

    Raises:
        NoResidualError: that is so of all of them.
    """
    made: list[One] = []
    left_out: list[str] = []
    for candidate in chosen:
        try:
            made.append(rewire(model, inputs, candidate, options))
        except NoResidualError:
            left_out.append(str(candidate))
            if len(left_out) == len(chosen):
                raise
    return made, left_out


def rewire(model: nn.Module, inputs: Any, candidate: Candidate, options: Mapping[str, Any]) -> One:
    """The rewired form of a candidate.

    Raises:
        NoResidualError: nothing can be rewired.
    """
    wanted = {"memory": "store", **options, **candidate.options, "strict": True}
    rev: Any = transform(
        model, inputs, coupling=candidate.coupling, readout=candidate.readout, **wanted
    )
    try:
        rev.memory = "reversible"
    except ConditioningError as error:
        return One(candidate, rev, str(error))
    return One(candidate, rev, "")


# weigh


@dataclass(frozen=True)
class Bytes:
    """What a batch keeps for its backward.

    Attributes:
        total: in each way of training; None if that is not known.
        note: why it is not known, or cannot be reversed.
    """

    total: Kept | None
    note: str = ""


def weigh(
    model: nn.Module, inputs: Any, rewired: Sequence[One], options: Mapping[str, Any]
) -> list[int | None]:
    """What each candidate that can be trained reversibly keeps for the backward of a batch."""
    known: dict[str, Bytes] = {}
    found: list[int | None] = []
    for one in rewired:
        candidate = one.candidate
        if one.refusal:
            found.append(None)
            continue
        given = {name: value for name, value in candidate.options.items() if name in REPORTED}
        key = repr((candidate.readout, sorted(given.items()), what_counts(candidate)))
        if key not in known:
            given = {"coupling": candidate.coupling, "readout": candidate.readout, **given}
            known[key] = weighed(model, inputs, {**options, **given})
        total = known[key].total
        found.append(total.reversible if total else None)
    return found


def baseline(
    model: nn.Module, inputs: Any, rewired: Sequence[One], options: Mapping[str, Any]
) -> Bytes:
    """What ordinary training keeps, and a checkpoint around the branches that can be rewired."""
    candidate = next((one.candidate for one in rewired if not one.refusal), None)
    given: dict[str, Any] = {}
    if candidate is not None:
        given = {"coupling": candidate.coupling, "readout": candidate.readout}
        given |= {name: value for name, value in candidate.options.items() if name in REPORTED}
    return weighed(model, inputs, {**options, **given})


def what_counts(candidate: Candidate) -> Any:
    """What of a coupling changes the bytes kept: its side bits, or how it amplifies rounding."""
    if candidate.exact:
        return side_bits(candidate.coupling)
    return candidate.coupling if candidate.coupling.growth > 1 + 1e-9 else None


def weighed(model: nn.Module, inputs: Any, options: Mapping[str, Any]) -> Bytes:
    """The total of a report."""
    try:
        found = report(model, inputs, **options)
    except Re2fxError as error:
        return Bytes(None, f"bytes are not known ({error})")
    return Bytes(found.total, f"bytes are not known ({found.reason})" if found.reason else "")


# putting it together


def _calibration(
    name: str,
    rewired: Sequence[One],
    base: Bytes,
    kept: Sequence[int | None],
    means: Means,
    max_bits: int,
) -> Calibration:
    """The figures as a calibration."""
    return Calibration(
        model=name,
        batches=means.batches,
        samples=means.samples,
        rows=tuple(
            Calibrated(
                one.candidate,
                means.distance(place),
                means.agreement(place),
                means.metric(place),
                side_bits(one.candidate.coupling),
                one.candidate.coupling.growth,
                size,
                one.refusal or means.failures.get(place, ""),
            )
            for place, (one, size) in enumerate(zip(rewired, kept, strict=True))
        ),
        metric=means.metric(None),
        now=base.total.store if base.total else None,
        checkpoint=base.total.checkpoint if base.total else None,
        max_bits=max_bits,
        note=base.note,
    )
