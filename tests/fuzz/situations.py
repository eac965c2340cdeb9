"""Random ways to train a network: what is on, what is frozen, and how the backwards follow.

A `Situation` is plain data; `perform` carries it out and returns everything it leaves behind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..compare import Outcome
from ..situations.harness import Unmoved

Run = Callable[..., Any]
Differentiate = Callable[[Tensor], None]

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
BETWEEN: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "grad mode": torch.enable_grad,
}
FROZEN: dict[str, Callable[[int, int], bool]] = {
    "nothing": lambda place, count: False,
    "first half": lambda place, count: place < count // 2,
    "every second": lambda place, count: place % 2 == 0,
    "all but the last": lambda place, count: place < count - 1,
    "everything": lambda place, count: True,
}
OUTPUTS = ("all", "first", "last")
BACKWARDS = ("once", "retained", "output by output", "grad of some", "double")
AROUND = ("nothing", "checkpoint", "saved-tensor hooks", "detect_anomaly")


@dataclass(frozen=True)
class Situation:
    """How a network is trained.

    Attributes:
        training: train mode.
        dtype: of parameters and inputs.
        autocast: bf16 autocast around the forwards only.
        frozen: which parameters are, a key of `FROZEN`.
        inputs: which inputs require gradients.
        forwards: how many there are before the first backward ends.
        last_first: whether the backwards come in the opposite order, or each after its forward.
        between: the grad mode of another forward between forward and backward.
        outputs: which of the network's outputs the loss reads.
        backward: how gradients are asked for.
        around: what the forwards run in.
        strided: whether the input is a view of something larger.
    """

    training: bool = True
    dtype: str = "float64"
    autocast: bool = False
    frozen: str = "nothing"
    inputs: tuple[bool, bool] = (True, True)
    forwards: int = 1
    last_first: bool | None = None
    between: str | None = None
    outputs: str = "all"
    backward: str = "once"
    around: str = "nothing"
    strided: bool = False

    @property
    def reduced(self) -> bool:
        """Whether anything is computed in less than fp64."""
        return self.dtype != "float64"


def situations(compiled: bool = False) -> st.SearchStrategy[Situation]:
    """Every combination; a compiled network has no double backward and no checkpoint around."""
    rarely = st.sampled_from((False, False, False, True))
    return st.builds(
        Situation,
        training=st.booleans(),
        dtype=st.sampled_from(("float64", "float64", "float32", "bfloat16")),
        autocast=st.booleans(),
        frozen=st.sampled_from(tuple(FROZEN)),
        inputs=st.tuples(st.booleans(), st.booleans()),
        forwards=st.integers(1, 3),
        last_first=st.sampled_from((None, False, True)),
        between=st.one_of(st.none(), st.sampled_from(tuple(BETWEEN))),
        outputs=st.sampled_from(OUTPUTS),
        backward=st.sampled_from(BACKWARDS[:-1] if compiled else BACKWARDS),
        around=st.just("nothing") if compiled else st.sampled_from(AROUND),
        strided=rarely,
    )


def leaves(model: nn.Module, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
    """What may get a gradient, by name."""
    return dict(model.named_parameters()) | {f"input {i}": x for i, x in enumerate(inputs)}


def weighted(outputs: Sequence[Tensor], number: int) -> Tensor:
    """A linear functional of some outputs, another one for every forward."""
    total = torch.zeros((), dtype=torch.float64)
    for value in outputs:
        weights = torch.linspace(-1, 1 + number, value.numel(), dtype=torch.float64)
        total = total + (value.double() * weights.view_as(value)).sum()
    return total


def chosen(outputs: tuple[Tensor, ...], which: str) -> tuple[Tensor, ...]:
    """The outputs that the loss reads."""
    return {"all": outputs, "first": outputs[:1], "last": outputs[-1:]}[which]


def perform(run: Run, model: nn.Module, given: Sequence[Tensor], how: Situation) -> Outcome:
    """Carry a situation out; parameters, buffers and the random stream are put back.

    Args:
        run: what is called, ``model`` itself or made of it.
        model: the network whose parameters and buffers are looked at.
        given: stream input and condition.
        how: the situation.
    """
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    state, required = torch.get_rng_state(), [p.requires_grad for p in model.parameters()]
    try:
        freeze(model, how)
        torch.manual_seed(0)
        inputs = [prepared(x, r, how) for x, r in zip(given, how.inputs, strict=True)]
        outputs, gradients = train(run, model, inputs, how)
        return Outcome(
            [value.detach() for value in outputs],
            gradients,
            {name: buffer.clone() for name, buffer in model.named_buffers()},
            torch.get_rng_state(),
        )
    finally:
        torch.set_rng_state(state)
        model.zero_grad(set_to_none=True)
        for p, requires in zip(model.parameters(), required, strict=True):
            p.requires_grad_(requires)
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(before[name])


def freeze(model: nn.Module, how: Situation) -> None:
    """Freeze parameters as the situation says."""
    parameters = list(model.parameters())
    for place, p in enumerate(parameters):
        p.requires_grad_(not FROZEN[how.frozen](place, len(parameters)))


def prepared(x: Tensor, requires: bool, how: Situation) -> Tensor:
    """An input of its own, in the situation's dtype and layout."""
    x = x.detach().to(DTYPES[how.dtype])
    made = torch.stack([x, x], -1)[..., 0] if how.strided else x.clone()
    return made.requires_grad_(requires)


def train(
    run: Run, model: nn.Module, inputs: Sequence[Tensor], how: Situation
) -> tuple[list[Tensor], dict[str, Tensor | None]]:
    """All outputs, and all gradients by name."""
    gradients: dict[str, Tensor | None] = {}
    pending: list[tuple[int, tuple[Tensor, ...]]] = []
    outputs: list[Tensor] = []
    for number in range(how.forwards):
        made = forward(run, model, inputs, how)
        outputs += made
        pending.append((number, chosen(made, how.outputs)))
        if how.between:
            with BETWEEN[how.between]():
                run(*inputs)
        if how.last_first is None:
            backward(*pending.pop(), model, inputs, how, gradients)
    for number, values in reversed(pending) if how.last_first else pending:
        backward(number, values, model, inputs, how, gradients)
    gradients.update({name: leaf.grad for name, leaf in leaves(model, inputs).items()})
    return outputs, gradients


def forward(
    run: Run, model: nn.Module, inputs: Sequence[Tensor], how: Situation
) -> tuple[Tensor, ...]:
    """One forward in what the situation has around it."""
    with ExitStack() as stack:
        for context in around(how):
            stack.enter_context(context)
        if how.around == "checkpoint":
            made: tuple[Tensor, ...] = checkpoint(
                run,
                *inputs,
                use_reentrant=False,
                context_fn=lambda: (nullcontext(), Unmoved(model)),
            )
            return made
        return run(*inputs)


def around(how: Situation) -> Iterator[AbstractContextManager[Any]]:
    """The contexts of a forward."""
    yield torch.autocast("cpu", torch.bfloat16) if how.autocast else nullcontext()
    if how.around == "saved-tensor hooks":
        yield torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)
    if how.around == "detect_anomaly":
        yield torch.autograd.set_detect_anomaly(True)


def backward(
    number: int,
    values: Sequence[Tensor],
    model: nn.Module,
    inputs: Sequence[Tensor],
    how: Situation,
    gradients: dict[str, Tensor | None],
) -> None:
    """One backward as the situation says; what is not accumulated goes into ``gradients``."""
    values = [value for value in values if value.requires_grad]
    if not values:
        return
    loss = weighted(values, number)
    wanted = {n: leaf for n, leaf in leaves(model, inputs).items() if leaf.requires_grad}
    if how.backward == "retained":
        loss.backward(retain_graph=True)
        (0.5 * loss).backward()
    elif how.backward == "output by output":
        for place, value in enumerate(values):
            weighted([value], number).backward(retain_graph=place + 1 < len(values))
    elif how.backward == "grad of some":
        some = dict(list(wanted.items())[::2])
        found = torch.autograd.grad(loss, list(some.values()), allow_unused=True)
        gradients.update({f"{name} {number}": g for name, g in zip(some, found, strict=True)})
    elif how.backward == "double":
        found = torch.autograd.grad(
            loss, list(wanted.values()), create_graph=True, allow_unused=True
        )
        penalty = [g.double().square().sum() for g in found if g is not None and g.requires_grad]
        sum(penalty, loss).backward()
    else:
        loss.backward()
