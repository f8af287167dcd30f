"""Special to SkyReels-V2: groups of frames that start one after another, and long videos."""

from dataclasses import replace

import pytest
import torch

import stgfast
from stgfast import Guidance, Perturbation
from stgfast.errors import SettingsError
from tests.integrations.families import skyreels_v2
from tests.precision import distance, same

pytestmark = pytest.mark.usefixtures("float64")

FAMILIES = {family.name: family for family in skyreels_v2.FAMILIES}
GUIDANCE = Guidance(Perturbation([1], scale=1.5))
LONG = {"num_frames": 13, "base_num_frames": 9, "overlap_history": 5}


def clip(family, pipe, **changes):
    with torch.no_grad():
        return family.result(pipe(**{**family.arguments(1), **changes}))


@pytest.mark.parametrize(
    ("name", "changes", "steps"),
    [
        ("SkyReels-V2 forced", {}, 2),
        ("SkyReels-V2 forced, frame after frame", {}, 4),
        ("SkyReels-V2 forced, frame after frame", {"num_frames": 13, "causal_block_size": 2, "ar_step": 2}, 4),
        ("SkyReels-V2 forced from an image", {"ar_step": 1}, 3),
        ("SkyReels-V2 forced from an image", {"ar_step": 1, "last_image": skyreels_v2.wan.image(seed=1)}, 4),
    ],
)
def test_a_schedule_has_a_number_for_every_step(name, changes, steps):
    """As many numbers as the pipeline makes steps. (A call with `causal_block_size` changes its model.)"""
    family = FAMILIES[name]
    made = []
    pipe = stgfast.accelerate(family.build(), Guidance(Perturbation([1], scale=[1.0] * steps)))
    clip(family, pipe, **changes, callback_on_step_end=lambda pipe, step, time, tensors: made.append(step) or {})
    assert len(made) == pipe.num_timesteps == steps
    with pytest.raises(SettingsError, match=f"got 9 numbers, expected {steps}, one for every step"):
        clip(family, pipe, **changes, stg_scale=[1.0] * 9)


def test_a_schedule_over_frames_that_set_out_later():
    family = FAMILIES["SkyReels-V2 forced, frame after frame"]
    guidance = Guidance(Perturbation([1], scale=[0.0, 1.0, 2.0, 0.5]))
    same(family.run(stgfast.accelerate(family.pipe(), guidance)), family.plain(guidance))


@pytest.mark.parametrize("name", ["SkyReels-V2 forced", "SkyReels-V2 forced from an image"])
def test_a_long_video_is_made_part_by_part(name):
    """Guidance starts again with each part: here it acts in the first half of the steps of a part."""
    family = FAMILIES[name]
    half = replace(GUIDANCE, stop=0.5)
    pipe = stgfast.accelerate(family.pipe(), half)
    with family.counted(pipe) as rows:
        made = clip(family, pipe, **LONG)
    assert rows == [8, 8, 10, 10]  # in one step of two, of both parts, the perturbed branch too
    assert distance(made, clip(family, family.pipe(), **LONG)) > 1e-3
    assert "one part of a longer clip" in stgfast.explain(pipe, **{**family.arguments(1), **LONG}).notice
    assert torch.equal(clip(family, pipe, **LONG, stg_scale=0.0), clip(family, family.pipe(), **LONG))
