"""The check of the reconstruction while a network trains."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import re2fx
from re2fx.memory import live_bytes

from .compare import assert_same, step
from .models import ConvNet, Net, Tapped
from .test_verify import Faulty, Leaf, OwnGenerator

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
STREAM = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))


def rewired(model: nn.Module, **options: Any) -> re2fx.RewiredModule:
    rev = re2fx.transform(model, **options)
    assert isinstance(rev, re2fx.RewiredModule)
    return rev


def train(rev: nn.Module, x: Tensor, steps: int) -> None:
    for _ in range(steps):
        rev(x).square().sum().backward()


def test_a_clean_network_passes_block_by_block() -> None:
    rev = rewired(Net(5, dropout=0.2).double())
    with re2fx.DriftGuard(rev, every=2) as guard:
        train(rev, X, 9)
    assert [drift.step for drift in guard.history] == [0, 2, 4, 6, 8]
    places = [drift.where.split(" ")[0] for drift in guard.history]
    assert places == ["blocks.1", "blocks.2", "blocks.3", "blocks.4", "blocks.1"]
    assert all(drift.error < 1e-13 for drift in guard.history)
    assert not any(drift.cause for drift in guard.history)
    train(rev, X, 3)
    assert len(guard.history) == 5, "it is detached"


def test_nothing_changes_but_two_states_on_sampled_steps() -> None:
    """Values, gradients, buffers, the random stream; bytes to the byte."""
    image = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    rev = rewired(ConvNet(6, dropout=0.2).double())
    usual = live_bytes(lambda: rev(image))
    plain = step(rev, "reversible", image)
    with re2fx.DriftGuard(rev, every=2):
        assert_same(step(rev, "reversible", image), plain, 0.0)
        assert live_bytes(lambda: rev(image)) == usual
        sampled = live_bytes(lambda: rev(image))
    state = 4 * 6 * 6 * 6 * 8
    assert 0 <= sampled - usual <= 2 * state


def test_a_branch_that_does_not_repeat_is_found() -> None:
    """Where it is to blame itself it is named; before that the search goes towards it."""
    torch.manual_seed(0)
    rev = rewired(Faulty(OwnGenerator(), at=2))
    guard = re2fx.DriftGuard(rev, every=100, action="warn")
    guard.attach()
    with pytest.warns(re2fx.Re2fxWarning) as caught:
        train(rev, STREAM, 3)
    guard.detach()
    texts = [str(warning.message) for warning in caught]
    assert "so a later block is to blame" in texts[0]
    assert any("its branch does not repeat itself" in text for text in texts)
    assert any("re2fx.verify" in text for text in texts)
    assert [drift.step for drift in guard.history] == [0, 1]


class Scaled(Leaf):
    """Multiplies by a number that somebody changes between forward and backward."""

    level = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight * Scaled.level


def test_a_change_between_forward_and_backward_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    rev = rewired(Faulty(Scaled(), at=2).double())
    guard = re2fx.DriftGuard(rev, every=1, action="raise")
    found = []
    with guard:
        for _ in range(4):
            monkeypatch.setattr(Scaled, "level", 1.0)
            loss = rev(STREAM.double()).sum()
            monkeypatch.setattr(Scaled, "level", 2.0)
            try:
                loss.backward()
            except re2fx.DriftError as error:
                found.append(str(error))
    assert any("what it reads beside its input has changed" in text for text in found)
    assert any("test_verify.py:" in text for text in found)


def test_a_coupling_that_loses_digits() -> None:
    """In fp32, by 1 / b per block."""
    coupling = re2fx.Coupling(0.5, 0.3, 1)
    rev = rewired(Net(8).float(), coupling=coupling, memory="store")
    rev._memory = "reversible"  # past the check of its conditioning
    with (
        re2fx.DriftGuard(rev, every=1, tolerance=1e-7) as guard,
        pytest.warns(re2fx.Re2fxWarning) as caught,
    ):
        train(rev, X.float(), 8)
    assert any("divides by b = 0.3" in str(warning.message) for warning in caught)
    assert any("multiplies errors" in drift.cause for drift in guard.history)


def test_no_step_no_check() -> None:
    """Calls without gradients, stored calls and forwards without a backward find nothing."""
    rev = rewired(Net().double())
    with re2fx.DriftGuard(rev, every=1) as guard:
        with torch.no_grad():
            rev(X)
        rev(X)
        rev.memory = "store"
        train(rev, X, 2)
    assert not guard.history


def test_taps_and_parts() -> None:
    rev = rewired(Tapped().double())
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    with re2fx.DriftGuard(rev, every=1) as guard:
        for _ in range(4):
            out, side = rev(*x)
            (out.sum() + side["side"].sum()).backward()
    assert len(guard.history) == 4
    both = nn.ModuleList([rewired(Net(3).double()), rewired(Net(4).double())])
    with re2fx.DriftGuard(both, every=1) as guard:
        for _ in range(4):
            for part in both:
                train(part, X, 1)
    assert len({drift.where for drift in guard.history}) > 2
    assert guard._next == len(guard.history) > 4


def test_a_copy_has_no_guard() -> None:
    rev = rewired(Net().double())
    with re2fx.DriftGuard(rev, every=1) as guard:
        train(copy.deepcopy(rev), X, 2)
        with pytest.raises(re2fx.OptionError, match="has a DriftGuard already"):
            re2fx.DriftGuard(rev).attach()
    assert not guard.history


def test_compiled_code_is_not_watched() -> None:
    rev = rewired(Net().double())
    options: Any = {"compiler": "aot_eager"}
    run: Any = torch.compile(rev, backend="re2fx", options=options)
    run(X)
    with (
        re2fx.DriftGuard(rev, every=1),
        pytest.raises(Exception, match="watches the eager executor only"),
    ):
        run(X)
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"every": 0}, "every=0"),
        ({"every": 1.5}, "every=1.5"),
        ({"tolerance": 0}, "tolerance=0"),
        ({"action": "stop"}, "action='stop': expected one of 'warn', 'raise'"),
    ],
)
def test_bad_arguments(options: dict[str, Any], match: str) -> None:
    with pytest.raises(re2fx.OptionError, match=match):
        re2fx.DriftGuard(rewired(Net()), **options)
    with pytest.raises(re2fx.OptionError, match="transform the model first"):
        re2fx.DriftGuard(Net())
