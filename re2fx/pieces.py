"""Where the whole model cannot be captured: its largest submodules that can be, replaced in place.

observe   run the model once in each mode: what is each submodule called with, where does it add
search    from the top, the larger first: a submodule that fails is opened, its parts are tried
replace   a tree of the same members in which those that could be rewired are rewired

A submodule is fit if all its calls look alike, and is then rewired as a model of its own. Calls of
another kind than those seen raise `InputError`: to run the given submodule instead would be another
network.
"""

from __future__ import annotations

import inspect
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from .capture import REMEDY, Captured, Leaves
from .errors import CaptureError, InputError, ModeMismatchError, Re2fxWarning
from .module import RewiredModule
from .observe import Call, Observed, observe
from .piecewise import Account, PiecewiseModule
from .plan import Plan
from .text import shorten
from .twins import make_twin, strangers

log = logging.getLogger(__name__)

# A class of submodules that failed this often for one reason is not tried again.
PATIENCE = 2


@dataclass(frozen=True)
class Part:
    """What became of one submodule that was captured.

    Attributes:
        module: rewired, or None if there is nothing to rewire.
        plan: what was found in it.
        captured: its graphs.
    """

    module: RewiredModule | None
    plan: Plan
    captured: Captured


Rewire = Callable[[str, nn.Module, Any, Leaves], Part]


@dataclass
class Search:
    """Looks for the largest submodules that can be captured and have something to rewire.

    Attributes:
        model: the whole.
        observed: how its submodules are called.
        rewire: rewires the submodule with a path, for example inputs, with leaves of its own.
        leaves: what the user wants to keep whole.
        least: number of additions without which a submodule is not worth a look.
        replaced: the submodules that are rewired.
        account: what was done.
    """

    model: nn.Module
    observed: Observed
    rewire: Rewire
    leaves: Leaves
    least: int
    replaced: dict[nn.Module, nn.Module] = field(default_factory=dict)
    account: Account = field(default_factory=Account)
    _tried: dict[nn.Module, str] = field(default_factory=dict)
    _reasons: Counter[tuple[type[nn.Module], str]] = field(default_factory=Counter)

    def open(self, path: str, module: nn.Module) -> bool:
        """Look through the parts of a module; True if any was replaced."""
        parts = [(f"{path}.{name}".strip("."), part) for name, part in module.named_children()]
        found = [self.visit(place, part) for place, part in parts]  # all of them
        return any(found)

    def visit(self, path: str, module: nn.Module) -> bool:
        """Replace a submodule or what can be replaced in it; True if anything was."""
        if module in self._tried:
            return module in self.replaced
        self._tried[module] = path
        if not self.worth(path, module):
            return False
        calls = self.observed.calls.get(path, [])
        if not calls:  # a list of modules, or one whose forward is called by another name
            return self.open(path, module)
        reason = unfit(module, calls) or self.hopeless(module)
        if not reason:
            try:
                return self.replace(path, module, calls)
            except (CaptureError, InputError, ModeMismatchError) as error:
                reason = in_short(error)
                self._reasons[type(module), reason] += 1
        log.info("%s is opened: %s", path, reason)
        self.account.left[path] = reason
        return self.open(path, module)

    def worth(self, path: str, module: nn.Module) -> bool:
        """Whether there can be a chain in a submodule that the user did not take out."""
        if path in self.leaves or type(module) in self.leaves or isinstance(module, RewiredModule):
            return False
        if next(module.parameters(), None) is None:
            return False  # a branch that nothing is trained in is none
        return self.observed.additions[path] >= self.least or not self.observed.calls.get(path)

    def hopeless(self, module: nn.Module) -> str:
        """The reason for which others of its class failed, if that has been often enough."""
        for (kind, reason), times in self._reasons.items():
            if kind is type(module) and times >= PATIENCE:
                return reason
        return ""

    def replace(self, path: str, module: nn.Module, calls: Sequence[Call]) -> bool:
        """Rewire a submodule.

        Raises:
            CaptureError: it cannot be captured.
            InputError: what was captured does not fit all of its calls.
            ModeMismatchError: it would be rewired differently in train and in eval mode.
        """
        log.info("%s is captured", path)
        args, kwargs = calls[0].made()
        example = arguments(module, args, kwargs)
        part = self.rewire(path, module, example, below(path, self.leaves))
        if part.captured.hooks:
            raise CaptureError(f"hooks registered on {shorten(part.captured.hooks)} would not run")
        inner = self.inside(path, module, part.captured)
        if inner is not module:
            kept = [*below(path, self.leaves), *part.captured.leaves]
            part = self.rewire(path, inner, example, kept)
        if part.module is None:
            self.account.refused.append(part.plan.below(path))
            return inner is not module
        for call in calls:
            args, kwargs = call.made("meta")
            part.module._inputs.flatten(args, kwargs)
        self.replaced[module] = part.module
        self.account.routes[path] = part.captured.route
        return True

    def inside(self, path: str, module: nn.Module, captured: Captured) -> nn.Module:
        """The module, with what can be replaced in the parts that its capture keeps whole."""
        found = [
            self.visit(f"{path}.{leaf}".strip("."), module.get_submodule(leaf))
            for leaf in captured.leaves
        ]
        return make_twin(module, self.replaced) if any(found) else module

    def nothing(self) -> str:
        """Why no submodule was replaced."""
        lines = [f"  submodule {path}: {reason}" for path, reason in self.account.left.items()]
        plan = Plan.merged(self.account.refused)
        none = f"  submodules: no other one makes {self.least} additions that could be a chain"
        lines += [f"  submodules: {plan}" if plan.found else none]
        return "\n".join(lines)

    def warn(self) -> None:
        """Tell of what may still run as it was given."""
        for name in strangers(self.model, self.replaced):
            warnings.warn(
                f"{type(self.model).__name__}.{name} refers to the model as it was given, in a way "
                "that cannot be followed (a closure, an object that is no module): what it calls "
                "there is not rewired",
                Re2fxWarning,
                stacklevel=5,
            )

    def pieces(self) -> Pieces:
        """The model with its pieces in place."""
        self.warn()
        made = make_twin(self.model, self.replaced, PiecewiseModule)
        vars(made)["_account"] = self.account
        return Pieces(made, self.account)


@dataclass(frozen=True)
class Pieces:
    """A model with rewired submodules.

    Attributes:
        module: a `PiecewiseModule`, a rewired module with others inside, or None for the model as
            it is given.
        account: how it was taken apart.
    """

    module: nn.Module | None
    account: Account


def rewire_pieces(
    model: nn.Module,
    example_inputs: Any,
    error: CaptureError,
    rewire: Rewire,
    leaves: Leaves,
    least: int,
) -> Pieces:
    """Rewire what can be rewired in a model that no route captures as a whole.

    Args:
        model: it is not changed.
        example_inputs: as for `re2fx.transform`.
        error: why the whole cannot be captured.
        rewire: as for `Search`.
        leaves: as for `re2fx.transform`.
        least: length of the shortest chain that is rewired.

    Raises:
        CaptureError: no submodule can be captured and rewired either.
    """
    try:
        observed = observe(model, example_inputs)
    except CaptureError as second:
        raise CaptureError(f"{error}\n  submodules: {second}", error.failures) from error
    search = Search(model, observed, rewire, leaves, least)
    search.account.failures.update(reasons(error.failures))
    search.open("", model)
    if not search.replaced:
        refused = Plan.merged(search.account.refused)
        raise CaptureError(f"{error}\n{search.nothing()}", error.failures, refused) from error
    return search.pieces()


def rewire_inside(
    model: nn.Module,
    example_inputs: Any,
    captured: Captured,
    rewire: Rewire,
    leaves: Leaves,
    least: int,
) -> Pieces:
    """Rewire a model and what its capture keeps whole; only the account if that holds nothing.

    Args:
        model: it is not changed.
        example_inputs: as for `re2fx.transform`.
        captured: the whole, with leaves.
        rewire: as for `Search`.
        leaves: as for `re2fx.transform`.
        least: length of the shortest chain that is rewired.
    """
    try:
        search = Search(model, observe(model, example_inputs), rewire, leaves, least)
    except CaptureError as error:
        return Pieces(None, Account(left={"the parts kept whole": str(error)}))
    search.account.failures.update(reasons(captured.failures))
    inner = search.inside("", model, captured)
    if inner is model:
        return Pieces(None, search.account)
    part = rewire("", inner, example_inputs, [*leaves, *captured.leaves])
    if part.module is None:
        search.account.left.update(captured.leaves)
        return search.pieces()
    search.warn()
    return Pieces(part.module, replace(search.account, route=captured.route))


def unfit(module: nn.Module, calls: Sequence[Call]) -> str:
    """Why a submodule cannot be captured for all of its calls, or nothing."""
    for call in calls:
        opaque = call.opaque()
        if opaque:
            return f"{opaque}, which one call cannot tell from another"
    try:
        structures = [call.structure(module) for call in calls]
    except (InputError, TypeError, ValueError) as error:
        return str(error)
    if any(structure != structures[0] for structure in structures):
        return "its calls differ in structure or in an argument that is no tensor"
    return ""


def arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A call's arguments in the form of example inputs.

    Raises:
        CaptureError: they are neither all positional nor all named.
    """
    if not kwargs:
        return args
    named: dict[str, Any] = {}
    signature = inspect.signature(module.forward)
    for name, value in signature.bind(*args, **kwargs).arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            named.update(value)
        elif kind in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL):
            raise CaptureError(f"it is called with {name} by position and others by name")
        else:
            named[name] = value
    return named


def below(path: str, leaves: Iterable[str | type[nn.Module]]) -> list[str | type[nn.Module]]:
    """The user's leaves as seen from a submodule."""
    found: list[str | type[nn.Module]] = []
    for leaf in leaves:
        if not isinstance(leaf, str):
            found.append(leaf)
        elif leaf.startswith(f"{path}."):
            found.append(leaf[len(path) + 1 :])
    return found


def reasons(failures: dict[str, str]) -> dict[str, str]:
    """Why each route failed, without what could be tried instead."""
    return {route: reason.partition(REMEDY)[0] for route, reason in failures.items()}


def in_short(error: Exception) -> str:
    """The reason of an error, or those of all routes, on one line."""
    failures = error.failures if isinstance(error, CaptureError) else {}
    texts = [f"{route}: {reason}" for route, reason in reasons(failures).items()]
    text = "; ".join(texts) or str(error).partition(REMEDY)[0]
    return " ".join(text.split())
