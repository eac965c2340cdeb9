"""Untrimmed videos of scikit-learn's digits in action, and trimmed clips to pretrain on.

What is to be found are kinds of motion. Which digit moves, the digits that stand around or jitter,
the drifting background and the restless camera say nothing about it. The clips show other motions
than those that are to be found, and none of them begins or ends: whoever learns from them alone
knows something of motion, but neither the classes nor their boundaries.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from .actions import MOTIONS
from .annotations import Action, Annotations, Video, write
from .gestures import GESTURES
from .scene import Rendering, draw
from .script import TRAINING, VALIDATION, gesturing, perform
from .video import encode

# Of the random numbers that belong to a seed.
STREAMS = {TRAINING: 0, VALIDATION: 1, "clips": 2}
# Every fifth clip of a class is kept for validation.
CLIP_FOLD = 5


def render_localization(
    folder: str | Path,
    *,
    training: int,
    validation: int,
    seed: int,
    rendering: Rendering | None = None,
    progress: Callable[[], None] | None = None,
) -> Path:
    """Render untrimmed videos; a video stays the same when more are asked for.

    Args:
        folder: gets ``videos/<name>.mp4`` and, when all are there, ``annotations.json``.
        training: number of training videos.
        validation: number of validation videos; no picture of a digit is in both subsets.
        seed: of everything.
        rendering: how.
        progress: called after each video.

    Returns:
        the annotations' path. Their labels are names of `actions.MOTIONS`.
    """
    folder, rendering = Path(folder), rendering or Rendering()
    (folder / "videos").mkdir(parents=True, exist_ok=True)
    videos = []
    for subset, count in ((TRAINING, training), (VALIDATION, validation)):
        for index in range(count):
            name = f"{subset}_{index:04d}"
            rng = np.random.default_rng([seed, STREAMS[subset], index])
            digits, actions = perform(subset, rendering, rng)
            frames = draw(digits, rendering, rng)
            encode(folder / "videos" / f"{name}.mp4", frames, rendering.rate, rendering.codec)
            videos.append(Video(name, subset, len(frames) / rendering.rate, actions))
            if progress is not None:
                progress()
    path = folder / "annotations.json"
    write(path, Annotations(tuple(videos), tuple(sorted(MOTIONS)), ()))
    return path


def render_clips(
    folder: str | Path, *, per_class: int, seed: int, rendering: Rendering | None = None
) -> Path:
    """Render trimmed clips of one digit each that makes a gesture.

    Args:
        folder: gets ``clips/<name>.mp4`` and, when all are there, ``clips.json``.
        per_class: number of clips for each of `gestures.GESTURES`, every fifth of them for
            validation.
        seed: of everything.
        rendering: how.

    Returns:
        the annotations' path: one segment per clip, from its start to its end.
    """
    folder, rendering = Path(folder), rendering or Rendering()
    (folder / "clips").mkdir(parents=True, exist_ok=True)
    clips = []
    for number, label in enumerate(GESTURES):
        for index in range(per_class):
            subset = VALIDATION if index % CLIP_FOLD == CLIP_FOLD - 1 else TRAINING
            name = f"{label.replace(' ', '_')}_{index:04d}"
            rng = np.random.default_rng([seed, STREAMS["clips"], number, index])
            frames = draw(gesturing(label, subset, rendering, rng), rendering, rng)
            encode(folder / "clips" / f"{name}.mp4", frames, rendering.rate, rendering.codec)
            duration = len(frames) / rendering.rate
            clips.append(Video(name, subset, duration, (Action(0.0, duration, label),)))
    path = folder / "clips.json"
    write(path, Annotations(tuple(clips), tuple(sorted(GESTURES)), ()))
    return path
