"""Options, errors and warnings of the front door, and the text of `explain`."""

from __future__ import annotations

from typing import Any

import expecttest
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import re2fx

from .models import Net


class Plain(nn.Module):
    """No residual at all."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x) + self.b.weight.sum()
        z: Tensor = torch.sin(x) + torch.cos(x)
        return y * z


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": "none"}, r"memory='none': expected one of 'reversible', 'store'"),
        ({"readout": "first"}, r"readout='first': expected one of 'mean', 'sum', 'last'"),
        ({"activation": "skip"}, r"activation='skip': expected one of 'branch', 'stream'"),
        ({"coupling": (0, 1, 1)}, r"coupling=\(0, 1, 1\): expected a re2fx.Coupling"),
        ({"coupling": re2fx.Coupling.momentum(1.0)}, "c = 0 leaves the branches out"),
        ({"coupling": re2fx.Coupling(1, 0, 1)}, r"b = 0 cannot be inverted.*memory='store'"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(re2fx.OptionError, match=message):
        re2fx.transform(Net(), **options)


def test_a_bad_option_is_found_before_any_work() -> None:
    class Untouchable(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError("traced")

    with pytest.raises(re2fx.OptionError):
        re2fx.transform(Untouchable(), memory="none")


@pytest.mark.parametrize("values", [(float("nan"), 1, 1), (0, float("inf"), 1), (0, "1", 1)])
def test_bad_coupling(values: tuple[Any, Any, Any]) -> None:
    with pytest.raises(re2fx.OptionError, match="must be a finite number"):
        re2fx.Coupling(*values)


def test_memory_can_be_switched_and_is_checked() -> None:
    rev = re2fx.transform(Net())
    assert isinstance(rev, re2fx.RewiredModule)
    with pytest.raises(re2fx.OptionError, match="memory='all'"):
        rev.memory = "all"
    with pytest.raises(re2fx.OptionError, match="cannot be replaced"):
        rev.graph = torch.fx.Graph()


def test_an_ill_conditioned_coupling_is_refused_with_the_figure() -> None:
    coupling = re2fx.Coupling(0.5, 0.001, 1)
    with pytest.raises(
        re2fx.ConditioningError,
        match=r"chain 0 of 24 .* grows 502-fold .* error of up to 5e\+55.* at 11 of 24 residuals",
    ):
        re2fx.transform(Net(depth=24), coupling=coupling)
    re2fx.transform(Net(depth=24), coupling=coupling, memory="store")
    re2fx.transform(Net(depth=24), coupling=re2fx.Coupling(0.5, 0.5, 1))  # is anchored


def test_switching_to_reversible_later_is_checked_too() -> None:
    rev = re2fx.transform(Net(depth=24), coupling=re2fx.Coupling(0.5, 0.001, 1), memory="store")
    assert isinstance(rev, re2fx.RewiredModule)
    with pytest.raises(re2fx.ConditioningError):
        rev.memory = "reversible"
    rev = re2fx.transform(Net(), coupling=re2fx.Coupling.original(), memory="store")
    assert isinstance(rev, re2fx.RewiredModule)
    with pytest.raises(re2fx.ConditioningError, match="b = 0"):
        rev.memory = "reversible"


def test_wrong_example_inputs() -> None:
    with pytest.raises(re2fx.InputError, match=r"Net: too many positional arguments.*\(x\)"):
        re2fx.transform(Net(), (torch.ones(1, 4), torch.ones(1, 4)))
    with pytest.raises(re2fx.InputError, match="unexpected keyword argument 'y'"):
        re2fx.transform(Net(), {"x": torch.ones(1, 4), "y": 1})


def test_nothing_to_rewire_warns_with_the_nearest_misses() -> None:
    model = Plain()
    with pytest.warns(re2fx.Re2fxWarning, match="nearest misses") as caught:
        assert re2fx.transform(model) is model
    text = str(caught[0].message)
    assert "no trained operation lies between x and the addition" in text
    assert "one operand is a parameter or a constant" in text
    assert caught[0].filename == __file__


def test_nothing_to_rewire_raises_if_strict() -> None:
    with pytest.raises(re2fx.NoResidualError, match="nearest misses"):
        re2fx.transform(Plain(), strict=True)


def test_every_residual_refused() -> None:
    with pytest.warns(re2fx.Re2fxWarning, match="chain of one"):
        re2fx.transform(Net(depth=1))


def test_transforming_twice() -> None:
    with pytest.raises(re2fx.OptionError, match="rewired already"):
        re2fx.transform(re2fx.transform(Net()))


class Branching(nn.Module):
    """Data-dependent control flow in the model itself."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            x = -x
        out: Tensor = self.net(x)
        return out


def test_an_untraceable_model_names_the_line_and_the_remedy() -> None:
    with pytest.raises(re2fx.CaptureError) as caught:
        re2fx.transform(Branching())
    text = str(caught.value)
    assert text.startswith("Branching cannot be traced symbolically at ")
    assert "test_api.py" in text
    assert "if x.sum() > 0:" in text
    assert "What to try" in text


def test_modes_that_would_be_rewired_differently() -> None:
    class TwoFaced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.ModuleList([nn.Linear(4, 4) for _ in range(4)])

        def forward(self, x: Tensor) -> Tensor:
            for index, mix in enumerate(self.mix):
                if self.training or index < 3:
                    x = x + mix(x)
            return x

    with pytest.raises(re2fx.ModeMismatchError, match="in train and in eval mode"):
        re2fx.transform(TwoFaced())


def test_explain() -> None:
    expecttest.assert_expected_inline(
        canonical(str(re2fx.explain(Net(depth=3)))),
        """\
Net: 3 skip-adds found: 3 rewired in 1 chain, 0 refused
chain 0: 3 residuals, blocks.0 .. blocks.2
      3 x models.py:N  return x + self.outer(self.drop(F.gelu(self.inner(self.norm(x)))))""",
    )


def test_explain_refusals_and_leaves() -> None:
    expecttest.assert_expected_inline(
        canonical(str(re2fx.explain(Mixed()))),
        """\
Mixed: 5 skip-adds found: 2 rewired in 1 chain, 3 refused
chain 0: 2 residuals, the model itself
      2 x test_api.py:N  x = F.relu(x + mix(x))
    the activation behind the addition moved: 2 of 2
refused, and left exactly as they were:
      2 x post-norm at test_api.py:N, in add_3, add_4
          such as: the stream passes through the norm norm, which cannot be inverted
      1 x projection at test_api.py:N, in add
          the skip is not an identity: it passes through down
post-norm: try coupling=re2fx.Coupling.consistent(0.125), which takes whole blocks, norms included
kept whole: gate (symbolically traced variables cannot be used as inputs to control flow)""",
    )


class Gate(nn.Module):
    """A submodule with control flow of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 8)
        self.inner = nn.Sequential(nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x)
        return out if x.sum() > 0 else -out


class Mixed(nn.Module):
    """A projection, a chain with a moved activation, a post-norm pair and a module kept whole."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.first = nn.Linear(4, 8), nn.Linear(4, 8)
        self.mix = nn.ModuleList([nn.Linear(8, 8) for _ in range(4)])
        self.gate = Gate()
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.down(x) + self.first(x))
        for mix in self.mix[:2]:
            x = F.relu(x + mix(x))
        x = self.gate(x)
        for mix in self.mix[2:]:
            x = self.norm(x + mix(x))
        return x


def canonical(text: str) -> str:
    """Line numbers of this file would change with every edit."""
    import re

    return re.sub(r"(test_api|models)\.py:\d+", r"\1.py:N", text)
