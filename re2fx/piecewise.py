"""A model of which only submodules are rewired, and the account of how it came to that."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import nn

from .budget import checked_memory
from .coupling import Coupling
from .couplings import Couplings, change, couplings_of, simplest
from .errors import OptionError
from .module import Memory, RewiredModule
from .plan import Location, Plan
from .text import shorten, span
from .twins import Twin


@dataclass(frozen=True)
class Account:
    """How a model that could not be captured as a whole was taken apart.

    Attributes:
        failures: why each route failed on the whole.
        route: how the whole was captured around its pieces, if it was.
        routes: path of each submodule that is rewired, and how it was captured.
        left: path of each submodule that was opened or left as it is, with the reason.
        refused: plans of those that were captured and have nothing to rewire.
    """

    failures: dict[str, str] = field(default_factory=dict)
    route: str = "submodules"
    routes: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    refused: list[Plan] = field(default_factory=list)

    def lines(self) -> Iterator[str]:
        """The submodules of one route on one line, those left for one reason on another."""
        for route in dict.fromkeys(self.routes.values()):
            paths = [path for path, taken in self.routes.items() if taken == route]
            number = f" ({len(paths)} of them)" if len(paths) > 1 else ""
            yield f"captured by submodules: {span(paths)}{number}, by {route} tracing"
        for reason in dict.fromkeys(self.left.values()):
            paths = [path for path, why in self.left.items() if why == reason]
            yield f"runs as it is written: {shorten(paths)} ({reason})"


class PiecewiseModule(Twin):
    """A network whose largest capturable submodules are rewired; the rest runs as it is written.

    It is an instance of the model's class, with the model's parameters, buffers, mode and
    attributes; modules without a rewired part are the model's own. ``plan`` says what was rewired,
    with module paths of the whole. Made by `re2fx.transform`.
    """

    @property
    def pieces(self) -> dict[str, RewiredModule]:
        """The rewired submodules by their paths."""
        return pieces_of(self)

    @property
    def account(self) -> Account:
        """How the model was taken apart."""
        account: Account = self.__dict__["_account"]
        return account

    @property
    def plan(self) -> Plan:
        """What was rewired and what was refused in the pieces, for the current mode."""
        return Plan.merged([merged_plan(self), *self.account.refused])

    @property
    def memory(self) -> Memory:
        """How the pieces keep activations: ``"reversible"``, ``"store"``, or ``"lowest"``.

        With ``"lowest"`` each piece is planned by itself, at its first call with gradients; a
        budget for the whole is refused.

        Raises:
            OptionError: the pieces have been given different ones, or a budget for the whole.
        """
        memories: dict[Memory, str] = {}
        for path, piece in self.pieces.items():
            memories.setdefault(piece.memory, path)
        if len(memories) > 1:
            listed = " and ".join(f"{memory!r} for {path}" for memory, path in memories.items())
            raise OptionError(f"memory is {listed}; set it for the whole, or read pieces[...]")
        return next(iter(memories), "store")

    @memory.setter
    def memory(self, value: Memory) -> None:
        check_whole(self, value)
        for piece in self.pieces.values():
            piece.memory = value

    @property
    def coupling(self) -> Coupling | tuple[Coupling, ...]:
        """How the streams combine in the pieces, as `RewiredModule.coupling` is for a whole."""
        return simplest(couplings_of(self.pieces.values()))

    @coupling.setter
    def coupling(self, value: Couplings) -> None:
        change(self.pieces, value)


def check_whole(module: nn.Module, memory: Memory) -> None:
    """A budget is planned for one graph.

    Raises:
        OptionError: the module is in several pieces.
    """
    if isinstance(module, PiecewiseModule) and isinstance(checked_memory(memory), int):
        raise OptionError(
            f"memory={memory!r}: {type(module).__name__} could not be captured as a whole, and a "
            "budget is planned for one graph. Use memory='lowest', or give each piece a budget of "
            "its own: rev.pieces[path].memory = ..."
        )


def pieces_of(module: nn.Module) -> dict[str, RewiredModule]:
    """The rewired modules in a module, itself and those inside one another included."""
    return {p: m for p, m in module.named_modules() if isinstance(m, RewiredModule)}


class Numbering:
    """The chains of a module's pieces, numbered through; not of those inside other pieces.

    Args:
        module: a rewired module, or one with pieces.
    """

    def __init__(self, module: nn.Module) -> None:
        self._first: dict[int, int] = {}
        self.locations: tuple[tuple[Location, ...], ...] = ()
        taken: list[str] = []
        for path, piece in pieces_of(module).items():
            if not path.startswith(tuple(taken)):
                taken.append(f"{path}." if path else "")
                self._first[id(piece._live)] = len(self.locations)
                self.locations += tuple(
                    tuple(block.location.below(path) for block in wiring.blocks)
                    for wiring in piece.wirings
                )

    def __contains__(self, root: object) -> bool:
        return id(root) in self._first

    def of(self, root: object, chain: int) -> int:
        """The number of a chain, given that in its own graph; -1 inside other pieces."""
        return self._first[id(root)] + chain if root in self else -1


def merged_plan(module: nn.Module) -> Plan:
    """The plans of all rewired modules in a module, with paths of the whole."""
    return Plan.merged(piece.plan.below(path) for path, piece in pieces_of(module).items())
