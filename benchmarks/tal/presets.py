"""Settings by name: the small comparison on rendered videos, and the data sets of the papers."""

from __future__ import annotations

from pathlib import Path

from .engine import Training
from .metrics import ACTIVITYNET, THUMOS
from .setting import Setting

# With the weights of their packages, on which only a classifier is trained before they are rewired.
FULL_SIZE = ("swin3d_t", "slowfast_r101")
HEAD = Training(epochs=2, batch=8, rate=1e-3, bf16=True)


def small(folder: Path) -> Setting:
    """Rendered digits, on two CPU cores."""
    return Setting(
        annotations=folder / "annotations.json",
        videos=folder / "videos",
        clips=folder / "clips.json",
        clip_videos=folder / "clips",
        thresholds=ACTIVITYNET,
        frames=96,
        pixels=32,
        clip_frames=16,
        remembered=True,
        pretraining=Training(epochs=25, batch=8, rate=1e-3, backbone_rate=1e-3, workers=0),
        finetuning=Training(epochs=2, batch=8, rate=1e-3, backbone_rate=1e-3, workers=0),
        training=Training(epochs=6, batch=2, rate=1e-3, backbone_rate=1e-3, workers=0),
    )


def activitynet(folder: Path) -> Setting:
    """ActivityNet-1.3 as Re2TAL trains on it: whole videos of 768 frames."""
    return Setting(
        annotations=folder / "activity_net.v1-3.min.json",
        videos=folder / "videos",
        clips=folder / "kinetics" / "clips.json",
        clip_videos=folder / "kinetics" / "videos",
        sampling="resize",
        frames=768,
        pixels=224,
        clip_frames=32,
        thresholds=ACTIVITYNET,
        backbones=FULL_SIZE,
        pretraining=HEAD,
        finetuning=Training(epochs=30, batch=8, rate=1e-4, backbone_rate=1e-4, bf16=True),
        training=Training(epochs=15, batch=2, rate=1e-3, backbone_rate=1e-5, bf16=True),
    )


def thumos(folder: Path) -> Setting:
    """THUMOS-14: windows of 768 frames at 7.5 frames per second."""
    return Setting(
        annotations=folder / "thumos14.json",
        videos=folder / "videos",
        clips=folder / "kinetics" / "clips.json",
        clip_videos=folder / "kinetics" / "videos",
        sampling="windows",
        frames=768,
        pixels=224,
        rate=7.5,
        stride=384,
        clip_frames=32,
        thresholds=THUMOS,
        backbones=FULL_SIZE,
        pretraining=HEAD,
        finetuning=Training(epochs=30, batch=8, rate=1e-4, backbone_rate=1e-4, bf16=True),
        training=Training(epochs=40, batch=2, rate=1e-4, backbone_rate=1e-5, bf16=True),
    )


PRESETS = {"small": small, "activitynet": activitynet, "thumos": thumos}
