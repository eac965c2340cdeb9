"""The recipe, stage by stage: pretrain, rewire and finetune, extract, train, evaluate.

Each stage writes what it made and is skipped where that is there, so a run that was interrupted
goes on where it was.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from .backbones import Backbone
from .batches import Batch, Loader
from .detector import Detector, detect, detector_loss
from .engine import Group, Trainer, Training, save
from .entries import ENTRIES, LOCALIZERS, Classifier, Entry
from .features import FeatureSet, extract
from .metrics import Detection, evaluate
from .setting import VALIDATION, Setting, batches


@dataclass(frozen=True)
class Stages:
    """All stages of one backbone.

    Attributes:
        setting: the data and the recipe.
        backbone: how to make it.
        folder: where everything goes.
        group: the processes that train together.
        progress: shows how far a stage is.
        say: is told in words what was found.
    """

    setting: Setting
    backbone: Backbone
    folder: Path
    group: Group
    progress: Progress | None = None
    say: Callable[[str], None] = lambda words: None

    # classification of clips

    def pretrain(self) -> Path:
        """Train the backbone to name clips; the file of its weights and accuracy.

        If it has its package's weights, only the classifier on top of it is trained.
        """
        done = self.folder / "pretrained.pt"
        if not done.exists():
            torch.manual_seed(self.setting.pretraining.seed)
            model = Classifier.of(self.backbone, len(self.setting.trimmed("training").labels))
            if self.backbone.pretrained:
                model.fix()
            trainer = self._learn(model, self.setting.pretraining, done, "pretrain")
            self._keep(trainer.averaged, {"accuracy": self.accuracy(trainer.averaged)}, done)
        return done

    def finetune(self, entry: Entry) -> Path:
        """Rewire the pretrained backbone and train it on the same clips for a while.

        The original goes on as long, so that no way has seen the clips more often.
        """
        done = self.folder / f"finetuned-{entry.name}.pt"
        if not done.exists():
            model, before = self.rewired(entry)
            start = self.accuracy(model)
            words = f"finetune, {entry.words}"
            trainer = self._learn(model, self.setting.finetuning, done, words)
            found = {"pretrained": before, "start": start, "end": self.accuracy(trainer.averaged)}
            self._keep(trainer.averaged, found, done)
        return done

    def rewired(self, entry: Entry) -> tuple[Classifier, float]:
        """The pretrained classifier with an entry's backbone, and the accuracy that it had."""
        state = torch.load(self.pretrain(), weights_only=True)
        model = Classifier.of(self.backbone, len(self.setting.trimmed("training").labels))
        model.load_state_dict(state["model"])
        frames = self._example(self.setting.clip_frames)
        model.backbone = entry.made_of(model.backbone.train(), frames)
        return model, state["accuracy"]

    def accuracy(self, model: nn.Module) -> float:
        """The part of the validation clips that a classifier names rightly."""
        right = count = 0
        model.eval()
        clips = self.setting.trimmed(VALIDATION, self.setting.trimmed("training").labels)
        for batch in batches(clips, self.setting.pretraining, shuffle=False):
            if len(batch):
                given = batch.to(self.group.device)
                with torch.no_grad():
                    named = model(given.frames).argmax(1)
                right += int((named == torch.cat([*given.labels])).sum())
                count += len(batch)
        return right / max(count, 1)

    def _learn(self, model: nn.Module, training: Training, done: Path, words: str) -> Trainer:
        """Train a classifier of clips."""
        going = done.with_suffix(".going")
        trainer = Trainer(model, clip_loss, training, self.group, going)
        loader = batches(self.setting.trimmed("training"), training, self.group)
        trainer.fit(loader, self.progress, words)
        return trainer

    def _keep(self, model: nn.Module, found: dict[str, float], done: Path) -> None:
        """Write a model's weights and what was found, in place of what it was to go on from."""
        if self.group.leads:
            save({"model": model.state_dict(), **found}, done)
            done.with_suffix(".going").unlink(missing_ok=True)
            figures = ", ".join(f"{name} {value:.1%}" for name, value in found.items())
            self.say(f"{self.backbone.words}, {done.stem}: {figures}")
        self.group.wait()

    def _example(self, frames: int) -> Tensor:
        pixels = self.setting.pixels
        return torch.randn(1, 3, frames, pixels, pixels, generator=torch.Generator().manual_seed(0))

    # localization

    def train(self, entry: Entry, localizer: str, seed: int) -> Path:
        """Train a localizer, with the backbone unless it is fixed; the file of what it detects."""
        done = self.folder / f"{localizer}-{entry.name}-{seed}.json"
        if not done.exists():
            training = self.training(seed)
            torch.manual_seed(seed)
            model = self.detector(entry, localizer)
            trainer = Trainer(
                model, detector_loss, training, self.group, done.with_suffix(".going"),
                model.backbone.parameters(),
            )  # fmt: skip
            loader = self.learned(entry, training)
            start = time.perf_counter()
            trainer.fit(loader, self.progress, f"{LOCALIZERS[localizer].words}, {entry.words}")
            seconds = time.perf_counter() - start
            self._search(trainer.averaged, entry, done, seconds, trainer.history)
        return done

    def training(self, seed: int) -> Training:
        """How a localizer is trained, in every way alike."""
        given, backbone = self.setting.training, self.backbone
        epochs = max(1, round(given.epochs * backbone.patience))
        rate = given.backbone_rate * backbone.pace
        return replace(given, seed=seed, epochs=epochs, backbone_rate=rate)

    def detector(self, entry: Entry, localizer: str) -> Detector:
        """A new localizer on the backbone, or on its features."""
        classes = len(self.setting.truth().labels)
        head = LOCALIZERS[localizer].make(self.backbone.channels, classes)
        body = self.finetuned(entry).backbone if entry.trained else nn.Identity()
        return Detector(body, head, self.backbone.stride)

    def finetuned(self, entry: Entry) -> Classifier:
        """The classifier whose backbone a localizer starts with."""
        model, _ = self.rewired(entry)
        model.load_state_dict(torch.load(self.finetune(entry), weights_only=True)["model"])
        return model

    def features(self, subset: str) -> Path:
        """The features of a subset's videos by the original backbone; the file they are in."""
        done = self.folder / f"features-{subset}.pt"
        if not done.exists():
            backbone = self.finetuned(ENTRIES["original"]).backbone
            shown = self.setting.searched(self.setting.truth(), subset)
            loader = batches(shown, self.setting.training, shuffle=False)
            save(extract(backbone, loader, self.group.device), done)
        return done

    def learned(self, entry: Entry, training: Training) -> Loader:
        """What a localizer learns from: videos, or their features."""
        if entry.trained:
            dataset: Any = self.setting.trained(self.setting.truth(), training.seed)
        else:
            dataset = FeatureSet.read(self.features("training"))
        return batches(dataset, training, self.group)

    def _searched(self, entry: Entry) -> Any:
        if entry.trained:
            return self.setting.searched(self.setting.truth(), VALIDATION)
        return FeatureSet.read(self.features(VALIDATION))

    def _search(
        self, model: Any, entry: Entry, done: Path, seconds: float, history: Sequence[Any]
    ) -> None:
        """Detect actions in the validation videos, and write them with their scores."""
        if self.group.leads:
            annotations = self.setting.truth()
            loader = batches(self._searched(entry), self.setting.training, shuffle=False)
            found = detect(model, loader, annotations.labels)
            scores = evaluate(found, annotations, VALIDATION, self.setting.thresholds)
            row = {
                "average": scores.average,
                "map": dict(zip(map(_told, scores.thresholds), scores.map.tolist(), strict=True)),
                "seconds": seconds,
                "loss": [epoch["total"] for epoch in history],
                "detections": [asdict(detection) for detection in found],
            }
            write(row, done)
            done.with_suffix(".going").unlink(missing_ok=True)
            self.say(f"{done.stem}: average mAP {scores.average:.1%}")
        self.group.wait()


def clip_loss(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Cross entropy of a batch of clips."""
    labels = torch.cat([*batch.labels])
    return {"total": cross_entropy(model(batch.frames).float(), labels)}


def detections_of(path: Path) -> list[Detection]:
    """What `Stages.train` has written."""
    return [Detection(**row) for row in json.loads(path.read_text())["detections"]]


def write(row: Any, path: Path) -> None:
    """A file that is whole at any time."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps(row))
    new.replace(path)


def _told(threshold: float) -> str:
    return f"{threshold:.2f}"
