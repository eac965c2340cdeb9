"""Run one training step under each executor and compare everything it leaves behind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import re2fx

Loss = Callable[[Any], Tensor]


@dataclass
class Outcome:
    """Everything one step leaves behind."""

    outputs: list[Tensor]
    gradients: dict[str, Tensor | None]
    buffers: dict[str, Tensor]
    random_state: Tensor


def weighted(output: Any) -> Tensor:
    """A generic linear functional of all outputs."""
    total = torch.zeros(())
    for leaf in pytree.tree_leaves(output):
        weights = torch.linspace(-1, 1, leaf.numel(), dtype=leaf.dtype, device=leaf.device)
        weights = weights.view_as(leaf)
        total = total + (leaf * weights).sum()
    return total


def step(
    model: nn.Module, memory: str, *inputs: Any, loss: Loss = weighted, seed: int = 0
) -> Outcome:
    """Forward and backward from a given random state; buffers are put back afterwards."""
    assert isinstance(model, (re2fx.RewiredModule, re2fx.PiecewiseModule))
    model.memory = memory
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.zero_grad(set_to_none=True)
    inputs = tuple(
        x.clone().requires_grad_(x.is_floating_point()) if isinstance(x, Tensor) else x
        for x in inputs
    )
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    output = model(*inputs)
    loss(output).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    gradients.update((f"input {i}", x.grad) for i, x in enumerate(inputs) if isinstance(x, Tensor))
    outcome = Outcome(
        [leaf.detach() for leaf in pytree.tree_leaves(output)],
        gradients,
        {name: buffer.clone() for name, buffer in model.named_buffers()},
        torch.get_rng_state(),
    )
    torch.set_rng_state(state)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(before[name])
    model.zero_grad(set_to_none=True)
    return outcome


def assert_same(got: Outcome, expected: Outcome, tolerance: float) -> None:
    """Outputs, gradients, buffers and the random stream agree.

    Gradients are compared in norm, relative to the tensor's own; one that is zero up to rounding
    (a bias in front of a norm) relative to the largest.
    """
    for a, b in zip(got.outputs, expected.outputs, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    assert got.gradients.keys() == expected.gradients.keys()
    norms = [float(g.norm()) for g in expected.gradients.values() if g is not None]
    largest = max(norms, default=0.0)
    for name, reference in expected.gradients.items():
        gradient = got.gradients[name]
        assert (gradient is None) == (reference is None), name
        if gradient is not None and reference is not None:
            scale = max(float(reference.norm()), 1e-6 * largest) or 1.0
            error = float((gradient - reference).norm()) / scale
            assert error <= tolerance, f"{name}: {error:.2g}"
    for name, buffer in expected.buffers.items():
        torch.testing.assert_close(got.buffers[name], buffer, rtol=0, atol=0, msg=name)
    assert torch.equal(got.random_state, expected.random_state), "the random stream differs"


def assert_reversible_equals_store(
    model: nn.Module, *inputs: Any, tolerance: float = 1e-11, loss: Loss = weighted
) -> None:
    """The reversible executor against ordinary autograd on the same network."""
    expected = step(model, "store", *inputs, loss=loss)
    assert_same(step(model, "reversible", *inputs, loss=loss), expected, tolerance)
