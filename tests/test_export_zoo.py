"""The export route on models of libraries: the plans and values of the other routes."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor

import re2fx
from re2fx.targets import load

from .compare import assert_reversible_equals_store, assert_same, step
from .test_routes_zoo import IDS, MODELS, make

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

VISION = {
    "torchvision:resnet18?num_classes=3": (2, 3, 32, 32),
    "timm:vit_tiny_patch16_224?depth=3&num_classes=3": (2, 3, 224, 224),
    "torchvision:convnext_tiny?num_classes=3": (2, 3, 32, 32),
}


@pytest.fixture(autouse=True)
def fresh() -> Any:
    yield
    torch.compiler.reset()


def needs(library: str) -> None:
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")


def residuals(plan: Any) -> list[list[tuple[str, str]]]:
    return [[(r.kind, str(r.location)) for r in chain.residuals] for chain in plan.chains]


@pytest.mark.parametrize("text", VISION)
def test_vision_models_as_by_symbolic_tracing(text: str) -> None:
    needs(text.split(":")[0])
    torch.manual_seed(0)
    model = load(text).model.double()
    x = torch.randn(VISION[text], dtype=torch.float64)
    rev = re2fx.transform(model, x, capture="export")
    symbolic = re2fx.transform(model, x, capture="symbolic")
    assert isinstance(rev, re2fx.RewiredModule)
    assert isinstance(symbolic, re2fx.RewiredModule)
    assert residuals(rev.plan) == residuals(symbolic.plan)
    other = torch.randn(3, *VISION[text][1:], dtype=torch.float64)
    assert_reversible_equals_store(rev, other)
    assert_same(step(rev, "store", other), step(symbolic, "store", other), 1e-10)


def test_masks_that_are_filled_in_place() -> None:
    needs("torchvision")
    model = load("torchvision:swin_t").model
    x = torch.randn(2, 3, 64, 64)
    got = re2fx.explain(model, x, capture="export").plan
    expected = re2fx.explain(model, x, capture="symbolic").plan
    assert residuals(got) == residuals(expected)
    assert [len(chain) for chain in got.chains] == [4, 4, 12, 4]


@pytest.mark.parametrize("name", MODELS)
def test_language_models_as_by_dynamo(name: str) -> None:
    model, inputs = make(name)
    rev = re2fx.transform(model, inputs, capture="export")
    dynamo = re2fx.transform(model, inputs, capture="dynamo")
    assert isinstance(rev, re2fx.RewiredModule)
    assert isinstance(dynamo, re2fx.RewiredModule)
    assert [len(chain) for chain in rev.plan.chains] == MODELS[name][1]
    longer = torch.cat([IDS, IDS], 1)[:, :17].repeat(2, 1)
    given = {k: longer if isinstance(v, Tensor) else v for k, v in inputs.items()}
    dynamo.memory = rev.memory = "store"
    expected, stored = trained(dynamo, given), trained(rev, given)
    rev.memory = "reversible"
    for got in (stored, trained(rev, given)):
        assert type(got[0]) is type(expected[0])
        torch.testing.assert_close(got[0].logits, expected[0].logits, rtol=0, atol=1e-12)
        assert got[1].keys() == expected[1].keys()
        for key, gradient in expected[1].items():
            error = (got[1][key] - gradient).norm() / gradient.norm()
            assert error <= 1e-9, f"{key}: {error}"


def trained(module: Any, given: dict[str, Any]) -> tuple[Any, dict[str, Tensor]]:
    """What a model returns, and the gradients of a loss on it."""
    module.zero_grad()
    torch.manual_seed(1)
    output = module(**given)
    targets = given["input_ids"].flatten()
    torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), targets).backward()
    found = ((name, p.grad) for name, p in module.named_parameters())
    return output, {name: grad.clone() for name, grad in found if grad is not None}
