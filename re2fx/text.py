"""Plain-text rendering of a plan, grouped so that big models stay short."""

from __future__ import annotations

import os
from collections.abc import Iterable
from itertools import groupby

from .plan import Chain, Location, Plan, Refusal

MISSES_SHOWN = 5
BLOCK_HINT = (
    "try coupling=re2fx.Coupling.consistent(0.125), which takes whole blocks, norms included"
)


def render_plan(plan: Plan) -> str:
    """One paragraph per chain, one line per kind of refusal; nearest misses if all missed."""
    lines = [
        f"{count(plan.found, 'skip-add')} found: {plan.rewired} rewired in "
        f"{count(len(plan.chains), 'chain')}, {len(plan.refusals)} refused"
    ]
    for index, chain in enumerate(plan.chains):
        lines += render_chain(index, chain)
    if plan.refusals:
        lines += ["refused, and left exactly as they were:", *render_refusals(plan.refusals)]
        lines += [f"{rule}: {hint}" for rule, hint in hints(plan).items()]
    if not plan.found:
        lines += render_misses(plan.misses)
    return "\n".join(lines)


def hints(plan: Plan) -> dict[str, str]:
    """What would let more be rewired, by the rule that refused it."""
    blocks = any(residual.block for chain in plan.chains for residual in chain.residuals)
    refused = any(refusal.rule == "post-norm" for refusal in plan.refusals)
    return {"post-norm": BLOCK_HINT} if refused and not blocks else {}


def render_chain(index: int, chain: Chain) -> list[str]:
    """A head line and one line per distinct source line."""
    where = span(residual.location.module for residual in chain.residuals)
    lines = [f"chain {index}: {length(chain)}, {where}"]
    key = sorted({(str(short(r.location)), r.location.code) for r in chain.residuals})
    for place, code in key:
        times = sum(
            (str(short(r.location)), r.location.code) == (place, code) for r in chain.residuals
        )
        lines.append(f"    {times:3d} x {place}  {code}")
    moved = sum(r.activation is not None for r in chain.residuals)
    if moved:
        lines.append(f"    the activation behind the addition moved: {moved} of {len(chain)}")
    whole = sum(r.block for r in chain.residuals)
    if whole:
        lines.append(f"    coupled as whole blocks, with what is behind the addition: {whole}")
    scaled = sum(r.skip_scale != 1 for r in chain.residuals)
    if scaled:
        lines.append(f"    constant scale on the skip, folded into the coupling: {scaled}")
    sides = sorted({name for r in chain.residuals for name in r.side_inputs})
    if sides:
        lines.append(f"    side inputs: {shorten(sides)}")
    if chain.taps:
        lines.append(f"    read in the middle of the chain: {shorten(chain.taps)}")
    lines += [f"    {note}" for note in chain.notes]
    if chain.weight is not None:
        kept, stored = amount(chain.weight.reversible), amount(chain.weight.stored)
        lines.append(f"    keeps {kept} for the backward instead of {stored}")
    return lines


def length(chain: Chain) -> str:
    """How long a chain is: its residuals, or its blocks of several residuals."""
    sizes = {1 + len(residual.inside) for residual in chain.residuals}
    if sizes == {1}:
        return count(len(chain), "residual")
    return f"{count(len(chain), 'block')} of {' or '.join(map(str, sorted(sizes)))} residuals"


def render_refusals(refusals: Iterable[Refusal]) -> list[str]:
    """Refusals of one rule and one source line on one line, with their modules."""

    def key(refusal: Refusal) -> tuple[str, str]:
        return refusal.rule, str(short(refusal.location))

    lines = []
    for (rule, place), group in groupby(sorted(refusals, key=key), key=key):
        members = list(group)
        lines.append(
            f"    {len(members):3d} x {rule} at {place}, in "
            f"{shorten(r.location.module or r.node for r in members)}"
        )
        lines.append(f"          {'such as: ' if len(members) > 1 else ''}{members[0].sentence}")
    return lines


def render_misses(misses: tuple[Refusal, ...]) -> list[str]:
    """What came nearest to a residual when none was found."""
    if not misses:
        return ["the graph has no addition of two activations"]
    lines = ["nearest misses:"]
    for miss in misses[:MISSES_SHOWN]:
        lines.append(f"    {miss.node} at {short(miss.location)}: {miss.sentence}")
    if len(misses) > MISSES_SHOWN:
        lines.append(f"    and {len(misses) - MISSES_SHOWN} more")
    return lines


def short(location: Location) -> Location:
    """The location with its file reduced to a name."""
    return Location(
        location.module,
        os.path.basename(location.file),
        location.line,
        location.function,
        location.code,
    )


def count(number: int, noun: str) -> str:
    """``1 chain``, ``2 chains``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def span(modules: Iterable[str]) -> str:
    """The first and the last of some module paths."""
    paths = list(modules)
    first, last = paths[0], paths[-1]
    return (first if first == last else f"{first} .. {last}") or "the model itself"


def amount(size: float) -> str:
    """Bytes in units a person reads: ``3.50 MiB``."""
    for unit in ("B", "KiB", "MiB"):
        if abs(size) < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.2f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"


def shorten(names: Iterable[str], most: int = 4) -> str:
    """The first few names, and how many more there are."""
    names = list(names)
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def common_path(paths: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    """The components that all paths begin with."""
    paths = list(paths)
    first, last = min(paths), max(paths)  # what these two share, those between them share too
    for depth, (a, b) in enumerate(zip(first, last, strict=False)):
        if a != b:
            return first[:depth]
    return first
