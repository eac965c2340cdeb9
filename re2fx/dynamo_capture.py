"""Model to graph with Dynamo: what runs, as it runs, control flow on sizes and modules followed.

Keeps what symbolic tracing loses: the backward of a custom ``autograd.Function``, hooks, checkpoint
regions, optional arguments. Needs example inputs. Nothing is computed: the forward is traced on
fake tensors, and the call that triggers it gets empty tensors for the graph's results.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_aggregate, map_arg
from torch.utils._pytree import tree_leaves

from .capture import is_library
from .checkpoints import write_out_checkpoints
from .contexts import pair_attention_kernels, refuse_settings, restore_grad_modes
from .dynamo import locate
from .errors import CaptureError
from .inputs import InputSpec
from .outputs import OutputSpec, build
from .shapes import Shapes, Size


@dataclass
class Recording:
    """One call as Dynamo saw it.

    Attributes:
        module: the captured graph.
        values: what its placeholders stood for in the call.
        results: the empty tensors that stood for its results.
        returned: what the model returned, made of them.
    """

    module: GraphModule | None = None
    values: tuple[Any, ...] = ()
    results: list[Tensor] = field(default_factory=list)
    returned: Any = None

    def backend(self, module: GraphModule, inputs: Sequence[Any]) -> Any:
        """Keep the graph; run nothing."""
        (output,) = (node for node in module.graph.nodes if node.op == "output")
        self.module = module

        def run(*values: Any) -> list[Tensor]:
            self.values = values
            self.results = [torch.empty(0) for _ in output.args[0]]
            return self.results

        return run


def capture_graph(
    model: nn.Module,
    inputs: InputSpec,
    examples: Sequence[Any],
    constants: dict[str, Any],
    vary: bool = True,
) -> tuple[Graph, Shapes]:
    """One graph of a model in the mode it is in.

    Args:
        model: it is not changed.
        inputs: the structure of its inputs.
        examples: the values of the placeholders.
        constants: what the graph reads and the model does not hold under a name is added here.
        vary: whether all sizes may vary; else those of `dimensions`.

    Raises:
        CaptureError: Dynamo cannot follow the forward, or it assigns to the model.
    """
    own = [stand_in(value) for value in examples]
    recording = Recording()
    with unassigned(model):
        try:
            recording.returned = call(model, inputs, own, recording, vary)
        except Exception as error:
            raise CaptureError(explained(error)) from error
    if recording.module is None:
        raise CaptureError("its forward runs no operation on its inputs")
    return Assembly(model, inputs, own, recording, constants).graph()


def stand_in(value: Tensor) -> Tensor:
    """A tensor like an example, without the odd strides that slicing leaves behind."""
    with torch.inference_mode(False):
        plain = torch.empty_like(value)
        if value.is_contiguous():
            plain = torch.empty(value.shape, dtype=value.dtype, device=value.device)
        return plain.requires_grad_(value.requires_grad)


def dimensions(value: Tensor) -> range:
    """Which sizes of an input vary from call to call: all, but of images and video the batch alone.

    What is computed from heights and widths becomes long expressions, which take Dynamo minutes.
    """
    return range(value.dim() if value.dim() < 4 else 1)


def call(
    model: nn.Module, inputs: InputSpec, values: list[Tensor], recording: Recording, vary: bool
) -> Any:
    """Let Dynamo see one call, through a function of its own: nobody's compiled code is touched."""
    import torch._dynamo.config
    import torch.fx.experimental._config

    spaces: dict[str, Any] = {}
    code = "def call(self, *args, **kwargs):\n    return self(*args, **kwargs)\n"
    exec(compile(code, "<capture>", "exec"), spaces)
    names = iter(values)
    arguments = inputs.arguments(lambda name: next(names))
    for value in () if vary else values:
        for dimension in dimensions(value):
            torch._dynamo.maybe_mark_dynamic(value, dimension)
    with (
        torch.inference_mode(False),
        torch.enable_grad(),  # else a part without gradients would look like the rest
        settings(torch._dynamo.config).patch(
            specialize_int=True,
            specialize_float=True,
            automatic_dynamic_shapes=False,  # would remember the sizes of other captures
            suppress_errors=False,
            optimize_ddp=False,  # would cut the graph inside the forward of a wrapped module
            ignore_logging_functions=messages() | torch._dynamo.config.ignore_logging_functions,
        ),
        settings(torch.fx.experimental._config).patch(use_duck_shape=False),
    ):
        compiled: Any = torch.compile(
            spaces["call"], backend=recording.backend, fullgraph=True, dynamic=vary or None
        )
        return compiled(model, *arguments.args, **arguments.kwargs)


def messages() -> set[Callable[..., Any]]:
    """What writes to a log; a library may have added methods of its own, as ``warning_once``."""
    levels = ("debug", "info", "warn", "error", "critical", "exception", "log")
    return {method for name, method in vars(logging.Logger).items() if name.startswith(levels)}


def settings(module: Any) -> Any:
    """A module of settings, which gets its ``patch`` when it is imported."""
    return module


@contextmanager
def unassigned(model: nn.Module) -> Iterator[None]:
    """Take back what a forward assigns to its modules, and say that this route cannot keep it."""
    before = [(m, dict(vars(m)), dict(m._buffers), dict(m._parameters)) for m in model.modules()]
    changed: list[str] = []
    try:
        yield
    finally:
        for module, values, buffers, parameters in before:
            pairs: Any = (
                (vars(module), values), (module._buffers, buffers), (module._parameters, parameters)
            )  # fmt: skip
            for held, old in pairs:
                different = [k for k in held if k not in old or held[k] is not old[k]]
                tensors = [k for k in different if isinstance(held[k], Tensor)]
                changed += [f"{type(module).__name__}.{name}" for name in tensors]
                for name in different:
                    if name in old:
                        held[name] = old[name]
                    else:
                        del held[name]
    if changed:
        raise CaptureError(f"its forward assigns tensors to {', '.join(changed[:3])}")


class Assembly:
    """Turns a recording into a graph that reads the model's members by their names."""

    def __init__(
        self,
        model: nn.Module,
        inputs: InputSpec,
        examples: list[Tensor],
        recording: Recording,
        constants: dict[str, Any],
    ) -> None:
        assert recording.module is not None
        self.module, self.recording, self.constants = recording.module, recording, constants
        self.names = inputs.names
        self.slots = {id(value): name for value, name in zip(examples, self.names, strict=True)}
        self.device = {str(value.device) for value in examples}
        members = (*model.named_parameters(), *model.named_buffers())
        self.members = {id(value): name for name, value in members}
        self.new = Graph()
        self.copies: dict[Node, Any] = {}
        self.examples = examples

    def graph(self) -> tuple[Graph, Shapes]:
        """The graph, and what it assumes about sizes."""
        placed = [self.new.placeholder(name) for name in self.names]
        self.placed = dict(zip(self.names, placed, strict=True))
        nodes = [node for node in self.module.graph.nodes if node.op == "placeholder"]
        pairs = list(zip(nodes, self.recording.values, strict=True))
        for node, value in pairs:
            if isinstance(value, Tensor):
                self.copies[node] = self.tensor(node, value)
        fakes = {
            self.slots[id(value)]: node.meta["example_value"]
            for node, value in pairs
            if id(value) in self.slots
        }
        for node, value in pairs:
            if not isinstance(value, Tensor):
                self.copies[node] = self.number(node, value, fakes)
        for node in self.module.graph.nodes:
            if node.op not in ("placeholder", "output"):
                self.copies[node] = self.operation(node)
        self.output()
        for node in write_out_checkpoints(self.new, self.body_of):
            self.ask_for_device(node)
            locate(node)
        restore_grad_modes(self.new)
        pair_attention_kernels(self.new)
        refuse_settings(self.new)
        self.new.lint()
        return self.new, self.shapes(fakes)

    def tensor(self, node: Node, value: Tensor) -> Node:
        """An input, a member, or a constant."""
        if id(value) in self.slots:
            placed = self.placed[self.slots[id(value)]]
            placed.meta = {"example_value": node.meta["example_value"]}
            return placed
        return self.held(self.members.get(id(value)) or self.constant(value), node)

    def held(self, target: str, like: Node) -> Node:
        """A node that reads what the model or the constants hold."""
        new = self.new.create_node("get_attr", target)
        new.meta = {k: v for k, v in like.meta.items() if k == "example_value"}
        return new

    def constant(self, value: Any) -> str:
        """The name under which something that is no member is kept."""
        for name, other in self.constants.items():
            if other is value:
                return name
        name = f"_re2fx_constant{len(self.constants)}"
        self.constants[name] = value
        return name

    def number(self, node: Node, value: Any, fakes: dict[str, Any]) -> Any:
        """A size is read off the input that has it; another number is fixed."""
        symbol = node.meta.get("example_value")
        for name, fake in fakes.items():
            for dim, size in enumerate(fake.shape):
                if isinstance(size, torch.SymInt) and str(size) == str(symbol):
                    new = self.new.call_method("size", (self.placed[name], dim))
                    new.meta = {"example_value": symbol}
                    return new
        if isinstance(settled(symbol), str) and isinstance(symbol, torch.SymInt):
            raise CaptureError(f"it reads the number {symbol}, which is no size of an input")
        return value

    def operation(self, node: Node) -> Node:
        """A copy that asks the first input for its device where the examples' was written in."""
        if node.op == "get_attr":
            return self.held(self.constant(getattr(self.module, str(node.target))), node)
        new = self.new.node_copy(node, self.copies.__getitem__)
        new.args, new.kwargs = map_arg((node.args, node.kwargs), self.copies.__getitem__)
        self.ask_for_device(new)
        locate(new)
        return new

    def ask_for_device(self, node: Node) -> None:
        """Read the first input's device where the examples' device was written in."""
        given = (node.args, node.kwargs)
        if not self.placed or not any(map(self.is_device, tree_leaves(given))):
            return
        with self.new.inserting_before(node):
            first = next(iter(self.placed.values()))
            place = self.new.call_function(getattr, (first, "device"))
        changed: Any = map_aggregate(given, lambda x: place if self.is_device(x) else x)
        node.args, node.kwargs = changed

    def is_device(self, value: Any) -> bool:
        """Whether an argument is the device of the examples."""
        return isinstance(value, torch.device) and str(value) in self.device

    def body_of(self, target: str) -> Any:
        """The body of a higher-order operator."""
        name, _, inner = target.partition(".")
        return attrgetter(inner)(self.constants[name]) if inner else self.constants[name]

    def output(self) -> None:
        """What the model returns, built from the results."""
        (given,) = (node for node in self.module.graph.nodes if node.op == "output")
        results = [map_arg(value, self.copies.__getitem__) for value in given.args[0]]
        tensors = list(self.recording.results)
        spec = OutputSpec.of(self.recording.returned, tensors)
        for stranger in spec.strangers():  # an input or a member that is returned as it is
            results.append(self.stranger(stranger))
            tensors.append(stranger)
        used = OutputSpec.of(self.recording.returned, tensors).used(tensors)
        results, tensors = [results[i] for i in used], [tensors[i] for i in used]
        spec = OutputSpec.of(self.recording.returned, tensors)
        if spec.template == OutputSpec.of(tensors[0], tensors).template if tensors else False:
            self.new.output(results[0])
            return
        template = self.new.create_node("get_attr", self.constant(spec))
        self.new.output(self.new.call_function(build, (template, results)))

    def stranger(self, value: Tensor) -> Node:
        if id(value) in self.slots:
            return self.placed[self.slots[id(value)]]
        return self.new.create_node("get_attr", self.members.get(id(value)) or self.constant(value))

    def shapes(self, fakes: dict[str, Any]) -> Shapes:
        """Which sizes are fixed and which may vary."""
        sizes: list[tuple[Size, ...]] = []
        symbols: dict[str, torch.SymInt] = {}
        for name, example in zip(self.names, self.examples, strict=True):
            fake = fakes.get(name)
            row: list[Size] = []
            for dim in range(example.dim()):
                size = fake.shape[dim] if fake is not None else f"{name}.{dim}"
                known = settled(size)
                if isinstance(known, str) and isinstance(size, torch.SymInt):
                    symbols[known] = size  # or an expression over others, checked as one
                row.append(known)
            sizes.append(tuple(row))
        dtypes = tuple(example.dtype for example in self.examples)
        return Shapes(tuple(self.names), tuple(sizes), dtypes, tuple(guards(symbols)))


def settled(size: Any) -> Size:
    """A size as its name, or as the number that the forward fixed it to."""
    if not isinstance(size, torch.SymInt):
        return size if isinstance(size, int) else str(size)
    expression = size.node.shape_env.simplify(size.node.expr)
    return int(expression) if expression.is_number else in_python(expression)


def in_python(expression: Any) -> str:
    """An expression over sizes as Python code; sympy's own form has names that Python lacks."""
    from torch.utils._sympy.printers import PythonPrinter

    printed: str = PythonPrinter().doprint(expression)
    return printed


def guards(symbols: dict[str, torch.SymInt]) -> Iterator[str]:
    """What the forward asked of the sizes on its way, as expressions over their names."""
    if not symbols:
        return
    environment = next(iter(symbols.values())).node.shape_env
    for guard in environment.guards:
        expression = environment.simplify(guard.expr)
        names = {str(symbol) for symbol in expression.free_symbols}
        if not names <= symbols.keys():
            raise CaptureError(f"it asks {expression} of numbers that are no sizes of an input")
        if names:
            yield in_python(expression)


def explained(error: Exception) -> str:
    """The first sentence of Dynamo's message, and the user's line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    frames = [line for line in lines if line.startswith('File "')]
    where = [line for line in frames if not is_library(line.split('"')[1])]
    sentence = lines[0] if lines else type(error).__name__
    return f"{sentence} ({where[-1]})" if where else sentence
