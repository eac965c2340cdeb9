"""How far couplings and readouts move a model's output, measured on the user's data untrained.

rewire    a module per candidate, all on the parameters of the model
weigh     what each readout keeps for the backward, on fake tensors
measure   one pass over the data: the model and every candidate on each batch
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import torch
from torch import nn

from .api import transform
from .calibration import MAX_BITS, Calibrated, Calibration
from .candidates import Candidate, as_candidates, side_bits
from .capture import Leaves
from .coupling import Coupling
from .deviation import Means, Metric
from .errors import ConditioningError, OptionError, Re2fxError
from .evaluation import Forward, Subject, call, shown
from .footprint import ChainBytes, Kept
from .module import RewiredModule
from .piecewise import PiecewiseModule
from .policy import Select
from .report import report


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
        NoResidualError: nothing can be rewired.
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
        weights = weigh(model, inputs, chosen, options)
        rewired = [rewire(model, inputs, candidate, options) for candidate in chosen]
        means = Means(len(rewired), metric)
        models = [model, *(one.module for one in rewired)]
        with subject.evaluating(), shown(progress, size) as advance:
            for batch in chain([first], given):
                means.add(batch, subject.outputs(models, batch))
                advance()
    return _calibration(type(model).__name__, rewired, weights, means, max_bits)


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
class Weight:
    """What a readout keeps, and the chains that side bits come on top of.

    Attributes:
        total: in each way of training; None if that is not known.
        chains: their rows in the report.
        note: why it is not known.
    """

    total: Kept | None
    chains: tuple[ChainBytes, ...] = ()
    note: str = ""

    def kept(self, candidate: Candidate) -> int | None:
        """Bytes kept by a candidate, with its side bits."""
        if self.total is None or self.total.reversible is None:
            return None
        bits = side_bits(candidate.coupling) if candidate.exact else 0
        return self.total.reversible + sum(side_bytes(chain, bits or 0) for chain in self.chains)


def side_bytes(chain: ChainBytes, bits: int) -> int:
    """What the exact inverse of a chain keeps besides its streams."""
    elements = chain.state // getattr(torch, chain.dtype).itemsize if chain.dtype else 0
    return -(-bits * elements // 8) * chain.residuals


def weigh(
    model: nn.Module, inputs: Any, candidates: Sequence[Candidate], options: Mapping[str, Any]
) -> dict[str, Weight]:
    """What each readout keeps for the backward of a batch; couplings make no difference."""
    weights: dict[str, Weight] = {}
    for readout in dict.fromkeys(candidate.readout for candidate in candidates):
        try:
            found = report(model, inputs, readout=readout, **options)
        except Re2fxError as error:
            weights[readout] = Weight(None, note=f"bytes are not known ({error})")
            continue
        note = f"bytes are not known ({found.reason})" if found.reason else ""
        weights[readout] = Weight(found.total, found.chains, note)
    return weights


# putting it together


def _calibration(
    name: str, rewired: Sequence[One], weights: Mapping[str, Weight], means: Means, max_bits: int
) -> Calibration:
    """The figures as a calibration."""
    base = next(iter(weights.values()))
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
                None if one.refusal else weights[one.candidate.readout].kept(one.candidate),
                one.refusal,
            )
            for place, one in enumerate(rewired)
        ),
        metric=means.metric(None),
        now=base.total.store if base.total else None,
        checkpoint=base.total.checkpoint if base.total else None,
        max_bits=max_bits,
        note=base.note,
    )
