"""The whole comparison: every entry, localizer, backbone and seed, from nothing to one file."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from rich.progress import Progress

from .backbones import BACKBONES, Backbone
from .engine import Group
from .entries import ENTRIES, LOCALIZERS
from .metrics import Detection
from .setting import VALIDATION, Setting
from .stages import Stages, detections_of

Row = dict[str, Any]
# The localizers of the comparison; video self-stitching is an option of `vsgn`.
COMPARED = ("actionformer", "vsgn")


@dataclass(frozen=True)
class Comparison:
    """What is compared with what.

    Attributes:
        setting: the data and the recipe.
        folder: where every stage puts what it makes.
        backbones, entries, localizers, seeds: of all of which the product is trained.
    """

    setting: Setting
    folder: Path
    backbones: Sequence[str]
    entries: Sequence[str] = tuple(ENTRIES)
    localizers: Sequence[str] = COMPARED
    seeds: Sequence[int] = (0, 1, 2)

    @property
    def leads(self) -> bool:
        """Whether this process writes files and reports."""
        return Group.joined().leads

    def stages(self, name: str, progress: Progress | None, say: Callable[[str], None]) -> Stages:
        """The stages of one backbone."""
        folder, group = self.folder / name, Group.joined()
        return Stages(self.setting, self.backbone(name), folder, group, progress, say)

    @property
    def families(self) -> list[str]:
        """Of the backbones, each once."""
        return list(dict.fromkeys(BACKBONES[name]().family for name in self.backbones))

    def backbone(self, name: str) -> Backbone:
        """A backbone for the size of the videos."""
        return replace(BACKBONES[name](), frames=self.setting.frames, pixels=self.setting.pixels)

    def run(self, progress: Progress | None, say: Callable[[str], None]) -> Row:
        """Whatever is not there yet, and the rows of all."""
        found: Row = {"classification": [], "localization": []}
        for backbone in self.backbones:
            stages = self.stages(backbone, progress, say)
            found["classification"] += self._classified(backbone, stages)
            for localizer in self.localizers:
                for entry in self.entries:
                    found["localization"].append(self._trained(backbone, stages, localizer, entry))
        return found

    def _classified(self, backbone: str, stages: Stages) -> list[Row]:
        """Accuracies on trimmed clips."""
        rows = []
        for name in self.entries:
            entry = ENTRIES[name]
            if entry.trained:
                state = torch.load(stages.finetune(entry), weights_only=True)
                figures = {key: state[key] for key in ("pretrained", "start", "end")}
                rows.append({"backbone": backbone, "entry": name, **figures})
        return rows

    def _trained(self, backbone: str, stages: Stages, localizer: str, entry: str) -> Row:
        """Mean average precisions over seeds."""
        files = [stages.train(ENTRIES[entry], localizer, seed) for seed in self.seeds]
        runs = [json.loads(path.read_text()) for path in files]
        averages = [run["average"] for run in runs]
        return {
            "backbone": backbone,
            "localizer": localizer,
            "entry": entry,
            "average": averages,
            "mean": mean(averages),
            "deviation": stdev(averages) if len(averages) > 1 else 0.0,
            "map": {key: mean(run["map"][key] for run in runs) for key in runs[0]["map"]},
            "seconds": [round(run["seconds"], 1) for run in runs],
        }

    def timelines(self, stages: Stages, localizer: str, videos: int = 4, best: int = 10) -> Row:
        """Actions and detections of the first seed, for the picture of a few videos.

        Args:
            stages: of one backbone; all its entries are there.
            localizer: which.
            videos: how many of those that are searched.
            best: how many detections per video and entry, those with the highest scores.
        """
        truth = self.setting.truth()
        found = {
            entry: detections_of(stages.train(ENTRIES[entry], localizer, self.seeds[0]))
            for entry in self.entries
        }
        rows = [
            {
                "name": video.name,
                "duration": video.duration,
                "actions": [[a.start, a.end, a.label, 1.0] for a in video.actions],
                "found": {entry: _best(own, video.name, best) for entry, own in found.items()},
            }
            for video in truth.subset(VALIDATION)[:videos]
        ]
        return {
            "backbone": stages.backbone.words,
            "localizer": LOCALIZERS[localizer].words,
            "labels": list(truth.labels),
            "videos": rows,
        }


def _best(found: Sequence[Detection], video: str, count: int) -> list[list[Any]]:
    own = sorted((d for d in found if d.video == video), key=lambda d: -d.score)
    return [[round(d.start, 2), round(d.end, 2), d.label, round(d.score, 4)] for d in own[:count]]
