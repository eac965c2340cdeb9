"""A coupling per chain: what may be asked for, what that is for given chains, and changing it.

Dr2Net (Zhao et al., CVPR 2024) starts a finetune near the pretrained network, where the streams are
poorly conditioned, and moves the coefficients to well-conditioned ones while it trains. So they can
be changed between two steps: calls made before keep the coefficients they were made with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from .conditioning import check_conditioning
from .coupling import Coupling
from .errors import OptionError
from .exact import fixed
from .fixed_point import FixedPoint
from .plan import Chain, Plan, Residual
from .text import count

if TYPE_CHECKING:
    from .module import RewiredModule

PerChain = tuple[Coupling, ...]
Couplings = Coupling | Sequence[Coupling] | Callable[[Chain], Coupling]


def checked(value: Couplings) -> Couplings:
    """What was asked for, sequences as tuples.

    Raises:
        OptionError: it is none of what it may be.
    """
    if isinstance(value, Coupling):
        return value
    if isinstance(value, Sequence) and all(isinstance(item, Coupling) for item in value):
        if not isinstance(value, str):
            return tuple(value)
    elif callable(value) and not isinstance(value, type):
        return value
    raise OptionError(
        f"coupling={value!r}: expected a re2fx.Coupling, a sequence with one per chain, or a "
        "function of a re2fx.Chain that returns one"
    )


def resolve(value: Couplings, chains: Sequence[Chain]) -> PerChain:
    """The coupling of each chain.

    Raises:
        OptionError: there are not as many as chains, or a function returned something else.
    """
    if isinstance(value, Coupling):
        return (value,) * len(chains)
    if isinstance(value, Sequence):
        if chains and len(value) != len(chains):
            raise OptionError(
                f"coupling: {len(value)} given for {count(len(chains), 'chain')}; expected one "
                "re2fx.Coupling for all, or one per chain in the order of re2fx.explain"
            )
        return tuple(value) if chains else ()
    found = tuple(value(chain) for chain in chains)
    for number, coupling in enumerate(found):
        if not isinstance(coupling, Coupling):
            raise OptionError(
                f"coupling: the function returned {coupling!r} for chain {number}; expected a "
                "re2fx.Coupling"
            )
    return found


def given(value: Couplings) -> PerChain:
    """Those that can be looked at before the chains are known."""
    if isinstance(value, Coupling):
        return (value,)
    return tuple(value) if isinstance(value, Sequence) else ()


def check_branches(couplings: Sequence[Coupling]) -> None:
    """Refuse couplings in which the branches have no part.

    Raises:
        OptionError: names the coupling.
    """
    for coupling in couplings:
        if coupling.c == 0:
            raise OptionError(f"coupling={coupling}: c = 0 leaves the branches out")


def check_drawn(couplings: Sequence[Coupling]) -> bool:
    """Whether couplings are drawn in the forward: those of all chains, or of none.

    Raises:
        OptionError: they are for some.
    """
    drawn = {coupling.draws for coupling in couplings}
    if len(drawn) > 1:
        raise OptionError("coupling: Coupling.bdia() is for all chains of a network, or for none")
    return True in drawn


def simplest(couplings: Sequence[Coupling]) -> Coupling | PerChain:
    """One coupling if all chains have it, else one per chain."""
    first = couplings[0] if couplings else Coupling.re2tal()
    return first if all(coupling == first for coupling in couplings) else tuple(couplings)


def effective(
    plan: Plan, couplings: Sequence[Coupling], point: FixedPoint | None = None
) -> list[list[Coupling]]:
    """Per chain the coupling of each residual, constant scales of the skips folded in.

    Raises:
        OptionError: streams in fixed point cannot have it.
    """
    pairs = zip(plan.chains, couplings, strict=True)
    return [
        [
            of_residual(fixed(c, point), residual)
            for residual in chain.residuals
            for _ in range(c.evaluations)
        ]
        for chain, c in pairs
    ]


def of_residual(coupling: Coupling, residual: Residual) -> Coupling:
    """A chain's coupling as one of its residuals has it."""
    own = coupling.of_block() if residual.block else coupling.scaled(residual.skip_scale, 1.0)
    return own.at(str(residual.location))


def check_blocks(couplings: Sequence[Coupling], chains: Sequence[Chain]) -> None:
    """Refuse couplings under which the streams of whole blocks would grow without bound.

    Raises:
        OptionError: names the coupling, the chain and the remedy.
    """
    for number, (coupling, chain) in enumerate(zip(couplings, chains, strict=True)):
        if any(residual.block for residual in chain.residuals) and not coupling.takes_blocks:
            raise OptionError(
                f"coupling={coupling}: chain {number} consists of whole blocks, whose streams "
                f"would not stay bounded. {BLOCK_REMEDY}"
            )


BLOCK_REMEDY = (
    "Use Coupling.consistent(b) with b below 1/3, exact=True for b = 2^-j: consistent(0.125) is "
    "near the given network and keeps 3 bits per element and block"
)


def couplings_of(parts: Iterable[RewiredModule]) -> PerChain:
    """The present coupling of every chain of some rewired modules."""
    return tuple(coupling for part in parts for coupling in part._variants[0].couplings)


def present(part: RewiredModule) -> Plan:
    """The plan of a rewired module; what it says of anchors may be of an earlier coupling."""
    return part._variants[0].rewired[part.training].plan


def check_conditioned(part: RewiredModule, couplings: PerChain) -> None:
    """Raise the reason why a rewired module's chains could not be reconstructed with these.

    Raises:
        ConditioningError: names the chain.
    """
    for rewired in part._variants[0].rewired.values():
        if not rewired.wirings:  # eval mode of a drawn coupling: the given network
            continue
        found = effective(rewired.plan, couplings, rewired.point)
        own = zip(rewired.wirings, found, strict=True)
        wirings = tuple(wiring.recoupled(blocks) for wiring, blocks in own)
        check_conditioning(part._live._model, wirings)


def check_change(part: RewiredModule, couplings: PerChain) -> None:
    """Raise the reason why the couplings of a rewired module cannot be these, if there is one.

    Raises:
        OptionError: its graph was edited.
        ConditioningError: a chain could not be reconstructed.
    """
    if part._edited:
        raise OptionError(
            f"coupling: the graph of {type(part).__name__} was edited, and would lose the edit if "
            "it was rewired with another one. Give re2fx.transform the coupling before."
        )
    for rewired in part._variants[0].rewired.values():
        check_blocks(couplings, rewired.plan.chains)
        effective(rewired.plan, couplings, rewired.point)
    if part.memory != "store":
        check_conditioned(part, couplings)


def change(parts: Mapping[str, RewiredModule], value: Couplings) -> None:
    """Change the couplings of rewired modules, of all of them or of none.

    Args:
        parts: by their paths.
        value: what `re2fx.transform` takes, for the chains of all parts.

    Raises:
        OptionError: the value does not fit the chains, or a graph was edited.
        ConditioningError: a chain could not be reconstructed with it.
    """
    value = checked(value)
    plans = [present(part).below(path) for path, part in parts.items()]
    couplings = resolve(value, [chain for plan in plans for chain in plan.chains])
    check_branches(couplings)
    own: list[tuple[RewiredModule, PerChain]] = []
    for part, plan in zip(parts.values(), plans, strict=True):
        own.append((part, couplings[: len(plan.chains)]))
        couplings = couplings[len(plan.chains) :]
    for part, theirs in own:
        check_change(part, theirs)
    for part, theirs in own:
        if theirs != part._variants[0].couplings:
            for variant in part._variants:
                variant.recouple(theirs)
            part._coefficients = repr(theirs)
