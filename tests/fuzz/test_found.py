"""What the fuzzer has found, shrunken."""

from __future__ import annotations

import pytest

from ..programs import Block, Program, Stage
from .cases import Case, check
from .situations import Situation

FROZEN_WHOLE = Case(  # no gradient at all was an error of the comparison
    Program((3, 4), (Stage(None, (Block(), Block())),)),
    Situation(frozen="everything", inputs=(False, False)),
)
LOW_SUM = Case(  # a stream that is bf16 behind f.add_(x): Dynamo refuses it, tracing cannot know
    Program((2, 6), (Stage("linear", (Block(), Block(spelling="f.add_(x)"), Block())),)),
    Situation(dtype="float32", autocast=True),
    executor="compiled",
)
STATISTICS = Case(  # put back between two backwards, they were taken for edited by hand
    Program((2, 4, 2, 3), (Stage("linear", (Block(), Block(("conv",)))),)),
    Situation(around="checkpoint", backward="retained"),
)
FOUND = {"frozen whole": FROZEN_WHOLE, "low sum": LOW_SUM, "statistics put back": STATISTICS}


@pytest.mark.parametrize("case", FOUND.values(), ids=FOUND)
def test_found(case: Case) -> None:
    assert check(case) == "agrees"
