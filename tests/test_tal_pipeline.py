"""The pipeline on a set of a few rendered videos: every stage, interrupted runs, two processes."""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.tal import costs, jobs
from benchmarks.tal.__main__ import adjusted, keep
from benchmarks.tal.annotations import read
from benchmarks.tal.backbones import Backbone, slowfast, small_slowfast, small_swin, swin
from benchmarks.tal.batches import Sample
from benchmarks.tal.compare import Comparison
from benchmarks.tal.detector import detector_loss
from benchmarks.tal.engine import Group, Trainer, Training, parameter_groups, schedule
from benchmarks.tal.entries import ENTRIES, LOCALIZERS, Classifier
from benchmarks.tal.pictures import plot_map, plot_timelines
from benchmarks.tal.presets import small
from benchmarks.tal.scene import Rendering
from benchmarks.tal.setting import Setting
from benchmarks.tal.stages import Stages, detections_of
from benchmarks.tal.synthesis import render_clips, render_localization
from benchmarks.tal.tables import text_tal
from benchmarks.torchvision_shim import ensure_torchvision
from re2fx.zoo.steps import one_thread

ROOT = Path(__file__).parent.parent
BRIEF = Training(epochs=1, batch=2, warmup=0.5, average=0.5, workers=0)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """One thread, and random numbers that go on as if nothing had been drawn."""
    with one_thread(), torch.random.fork_rng():
        yield


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    """Two videos to learn from and one to search, of eight seconds each."""
    folder = tmp_path_factory.mktemp("tal")
    rendering = Rendering(size=32, duration=(8, 9), clip=2.0)
    render_localization(folder, training=2, validation=1, seed=0, rendering=rendering)
    render_clips(folder, per_class=5, seed=1, rendering=replace(rendering, duration=(2, 3)))
    return replace(
        small(folder), frames=32, clip_frames=8,
        pretraining=replace(BRIEF, batch=16), finetuning=replace(BRIEF, batch=16), training=BRIEF,
    )  # fmt: skip


def tiny(family: str) -> Backbone:
    made = small_swin((2, 2), width=8) if family == "swin" else small_slowfast(width=4)
    return replace(made, frames=32)


def stages_of(setting: Setting, folder: Path, family: str = "swin") -> Stages:
    return Stages(setting, tiny(family), folder, Group())


@pytest.mark.parametrize("family", ["swin", "slowfast"])
def test_backbones_keep_time(family: str) -> None:
    backbone = tiny(family)
    features = backbone.build()(backbone.example(2))
    assert features.shape == (2, backbone.channels, backbone.frames // backbone.stride)


def test_of_a_backbone_with_its_packages_weights_only_the_classifier_is_pretrained(
    setting: Setting, tmp_path: Path
) -> None:
    """Not even the statistics of its batch norms move."""
    backbone = replace(tiny("slowfast"), pretrained=True)
    given: list[nn.Module] = []

    def build() -> nn.Module:
        given.append(tiny("slowfast").build())
        return given[-1]

    stages = Stages(setting, replace(backbone, build=build), tmp_path, Group())
    done = torch.load(stages.pretrain(), weights_only=True)["model"]
    for name, value in given[0].state_dict().items():
        assert torch.equal(done[f"backbone.{name}"], value), name
    torch.manual_seed(setting.pretraining.seed)
    assert not torch.equal(Classifier.of(backbone, 8).head.weight, done["head.weight"])


@pytest.mark.parametrize(
    ("package", "backbone"),
    [
        ("torchvision.models._api", swin("t", weights=True)),
        ("pytorchvideo.models.hub.slowfast", slowfast(50, weights=True)),
    ],
)
def test_backbones_take_their_packages_weights(
    package: str, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What would be downloaded is what they have."""
    ensure_torchvision()
    plain = swin("t") if backbone.family == "swin" else slowfast(50)
    with torch.device("meta"):
        names = [name for name in plain.build().state_dict() if "head" not in name]
    loaded: list[dict[str, Any]] = []

    def state(model: nn.Module) -> dict[str, torch.Tensor]:
        return {name: torch.full_like(value, 0.5) for name, value in model.state_dict().items()}

    def load(url: str, **options: Any) -> dict[str, Any]:
        found = state(swin3d_t()) if backbone.family == "swin" else state(create_slowfast())
        loaded.append(found)
        return found if backbone.family == "swin" else {"model_state": found}

    from pytorchvideo.models.slowfast import create_slowfast
    from torchvision.models.video import swin3d_t

    monkeypatch.setattr(f"{package}.load_state_dict_from_url", load)
    built = backbone.build().state_dict()
    assert len(loaded) == 1
    floats = [name for name in names if built[name].is_floating_point()]
    assert floats
    assert all((built[name] == 0.5).all() for name in floats)


def test_there_are_no_weights_of_slowfast_152() -> None:
    with pytest.raises(ValueError, match="no weights of SlowFast-R152"):
        slowfast(152, weights=True)


@pytest.fixture(scope="module")
def pretrained(setting: Setting, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    stages_of(setting, folder).pretrain()
    return folder


@pytest.mark.parametrize("localizer", LOCALIZERS)
@pytest.mark.parametrize("entry", ENTRIES)
def test_every_way_reaches_detections(
    setting: Setting, pretrained: Path, entry: str, localizer: str
) -> None:
    stages = stages_of(setting, pretrained)
    done = stages.train(ENTRIES[entry], localizer, seed=0)
    row = json.loads(done.read_text())
    (video,) = read(setting.annotations).subset("validation")
    assert 0 <= row["average"] <= 1
    found = detections_of(done)
    assert found
    assert all(d.video == video.name and 0 <= d.start < d.end <= video.duration for d in found)
    written = done.stat().st_mtime_ns
    assert stages.train(ENTRIES[entry], localizer, seed=0).stat().st_mtime_ns == written


def test_a_run_goes_on_where_it_was(setting: Setting, pretrained: Path, tmp_path: Path) -> None:
    """Two epochs at once, and one after the other by two trainers, give the same weights."""
    stages = stages_of(setting, pretrained)
    given = replace(setting.training, epochs=2)

    def trained(*stops: int) -> dict[str, Any]:
        path = tmp_path / f"{len(stops)}.going"
        for stop in stops:
            torch.manual_seed(0)
            model = stages.detector(ENTRIES["re2tal"], "actionformer")
            trainer = Trainer(model, detector_loss, given, Group(), path)
            trainer.fit(stages.learned(ENTRIES["re2tal"], given), until=stop)
        return trainer.model.state_dict()

    once, twice = trained(2), trained(1, 2)
    assert once.keys() == twice.keys()
    for name, value in once.items():
        assert torch.equal(value, twice[name]), name


def test_a_step_keeps_less_where_its_backbone_is_rewired() -> None:
    rows = costs.steps(tiny("swin"), "vsgn", batch=1, rounds=1)
    assert [row["entry"] for row in rows] == list(ENTRIES)
    kept = {row["entry"]: row["kept"] for row in rows}
    assert kept["fixed"] < kept["re2tal"] <= kept["consistent"] < kept["original"]
    assert {row["entry"]: row["time"] for row in rows}["original"] == 1


def test_half_precision_keeps_losses_and_weights_in_fp32(
    setting: Setting, pretrained: Path
) -> None:
    stages = stages_of(setting, pretrained)
    seen: list[torch.dtype] = []

    def loss(model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        seen.append(batch.frames.new_ones(1, 1).mm(batch.frames.new_ones(1, 1)).dtype)
        return detector_loss(model, batch)

    for bf16 in (False, True):
        given = replace(setting.training, bf16=bf16)
        trainer = Trainer(stages.detector(ENTRIES["re2tal"], "vsgn"), loss, given)
        trainer.fit(stages.learned(ENTRIES["re2tal"], given))
        assert math.isfinite(trainer.history[0]["total"])
        assert {p.dtype for p in trainer.averaged.parameters()} == {torch.float32}
    assert set(seen) == {torch.float32, torch.bfloat16}


def test_a_backbone_has_its_own_pace_and_patience(setting: Setting, tmp_path: Path) -> None:
    backbone = replace(tiny("swin"), pace=0.5, patience=1.5)
    given = replace(setting, training=Training(epochs=4, rate=1e-3, backbone_rate=2e-3))
    found = Stages(given, backbone, tmp_path, Group()).training(seed=7)
    assert found == replace(given.training, epochs=6, backbone_rate=1e-3, seed=7)


def test_remembered_videos_give_the_same_samples(setting: Setting) -> None:
    plain, kept = (
        replace(setting, remembered=remembered).trained(setting.truth(), 0)
        for remembered in (False, True)
    )
    for index in (0, 1, 0, 1):
        (ours, theirs) = kept[index], plain[index]
        assert isinstance(ours, Sample)
        assert isinstance(theirs, Sample)
        assert torch.equal(ours.frames, theirs.frames)
    assert plain.memory is None
    assert kept.memory is not None
    assert len(kept.memory.kept) == 2


def test_a_run_goes_past_what_is_wrong_with_the_data(
    setting: Setting, pretrained: Path, tmp_path: Path
) -> None:
    """A missing video, a broken and an empty one, an annotation outside, an unseen class."""
    content = json.loads(setting.annotations.read_text())
    first, _, searched = content["database"].values()
    folder = tmp_path / "videos"
    shutil.copytree(setting.videos, folder)
    (folder / "broken.mp4").write_bytes(b"no video")
    shutil.copy(folder / "training_0000.mp4", folder / "empty.mp4")
    content["database"] |= {
        "missing": first,
        "broken": first,
        "empty": {**first, "annotations": []},
    }
    outside = {"segment": [1000, 1001], "label": first["annotations"][0]["label"]}
    first["annotations"] = [*first["annotations"], outside]
    searched["annotations"].append({"segment": [1, 3], "label": "unseen"})
    changed = tmp_path / "annotations.json"
    changed.write_text(json.dumps(content))
    stages = stages_of(replace(setting, annotations=changed, videos=folder), tmp_path)
    shutil.copy(pretrained / "pretrained.pt", tmp_path)

    assert any("outside" in problem for problem in stages.setting.truth().problems)
    trainer = Trainer(stages.detector(ENTRIES["original"], "vsgn"), detector_loss, BRIEF)
    trainer.fit(stages.learned(ENTRIES["original"], BRIEF))
    assert set(trainer.broken) == {"missing", "broken"}
    assert math.isfinite(trainer.history[0]["total"])
    row = json.loads(stages.train(ENTRIES["original"], "vsgn", seed=0).read_text())
    assert 0 <= row["average"] < 1
    assert "unseen" not in {detection["label"] for detection in row["detections"]}


class _Step:
    """A batch of one; only those after the first change the weights."""

    broken = ()

    def __init__(self, number: int) -> None:
        self.after = number > 0

    def __len__(self) -> int:
        return 1

    def to(self, device: torch.device) -> _Step:
        return self


class _Steps(list[_Step]):
    """A loader of so many."""

    def __init__(self, count: int) -> None:
        super().__init__(map(_Step, range(count)))

    def set_epoch(self, epoch: int) -> None:
        pass


def test_learning_rates_rise_and_fall() -> None:
    training = Training(epochs=10, warmup=2)
    rates = [schedule(epoch / 2, training) for epoch in range(21)]
    assert rates[:5] == sorted(rates[:5])
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert max(rates) == 1
    assert rates[-1] == pytest.approx(0)


def test_vectors_do_not_decay_and_the_backbone_has_its_own_rate() -> None:
    model = nn.ModuleDict({"body": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    body = {id(p) for p in model["body"].parameters()}
    training = Training(rate=1.0, backbone_rate=0.1, decay=0.5)
    groups = parameter_groups(model, body, training)
    found = {(g["rate"], g["weight_decay"]): [p.ndim for p in g["params"]] for g in groups}
    assert found == {(0.1, 0.5): [2], (0.1, 0.0): [1], (1.0, 0.5): [2], (1.0, 0.0): [1]}


def test_the_average_of_a_short_run_forgets_the_first_weights() -> None:
    """With a constant decay of 0.99, 0.36 of the first would be left."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)

    def loss(given: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        nn.init.zeros_(model.weight) if batch.after else None
        return {"total": 0 * model.weight.sum()}

    trainer = Trainer(model, loss, Training(epochs=1, rate=0.0, decay=0.0, average=0.99))
    trainer.fit(_Steps(101))
    (weight,) = trainer.averaged.parameters()
    assert 0 < weight.item() < 0.01


def test_values_are_set_by_name() -> None:
    setting = adjusted(small(Path("x")), ["frames=64", "training.epochs=3", "training.bf16=true"])
    assert (setting.frames, setting.training.epochs, setting.training.bf16) == (64, 3, True)
    with pytest.raises(SystemExit, match=r"no 'training\.epoch'"):
        adjusted(setting, ["training.epoch=3"])
    with pytest.raises(SystemExit, match="invalid literal"):
        adjusted(setting, ["frames=many"])


def test_only_the_small_setting_is_kept_for_the_readme(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.common.RESULTS", tmp_path / "results")
    for preset in ("small", "thumos"):
        keep(argparse.Namespace(preset=preset, folder=tmp_path), "tal", {"preset": preset})
    assert json.loads((tmp_path / "results" / "tal.json").read_text())["preset"] == "small"
    assert json.loads((tmp_path / "tal.json").read_text())["preset"] == "thumos"


def test_two_processes(setting: Setting, tmp_path: Path) -> None:
    """Started by ``torchrun``: both train, one writes."""
    folder = setting.annotations.parent
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
        "-m", "benchmarks.tal", "train", "--folder", str(folder), "--backbones", "swin",
        "--entries", "re2tal", "--localizers", "actionformer", "--seeds", "1", "--set",
        "frames=32", "clip_frames=8", *(f"{stage}.epochs=1" for stage in
        ("pretraining", "finetuning", "training")),
    ]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (folder / "runs" / "swin" / "actionformer-re2tal-0.json").exists()


def test_jobs_make_what_a_comparison_reads(setting: Setting, tmp_path: Path) -> None:
    small_set = replace(
        setting, pretraining=replace(BRIEF, batch=32), finetuning=replace(BRIEF, batch=32)
    )
    comparison = Comparison(small_set, tmp_path, ["swin"], ["fixed", "original"], ["vsgn"], [3])
    words: list[str] = []
    jobs.run(comparison, 2, words.append)
    assert any("vsgn-fixed-3" in line for line in words)
    made = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "swin").iterdir()}
    assert {"vsgn-fixed-3.json", "vsgn-original-3.json"} <= made.keys()
    comparison.run(None, words.append)
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "swin").iterdir()} == made


def test_a_comparison_has_a_row_for_each_way(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.tal.compare.BACKBONES", {"swin": lambda: tiny("swin")})
    comparison = Comparison(
        setting, tmp_path, ["swin"], ["fixed", "original"], ["actionformer"], [0]
    )
    found = comparison.run(None, lambda words: None)
    assert [row["entry"] for row in found["localization"]] == ["fixed", "original"]
    assert [row["entry"] for row in found["classification"]] == ["original"]
    where = {"cpu": "a processor", "cores": 2, "torch": "2", "python": "3", "date": "today"}
    fixed, original = (row["mean"] for row in found["localization"])
    text = text_tal({**found, "environment": where})
    assert f"| end to end, over fixed features | {100 * (original - fixed):+.1f} |" in text
    assert f"| fixed features | {fixed:.1%} (0.0%) |" in text
    bars: Any = plot_map(found).axes[0].patches
    assert [bar.get_height() for bar in bars] == [100 * fixed, 100 * original]

    stages = comparison.stages("swin", None, lambda words: None)
    lines = comparison.timelines(stages, "actionformer", best=3)
    (video,), (true,) = lines["videos"], setting.truth().subset("validation")
    assert video["actions"] == [[a.start, a.end, a.label, 1.0] for a in true.actions]
    assert [len(spans) for spans in video["found"].values()] == [3, 3]
    (axes,) = plot_timelines(lines).axes
    assert len(axes.patches) == len(true.actions) + 6
