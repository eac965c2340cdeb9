"""What the camera sees of digits that follow their tracks: the pixels of a rendered video."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample, interpolate

from .actions import Curve, Track

# Of the background, in periods per frame: coarse patches and a finer grain on them.
PATCHES, GRAINS = 4, 12


@dataclass(frozen=True)
class Rendering:
    """How videos are made.

    Attributes:
        size: height and width of a frame in pixels, even.
        rate: frames per second.
        duration: the shortest and the longest untrimmed video, in seconds.
        action: the shortest and the longest action, in seconds.
        idle: the shortest and the longest time without an action, in seconds.
        clip: length of a trimmed clip, in seconds.
        bystanders: the most digits, besides the two that act, that stand around or jitter.
        overlap: whether both digits may act at the same time.
        dark: the part of the digits that are darker than the background; others are lighter.
        texture: contrast of the background, 1 for that of a patchwork, 0 for none.
        drift: speed of the background, in pixels per second.
        jitter: how far a jittering digit strays, standard deviation in pixels.
        shake: how far the camera strays, standard deviation in pixels.
        flicker: standard deviation of the brightness, in parts of it.
        noise: standard deviation of a pixel, of 255.
        codec: FFmpeg's name of the encoder, "libx264" or "mpeg4".
    """

    size: int = 40
    rate: float = 8.0
    duration: tuple[float, float] = (20.0, 40.0)
    action: tuple[float, float] = (0.7, 4.0)
    idle: tuple[float, float] = (0.5, 3.0)
    clip: float = 4.0
    bystanders: int = 2
    overlap: bool = False
    dark: float = 0.5
    texture: float = 1.0
    drift: float = 1.0
    jitter: float = 0.5
    shake: float = 0.3
    flicker: float = 0.05
    noise: float = 6.0
    codec: str = "libx264"

    def __post_init__(self) -> None:
        """Refuse what no encoder takes, before the first video."""
        if self.size < 16 or self.size % 2:
            raise ValueError(f"size is {self.size}, but frames have an even size of 16 or more")
        for name in ("duration", "action", "idle"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"{name} is {(low, high)}, not 0 < shortest <= longest")
        if self.rate * self.action[0] < 3:
            raise ValueError(
                f"the shortest action is {self.action[0]} s, under three frames at {self.rate} fps"
            )


@dataclass(frozen=True)
class Digit:
    """One digit of a scene.

    Attributes:
        image: 8 x 8 pixels from 0 to 1.
        colour: red, green and blue from 0 to 1.
        track: its poses.
    """

    image: NDArray[np.float64]
    colour: Curve
    track: Track


def colour(light: bool, rng: Generator) -> Curve:
    """A tint that stands out from every background."""
    return rng.uniform(0.75, 1.0, 3) if light else rng.uniform(0.0, 0.25, 3)


def draw(digits: list[Digit], rendering: Rendering, rng: Generator) -> NDArray[np.uint8]:
    """Draw a video.

    Args:
        digits: from the hindmost to the foremost, all with T frames.
        rendering: the size of the frames and what the camera adds.
        rng: draws the background and the camera's disturbances.

    Returns:
        frames of (T, size, size, 3).
    """
    frames = len(digits[0].track.x)
    # Of (T, 2), in parts of the frame.
    shaken = rng.normal(0, rendering.shake / rendering.size, (frames, 2))
    canvas = background(frames, shaken, rendering, rng)
    for digit in digits:
        mask = footprint(digit, shaken, rendering.size)
        tint = torch.tensor(digit.colour, dtype=torch.float32).view(1, 3, 1, 1)
        canvas += mask * (tint - canvas)
    return exposed(canvas, rendering, rng)


def background(frames: int, shaken: Curve, rendering: Rendering, rng: Generator) -> Tensor:
    """A coloured texture that drifts evenly in some direction, as (T, 3, size, size)."""
    shades, grain = rng.uniform(-0.15, 0.15, (1, 3, PATCHES, PATCHES)), (1, 1, GRAINS, GRAINS)
    patches = torch.tensor(0.5 + rendering.texture * shades, dtype=torch.float32)
    grains = torch.tensor(rendering.texture * rng.normal(0, 0.06, grain), dtype=torch.float32)
    size = (2 * rendering.size, 2 * rendering.size)
    texture = interpolate(patches, size, mode="bicubic") + interpolate(grains, size, mode="bicubic")
    heading = rng.uniform(0, 2 * np.pi)
    speed = rendering.drift / rendering.size / rendering.rate
    path = np.outer(np.arange(frames) * speed, (np.cos(heading), np.sin(heading)))
    theta = torch.zeros(frames, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = 1.0
    theta[:, :, 2] = torch.tensor(2 * (path - shaken))
    return sampled(texture, theta, rendering.size, "reflection")


def footprint(digit: Digit, shaken: Curve, size: int) -> Tensor:
    """How much of each pixel the digit covers, as (T, 1, size, size)."""
    track = digit.track
    cos, sin = np.cos(track.angle) / track.size, np.sin(track.angle) / track.size
    # The frame and the digit's picture both reach from -1 to 1.
    x, y = 2 * (track.x + shaken[:, 0]) - 1, 2 * (track.y + shaken[:, 1]) - 1
    rows = ((cos, sin, -cos * x - sin * y), (-sin, cos, sin * x - cos * y))
    theta = torch.tensor(np.array(rows), dtype=torch.float32).permute(2, 0, 1)
    image = torch.tensor(digit.image, dtype=torch.float32)[None, None]
    opacity = torch.tensor(track.opacity, dtype=torch.float32).view(-1, 1, 1, 1)
    return sampled(image, theta, size, "zeros") * opacity


def sampled(image: Tensor, theta: Tensor, size: int, padding: str) -> Tensor:
    """One image of (1, C, h, w) through the maps of (T, 2, 3), as (T, C, size, size)."""
    frames = len(theta)
    grid = affine_grid(theta, [frames, 1, size, size], align_corners=False)
    images = image.expand(frames, -1, -1, -1)
    return grid_sample(images, grid, padding_mode=padding, align_corners=False)


def exposed(canvas: Tensor, rendering: Rendering, rng: Generator) -> NDArray[np.uint8]:
    """Brightness that flickers, noise, and whole numbers: (T, size, size, 3)."""
    flicker = 1 + rng.normal(0, rendering.flicker, (len(canvas), 1, 1, 1))
    pixels = 255 * flicker.astype(np.float32) * canvas.permute(0, 2, 3, 1).numpy()
    pixels += np.float32(rendering.noise) * rng.standard_normal(pixels.shape, np.float32)
    return pixels.round().clip(0, 255).astype(np.uint8)
