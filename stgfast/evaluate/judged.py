"""Measures for clips of the toy model: those of any clip, and whether a clip shows what its prompt says."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from stgfast.evaluate.measures import Measure, Measured, plain
from stgfast.evaluate.statistics import Cloud
from stgfast.render.files import Frames
from stgfast.toy import videos
from stgfast.toy.judge import ATTRIBUTES, Judge, load, right, track


def seen(judge: Judge, frames: Frames, prompt: str) -> Measured:
    """Measures beside those of any clip.

        colour, ...  the fraction of what the prompt says about it that is seen; `right` is 1 if all of it is
        speed        of a moving shape, in pixels per frame
        jerk         the distance of a shape from the middle between its positions one frame before and after, in pixels
        lost         the fraction of frames in which the shape's colour is not found

    The last three are for clips with one shape. A prompt in other words has no measures.
    """
    clip = torch.from_numpy(frames).permute(0, 3, 1, 2).float()[None] / 255
    reading = judge(clip)
    values = dict(plain(frames).values)
    values |= dict.fromkeys((*ATTRIBUTES, "right", "speed", "jerk", "lost"), math.nan)
    try:
        scene = videos.Scene.parse(prompt)
    except ValueError:
        scene = None
    if scene is not None:
        hits = {name: float(value) for name, value in right(reading, [scene]).items()}
        values |= {**hits, "right": float(min(hits.values()) == 1)}
        if len(scene.shapes) == 1:
            values |= _moving(track(clip[0], scene.shapes[0].colour), scene.shapes[0].motion)
    return Measured(values, reading.features[0].double().numpy())


def _moving(places: Tensor, motion: str) -> dict[str, float]:
    steps = places.diff(dim=0)
    speed = steps.nanmean(0).norm() if motion in videos.MOVES else torch.tensor(math.nan)
    jerk = (places[1:-1] - (places[:-2] + places[2:]) / 2).norm(dim=-1).nanmean()
    return {"speed": float(speed), "jerk": float(jerk), "lost": float(places.isnan().any(-1).float().mean())}


@functools.cache
def measure() -> Measure:
    judge, mean, covariance = load()

    @torch.no_grad()
    def of(frames: Frames, prompt: str) -> Measured:
        return seen(judge, frames, prompt)

    return Measure(of, Cloud.given(mean.double().numpy(), covariance.double().numpy()))
