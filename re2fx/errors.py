"""The typed errors and warnings of re2fx. Each message says what, where and what to do."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .plan import Plan


class Re2fxError(Exception):
    """Base of every error that re2fx raises on purpose."""


class OptionError(Re2fxError, ValueError):
    """An argument has a value it cannot take; the message names it and the allowed values."""


class BudgetError(OptionError):
    """A training step cannot be fitted into a budget of memory; the message has the least one."""


class InputError(Re2fxError, TypeError):
    """The inputs of a call do not fit the inputs the model was captured with."""


class UncapturedError(InputError):
    """The inputs fit the model, but not its capture; captured as it is called now, they may."""


class CaptureError(Re2fxError):
    """The model could not be turned into a graph.

    Attributes:
        failures: the reason of each route, where several were tried.
        plan: what was refused in those submodules that could be captured, if any could.
    """

    def __init__(
        self, message: str, failures: dict[str, str] | None = None, plan: Plan | None = None
    ) -> None:
        super().__init__(message)
        self.failures = failures or {}
        self.plan = plan


class ModeMismatchError(Re2fxError):
    """The train and the eval graph of one model would be rewired differently."""


class NoResidualError(Re2fxError):
    """Nothing can be rewired, and ``strict=True`` asked for an error instead of a warning."""


class ChainCutError(Re2fxError):
    """A graph break lies inside a chain, so its pieces would be rewired as other functions."""


class ConditioningError(Re2fxError):
    """A coupling loses more digits over a chain's depth than reconstruction can spare."""


class StreamError(Re2fxError, RuntimeError):
    """A branch changes the shape of its stream, so the stream cannot be reconstructed."""


class RangeError(Re2fxError, OverflowError):
    """A number does not fit into a stream in fixed point."""


class ReplayError(Re2fxError, RuntimeError):
    """Running a branch again did not do what its first run did."""


class DriftError(Re2fxError, RuntimeError):
    """A stream was reconstructed less exactly in training than a `DriftGuard` lets pass."""


class ShardingError(Re2fxError):
    """Modules were sharded that a rewired network does not call, so nobody would gather them."""


class StoredOnlyError(Re2fxError, RuntimeError):
    """A reversible network was used in a way that only stored execution supports."""


class TargetError(Re2fxError, ValueError):
    """A model or an input that was named on the command line cannot be made."""


class VerificationError(Re2fxError):
    """Reversible execution was compared with stored execution and did not do the same."""


class Re2fxWarning(UserWarning):
    """Something the user should know, and can silence by this category."""
