"""How to rewire: what `re2fx.transform` is told, checked before any work is done."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from .budget import Memory, checked_memory
from .conditioning import check_tolerance
from .coupling import READOUTS, Readout
from .couplings import BLOCK_REMEDY, Couplings, check_branches, checked, given
from .errors import OptionError
from .exact import fixed
from .fixed_point import FixedPoint
from .policy import Policy
from .wiring import DRIFT_TOLERANCE

ACTIVATIONS = ("branch", "stream", "block")


@dataclass(frozen=True)
class Options:
    """How to rewire; checked before any work is done."""

    coupling: Couplings
    readout: Readout
    activation: str
    memory: Memory
    policy: Policy = field(default_factory=Policy)
    exact: bool | FixedPoint = False
    drift_tolerance: float = DRIFT_TOLERANCE

    def __post_init__(self) -> None:
        check_tolerance(self.drift_tolerance)
        object.__setattr__(self, "memory", checked_memory(self.memory))
        object.__setattr__(self, "coupling", checked(self.coupling))
        check_branches(given(self.coupling))
        for name, allowed in (
            ("readout", READOUTS),
            ("activation", ACTIVATIONS),
        ):
            value = getattr(self, name)
            if value not in allowed:
                listed = ", ".join(map(repr, allowed))
                raise OptionError(f"{name}={value!r}: expected one of {listed}")
        for coupling in given(self.coupling):
            coupling.check_readout(self.readout)
        bad = [coupling for coupling in given(self.coupling) if not coupling.invertible]
        if self.memory != "store" and bad:
            raise OptionError(
                f"coupling={bad[0]}: b = 0 cannot be inverted. Use a coupling with b != 0 "
                "(Coupling.re2tal() is the default), or memory='store'."
            )
        for coupling in given(self.coupling):
            fixed(coupling, self.point)
        takes = all(coupling.takes_blocks for coupling in given(self.coupling))
        if self.activation == "block" and (self.readout == "sum" or not takes):
            raise OptionError(
                f"activation='block' needs readout='mean' or 'last' and another coupling than "
                f"{' '.join(map(str, given(self.coupling)))}. {BLOCK_REMEDY}"
            )
        post_norm = takes and self.readout != "sum"
        object.__setattr__(self, "policy", replace(self.policy, post_norm=post_norm))

    @property
    def point(self) -> FixedPoint | None:
        """The numbers of the streams, if they are fixed-point ones.

        Raises:
            OptionError: it is no such thing.
        """
        return FixedPoint.of(self.exact)
