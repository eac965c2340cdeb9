"""Fits a training step into memory: which frames are stored, reversed, checkpointed, and in slices.

Every candidate is a program, and every program's step is run on fake tensors to see its peak
(`re2fx.foresight`); nothing is estimated by formula. Candidates lie on a line, for each number of
slices: everything that can be a frame is one, and then, frame by frame, what is dearest to run
again per byte is stored instead. A chain stores its last blocks, since what is undone must end in
front of them; they are also the first that a backward frees.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from .budget import Memory
from .codegen import compile_graph
from .errors import BudgetError, CaptureError
from .example_values import example_values
from .foresight import Forecast, Foreseen, total
from .frames import Framed, Frames, blocks, bodies, checkpoints, framed
from .framing import Framing
from .memory import storage_key
from .memory_plan import OPERATIONS, told, weigh
from .memory_plan import MemoryPlan as MemoryPlan
from .program import Leave, Program, RunBlock, record
from .runtime import ChainCall
from .sizes import nbytes
from .text import amount

SLICES = (4, 16)
APART = 0.5
FULL = 0.98  # of a budget is as good as all of it
AMPLE = 1.5  # times what frames run whole take: slices would not let much more be stored
ENOUGH = 0.05  # more slices must shrink the peak by this share


class Level(NamedTuple):
    """How frames are brought back: see `Frames`."""

    slices: int = 1
    apart: float = 0


@dataclass(frozen=True)
class Unit:
    """A frame that may be stored instead of run again, or a state that may be kept.

    Attributes:
        step: its place in the program.
        chain: of a block; -1 outside the chains.
        cost: what that spares, in floating-point operations.
        kept: bytes that it takes.
        state: whether it is the state in front of a block.
    """

    step: int
    chain: int
    cost: float
    kept: int
    state: bool = False


class Planner:
    """Chooses the frames of one program.

    Args:
        program: every part of it that can be a frame is one.
        forecast: predicts steps.
        run: ``run(program)`` runs the forward of one on fake tensors and returns a loss.
        root: what the program's targets are looked up on.
        name: of the model, for messages.
    """

    def __init__(
        self,
        program: Program,
        forecast: Forecast,
        run: Callable[..., torch.Tensor],
        root: Any,
        name: str,
    ) -> None:
        self.program, self.forecast, self.run = program, forecast, run
        self.root, self.name = root, name
        self.blocks = blocks(program)
        device = next(forecast.twin.parameters(), torch.empty(0)).device.type
        self._per_byte = OPERATIONS.get(device, OPERATIONS["cpu"])
        self.frames = frozenset(checkpoints(program))
        self._seen: dict[Frames, Foreseen] = {}
        self._where: dict[Frames, str] = {}
        self._found: list[Level] | None = None
        self._kept: dict[int, int] = {}  # by step, if it is stored
        self.all_stored = Frames(tuple(self.blocks), frozenset())
        self.units = self._ordered()

    def plan(self, memory: Memory) -> MemoryPlan:
        """The cheapest frames that fit.

        Raises:
            BudgetError: none do.
        """
        frames = self._lowest() if memory == "lowest" else self._within(int(memory))
        return MemoryPlan(
            memory,
            frames,
            self.foresee(frames),
            self.foresee(self.all_stored),
            self._where[frames],
            self.name,
            *told(self.program, frames, self._kept),
        )

    def foresee(self, frames: Frames) -> Foreseen:
        """A step with frames of some kinds."""
        if frames not in self._seen:
            program = framed(self.program, frames)
            self._seen[frames], self._where[frames] = self.forecast.step(lambda: self.run(program))
        return self._seen[frames]

    def _peak(self, frames: Frames) -> int:
        return self.foresee(frames).peak.peak

    def _line(self, stored: int, level: Level) -> Frames:
        """The candidate of a level that stores so many of the units."""
        stores = [unit for unit in self.units[:stored] if not unit.state]
        states = {unit.step for unit in self.units[:stored] if unit.state}
        chains = tuple(sum(u.chain == chain for u in stores) for chain in range(len(self.blocks)))
        again = self.frames.difference(unit.step for unit in stores)
        return Frames(chains, again | states, *level)

    def _lowest(self) -> Frames:
        """Everything a frame, in as many slices as still make a difference."""
        return self._line(0, self._levels()[-1])

    def _within(self, budget: int) -> Frames:
        """The least work within a budget."""
        if self._peak(self.all_stored) <= budget:
            return self.all_stored
        simple = self._line(0, Level())
        ample = budget >= AMPLE * self._peak(simple)
        if not ample and self._peak(self._lowest()) > budget:
            raise BudgetError(self._too_small(budget))
        found = []
        for level in [Level()] if ample else self._levels():
            stored = self._most_stored(budget, level)
            if stored is not None:
                found.append(self._line(stored, level))
            if len(found) == 2:
                break
        least = min(weigh(self.foresee(frames)) for frames in found)
        return next(f for f in found if weigh(self.foresee(f)) <= least * (1 + ENOUGH))

    def _most_stored(self, budget: int, level: Level) -> int | None:
        """How many units can be stored within a budget; None if it is too small for none."""
        if self._peak(self._line(0, level)) > budget:
            return None
        low, high = 0, len(self.units)
        while low < high and self._peak(self._line(low, level)) < budget * FULL:
            guess = self._guess(low, high, budget - self._peak(self._line(low, level)))
            if self._peak(self._line(guess, level)) <= budget:
                low = guess
            else:
                high = guess - 1
        return low

    def _guess(self, low: int, high: int, room: int) -> int:
        """How many units fill some room, if each takes what it keeps; one more than ``low``."""
        sizes = accumulate(unit.kept for unit in self.units[low:high])
        return low + max(1, sum(size <= room for size in sizes))

    def _levels(self) -> list[Level]:
        """Ways to shrink what a frame needs while it is brought back, each lower than the last."""
        if self._found is None:
            self._found = levels = [Level()]
            most = 2 * self._most_slices()
            for slices in SLICES:
                if slices > most or not self._is_lower(Level(slices), levels[-1]):
                    break
                levels.append(Level(slices))
            apart = levels[-1]._replace(apart=APART)
            if self._has_parts() and self._is_lower(apart, levels[-1]):
                levels.append(apart)
        return self._found

    def _is_lower(self, level: Level, than: Level) -> bool:
        peaks = [self._peak(self._line(0, one)) for one in (level, than)]
        return peaks[0] <= peaks[1] * (1 - ENOUGH)

    def _has_parts(self) -> bool:
        """Whether a large frame has several parts that run at once."""
        found = bodies(self.program)
        large = APART * max((body.made for body in found), default=0)
        plain = (sum(p.slicing is None for p in body.parts) for body in found if body.made >= large)
        return any(number > 1 for number in plain)

    def _most_slices(self) -> int:
        parts = (part for body in bodies(self.program) for part in body.parts)
        return max((part.slicing.slices for part in parts if part.slicing), default=1)

    def _too_small(self, budget: int) -> str:
        lowest = self._lowest()
        where = self._where[lowest]
        return (
            f"{self.name}: a budget of {amount(budget)} is below the least that one training step "
            f"can take, {amount(self._peak(lowest))} (memory='lowest'). At its highest it is in "
            f"the {self.foresee(lowest).phase}{where and ', at ' + where}. Use smaller inputs or a "
            "larger budget; if you train under autocast, call transform in it."
        )

    # what storing a frame takes, and what it spares

    def _ordered(self) -> list[Unit]:
        """All units, those first that spare most work per byte; chains are stored from the end."""
        units = self._profile()
        chains = {
            chain: sorted((u for u in units if u.chain == chain and not u.state), key=_from_end)
            for chain in range(len(self.blocks))
        }
        single = [[unit] for unit in units if unit.chain < 0 or unit.state]
        waiting = single + [chain for chain in chains.values() if chain]
        ordered: list[Unit] = []
        while waiting:
            best = max(waiting, key=_merit)
            ordered.append(best.pop(0))
            waiting = [units for units in waiting if units]
        return ordered

    def _profile(self) -> list[Unit]:
        """What every unit spares and takes, read off one stored forward."""
        program, units = framed(self.program, self.all_stored), list[Unit]()
        count = _Count(self.forecast, self._per_byte)

        def after(index: int) -> None:
            spent, tail, kept = count.since_last()
            step = self.program.steps[index]
            self._kept[index] = kept
            if isinstance(step, RunBlock):
                units.append(Unit(index, step.chain, spent, kept))
                units.append(Unit(index, step.chain, tail, 0, state=True))
            elif index in self.frames:
                units.append(Unit(index, -1, spent, kept))

        def forward() -> torch.Tensor:
            with saved_tensors_hooks(count.pack, _same), record() as calls:
                result = self.run(program, after)
            ends = [step.chain for step in program.steps if isinstance(step, Leave)]
            own = (_state_size(call) for call in calls if call.root is self.root)
            sizes.update(zip(ends, own, strict=True))
            return result

        sizes: dict[int, int] = {}
        step = self.forecast.step(forward)
        self._seen[self.all_stored], self._where[self.all_stored] = step
        first = {u.chain: u.step for u in reversed(units) if u.chain >= 0}
        return [
            replace(unit, kept=sizes[unit.chain]) if unit.state else unit
            for unit in units
            if not (unit.state and unit.step == first[unit.chain])
        ]


class _Count:
    """Work done and bytes kept between the steps of a program.

    Args:
        forecast: whose meter counts the work.
        per_byte: operations in the time of one byte moved.
    """

    def __init__(self, forecast: Forecast, per_byte: float) -> None:
        self._forecast, self._per_byte = forecast, per_byte
        self._seen = set(forecast.members)
        self._kept, self._before, self._last = 0, 0.0, 0.0

    @property
    def _work(self) -> float:
        meter = self._forecast.meter
        return meter.flops + self._per_byte * meter.moved

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        """Note a tensor that is saved."""
        key = storage_key(tensor)
        if key not in self._seen:
            self._seen.add(key)
            self._kept += tensor.untyped_storage().nbytes()
        self._last = self._work
        return tensor.detach()  # else what saves its own result would never go

    def since_last(self) -> tuple[float, float, int]:
        """Work done, of it behind the last saved tensor, and bytes kept, since it was asked."""
        work = self._work
        found = work - self._before, work - max(self._last, self._before), self._kept
        self._before, self._kept = work, 0
        return found


def _state_size(call: ChainCall) -> int:
    return nbytes(call.states)


def _from_end(unit: Unit) -> int:
    return -unit.step


def _merit(units: Sequence[Unit]) -> float:
    """Work spared per byte by storing the next unit; of a chain, by all that are left of it."""
    return sum(unit.cost for unit in units) / max(1, sum(unit.kept for unit in units))


def plan_frames(
    live: Any,
    variant: Any,
    mode: bool,
    inputs: Sequence[Any],
    memory: Memory,
    executors: Any,
) -> tuple[Framed, MemoryPlan]:
    """Plan the frames of a rewired network for one way of calling it.

    Args:
        live: what its graphs look their targets up on.
        variant: the network as captured.
        mode: train or eval.
        inputs: the placeholders' values in a call; what is planned holds for other sizes too, but
            is predicted for theirs.
        memory: ``"lowest"`` or a budget in bytes.
        executors: what runs the graph.

    Raises:
        BudgetError: the budget is below what a step takes at the least.
        CaptureError: what the model allocates depends on the values of tensors.
    """
    rewired = variant.settled(mode, live._model, executors)
    try:
        with saved_tensors_hooks(_same, _same):  # those around the call are not for this
            return _plan(live, variant, rewired, inputs, memory, executors)
    except CaptureError as error:
        raise CaptureError(f"{error} Or use memory='reversible', which is not planned.") from error


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _plan(
    live: Any, variant: Any, rewired: Any, inputs: Sequence[Any], memory: Memory, executors: Any
) -> tuple[Framed, MemoryPlan]:
    """As `plan_frames`."""
    forecast = Forecast(live._model, (list(inputs), live._constants))
    drop_hooks(forecast.twin)
    given, constants = forecast.given
    root = type(live)(forecast.twin, constants)
    values = example_values(rewired.graph, root, given, forecast)
    framing = Framing(values, forecast.twin)
    program = executors.outline(
        rewired.graph, forecast.twin, rewired.wirings, compile_graph, framing
    )

    def run(candidate: Program, after: Callable[[int], None] | None = None) -> torch.Tensor:
        return total(candidate.run(root, given, after))

    if any(hasattr(module, "plan_memory") for module in forecast.twin.modules()):
        with forecast.running():
            run(program)  # rewired modules inside are planned at their first call
    plan = Planner(program, forecast, run, root, variant.inputs.owner).plan(memory)
    return Framed(values, plan.frames), plan


def drop_hooks(twin: nn.Module) -> None:
    """Take the hooks off that follow a module: they are the user's, and what runs is no call.

    Those in front stay, since they may compute what a module reads.
    """
    for module in twin.modules():
        for hooks in (module._forward_hooks, module._backward_hooks, module._backward_pre_hooks):
            hooks.clear()
