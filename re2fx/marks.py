"""Operators that carry the two-stream structure through AOTAutograd, and disappear afterwards.

A compiled network is traced into a joint forward/backward graph of ATen operators, in which nothing
tells a stream from any other tensor. These operators stand for the places that matter, so that
`re2fx.passes.reverse` finds them however the graph was decomposed, functionalised or merged::

    read   = fork(p_i)                                     what branch i sees of its stream
    p_next = couple(p_i, p_prev, read, F_i(read), a, b, c) one step of the coupling; with
                                                           ``reversible=False`` states are stored,
                                                           ``tolerance`` says how often anyway;
                                                           ``block`` if F_i is a whole block
    after  = link(p_i, permute(p_i))                       a shape-only operation on a stream

They carry all the pass needs to know as arguments, so a graph with marks can be cached by its text.
Running them gives the same values as the arithmetic they stand for.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .coupling import Coupling
from .wiring import DRIFT_TOLERANCE

# torch.library is not typed.
_library: Any = torch.library.Library("re2fx", "DEF")  # type: ignore[no-untyped-call]
_library.define("fork(Tensor stream) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_library.define(
    "couple(Tensor current, Tensor previous, Tensor read, Tensor branch, "
    "float a, float b, float c, bool reversible=True, float tolerance=1e-3, bool block=False) "
    "-> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define("link(Tensor before, Tensor after) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


def _copy(value: Tensor) -> Tensor:
    """New memory with the same strides, gaps and repetitions included."""
    once = value[tuple(slice(0, 1) if step == 0 else slice(None) for step in value.stride())]
    new = once.new_empty_strided(once.shape, once.stride()).copy_(once)
    return new.expand(value.shape)


@torch.library.impl(_library, "fork", "CompositeExplicitAutograd")
def _fork(stream: Tensor) -> Tensor:
    return _copy(stream)


@torch.library.impl(_library, "couple", "CompositeExplicitAutograd")
def _couple(
    current: Tensor,
    previous: Tensor,
    read: Tensor,
    branch: Tensor,
    a: float,
    b: float,
    c: float,
    reversible: bool = True,
    tolerance: float = DRIFT_TOLERANCE,
    block: bool = False,
) -> Tensor:
    result: Tensor = Coupling(a, b, c).step(current, previous, branch)
    return result.clone() if any(result is x for x in (current, previous, branch)) else result


@torch.library.impl(_library, "link", "CompositeExplicitAutograd")
def _link(before: Tensor, after: Tensor) -> Tensor:
    return _copy(after)


def _fake_fork(stream: Tensor) -> Tensor:
    return stream.new_empty_strided(stream.shape, stream.stride())


def _fake_link(before: Tensor, after: Tensor) -> Tensor:
    return after.new_empty_strided(after.shape, after.stride())


def _couple_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.coefficients = inputs[4:7]


def _couple_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grads = [None if k == 0 else grad if k == 1 else grad * k for k in ctx.coefficients]
    return grads[0], grads[1], None, grads[2], *(None,) * 6


torch.library.register_fake("re2fx::fork", _fake_fork, lib=_library)
torch.library.register_fake("re2fx::link", _fake_link, lib=_library)
torch.library.register_autograd("re2fx::fork", lambda ctx, grad: grad, lib=_library)
torch.library.register_autograd("re2fx::link", lambda ctx, grad: (None, grad), lib=_library)
torch.library.register_autograd(
    "re2fx::couple", _couple_backward, setup_context=_couple_context, lib=_library
)

FORK = torch.ops.re2fx.fork.default
COUPLE = torch.ops.re2fx.couple.default
LINK = torch.ops.re2fx.link.default
MARKS = (FORK, COUPLE, LINK)


class Couple(NamedTuple):
    """The arguments of a ``couple`` mark."""

    current: Any
    previous: Any
    read: Any
    branch: Any
    coupling: Coupling
    reversible: bool = True
    tolerance: float = DRIFT_TOLERANCE


def read_couple(node: Any) -> Couple:
    """What a ``couple`` mark says; tracing leaves arguments away that have their default."""
    current, previous, read, branch, a, b, c, *rest = node.args
    coupling = Coupling(a, b, c, block=len(rest) > 2 and rest[2])
    return Couple(current, previous, read, branch, coupling, *rest[:2])
