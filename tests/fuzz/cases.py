"""One random case: a program, how it is rewired, and a situation; compared with stored execution.

In fp64 gradients agree to 1e-9 of their norm. Below, kinks are left out (the rounding of a
reconstructed input may turn a ReLU around) and gradients agree to 1e-3 in fp32 and 5e-2 in bf16,
or, where the network magnifies rounding more than that, to ten times as much as the gradients of
stored execution move when its input moves by that dtype's share of `NUDGES`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import re2fx

from ..compare import Outcome, assert_same
from ..programs import KINDS, Block, Network, Program, build, couplings, programs
from ..situations.harness import fill
from .situations import DTYPES, Situation, perform, situations

Verdict = Literal["agrees", "agrees, ill-conditioned", "nothing to rewire", "refused", "raises"]
Executor = Literal["eager", "compiled"]

MORE_KINDS = ("dropout", "stochastic depth", "squeeze", "halves", "broadcast")
WHOLE = (  # whose inverse is exact in fixed point
    re2fx.Coupling.re2tal(),
    re2fx.Coupling.consistent(0.5),
    re2fx.Coupling.consistent(0.125),
    re2fx.Coupling(0.3, -0.25, -1.3),
    re2fx.Coupling.bdia(),
    re2fx.Coupling.double(),
)
OF_BLOCKS = (  # whose streams stay bounded where a block forgets its input
    re2fx.Coupling.consistent(0.3),
    re2fx.Coupling.momentum(0.5),
    re2fx.Coupling(0.6, 0.3, 1.1),
)
EXACT_OF_BLOCKS = (re2fx.Coupling.consistent(0.125), re2fx.Coupling.momentum(0.5))
TOLERANCES = {"float64": 1e-9, "float32": 1e-3, "bfloat16": 5e-2}
NUDGES = {"float32": 1e-5, "bfloat16": 1e-2}
SMOOTH = {"F.relu": "F.gelu", "relu_": "F.silu in place", "in place": "mlp"}


@dataclass(frozen=True)
class Case:
    """What one example of the fuzzer is."""

    program: Program
    situation: Situation = Situation()  # noqa: RUF009
    coupling: re2fx.Coupling = re2fx.Coupling.re2tal()  # noqa: RUF009
    readout: str = "mean"
    activation: str = "branch"
    executor: Executor = "eager"
    exact: bool = False

    @property
    def precision(self) -> str:
        """The lowest dtype that anything is computed in."""
        how = self.situation
        return "bfloat16" if how.autocast and how.dtype == "float32" else how.dtype


@st.composite
def cases(draw: st.DrawFn, executor: Executor = "eager") -> Case:
    """Every program in every situation."""
    activation = draw(st.sampled_from(("branch", "stream", "block")))
    program = draw(programs(draw(st.integers(2, 4)), activation, (*KINDS, *MORE_KINDS)))
    post_norm = draw(st.sampled_from((False, False, True)))
    if post_norm:
        program = behind(program, lambda _: "layer norm")
    situation = draw(situations(compiled=executor == "compiled"))
    if situation.autocast:
        situation = replace(situation, dtype="float32")
    readout = draw(st.sampled_from(("mean", "sum", "last")))
    exact = executor == "eager" and draw(st.sampled_from((False, False, True)))
    if activation == "block" or post_norm:
        coupling = draw(st.sampled_from(EXACT_OF_BLOCKS if exact else OF_BLOCKS))
        readout = "last" if readout == "sum" else readout
    else:
        coupling = draw(st.sampled_from(WHOLE) if exact else couplings())
    if coupling.evaluations > 1 and readout == "sum":
        readout = "mean"
    if coupling.draws:
        readout = "last"
    case = Case(program, situation, coupling, readout, activation, executor, exact)
    kinky = situation.reduced or situation.backward == "double"
    return replace(case, program=smooth(program)) if kinky else case


def smooth(program: Program) -> Program:
    """The program without kinks inside its chains."""

    def smoothed(block: Block) -> Block:
        branches = tuple(SMOOTH.get(kind, kind) for kind in block.branches)
        return replace(
            block, branches=branches, behind=SMOOTH.get(block.behind or "", block.behind)
        )

    return changed(program, smoothed)


def behind(program: Program, choose: Callable[[Block], str | None]) -> Program:
    """The program with something else behind its additions."""
    return changed(program, lambda block: replace(block, behind=choose(block)))


def changed(program: Program, change: Callable[[Block], Block]) -> Program:
    """The program with other blocks."""
    stages = (replace(s, blocks=tuple(map(change, s.blocks))) for s in program.stages)
    return replace(program, stages=tuple(stages))


def check(case: Case) -> Verdict:
    """Assert that a case agrees with stored execution; say in which way."""
    torch.compiler.reset()
    network, *inputs = build(case.program)
    network = network.to(DTYPES[case.situation.dtype]).train(case.situation.training)
    options: dict[str, Any] = {
        "coupling": case.coupling, "readout": case.readout, "activation": case.activation,
        "exact": case.exact,
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", re2fx.Re2fxWarning)
        try:
            # What is compiled knows its shapes, by which nested chains are chosen between.
            examples = tuple(inputs) if case.executor == "compiled" else None
            rev: Any = re2fx.transform(network, examples, **options)
        except re2fx.ConditioningError:
            return "refused"
        except re2fx.OptionError:
            if case.exact:  # a constant scale of a skip, of which b is no power of two any more
                return "refused"
            raise
    if not isinstance(rev, re2fx.RewiredModule):
        return "nothing to rewire"
    store: Any = Executed(rev, "store")
    run = Executed(rev, "reversible")
    if case.executor == "compiled":
        run = compiled(network, options)
    if case.executor == "compiled" and case.situation.autocast:
        # Dynamo knows the types of values, symbolic tracing does not: they may plan otherwise.
        store = compiled(network, {**options, "memory": "store"})
    try:
        expected = perform(store, network, inputs, case.situation)
    except RuntimeError as error:
        assert_raises(case, network, network, inputs, error)
        assert_raises(case, run, network, inputs, error)
        return "raises"
    try:
        got = perform(run, network, inputs, case.situation)
    except RuntimeError as error:
        if case.executor == "eager":
            raise
        # A write in place that spoils the given network's own backward may spoil AOTAutograd's.
        assert_raises(case, network, network, inputs, error)
        return "raises"
    if case.executor == "compiled":
        fill(got, expected)
    return judged(case, got, expected, store, network, inputs)


@dataclass(frozen=True)
class Executed:
    """A rewired network under one of its executors."""

    rev: re2fx.RewiredModule
    memory: Literal["store", "reversible"]

    def __call__(self, *inputs: Tensor) -> Any:
        """Run it; the backward stays what the forward was."""
        self.rev.memory = self.memory
        return self.rev(*inputs)


def compiled(network: nn.Module, options: dict[str, Any]) -> Any:
    """The network rewired and compiled."""
    return torch.compile(network, backend="re2fx", options={"compiler": "aot_eager", **options})


def assert_raises(
    case: Case, run: Any, network: Network, inputs: list[Tensor], error: RuntimeError
) -> None:
    """What stored execution cannot do is an error of the same kind as given, and in reverse."""
    try:
        perform(run, network, inputs, case.situation)
    except RuntimeError:
        return
    way = "the given network" if run is network else "reversible execution"
    raise AssertionError(f"something raises and {way} does not: {error}") from error


def judged(
    case: Case,
    got: Outcome,
    expected: Outcome,
    store: Any,
    network: Network,
    inputs: list[Tensor],
) -> Verdict:
    """Agreement within the tolerance of the precision, or of the network's own conditioning.

    To the bit in fixed point.
    """
    if case.exact:
        assert_same(got, expected, 0.0)
        return "agrees"
    tolerance = TOLERANCES[case.precision]
    try:
        assert_same(got, expected, tolerance)
        return "agrees"
    except AssertionError:
        if case.precision == "float64":
            raise
    nudge = NUDGES[case.precision]
    noise = torch.Generator().manual_seed(0)
    moved = [x + nudge * torch.randn(x.shape, generator=noise, dtype=x.dtype) for x in inputs]
    allowed = 10 * distance(perform(store, network, moved, case.situation), expected)
    assert_same(got, expected, max(tolerance, allowed))
    return "agrees, ill-conditioned"


def distance(a: Outcome, b: Outcome) -> float:
    """The largest relative difference between two gradients of one tensor."""
    pairs = [(a.gradients[n], g) for n, g in b.gradients.items()]
    known = [(x.double(), y.double()) for x, y in pairs if x is not None and y is not None]
    return max((float((x - y).norm() / y.norm().clamp_min(1e-30)) for x, y in known), default=0.0)


__all__ = ["Case", "Situation", "Verdict", "cases", "check"]
