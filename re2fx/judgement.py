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

import torch

from .evidence import Evidence, Step, gradient_errors, plain
from .findings import SEVERITIES, Finding, figure
from .remedies import FP32_STREAMS, HALF, REMEDIES, kind, more_exact
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
    errors = gradient_errors(evidence.stored, evidence.reversible)
    absent = [g.name for g in errors if math.isinf(g.error) and _one_sided(evidence, g.name)]
    if absent:
        yield Finding(
            "error",
            shorten(absent),
            "One of stored and reversible execution has a gradient, and the other has none.",
            "Use memory='store', and please report the model: this should not happen.",
        )
    infinite = [name for name, g in evidence.stored.gradients.items() if not _finite(g)]
    if infinite:
        yield Finding(
            "warning",
            f"gradients of {shorten(infinite)}",
            "They are not finite in stored execution, so they cannot be compared.",
            "Verify with inputs, and a loss, whose gradients are finite.",
        )
    tolerance, left_out = evidence.precision.tolerance, {*absent, *infinite}
    over = [g for g in errors if g.error > tolerance and g.name not in left_out]
    if not over:
        return
    places = f"gradients of {shorten(g.name for g in over)}"
    sentence = f"The relative error is up to {over[0].error:.1e}"
    if evidence.unrepeated:
        remedy = "It follows from the branches that do not repeat."
        yield Finding("error", places, f"{sentence}.", remedy)
    else:
        yield explained(evidence, places, sentence, over[0].error)


def explained(evidence: Evidence, places: str, sentence: str, worst: float) -> Finding:
    """What a difference comes from that no branch accounts for."""
    if evidence.again is not None and evidence.gradient_error(evidence.again) > worst * LEFT_OVER:
        return Finding(
            "warning",
            places,
            f"{sentence}, but stored execution does not repeat its gradients either (they differ "
            f"by {evidence.gradient_error(evidence.again):.1e}): something outside the chains "
            "changes between calls.",
            "Make it deterministic for the verification, as by model.eval().",
        )
    error = max((e for t in evidence.trials for e in t.errors if e is not None), default=0.0)
    pinned = evidence.pinned
    if pinned is None or _left_over(evidence, pinned) > max(
        worst * LEFT_OVER, evidence.precision.tolerance
    ):
        return Finding(
            "error",
            places,
            f"{sentence}, which the reconstruction error of {error:.1e} does not account for.",
            "Use memory='store'. Something that a branch reads may change between the forward "
            "and the backward; otherwise please report the model.",
        )
    account = (
        f"{sentence}: stored execution differentiated at the reconstructed states, which are off "
        f"by {error:.1e}, has these gradients too."
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


def _left_over(evidence: Evidence, pinned: Step) -> float:
    """The error of reversible gradients against those at the reconstructed states."""
    if pinned.error is not None:
        return math.inf
    return max((g.error for g in gradient_errors(pinned, evidence.reversible)), default=0.0)


def outputs(evidence: Evidence) -> Iterator[Finding]:
    """Outputs that differ."""
    error = evidence.output_error(evidence.reversible)
    if not error > evidence.precision.tolerance:
        return
    unsteady = evidence.again is not None and evidence.output_error(evidence.again) > 0
    if evidence.unrepeated:
        severity, remedy = "error", "It follows from the branches that do not repeat."
    elif unsteady:
        severity, remedy = (
            "warning",
            (
                "Stored execution does not repeat its outputs either; make what lies outside the "
                "chains deterministic for the verification, as by model.eval()."
            ),
        )
    else:
        severity, remedy = "error", "Use memory='store', and please report the model."
    sentence = f"Stored and reversible execution differ by {error:.1e}, relative to the norm."
    yield Finding("error" if severity == "error" else "warning", "outputs", sentence, remedy)


def afterwards(evidence: Evidence) -> Iterator[Finding]:
    """State of the modules and random generators that the step leaves behind otherwise."""
    stored, reversible = evidence.stored, evidence.reversible
    if reversible.error is not None:
        return
    follows = "It follows from the branches that do not repeat." if evidence.unrepeated else ""
    moved = changed(stored.state, reversible.state)
    if moved:
        yield Finding(
            "error",
            shorten(moved),
            "After the step the value is another than after a stored step: rerunning a branch "
            "changes it once more.",
            follows or REMEDIES["moves"],
        )
    drawn = changed(stored.random, reversible.random)
    if drawn:
        yield Finding(
            "error",
            shorten(drawn),
            "After the step it is in another state than after a stored step: rerunning a branch "
            "draws from it once more.",
            follows or REMEDIES["draws"],
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
        chains = f"chain {shorten(str(trial.number) for trial in members)}"
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


def _finite(tensor: torch.Tensor | None) -> bool:
    return tensor is None or bool(tensor.isfinite().all())


def _without_place(message: str) -> str:
    """An error's message without the block it begins with."""
    place, _, rest = message.partition("): ")
    return rest if rest and " (" in place else message
