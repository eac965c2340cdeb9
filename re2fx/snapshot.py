"""What a step of a network may leave behind, read before it and put back after it.

Attributes and buffers of every module, and the random generators: torch's own, Python's, NumPy's
once it is loaded, and those that modules hold as attributes. Values inside Python containers are
not looked into, and parameters are not copied: a forward that writes to its parameters has written.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .distance import same
from .module import RewiredModule

SCALARS = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class Source:
    """A random generator: what to call it, and how to read and write its state."""

    name: str
    read: Callable[[], Any]
    write: Callable[[Any], Any]


class Snapshot:
    """The state of a network and of all random generators it may draw from.

    Args:
        root: the network.
        constants: tensors of its graphs that belong to no module.
        devices: whose generators count; the CPU's always does.
    """

    def __init__(
        self,
        root: nn.Module,
        constants: dict[str, torch.Tensor],
        devices: Iterable[torch.device] = (),
    ) -> None:
        self._root, self._constants = root, constants
        self._entries = [(place, dict(place)) for _, place in self._places()]
        self._copies = [(tensor, tensor.detach().clone()) for _, tensor in self._tensors()]
        self.sources = tuple(self._find_sources(devices))
        self._states = [source.read() for source in self.sources]

    def restore(self) -> None:
        """Put everything back."""
        for place, entries in self._entries:
            for name in [name for name in place if name not in entries]:
                del place[name]
            for name, value in entries.items():
                if place.get(name, self) is not value:
                    place[name] = value
        for tensor, value in self._copies:
            # By value: batch norm's kernels do not move the version of what they write.
            if not same(tensor, value):
                with torch.no_grad():
                    tensor.copy_(value)
        for source, state in zip(self.sources, self._states, strict=True):
            source.write(state)

    def values(self) -> dict[str, Any]:
        """Buffers, other tensors and plain attributes by name, as they are now; tensors copied."""
        tensors: dict[str, Any] = {name: t.detach().clone() for name, t in self._tensors()}
        for path, place in self._places():
            scalars = {k: v for k, v in place.items() if type(v) in SCALARS}
            tensors.update((_join(path, name), value) for name, value in scalars.items())
        return tensors

    def random_states(self) -> dict[str, Any]:
        """The states of all generators, by their names."""
        return {source.name: source.read() for source in self.sources}

    def _places(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Every dictionary of attributes or buffers, with its module's path."""
        for path, module in self._root.named_modules():
            # Of a rewired module, what the given one holds: its own attributes are the executor's.
            yield path, vars(module._live._model if isinstance(module, RewiredModule) else module)
            yield path, module._buffers
        yield "", self._constants

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every buffer, constant and plain tensor attribute; what is computed is left out."""
        seen: set[int] = set()
        for path, place in self._places():
            for name, value in place.items():
                plain = isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter)
                if plain and value.grad_fn is None and id(value) not in seen:
                    seen.add(id(value))
                    yield _join(path, name), value

    def _find_sources(self, devices: Iterable[torch.device]) -> Iterator[Source]:
        yield Source("torch's generator of the CPU", torch.get_rng_state, torch.set_rng_state)
        for device in {d for d in devices if d.type not in ("cpu", "meta")}:
            yield _device_source(device)
        yield Source("Python's random", random.getstate, random.setstate)
        numpy: Any = sys.modules.get("numpy")
        if numpy is not None:
            yield Source("NumPy's random", numpy.random.get_state, numpy.random.set_state)
        for path, place in self._places():
            for name, value in place.items():
                yield from _own_source(_join(path, name), value)


def _device_source(device: torch.device) -> Source:
    module = torch.get_device_module(device)

    def write(state: torch.Tensor) -> None:
        module.set_rng_state(state, device)

    return Source(f"torch's generator of {device}", lambda: module.get_rng_state(device), write)


def _own_source(name: str, value: Any) -> Iterator[Source]:
    """A generator that a module holds as an attribute: torch's, Python's or NumPy's."""
    if isinstance(value, torch.Generator):
        yield Source(f"its generator {name}", value.get_state, value.set_state)
    elif isinstance(value, random.Random):
        yield Source(f"its generator {name}", value.getstate, value.setstate)
    elif hasattr(type(value), "bit_generator"):
        bits = value.bit_generator
        yield Source(
            f"its generator {name}",
            lambda: bits.state,
            lambda state: setattr(bits, "state", state),
        )


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def changed(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The names of what differs between two readings."""
    names = [*before, *(name for name in after if name not in before)]
    return [n for n in names if n not in before or n not in after or not same(before[n], after[n])]
