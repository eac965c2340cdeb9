"""Rewire pretrained residual networks and train them on reconstructed activations.

``transform`` rewires a model, ``explain`` says what it would do and why, ``diff`` compares graphs,
``record`` gives access to the streams of a call, ``emit`` shows the graphs that
``torch.compile(model, backend="re2fx")`` compiles.
"""

from .api import Explanation, explain, transform
from .coupling import Coupling
from .diff import Diff, diff
from .emitted import Emitted, emit
from .errors import (
    CaptureError,
    ChainCutError,
    ConditioningError,
    InputError,
    ModeMismatchError,
    NoResidualError,
    OptionError,
    Re2fxError,
    Re2fxWarning,
    ReplayError,
    StreamError,
)
from .module import RewiredModule
from .plan import Chain, Location, Plan, Refusal, Residual
from .program import record

__version__ = "0.1.0"

__all__ = [
    "CaptureError",
    "Chain",
    "ChainCutError",
    "ConditioningError",
    "Coupling",
    "Diff",
    "Emitted",
    "Explanation",
    "InputError",
    "Location",
    "ModeMismatchError",
    "NoResidualError",
    "OptionError",
    "Plan",
    "Re2fxError",
    "Re2fxWarning",
    "Refusal",
    "ReplayError",
    "Residual",
    "RewiredModule",
    "StreamError",
    "diff",
    "emit",
    "explain",
    "record",
    "transform",
]
