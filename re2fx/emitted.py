"""The compiled form of a rewired network, as graphs to read and to run.

What ``torch.compile(model, backend="re2fx")`` gives to Inductor: the forward graph, which keeps the
last two states of each chain, and the backward graph, which reconstructs the others. Neither is run
or compiled to get them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from .backend import REWIRING, Settings, from_rewired, rewire_lifted
from .dynamo import Lifted, lift, lower
from .errors import InputError, NoResidualError, OptionError
from .origin import Origin
from .passes.mark import is_marked, mark, unmark
from .passes.reverse import reverse
from .text import count

if TYPE_CHECKING:
    from .lowering import LoweringReport


@dataclass(frozen=True)
class Halves:
    """A training step as two graphs of ATen operators.

    Attributes:
        forward: ``forward(*inputs) -> (*outputs, *saved)``.
        backward: ``backward(*saved, *tangents) -> gradients``, one per input of the forward, None
            where it needs none; its placeholders say what is saved, in order.
        outputs: how many of the forward's results are not saved values: updated buffers and what
            the network returns.
    """

    forward: GraphModule
    backward: GraphModule
    outputs: int

    @property
    def saved(self) -> tuple[Node, ...]:
        """What the forward keeps for the backward, its inputs and views of them left out."""
        output = next(node for node in self.forward.graph.nodes if node.op == "output")
        results: Any = output.args[0]
        return tuple(n for n in results[self.outputs :] if not is_input(n) and is_tensor(n))

    @property
    def saved_bytes(self) -> int:
        """The size of what is kept."""
        values = [node.meta["val"] for node in self.saved]
        return sum(int(value.numel()) * value.element_size() for value in values)


@dataclass(frozen=True)
class Emitted:
    """A training step of a rewired network, compiled as far as Inductor's door; print it.

    Attributes:
        name: the model's class.
        reversible: the two graphs, reconstructing.
        stored: the two graphs of the same network with everything stored, for comparison.
        inputs: the values of the forward's placeholders: the model's own parameters and buffers
            and the example inputs.
        blocks: how many blocks the backward reconstructs.
    """

    name: str
    reversible: Halves
    stored: Halves
    inputs: tuple[Any, ...]
    blocks: int

    @property
    def forward(self) -> GraphModule:
        """The forward graph."""
        return self.reversible.forward

    @property
    def backward(self) -> GraphModule:
        """The backward graph, which reconstructs the streams."""
        return self.reversible.backward

    def lowering_report(self) -> LoweringReport:
        """Which operators Inductor generates kernels for, and which it leaves to libraries.

        Takes Inductor's time without its code generation.
        """
        from .lowering import LoweringReport

        return LoweringReport.of(self.reversible, self.stored)

    def __str__(self) -> str:
        kept, stored = self.reversible.saved_bytes, self.stored.saved_bytes
        head = (
            f"{self.name}: {count(self.blocks, 'block')} reconstructed; the forward keeps "
            f"{count(len(self.reversible.saved), 'tensor')}, {kept / 2**20:.2f} MiB, for the "
            f"backward instead of {len(self.stored.saved)}, {stored / 2**20:.2f} MiB"
        )
        return "\n".join([head, "", readable(self.forward), readable(self.backward)])


def emit(
    model: nn.Module, *inputs: Any, kwargs: Mapping[str, Any] | None = None, **options: Any
) -> Emitted:
    """Show the forward and backward graphs of the compiled form.

    Args:
        model: any model that Dynamo captures in one graph, or a module from `re2fx.transform`; it
            is not run, and its mode stays.
        inputs: positional example inputs.
        kwargs: example inputs by keyword.
        options: ``coupling``, ``readout``, ``activation``, ``leaves``, ``select``, ``min_chain``
            and ``min_saving``, as for `re2fx.transform`.

    Raises:
        OptionError: an option is unknown or has a value it cannot take.
        NoResidualError: nothing can be rewired.
        InputError: no parameter and no input needs a gradient.
    """
    if not options.keys() <= set(REWIRING):
        unknown = ", ".join(sorted(options.keys() - set(REWIRING)))
        raise OptionError(f"emit has no option {unknown}; it takes {', '.join(sorted(REWIRING))}")
    settings = Settings.read(None, {**options, "strict": True})
    capture = Capture(model, settings)
    compiled = torch.compile(model, backend=capture, fullgraph=True)
    try:
        compiled(*inputs, **(kwargs or {}))
    except Exception as error:
        cause = getattr(error, "inner_exception", error)
        if not isinstance(cause, Captured):
            raise cause from None if cause is not error else error.__cause__
        return cause.result
    raise InputError(f"{type(model).__name__}: Dynamo captured nothing to compile")


class Captured(Exception):
    """Ends the compilation before anything runs, and carries its result."""

    def __init__(self, result: Emitted) -> None:
        super().__init__("captured")
        self.result = result


class Capture:
    """A Dynamo backend that takes the graphs and stops."""

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        self.model, self.settings = model, settings

    def __call__(self, module: GraphModule, inputs: Sequence[Any]) -> Any:
        """Trace both forms of the step."""
        name = type(self.model).__name__
        lifted, origin = lift(module, inputs), Origin(self.model)
        marked, plain = self.forms(lifted, inputs, origin)
        reversible, blocks = trace(lower(lifted, marked), inputs, name)
        stored, _ = trace(lower(lifted, plain), inputs, name)
        raise Captured(Emitted(name, reversible, stored, tuple(inputs), blocks))

    def forms(self, lifted: Lifted, inputs: Sequence[Any], origin: Origin) -> Any:
        """The network with marks and without."""
        if is_marked(lifted.graph):
            if self.settings.rewires:
                raise OptionError(f"{origin.name} is rewired already")
            return lifted.graph, unmark(lifted.graph)[0]
        if from_rewired(lifted.graph, origin):
            raise OptionError(f"{origin.name} has memory='store'; nothing is reconstructed")
        rewired = rewire_lifted(lifted, inputs, origin, self.settings)
        if rewired is None:
            raise NoResidualError(f"nothing in {origin.name} can be rewired")
        return mark(rewired.graph, lifted.root, rewired.wirings), rewired.graph


def trace(module: GraphModule, inputs: Sequence[Any], name: str) -> tuple[Halves, int]:
    """Forward and backward graph, and how many blocks were reversed, without compiling them."""
    from .inductor import partition_with_inductor

    names = [node.name for node in module.graph.nodes if node.op == "placeholder"]
    found = partition_with_inductor(module, inputs, reverse)
    if found is None:
        raise InputError(f"{name}: no parameter and no input needs a gradient")
    forward, backward, outputs, blocks = found
    for graph_module in (forward, backward):
        rename(graph_module, names)
    return Halves(forward, backward, outputs), blocks


def rename(module: GraphModule, names: Sequence[str]) -> None:
    """Call the inputs what the model calls them."""
    for node in module.graph.nodes:
        match = re.fullmatch(r"primals_(\d+)", node.name) if node.op == "placeholder" else None
        if match:
            node._rename(plain_name(names[int(match[1]) - 1]))
            node.target = node.name
    module.graph.lint()
    module.recompile()


def plain_name(name: str) -> str:
    """``blocks_0_norm_weight`` for Dynamo's longer name of the same."""
    name = re.sub(r"^l_(self_)?|_$", "", name)
    return re.sub(r"_?(modules|parameters|buffers)_", "_", name).strip("_") or "value"


def is_input(node: Any) -> bool:
    """Whether a result is an input of the graph, or a view of one."""
    while isinstance(node, Node) and node.op == "call_function":
        returns = getattr(getattr(node.target, "_schema", None), "returns", ())
        if not any(r.alias_info is not None for r in returns):
            return False
        node = node.args[0]
    return not isinstance(node, Node) or node.op == "placeholder"


def is_tensor(node: Any) -> bool:
    """Whether a node stands for a tensor and not for a size."""
    return isinstance(node, Node) and isinstance(node.meta.get("val"), torch.Tensor)


def readable(module: GraphModule) -> str:
    """The code of a graph with shapes."""
    text: str = module.print_readable(print_output=False)
    return text
