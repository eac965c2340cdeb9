"""The compilers behind the backend: Inductor, AOTAutograd without code generation, none at all.

What differs between them is where the joint graph is reversed: Inductor calls a pass after its own
joint-graph passes, AOTAutograd's partition function comes first. Torch's compiler stack is imported
when a compilation begins, never before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, GraphModule

from .errors import OptionError

COMPILERS = ("inductor", "aot_eager", "eager")
SCOPES = ("graph", "region")

Reverse = Callable[[Graph], int]
Function = Callable[..., Any]


@dataclass(frozen=True)
class Inner:
    """An inner compiler with its settings.

    Attributes:
        name: one of `COMPILERS`.
        mode: ``torch.compile``'s ``mode``, for Inductor.
        options: settings of Inductor, as in ``torch.compile(..., options=)``.
    """

    name: str = "inductor"
    mode: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.name not in COMPILERS:
            raise OptionError(f"compiler={self.name!r}: expected one of {_listed(COMPILERS)}")
        if self.name == "inductor":
            return
        if self.mode is not None:
            raise OptionError(f"mode={self.mode!r} is for compiler='inductor', not {self.name!r}")
        if self.options:
            raise OptionError(f"compiler_options are for compiler='inductor', not {self.name!r}")

    def compile(self, module: GraphModule, inputs: Sequence[Any], reverse: Reverse) -> Function:
        """Compile a graph as a whole, its joint graph reversed.

        Args:
            module: a graph with marks or without; may be changed.
            inputs: one value per placeholder.
            reverse: the pass for joint and inference graphs.
        """
        if self.name == "eager":
            result: Function = module.forward
            return result
        if self.name == "inductor":
            from .inductor import compile_with_inductor

            return compile_with_inductor(module, inputs, reverse, self.patches())
        return compile_without_inductor(module, inputs, reverse)

    def wrap(self, function: Function) -> Function:
        """Compile a Python function when it is called, once per kind of input."""
        if self.name == "eager":
            return function
        settings: dict[str, Any] = {}
        if self.name == "inductor":
            from .inductor import know_operators

            know_operators()
            settings["options"] = self.patches() or None
        return torch.compile(function, backend=self.name, fullgraph=True, **settings)

    def patches(self) -> dict[str, Any]:
        """Inductor's configuration for the mode and the options, checked."""
        import torch._inductor as inductor
        from torch._inductor import config

        modes = inductor.list_mode_options()
        if self.mode is not None and self.mode not in modes:
            raise OptionError(f"mode={self.mode!r}: expected one of {_listed(modes)}")
        known = config.get_config_copy()
        options = {key.replace("-", "_"): value for key, value in self.options.items()}
        for key in options:
            if key not in known:
                raise OptionError(f"compiler_options: Inductor has no setting {key!r}")
        return {**(modes[self.mode] if self.mode else {}), **options}


def compile_without_inductor(
    module: GraphModule, inputs: Sequence[Any], reverse: Reverse
) -> Function:
    """AOTAutograd and its partitioner; the graphs run as they are."""
    from functorch.compile import min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd
    from torch._dynamo.backends.debugging import boxed_nop

    def partition(joint: GraphModule, joint_inputs: Any, **kwargs: Any) -> Any:
        reverse(joint.graph)
        joint.recompile()
        return min_cut_rematerialization_partition(joint, joint_inputs, **kwargs)

    def infer(forward: GraphModule, fakes: list[Any]) -> Function:
        reverse(forward.graph)
        forward.recompile()
        result: Function = boxed_nop(forward, fakes)
        return result

    compiler = aot_autograd(
        fw_compiler=boxed_nop,
        bw_compiler=boxed_nop,
        inference_compiler=infer,
        partition_fn=partition,
        keep_inference_input_mutations=True,
    )
    result: Function = compiler(module, list(inputs))
    return result


def _listed(names: Any) -> str:
    return ", ".join(map(repr, names))
