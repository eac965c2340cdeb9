"""Inductor with the joint-graph pass. Imports the compiler; only `re2fx.inner` imports this."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from functorch.compile import min_cut_rematerialization_partition
from torch._functorch import config as functorch_config
from torch._inductor import config
from torch._inductor.compile_fx import compile_fx
from torch._inductor.custom_graph_pass import (
    CustomGraphPass,
    CustomPartitionerFn,
    get_hash_for_files,
)
from torch._inductor.decomposition import decompositions
from torch.fx import Graph, GraphModule

from .exact import DECODE, decompose_decode

_HERE = Path(__file__).parent
_SOURCES = tuple(
    str(_HERE / name) for name in ("aten.py", "coupling.py", "marks.py", "passes/reverse.py")
)


def know_operators() -> None:
    """Let Inductor fuse the reading of states in fixed point; it knows nothing else of it."""
    decompositions.setdefault(DECODE, decompose_decode)


class ReversePass(CustomGraphPass):
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
        keys = [getattr(other, "uuid", lambda: None)() for other in others if other is not None]
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
    result: Any = compile_fx(module, list(inputs), config_patches=patches)
    compiled: Callable[..., Any] = result
    return compiled


class KeepingPartitioner(CustomPartitionerFn):
    """The stock partitioner, which also keeps copies of what it made."""

    def __init__(self) -> None:
        self.kept: tuple[GraphModule, GraphModule, int] | None = None

    def __call__(
        self, gm: GraphModule, joint_inputs: Sequence[object], **kwargs: Any
    ) -> tuple[GraphModule, GraphModule]:
        """Split the joint graph."""
        forward, backward = min_cut_rematerialization_partition(gm, joint_inputs, **kwargs)
        outputs = kwargs["num_fwd_outputs"]
        self.kept = copy.deepcopy(forward), copy.deepcopy(backward), outputs
        return forward, backward

    def uuid(self) -> Any:
        """No caching: a hit would keep nothing."""
        return None


def partition_with_inductor(
    module: GraphModule, inputs: Sequence[Any], reverse: Callable[[Graph], int]
) -> tuple[GraphModule, GraphModule, int, int] | None:
    """The graphs Inductor would compile for a training step, and how many blocks are reversed.

    Returns:
        forward, backward, the number of the forward's results that are not saved values, and of
        reversed blocks; None if nothing needs a gradient.
    """
    blocks = 0

    def counting(graph: Graph) -> int:
        nonlocal blocks
        blocks += reverse(graph)
        return blocks

    partitioner = KeepingPartitioner()
    patches = {
        "joint_custom_post_pass": ReversePass(counting, config.joint_custom_post_pass),
        "custom_partitioner_fn": partitioner,
        "fx_graph_cache": False,
    }
    with functorch_config.patch(enable_autograd_cache=False):
        compile_fx(module, list(inputs), inner_compile=_nothing, config_patches=patches)
    return None if partitioner.kept is None else (*partitioner.kept, blocks)


def _nothing(module: GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Any:
    """An inner compiler for graphs that are only looked at."""

    def never(*args: Any) -> Any:
        raise AssertionError("this graph was made to be read")

    return never
