"""Torch's tests of its checkpoint, restated: hooks, modes, errors and threads around a rerun.

The table is in test_checkpoint_suite.py.
"""

from __future__ import annotations

import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from re2fx.runtime import ChainCall

from .chains import X, of, two_sines
from .compare import weighted
from .situations.harness import Run, compare, train


@pytest.mark.parametrize("where", ["around", "inside"])
def test_saved_tensor_hooks(where: str) -> None:
    """Of one's own: around a chain they see what lies outside; in a branch they come first."""
    packed: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor.numel())
        return tensor * 2

    hooks = partial(saved_tensors_hooks, pack, lambda tensor: tensor / 2)

    def function(x: Tensor) -> Tensor:
        if where == "around":
            return two_sines(x)
        with hooks():
            return two_sines(x)

    both = of(function)

    def situation(run: Run, model: nn.Module, inputs: Any) -> Any:
        if where == "inside":
            return train(run, model, inputs)
        with hooks():
            output = run(*inputs)
        packed.append(0)
        weighted(output).backward()
        return output

    compare(both, X, situation=situation)
    if where == "inside":
        assert len(packed) == 6 + 6 + 4  # nothing in the first branch is asked for again
        return
    stored, reversible = packed[: packed.index(0)], packed[packed.index(0) + 1 : -1]
    assert len(stored) - len(reversible) == 3 * 4  # per block, of the layer two and of the sines


def test_the_order_of_hooks() -> None:
    """Of parameters, of tensors in branches and of modules, as in stored execution."""
    order: list[str] = []

    def function(x: Tensor) -> Tensor:
        out = torch.tanh(x)
        if out.requires_grad:
            out.register_hook(lambda grad: order.append("tensor"))
        return out

    both = of(function)
    for name, p in both.model.named_parameters():
        p.register_post_accumulate_grad_hook(lambda p, name=name: order.append(name))
    for name, branch in both.model.get_submodule("branches").named_children():
        branch.register_full_backward_pre_hook(lambda *_, name=name: order.append(f"to {name}"))
        branch.register_full_backward_hook(lambda *_, name=name: order.append(f"from {name}"))
    compare(both, X)
    half = len(order) // 2
    assert half == 8 + 3 + 6
    assert order[:half] == order[half:]


class Sines(TorchDispatchMode):
    """Counts an operator."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.sin.default
        return func(*args, **(kwargs or {}))


def test_a_mode_around_forward_and_backward() -> None:
    """It sees the reruns; the last sine of the first branch is not needed."""
    both = of(two_sines)
    with Sines() as forward:
        output = both.reversible(X)
    with Sines() as backward:
        weighted(output).backward()
    assert (forward.count, backward.count) == (6, 5)


def chain_calls() -> int:
    """How many are alive, cycles that can be collected left out."""
    gc.collect()
    return sum(type(held) is ChainCall for held in gc.get_objects())


@pytest.mark.parametrize("block", [0, 1, 2])
@pytest.mark.parametrize("phase", ["forward", "rerun"])
def test_an_error_in_a_branch(phase: str, block: int) -> None:
    """It gets out as it is, nothing of it stays, and the next step is right."""
    fuse = [0]

    def function(x: Tensor) -> Tensor:
        fuse[0] -= 1
        if fuse[0] == 0:
            with torch.no_grad():
                torch.rand(5)
                raise ValueError("planted")
        return nn.functional.dropout(x, 0.3).tanh()

    both = of(function)
    seen: list[Any] = []

    def step() -> None:
        output = both.reversible(X)
        seen.append(torch.get_rng_state())
        weighted(output).backward()

    before = chain_calls()
    fuse[0] = block + 1 if phase == "forward" else 6 - block
    with pytest.raises(ValueError, match="planted"):
        step()
    assert len(seen) == (phase == "rerun")
    assert all(torch.equal(torch.get_rng_state(), state) for state in seen)
    assert chain_calls() == before
    assert torch.is_grad_enabled()
    compare(both, X)


@pytest.mark.parametrize("forward", [True, False])
def test_backwards_in_other_threads(forward: bool) -> None:
    """Several at once, through graphs of one module; their forwards there too, or here before."""
    both = of()
    parameters = list(both.model.parameters())
    inputs = [X * scale for scale in (1, 2, 3, 4)]
    outputs = [both.reversible(x) for x in inputs]
    start = threading.Barrier(len(inputs), timeout=60)

    def work(x: Tensor, output: Tensor) -> Any:
        start.wait()
        output = both.reversible(x) if forward else output
        return torch.autograd.grad(weighted(output), parameters)

    with ThreadPoolExecutor(len(inputs)) as pool:
        got = list(pool.map(work, inputs, outputs))
    for x, gradients in zip(inputs, got, strict=True):
        expected = torch.autograd.grad(weighted(both.store(x)), parameters)
        for a, b in zip(gradients, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would want the model on the GPUs")
def test_data_parallel() -> None:
    """`nn.DataParallel` around a chain, in a checkpoint and without one."""
    both = of()
    reversible: Any = both.reversible
    parallel = nn.DataParallel(reversible)

    def situation(run: Run, model: nn.Module, inputs: Any) -> Any:
        if run is both.store:
            output = run(run(*inputs))
        else:
            output = parallel(checkpoint(parallel, *inputs, use_reentrant=False))
        weighted(output).backward()
        return output

    compare(both, X, situation=situation)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_a_compiled_function_in_a_branch() -> None:
    """Compiled again for other sizes between forward and backward: right, or an error."""

    @torch.compile(backend="aot_eager")
    def function(x: Tensor) -> Tensor:
        a = x.sin()
        return (a * a.cos()).exp()

    torch.compiler.reset()
    both = of(function)

    def situation(run: Run, model: nn.Module, inputs: Any) -> Any:
        output = run(*inputs)
        function(inputs[0].new_ones(9, 4, requires_grad=True))
        weighted(output).backward()
        return output

    compare(both, X, situation=situation)
    torch.compiler.reset()
