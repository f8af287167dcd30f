"""Measures of one clip that need no weights.

    dynamics    the change of a pixel from one frame to the next
    flicker     the median over time of |frame - mean of its two neighbors|, so that passing objects count little
    sharpness   the steepness of edges
    contrast    the spread of brightness within frames
    saturation  the spread between red, green and blue
    clipped     the fraction of values at the darkest or brightest level, which strong guidance increases

All use brightness from 0 to 1. A clip's features, for the diversity of seeds, are a few small frames.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from stgfast.evaluate.statistics import Array, Cloud
from stgfast.render.files import Frames

THUMBNAIL = 8  # pixels along an edge
MOMENTS = 4  # frames of a clip


@dataclass(frozen=True)
class Measured:
    values: Mapping[str, float]
    features: Array


@dataclass(frozen=True)
class Measure:
    """The measures of a clip. `real` is the distribution that its features should have, if there is one."""

    of: Callable[[Frames, str], Measured]  # from a clip and its prompt
    real: Cloud | None = None


def plain(frames: Frames, prompt: str = "") -> Measured:
    """The measures of any clip."""
    pixels = frames.astype(np.float32) / 255
    grey = pixels.mean(-1)
    values = {
        "dynamics": np.abs(np.diff(grey, axis=0)).mean() if len(grey) > 1 else np.nan,
        "flicker": _flicker(grey),
        "sharpness": np.sqrt(np.square(np.diff(grey, axis=1)).mean() + np.square(np.diff(grey, axis=2)).mean()),
        "contrast": grey.std((1, 2)).mean(),
        "saturation": (pixels.max(-1) - pixels.min(-1)).mean(),
        "clipped": ((frames == 0) | (frames == 255)).mean(),
    }
    return Measured({name: float(value) for name, value in values.items()}, _thumbnails(pixels))


def _flicker(grey: np.ndarray) -> float:
    if len(grey) < 3:
        return float("nan")
    jumps = np.abs(grey[1:-1] - (grey[:-2] + grey[2:]) / 2)
    return float(np.median(jumps, axis=0).mean())


def _thumbnails(pixels: np.ndarray) -> Array:
    """Frames from the first to the last, averaged over the fields of a grid."""
    chosen = pixels[np.linspace(0, len(pixels) - 1, MOMENTS).round().astype(int)]
    rows, columns = (np.linspace(0, side, THUMBNAIL + 1).round().astype(int) for side in chosen.shape[1:3])
    sums = np.add.reduceat(np.add.reduceat(chosen, rows[:-1], axis=1), columns[:-1], axis=2)
    sizes = np.diff(rows)[:, None] * np.diff(columns)
    small: Array = (sums / sizes[:, :, None]).astype(np.float64).ravel()
    return small


PLAIN = Measure(plain)
