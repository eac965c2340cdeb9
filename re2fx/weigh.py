"""What chains would keep for the backward, predicted on fake tensors before any is rewired.

A plan must not depend on what changes from step to step, since it says what function the network
is. So chains are weighed as if every parameter were trained and no input needed a gradient, in
train mode, under the default coupling, and without the autocast that happens to be active. What
remains are the network, its dtypes and the shapes of its inputs.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.utils import _pytree as pytree

from .coupling import Coupling
from .dynamo import Lifted
from .errors import CaptureError, OptionError, Re2fxError
from .fake import Fakes, fake_twin, predicting
from .graph import Flow, copy_graph
from .inputs import InputSpec, split
from .module import LiveRoot
from .overloads import argument, overload
from .passes.cleanup import cleanup
from .passes.outline import outline
from .passes.rewire import rewire
from .plan import Chain, Plan, Weight
from .program import Leave, record
from .tally import Place, Tally, Walker, mark_places

NUMBERS = (torch.SymInt, torch.SymFloat, torch.SymBool)
Values = Callable[[Fakes], list[Any]]  # of the graph's placeholders, fake


class Weigher:
    """Weighs chains of a model's graphs.

    The graph of the other mode, asked about the same chains, gets the same answer: a model is
    rewired alike in both.

    Args:
        name: what to call the model in an error.
        root: holds the graphs' members; not changed.
        values: makes the values of the graphs' placeholders.
        constants: tensors made while tracing.
        activation: where an activation behind an addition goes.
    """

    def __init__(
        self,
        name: str,
        root: nn.Module,
        values: Values,
        constants: dict[str, Tensor],
        activation: str,
    ) -> None:
        self._name, self._root, self._values = name, root, values
        self._constants, self._activation = constants, activation
        self._known: dict[object, list[Weight]] = {}

    def __call__(self, flow: Flow, chains: Sequence[Chain]) -> list[Weight]:
        """What each of some chains keeps, as things are and rewired.

        Args:
            flow: the dataflow of the normalised graph.
            chains: chains that share no node.

        Raises:
            CaptureError: it cannot be predicted.
        """
        plan = Plan(tuple(chains))
        key = plan.signature()
        if key not in self._known:
            try:
                self._known[key] = self._weigh(flow, plan)
            except CaptureError:
                raise
            except Exception as error:  # the model's own code runs, on whatever was given
                what = f"{type(error).__name__}: {_first_line(error)}"
                if not isinstance(error, Re2fxError):
                    what = f"it does not run in train mode on the example inputs ({what})"
                raise CaptureError(f"{self._name}: {what}.") from error
        return self._known[key]

    def _weigh(self, flow: Flow, plan: Plan) -> list[Weight]:
        fakes = Fakes()
        twin = trained(fake_twin(self._root, fakes))
        held = {
            name: fakes(value) if isinstance(value, Tensor) else value
            for name, value in self._constants.items()
        }
        live = LiveRoot(twin, held)
        graph = train_mode(copy_graph(flow.graph))
        mark_places(graph, self._root, plan)
        values = self._values(fakes)
        with predicting(fakes, self._name), plain_precision(twin):
            tally = Tally(twin, values)
            with tally.watching():
                Hinted(live, graph, tally).run(*values)
            stored = by_chain(tally)
            kept = self._reversible(Flow(graph, self._root), plan, twin, live, values)
        return [Weight(stored[number], kept[number]) for number in range(len(plan.chains))]

    def _reversible(
        self, flow: Flow, plan: Plan, twin: nn.Module, live: LiveRoot, values: list[Any]
    ) -> Counter[int]:
        """Bytes by chain under the executor."""
        graph, wirings = rewire(flow, plan, Coupling.re2tal(), "mean", self._activation)
        cleanup(graph)
        tally = Tally(twin, values)

        def interpreted(part: Graph, name: str) -> Callable[..., Any]:
            return lambda root, *inputs: Hinted(root, part, tally).run(*inputs)

        program = outline(graph, self._root, wirings, interpreted)
        order = [step.chain for step in program.steps if isinstance(step, Leave)]
        with record() as calls, tally.watching():
            program.run(live, values)
        for number, call in zip(order, calls, strict=True):
            tally.keep_first(call.kept(), Place("chain", chain=number))
        return by_chain(tally)


class Hinted(Walker):
    """A walker that takes numbers in a graph from Dynamo for what they are this time.

    Besides sizes those are Python's floats: with ``dynamic=True`` Dynamo makes tensors of them and
    asks for their values in the graph.
    """

    def run_node(self, n: Node) -> Any:
        """Run a node, or say the number it stands for."""
        value = n.meta.get("example_value")
        if n.op != "placeholder" and isinstance(value, NUMBERS):
            return hint(value)
        return super().run_node(n)


def weigh_model(
    model: nn.Module,
    example_inputs: Any,
    inputs: InputSpec,
    constants: dict[str, Tensor],
    activation: str,
) -> Weigher:
    """For the graphs of symbolic tracing."""

    def values(fakes: Fakes) -> list[Any]:
        args, kwargs = pytree.tree_map_only(
            Tensor, lambda x: fakes(x).detach(), split(example_inputs)
        )
        return inputs.flatten(args, kwargs)

    return Weigher(type(model).__name__, model, values, constants, activation)


def weigh_lifted(lifted: Lifted, inputs: Sequence[Any], activation: str, name: str) -> Weigher:
    """For a graph from Dynamo, whose inputs may have symbolic sizes."""
    root, activations = lifted.split(inputs)

    def values(fakes: Fakes) -> list[Any]:
        return [static(value, fakes) for value in activations]

    return Weigher(name, root, values, {}, activation)


def static(value: Any, fakes: Fakes) -> Any:
    """A fake of a value with the sizes that it has this time."""
    if not isinstance(value, Tensor):
        return hint(value)
    sizes = (*value.shape, *value.stride())
    if all(isinstance(size, int) for size in sizes):
        return fakes(value).detach()
    shape, stride = (list(map(hint, of)) for of in (value.shape, value.stride()))
    with fakes.mode:
        return torch.empty_strided(shape, stride, dtype=value.dtype, device=value.device)


def hint(value: Any) -> Any:
    """The number behind a symbolic one, without a guard on it."""
    if not isinstance(value, NUMBERS):
        return value
    number = value.node.hint
    if number is None:
        raise CaptureError(f"the size {value} is known only when the model runs")
    return number


def trained(model: nn.Module) -> nn.Module:
    """The model in train mode with every parameter trained."""
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point() or parameter.is_complex())
    with suppress(OptionError):  # an exported program has one mode
        model.train()
    return model


def train_mode(graph: Graph) -> Graph:
    """Functions that take a training flag get it set; Dynamo bakes the flags of modules in."""
    for node in graph.nodes:
        position = training_argument(node)
        if position is None:
            continue
        if position < len(node.args):
            node.update_arg(position, True)
        else:
            node.update_kwarg("training", True)
    return graph


def training_argument(node: Node) -> int | None:
    """Where an operator or a function of `torch.nn.functional` takes its training flag."""
    op = overload(node)
    if op is not None:
        return argument(op, "train", "training")
    function = node.target
    if node.op != "call_function" or not inspect.isfunction(function):
        return None
    names = list(inspect.signature(function).parameters)
    return names.index("training") if "training" in names else None


@contextmanager
def plain_precision(model: nn.Module) -> Iterator[None]:
    """Without the autocast around; one that the model itself switches on counts."""
    devices = {parameter.device.type for parameter in model.parameters()} | {"cpu"}
    with ExitStack() as stack:
        for device in sorted(devices):
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


def by_chain(tally: Tally) -> Counter[int]:
    """Bytes by number of the chain."""
    found: Counter[int] = Counter()
    places: Iterable[tuple[Place, int]] = tally.bytes().items()
    for place, size in places:
        found[place.chain] += size
    return found


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "no reason given")
