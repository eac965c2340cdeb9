"""A short run of the fuzzer; ``make fuzz`` is the long one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor

import re2fx

from ..programs import Block, Program, Stage
from .cases import Case, cases, check
from .situations import Situation

COMMON = settings(
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@settings(COMMON, max_examples=120)
@given(case=cases())
def test_eager(case: Case) -> None:
    check(case)


@settings(COMMON, max_examples=6)
@given(case=cases("compiled"))
def test_compiled(case: Case) -> None:
    check(case)


PLAIN = Program((3, 4), (Stage("linear", (Block(("mlp",)), Block(("mlp",)), Block(("mlp",)))),))


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("executor", ["eager", "compiled"])
def test_a_wrong_reconstruction_is_a_disagreement(
    dtype: str, executor: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fuzzer is as good as what it notices."""
    case = Case(PLAIN, Situation(dtype=dtype), executor=executor)  # type: ignore[arg-type]
    assert check(case) == "agrees"
    back = re2fx.Coupling.inverse

    def wrong(self: re2fx.Coupling, *terms: Tensor) -> Tensor:
        return back(self, *terms) * 1.5

    monkeypatch.setattr(re2fx.Coupling, "inverse", wrong)
    with pytest.raises(AssertionError):
        check(case)
    torch.compiler.reset()
