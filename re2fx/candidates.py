"""Couplings and readouts to choose from, and what each would cost in exact form."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .coupling import Coupling, Readout
from .errors import OptionError

EXTRA_FORWARD = 4 / 3  # of an ordinary step, in which a backward counts as two forwards


@dataclass(frozen=True)
class Candidate:
    """One way to rewire a model.

    Attributes:
        name: what to call it.
        coupling: how the two streams combine.
        readout: how a chain's end becomes one tensor.
        options: further arguments of `re2fx.transform`.
        branches: how often a step of the recurrence evaluates its branch.
    """

    name: str
    coupling: Coupling
    readout: Readout = "mean"
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    branches: int = 1

    @property
    def exact(self) -> bool:
        """Whether its streams are carried in fixed point, so that its inverse is exact."""
        return bool(self.options.get("exact", False))

    @property
    def step(self) -> float:
        """The work of a training step in the chains, over that of ordinary training."""
        return EXTRA_FORWARD * self.branches

    def __str__(self) -> str:
        return f"{self.name} read by {self.readout}"


EXACT = {"exact": True}

# What `re2fx.calibrate` tries unless it is told otherwise. `Coupling.bdia` is not among them: in
# eval mode, in which outputs are compared, it is the given network, whatever it is in training.
CANDIDATES = (
    Candidate("re2tal", Coupling.re2tal()),
    Candidate("re2tal", Coupling.re2tal(), "sum"),
    Candidate("double", Coupling.double(), branches=2),
    Candidate("dr2net(0.3, 0.7)", Coupling.dr2net(0.3, 0.7)),
    Candidate("consistent(1/2)", Coupling.consistent(1 / 2), "mean", EXACT),
    Candidate("consistent(1/2)", Coupling.consistent(1 / 2), "last", EXACT),
    Candidate("consistent(1/4)", Coupling.consistent(1 / 4), "mean", EXACT),
    Candidate("consistent(1/4)", Coupling.consistent(1 / 4), "last", EXACT),
    Candidate("consistent(1/8)", Coupling.consistent(1 / 8), "last", EXACT),
)


def side_bits(coupling: Coupling) -> int | None:
    """Bits per element and block that the exact inverse keeps: j for ``|b| = 2**-j``, or None.

    Fixed-point streams shift the state before by j places, and keep what is shifted out. Other
    values of ``b`` have no such form.
    """
    mantissa, exponent = math.frexp(abs(coupling.b))
    return 1 - exponent if mantissa == 0.5 and exponent <= 1 else None


def as_candidates(given: Iterable[Candidate | Coupling] | None) -> tuple[Candidate, ...]:
    """Candidates as they are, couplings with the readout ``mean``.

    Raises:
        OptionError: something else is among them, or nothing is.
    """
    made = []
    for item in CANDIDATES if given is None else given:
        if isinstance(item, Coupling):
            item = Candidate(str(item), item)
        if not isinstance(item, Candidate):
            raise OptionError(
                f"candidates: expected re2fx.Candidate or re2fx.Coupling, not {item!r}"
            )
        made.append(item)
    if not made:
        raise OptionError("candidates is empty: there is nothing to compare")
    return tuple(made)
