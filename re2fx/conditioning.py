"""How much of a stream survives being reconstructed, and when that is too little."""

from __future__ import annotations

import torch
from torch import nn

from .errors import ConditioningError
from .wiring import Wiring

# A chain may lose this share of its streams to rounding before it is refused.
DRIFT_LIMIT = 1e-2


def check_conditioning(
    model: nn.Module, wirings: tuple[Wiring, ...], name: str | None = None
) -> None:
    """Refuse couplings whose reconstruction would drown in rounding.

    Args:
        model: its parameters' dtype tells the streams', which are fp32 at least.
        wirings: the chains.
        name: what to call the model, its class by default.

    Raises:
        ConditioningError: names the chain, the predicted error and the remedy.
    """
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    eps = torch.finfo(torch.float64 if dtypes == {torch.float64} else torch.float32).eps
    for number, wiring in enumerate(wirings):
        drift, coupling = wiring.growth * eps, wiring.blocks[0].coupling
        where = f"{name or type(model).__name__}: chain {number} of {len(wiring.blocks)} residuals"
        if not all(block.coupling.invertible for block in wiring.blocks):
            raise ConditioningError(
                f"{where} with coupling {coupling}: b = 0 cannot be inverted. Use a coupling with "
                "b != 0, or memory='store'."
            )
        if drift > DRIFT_LIMIT:
            raise ConditioningError(
                f"{where} with coupling {coupling} would reconstruct its input with a relative "
                f"error of up to {drift:.1g}: rounding grows {coupling.growth:.3g}-fold per block. "
                "Use a coupling with |b| nearer to 1, or memory='store'."
            )
