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


@pytest.mark.parametrize("case", [FROZEN_WHOLE, LOW_SUM], ids=["frozen whole", "low sum"])
def test_found(case: Case) -> None:
    assert check(case) == "agrees"
