"""What a branch's result depends on besides its inputs, remembered so that it can be run again.

Random number generators, autocast, buffers that a forward moves (batch-norm statistics, the power
iteration of a spectral norm), hooks that only look, and the parameters' versions. Everything is put
back afterwards: a rerun leaves no trace in the global state, in the buffers or in the random
stream.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .errors import ReplayError
from .observers import Observers
from .state import allow_attention_kernels, attention_kernels, autocast_put_back

BATCH_NORMS = (nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward)


@dataclass(frozen=True)
class Autocast:
    """The autocast state of one device type."""

    device_type: str
    enabled: bool
    dtype: torch.dtype
    cache: bool

    @classmethod
    def now(cls, device_type: str) -> Autocast:
        """The state as it is."""
        return cls(
            device_type,
            torch.is_autocast_enabled(device_type),
            torch.get_autocast_dtype(device_type),
            torch.is_autocast_cache_enabled(),
        )

    @contextmanager
    def restored(self, cache: bool) -> Iterator[None]:
        """Run under this state again, with the weight cache only where gradients are recorded.

        A weight cast without gradients must not reach the cache: a later forward in the same
        autocast region would find it there and lose the weight's gradient.
        """
        wanted = self if cache else Autocast(self.device_type, self.enabled, self.dtype, False)
        if Autocast.now(self.device_type) == wanted:
            yield
            return
        with torch.autocast(self.device_type, wanted.dtype, wanted.enabled, wanted.cache):
            yield


class Generators:
    """The states of the default random generators of the CPU and of one other device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.states = self.read()

    def read(self) -> list[torch.Tensor]:
        """The current states, on the CPU."""
        states = [torch.get_rng_state()]
        if self.device.type not in ("cpu", "meta"):
            states.append(torch.get_device_module(self.device).get_rng_state(self.device))
        return states

    def write(self) -> None:
        """Set the generators to the remembered states."""
        torch.set_rng_state(self.states[0])
        if len(self.states) > 1:
            torch.get_device_module(self.device).set_rng_state(self.states[1], self.device)

    def moved(self) -> bool:
        """Whether random numbers were drawn since."""
        now = self.read()
        return not all(torch.equal(a, b) for a, b in zip(self.states, now, strict=True))


Place = tuple[int, str]  # the id of an owner's dictionary of buffers, and a name in it


@dataclass
class Members:
    """The parameters and buffers that a branch may touch, found on the live root.

    ``tensors`` are attributes that are neither. ``moving`` has the places of running statistics,
    which a batch norm in training moves and does not read; version counters do not see it.
    """

    parameters: list[tuple[str, torch.Tensor]] = field(default_factory=list)
    buffers: list[tuple[dict[str, torch.Tensor | None], str, torch.Tensor]] = field(
        default_factory=list
    )
    tensors: list[tuple[str, torch.Tensor]] = field(default_factory=list)
    moving: set[Place] = field(default_factory=set)


Modules = dict[str, "nn.Module | None"]


class Lookup:
    """Finds the members behind dotted names, again and again.

    Where the modules are is remembered between calls and checked at each: a submodule that was
    replaced, or wrapped by an adapter, is found anew.
    """

    def __init__(self, targets: Iterable[str]) -> None:
        self.targets = tuple(targets)
        self._root: Any = None
        self._places: list[tuple[Modules, str, nn.Module]] | None = None
        self._owners: list[tuple[str, nn.Module]] = []
        self._single: list[tuple[str, Any, str]] = []

    def members(self, root: Any) -> Members:
        """The parameters and buffers as they are now."""
        places = self._places
        moved = places is None or root is not self._root
        if moved or any(modules.get(name) is not m for modules, name, m in places or ()):
            self._resolve(root)
        members = Members()
        for path, owner in self._owners:
            for name, parameter in owner._parameters.items():
                if parameter is not None:
                    members.parameters.append((f"{path}.{name}", parameter))
            for name, buffer in owner._buffers.items():
                if buffer is not None:
                    members.buffers.append((owner._buffers, name, buffer))
            members.moving |= running_statistics(owner)
        for target, owner, name in self._single:
            value = getattr(owner, name)
            if isinstance(value, nn.Parameter):
                members.parameters.append((target, value))
            elif isinstance(getattr(owner, "_buffers", {}).get(name), torch.Tensor):
                members.buffers.append((owner._buffers, name, value))
                members.moving |= running_statistics(owner)
            elif isinstance(value, torch.Tensor):
                members.tensors.append((target, value))
        return members

    def modules(self) -> Iterator[nn.Module]:
        """The modules that were found, each once."""
        yield from {id(module): module for _, _, module in self._places or ()}.values()

    def _resolve(self, root: Any) -> None:
        """Walk the dotted names: whole modules, or single parameters and buffers."""
        self._root, self._places, self._owners, self._single = root, [], [], []
        for target in self.targets:
            owner, name = root, target
            while "." in name:
                head, name = name.split(".", 1)
                owner = self._enter(owner, head)
            value = getattr(owner, name)
            if not isinstance(value, nn.Module):
                self._single.append((target, owner, name))
                continue
            self._enter(owner, name)
            for path, inner in value.named_modules(prefix=target):
                for child in inner._modules:
                    self._enter(inner, child)
                if inner._parameters or inner._buffers:
                    self._owners.append((path, inner))
                plain = [key for key, item in vars(inner).items() if isinstance(item, torch.Tensor)]
                self._single += [(f"{path}.{key}", inner, key) for key in plain]

    def _enter(self, owner: Any, name: str) -> Any:
        """A child by name, remembered if it is a module."""
        modules: Modules = owner._modules
        value = modules.get(name)
        if value is None:
            return getattr(owner, name, None)
        assert self._places is not None, "only called while resolving"
        self._places.append((modules, name, value))
        return value


class Ambient:
    """The surroundings of one run of a branch.

    Create it before the run and call `settle` after it; `restored` runs the branch again.
    """

    def __init__(self, root: Any, lookup: Lookup, device: torch.device) -> None:
        kinds = ("cpu",) if device.type in ("cpu", "meta") else ("cpu", device.type)
        self.autocasts = [Autocast.now(kind) for kind in kinds]
        self.generators: Generators | None = Generators(device)
        self.device = device
        self.dtype = torch.get_default_dtype()
        self.kernels = attention_kernels()
        self._lookup = lookup
        self.members = lookup.members(root)
        self.observers = Observers(lookup.modules())
        self.versions = [parameter._version for _, parameter in self.members.parameters]
        self._before = [(b.clone(), b._version) for _, _, b in self.members.buffers]
        self.earlier: dict[Place, torch.Tensor] = {}
        self._constants = fixed(self.members)  # what the run leaves alone, the rerun must find

    def settle(self, root: Any) -> None:
        """Forget what the run did not change, and remember that it did not."""
        if self.generators is not None and not self.generators.moved():
            self.generators = None
        for (owner, name, buffer), (copy, version) in zip(
            self.members.buffers, self._before, strict=True
        ):
            if owner[name] is not buffer or buffer._version != version:
                self.earlier[id(owner), name] = copy
        self._before = []
        members = self._lookup.members(root)
        after = fixed(members)
        self._constants = {
            place: entry
            for place, entry in self._constants.items()
            if place in after and entry[1] is after[place][1] and entry[2] == after[place][2]
            if place not in members.moving
        }

    def check_members(self, root: Any, where: str) -> None:
        """Refuse to rerun with other parameters, buffers or constants than the forward had.

        Raises:
            ReplayError: names the parameter. Stored execution rejects most changes in place too;
                a replaced parameter would give the gradient of a function that never ran.
        """
        members = self._lookup.members(root)
        now = members.parameters
        remedy = "Call backward before the parameters change, or use memory='store'."
        for (name, parameter), version in zip(self.members.parameters, self.versions, strict=True):
            if parameter._version != version:
                raise ReplayError(
                    f"{where}: the parameter {name} was changed in place between the forward and "
                    f"the backward, so the branch cannot be run again. {remedy}"
                )
        if [name for name, _ in now] != [name for name, _ in self.members.parameters]:
            raise ReplayError(
                f"{where}: a submodule was replaced between the forward and the backward. {remedy}"
            )
        for (name, parameter), (_, current) in zip(self.members.parameters, now, strict=True):
            # Sharded training swaps a sharded tensor class for a plain one and back; that is not
            # a replacement.
            if parameter is not current and _is_plain(parameter) == _is_plain(current):
                raise ReplayError(
                    f"{where}: the parameter {name} was replaced between the forward and the "
                    f"backward (functional_call, load_state_dict(assign=True)?). {remedy}"
                )

        found = fixed(members)
        for place, (name, tensor, version) in self._constants.items():
            entry = found.get(place)
            if entry is None or tensor is not entry[1] or version != entry[2]:
                raise ReplayError(
                    f"{where}: the tensor {name} was changed or replaced between the forward and "
                    f"the backward, so the branch cannot be run again. {remedy}"
                )

    @contextmanager
    def restored(self, record: bool) -> Iterator[None]:
        """Put the surroundings back for a rerun, and undo all it does to them."""
        now, dtype = Generators(self.device), torch.get_default_dtype()
        kernels = attention_kernels()
        swapped: list[tuple[dict[str, torch.Tensor | None], str, torch.Tensor | None]] = []
        with ExitStack() as stack:
            stack.enter_context(self.observers.left_out())
            stack.enter_context(autocast_put_back())
            for autocast in self.autocasts:
                stack.enter_context(autocast.restored(cache=autocast.cache and record))
            try:
                torch.set_default_dtype(self.dtype)
                if kernels != self.kernels:
                    allow_attention_kernels(self.kernels)
                copies: dict[int, torch.Tensor] = {}  # a buffer of two modules stays one
                for owner, name, _ in self.members.buffers:
                    current = owner[name]
                    swapped.append((owner, name, current))
                    if current is None or any(current is copy for copy in copies.values()):
                        continue
                    earlier = self.earlier.get((id(owner), name), current)
                    owner[name] = copies.setdefault(id(current), earlier.clone())
                if self.generators is not None:
                    self.generators.write()
                yield
            finally:
                for owner, name, value in reversed(swapped):
                    owner[name] = value
                now.write()
                torch.set_default_dtype(dtype)
                if attention_kernels() != kernels:
                    allow_attention_kernels(kernels)


def fixed(members: Members) -> dict[Place, tuple[str, torch.Tensor, int]]:
    """Buffers and other tensors by their places, with their versions."""
    buffers = {(id(o), name): (name, b, b._version) for o, name, b in members.buffers}
    return buffers | {(0, name): (name, t, t._version) for name, t in members.tensors}


def running_statistics(owner: Any) -> set[Place]:
    """The places of the buffers that torch's batch norms move in training without reading them."""
    if getattr(type(owner), "forward", None) not in BATCH_NORMS or not owner.training:
        return set()
    return {(id(owner._buffers), name) for name in ("running_mean", "running_var")}


def _is_plain(tensor: torch.Tensor) -> bool:
    return type(tensor) in (torch.Tensor, nn.Parameter)
