"""Rewire pretrained residual networks and train them on reconstructed activations.

``transform`` rewires a model, ``explain`` says what it would do and why, ``diff`` shows what it
changes in the graph, ``report`` predicts what training keeps for the backward, ``calibrate``
measures how far each coupling moves the output, ``verify`` compares a step with a stored one,
``record`` gives access to the streams of a call, ``emit`` shows the graphs that
``torch.compile(model, backend="re2fx")`` compiles, ``Schedule`` moves the coupling while the
network trains. ``memory_course`` and ``foresee`` predict the memory of a whole training step.
"""

from . import trainers
from .api import explain, transform
from .calibrate import calibrate
from .calibration import Calibrated, Calibration
from .candidates import CANDIDATES, Candidate
from .coupling import Coupling
from .course import MemoryCourse, memory_course
from .diff import Diff, diff, history
from .emitted import Emitted, emit
from .errors import (
    BudgetError,
    CaptureError,
    ChainCutError,
    ConditioningError,
    DriftError,
    InputError,
    ModeMismatchError,
    NoResidualError,
    OptionError,
    RangeError,
    Re2fxError,
    Re2fxWarning,
    ReplayError,
    ShardingError,
    StoredOnlyError,
    StreamError,
    VerificationError,
)
from .explanation import Explanation
from .findings import Finding, Verification
from .fixed_point import FixedPoint
from .footprint import ChainBytes, Kept, PartBytes, Report
from .foresight import Foreseen, foresee
from .guard import Drift, DriftGuard
from .memory_plan import MemoryPlan
from .module import RewiredModule
from .peak import Peak, peak
from .piecewise import PiecewiseModule
from .plan import Chain, Location, Plan, Refusal, Residual
from .program import record
from .report import report
from .schedule import Schedule
from .sharding import shard_units
from .verify import verify

__version__ = "0.1.0"

__all__ = [
    "CANDIDATES",
    "BudgetError",
    "Calibrated",
    "Calibration",
    "Candidate",
    "CaptureError",
    "Chain",
    "ChainBytes",
    "ChainCutError",
    "ConditioningError",
    "Coupling",
    "Diff",
    "Drift",
    "DriftError",
    "DriftGuard",
    "Emitted",
    "Explanation",
    "Finding",
    "FixedPoint",
    "Foreseen",
    "InputError",
    "Kept",
    "Location",
    "MemoryCourse",
    "MemoryPlan",
    "ModeMismatchError",
    "NoResidualError",
    "OptionError",
    "PartBytes",
    "Peak",
    "PiecewiseModule",
    "Plan",
    "RangeError",
    "Re2fxError",
    "Re2fxWarning",
    "Refusal",
    "ReplayError",
    "Report",
    "Residual",
    "RewiredModule",
    "Schedule",
    "ShardingError",
    "StoredOnlyError",
    "StreamError",
    "Verification",
    "VerificationError",
    "calibrate",
    "diff",
    "emit",
    "explain",
    "foresee",
    "history",
    "memory_course",
    "peak",
    "record",
    "report",
    "shard_units",
    "trainers",
    "transform",
    "verify",
]
