"""Graphs that are given and not captured: exported programs, and graph modules as they are."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule
from torch.fx.graph import CodeGen
from torch.utils import _pytree as pytree

from .capture import Captured, Tracer, dissolved_hooks
from .codegen import compile_graph
from .dynamo import locate
from .errors import OptionError
from .export_graph import Assembly, fixed
from .graph import copy_graph, forget_examples, freeze, thaw
from .inputs import InputSpec, Slot
from .module import LiveRoot
from .overloads import argument, overload

if TYPE_CHECKING:
    from torch.export import ExportedProgram


class Source:
    """The graph of a program, and what its placeholders are; copies share it."""

    def __init__(self, graph: Graph, inputs: InputSpec, mode: bool | None) -> None:
        self.graph, self.inputs, self.mode = graph, inputs, mode
        self.function: Callable[..., Any] = compile_graph(graph, "exported program")

    def __deepcopy__(self, memo: dict[int, Any]) -> Source:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        graph = copy_graph(self.graph)
        forget_examples(graph)
        return _thawed, (freeze(graph), self.inputs, self.mode)


def _thawed(frozen: Any, inputs: InputSpec, mode: bool | None) -> Source:
    return Source(thaw(frozen), inputs, mode)


class ProgramModule(nn.Module):
    """A `torch.export.ExportedProgram` as a module with the program's parameters and buffers.

    Its forward is the program's, in the mode in which it was exported.

    Args:
        program: left as it is; its parameters and buffers are shared, not copied.

    Raises:
        CaptureError: the program takes or returns what no graph of tensors can.
    """

    def __init__(self, program: Any) -> None:
        super().__init__()
        signature = program.graph_signature
        for name in (*signature.parameters, *signature.buffers):
            persistent = name not in signature.non_persistent_buffers
            holder = program.state_dict if name in program.state_dict else program.constants
            hold(self, name, holder[name], persistent)
        self._constants: dict[str, Any] = {}
        inputs = inputs_of(program)
        examples = [x for x in pytree.tree_leaves(program.example_inputs) if is_tensor(x)]
        assembly = Assembly(self, program, inputs.names, examples, self._constants, prefix="")
        graph, shapes = assembly.graph()
        inputs = InputSpec(inputs.owner, inputs.signature, inputs.tree, (shapes,))
        self._source = Source(graph, inputs, mode_of(graph))
        self.training = self._source.mode is not False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the program; takes and returns what it does."""
        values = self._source.inputs.flatten(args, kwargs)
        return self._source.function(LiveRoot(self, self._constants), *values)

    def train(self, mode: bool = True) -> ProgramModule:
        """Set the mode, if that changes nothing in the program.

        Raises:
            OptionError: the program was exported in the other mode.
        """
        exported = self._source.mode
        if exported is not None and mode != exported:
            names = {True: "train", False: "eval"}
            raise OptionError(
                f"the program was exported in {names[exported]} mode, which is written into its "
                f"dropouts and batch norms, and cannot be put in {names[mode]} mode. Export the "
                f"model in {names[mode]} mode too, or transform the model itself."
            )
        return super().train(mode)

    def captured(self) -> Captured:
        """The program's graph, for both modes."""
        train, eval_ = (copy_graph(self._source.graph) for _ in range(2))
        return Captured(train, eval_, self._source.inputs, self._constants, route="program")


def as_module(model: nn.Module | ExportedProgram) -> nn.Module:
    """An exported program as a module; anything else as it is."""
    exporting = sys.modules.get("torch.export.exported_program")  # unless nobody has exported
    if exporting is not None and isinstance(model, exporting.ExportedProgram):
        return ProgramModule(model)
    assert isinstance(model, nn.Module), f"{type(model).__name__} is no model"
    return model


def given_graph(model: nn.Module) -> Captured | None:
    """The graph of a model that has one: of a program, or of a plain graph module."""
    if isinstance(model, ProgramModule):
        return model.captured()
    if not isinstance(model, GraphModule) or not is_plain(model):
        return None
    graphs = copy_graph(model.graph), copy_graph(model.graph)
    for node in (*graphs[0].nodes, *graphs[1].nodes):
        if "source_line" not in node.meta:
            locate(node)
    signature = inspect.signature(model.forward)
    parameters = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    tree = {name: Slot(name) for name in signature.parameters}
    inputs = InputSpec(type(model).__name__, inspect.Signature(parameters), tree)
    hooks = tuple(dissolved_hooks(model, graphs[0]))
    return Captured(*graphs, inputs, {}, hooks=hooks, route="graph")


def is_plain(model: GraphModule) -> bool:
    """Whether a graph module takes and returns what its graph does, and calls only leaves."""
    if type(model.graph._codegen) is not CodeGen:
        return False
    names = [str(node.target) for node in model.graph.nodes if node.op == "placeholder"]
    tracer = Tracer(InputSpec("", inspect.Signature(), {}))
    called = {str(node.target) for node in model.graph.nodes if node.op == "call_module"}
    leaves = all(tracer.is_leaf_module(model.get_submodule(path), path) for path in called)
    return leaves and list(inspect.signature(model.forward).parameters) == names


def inputs_of(program: Any) -> InputSpec:
    """The structure of a program's inputs."""
    nodes = {node.name: node for node in program.graph.nodes}
    slots = []
    for spec in program.graph_signature.input_specs:
        if spec.kind.name == "USER_INPUT":
            name = spec.arg.name
            tensor = is_tensor(nodes[name].meta.get("val"))
            slots.append(Slot(name, None if tensor else fixed(spec.arg), not tensor, tensor))
    args, kwargs = pytree.tree_unflatten(slots, program.call_spec.in_spec)
    names = names_of(program, len(args) + len(kwargs))
    tree = dict(zip(names, args, strict=False)) | kwargs
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    signature = inspect.Signature([inspect.Parameter(name, kind) for name in tree])
    return InputSpec("the exported program", signature, tree)


def names_of(program: Any, number: int) -> Sequence[str]:
    """The names of a program's arguments."""
    called = program.module_call_graph[0].signature
    names = getattr(called, "forward_arg_names", None) or ()
    return names if len(names) == number else [f"arg{index}" for index in range(number)]


def hold(root: nn.Module, name: str, value: Tensor, persistent: bool) -> None:
    """Give a module a member under a dotted name."""
    *path, last = name.split(".")
    for part in path:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    if isinstance(value, nn.Parameter):
        root.register_parameter(last, value)
    else:
        root.register_buffer(last, value, persistent)


def mode_of(graph: Graph) -> bool | None:
    """In which mode a graph was exported; None if nothing in it depends on that."""
    flags = set()
    for node in graph.nodes:
        op = overload(node)
        place = argument(op, "train", "training") if op is not None else None
        if place is not None and place < len(node.args):
            flags.add(node.args[place])
    return True in flags if flags else None


def is_tensor(value: Any) -> bool:
    """Whether a value is a tensor."""
    return isinstance(value, torch.Tensor)
