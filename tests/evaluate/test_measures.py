"""Measures of one clip, on clips with a known answer."""

import math

import numpy as np
import pytest

from stgfast.evaluate.measures import plain


def clip(*frames, size=16):
    return np.stack([np.broadcast_to(np.asarray(frame, np.uint8), (size, size, 3)) for frame in frames])


def bar(frames=9, size=32):
    """A white bar on black, four pixels wide, moving four pixels a frame."""
    made = np.zeros((frames, size, size, 3), np.uint8)
    for number in range(frames):
        made[number, :, 4 * (number % 8) : 4 * (number % 8) + 4] = 255
    return made


def test_a_still_clip():
    values = plain(clip(*[[51, 51, 51]] * 5)).values
    names = ("dynamics", "flicker", "sharpness", "contrast", "saturation", "clipped")
    assert values == pytest.approx(dict.fromkeys(names, 0), abs=1e-6)


def test_what_flickers_and_what_moves():
    flickering = plain(clip(*[[51, 51, 51], [102, 102, 102]] * 4)).values
    assert flickering["flicker"] == pytest.approx(0.2)
    assert flickering["dynamics"] == pytest.approx(0.2)
    moving = plain(bar()).values
    assert moving["flicker"] == 0  # no pixel jumps in most frames
    assert moving["dynamics"] == pytest.approx(2 * 4 / 32)


def test_colour_and_what_is_burnt_out():
    values = plain(clip([255, 0, 51], [255, 0, 51])).values
    assert values["saturation"] == 1
    assert values["clipped"] == pytest.approx(2 / 3)
    assert plain(bar(1)).values["contrast"] == pytest.approx(math.sqrt(1 / 8 * 7 / 8))


def test_edges():
    stripes = np.zeros((2, 16, 16, 3), np.uint8)
    stripes[:, :, ::2] = 255
    soft = np.zeros((2, 16, 16, 3), np.uint8) + np.linspace(0, 255, 16).astype(np.uint8)[:, None]
    assert plain(stripes).values["sharpness"] == 1
    assert plain(soft).values["sharpness"] == pytest.approx(1 / 15, rel=0.02)


def test_one_frame_has_no_motion():
    values = plain(clip([9, 9, 9])).values
    assert math.isnan(values["dynamics"])
    assert math.isnan(values["flicker"])


def test_features_are_means_of_fields():
    frames = np.zeros((4, 24, 17, 3), np.uint8)
    frames[:, 12:] = 255
    small = plain(frames).features.reshape(4, 8, 8, 3)
    assert np.array_equal(small[0, :, 0, 0], [0] * 4 + [1] * 4)
    assert small.mean() == pytest.approx(0.5)
