"""How far the outputs of several models are from those of the first, averaged over batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.utils import _pytree as pytree

from .distance import norm, ratio
from .errors import OptionError

Metric = Callable[[Any, Any], Any]


class Means:
    """Running means over batches, weighted by their rows.

    Args:
        number: of models besides the first.
        metric: called with an output and the batch, or None.

    Attributes:
        batches: seen so far.
        samples: rows in them.
        failures: per model that raised an error instead of an output, what it said.
    """

    def __init__(self, number: int, metric: Metric | None = None) -> None:
        self.batches = self.samples = 0
        self.failures: dict[int, str] = {}
        self._metric = metric
        self._distances, self._agreements = [0.0] * number, [0.0] * number
        self._metrics = [0.0] * (number + 1)
        self._classes = True

    def add(self, batch: Any, outputs: Iterable[Any]) -> None:
        """Count one batch.

        Args:
            batch: as the data gave it.
            outputs: of the first model, then of the others; an error counts as an output that
                is infinitely far away.
        """
        outputs = iter(outputs)
        first = next(outputs)
        true, size = scores(first), rows(batch)
        self.batches, self.samples = self.batches + 1, self.samples + size
        self._classes = self._classes and true is not None
        self._rate(0, first, batch, size)
        for place, output in enumerate(outputs):  # one at a time: they may be large
            if isinstance(output, Exception):
                self.failures.setdefault(place, str(output))
                self._distances[place] = math.inf
                continue
            self._rate(place + 1, output, batch, size)
            self._distances[place] += size * relative_distance(output, first)
            mine = scores(output)
            if true is not None and mine is not None:
                same = (mine.argmax(-1) == true.argmax(-1)).double().mean()
                self._agreements[place] += size * float(same)

    def _rate(self, place: int, output: Any, batch: Any, size: int) -> None:
        """Apply the metric."""
        if self._metric is not None:
            self._metrics[place] += size * number(self._metric(output, batch))

    def distance(self, place: int) -> float:
        """The mean relative distance of a model's output from the first model's."""
        return self._distances[place] / self.samples

    def agreement(self, place: int) -> float | None:
        """The share of samples in the same class; None if the outputs are no class scores."""
        known = self._classes and place not in self.failures
        return self._agreements[place] / self.samples if known else None

    def metric(self, place: int | None) -> float | None:
        """The mean metric of a model, of the first one for None; None without a metric."""
        if self._metric is None or place in self.failures:
            return None
        return self._metrics[0 if place is None else place + 1] / self.samples


def relative_distance(got: Any, true: Any) -> float:
    """Norm of the change of all floating tensors together, over their norm."""
    pairs = list(zip(floating(got), floating(true), strict=True))
    if not pairs:
        raise OptionError(
            "the model's output holds no floating-point tensor to compare; pass forward= that "
            "returns one"
        )
    difference = math.hypot(*(norm(_wide(a) - _wide(b)) for a, b in pairs))
    return ratio(difference, math.hypot(*(norm(b) for _, b in pairs)))


def floating(output: Any) -> list[torch.Tensor]:
    """The floating-point tensors of an output."""
    leaves = pytree.tree_leaves(_fields(output))
    return [x for x in leaves if isinstance(x, torch.Tensor) and x.is_floating_point()]


def scores(output: Any) -> torch.Tensor | None:
    """Class scores along the last dimension: a matrix, or what an output calls ``logits``."""
    named = _fields(output)
    if isinstance(named, Mapping):
        found = named.get("logits")
    else:
        found = named if isinstance(named, torch.Tensor) and named.dim() == 2 else None
    if not isinstance(found, torch.Tensor) or not found.is_floating_point():
        return None
    return found if found.dim() >= 2 and found.shape[-1] > 1 else None


def rows(batch: Any) -> int:
    """The length of a batch: that of its first tensor which has one."""
    tensors = (x for x in pytree.tree_leaves(_fields(batch)) if isinstance(x, torch.Tensor))
    return next((len(x) for x in tensors if x.dim() and len(x)), 1)


def number(value: Any) -> float:
    """What a metric gave.

    Raises:
        OptionError: it is no number.
    """
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        raise OptionError(f"metric= must give one number, not {value!r}") from None


def _fields(value: Any) -> Any:
    """A mapping that pytrees may not know (a batch of tokens, a model's output) as a dict."""
    return dict(value) if isinstance(value, Mapping) else value


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    half = tensor.dtype in (torch.float16, torch.bfloat16)
    return tensor.float() if half else tensor
