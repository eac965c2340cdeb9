"""The actions of the rendered digits: each changes the poses of one or two of them over time.

The first frame of an action is the first that differs from the pose before, and its last frame is
the first that shows the pose afterwards, so that boundaries are exact to the frame.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

Curve = NDArray[np.float64]

# Digits stay between these, in parts of the frame, and at least APART from each other.
LOW, HIGH, APART = 0.2, 0.8, 0.3
SMALL, LARGE = 0.28, 0.46
RADIUS = 0.12
TRIALS = 50


@dataclass(frozen=True)
class Track:
    """The poses of one digit, one value per frame.

    Attributes:
        x: centre from the left, in parts of the frame's width.
        y: centre from the top, in parts of its height.
        size: height and width, in parts of the frame's height.
        angle: clockwise, in radians.
        opacity: from 0, unseen, to 1.
    """

    x: Curve
    y: Curve
    size: Curve
    angle: Curve
    opacity: Curve

    @classmethod
    def standing(cls, place: tuple[float, float], size: float, frames: int) -> Track:
        """A digit that does nothing for ``frames`` frames."""
        return cls(*(np.full(frames, value) for value in (*place, size, 0.0, 1.0)))

    def distance(self, other: Track, frame: int) -> float:
        """Between the centres of two digits, in parts of the frame."""
        return math.hypot(self.x[frame] - other.x[frame], self.y[frame] - other.y[frame])


@dataclass(frozen=True)
class Span:
    """Frames ``begin`` to ``end - 1``; the frame before ``begin`` exists."""

    begin: int
    end: int

    @property
    def phases(self) -> Curve:
        """How far an action has come in each frame, of (0, 1]."""
        count = self.end - self.begin
        return np.arange(1, count + 1) / count

    def overlaps(self, other: Span) -> bool:
        """Whether a frame belongs to both."""
        return self.begin < other.end and other.begin < self.end


Motion = Callable[[Track, Track, Span, Generator], None]


def follow(values: Curve, span: Span, curve: Curve) -> None:
    """Let a value take a curve during the span and keep where it leads."""
    values[span.begin : span.end] = curve
    values[span.end :] = curve[-1]


def sign(rng: Generator) -> float:
    """Either 1 or -1."""
    return 1.0 if rng.random() < 0.5 else -1.0


def move(actor: Track, partner: Track, span: Span, rng: Generator) -> None:
    """Go straight to the left, to the right, up or down, at an even pace."""
    here = np.array([actor.x[span.begin], actor.y[span.begin]])
    other = np.array([partner.x[span.begin], partner.y[span.begin]])
    for _ in range(TRIALS):
        there, axis = here.copy(), rng.integers(2)
        there[axis] = rng.uniform(LOW, HIGH)
        far = abs(there[axis] - here[axis]) >= APART
        if far and math.dist(there, other) >= APART:
            break
    for values, a, b in zip((actor.x, actor.y), here, there, strict=True):
        follow(values, span, a + (b - a) * span.phases)


def circle(actor: Track, partner: Track, span: Span, rng: Generator) -> None:
    """Go round in a circle that leads through the actor's place, towards the middle."""
    x, y = actor.x[span.begin], actor.y[span.begin]
    inwards = math.atan2(0.5 - y, 0.5 - x)
    turned = inwards + sign(rng) * 2 * np.pi * span.phases
    follow(actor.x, span, x + RADIUS * (math.cos(inwards) - np.cos(turned)))
    follow(actor.y, span, y + RADIUS * (math.sin(inwards) - np.sin(turned)))


def turn(actor: Track, partner: Track, span: Span, rng: Generator) -> None:
    """Turn once about the own centre."""
    angle = actor.angle[span.begin]
    follow(actor.angle, span, angle + sign(rng) * 2 * np.pi * span.phases)


def grow(actor: Track, partner: Track, span: Span, rng: Generator) -> None:
    """From small to large."""
    follow(actor.size, span, SMALL + (LARGE - SMALL) * span.phases)


def shrink(actor: Track, partner: Track, span: Span, rng: Generator) -> None:
    """From large to small."""
    follow(actor.size, span, LARGE + (SMALL - LARGE) * span.phases)


def blink(actor: Track, partner: Track, span: Span, rng: Generator) -> None:
    """Vanish and come back about every four frames; gone in the first frame and the last."""
    count = span.end - span.begin
    halves = max(1, round(count / 2 - 1) // 2 * 2 + 1)
    half = np.arange(count) * halves // count
    actor.opacity[span.begin : span.end] = half % 2


def swap(actor: Track, partner: Track, span: Span, rng: Generator) -> None:
    """The two exchange places and pass each other on one side."""
    x, y = actor.x[span.begin], actor.y[span.begin]
    along = np.array([x - partner.x[span.begin], y - partner.y[span.begin]]) / 2
    across = 0.3 * sign(rng) * np.array([-along[1], along[0]])
    middle = np.array([x, y]) - along
    angles = np.pi * span.phases
    arc = np.outer(along, np.cos(angles)) + np.outer(across, np.sin(angles))
    for track, path in ((actor, arc), (partner, -arc)):
        follow(track.x, span, middle[0] + path[0])
        follow(track.y, span, middle[1] + path[1])


MOTIONS: dict[str, Motion] = {
    motion.__name__: motion for motion in (move, circle, turn, grow, shrink, blink, swap)
}


def possible(actor: Track, frame: int) -> list[str]:
    """The names of what a digit can do next: a large one does not grow, nor a small one shrink."""
    unfit = "grow" if actor.size[frame] > (SMALL + LARGE) / 2 else "shrink"
    return [name for name in MOTIONS if name != unfit]
