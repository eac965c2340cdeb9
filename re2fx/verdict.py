"""What the figures of a report come to, in sentences."""

from __future__ import annotations

from .footprint import ChainBytes, PartBytes, Report
from .text import common_path, count

PLACES = {
    "inputs": "the inputs",
    "before": "before the chains",
    "between": "between the chains",
    "behind": "behind the chains",
    "readout": "readouts of the streams",
    "loss": "the loss",
    "model": "the model itself",
}
UNITS = ("KiB", "MiB", "GiB", "TiB")


def size(number: int | None) -> str:
    """``3.5 MiB``; nothing for None."""
    if number is None:
        return ""
    if number < 1024:
        return f"{number} B"
    exponent = min((number.bit_length() - 1) // 10, len(UNITS))
    return f"{number / 1024**exponent:.1f} {UNITS[exponent - 1]}"


def part_name(part: PartBytes) -> str:
    """``projection: layer2.0``."""
    name = PLACES.get(part.where, part.where)
    if part.where == "model":
        return part.module or name
    return f"{name}: {part.module}" if part.module else name


def chain_name(chain: ChainBytes) -> str:
    """``chain 0: 12 residuals, blocks.0 .. 11``."""
    first, last = (tuple(path.split(".")) for path in (chain.first, chain.last))
    rest = ".".join(last[len(common_path([first[:-1], last[:-1]])) :])
    where = chain.first if first == last else f"{chain.first} .. {rest}"
    return (
        f"chain {chain.number}: {count(chain.residuals, 'residual')}, {where or 'the model itself'}"
    )


def sentences(report: Report) -> list[str]:
    """What to make of it."""
    lines = []
    if report.reason:
        lines.append(f"Nothing can be reversed: {report.reason}")
    if report.chains and report.total.checkpoint is not None:
        lines += [_advice(report), *_floor(report), *_poor_chains(report)]
        lines += [*_anchors(report), *_bits(report), _backward(report)]
    if report.refused:
        rules = ", ".join(f"{number} x {rule}" for rule, number in report.refused)
        lines.append(f"Skip-adds left as they are: {rules}.")
    for what in report.untold:
        lines.append(
            f"The figures leave out the workspace of {what}, for which torch has no rule; "
            "measure=True shows all of it."
        )
    return lines


def _advice(report: Report) -> str:
    """Which way of training to take."""
    total = report.total
    assert total.checkpoint is not None, "asked of reports with chains only"
    checkpointing = f"a checkpoint around every branch {size(total.checkpoint)}"
    if total.reversible is None:
        return f"Ordinary training keeps {size(total.store)}, {checkpointing}."
    start = (
        f"Ordinary training keeps {size(total.store)}, {checkpointing}, reversing "
        f"{size(total.reversible)}"
    )
    if not total.pays:
        return (
            f"{start}: checkpointing keeps about as little and leaves the model's function as it "
            "is. Prefer it."
        )
    less = total.checkpoint / max(1, total.reversible)
    return f"{start}: {less:.1f} times less than checkpointing."


def _floor(report: Report) -> list[str]:
    """What no rewiring changes, and how far that lets one come."""
    if report.ceiling is None or not report.parts:
        return []
    share = report.outside.store / report.total.store
    largest = report.parts[0]
    return [
        f"{share:.0%} of what is kept now lies outside the chains: rewiring alone can reach at "
        f"most {report.ceiling:.1f} times less. The largest part of it is {part_name(largest)}, "
        f"{size(largest.kept.store)}."
    ]


def _poor_chains(report: Report) -> list[str]:
    """Chains that reversing does not help."""
    return [
        f"Chain {chain.number} ({count(chain.residuals, 'residual')}) does not pay: reversing "
        f"keeps {size(chain.kept.reversible)} there, checkpointing {size(chain.kept.checkpoint)}."
        for chain in report.chains
        if chain.kept.reversible is not None and not chain.pays
    ]


def _anchors(report: Report) -> list[str]:
    """What the coupling's conditioning costs."""
    return [
        f"Chain {chain.number} keeps a pair of states at {count(chain.anchors, 'anchor')}, "
        f"{size(2 * chain.anchors * chain.state)} of it, because its coupling amplifies rounding."
        for chain in report.chains
        if chain.anchors
    ]


def _bits(report: Report) -> list[str]:
    """What exact reconstruction costs."""
    return [
        f"Chain {chain.number} keeps {count(chain.bits, 'bit')} per element and block, "
        f"{size(chain.side_bytes)} of it, to be reconstructed exactly."
        for chain in report.chains
        if chain.bits
    ]


def _backward(report: Report) -> str:
    """What comes on top while the backward runs."""
    largest = max(report.chains, key=lambda chain: chain.branch)
    return (
        f"In the backward of both one branch at a time comes on top, up to {size(largest.branch)} "
        f"in chain {largest.number}."
    )
