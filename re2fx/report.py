"""What training a model keeps for its backward: as it is, checkpointed, and reversed.

route     capture, plan and rewire the model, or the reason why not
predict   run it each way on fake tensors: nothing is computed, nothing is allocated
assemble  gather what is kept by chain, and outside the chains by module
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from .api import capture_model, weigher
from .capture import Captured, Leaves
from .columns import Found, Loss, Route, Run, in_training, measured_kept, nbytes, predict
from .conditioning import anchored, check_conditioning
from .consistency import agree
from .coupling import Coupling, Readout
from .couplings import Couplings
from .errors import InputError, OptionError, Re2fxError
from .fake import Fakes, fake_twin
from .fixed_point import FixedPoint
from .footprint import ChainBytes, Kept, Report
from .given import as_module
from .inputs import split
from .module import RewiredModule
from .options import Options
from .parts import part_rows
from .piecewise import PiecewiseModule
from .pipeline import make_plan, rewire_plan
from .plan import Plan
from .policy import Policy, Select
from .tally import Place, mark_places
from .text import count, render_misses
from .wiring import DRIFT_TOLERANCE

if TYPE_CHECKING:
    from torch.export import ExportedProgram


def report(
    model: nn.Module | ExportedProgram,
    example_inputs: Any,
    *,
    measure: bool = False,
    loss: Loss | None = None,
    coupling: Couplings | None = None,
    readout: Readout = "mean",
    activation: str = "branch",
    exact: bool | FixedPoint = False,
    leaves: Leaves = (),
    capture: str = "auto",
    select: Select | None = None,
    min_chain: int = 2,
    min_saving: int | float | None = None,
    drift_tolerance: float = DRIFT_TOLERANCE,
) -> Report:
    """Predict what training keeps for the backward, without running or allocating the model.

    Autocast that is active counts. A model in eval mode is taken in train mode; in one in train
    mode the flags of its submodules stay as they are. Forward hooks run, on a copy of the model and
    on tensors without data.

    Args:
        model: as for `transform`; it is not changed. One on ``meta``, or on a device that
            this machine lacks, is taken to be on the CPU.
        example_inputs: as for `transform`; tensors may be on ``meta`` or fake.
        measure: also run it for real, and report what was kept then.
        loss: called with the model's result; what it keeps is listed as ``loss``.
        coupling: as for `transform`.
        readout: as for `transform`.
        activation: as for `transform`.
        exact: as for `transform`.
        leaves: as for `transform`.
        capture: as for `transform`.
        select: as for `transform`.
        min_chain: as for `transform`.
        min_saving: as for `transform`.
        drift_tolerance: as for `transform`.

    Returns:
        a `Report` in bytes. If nothing can be rewired it has the plain column and the reason.

    Raises:
        OptionError: an argument has a value it cannot take.
        InputError: the inputs do not fit the model.
        CaptureError: what the model keeps depends on the values of tensors.
    """
    model = as_module(model)
    policy = Policy(select, min_chain, min_saving)
    if coupling is None:
        coupling = Coupling.re2tal()
    options = Options(coupling, readout, activation, "reversible", policy, exact, drift_tolerance)
    _check(model, example_inputs, measure)
    route = _route(model, example_inputs, options, leaves, capture)
    fakes = Fakes()
    twin = in_training(fake_twin(model, fakes))
    arguments = fakes.tree(split(example_inputs))
    found = predict(Run(twin, arguments, route.with_constants(fakes), loss), fakes)
    measured = measured_kept(model, split(example_inputs), route, loss) if measure else None
    return _assemble(model, arguments, route, found, measured)


def _check(model: nn.Module, example_inputs: Any, measure: bool) -> None:
    """What no report can be made of."""
    if isinstance(model, (RewiredModule, PiecewiseModule)):
        raise OptionError(
            f"{type(model).__name__} is rewired already; report the model it was made of"
        )
    tensors = [x for x in pytree.tree_leaves(example_inputs) if isinstance(x, torch.Tensor)]
    if not tensors:
        raise OptionError(
            "example_inputs holds no tensor: what is kept depends on the inputs' shapes. Pass "
            "tensors of the shape you train with; those on device='meta' take no memory."
        )
    members = [*model.parameters(), *model.buffers()]
    lazy = [x for x in members if nn.parameter.is_lazy(x)]
    if lazy:
        raise OptionError(
            f"{type(model).__name__} has parameters without a shape yet; run it once before"
        )
    if measure and any(not _has_data(tensor) for tensor in (*tensors, *members)):
        raise OptionError("measure=True runs the model, which a tensor on 'meta' cannot; leave it")


def _has_data(tensor: torch.Tensor) -> bool:
    from torch._subclasses.fake_tensor import FakeTensor

    return tensor.device.type != "meta" and not isinstance(tensor, FakeTensor)


# how the model can be rewired


def _route(
    model: nn.Module, example_inputs: Any, options: Options, leaves: Leaves, capture: str
) -> Route:
    """Go as far as the model lets one; every way that ends has its reason."""
    try:
        captured = capture_model(model, example_inputs, options, leaves, capture)
    except (InputError, OptionError):
        raise
    except Re2fxError as error:
        return Route(reason=str(error))
    weigh = weigher(model, example_inputs, captured, options.activation)
    plan_graph = partial(
        make_plan,
        model=model,
        activation=options.activation,
        leaves=leaves,
        policy=options.policy,
        weigh=weigh,
    )
    flow, plan = plan_graph(captured.train)
    regions = mark_places(flow.graph, model, plan)
    reason, rewired = "", None
    if not plan.chains:
        reason = _nothing(plan, captured)
    else:
        try:
            eval_flow, eval_plan = plan_graph(captured.eval)
            agree(type(model).__name__, plan, eval_plan)
            train = rewire_plan(flow, plan, options)
            check_conditioning(model, train.wirings)
            rewired = (train, rewire_plan(eval_flow, eval_plan, options, False))
        except Re2fxError as error:
            reason = str(error)
    return Route(plan, captured, flow.graph, regions, rewired, None, reason)


def _nothing(plan: Plan, captured: Captured) -> str:
    """Why a plan has no chain."""
    kept = "".join(f"; {path} is kept whole ({why})" for path, why in captured.leaves.items())
    kept += "".join(f"; {route} failed ({why})" for route, why in captured.failures.items())
    if not plan.refusals:
        misses = "; ".join(line.strip() for line in render_misses(plan.misses))
        return f"no skip-add was found: {misses}{kept}"
    first = plan.refusals[0]
    return (
        f"{count(len(plan.refusals), 'skip-add')} found, all refused; {first.rule} at "
        f"{first.location}: {first.sentence}{kept}"
    )


# putting it together


def _assemble(
    model: nn.Module, arguments: Any, route: Route, found: Found, measured: Kept | None
) -> Report:
    """The figures as a report."""
    parameters, buffers = list(model.parameters()), list(model.buffers())
    tensors = [x for x in pytree.tree_leaves(arguments) if isinstance(x, torch.Tensor)]
    refused = Counter(refusal.rule for refusal in route.plan.refusals)
    return Report(
        name=type(model).__name__,
        inputs=tuple(f"{'x'.join(map(str, x.shape))} {_name(x.dtype)}" for x in tensors),
        mode="train",
        dtype=_dtypes(parameters, {x.device.type for x in tensors}),
        parameters=nbytes(parameters),
        buffers=nbytes(buffers),
        gradients=sum(x.nbytes for x in parameters if x.requires_grad),
        output=found.output,
        chains=tuple(_chain_row(number, route, found) for number in range(len(route.plan.chains))),
        parts=part_rows(found.store, found.checkpoint, found.reversible),
        reason=route.reason or found.reason,
        refused=tuple(sorted(refused.items())),
        untold=found.untold,
        measured=measured,
    )


def _chain_row(number: int, route: Route, found: Found) -> ChainBytes:
    chain, state = route.plan.chains[number], found.states.get(number)
    stored = Counter({p: n for p, n in found.store.items() if p.chain == number})
    per_branch: Counter[int] = Counter()
    for place, size in stored.items():
        per_branch[place.residual] += size
    return ChainBytes(
        number=number,
        first=chain.residuals[0].location.module,
        last=chain.residuals[-1].location.module,
        residuals=len(chain),
        kept=Kept(
            stored.total(), _of_chain(found.checkpoint, number), _of_chain(found.reversible, number)
        ),
        state=0 if state is None else state.nbytes,
        dtype="" if state is None else _name(state.dtype),
        branch=max(per_branch.values(), default=0),
        anchors=_anchors(number, route, state),
        bits=_bits(number, route),
    )


def _bits(number: int, route: Route) -> int:
    """How many bits of each element reversing keeps at a block."""
    if route.rewired is None:
        return 0
    return max(block.coupling.bits for block in route.rewired[0].wirings[number].blocks)


def _anchors(number: int, route: Route, state: torch.Tensor | None) -> int:
    """How often reversing keeps a pair of states in the middle of a chain."""
    if route.rewired is None or state is None:
        return 0
    kept = anchored(route.rewired[0].wirings[number])
    return sum(state.dtype.to_real() in dtypes for dtypes in kept)


def _of_chain(column: Counter[Place] | None, number: int) -> int | None:
    if column is None:
        return None
    return sum(size for place, size in column.items() if place.chain == number)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtypes(parameters: list[nn.Parameter], devices: set[str]) -> str:
    names = " and ".join(sorted({_name(x.dtype) for x in parameters})) or "no parameters"
    for device in sorted(devices):
        if torch.is_autocast_enabled(device):
            names += f", autocast {_name(torch.get_autocast_dtype(device))}"
    return names
