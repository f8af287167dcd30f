"""LTX-Video from conditions: without any, and with a start in the middle."""

import dataclasses

import pytest

import stgfast
from stgfast import Guidance, Perturbation
from tests.integrations.families import ltx
from tests.precision import same

pytestmark = pytest.mark.usefixtures("float64")

(CONDITIONS,) = [family for family in ltx.FAMILIES if family.name == "LTX from conditions"]


def test_no_condition_at_all():
    family = dataclasses.replace(CONDITIONS, arguments=ltx.arguments)
    guidance = Guidance(Perturbation([2]), rescale=0.7)
    made = family.run(stgfast.accelerate(family.pipe(), guidance), 2)
    same(made, family.plain(guidance, 2))


def test_schedules_are_for_the_steps_that_denoise_strength_leaves():
    def arguments(prompts, cfg=True):
        return {**ltx.from_conditions(prompts, cfg), "num_inference_steps": 4, "denoise_strength": 0.5}

    family = dataclasses.replace(CONDITIONS, arguments=arguments)
    guidance = Guidance(Perturbation([2], scale=[2.0, 1.0]))
    pipe = stgfast.accelerate(family.pipe(), guidance)
    same(family.run(pipe), family.plain(guidance))
    assert sum(phase.steps for phase in stgfast.explain(pipe, **arguments(1)).phases) == 2
    with pytest.raises(stgfast.SettingsError, match="got 4 numbers, expected 2"):
        family.run(pipe, stg=Guidance(Perturbation([2], scale=[1.0] * 4)))
