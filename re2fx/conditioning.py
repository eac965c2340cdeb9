"""How much of a stream survives being reconstructed, and where a true pair must be kept instead.

Undoing blocks amplifies rounding errors, in the end by `Coupling.growth` per block. A coupling with
growth above 1 would lose a stream after some blocks, so the executors keep **anchors**: in front of
some blocks the true pair ``(p_i, p_{i-1})``, from which the walk goes on as if it were the end.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from .coupling import Coupling
from .errors import ConditioningError, OptionError
from .plan import Plan
from .text import count
from .wiring import Wiring

# Residuals per anchor, below which the anchors keep about as much as a checkpoint of every branch.
FEWEST = 3
# The dtypes that streams are carried in; complex ones count by their parts.
STREAMS = (torch.float32, torch.float64)


@dataclass(frozen=True)
class Conditioning:
    """How well one chain can be reconstructed.

    Attributes:
        drift: the largest relative error of a state if nothing were kept but the chain's end.
        anchors: numbers of the blocks in front of which a true pair is kept.
        problem: why it cannot be reversed; empty if it can.
    """

    drift: float
    anchors: tuple[int, ...]
    problem: str = ""


class Drift:
    """The error of a pair of states as it grows from block to block, walking back.

    Undoing a block gives ``(x - a y - c F(y)) / b``. Errors of x and y pass through it as they are,
    and the rounding of its terms, in the forward and in the inverse, adds to them. Roundings of
    different blocks are independent, so their second moments add. States are taken to be of one
    size, or to grow as the coupling makes them; what the branches do to an error is left out
    (`re2fx.verify` measures it), and a whole block passes it as it is.

    Args:
        eps: relative rounding error of one operation.
    """

    def __init__(self, eps: float) -> None:
        self._eps = eps
        # Second moments of a true pair's errors, in units of the older state.
        self._newer = self._both = self._older = 0.0

    def undo(self, coupling: Coupling) -> float:
        """The relative error of the state that undoing one more block gives."""
        if coupling.exact:
            return 0.0
        smaller, outcomes = max(1.0, coupling.gain), coupling.outcomes
        following = both = 0.0
        for outcome in outcomes:  # the mean over what may be drawn
            a, b = outcome.passed, outcome.b
            rounding = self._eps * (smaller + abs(a))
            carried = self._newer - 2 * a * self._both + a * a * self._older
            following += (max(carried, 0.0) + rounding * rounding) / (b * b) / len(outcomes)
            both += (self._both - a * self._older) / b / len(outcomes)
        moments = (self._older, both, following)
        self._newer, self._both, self._older = (smaller * smaller * x for x in moments)
        return math.sqrt(self._older) if math.isfinite(self._older) else math.inf


def place_anchors(couplings: Sequence[Coupling], eps: float, tolerance: float) -> tuple[int, ...]:
    """Where a chain must keep a true pair, as far apart as its tolerance lets them be.

    Undoing block i gives ``p_{i-1}``; where its predicted error would pass the tolerance, the pair
    in front of block i is kept and the error starts anew. Going from the end and waiting as long as
    possible places the fewest.

    Args:
        couplings: of the blocks, in order, with their constant scales; none with b = 0.
        eps: relative rounding error of one operation.
        tolerance: largest relative error that a reconstructed state may have.

    Returns:
        block numbers in ascending order; never 0, since nothing lies in front of the first block.
    """
    places, drift = [], Drift(eps)
    for block in range(len(couplings) - 1, 0, -1):
        if drift.undo(couplings[block]) > tolerance:
            places.append(block)
            drift = Drift(eps)
    return tuple(reversed(places))


def assess(wiring: Wiring, eps: float) -> Conditioning:
    """Place the anchors of a chain, and say if it cannot be reversed or if that would not pay."""
    couplings = [block.coupling for block in wiring.blocks]
    if not all(coupling.invertible for coupling in couplings):
        return Conditioning(
            math.inf,
            (),
            "b = 0 cannot be inverted. Use a coupling with b != 0, or memory='store'.",
        )
    drift = Drift(eps)
    lost = max((drift.undo(coupling) for coupling in couplings[:0:-1]), default=0.0)
    anchors = place_anchors(couplings, eps, wiring.tolerance)
    if len(anchors) * FEWEST < len(couplings):
        return Conditioning(lost, anchors)
    growth = max(coupling.growth for coupling in couplings)
    return Conditioning(
        lost,
        anchors,
        f"rounding grows {growth:.3g}-fold per block, so a state would be reconstructed with a "
        f"relative error of up to {lost:.1g}. To stay below drift_tolerance={wiring.tolerance:g}, "
        f"a pair of states would have to be kept at {len(anchors)} of {len(couplings)} residuals, "
        "which saves little. Use a coupling with |b| nearer to 1, or memory='store'.",
    )


def anchored(wiring: Wiring) -> tuple[frozenset[torch.dtype], ...]:
    """Per block the dtypes of streams for which a pair is kept in front of it."""
    couplings = [block.coupling for block in wiring.blocks]
    places: dict[torch.dtype, tuple[int, ...]] = {}
    if all(coupling.invertible for coupling in couplings):
        for dtype in STREAMS:
            places[dtype] = place_anchors(couplings, torch.finfo(dtype).eps, wiring.tolerance)
    return tuple(
        frozenset(dtype for dtype in places if block in places[dtype])
        for block in range(len(couplings))
    )


def annotated(model: nn.Module, plan: Plan, wirings: Sequence[Wiring]) -> Plan:
    """The plan with what each chain's coupling means for it, in words."""
    if not wirings:
        return plan
    chains = (
        replace(chain, notes=tuple(_notes(wiring, assess(wiring, rounding(model)))))
        for chain, wiring in zip(plan.chains, wirings, strict=True)
    )
    return replace(plan, chains=tuple(chains))


def _notes(wiring: Wiring, conditioning: Conditioning) -> Iterator[str]:
    evaluations = wiring.blocks[0].coupling.evaluations
    if evaluations > 1:
        yield "the branch of each residual runs twice: twice the time, two draws of its noise"
    if wiring.blocks[0].coupling.draws:
        yield "signs are drawn per sample and block; in eval mode it is the given network, stored"
    if conditioning.problem:
        yield f"cannot be reversed: {conditioning.problem}"
    elif conditioning.anchors:
        places = ", ".join(str(block // evaluations) for block in conditioning.anchors)
        anchors = count(len(conditioning.anchors), "anchor")
        yield f"{anchors}, a pair of states kept in front of residual {places} (the first is 0)"


def check_tolerance(value: float) -> None:
    """Refuse what is no relative error.

    Raises:
        OptionError: names the argument and the allowed values.
    """
    if not isinstance(value, float) or not 0 < value < 1:
        raise OptionError(f"drift_tolerance={value!r}: expected a number between 0 and 1")


def rounding(model: nn.Module) -> float:
    """The relative rounding error of a model's streams, which are fp32 at least."""
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    return torch.finfo(torch.float64 if dtypes == {torch.float64} else torch.float32).eps


def check_conditioning(
    model: nn.Module, wirings: tuple[Wiring, ...], name: str | None = None
) -> None:
    """Refuse couplings whose reconstruction would drown in rounding, anchors or not.

    Args:
        model: its parameters' dtype tells the streams'.
        wirings: the chains.
        name: what to call the model, its class by default.

    Raises:
        ConditioningError: names the chain, the predicted error and the remedy.
    """
    for number, wiring in enumerate(wirings):
        problem = assess(wiring, rounding(model)).problem
        if problem:
            raise ConditioningError(
                f"{name or type(model).__name__}: chain {number} of {len(wiring.blocks)} residuals "
                f"with coupling {wiring.blocks[0].coupling}: {problem}"
            )
