"""An FX graph as plain data: what each node computes, from what, and where it was written."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

from torch.fx import Graph, Node

from re2fx.plan import Location

INFIX = {
    operator.add: "+", operator.sub: "-", operator.mul: "*", operator.truediv: "/",
    operator.floordiv: "//", operator.mod: "%", operator.pow: "**", operator.matmul: "@",
    operator.and_: "&", operator.or_: "|", operator.xor: "^", operator.eq: "==",
    operator.ne: "!=", operator.lt: "<", operator.le: "<=", operator.gt: ">", operator.ge: ">=",
}  # fmt: skip

_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>[^\n]+)\n?(.*)')
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


class Member(NamedTuple):
    """A dotted path into the model, written out where it is known from where one looks."""

    path: str


# Readable code in pieces: text, a member of the model, or the number of a value that is read.
Piece = str | Member | int


@dataclass(frozen=True)
class Value:
    """One node.

    Attributes:
        index: its place in the program.
        name: its name in its graph.
        op: the FX opcode.
        target: what it calls or names, the same in every process.
        scope: path of the module whose code computes it.
        base: a short name for it, unique neither in its scope nor in the graph.
        literals: its arguments, with the values that are read left out.
        pieces: its right-hand side as code.
        reads: indices of the values it reads, one per slot.
        slots: the places of its arguments where they are read, such as ``args[0]``.
        location: the innermost line of the user's code.
        kind: class of the module it calls, if known.
        shape: dtype and shape of the result, if recorded.
    """

    index: int
    name: str
    op: str
    target: str
    scope: str
    base: str
    literals: str
    pieces: tuple[Piece, ...]
    reads: tuple[int, ...]
    slots: tuple[str, ...]
    location: Location
    kind: str = ""
    shape: str = ""

    @property
    def label(self) -> tuple[str, str]:
        """What it does, whatever it reads."""
        return self.op, self.target


@dataclass(frozen=True)
class Listing:
    """One graph.

    Attributes:
        title: what to call it.
        values: its nodes in program order.
        kinds: class of each module on the way, by path.
    """

    title: str
    values: tuple[Value, ...]
    kinds: dict[str, str] = field(default_factory=dict)

    @cached_property
    def users(self) -> list[list[tuple[int, int]]]:
        """For each value, who reads it and in which of its slots, in program order."""
        found: list[list[tuple[int, int]]] = [[] for _ in self.values]
        for value in self.values:
            for slot, read in enumerate(value.reads):
                found[read].append((value.index, slot))
        return found


def listing(graph: Graph, title: str, kind_of: Callable[[str], str] = lambda path: "") -> Listing:
    """Read a graph off; it is not changed.

    Args:
        graph: any FX graph.
        title: what to call it.
        kind_of: the class of a module, by path.
    """
    nodes = list(graph.nodes)
    index = {node: number for number, node in enumerate(nodes)}
    leaves = {str(node.target) for node in nodes if node.op == "call_module"}
    kinds: dict[str, str] = {}
    for node in nodes:
        kinds.update(entry for entry in _stack(node) if entry[1])
    values = []
    for node in nodes:
        value = _value(node, index, leaves)
        if node.op == "call_module":
            kind = kinds.get(value.target) or kind_of(value.target)
            value = replace(value, kind=kind)
        values.append(value)
    return Listing(title, tuple(values), kinds)


def _value(node: Node, index: dict[Node, int], leaves: set[str]) -> Value:
    arguments = _Arguments(index)
    positional = [arguments.render(a, f"args[{i}]") for i, a in enumerate(node.args)]
    named = {k: arguments.render(a, k) for k, a in node.kwargs.items()}
    scope = _scope(node, leaves)
    return Value(
        index[node],
        node.name,
        node.op,
        target_of(node),
        scope,
        _base(node, scope),
        _literals(positional, named),
        tuple(_code(node, positional, named)),
        tuple(arguments.reads),
        tuple(arguments.slots),
        _location(node, scope),
        shape=_shape(node),
    )


class _Arguments:
    """Renders arguments, numbering the values that are read."""

    def __init__(self, index: dict[Node, int]) -> None:
        self.index = index
        self.reads: list[int] = []
        self.slots: list[str] = []

    def render(self, value: Any, slot: str) -> list[Piece]:
        if isinstance(value, Node):
            self.reads.append(self.index[value])
            self.slots.append(slot)
            return [len(self.reads) - 1]
        if isinstance(value, list | tuple):
            items = [self.render(item, f"{slot}[{i}]") for i, item in enumerate(value)]
            opening, closing = "[]" if isinstance(value, list) else "()"
            if isinstance(value, tuple) and len(items) == 1:
                closing = ",)"
            return [opening, *_joined(items), closing]
        if isinstance(value, dict):
            pairs = [[f"{k!r}: ", *self.render(v, f"{slot}[{k!r}]")] for k, v in value.items()]
            return ["{", *_joined(pairs), "}"]
        if isinstance(value, slice):
            bounds = [("start", value.start), ("stop", value.stop), ("step", value.step)]
            parts = [self.render(v, f"{slot}.{k}") if v is not None else [] for k, v in bounds]
            return _joined(parts if parts[2] else parts[:2], ":") if any(parts) else [":"]
        return [_literal(value)]


def _joined(items: list[list[Piece]], by: str = ", ") -> list[Piece]:
    return [piece for i, item in enumerate(items) for piece in ([by] if i else []) + item]


def _literal(value: Any) -> str:
    if value is Ellipsis:
        return "..."
    if callable(value) and hasattr(value, "__qualname__"):
        return _qualified(value)
    return _ADDRESS.sub("", repr(value))


def _literals(positional: list[list[Piece]], named: dict[str, list[Piece]]) -> str:
    """The arguments with every read value as a dot; keywords in the order of their names."""
    ordered = [*positional, *([f"{k}=", *named[k]] for k in sorted(named))]
    return "".join("." if isinstance(p, int) else str(p) for p in _joined(ordered))


def target_of(node: Node) -> str:
    """What a node calls or names, as a string that is the same in every process."""
    if isinstance(node.target, str):
        return node.target
    return _qualified(node.target)


def _qualified(function: Any) -> str:
    """Module and name of a function; built-in functions of torch say neither."""
    if hasattr(function, "_schema") or not hasattr(function, "__qualname__"):
        return _ADDRESS.sub("", str(function))
    name = str(function.__qualname__).rpartition("Class.")[2].removeprefix("_TensorBase.")
    module = (getattr(function, "__module__", None) or "torch").lstrip("_")
    return name if module == "builtins" else f"{module}.{name}"


def _code(node: Node, positional: list[list[Piece]], named: dict[str, list[Piece]]) -> list[Piece]:
    """The right-hand side, as one would write it."""
    arguments = _joined([*positional, *([f"{k}=", *v] for k, v in named.items())])
    target = node.target
    if node.op == "placeholder":
        return ["<input>" if not arguments else "<input, default "] + (
            [*arguments, ">"] if arguments else []
        )
    if node.op == "output":
        return _joined(positional)
    if node.op == "get_attr":
        return [Member(str(target))]
    if node.op == "call_module":
        return [Member(str(target)), "(", *arguments, ")"]
    if node.op == "call_method" and positional:
        rest = _joined([*positional[1:], *([f"{k}=", *v] for k, v in named.items())])
        return [*positional[0], f".{target}(", *rest, ")"]
    if len(positional) == 2 and not named:
        first, second = positional
        if target in INFIX:
            return [*first, f" {INFIX[target]} ", *second]
        if target is operator.getitem:
            bare = isinstance(node.args[1], tuple) and len(node.args[1]) > 1
            return [*first, "[", *(second[1:-1] if bare else second), "]"]
        if target is getattr:
            return [*first, f".{node.args[1]}"]
    return [_short(target_of(node)), "(", *arguments, ")"]


def _short(target: str) -> str:
    """``torch.relu``, ``F.gelu``, ``aten.add.Tensor``, or a function's bare name."""
    module, _, name = target.rpartition(".")
    if module in ("torch.nn.functional", "torch._C._nn"):
        return f"F.{name}"
    if module in ("torch", "math", "operator") or target.split(".")[0] in ("aten", "prims"):
        return target
    return name or target


def _base(node: Node, scope: str) -> str:
    if node.op in ("call_module", "get_attr"):
        path = str(node.target)
        return path[len(scope) + 1 :] if scope and path.startswith(scope + ".") else path
    if node.op in ("placeholder", "output"):
        return str(node.target)
    overload = getattr(node.target, "overloadpacket", None)
    return str(overload or target_of(node)).rpartition(".")[2]


def _scope(node: Node, leaves: set[str]) -> str:
    """Path of the module whose code computes the node."""
    if node.op in ("placeholder", "output"):
        return ""
    paths = [path for path, _ in _stack(node)]
    if node.op == "call_module" and (not paths or paths == [str(node.target)]):
        return str(node.target).rpartition(".")[0]
    # What a pass writes with the provenance of a module called as a whole is not that module's.
    while paths and paths[-1] in leaves:
        path = paths.pop()
        if not paths:
            return path.rpartition(".")[0]
    return paths[-1] if paths else ""


def _stack(node: Node) -> list[tuple[str, str]]:
    """Path and class of the modules around a node, outermost first; Dynamo's spelling undone."""
    found = []
    for entry in (node.meta.get("nn_module_stack") or {}).values():
        path = re.sub(r"^L\['self'\]|^L__self__", "", str(entry[0]))
        path = re.sub(r"\['?([^\]']*)'?\]", r".\1", path).strip(".")
        kind = entry[1] if isinstance(entry[1], str) else getattr(entry[1], "__name__", "")
        found.append((path, kind.rpartition(".")[2]))
    return found


def _location(node: Node, scope: str) -> Location:
    frame = node.meta.get("source_line")
    if frame:
        return Location(scope, *frame)
    frames = list(_FRAME.finditer(node.meta.get("stack_trace") or ""))
    if not frames:
        return Location(scope)
    last = frames[-1]
    return Location(scope, last["file"], int(last["line"]), last["function"], last[4].strip())


def _shape(node: Node) -> str:
    """``float32[2, 3]``, from whatever recorded it."""
    for key in ("val", "example_value", "tensor_meta"):
        meta: Any = node.meta.get(key)
        if hasattr(meta, "shape") and hasattr(meta, "dtype"):
            return f"{str(meta.dtype).removeprefix('torch.')}{list(meta.shape)}"
    return ""
