"""One training step of any model, from a given random state, and everything it leaves behind."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

CONSTANT = 1e-6  # parameters that differ by less start as one value; SAM draws them at 1e-10
SMALL = 0.1  # standard deviation of embeddings as they are initialised
NEGLIGIBLE = {torch.float64: 1e-5}  # of the largest gradient; what is below is compared with that
ROUNDED = 1e-2  # the same for other types


def awaken(model: nn.Module, seed: int = 0) -> None:
    """Give parameters that start as a constant, and tokens, random values of a trained size.

    Libraries start heads, last convolutions and last batch norms at zero and layer scales at 1e-6:
    whole branches would get no gradient, or one too small to see a mistake in. Class tokens and
    position embeddings start at 1e-6 to 0.02, next to patch embeddings of 1: a norm in front of
    the first branch magnifies such a token, and the rounding of its reconstruction with it, up to
    its own size; so it does with word embeddings, which start at 0.02. That is the drift of an
    untrained model, not what is tested here.
    """
    generator = torch.Generator().manual_seed(seed)
    embeddings = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    with torch.no_grad():
        for weight in embeddings:
            if SMALL > (size := float(weight.std())) > CONSTANT:
                weight.div_(size)
        for parameter in model.parameters():
            if not parameter.is_floating_point() or not parameter.numel():
                continue
            is_token = parameter.dim() == 3 and len(parameter) == 1
            if is_token:
                parameter.normal_(generator=generator)
            elif parameter.max() - parameter.min() < CONSTANT:
                spread = parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.2
                parameter.add_(spread * torch.randn(parameter.shape, generator=generator))


def tensors(value: Any) -> list[Tensor]:
    """The tensors of an argument or a result."""
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def functional(output: Any, seed: int = 0) -> Tensor:
    """A generic linear functional of all outputs that are numbers with a fraction."""
    generator = torch.Generator().manual_seed(seed)
    terms = [
        (leaf * torch.randn(leaf.shape, generator=generator, dtype=torch.float64).to(leaf)).sum()
        for leaf in tensors(output)
        if leaf.is_floating_point()
    ]
    return torch.stack([term.double() for term in terms]).sum()


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums have one order, and models measured side by side do not fight for the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Every generator a model may draw from starts at a seed, and is put back afterwards."""
    numpy = sys.modules.get("numpy")
    state, python = torch.get_rng_state(), random.getstate()
    drawn = numpy.random.get_state() if numpy is not None else None
    try:
        torch.manual_seed(seed)
        random.seed(seed)
        if numpy is not None:
            numpy.random.seed(seed)
        yield
    finally:
        torch.set_rng_state(state)
        random.setstate(python)
        if numpy is not None:
            numpy.random.set_state(drawn)


@dataclass
class Step:
    """Everything one training step leaves behind.

    Attributes:
        outputs: the tensors of the result.
        gradients: by parameter name, and ``"input 0"`` and so on.
        buffers: by name, after the step.
        random_state: of the global generator, after the step.
    """

    outputs: list[Tensor]
    gradients: dict[str, Tensor | None]
    buffers: dict[str, Tensor]
    random_state: Tensor


@one_thread()
def step(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    seed: int = 0,
    between: Callable[[], None] | None = None,
    input_gradients: bool = True,
) -> Step:
    """One forward and backward from a given random state; buffers are put back afterwards.

    Args:
        model: any network.
        args: its positional arguments; floating-point tensors in them get gradients.
        kwargs: its keyword arguments, likewise.
        seed: of the generators.
        between: called after the forward.
        input_gradients: False leaves the arguments without.
    """
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.zero_grad(set_to_none=True)

    def fresh(tensor: Tensor) -> Tensor:
        wanted = input_gradients and tensor.is_floating_point()
        return tensor.detach().clone().requires_grad_(wanted)

    given = pytree.tree_map_only(Tensor, fresh, (args, kwargs or {}))
    inputs = tensors(given)  # before the call: the model may write into a list it is given
    with seeded(seed):
        output = model(*given[0], **given[1])
        if between is not None:
            between()
        torch.autograd.backward(functional(output))
        random_state = torch.get_rng_state()
    gradients: dict[str, Tensor | None] = {n: p.grad for n, p in model.named_parameters()}
    gradients.update((f"input {i}", x.grad) for i, x in enumerate(inputs))
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    result = Step([x.detach() for x in tensors(output)], gradients, buffers, random_state)
    model.zero_grad(set_to_none=True)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(before[name])
    return result


def output_error(got: Step, expected: Step) -> float:
    """The largest relative error of an output, in norm."""
    pairs = zip(got.outputs, expected.outputs, strict=True)
    return max((relative(a, b) for a, b in pairs), default=0.0)


def gradient_errors(got: Step, expected: Step) -> dict[str, float]:
    """Per tensor the relative error of its gradient, in norm; infinite where only one has any.

    One that is zero up to rounding (a bias in front of a norm) is compared with the largest.
    """
    known = {n: g for n, g in expected.gradients.items() if g is not None}
    largest = max(known.values(), key=lambda g: float(g.norm()), default=torch.zeros(()))
    floor = NEGLIGIBLE.get(largest.dtype, ROUNDED) * float(largest.norm())
    errors = {}
    for name, gradient in got.gradients.items():
        reference = known.get(name)
        if gradient is not None and reference is not None:
            errors[name] = relative(gradient, reference, floor)
        elif gradient is not reference:
            errors[name] = float("inf")
    return errors


def relative(got: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """Norm of the difference over the norm of what is expected, or over a floor."""
    if torch.equal(got, expected) or not got.numel():
        return 0.0
    got, expected = got.detach().double(), expected.detach().double()
    return float((got - expected).norm()) / max(float(expected.norm()), floor, 1e-300)
