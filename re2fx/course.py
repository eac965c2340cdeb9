"""Memory over the course of one training step: as the model is, checkpointed, and fitted.

Everything is predicted on fake tensors, so the model and its step may be larger than the machine.
The checkpointed step has ``torch.utils.checkpoint`` around the branch of every residual that is
rewired, the same pieces that the reversed chains run again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.utils.checkpoint import checkpoint

from .api import capture_model, nothing_rewired, rewire_captured, weigher
from .budget import Memory, is_planned
from .capture import Captured, Leaves
from .coupling import Coupling, Readout
from .couplings import Couplings
from .errors import OptionError
from .fixed_point import FixedPoint
from .foresight import Forecast, Foreseen, foresee, total
from .given import as_module
from .inputs import split
from .interpret import LiveInterpreter
from .memory_plan import MemoryPlan, asked, step_dict, weigh
from .module import LiveRoot, RewiredModule
from .options import Options
from .piecewise import Account, PiecewiseModule
from .pipeline import make_plan
from .plan import Plan
from .policy import Policy, Select, has_tensors
from .tables import Table, to_html, to_rich
from .tally import Region, mark_places
from .text import amount
from .wiring import DRIFT_TOLERANCE

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.figure import Figure
    from rich.console import Group
    from torch.export import ExportedProgram

COLUMNS = ("step", "highest>", "in the", "work>")


@dataclass(frozen=True)
class MemoryCourse:
    """What is alive over the course of one training step, in several ways; print or plot it.

    Attributes:
        name: the model's class.
        memory: what was asked for.
        plain: the step of the given model.
        checkpointed: with ``torch.utils.checkpoint`` around the branch of every rewired residual.
        rewired: of the rewired model with that ``memory``.
        plan: how it was fitted; None if nothing is planned.
    """

    name: str
    memory: Memory
    plain: Foreseen
    checkpointed: Foreseen
    rewired: Foreseen
    plan: MemoryPlan | None = None

    @property
    def steps(self) -> dict[str, Foreseen]:
        """The steps by what they are called."""
        way = "re2fx, planned" if is_planned(self.memory) else f"re2fx, {self.memory}"
        return {"plain": self.plain, "checkpointed": self.checkpointed, way: self.rewired}

    def _table(self) -> Table:
        rows = tuple(
            (name, amount(step.peak.peak), step.phase, f"{weigh(step) / weigh(self.plain):.2f}")
            for name, step in self.steps.items()
        )
        return Table("Predicted, at the highest", COLUMNS, rows)

    @property
    def headline(self) -> str:
        """What was asked for."""
        return f"{self.name}: {asked(self.memory)}"

    def __str__(self) -> str:
        table = "\n".join(self._table().to_text().splitlines()[1:])
        return f"{self.headline}\n\n{table}" if self.plan is None else f"{self.plan}\n\n{table}"

    def tables(self) -> Iterator[Table]:
        """The steps, and how the last one was fitted."""
        if self.plan is not None:
            yield from self.plan.tables()
        yield self._table()

    def to_dict(self, timeline: bool = False) -> dict[str, Any]:
        """Plain data, ready for JSON.

        Args:
            timeline: include the bytes after every change.
        """
        return {
            "model": self.name,
            "memory": self.memory,
            "plain": step_dict(self.plain, timeline),
            "checkpointed": step_dict(self.checkpointed, timeline),
            "rewired": step_dict(self.rewired, timeline),
            "plan": None if self.plan is None else self.plan.to_dict(timeline),
        }

    def __rich__(self) -> Group:
        head = self.headline if self.plan is None else "\n".join(self.plan.heading)
        return to_rich(head, self.tables())

    def _repr_html_(self) -> str:
        return to_html(self.headline, self.tables())

    def plot(self, path: str | Path | None = None) -> Figure:
        """What is alive over the course of the step, in each way.

        Args:
            path: where to write the picture, as ``.png``, ``.svg`` or ``.pdf``.

        Raises:
            OptionError: matplotlib is not installed.
        """
        from .course_chart import plot

        budget = self.memory if isinstance(self.memory, int) else None
        return plot(f"{self.name}: memory over the course of one step", self.steps, budget, path)


def memory_course(
    model: nn.Module | ExportedProgram,
    example_inputs: Any,
    *,
    memory: Memory = "lowest",
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
) -> MemoryCourse:
    """Predict what is alive over the course of one training step: plain, checkpointed, rewired.

    Nothing is run or allocated, as in `re2fx.foresee`. A model in eval mode is taken in train mode.

    Args:
        model: as for `transform`; it is not changed.
        example_inputs: as for `transform`; tensors may be on ``meta`` or fake.
        memory: as for `transform`.
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

    Raises:
        OptionError: an argument has a value it cannot take.
        BudgetError: the budget is below what a step takes at the least.
        CaptureError: the model cannot be captured as a whole, or what it allocates depends on the
            values of tensors.
        NoResidualError: nothing in it can be rewired.
    """
    if isinstance(model, (RewiredModule, PiecewiseModule)):
        raise OptionError(f"{type(model).__name__} is rewired already; give what it was made of")
    if not has_tensors(example_inputs):
        raise OptionError("example_inputs holds no tensor: memory depends on the inputs' shapes")
    model = as_module(model)
    policy = Policy(select, min_chain, min_saving)
    how = coupling or Coupling.re2tal(), readout, activation, memory
    options = Options(*how, policy, exact, drift_tolerance)
    captured = capture_model(model, example_inputs, options, leaves, capture)
    part = rewire_captured(model, example_inputs, captured, options, leaves)
    if part.module is None:
        nothing_rewired(model, part.plan, captured, True, Account())
    assert part.module is not None, "else an error was raised"
    args, kwargs = split(example_inputs)
    weigh_chains = weigher(model, example_inputs, captured, activation)
    flow, plan = make_plan(captured.train, model, activation, leaves, options.policy, weigh_chains)
    with _training(model):
        fitted = part.module.plan_memory(*args, **kwargs) if is_planned(options.memory) else None
        return MemoryCourse(
            type(model).__name__,
            options.memory,
            foresee(model, example_inputs),
            _checkpointed(model, example_inputs, captured, flow.graph, plan),
            foresee(part.module, example_inputs) if fitted is None else fitted.predicted,
            fitted,
        )


@contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    """A model in train mode; one that is in it already stays as it is."""
    flags = {module: module.training for module in model.modules()}
    try:
        if not model.training:
            model.train()
        yield
    finally:
        for module, flag in flags.items():
            module.training = flag


def _checkpointed(
    model: nn.Module, example_inputs: Any, captured: Captured, graph: Graph, plan: Plan
) -> Foreseen:
    """A step of the model as captured, with a checkpoint around the branch of every residual."""
    args, kwargs = split(example_inputs)
    forecast = Forecast(model, (captured.inputs.flatten(args, kwargs), captured.constants))
    given, fakes = forecast.given
    regions = mark_places(graph, model, plan)

    def forward() -> Tensor:
        walker = _Checkpoints(LiveRoot(forecast.twin, fakes), graph, regions)
        result = walker.run(*given)
        walker.env.clear()  # the backward holds the walker
        return total(result)

    return forecast.step(forward)[0]


class _Checkpoints(LiveInterpreter):
    """Runs a graph with some of its nodes under checkpoints.

    Args:
        root: what the graph's targets are looked up on.
        graph: any graph.
        regions: branches, each of which is run as one call at its last node.
    """

    def __init__(self, root: Any, graph: Graph, regions: Sequence[Region]) -> None:
        super().__init__(root, graph)
        self.garbage_collect_values = False  # done here: a region is run later than written
        self._regions = {region.nodes[-1]: region for region in regions if region.nodes}
        self._deferred = {node for region in regions for node in region.nodes}

    def run_node(self, n: Node) -> Any:
        """Run a node, or a whole region at its last node."""
        if n in self._regions:
            return self._run_region(self._regions[n])
        if n in self._deferred:
            return None
        result = super().run_node(n)
        self._free([n])
        return result

    def _free(self, nodes: Sequence[Node]) -> None:
        for node in nodes:
            for value in self.user_to_last_uses.get(node, ()):
                self.env.pop(value, None)

    def _run_region(self, region: Region) -> Any:
        result = checkpoint(
            lambda *values: self._branch(region, values),
            *[self.env[node] for node in region.reads],
            use_reentrant=False,
        )
        self._free(region.nodes)
        return result

    def _branch(self, region: Region, values: Sequence[Any]) -> Any:
        """The values of a region's last node; in the backward there is no other value any more."""
        others, self.env = self.env, dict(zip(region.reads, values, strict=True))
        try:
            for node in region.nodes:
                self.env[node] = super().run_node(node)
                if node is not region.nodes[-1]:
                    self._free([node])
            return self.env[region.nodes[-1]]
        finally:
            self.env = others
