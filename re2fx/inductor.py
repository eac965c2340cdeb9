"""Inductor with the joint-graph pass. Imports the compiler; only `re2fx.inner` imports this."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch._inductor import config
from torch._inductor.compile_fx import compile_fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, GraphModule

_HERE = Path(__file__).parent
_SOURCES = tuple(
    str(_HERE / name) for name in ("aten.py", "coupling.py", "marks.py", "passes/reverse.py")
)


class ReversePass(CustomGraphPass):  # type: ignore[misc]
    """The joint-graph pass behind Inductor's own, and behind a pass the user has set.

    All it needs is in the graph, so Inductor's caches may keep what it made.
    """

    def __init__(self, reverse: Callable[[Graph], int], before: Any = None) -> None:
        self.reverse, self.before = reverse, before

    def __call__(self, graph: Graph) -> None:
        """Change the graph in place."""
        for other in self.before if isinstance(self.before, (list, tuple)) else [self.before]:
            if other is not None:
                other(graph)
        self.reverse(graph)

    def uuid(self) -> Any:
        """A key for the caches: this code, and the other passes'."""
        others = self.before if isinstance(self.before, (list, tuple)) else [self.before]
        keys = [other.uuid() for other in others if other is not None]
        if None in keys:
            return None
        return get_hash_for_files(_SOURCES, repr(keys))


def compile_with_inductor(
    module: GraphModule,
    inputs: Sequence[Any],
    reverse: Callable[[Graph], int],
    patches: dict[str, Any],
) -> Callable[..., Any]:
    """Compile with the pass; Inductor's settings hold for this compilation only."""
    before = patches.get("joint_custom_post_pass", config.joint_custom_post_pass)
    patches = {**patches, "joint_custom_post_pass": ReversePass(reverse, before)}
    result: Callable[..., Any] = compile_fx(module, list(inputs), config_patches=patches)
    return result
