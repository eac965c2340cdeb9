"""One model measured: what is found right is said so, and what is wrong is a finding."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

from re2fx.zoo import measure as measuring
from re2fx.zoo.catalogue import Entry, catalogue, fits, read
from re2fx.zoo.measure import measure
from re2fx.zoo.results import Row
from re2fx.zoo.steps import gradient_errors, step
from re2fx.zoo.tables import model_row

HERE, MODELS = __name__, "tests.models"


class PostNorm(nn.Module):
    """A block that cannot be rewired."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix, self.norm = nn.Linear(width, width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        normed: Tensor = self.norm(x + self.mix(x))
        return normed


def post_norm(depth: int = 3) -> nn.Module:
    return nn.Sequential(*[PostNorm(4) for _ in range(depth)])


class Drifting(nn.Module):
    """Does something else every time it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return torch.tanh(x * self.weight * self.calls)


class DriftingBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drift = Drifting()

    def forward(self, x: Tensor) -> Tensor:
        moved: Tensor = x + self.drift(x)
        return moved


def drifting() -> nn.Module:
    return nn.Sequential(*[DriftingBlock() for _ in range(3)])


def broken() -> nn.Module:
    raise KeyError("a setting")


class Backbone(nn.Module):
    """Blocks behind a look at a value, which no route follows."""

    def __init__(self, stack: bool = True) -> None:
        super().__init__()
        blocks = [nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)) for _ in range(3)]
        self.blocks = nn.ModuleList(blocks if stack else blocks[:1])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x) if float(x.sum()) > 0 else x - block(x)
        return x


class Headed(nn.Module):
    def __init__(self, stack: bool = True) -> None:
        super().__init__()
        self.backbone, self.head = Backbone(stack), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.backbone(x))
        return scores


class Unfollowable(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if float(x.sum()) > 0 else x


def test_a_model_that_is_rewired() -> None:
    row = measure(Entry(f"{MODELS}:Net?depth=4&dropout=0.1", ("3,4",)))
    assert (row.status, row.route, row.dtype) == ("rewired", "symbolic", "float64")
    assert (row.chains, row.found, row.refused, row.findings) == ([4], 4, 0, [])
    assert row.gradient_error is not None
    assert row.gradient_error < 1e-12
    assert row.share is not None
    assert 0.5 < row.share < 1
    assert {"build", "original", "capture", "plan", "steps"} <= row.seconds.keys()


def test_a_model_that_is_refused() -> None:
    row = measure(Entry(f"{HERE}:post_norm", ("3,4",)))
    assert (row.status, row.found, row.chains, row.findings) == ("refused", 3, [], [])
    (refusal,) = row.refusals
    assert (refusal["rule"], refusal["count"]) == ("post-norm", 3)
    assert "norm" in refusal["sentence"]
    assert model_row(row)[5] == "3 post-norm"


def test_a_model_that_does_not_repeat_itself_is_a_finding() -> None:
    row = measure(Entry(f"{HERE}:drifting", ("3,4",)))
    assert row.status == "rewired"
    assert any("relative gradient error" in sentence for sentence in row.findings)


@pytest.mark.parametrize(
    ("target", "inputs", "status", "reason"),
    [
        (f"{HERE}:broken", "3,4", "unusable", "KeyError: 'a setting'"),
        (f"{MODELS}:Net", "3,5", "unusable", "a step of the model as it is: RuntimeError"),
        (f"{HERE}:Unfollowable", "3,4", "not captured", "cannot be captured by any route"),
    ],
)
def test_why_a_model_is_not_measured(target: str, inputs: str, status: str, reason: str) -> None:
    row = measure(Entry(target, (inputs,)))
    assert row.status == status
    assert reason in row.reason
    assert not row.captured


def test_blocks_inside_a_module_that_stays_whole_are_not_captured() -> None:
    row = measure(Entry(f"{HERE}:Headed", ("3,4",)))
    assert (row.status, row.hidden, row.captured) == ("not captured", ["backbone"], False)
    assert row.reason.startswith("backbone is kept whole (")
    assert "dynamo: " in row.reason
    row = measure(Entry(f"{HERE}:Headed?stack=False", ("3,4",)))
    assert (row.status, row.hidden, row.captured) == ("no residual", [], True)


class Layer(nn.Module):
    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x + torch.tanh(self.first(x)))
        x = self.norm(x + torch.tanh(self.second(x)))
        return x


class Deciding(nn.Module):
    """Layers that can be captured, in a loop over values that cannot."""

    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(norm) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x) if float(x.sum()) < 1e9 else x
        return x


def test_a_model_of_which_parts_are_captured() -> None:
    row = measure(Entry(f"{HERE}:Deciding", ("3,4",)))
    assert (row.status, row.route, row.chains) == ("rewired", "submodules", [2, 2, 2])
    assert list(row.parts) == ["layers.0", "layers.1", "layers.2"]
    assert (row.captured, row.whole, row.findings) == (True, False, [])
    assert "3 parts rewired by itself" in model_row(row)[1]
    row = measure(Entry(f"{HERE}:Deciding?norm=True", ("3,4",)))
    assert (row.status, row.found, row.chains) == ("refused", 6, [])
    assert (row.captured, row.whole) == (True, False)
    assert {refusal["rule"] for refusal in row.refusals} == {"post-norm"}


def test_an_error_of_re2fx_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object) -> None:
        raise IndexError("out of range")

    monkeypatch.setattr(measuring, "rewire_plan", fails)
    row = measure(Entry(f"{MODELS}:Net", ("3,4",)))
    assert row.status == "failed"
    assert "IndexError: out of range (" in row.findings[0]


def test_gradients_that_one_network_lacks_are_errors() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    full = step(model, (torch.randn(2, 4),))
    model[1].weight.requires_grad_(False)
    errors = gradient_errors(step(model, (torch.randn(2, 4),)), full)
    assert errors["1.weight"] == float("inf")
    row = Row("a:b", dtype="float64", gradient_error=errors["1.weight"], worst="1.weight")
    row.judge()
    assert row.findings == ["relative gradient error inf in 1.weight, more than 1e-09"]
    assert json.dumps(row.to_dict(), allow_nan=False)


def test_the_catalogue_can_be_read_and_chosen_from() -> None:
    entries = catalogue()
    assert len(entries) == len(set(entries)) >= 150
    assert {entry.library for entry in entries} >= {"torchvision", "timm", "transformers"}
    assert all(entry.group and entry.inputs for entry in entries)
    swins = catalogue(["timm:*swin*"])
    assert swins
    assert all(fits(entry, ["swin"]) and entry.library == "timm" for entry in swins)
    assert list(read("# none\n[a group]\nlib:model?a=1 2,3 y=1,2:int64 # more\n")) == [
        Entry("lib:model?a=1", ("2,3", "y=1,2:int64"), "a group")
    ]
