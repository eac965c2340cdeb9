"""Callbacks by which the trainers people use step a `Schedule`, and keep it in their checkpoints.

The trainers are imported when a callback is made, never before.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

from .errors import OptionError
from .schedule import Schedule

NAME = "CouplingSchedule"


class _HuggingFace:
    """What the callback for `transformers.Trainer` does.

    A resumed trainer either makes the callback anew, from no arguments, and sets its attributes, or
    leaves it alone (``restore_callback_states_from_checkpoint``); what is in the checkpoint is
    taken in both cases. So the schedule belongs to the class.
    """

    schedule: Schedule

    @property
    def progress(self) -> dict[str, Any]:
        """The schedule's state."""
        return self.schedule.state_dict()

    @progress.setter
    def progress(self, state: dict[str, Any]) -> None:
        self.schedule.load_state_dict(state)

    def state(self) -> dict[str, Any]:
        """What goes into the trainer's checkpoint."""
        return {"args": {}, "attributes": {"progress": self.progress}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Go on where the checkpoint was; without one, where the schedule is."""
        name = type(self).__name__
        saved = (state.stateful_callbacks or {}).get(name)
        if isinstance(saved, list):
            raise OptionError(f"name={name!r}: two schedules have it; expected one name for each")
        if saved is not None:
            self.progress = saved["attributes"]["progress"]

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """After an optimizer step."""
        if self.schedule.by == "step":
            self.schedule.step()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """After an epoch."""
        if self.schedule.by == "epoch":
            self.schedule.step()


class _Lightning:
    """What the callback for Lightning does."""

    schedule: Schedule
    _steps = 0  # the optimizer's, so far

    def state_dict(self) -> dict[str, Any]:
        """What goes into the trainer's checkpoint."""
        return self.schedule.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the checkpoint was."""
        self.schedule.load_state_dict(state_dict)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Note where the optimizer is."""
        self._steps = trainer.global_step

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *others: Any) -> None:
        """After a batch; one that only accumulates gradients is no optimizer step."""
        if self.schedule.by == "step" and trainer.global_step != self._steps:
            self.schedule.step()
        self._steps = trainer.global_step

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """After an epoch."""
        if self.schedule.by == "epoch":
            self.schedule.step()


def hugging_face_callback(schedule: Schedule, name: str = NAME) -> Any:
    """A `transformers.TrainerCallback` that steps a schedule.

    After every optimizer step or every epoch, as the schedule's ``by`` says. Its state is saved
    with the trainer's checkpoints, and ``resume_from_checkpoint`` goes on from there::

        Trainer(rev, arguments, callbacks=[re2fx.trainers.hugging_face_callback(schedule)])

    Args:
        schedule: of the model that is trained.
        name: under which its state is saved; two schedules need two.
    """
    callback: Any = importlib.import_module("transformers.trainer_callback")
    bases = (_HuggingFace, callback.TrainerCallback, callback.ExportableState)
    return type(name, bases, {"schedule": _of(schedule)})()


def lightning_callback(schedule: Schedule, name: str = NAME) -> Any:
    """A Lightning ``Callback`` that steps a schedule.

    After every optimizer step or every epoch, as the schedule's ``by`` says; its state is saved
    with the checkpoints, and restored by ``fit(..., ckpt_path=)``::

        Trainer(callbacks=[re2fx.trainers.lightning_callback(schedule)])

    Args:
        schedule: of the model that is trained.
        name: under which its state is saved; two schedules need two.
    """
    older = "pytorch_lightning" in sys.modules and "lightning" not in sys.modules
    lightning: Any = importlib.import_module("pytorch_lightning" if older else "lightning.pytorch")
    return type(name, (_Lightning, lightning.Callback), {"schedule": _of(schedule)})()


def _of(schedule: Schedule) -> Schedule:
    if not isinstance(schedule, Schedule):
        raise OptionError(f"schedule={schedule!r}: expected a re2fx.Schedule")
    return schedule
