"""Forward hooks that only look are not called again when a branch is.

A counter, a logger or a hook that keeps an activation is the user's, and a user calls the forward
once. Whether a hook only looks shows when it is called: it returns nothing, changes no tensor it
can reach in the module or its arguments, saves nothing for a backward and draws no random numbers.
Every other hook is a part of the function, and runs again with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sized
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

_KINDS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
Hooks = MutableMapping[int, Callable[..., Any]]
Place = tuple[int, int]


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody registered a forward or backward hook on this very module."""
    return any(getattr(module, kind, None) for kind in _KINDS)


def _nothing(*args: Any, **kwargs: Any) -> None:
    """In the place of a hook that is left out."""


class _Watched:
    """A hook, and what is noted of it while it is called."""

    def __init__(
        self, hook: Callable[..., Any], module: nn.Module, note: Callable[[bool], None]
    ) -> None:
        self.hook, self.module, self.note = hook, module, note
        self.saved: Sized = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        before = self.state(args, kwargs)
        random = torch.get_rng_state()
        result = self.hook(*args, **kwargs)
        quiet = result is None and before == self.state(args, kwargs)
        self.note(quiet and torch.equal(random, torch.get_rng_state()))
        return result

    def state(self, *arguments: Any) -> list[Any]:
        """The identity and version of every tensor at hand, and how many were saved."""
        members = (vars(self.module), self.module._buffers, self.module._parameters)
        tensors = pytree.tree_leaves([*map(dict, members), arguments])
        found = [(id(t), _version(t)) for t in tensors if isinstance(t, torch.Tensor)]
        return [len(self.saved), found]


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


class Observers:
    """The forward hooks of a branch's modules.

    Args:
        modules: all modules that the branch may call.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._hooks: list[tuple[Hooks, nn.Module]] = [
            (hooks, module)
            for module in modules
            for hooks in (module._forward_pre_hooks, module._forward_hooks)
            if hooks
        ]
        self._quiet: dict[Place, bool] = {}

    @contextmanager
    def noted(self, saved: Sized) -> Iterator[None]:
        """Note which hooks only look, while the branch runs for the first time."""
        swapped = []
        for hooks, module in self._hooks:
            for key, hook in list(hooks.items()):
                hook = hook.hook if isinstance(hook, _Watched) else hook  # of another thread
                hooks[key] = watched = _Watched(hook, module, self._note((id(hooks), key)))
                watched.saved = saved
                swapped.append((hooks, key, hook))
        try:
            yield
        finally:
            restore(swapped)

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """Run the branch again without those hooks."""
        swapped = []
        for hooks, _ in self._hooks:
            for key, hook in list(hooks.items()):
                if self._quiet.get((id(hooks), key)):
                    swapped.append((hooks, key, hook))
                    hooks[key] = _nothing
        try:
            yield
        finally:
            restore(swapped)

    def _note(self, place: Place) -> Callable[[bool], None]:
        def note(quiet: bool) -> None:
            self._quiet[place] = quiet and self._quiet.get(place, True)

        return note


def restore(swapped: Iterable[tuple[Hooks, int, Callable[..., Any]]]) -> None:
    """Put hooks back in their places, but for those that were removed meanwhile."""
    for hooks, key, hook in swapped:
        if key in hooks:
            hooks[key] = hook
