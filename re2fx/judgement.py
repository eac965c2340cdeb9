"""From what was measured to what the user is told.

A difference is an *error* if reversible execution computes something else: a branch that does not
repeat, a gradient that no rounding of the streams accounts for, state or random numbers left
otherwise. It is a *warning* if it is more than the tolerance but is what the rounding of the
reconstructed states does, and a *note* if those states are as exact as their dtype can be.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import groupby

from .evidence import Evidence, moved, plain
from .findings import SEVERITIES, Finding, figure
from .remedies import FOLLOWS, FP32_STREAMS, HALF, REMEDIES, kind, more_exact
from .snapshot import changed
from .text import count, shorten
from .trial import Repeat, Trial

# A gradient counts as accounted for if at most this share of its difference is left over.
LEFT_OVER = 0.1
# A state with this relative error has no digit left that would be right.
LOST = 0.1


def judge(evidence: Evidence) -> tuple[Finding, ...]:
    """All findings, errors first."""
    found = [
        *branches(evidence),
        *failure(evidence),
        *gradients(evidence),
        *unsteady(evidence),
        *outputs(evidence),
        *afterwards(evidence),
        *reconstruction(evidence),
        *half_precision(evidence),
    ]
    return tuple(sorted(found, key=lambda finding: SEVERITIES.index(finding.severity)))


def branches(evidence: Evidence) -> Iterator[Finding]:
    """Branches that do not repeat, those of one line and one cause together."""

    def key(item: tuple[int, Repeat]) -> tuple[str, str, bool]:
        place = evidence.locations[item[0]][item[1].block]
        cause = item[1].cause.replace(f"{place.module}.", "") if place.module else item[1].cause
        return str(place), cause, bool(item[1].failure)

    for (_, _, failed), group in groupby(sorted(evidence.unrepeated, key=key), key=key):
        members = list(group)
        first = members[0][1]
        places = evidence.where([(chain, repeat.block) for chain, repeat in members])
        if failed:
            yield Finding("error", places, _without_place(first.failure), REMEDIES["changes"])
            continue
        worst = max(repeat.error for _, repeat in members)
        cause = f": {first.cause}" if first.cause else ""
        yield Finding(
            "error",
            places,
            f"Run again on the same input, the branch gives a result that differs by {worst:.1e} "
            f"relative to its norm{cause}.",
            REMEDIES[kind(first.cause)],
        )
    yield from unsteady_kernels(evidence)


def unsteady_kernels(evidence: Evidence) -> Iterator[Finding]:
    """Branches that repeat but for rounding."""
    rounding = evidence.precision.rounding
    found = [
        ((trial.number, repeat.block), repeat.error)
        for trial in evidence.trials
        for repeat in reversed(trial.repeats)
        if 0 < repeat.error <= rounding and not repeat.failure
    ]
    if found:
        yield Finding(
            "note",
            evidence.where([block for block, _ in found]),
            "Run again on the same input, the branch gives the same but for rounding "
            f"({max(error for _, error in found):.1e}): a kernel in it adds in no fixed order.",
            "Nothing need be done; torch.use_deterministic_algorithms(True) makes it repeat.",
        )


def failure(evidence: Evidence) -> Iterator[Finding]:
    """What reversible execution raised where stored execution did not."""
    error = evidence.reversible.error
    if error is None or str(error) in {repeat.failure for _, repeat in evidence.unrepeated}:
        return
    blocks = [
        (chain, block)
        for chain, locations in enumerate(evidence.locations)
        for block, place in enumerate(locations)
        if str(error).startswith(f"{place.module or 'the model'} ({place}): ")
    ]
    yield Finding(
        "error",
        evidence.source(blocks) if blocks else "the reversible step",
        f"It raised {type(error).__name__}: {_without_place(str(error))}",
        "Mend the branch as the message says; until then use memory='store'.",
    )


def gradients(evidence: Evidence) -> Iterator[Finding]:
    """Gradients that are missing or differ by more than the tolerance."""
    errors = evidence.gradient_errors(evidence.reversible)
    absent = [g.name for g in errors if math.isinf(g.error) and _one_sided(evidence, g.name)]
    if absent:
        yield Finding(
            "error",
            f"gradients of {shorten(absent)}",
            "One of stored and reversible execution has a gradient, and the other has none.",
            "Use memory='store', and please report the model: this should not happen.",
        )
    if evidence.infinite:
        yield Finding(
            "warning",
            f"gradients of {shorten(evidence.infinite)}",
            "They are not finite in stored execution, so they cannot be compared.",
            "Verify with inputs, and a loss, whose gradients are finite.",
        )
    over = [g for g in errors if g.error > evidence.precision.tolerance and g.name not in absent]
    if not over:
        return
    places = f"gradients of {shorten(g.name for g in over)}"
    sentence = f"The relative error is up to {over[0].error:.1e}"
    if evidence.unrepeated:
        yield Finding("error", places, f"{sentence}.", FOLLOWS)
    else:
        yield explained(evidence, places, sentence, over[0].error)


def unsteady(evidence: Evidence) -> Iterator[Finding]:
    """What stored execution does not repeat, if no branch accounts for it."""
    found, allowed = evidence.unsteady, evidence.precision.tolerance
    if evidence.unrepeated:
        return
    names = [name for name in found.gradients if name not in evidence.infinite]
    places = [f"gradients of {shorten(names)}"] * bool(names)
    places += ["outputs"] * (found.outputs > allowed)
    errors = [found.gradients[name] for name in names] + [found.outputs]
    places += [shorten(sorted(found.state | found.random))] * bool(found.state | found.random)
    if places:
        largest = f" (by {max(errors):.1e} relative)" if 0 < max(errors) < math.inf else ""
        yield Finding(
            "warning",
            "; ".join(places),
            f"Two runs of stored execution differ here{largest}, so reversible execution cannot be "
            "compared with it: what lies outside the branches changes between calls, or a kernel "
            "does not compute the same twice.",
            "Make it deterministic for the verification: model.eval(), generators of torch's own, "
            "torch.use_deterministic_algorithms(True), or another dtype.",
        )


def explained(evidence: Evidence, places: str, sentence: str, worst: float) -> Finding:
    """What a difference comes from that no branch accounts for."""
    error = max((e for t in evidence.trials for e in t.errors if e is not None), default=0.0)
    allowed = max(worst * LEFT_OVER, evidence.precision.tolerance)
    left = _left_over(evidence)
    if not math.isfinite(worst) or left > allowed:
        return Finding(
            "error",
            places,
            f"{sentence}, which the reconstruction error of {error:.1e} does not account for.",
            "Use memory='store'. Something that a branch reads may change between the forward "
            "and the backward; otherwise please report the model.",
        )
    account = (
        f"{sentence}: stored execution differentiated at the reconstructed states, which are off "
        f"by {error:.1e}, has these gradients too, to {left:.1e}."
    )
    if error <= evidence.precision.rounding:
        return Finding(
            "note",
            places,
            f"{account} The states are as exact as their dtype, so a kink lies between: the sign "
            "in front of a ReLU or the choice of a max-pooling turns with the last digit.",
            "Nothing need be done: other kernels or another dtype turn the same kinks. In fp64 "
            "the difference goes away.",
        )
    return Finding(
        "error" if error > LOST else "warning",
        places,
        account,
        "Make the reconstruction more exact: see the finding about the chain.",
    )


def _left_over(evidence: Evidence) -> float:
    """The error of reversible gradients against those at the reconstructed states."""
    pinned = evidence.pinned
    if pinned is None or pinned.error is not None:
        return math.inf
    errors = evidence.gradient_errors(evidence.reversible, pinned)
    return max((g.error for g in errors), default=0.0)


def outputs(evidence: Evidence) -> Iterator[Finding]:
    """Outputs that differ."""
    error, allowed = evidence.output_error, evidence.precision.tolerance
    if evidence.reversible.error is not None or error <= allowed:
        return
    if evidence.unrepeated or evidence.unsteady.outputs <= allowed:
        yield Finding(
            "error",
            "outputs",
            f"Stored and reversible execution differ by {error:.1e}, relative to the norm.",
            FOLLOWS if evidence.unrepeated else "Use memory='store', and please report the model.",
        )


def afterwards(evidence: Evidence) -> Iterator[Finding]:
    """State of the modules and random generators that the step leaves behind otherwise."""
    stored, reversible = evidence.stored, evidence.reversible
    if reversible.error is not None:
        return
    again = evidence.unsteady
    state = moved(stored.state, reversible.state, evidence.precision.rounding)
    drawn = changed(stored.random, reversible.random)
    for names, does, remedy in (
        ([n for n in state if n not in again.state], "changes it", REMEDIES["moves"]),
        ([n for n in drawn if n not in again.random], "draws from it", REMEDIES["draws"]),
    ):
        if names:
            yield Finding(
                "error",
                shorten(names),
                f"A reversible step leaves it otherwise than a stored step: rerunning a branch "
                f"{does} once more.",
                FOLLOWS if evidence.unrepeated else remedy,
            )


def reconstruction(evidence: Evidence) -> Iterator[Finding]:
    """Chains whose states are less exact than the tolerance."""
    tolerance = evidence.precision.tolerance
    unsteady = {chain for chain, _ in evidence.unrepeated}
    for trial in evidence.trials:
        if trial.failure and trial.number not in unsteady and evidence.reversible.error is None:
            yield Finding(
                "error", _of_chain(trial), _without_place(trial.failure), REMEDIES["changes"]
            )
        worst = max((e for e in trial.errors if e is not None), default=0.0)
        if worst <= tolerance or trial.number in unsteady:
            continue
        block = trial.errors.index(worst)
        yield Finding(
            "error" if worst > LOST else "warning",
            _of_chain(trial),
            f"The input of block {block}, {evidence.source([(trial.number, block)])}, is "
            f"reconstructed with a relative error of {worst:.1e}, "
            f"{count(len(trial.errors) - 1 - block, 'block')} from the end.",
            more_exact(evidence, trial),
        )


def half_precision(evidence: Evidence) -> Iterator[Finding]:
    """What half precision means for the streams and the branches, like chains together."""

    def kinds(trial: Trial) -> tuple[str, list[str]]:
        return plain(trial.dtype), sorted(map(plain, trial.branch_dtypes))

    found = [t for t in evidence.trials if {t.dtype, *t.branch_dtypes} & HALF]
    for (stream, branch), group in groupby(sorted(found, key=kinds), key=kinds):
        members = sorted(group, key=lambda trial: trial.number)
        numbers = shorten(str(trial.number) for trial in members)
        chains = f"chain {numbers}" if len(members) == 1 else f"chains {numbers}"
        worst = max((e for t in members for e in t.errors if e is not None), default=0.0)
        measured = f"The largest relative error of a state is {figure(worst)}."
        if members[0].dtype in HALF:
            yield Finding(
                "warning",
                chains,
                f"The streams are carried in {stream}, so every addition rounds them, and with "
                f"depth that adds up while the loss may still fall. {measured}",
                FP32_STREAMS,
            )
        else:
            yield Finding(
                "note",
                chains,
                f"The streams are carried in {stream} and the branches compute in "
                f"{shorten(branch)}. Where a reconstructed entry rounds to the neighbouring "
                f"number, its branch moves by a last digit. {measured}",
                "Nothing need be done while that stays below the tolerance; it grows with depth.",
            )


def _of_chain(trial: Trial) -> str:
    return f"chain {trial.number}"


def _one_sided(evidence: Evidence, name: str) -> bool:
    """Whether one execution has a gradient and the other has none."""
    return (evidence.stored.gradients[name] is None) != (
        evidence.reversible.gradients[name] is None
    )


def _without_place(message: str) -> str:
    """An error's message without the block it begins with."""
    place, _, rest = message.partition("): ")
    return rest if rest and " (" in place else message
