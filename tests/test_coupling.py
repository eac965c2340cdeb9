"""The coupling family against brute force."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from re2fx import Coupling, OptionError
from re2fx.coupling import linear_weights, read, widen

from .programs import couplings
from .reference import Step, run_chain

COMMON = settings(
    deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)


def test_named_members() -> None:
    named = {
        Coupling.re2tal(): (0, 1, 1),
        Coupling.original(): (1, 0, 1),
        Coupling.consistent(0.25): (0.75, 0.25, 1.25),
        Coupling.midpoint(0.25, 2.0): (0.75, 0.25, 2),
        Coupling.momentum(0.5): (1.5, -0.5, 0.5),
        Coupling.dr2net(0.3, 0.7): (0.3, 0.7, 1),
    }
    assert {(c.a, c.b, c.c) for c in named} == set(named.values())
    assert [str(c) for c in named][:3] == ["(0, 1, 1)", "(1, 0, 1)", "(0.75, 0.25, 1.25)"]


@settings(COMMON, max_examples=200)
@given(coupling=couplings(), seed=st.integers(0, 99))
def test_inverse_undoes_step(coupling: Coupling, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    p, q, f = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    following = coupling.step(p, q, f)
    wanted = coupling.a * p + coupling.b * q + coupling.c * f
    torch.testing.assert_close(following, wanted, rtol=1e-14, atol=1e-14)
    back = coupling.inverse(following, p, f)
    torch.testing.assert_close(back, q, rtol=1e-13, atol=1e-13)


def brute_force_growth(coupling: Coupling) -> float:
    """The spectral radius of one inverse step on (p_{i+1}, p_i), from its 4096th power."""
    power = torch.tensor(
        [[0.0, 1.0], [1 / coupling.b, -coupling.a / coupling.b]], dtype=torch.float64
    )
    logarithm, steps = 0.0, 1
    for _ in range(12):
        power = power @ power
        norm = float(power.norm())
        power, logarithm, steps = power / norm, 2 * logarithm + math.log(norm), 2 * steps
    return math.exp(logarithm / steps)


@settings(COMMON, max_examples=200)
@given(coupling=couplings())
def test_growth_is_the_spectral_radius(coupling: Coupling) -> None:
    assert coupling.growth == pytest.approx(brute_force_growth(coupling), rel=5e-3)


def test_growth_by_hand() -> None:
    assert Coupling.re2tal().growth == 1
    assert Coupling.momentum(0.5).growth == pytest.approx(2)
    assert Coupling(1, 0.5, 1).growth == pytest.approx(1 + math.sqrt(3))
    assert Coupling.original().growth == math.inf


def test_only_b_decides_invertibility() -> None:
    assert not Coupling.original().invertible
    assert not Coupling(0.0, 0.0, 1.0).invertible
    assert Coupling(0.0, -0.1, 0.5).invertible


@pytest.mark.parametrize("name", ["a", "b", "c"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, "1", None, 1j, torch.ones(())])
def test_bad_values(name: str, value: Any) -> None:
    values = {"a": 0.0, "b": 1.0, "c": 1.0, name: value}
    with pytest.raises(OptionError, match=f"{name} must be a finite number"):
        Coupling(**values)


def test_constant_scales_are_folded_in() -> None:
    coupling = Coupling(0.5, 0.25, 1.5)
    assert coupling.scaled(1, 1) is coupling
    assert coupling.scaled(2, 3) == Coupling(1.0, 0.5, 4.5)


def test_snapped_by_hand() -> None:
    """The nearest power of two by distance; at the same distance the larger, better conditioned."""
    table = {0.7: 0.5, 0.75: 1, 0.9: 1, 1.7: 1, 0.4: 0.5, 0.3: 0.25, 0.375: 0.5, 1e-9: 2**-8}
    for b, wanted in table.items():
        assert Coupling(0.5, b, 3).snapped() == Coupling(0.5 + (b - wanted), wanted, 3)
        assert Coupling(0.5, -b, 3).snapped() == Coupling(0.5 - (b - wanted), -wanted, 3)
    with pytest.raises(OptionError, match="b = 0 has no power of two"):
        Coupling.original().snapped()


@settings(COMMON, max_examples=200)
@given(coupling=couplings())
def test_snapped(coupling: Coupling) -> None:
    snapped = coupling.snapped()
    assert snapped.a + snapped.b == pytest.approx(coupling.a + coupling.b, abs=1e-12)
    assert snapped.c == coupling.c
    mantissa, exponent = math.frexp(abs(snapped.b))
    assert mantissa == 0.5
    assert -7 <= exponent <= 1
    others = [2.0**-j for j in range(9)]
    assert abs(abs(snapped.b) - abs(coupling.b)) == min(abs(p - abs(coupling.b)) for p in others)
    assert snapped.snapped() is snapped


def test_linear_weights_by_hand() -> None:
    """Two residuals with skips of 2 and 3: p_1 = 2a + 2b, p_2 = 3a p_1 + 3b, original 6."""
    a, b = 0.5, 0.25
    couplings = [(Coupling(a, b, 1).scaled(k, 1), float(k)) for k in (2, 3)]
    assert linear_weights(couplings) == (3 * a * (2 * a + 2 * b) + 3 * b, 2 * a + 2 * b, 6.0)
    assert linear_weights([]) == (1, 1, 1)


def test_readouts_by_hand() -> None:
    p, q, start = (torch.tensor(float(v)) for v in (7, 5, 2))
    weights = (1.0, 1.0, 1.0)
    assert float(read("mean", p, q, start, weights)) == 6
    assert float(read("sum", p, q, start, weights)) == 7 + 5 - 2
    assert float(read("sum", p, q, start, (1.0, 0.0, 1.0))) == 7 + 5
    assert float(read("last", p, q, start, weights)) == 7


def test_sum_readout_keeps_the_whole_update() -> None:
    """With constant branches, x + sum F exactly; the mean readout halves the update."""
    updates = [torch.tensor(float(v)) for v in (1, 10, 100, 1000)]
    steps = [Step(lambda p, f=f: f) for f in updates]  # type: ignore[misc]
    start = torch.tensor(5.0)
    assert float(run_chain(start, steps, (0, 1, 1), "sum")[-1]) == 5 + 1111
    assert float(run_chain(start, steps, (0, 1, 1), "mean")[-1]) == 5 + 1111 / 2


@settings(COMMON, max_examples=100)
@given(
    coupling=couplings(), skips=st.lists(st.sampled_from((1.0, 0.5, 0.9)), min_size=1, max_size=5)
)
def test_sum_readout_keeps_the_input(coupling: Coupling, skips: list[float]) -> None:
    """Without branches the sum readout is the original network: the product of its skips."""
    p = q = start = torch.ones((), dtype=torch.float64)
    taken = []
    for skip in skips:
        scaled = coupling.scaled(skip, 1.0)
        taken.append((scaled, skip))
        p, q = scaled.step(p, q, torch.zeros_like(p)), p
    value = read("sum", p, q, start, linear_weights(taken))
    assert float(value) == pytest.approx(math.prod(skips), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_streams_are_widened(dtype: torch.dtype) -> None:
    assert widen(torch.ones(2, dtype=dtype)).dtype == torch.float32
    for wide in (torch.ones(2), torch.ones(2, dtype=torch.float64)):
        assert widen(wide) is wide
