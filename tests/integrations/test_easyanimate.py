"""EasyAnimate from parts of a video: a start in the middle, the scale of a call, and attention without text
projections.
"""

import dataclasses

import pytest
import torch

import stgfast
from stgfast import Guidance, Perturbation
from tests.integrations.families import easyanimate
from tests.precision import same

pytestmark = pytest.mark.usefixtures("float64")

TEXT, FRAME = easyanimate.FAMILIES


def test_schedules_are_for_the_steps_that_strength_leaves():
    def arguments(prompts, cfg=True):
        return {**easyanimate.from_first_frame(prompts, cfg), "num_inference_steps": 3, "strength": 0.7}

    family = dataclasses.replace(FRAME, arguments=arguments)
    guidance = Guidance(Perturbation([4], scale=[2.0, 1.0]))
    expected = family.plain(guidance)
    pipe = stgfast.accelerate(family.pipe(), guidance)
    # The pipeline draws its start without a generator, so it depends on the global state after building.
    same(family.run(pipe), expected)
    assert sum(phase.steps for phase in stgfast.explain(pipe, **arguments(1)).phases) == 2
    with pytest.raises(stgfast.SettingsError, match="got 3 numbers, expected 2"):
        family.run(pipe, stg=Guidance(Perturbation([4], scale=[1.0] * 3)))


def test_a_callback_that_changes_the_scale_changes_nothing():
    """As in the pipeline itself, which combines with the argument of the call."""

    def change(pipe, step, t, kwargs):
        pipe._guidance_scale = 9.0
        return kwargs

    guidance = Guidance(Perturbation([4]))
    expected = TEXT.run(stgfast.accelerate(TEXT.pipe(), guidance))
    assert torch.equal(TEXT.run(stgfast.accelerate(TEXT.pipe(), guidance), callback_on_step_end=change), expected)


@pytest.mark.parametrize("layer", [2, 3], ids=["projections for text", "shared projections"])
def test_both_kinds_of_blocks(layer):
    guidance = Guidance(Perturbation([layer], kind="attention"))
    made = TEXT.run(stgfast.accelerate(TEXT.pipe(), guidance), 2)
    same(made, TEXT.plain(guidance, 2))
