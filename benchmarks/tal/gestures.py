"""What the digits of trimmed clips do, from the first frame to the last: classes to pretrain on.

None of them is an action of `actions.MOTIONS`: they go on and on, and lead nowhere.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.random import Generator

from .actions import Curve, Track, sign

# Seconds that one to and fro takes.
PERIOD = (1.0, 2.0)
# How far digits sway and bob, in parts of the frame, and drift, in parts of it per second.
FAR, SPEED = 0.12, 0.08
# Of the angle, in radians, and of the size, in parts of it.
TILT, SWELL = 0.7, 0.3

# Changes a standing track; takes the phase of the to and fro in each frame, in radians, and times.
Gesture = Callable[[Track, Curve, Curve, Generator], None]


def stand(track: Track, phases: Curve, times: Curve, rng: Generator) -> None:
    """Do nothing."""


def sway(track: Track, phases: Curve, times: Curve, rng: Generator) -> None:
    """To the left and to the right."""
    track.x[:] += FAR * np.sin(phases)


def bob(track: Track, phases: Curve, times: Curve, rng: Generator) -> None:
    """Up and down."""
    track.y[:] += FAR * np.sin(phases)


def rock(track: Track, phases: Curve, times: Curve, rng: Generator) -> None:
    """Tilt to one side and the other."""
    track.angle[:] += TILT * np.sin(phases)


def pulse(track: Track, phases: Curve, times: Curve, rng: Generator) -> None:
    """Swell and contract."""
    track.size[:] *= 1 + SWELL * np.sin(phases)


def fade(track: Track, phases: Curve, times: Curve, rng: Generator) -> None:
    """Become transparent and opaque again."""
    track.opacity[:] = 0.55 + 0.45 * np.sin(phases)


def drift(track: Track, phases: Curve, times: Curve, rng: Generator) -> None:
    """Glide along a diagonal, slowly."""
    middle = times - times.mean()
    track.x[:] += sign(rng) * SPEED * middle
    track.y[:] += sign(rng) * SPEED * middle


def hop(track: Track, phases: Curve, times: Curve, rng: Generator) -> None:
    """Be here and there by turns, with nothing in between."""
    there = np.sign(np.sin(phases)) * FAR
    if rng.random() < 0.5:
        track.x[:] += there
    else:
        track.y[:] += there


GESTURES: dict[str, Gesture] = {
    gesture.__name__: gesture for gesture in (stand, sway, bob, rock, pulse, fade, drift, hop)
}


def perform_gesture(name: str, track: Track, rate: float, rng: Generator) -> None:
    """Let a digit do one thing for as long as its track goes on.

    Args:
        name: of `GESTURES`.
        track: of a digit that stands; changed.
        rate: frames per second.
        rng: draws tempo and directions.
    """
    times = np.arange(len(track.x)) / rate
    phases = 2 * np.pi * (times / rng.uniform(*PERIOD) + rng.random())
    GESTURES[name](track, phases, times, rng)
