"""From an exported program to a graph that reads the model's members by their names.

before                                    after
p_head_weight: placeholder                head.weight: get_attr
add: aten.add.Tensor(x, mul)              add: aten.add.Tensor(x, mul)
aten._assert_tensor_metadata(x, ...)
arange(0, n, device=cpu)                  arange(0, n, device=x.device)
wrap_with_set_grad_enabled(False, f, x)   f(x.detach()), written out
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_aggregate, map_arg
from torch.utils import _pytree as pytree
from torch.utils._pytree import tree_leaves

from . import ops
from .dynamo_capture import guards, settled
from .errors import CaptureError, InputError
from .export_places import described
from .graph import lookup
from .outputs import OutputSpec, Result, build
from .overloads import overload
from .shapes import Shapes, Size

aten = torch.ops.aten


class Assembly:
    """Writes the graph of one exported program.

    Args:
        model: the graph's root; its members have the program's names behind ``prefix``.
        program: a `torch.export.ExportedProgram`; left as it is.
        names: of the placeholders, one per input of the program.
        examples: the inputs it was exported with, to know their device by.
        constants: what the graph reads and the model does not hold under a name is added here.
        prefix: what stands in front of the members' names.
    """

    def __init__(
        self,
        model: nn.Module,
        program: Any,
        names: Sequence[str],
        examples: Sequence[Tensor],
        constants: dict[str, Any],
        prefix: str = "model.",
    ) -> None:
        self.model, self.program, self.names = model, program, list(names)
        self.constants, self.prefix = constants, prefix
        self.devices = {str(value.device) for value in examples}
        self.new = Graph()
        self.copies: dict[Node, Any] = {}

    def graph(self, spec: OutputSpec | None = None) -> tuple[Graph, Shapes]:
        """The graph, and what it assumes about sizes.

        Args:
            spec: how its results become what the model returns; the program's own by default.
        """
        self.inputs()
        results = self.mutated(self.write(self.program.graph_module))
        self.output(spec or template(self.program.call_spec.out_spec), results)
        self.pin_type()
        return self.new, self.shapes()

    def inputs(self) -> None:
        """A placeholder per input, in order, and a read per member."""
        nodes = {node.name: node for node in self.program.graph.nodes if node.op == "placeholder"}
        held = []
        names = iter(self.names)
        self.placed: list[Node] = []
        for spec in self.program.graph_signature.input_specs:
            node = nodes[spec.arg.name]
            if spec.kind.name != "USER_INPUT":
                held.append((spec, node))
                continue
            if not isinstance(node.meta.get("val"), Tensor):
                self.copies[node] = fixed(spec.arg)
                continue
            self.copies[node] = self.new.placeholder(next(names))
            self.copies[node].meta = {"example_value": node.meta.get("val")}
            self.placed.append(self.copies[node])
        for spec, node in held:
            self.copies[node] = self.member(spec)
            self.copies[node].meta = {"example_value": node.meta.get("val")}

    def member(self, spec: Any) -> Node:
        """A node that reads what the model or the constants hold."""
        if spec.kind.name in ("PARAMETER", "BUFFER"):
            return self.new.get_attr(spec.target.removeprefix(self.prefix))
        if spec.kind.name == "CONSTANT_TENSOR":
            return self.new.get_attr(self.constant(self.program.constants[spec.target]))
        raise CaptureError(f"export passes {spec.arg.name} to it, a {spec.kind.name.lower()}")

    def constant(self, value: Any) -> str:
        """The name under which something that is no member is kept."""
        for name, other in self.constants.items():
            if other is value:
                return name
        name = f"_re2fx_constant{len(self.constants)}"
        self.constants[name] = value
        return name

    def write(self, module: GraphModule) -> Sequence[Any]:
        """Copy the operations of the program, or of a body in it; return its results."""
        for node in module.graph.nodes:
            if node.op == "output":
                results: Sequence[Any] = map_arg(node.args[0], self.copies.__getitem__)
                return results
            if node.op != "placeholder":
                self.copies[node] = self.copy(node, module)
        return ()

    def mutated(self, values: Sequence[Any]) -> list[Any]:
        """Write what a functional program returns for members and inputs; return the results."""
        results = []
        for spec, value in zip(self.program.graph_signature.output_specs, values, strict=True):
            kind = spec.kind.name
            if kind == "USER_OUTPUT":
                results.append(value)
            elif kind in ("BUFFER_MUTATION", "USER_INPUT_MUTATION"):
                self.new.call_function(aten.copy_.default, (self.target(spec), value))
            else:
                raise CaptureError(f"the program returns a {kind.lower()}")
        return results

    def target(self, spec: Any) -> Node:
        """What a functional program returns a new value of."""
        if spec.kind.name == "BUFFER_MUTATION":
            return self.new.get_attr(spec.target.removeprefix(self.prefix))
        nodes = {node.name: node for node in self.program.graph.nodes}
        held: Node = self.copies[nodes[spec.target]]
        return held

    def copy(self, node: Node, module: GraphModule) -> Any:
        """What a node is in the new graph."""
        if node.op == "get_attr":
            value = getattr(module, str(node.target))
            return value if isinstance(value, GraphModule) else self.held(node, value)
        args, kwargs = self.arguments(node)
        op = overload(node)
        if op is aten.alias.default or (not self.prefix and is_void(node)):
            return args[0]
        if op is not None and op.overloadpacket is aten._assert_tensor_metadata:
            return None  # says what was true of the examples
        if node.op == "call_function" and args and isinstance(args[0], tuple):
            return args[0][args[1]]  # a result of a body that was written out
        region = getattr(node.target, "__name__", "")
        if region == "wrap_with_set_grad_enabled":
            return self.without_gradients(*args)
        if region == "wrap_with_autocast":
            return self.with_autocast(node, args)
        if op is aten.fill_.Tensor and (number := self.number(args[1])) is not None:
            return self.operation(node, aten.fill_.Scalar, (args[0], number), {})
        modules = {i: self.held(node, v) for i, v in enumerate(args) if isinstance(v, GraphModule)}
        args = tuple(modules.get(i, value) for i, value in enumerate(args))
        return self.operation(node, node.target, args, kwargs)

    def operation(self, like: Node, target: Any, args: Any, kwargs: Any) -> Node:
        """A node in place of one of the program."""
        new = self.new.create_node(like.op, target, args, kwargs, like.name)
        new.meta = described(like, self.model, self.prefix)
        self.ask_for_device(new)
        return new

    def number(self, value: Any) -> Any:
        """The number that ``x[i] = number`` has become a constant of, or None."""
        if isinstance(value, Node) and ops.calls(value, {"clone"}):
            value = value.args[0]
        held = isinstance(value, Node) and value.op == "get_attr"
        constant = self.constants.get(str(value.target)) if held else None
        if not isinstance(constant, Tensor) or constant.dim() != 0:
            return None
        return constant.item()

    def held(self, like: Node, value: Any) -> Node:
        """A read of a constant."""
        new = self.new.get_attr(self.constant(value))
        new.meta = {"example_value": like.meta.get("val")}
        return new

    def arguments(self, node: Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A node's arguments in the new graph."""
        given: Any = map_arg((node.args, node.kwargs), self.copies.__getitem__)
        args, kwargs = given
        return args, kwargs

    def inline(self, module: GraphModule, operands: Sequence[Any]) -> tuple[Any, ...]:
        """Write a body out where it is called."""
        placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
        self.copies.update(zip(placeholders, operands, strict=True))
        return tuple(self.write(module))

    def without_gradients(self, enabled: bool, module: Any, *operands: Any) -> tuple[Any, ...]:
        """A region of ``no_grad``: it sees its operands detached."""
        if enabled:
            raise CaptureError("it switches gradients on; export cannot say for which values")
        return self.inline(module, [self.detached(value) for value in operands])

    def detached(self, value: Any) -> Any:
        """The value without a history, if it may have one."""
        example = value.meta.get("example_value") if isinstance(value, Node) else None
        if not isinstance(example, Tensor) or not example.is_floating_point():
            return value
        new = self.new.call_function(aten.detach.default, (value,))
        new.meta = dict(value.meta)
        return new

    def with_autocast(self, node: Node, args: Sequence[Any]) -> Node:
        """A region of autocast, as one operation: a branch that is run again needs it whole."""
        *settings, cache, module = args[:5]
        body = self.held(node, module)
        return self.operation(node, run_region, (body, (*settings, cache), *args[5:]), {})

    def ask_for_device(self, node: Node) -> None:
        """Read the first input's device where the examples' device was written in."""

        def is_device(value: Any) -> bool:
            return isinstance(value, torch.device) and str(value) in self.devices

        given = (node.args, node.kwargs)
        if not self.placed or not any(map(is_device, tree_leaves(given))):
            return
        with self.new.inserting_before(node):
            place = self.new.call_function(getattr, (self.placed[0], "device"))
        changed: Any = map_aggregate(given, lambda x: place if is_device(x) else x)
        node.args, node.kwargs = changed

    def output(self, spec: OutputSpec, results: list[Any]) -> None:
        """What the model returns, built from the results."""
        if spec.template == Result(0):
            self.new.output(results[0])
        else:
            held = self.new.get_attr(self.constant(spec))
            self.new.output(self.new.call_function(build, (held, results)))
        drop_dead(self.new, self.model)
        self.new.lint()

    def pin_type(self) -> None:
        """Where types were written in, let a call check that the members have theirs still."""
        given = [(node.args, node.kwargs) for node in self.program.graph.nodes]
        types = [x for x in tree_leaves(given) if isinstance(x, torch.dtype)]
        if not any(dtype.is_floating_point for dtype in types):
            return
        for node in self.new.nodes:
            value = lookup(self.model, str(node.target)) if node.op == "get_attr" else None
            if isinstance(value, nn.Parameter) and value.is_floating_point():
                with self.new.inserting_after(node):
                    self.new.call_function(require_type, (node, value.dtype))
                return

    def shapes(self) -> Shapes:
        """Which sizes are fixed and which may vary."""
        sizes: list[tuple[Size, ...]] = []
        symbols: dict[str, torch.SymInt] = {}
        fakes = [node.meta["example_value"] for node in self.placed]
        for fake in fakes:
            row = []
            for size in fake.shape:
                known = settled(size)
                if isinstance(known, str):
                    symbols[known] = size
                row.append(known)
            sizes.append(tuple(row))
        dtypes = tuple(fake.dtype for fake in fakes)
        return Shapes(tuple(self.names), tuple(sizes), dtypes, tuple(guards(symbols)))


def fixed(given: Any) -> Any:
    """The value of an argument that is no tensor.

    Raises:
        CaptureError: the program leaves it open.
    """
    if not hasattr(given, "value"):
        raise CaptureError(f"the program takes the number {given.name}, which a call may change")
    return given.value


def require_type(value: Tensor, dtype: torch.dtype) -> None:
    """Compare a parameter's type with what it was when the graph was made.

    Raises:
        InputError: it is another one.
    """
    if value.dtype != dtype:
        raise InputError(
            f"the model was captured with parameters of {dtype}, which export wrote into its "
            f"casts, and they are {value.dtype} now. Convert the model first, then transform it."
        )


def run_region(body: GraphModule, settings: tuple[Any, ...], *operands: Any) -> Any:
    """Run a part of a graph under autocast.

    Args:
        body: the part.
        settings: device, dtype, whether it is on, and whether weights' casts are cached.
        operands: what the part reads.
    """
    device, dtype, enabled, cache = settings
    with torch.autocast(device, dtype, enabled, cache):
        return body(*operands)


def template(out_spec: pytree.TreeSpec) -> OutputSpec:
    """What a program returns, from its results in their order."""
    results = [Result(index) for index in range(out_spec.num_leaves)]
    return OutputSpec(pytree.tree_unflatten(results, out_spec))


def is_void(node: Node) -> bool:
    """Whether a cast or a copy gives the very tensor it is given, as the examples show.

    An exported program has it in the way of everyone who reads that tensor later: export knows
    values by their tensors.
    """
    if not (ops.is_cast(node) or ops.calls(node, {"contiguous"})) or not node.args:
        return False
    before, after = (n.meta.get("val") for n in (node.args[0], node) if isinstance(n, Node))
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return False
    same = before.dtype == after.dtype and before.device == after.device
    strides = zip(before.stride(), after.stride(), strict=True)
    copied = node.kwargs.get("copy") or True in node.args
    return same and not copied and all(str(a) == str(b) for a, b in strides)


def drop_dead(graph: Graph, model: nn.Module) -> None:
    """Erase operators that nobody reads and that neither write nor draw random numbers."""
    buffers = {name for name, _ in model.named_buffers()}
    for node in reversed(graph.nodes):
        op = overload(node)
        if node.users or (op is None and node.op != "get_attr"):
            continue
        if op is not None:
            random = torch.Tag.nondeterministic_seeded in op.tags
            # The statistics of a batch norm are written without its schema saying so.
            keeps = any(n.op == "get_attr" and n.target in buffers for n in node.all_input_nodes)
            if op._schema.is_mutable or random or keeps or not op._schema.returns:
                continue
        graph.erase_node(node)
