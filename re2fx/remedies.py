"""What to do about a finding, by what causes it."""

from __future__ import annotations

import torch

from .evidence import Evidence
from .trial import Trial

FOLLOWS = "It follows from the branches that do not repeat."
REMEDIES = {
    "draws": (
        "Draw with torch's default generator of the CPU or of the stream's device, whose state is "
        "put back for the rerun; or draw outside the chain and hand the numbers to the branch; or "
        "use memory='store'."
    ),
    "moves": (
        "Keep what changes in a registered buffer of a module that the branch itself calls, which "
        "is put back for the rerun; or change it outside the chain; or use memory='store'."
    ),
    "changes": (
        "Look for what the branch reads besides its inputs: a global, a file, the time, a "
        "generator of its own. Compute it outside the chain and hand it to the branch, or use "
        "memory='store'."
    ),
}


def kind(cause: str) -> str:
    """Which remedy a cause calls for."""
    if not cause:
        return "changes"
    return "draws" if cause.startswith("it draws") else "moves"


HALF = {torch.float16, torch.bfloat16}
FP32_STREAMS = (
    "Carry the streams in fp32, as re2fx.transform does unless its graph is edited, or use "
    "memory='store'."
)


def more_exact(evidence: Evidence, trial: Trial) -> str:
    """How to lose fewer digits, by what loses them."""
    if trial.dtype in HALF:
        return FP32_STREAMS
    growth = max(coupling.growth for coupling in trial.couplings)
    if growth > 1 + 1e-6:
        return (
            f"Rounding grows up to {growth:.3g}-fold per block with coupling "
            f"{trial.couplings[0]}: use a coupling with |b| nearer to 1, a smaller "
            "drift_tolerance, shorter chains (leaves=[...]), or memory='store'."
        )
    if evidence.precision.half:
        return (
            "Branches in half precision magnify the rounding of their inputs: train in fp32 or "
            "under another autocast dtype, shorten the chain (leaves=[...]), or use memory='store'."
        )
    return (
        "The branches magnify rounding: small entries next to large ones, or a norm of a value "
        "near zero. Shorten the chain (leaves=[...]), compute in fp64, or use memory='store'."
    )
