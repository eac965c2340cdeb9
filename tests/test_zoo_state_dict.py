"""One set of parameters under one set of names: checkpoints, copies, adapters."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import re2fx
from re2fx.module import Memory

from .zoo import ZOO, Step, leaves, one_thread, step

MEMORIES: tuple[Memory, ...] = ("store", "reversible")
COPIED = ["vit_tiny_patch16_224", "resnet50", "slowfast_r50"]


def storages(tensors: Iterable[Tensor]) -> list[int]:
    """Where tensors live."""
    return [tensor.untyped_storage().data_ptr() for tensor in tensors]


def outputs(module: nn.Module, inputs: Any) -> list[Tensor]:
    """What a network says in eval mode."""
    mode = module.training
    module.eval()
    with one_thread(), torch.no_grad():
        # The model may write into a list it is given.
        result = leaves(module(list(inputs) if isinstance(inputs, list) else inputs))
    module.train(mode)
    return result


def assert_equal(got: list[Tensor], expected: list[Tensor]) -> None:
    """Bit for bit."""
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("name", ZOO)
def test_members_are_shared_under_the_same_names(name: str) -> None:
    animal = ZOO[name]
    model = animal.build()
    names = list(model.state_dict())
    where = storages(model.state_dict().values())
    parameters = dict(model.named_parameters())
    buffers = dict(model.named_buffers())
    rev = animal.rewire(model)
    for module in (rev, model):  # the model itself is left as it was
        assert list(module.state_dict()) == names
        assert storages(module.state_dict().values()) == where
        assert list(module.named_parameters()) == list(parameters.items())
        assert list(module.named_buffers()) == list(buffers.items())


def test_members_hold_nothing_twice() -> None:
    """Ties are ties: as many distinct storages as the original has."""
    model = ZOO["vit_tiny_patch16_224"].build()
    assert isinstance(model.blocks, nn.Sequential)
    first, second = model.blocks[0], model.blocks[1]
    second.mlp = first.mlp
    names, where = list(model.state_dict()), storages(model.state_dict().values())
    rev = ZOO["vit_tiny_patch16_224"].rewire(model)
    assert list(rev.state_dict()) == names
    assert storages(rev.state_dict().values()) == where
    assert len(list(rev.parameters())) == len(list(model.parameters()))
    assert len(list(rev.parameters())) < len([n for n in names if "running" not in n])


@pytest.mark.parametrize("name", ZOO)
def test_strict_load_both_ways(name: str) -> None:
    """A checkpoint of either form loads into the other, and their outputs agree afterwards."""
    animal = ZOO[name]
    inputs = animal.inputs()
    rev, second = animal.rewire(animal.build(seed=0)), animal.build(seed=1)
    wanted = outputs(rev, inputs)

    # Rewired to original: the original, in its own rewired form, says the same.
    second.load_state_dict(rev.state_dict(), strict=True)
    view = animal.rewire(second)
    assert_equal(outputs(view, inputs), wanted)

    # Original to rewired: the rewired network takes over the original's weights.
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.mul_(0.9)
    changed = outputs(view, inputs)
    assert not any(torch.equal(a, b) for a, b in zip(changed, wanted, strict=True))
    rev.load_state_dict(second.state_dict(), strict=True)
    assert_equal(outputs(rev, inputs), changed)


def test_strict_load_is_strict() -> None:
    rev = ZOO["resnet18"].rewire(ZOO["resnet18"].build())
    state = rev.state_dict()
    state["one.too.many"] = state.pop("layer1.0.conv1.weight")
    with pytest.raises(RuntimeError, match=r"layer1\.0\.conv1\.weight(.|\n)*one\.too\.many"):
        rev.load_state_dict(state, strict=True)


def run(rev: re2fx.RewiredModule, memory: Memory, inputs: Any) -> Step:
    """A step under one executor."""
    rev.memory = memory
    return step(rev, inputs)


def assert_close(got: Step, expected: Step, tolerance: float) -> None:
    """Equal outputs, and gradients within a tolerance relative to their norm."""
    assert_equal(got.outputs, expected.outputs)
    assert got.gradients.keys() == expected.gradients.keys()
    for name, reference in expected.gradients.items():
        gradient = got.gradients[name]
        assert (gradient is None) == (reference is None), name
        if gradient is not None and reference is not None:
            assert (gradient - reference).norm() <= tolerance * reference.norm(), name


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet50", "swin_t"])
def test_assigned_parameters_are_used_by_the_branches(name: str) -> None:
    """`load_state_dict(assign=True)` puts other tensors in the place of all parameters."""
    animal = ZOO[name]
    inputs = animal.inputs(dtype=torch.float64)
    rev = animal.rewire(animal.build(seed=0, dtype=torch.float64))
    old = dict(rev.named_parameters())
    donor = animal.build(seed=1, dtype=torch.float64)
    state = copy.deepcopy(donor.state_dict())
    rev.load_state_dict(state, strict=True, assign=True)
    assert storages(rev.state_dict().values()) == storages(state.values())

    wanted = run(animal.rewire(donor), "store", inputs)
    assert all(gradient is not None for gradient in wanted.gradients.values())
    for memory in ("store", "reversible"):
        assert_close(run(rev, memory, inputs), wanted, 1e-10)
    assert all(parameter.grad is None for parameter in old.values())


class Adapted(nn.Module):
    """A frozen linear layer with a low-rank update, as LoRA's."""

    def __init__(self, base: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.base = base.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, base.in_features, generator=generator))
        self.up = nn.Parameter(torch.randn(base.out_features, rank, generator=generator) / 50)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + x @ self.down.T @ self.up.T
        return out


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("vit_tiny_patch16_224", "attn.qkv"),
        ("vit_tiny_patch16_224", "mlp.fc1"),
        ("convnext_tiny", "mlp.fc2"),
        ("vit_b_16", "mlp.0"),
    ],
)
def test_adapters_put_in_after_transform_are_used(name: str, pattern: str) -> None:
    animal = ZOO[name]
    inputs = animal.inputs()
    model = animal.build().double()
    rev = animal.rewire(model)
    inputs = inputs.double()
    without = outputs(rev, inputs)
    rev.requires_grad_(False)
    paths = [path for path, _ in rev.named_modules() if path.endswith(pattern)]
    assert len(paths) >= 12
    for path in paths:
        parent, _, child = path.rpartition(".")
        layer = rev.get_submodule(path)
        assert isinstance(layer, nn.Linear)
        setattr(rev.get_submodule(parent), child, Adapted(layer).double())
    assert not any(torch.equal(a, b) for a, b in zip(outputs(rev, inputs), without, strict=True))

    results: dict[Memory, Step] = {memory: run(rev, memory, inputs) for memory in MEMORIES}
    assert_close(results["reversible"], results["store"], 1e-10)
    trained = {f"{path}.{half}" for path in paths for half in ("down", "up")}
    for result in results.values():
        got = {n for n, g in result.gradients.items() if g is not None and g.norm() > 0}
        assert got == {*trained, "input 0"}

    # The original, adapted likewise before it is rewired, is the same network.
    again = run(animal.rewire(model), "store", inputs)
    assert_equal(again.outputs, results["store"].outputs)


def by_pickle(rev: re2fx.RewiredModule) -> Any:
    """There and back."""
    return pickle.loads(pickle.dumps(rev))


def by_save(rev: re2fx.RewiredModule) -> Any:
    """There and back, as a file."""
    file = io.BytesIO()
    torch.save(rev, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


ROUND_TRIPS: dict[str, Callable[[re2fx.RewiredModule], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": by_pickle,
    "save": by_save,
}


@pytest.mark.parametrize("way", ROUND_TRIPS)
@pytest.mark.parametrize("name", COPIED)
def test_round_trip(name: str, way: str) -> None:
    """A copy computes the same and shares nothing: training it leaves the original alone."""
    animal = ZOO[name]
    inputs = animal.inputs()
    rev = animal.rewire(animal.build())
    twin = ROUND_TRIPS[way](rev)
    assert isinstance(twin, re2fx.RewiredModule)
    assert (twin.plan, twin.memory, twin.training) == (rev.plan, rev.memory, rev.training)
    assert list(twin.state_dict()) == list(rev.state_dict())
    assert not {*storages(twin.state_dict().values())} & {*storages(rev.state_dict().values())}

    for memory in ("store", "reversible"):
        # The same operations in the same order.
        assert_close(run(twin, memory, inputs), run(rev, memory, inputs), 0.0)
    assert_equal(outputs(twin, inputs), outputs(rev, inputs))

    before = outputs(rev, inputs)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(0.5)
    assert_equal(outputs(rev, inputs), before)
    assert not any(torch.equal(a, b) for a, b in zip(outputs(twin, inputs), before, strict=True))
