"""Reversible against stored execution, on models nobody here wrote, at full depth and width."""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import re2fx

from .zoo import EACH_KIND, ZOO, Step, step

# In fp64 nothing but a mistake is left. In fp32 a stream is reconstructed to a few times its
# rounding of 6e-8, and batch norms over 16 to 64 values and up to 44 blocks magnify that.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}

# Rounding can turn one ReLU of two million around when its branch is run again, and that one moves
# gradients by 1e-3 to 1e-2: as much as they move between stored fp32 and stored fp64, for the same
# reason. So fp32 is compared on the first input where every ReLU decides as before; about half of
# them are such, and all of them show a mistake.
INPUTS_TRIED = 10
FLIPS_PER_MILLION = 5

# The gradient of a bias in front of a batch norm is zero, and what is computed for it rounding,
# which no two executions share; relative to itself its error is 1. The zoo has none (its
# convolutions in front of norms have no bias), and so every tensor is compared relative to its own
# norm. A gradient this far below the model's largest would need another rule.
SMALLEST = 1e-6


def norm_of(got: torch.Tensor) -> float:
    """In fp64: the sum of a million squares."""
    return float(got.double().norm())


def assert_equal_steps(reversible: Step, store: Step, tolerance: float) -> None:
    """Everything two steps leave behind; outputs, buffers and the random stream bit for bit."""
    for got, expected in zip(reversible.outputs, store.outputs, strict=True):
        assert torch.equal(got, expected)
    assert reversible.gradients.keys() == store.gradients.keys()
    largest = max(norm_of(g) for g in store.gradients.values() if g is not None)
    for name, expected_gradient in store.gradients.items():
        gradient = reversible.gradients[name]
        assert (gradient is None) == (expected_gradient is None), name
        if gradient is None or expected_gradient is None:
            continue
        scale = norm_of(expected_gradient)
        assert scale > SMALLEST * largest, f"{name}: no gradient to speak of"
        error = norm_of(gradient - expected_gradient) / scale
        assert error <= tolerance, f"{name}: {error:.2g}"
    assert reversible.buffers.keys() == store.buffers.keys()
    for name, buffer in store.buffers.items():
        assert torch.equal(reversible.buffers[name], buffer), name
    assert torch.equal(reversible.random_state, store.random_state)


def is_stochastic(module: nn.Module) -> bool:
    """Dropout of any kind that is on, its attribute called ``p`` or ``drop_prob``."""
    return any(0 < rate < 1 for rate in (getattr(module, key, 0) for key in ("p", "drop_prob")))


def reversible_step(rev: re2fx.RewiredModule, inputs: Any, seed: int) -> tuple[Step, int]:
    """A reversible step, and how many ReLUs in the chains decided otherwise in the recompute."""
    first: dict[str, list[Tensor]] = defaultdict(list)
    again: dict[str, list[Tensor]] = defaultdict(list)
    signs = first

    def note(path: str, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        signs[path].append(output.detach() > 0)
        return output  # a hook that only looks would not be called again

    def turn() -> None:
        nonlocal signs
        signs = again

    blocks = [r.location.module for chain in rev.plan.chains for r in chain.residuals]
    hooks = [
        leaf.register_forward_hook(partial(note, f"{block}.{path}"))
        for block in blocks
        for path, leaf in rev.get_submodule(block).named_modules()
        if isinstance(leaf, nn.ReLU)
    ]
    rev.memory = "reversible"
    result = step(rev, inputs, seed, between=turn)
    for hook in hooks:
        hook.remove()

    flips = total = 0
    for path, seen in again.items():
        # A recompute may end with the last value that somebody needs.
        for before, after in zip(first[path], seen, strict=False):
            flips += int((before != after).sum())
            total += before.numel()
    assert bool(total) == bool(hooks), "no branch was run again"
    assert flips <= FLIPS_PER_MILLION * max(1.0, total / 1e6), f"{flips} of {total} ReLUs flipped"
    return result, flips


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp64", "fp32"])
@pytest.mark.parametrize("name", EACH_KIND)
def test_gradients_equal_the_stored_ones(name: str, dtype: torch.dtype) -> None:
    animal = ZOO[name]
    rev = animal.rewire(animal.build(dtype=dtype))
    assert rev.training
    for seed in range(INPUTS_TRIED):
        inputs = animal.inputs(seed, dtype)
        reversible, flips = reversible_step(rev, inputs, seed)
        if not flips:
            break
    else:
        pytest.fail(f"every one of {INPUTS_TRIED} recomputes turned a ReLU around")
    rev.memory = "store"
    store = step(rev, inputs, seed)
    assert all(gradient is not None for gradient in store.gradients.values())
    assert_equal_steps(reversible, store, TOLERANCE[dtype])

    # The step was one in which all of this mattered.
    before = dict(rev.named_buffers())
    for path, module in rev.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert store.buffers[f"{path}.num_batches_tracked"] == 1
            mean = store.buffers[f"{path}.running_mean"]
            assert not torch.equal(mean, before[f"{path}.running_mean"])
    unmoved = torch.Generator().manual_seed(seed).get_state()
    drops = any(is_stochastic(module) for module in rev.modules())
    assert torch.equal(store.random_state, unmoved) != drops


@pytest.mark.parametrize("name", ["resnet50", "swin_t", "vit_tiny_patch16_224"])
def test_frozen_parameters_stay_without_a_gradient(name: str) -> None:
    """Norms are trained and nothing else; the sets of missing gradients are equal."""
    animal = ZOO[name]
    rev = animal.rewire(animal.build(dtype=torch.float64))
    for parameter in rev.parameters():
        parameter.requires_grad_(parameter.dim() == 1)
    inputs = animal.inputs(dtype=torch.float64)
    rev.memory = "store"
    store = step(rev, inputs)
    rev.memory = "reversible"
    missing = {n for n, gradient in store.gradients.items() if gradient is None}
    assert missing == {n for n, p in rev.named_parameters() if not p.requires_grad}
    assert 0 < len(missing) < len(store.gradients)
    assert_equal_steps(step(rev, inputs), store, TOLERANCE[torch.float64])


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224"])
def test_a_reversible_step_recomputes(name: str) -> None:
    """The comparison is one between two executors: only one of them runs the branches again."""
    animal = ZOO[name]
    rev = animal.rewire(animal.build())
    chain = rev.plan.chains[0]
    branch = rev.get_submodule(chain.residuals[0].location.module)
    leaf = next(m for m in branch.modules() if isinstance(m, (nn.Conv2d, nn.LayerNorm)))
    calls = 0

    def count(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return output  # a hook that only looks would not be called again

    leaf.register_forward_hook(count)
    seen = {}
    for memory in ("store", "reversible"):
        calls, rev.memory = 0, memory
        step(rev, animal.inputs())
        seen[memory] = calls
    assert seen == {"store": 1, "reversible": 2}
