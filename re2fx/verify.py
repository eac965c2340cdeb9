"""Reversible against stored execution, on the user's own model, data, dtype and device.

    stored        one step with memory="store", twice: does it repeat itself?
    reversible    the same step as it will be trained
    watched       a forward that runs every branch again and compares each reconstructed state
    judged        what differs, where it comes from, what to do about it

Only if the gradients differ more runs: stored execution differentiated at the reconstructed states.
If that gives the gradients of reversible execution, the executor did what it should, and the
difference is what the rounding of the reconstructed states does to this network: nothing to worry
about where they are as exact as their dtype (a sign turned around in front of a ReLU, a tie in a
max-pooling), a loss of digits where they are not.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from .errors import OptionError
from .evidence import Evidence, Precision, Step, Unsteady, chain_errors
from .findings import Verification
from .inputs import bind, split
from .judgement import judge
from .module import Memory, RewiredModule
from .piecewise import Numbering, PiecewiseModule, pieces_of
from .program import calls_made_by
from .runtime import ChainCall
from .snapshot import Snapshot, changed
from .text import shorten
from .trial import Pinned, Trial, Watched

Loss = Callable[[Any], torch.Tensor]


def verify(
    rev: nn.Module,
    example_inputs: Any,
    *,
    loss: Loss | None = None,
    tolerance: float | None = None,
    input_gradients: bool = True,
) -> Verification:
    """Compare reversible with stored execution of one training step, in the mode ``rev`` is in.

    Call it as you train: under your autocast, on your device, with a batch of your data. Stored
    execution must fit into memory; beyond it the stream states are kept once, and one block's
    activations. Parameters, gradients, buffers, flags, random states and ``rev.memory`` are as
    before afterwards, also after an error; what the forward does to its own parameters, or inside
    Python containers, is done, as by any forward. Hooks on modules and tensors run as in any step.

    Args:
        rev: what `re2fx.transform` returned.
        example_inputs: a tuple of positional arguments, a dict of keyword arguments, or one
            argument.
        loss: from the model's output to a scalar tensor; by default a fixed random weighting of
            every floating-point tensor in the output.
        tolerance: relative error allowed in outputs, gradients and reconstructed states; by default
            1e-9 in fp64, 1e-4 in fp32, 1e-2 in fp16 and 5e-2 in bf16, the dtypes of autocast
            included.
        input_gradients: differentiate every floating-point input; False differentiates those that
            require it.

    Returns:
        the verdict with its findings, gradients and reconstruction errors; print it.

    Raises:
        OptionError: ``rev`` is not rewired, or the loss is not a scalar that can be differentiated.
        ConditioningError: ``rev`` has a coupling that cannot be reversed.
    """
    if not isinstance(rev, (RewiredModule, PiecewiseModule)):
        raise OptionError(
            f"{type(rev).__name__} is not rewired, so there is nothing to verify. Pass what "
            "re2fx.transform returned (of a wrapped or compiled module, the one inside)."
        )
    subject = Subject(rev, example_inputs, loss or weighted, input_gradients)
    with subject.borrowed():
        evidence = subject.examine(Precision.of(rev, subject.leaves, tolerance))
        return Verification(
            subject.name,
            f"{'train' if rev.training else 'eval'} mode, {subject.device}, {evidence.precision}",
            evidence.precision.tolerance,
            judge(evidence),
            evidence.output_error,
            evidence.gradient_errors(evidence.reversible),
            chain_errors(evidence),
        )


class Subject:
    """A rewired module with the data of one step."""

    def __init__(
        self,
        rev: RewiredModule | PiecewiseModule,
        example_inputs: Any,
        loss: Loss,
        input_gradients: bool,
    ) -> None:
        self.rev, self.loss = rev, loss
        self.name, self._signature = entrance(rev)
        self.chains = Numbering(rev)
        self.parameters = {n: p for n, p in rev.named_parameters() if p.requires_grad}
        self._arguments = bind(self.name, self._signature, *split(example_inputs))
        self._every = input_gradients
        self.leaves = tensors_in(self._arguments)
        tensors = [*self.leaves, *rev.parameters(), *rev.buffers()]
        self._devices = {tensor.device for tensor in tensors}
        self.device = shorten(sorted({device.type for device in self._devices}))
        self.trials: list[Trial] = []
        self.calls = 0

    @contextmanager
    def borrowed(self) -> Iterator[None]:
        """Everything is put back when the block ends."""
        memories = [(piece, piece.memory) for piece in pieces_of(self.rev).values()]
        constants = {
            f"{number}.{name}": value
            for number, (piece, _) in enumerate(memories)
            for name, value in piece._live._constants.items()
        }
        model = self.rev._live._model if isinstance(self.rev, RewiredModule) else self.rev
        self.snapshot = Snapshot(model, constants, self._devices)
        try:
            with torch.inference_mode(False), torch.enable_grad():
                yield
        finally:
            self.snapshot.restore()
            for piece, memory in memories:
                piece._run_as(memory)
            torch.clear_autocast_cache()  # weights cast here belong to no later step

    def examine(self, precision: Precision) -> Evidence:
        """Run what is needed to judge."""
        self.rev.memory = "reversible"  # raises if it cannot be
        stored = self.step("store")
        unsteady = Unsteady.of(stored, self.step("store"), precision)
        reversible = self.attempt("reversible")
        self.watch(reversible)
        trials = tuple(self.trials)
        evidence = Evidence(
            precision, self.chains.locations, stored, reversible, trials, unsteady, self.calls
        )
        if evidence.unexplained and evidence.reconstructed:
            evidence.pinned = self.pinned()
        return evidence

    def step(self, memory: Memory, calls: AbstractContextManager[Any] | None = None) -> Step:
        """One forward and backward from the state at the beginning."""
        with calls or nullcontext():
            output, leaves = self.forward(memory)
        step = Step([x.detach() for x in tensors_in(output)])
        value = self.loss(output)
        if not isinstance(value, torch.Tensor) or value.numel() != 1 or not value.requires_grad:
            raise OptionError(
                "the loss must be one number that depends on a parameter or an input that "
                f"requires a gradient, not {_described(value)}. Pass loss= from the model's output "
                "to a scalar tensor."
            )
        wanted = {**self.parameters, **leaves}
        del output, leaves
        with self.outside_autocast():
            found = torch.autograd.grad(value, list(wanted.values()), allow_unused=True)
        step.gradients = dict(zip(wanted, found, strict=True))
        step.state, step.random = self.snapshot.values(), self.snapshot.random_states()
        return step

    def attempt(self, memory: Memory, calls: AbstractContextManager[Any] | None = None) -> Step:
        """A step whose failure is a finding: stored execution went through."""
        try:
            return self.step(memory, calls)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a rerun may raise whatever a branch can raise
            return Step([], error=error.with_traceback(None))  # whose frames hold activations

    def pinned(self) -> Step:
        """Stored execution with each branch differentiated at its reconstructed input."""
        waiting = list(self.trials)  # a step makes its calls in one order

        def make(number: int, root: Any, *starts: torch.Tensor) -> ChainCall:
            number = self.chains.of(root, number)
            place = next((i for i, trial in enumerate(waiting) if trial.number == number), None)
            if place is None:
                return ChainCall(root, *starts)
            return Pinned(waiting.pop(place).inputs, root, *starts)

        return self.attempt("store", calls_made_by(make))

    def watch(self, reversible: Step) -> None:
        """A forward whose chains examine themselves; it may fail as the reversible step failed."""

        def make(number: int, root: Any, *starts: torch.Tensor) -> ChainCall:
            if root not in self.chains:  # a rewired module inside another
                return ChainCall(root, *starts)
            number, self.calls = self.chains.of(root, number), self.calls + 1
            return Watched(number, self.why, self.trials, root, *starts)

        try:
            with calls_made_by(make):
                self.forward("reversible")
        except torch.OutOfMemoryError:
            raise
        except Exception:
            self.calls = -1  # nobody knows how many there would have been
            if reversible.error is None:
                raise

    def forward(self, memory: Memory) -> tuple[Any, dict[str, torch.Tensor]]:
        """The output from the state at the beginning, and the inputs that get gradients."""
        self.snapshot.restore()
        torch.clear_autocast_cache()
        self.rev.memory = memory
        leaves: dict[str, torch.Tensor] = {}

        def fresh(path: Any, value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            leaf = value.detach().clone()
            if value.requires_grad or (self._every and leaf.is_floating_point()):
                leaves[f"input {_named(path)}"] = leaf.requires_grad_()
                leaf = leaf.clone()  # the model may write to its input, but not to a leaf
            return leaf

        values = pytree.tree_map_with_path(fresh, self._arguments)
        given = inspect.BoundArguments(self._signature, values)
        return self.rev(*given.args, **given.kwargs), leaves

    def why(self, run: Callable[[], Any]) -> str:
        """What running a branch again moves."""
        values, states = self.snapshot.values(), self.snapshot.random_states()
        run()
        drawn = changed(states, self.snapshot.random_states())
        if drawn:
            return f"it draws from {shorten(drawn)}"
        moved = changed(values, self.snapshot.values())
        return f"it changes {shorten(moved)}" if moved else ""

    @contextmanager
    def outside_autocast(self) -> Iterator[None]:
        """A backward runs in the dtypes its forward chose."""
        with ExitStack() as stack:
            for kind in {"cpu", *(device.type for device in self._devices)} - {"meta"}:
                stack.enter_context(torch.autocast(kind, enabled=False))
            yield


def entrance(rev: RewiredModule | PiecewiseModule) -> tuple[str, inspect.Signature]:
    """The name of a model's class, and the arguments it takes."""
    if isinstance(rev, RewiredModule):
        return rev._inputs.owner, rev._inputs.signature
    return type(rev).__name__, inspect.signature(rev.forward)


def weighted(output: Any) -> torch.Tensor:
    """The default loss: every output entry with a weight of its own, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    terms = []
    for tensor in tensors_in(output):
        real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        if real.is_floating_point() and real.requires_grad:
            wide = real.to(torch.promote_types(real.dtype, torch.float32))
            weights = torch.randn(real.shape, generator=generator, dtype=wide.dtype)
            terms.append((wide * weights.to(wide.device)).sum())
    if not terms:
        raise OptionError(
            "no tensor in the model's output requires a gradient; pass loss= from the model's "
            "output to a scalar tensor"
        )
    total = terms[0]
    for term in terms[1:]:
        total = total + term.to(total)
    return total


def tensors_in(value: Any) -> list[torch.Tensor]:
    """The tensors of arguments or results."""
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _named(path: Any) -> str:
    """``clips[0]`` for the first clip of the argument ``clips``."""
    return f"{path[0].key}{pytree.keystr(path[1:])}"


def _described(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    grad = "a" if value.requires_grad else "no"
    return f"a tensor of {tuple(value.shape)} with {grad} gradient"
