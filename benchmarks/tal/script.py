"""Who is in a rendered video, and who does what when."""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from sklearn.datasets import load_digits

from .actions import APART, HIGH, LARGE, LOW, MOTIONS, SMALL, TRIALS, Span, Track, possible
from .annotations import Action
from .gestures import perform_gesture
from .scene import Digit, Rendering, colour

TRAINING, VALIDATION = "training", "validation"
# The first so many of the pictures are for training.
TRAINING_PICTURES = 1_200
# Digits of a trimmed clip stay between these, in parts of the frame.
CLIP_LOW, CLIP_HIGH = 0.3, 0.7

# A span and which of the two digits acts in it.
Turn = tuple[Span, int]


def perform(
    subset: str, rendering: Rendering, rng: Generator
) -> tuple[list[Digit], tuple[Action, ...]]:
    """Two digits that act in turn, in front of bystanders.

    Args:
        subset: whose pictures of digits to take.
        rendering: times and numbers.
        rng: draws everything.

    Returns:
        the digits from the hindmost to the foremost, and what happens, in order of time.
    """
    frames = round(rng.uniform(*rendering.duration) * rendering.rate)
    actors = stage(frames, rng)
    actions = []
    for turns in schedule(frames, rendering, rng):
        for span, number in turns:
            label = choice(actors[number], span, rng, alone=len(turns) == 1)
            MOTIONS[label](actors[number], actors[1 - number], span, rng)
            actions.append(Action(span.begin / rendering.rate, span.end / rendering.rate, label))
    tracks = (*others(frames, rendering, rng), *actors)
    digits = [digit_of(track, subset, rendering, rng) for track in tracks]
    return digits, tuple(actions)


def place(rng: Generator) -> tuple[float, float]:
    """Somewhere in the frame, with room for a digit."""
    return rng.uniform(LOW, HIGH), rng.uniform(LOW, HIGH)


def stage(frames: int, rng: Generator) -> tuple[Track, Track]:
    """Two digits, each small or large, that stand apart."""
    first, second = (
        Track.standing(place(rng), float(rng.choice([SMALL, LARGE])), frames) for _ in range(2)
    )
    for _ in range(TRIALS):
        if first.distance(second, 0) >= APART:
            break
        second.x[:], second.y[:] = place(rng)
    return first, second


def schedule(frames: int, rendering: Rendering, rng: Generator) -> list[list[Turn]]:
    """When who acts: pauses between groups of one turn, or of two where they may overlap."""
    groups: list[list[Turn]] = []
    begin = _frames(rendering.idle, rendering, rng)
    while (end := begin + _frames(rendering.action, rendering, rng)) < frames:
        number = int(rng.integers(2))
        group = [(Span(begin, end), number)]
        if rendering.overlap and rng.random() < 0.5:
            meanwhile = int(rng.integers(begin, end))
            other = Span(meanwhile, meanwhile + _frames(rendering.action, rendering, rng))
            if other.end < frames:
                group.append((other, 1 - number))
        groups.append(group)
        begin = max(span.end for span, _ in group) + _frames(rendering.idle, rendering, rng)
    return groups


def choice(actor: Track, span: Span, rng: Generator, *, alone: bool) -> str:
    """An action that the digit can do; it takes nobody along who is busy."""
    names = possible(actor, span.begin)
    return str(rng.choice([name for name in names if alone or name != "swap"]))


def bystander(frames: int, rendering: Rendering, rng: Generator) -> Track:
    """A digit that stands around or, as often, jitters."""
    track = Track.standing(place(rng), rng.uniform(SMALL, LARGE), frames)
    if rng.random() < 0.5:
        for values in (track.x, track.y):
            values += rng.normal(0, rendering.jitter / rendering.size, frames)
    return track


def gesturing(label: str, subset: str, rendering: Rendering, rng: Generator) -> list[Digit]:
    """The digits of a trimmed clip: one that does the same thing all the time, and bystanders."""
    frames = round(rendering.clip * rendering.rate)
    here = rng.uniform(CLIP_LOW, CLIP_HIGH), rng.uniform(CLIP_LOW, CLIP_HIGH)
    track = Track.standing(here, rng.uniform(SMALL, LARGE), frames)
    perform_gesture(label, track, rendering.rate, rng)
    return [
        digit_of(each, subset, rendering, rng) for each in (*others(frames, rendering, rng), track)
    ]


def others(frames: int, rendering: Rendering, rng: Generator) -> list[Track]:
    """A few bystanders or none."""
    count = rng.integers(rendering.bystanders + 1)
    return [bystander(frames, rendering, rng) for _ in range(count)]


def digit_of(track: Track, subset: str, rendering: Rendering, rng: Generator) -> Digit:
    """Any digit, light or dark, that follows a track."""
    image = picture(subset, int(rng.integers(10)), rng)
    return Digit(image, colour(rng.random() >= rendering.dark, rng), track)


@cache
def _pictures() -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Digits of (N, 8, 8) from 0 to 1, and which ones they are."""
    raw = load_digits()
    return raw.images / 16, raw.target


def picture(subset: str, digit: int, rng: Generator) -> NDArray[np.float64]:
    """A picture of a digit that is in this subset alone."""
    images, targets = _pictures()
    training = np.arange(len(targets)) < TRAINING_PICTURES
    chosen = (targets == digit) & (training == (subset == TRAINING))
    return images[rng.choice(np.flatnonzero(chosen))]


def _frames(seconds: tuple[float, float], rendering: Rendering, rng: Generator) -> int:
    """Some time between two limits, as a number of frames."""
    return max(1, round(rng.uniform(*seconds) * rendering.rate))
