"""The training loop that every stage shares: resumable, averaged, distributed.

What an epoch does depends on its number and the seed alone, so a run that is interrupted and goes
on from its last checkpoint sees the data that it would have seen.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


@dataclass(frozen=True)
class Training:
    """How to train.

    Attributes:
        epochs: in all.
        batch: samples per step and process.
        rate: highest learning rate, of what is new.
        backbone_rate: of the backbone.
        decay: weight decay of AdamW; biases, norms and other vectors have none.
        warmup: epochs of rising learning rates; they fall as a cosine afterwards.
        clip: highest norm of the gradients.
        average: decay of the moving average of the weights, which is what is evaluated; 0 for none.
            It rises to that with the steps, so that a short run forgets its first weights.
        bf16: whether forwards run under bfloat16 autocast.
        workers: processes that read data, per process that trains.
        seed: of data order, crops, dropout and initial weights.
    """

    epochs: int = 10
    batch: int = 4
    rate: float = 1e-3
    backbone_rate: float = 1e-4
    decay: float = 0.05
    warmup: float = 1.0
    clip: float = 1.0
    average: float = 0.99
    bf16: bool = False
    workers: int = 2
    seed: int = 0


@dataclass(frozen=True)
class Group:
    """Processes that train together, started by ``torchrun``; one alone by default."""

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @classmethod
    def joined(cls) -> Group:
        """The group of this process, from what ``torchrun`` has set; joined if there are others."""
        world, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
        found = torch.cuda.is_available()
        device = torch.device("cuda", local) if found else torch.device("cpu")
        if world > 1 and not torch.distributed.is_initialized():
            torch.distributed.init_process_group("nccl" if found else "gloo")
        return cls(int(os.environ.get("RANK", 0)), world, device)

    @property
    def leads(self) -> bool:
        """Whether this process writes files and reports."""
        return self.rank == 0

    def wrapped(self, model: nn.Module) -> nn.Module:
        """A model whose gradients are averaged over the group."""
        return DistributedDataParallel(model) if self.world > 1 else model

    def wait(self) -> None:
        """Until all have come here."""
        if self.world > 1:
            torch.distributed.barrier()


Loss = Callable[[nn.Module, Any], dict[str, Tensor]]
Advance = Callable[[], None]


class Trainer:
    """Trains a model epoch by epoch.

    Args:
        model: moved to the group's device.
        loss: the losses of a batch, ``"total"`` among them: ``loss(model, batch)``.
        training: how.
        group: whom with.
        checkpoint: what to go on from if it is there, written after every epoch; None for nothing.
        backbone: the parameters that have the learning rate of the backbone.

    Attributes:
        model: as given, without what averages its gradients.
        averaged: the moving average of its weights; the model itself without one.
        history: mean losses per epoch.
        broken: the videos that could not be read, and why.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        training: Training,
        group: Group | None = None,
        checkpoint: Path | None = None,
        backbone: Iterable[nn.Parameter] = (),
    ) -> None:
        self.group, self.training, self.loss = group or Group(), training, loss
        self.model = model.to(self.group.device)
        self.checkpoint, self.history = checkpoint, list[dict[str, float]]()
        self.broken: dict[str, str] = {}
        self.optimizer = torch.optim.AdamW(
            parameter_groups(model, {id(p) for p in backbone}, training)
        )
        self._average: AveragedModel | None = None
        if training.average:
            averaging = partial(_average_in, training.average)
            self._average = AveragedModel(model, multi_avg_fn=averaging, use_buffers=True)
        self._resume()

    @property
    def averaged(self) -> nn.Module:
        """What to evaluate."""
        return self.model if self._average is None else self._average.module

    @property
    def epoch(self) -> int:
        """How many epochs are done."""
        return len(self.history)

    def fit(
        self,
        loader: Any,
        progress: Progress | None = None,
        words: str = "",
        until: int | None = None,
    ) -> None:
        """Train for the epochs that are left.

        Args:
            loader: batches; ``set_epoch`` is called before each epoch.
            progress: shows how far it is.
            words: what to call it there.
            until: the epoch to stop behind; the last one by default.
        """
        wrapped = self.group.wrapped(self.model)
        last = self.training.epochs if until is None else min(until, self.training.epochs)
        left = last - self.epoch
        bar = progress.add_task(words, total=max(left, 0) * len(loader)) if progress else None

        def advance() -> None:
            if progress is not None and bar is not None:
                progress.advance(bar)

        while self.epoch < last:
            torch.manual_seed(_seed(self.training.seed, self.epoch, self.group.rank))
            loader.set_epoch(self.epoch)
            self.history.append(self._run(wrapped, loader, advance))
            self._save()
        self.group.wait()

    def _run(self, wrapped: nn.Module, loader: Any, advance: Advance) -> dict[str, float]:
        """One epoch."""
        self.model.train()
        sums: dict[str, float] = {}
        count, steps = 0, max(len(loader), 1)
        with self._uneven(wrapped):
            for index, batch in enumerate(loader):
                self._schedule(self.epoch + index / steps)
                if len(batch):
                    for name, value in self._step(wrapped, batch).items():
                        sums[name] = sums.get(name, 0.0) + value
                    count += 1
                self.broken.update({video.video: video.reason for video in batch.broken})
                advance()
        return {name: value / max(count, 1) for name, value in sums.items()}

    def _uneven(self, wrapped: nn.Module) -> AbstractContextManager[Any]:
        """A process whose videos are broken has fewer steps than others, which do not wait."""
        if isinstance(wrapped, DistributedDataParallel):
            return Join([wrapped])
        return nullcontext()

    def _step(self, wrapped: nn.Module, batch: Any) -> dict[str, float]:
        device = self.group.device
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.training.bf16):
            losses = self.loss(wrapped, batch.to(device))
        losses["total"].backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.training.clip)
        self.optimizer.step()
        if self._average is not None:
            self._average.update_parameters(self.model)
        return {name: value.item() for name, value in losses.items()}

    def _schedule(self, epoch: float) -> None:
        scale = schedule(epoch, self.training)
        for group in self.optimizer.param_groups:
            group["lr"] = group["rate"] * scale

    def _save(self) -> None:
        if self.checkpoint is None or not self.group.leads:
            return
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "history": self.history,
            "average": self._average.state_dict() if self._average is not None else None,
        }
        save(state, self.checkpoint)

    def _resume(self) -> None:
        if self.checkpoint is None or not self.checkpoint.exists():
            return
        state = torch.load(self.checkpoint, map_location=self.group.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.history = state["history"]
        if self._average is not None:
            self._average.load_state_dict(state["average"])


def parameter_groups(
    model: nn.Module, backbone: set[int], training: Training
) -> list[dict[str, Any]]:
    """Parameters by learning rate and weight decay.

    Args:
        model: whose.
        backbone: the ids of those that have the learning rate of the backbone.
        training: the rates.
    """
    kinds: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            key = id(parameter) in backbone, parameter.ndim > 1
            kinds.setdefault(key, []).append(parameter)
    return [
        {
            "params": parameters,
            "rate": training.backbone_rate if own else training.rate,
            "lr": 0.0,
            "weight_decay": training.decay if decays else 0.0,
        }
        for (own, decays), parameters in kinds.items()
    ]


def schedule(epoch: float, training: Training) -> float:
    """The part of the highest learning rate at some time: a line up, then half a cosine down."""
    if epoch < training.warmup:
        return (epoch + 1e-2) / (training.warmup + 1e-2)
    left = max(training.epochs - training.warmup, 1e-9)
    return 0.5 * (1 + math.cos(math.pi * min((epoch - training.warmup) / left, 1.0)))


def _average_in(
    decay: float, averages: list[Tensor], values: list[Tensor], count: Tensor | int
) -> None:
    """Move averages of so many values on; in the beginning about a tenth of these counts."""
    decay = min(decay, (1 + int(count)) / (10 + int(count)))
    get_ema_multi_avg_fn(decay)(averages, values, count)


def save(state: Any, path: Path) -> None:
    """Write a file so that what is there is whole at any time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    torch.save(state, new)
    new.replace(path)


def _seed(*numbers: int) -> int:
    """One seed of several numbers."""
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number + 1) % 2**63
    return seed
