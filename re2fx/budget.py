"""The values of ``memory=``: how much a training step may keep."""

from __future__ import annotations

import re
from typing import Any

from .errors import OptionError

Memory = str | int
MEMORIES = ("reversible", "store", "lowest")

_UNITS = {"B": 1} | {
    prefix + suffix: base**power
    for suffix, base in (("iB", 1024), ("B", 1000))
    for power, prefix in enumerate("KMGT", start=1)
}
_BUDGET = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]+)\s*")


def checked_memory(value: Any) -> Memory:
    """One of `MEMORIES`, or a budget in bytes: a positive whole number, or text like ``"6GiB"``.

    Returns:
        the name, or the number of bytes.

    Raises:
        OptionError: it is neither.
    """
    if value in MEMORIES and isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    found = _BUDGET.fullmatch(value) if isinstance(value, str) else None
    unit = _UNITS.get(found[2]) if found else None
    if found is None or unit is None or not float(found[1]):
        listed = ", ".join(map(repr, MEMORIES))
        raise OptionError(
            f"memory={value!r}: expected one of {listed}, or a budget for the activations of a "
            "step, in bytes or as text such as '6GiB' or '500MB'"
        )
    return int(float(found[1]) * unit)


def is_planned(memory: Memory) -> bool:
    """Whether a planner chooses the frames."""
    return isinstance(memory, int) or memory == "lowest"
