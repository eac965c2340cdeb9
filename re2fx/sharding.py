"""``fully_shard`` and rewired modules: what may be sharded, and in which units.

A module that is sharded gathers its parameters when it is called. Tracing dissolves the blocks of a
network into the modules they call, so a sharded block would never gather: its parameters have to be
sharded with the modules that hold them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from .errors import OptionError, ShardingError
from .program import RunBlock

if TYPE_CHECKING:
    from .module import RewiredModule

RECIPE = (
    "Transform first, then shard what the rewired network calls: for unit in "
    "re2fx.shard_units(rev): fully_shard(unit), which is one unit for each block, and then "
    "fully_shard(rev)."
)


def is_sharded(module: nn.Module) -> bool:
    """Whether ``fully_shard`` was called on a module."""
    package: Any = sys.modules.get("torch.distributed.fsdp")
    kind = getattr(package, "FSDPModule", None)
    return kind is not None and isinstance(module, kind)


def check_not_sharded(model: nn.Module) -> None:
    """Refuse to rewire a model that is sharded already.

    Raises:
        ShardingError: names the first sharded module and the recipe.
    """
    path = next((path for path, module in model.named_modules() if is_sharded(module)), None)
    if path is not None:
        raise ShardingError(
            f"{type(model).__name__}: {path or 'the model'} was sharded with fully_shard before "
            "the transform. The rewired network calls the modules inside of it, not the module "
            f"itself, which is what gathers its parameters. {RECIPE}"
        )


def check_dissolved(modules: Iterable[tuple[str, nn.Module]], owner: str) -> None:
    """Refuse to run with a block sharded that nobody calls.

    Args:
        modules: path and module of each that a capture dissolved.
        owner: the model's name.

    Raises:
        ShardingError: names the module and the recipe.
    """
    for path, module in modules:
        if is_sharded(module):
            raise ShardingError(
                f"{owner}: {path or 'the given model'} was sharded with fully_shard, but the "
                "rewired network has it dissolved into the modules it calls and never calls it, so "
                f"that its parameters would not be gathered. {RECIPE}"
            )


def shard_units(rev: nn.Module) -> list[list[nn.Module]]:
    """The modules that each reconstructed branch calls, to be sharded together.

    ``fully_shard`` of each unit, and of ``rev`` last, is what sharding block by block is for a
    model that was not rewired: one gathering for each run of a block. Parameters that a block reads
    without calling a module stay with ``rev``.

    Args:
        rev: a rewired module, or one whose parts are, not yet sharded.

    Returns:
        a list of modules for each branch, in the order they run in; each module is in one list.

    Raises:
        OptionError: ``rev`` is not a rewired module.
    """
    from .module import RewiredModule

    parts = [module for module in rev.modules() if isinstance(module, RewiredModule)]
    if not parts:
        raise OptionError(f"shard_units({type(rev).__name__}): expected what re2fx.transform made")
    seen: set[int] = set()
    units = [list(fresh(part, step, seen)) for part in parts for step in _blocks(part)]
    return [unit for unit in units if unit]


def _blocks(rev: RewiredModule) -> Iterator[RunBlock]:
    program = rev._variants[0].program(True, rev._live._model, rev._executors)
    return (step for step in program.steps if isinstance(step, RunBlock))


def fresh(rev: nn.Module, step: RunBlock, seen: set[int]) -> Iterator[nn.Module]:
    """The modules with parameters that a branch calls and no earlier one did."""
    for target in step.frame.lookup.targets:
        module: Any = rev
        for name in target.split("."):
            module = getattr(module, name)
        if not isinstance(module, nn.Module) or not any(True for _ in module.parameters()):
            continue
        inner = {id(m) for m in module.modules()}
        if inner.isdisjoint(seen):
            seen |= inner
            yield module
