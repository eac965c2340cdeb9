"""What Inductor makes of the emitted graphs: generated kernels, library calls, fallbacks.

Inductor's own lowering, fusion and scheduling run; code generation does not. On a GPU each
generated kernel is a Triton kernel, on a CPU a C++ loop nest. Imports the compiler; only
`re2fx.emitted` imports this.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch._inductor import config, ir
from torch._inductor.compile_fx import compile_fx_inner
from torch.fx import GraphModule

if TYPE_CHECKING:
    from .emitted import Halves


@dataclass(frozen=True)
class Lowered:
    """One graph after Inductor's lowering and fusion.

    Attributes:
        generated: number of kernels whose code Inductor writes.
        library: calls of library kernels (matrix products, convolutions), by name.
        fallback: calls of ATen operators that Inductor does not lower, by name.
    """

    generated: int
    library: Counter[str] = field(default_factory=Counter)
    fallback: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class LoweringReport:
    """The reversible step next to the stored one; print it.

    Attributes:
        forward, backward: the reversible step.
        stored_forward, stored_backward: the same network with everything stored.
    """

    forward: Lowered
    backward: Lowered
    stored_forward: Lowered
    stored_backward: Lowered

    @classmethod
    def of(cls, reversible: Halves, stored: Halves) -> LoweringReport:
        """Lower the four graphs."""
        return cls(
            lower_graph(reversible.forward, False),
            lower_graph(reversible.backward, True),
            lower_graph(stored.forward, False),
            lower_graph(stored.backward, True),
        )

    @property
    def added_fallbacks(self) -> tuple[str, ...]:
        """Fallbacks of the reversible step that the stored step has in neither half."""
        known = self.stored_forward.fallback | self.stored_backward.fallback
        return tuple(sorted({*self.forward.fallback, *self.backward.fallback} - set(known)))

    def __str__(self) -> str:
        halves = {
            "forward": self.forward,
            "backward": self.backward,
            "stored forward": self.stored_forward,
            "stored backward": self.stored_backward,
        }
        lines = [f"{'':44s}" + "".join(f"{name:>17s}" for name in halves)]
        rows = [("generated kernels", [half.generated for half in halves.values()])]
        for kind in ("library", "fallback"):
            counters = [getattr(half, kind) for half in halves.values()]
            for name in sorted(set().union(*counters)):
                rows.append((f"{kind}: {name}", [counter[name] for counter in counters]))
        lines += [f"{name:44s}" + "".join(f"{n:17d}" for n in numbers) for name, numbers in rows]
        added = ", ".join(self.added_fallbacks) or "none"
        return "\n".join([*lines, f"fallbacks that only the reversible step has: {added}"])


class Scheduled(Exception):
    """Ends the compilation behind the scheduler."""


def lower_graph(module: GraphModule, is_backward: bool) -> Lowered:
    """Lower one graph up to its kernels."""
    found: list[Lowered] = []

    def look(nodes: Sequence[Any]) -> Any:
        found.append(classify(nodes))
        raise Scheduled

    fakes = [node.meta["val"] for node in module.graph.nodes if node.op == "placeholder"]
    with config.patch(_post_fusion_custom_pass=look, fx_graph_cache=False):
        try:
            compile_fx_inner(copy.deepcopy(module), fakes, is_backward=is_backward)
        except Exception as error:
            if not isinstance(getattr(error, "inner_exception", error), Scheduled):
                raise
    return found[0] if found else Lowered(0)


def classify(nodes: Sequence[Any]) -> Lowered:
    """Count the scheduler's nodes by who runs them."""
    generated, library, fallback = 0, Counter[str](), Counter[str]()
    for node in nodes:
        kernel = node.node
        if not node.is_extern():
            generated += not isinstance(kernel, ir.NopKernel) and "Nop" not in type(node).__name__
        elif isinstance(kernel, ir.FallbackKernel):
            fallback[operator_name(kernel)] += 1
        elif not isinstance(kernel, ir.MultiOutput):  # one of several results of another call
            library[operator_name(kernel)] += 1
    return Lowered(generated, library, fallback)


def operator_name(kernel: Any) -> str:
    """``aten.mm`` whatever Inductor calls it."""
    overload = getattr(kernel, "op_overload", None)
    name = str(overload or getattr(kernel, "python_kernel_name", None) or type(kernel).__name__)
    for prefix in ("torch.ops.", "extern_kernels."):
        name = name.removeprefix(prefix)
    parts = name.split(".")
    return ".".join(parts[:2])
