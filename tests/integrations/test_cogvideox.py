"""CogVideoX from a video: schedules cover the steps that `strength` leaves, and so does its dynamic scale."""

import dataclasses

import pytest

import stgfast
from stgfast import Guidance, Perturbation
from tests.integrations.families import cogvideox
from tests.precision import same

pytestmark = pytest.mark.usefixtures("float64")

(VIDEO,) = [family for family in cogvideox.FAMILIES if family.name == "CogVideoX from a video"]


def test_schedules_are_for_the_steps_that_strength_leaves():
    guidance = Guidance(Perturbation([2], scale=[2.0, 1.0]))
    pipe = stgfast.accelerate(VIDEO.pipe(), guidance)
    same(VIDEO.run(pipe), VIDEO.plain(guidance))
    assert sum(phase.steps for phase in stgfast.explain(pipe, **VIDEO.arguments(1)).phases) == 2
    with pytest.raises(stgfast.SettingsError, match="got 3 numbers, expected 2"):
        VIDEO.run(pipe, stg=Guidance(Perturbation([2], scale=[1.0] * 3)))


def test_dynamic_cfg():
    def arguments(prompts, cfg=True):
        return {**cogvideox.from_video(prompts, cfg), "use_dynamic_cfg": True}

    family = dataclasses.replace(VIDEO, arguments=arguments, cfg=cogvideox.live)
    guidance = Guidance(Perturbation([2]), rescale=0.7)
    for other in (False, True):
        made = family.run(stgfast.accelerate(family.build(other=other), guidance), 2)
        same(made, family.plain(guidance, 2, other=other))
