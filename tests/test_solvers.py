"""Another solver on a pipeline's own sigmas."""

import copy
import dataclasses
import math
import pickle

import diffusers
import pytest
import torch

import stgfast
from stgfast import Guidance, Perturbation, SettingsError
from stgfast.integrations import ADAPTERS
from stgfast.solvers import SOLVERS, TAKES
from tests import models
from tests.integrations.families import hunyuan_video, ltx, stable_video_diffusion, wan
from tests.integrations.test_families import FAMILIES
from tests.precision import distance

LTX, HUNYUAN = ltx.FAMILIES[0], hunyuan_video.FAMILIES[0]
GUIDANCE = Guidance(Perturbation([2]), rescale=0.5)
SIZED = {"use_dynamic_shifting": True, "base_shift": 0.95, "max_shift": 2.05, "shift_terminal": 0.1}
EULER = {"shifted": {"shift": 3.0}, "plain": {}, "Karras": {"use_karras_sigmas": True}}


def pipe_with(**settings):
    return models.pipeline("wan", scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**settings))


def off(scheduler, steps=None, spread=0.5, **given):
    """The distance of a run's end from the exact one: data are numbers with this deviation, so velocities are known
    exactly.
    """
    scheduler.set_timesteps(steps, **given)
    sigmas = scheduler.sigmas.double()
    x = torch.ones(1, 1, 1, 1, dtype=torch.float64)

    def width(sigma):
        return math.hypot((1 - sigma) * spread, sigma)

    begin = float(sigmas[0])
    for step, time in enumerate(scheduler.timesteps):
        sigma = float(sigmas[step])
        velocity = (sigma - (1 - sigma) * spread**2) / width(sigma) ** 2 * x
        x = scheduler.step(velocity, time, x, return_dict=False)[0].double()
    return abs(float(x) / (width(0.0) / width(begin)) - 1)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("settings", EULER.values(), ids=EULER)
def test_is_closer_than_euler_at_the_same_steps(settings, name):
    own = diffusers.FlowMatchEulerDiscreteScheduler
    euler = [off(own(**settings), steps) for steps in (40, 80)]
    made = [off(solved(own(**settings), name).scheduler, steps) for steps in (40, 80)]
    assert made[1] < euler[1] / 1.5
    # Of higher order, where rounding does not hide it.
    assert made[0] / made[1] > 3 > euler[0] / euler[1] or made[1] < 1e-3


@pytest.mark.parametrize("name", SOLVERS)
def test_is_the_solver_of_diffusers(name):
    """On the same sigmas; but timesteps of the model are not rounded to whole numbers, as there."""
    cls, order = SOLVERS[name]
    theirs = getattr(diffusers, cls)(prediction_type="flow_prediction", use_flow_sigmas=True, solver_order=order)
    mine = solved(diffusers.FlowMatchEulerDiscreteScheduler(), name).scheduler
    expected = off(theirs, 12)
    assert off(mine, sigmas=theirs.sigmas[:-1].numpy()) == pytest.approx(expected, rel=1e-3)
    assert (mine.timesteps - theirs.timesteps).abs().max() <= 1


def solved(scheduler, name="unipc"):
    return stgfast.solver(models.pipeline("wan", scheduler=scheduler), name)


@pytest.mark.parametrize("settings", [*EULER.values(), SIZED], ids=[*EULER, "by size"])
def test_sigmas_are_the_pipelines_own(settings):
    own, pipe = diffusers.FlowMatchEulerDiscreteScheduler(**settings), pipe_with(**settings)
    given = {"mu": 1.3} if "use_dynamic_shifting" in settings else {}
    stgfast.solver(pipe, "unipc")
    for schedule in ({"num_inference_steps": 7}, {"sigmas": [0.9, 0.5, 0.2]}):
        own.set_timesteps(**schedule, **given)
        pipe.scheduler.set_timesteps(**schedule, **given)
        assert torch.equal(pipe.scheduler.timesteps, own.timesteps)
        assert torch.allclose(pipe.scheduler.sigmas, own.sigmas, atol=2e-6)
    assert all(pipe.scheduler.config[name] == value for name, value in settings.items())


@pytest.mark.parametrize("family", [LTX, HUNYUAN], ids=lambda family: family.name)
def test_guided_as_by_the_plain_method(family, float64):
    cfg = family is LTX
    plain, pipe = family.pipe(), stgfast.accelerate(family.pipe(), GUIDANCE)
    for each in (plain, pipe):
        stgfast.solver(each, "unipc")
    stepped = {"num_inference_steps": 4}
    alike = dataclasses.replace(family, build=lambda other=False: plain, shared=False)
    expected = alike.plain(GUIDANCE, 2, cfg, **stepped)
    made = family.run(pipe, 2, cfg, **stepped)
    # The solver computes in float32, so that is how exact both are.
    assert distance(made, expected) < 1e-5
    assert stgfast.explain(pipe, **family.arguments(2, cfg) | stepped).phases[0].steps == 4
    assert distance(made, family.run(stgfast.accelerate(family.pipe(), GUIDANCE), 2, cfg, **stepped)) > 1e-3


def test_a_pipeline_gets_its_own_solver_back(tmp_path):
    pipe = pipe_with(shift=2.0)
    own, saved_as = pipe.scheduler, dict(pipe.config)
    stgfast.solver(stgfast.solver(pipe, "unipc"), "unipc3")
    assert pipe.scheduler.config.solver_order == 3
    assert dict(pipe.config) == saved_as
    for remade in (copy.deepcopy(pipe.scheduler), pickle.loads(pickle.dumps(pipe.scheduler))):
        remade.set_timesteps(5)
        assert len(remade.timesteps) == 5
    pipe.scheduler.save_pretrained(tmp_path)
    loaded = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path)
    assert loaded.config.shift == 2.0
    assert stgfast.restore(pipe).scheduler is own
    assert stgfast.restore(stgfast.accelerate(stgfast.solver(pipe, "unipc"))).scheduler is own
    assert "_stgfast_scheduler" not in vars(pipe)


def test_restarts_are_of_other_schedulers():
    pipe = stgfast.solver(LTX.pipe(), "unipc")
    with pytest.raises(SettingsError, match="scheduler to restart: got 'FlowSolver', expected one of"):
        stgfast.restart(pipe.scheduler, t_min=0.3, t_max=0.7)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_every_pipeline_takes_it_or_says_why_not(family):
    pipe = family.pipe()
    adapter = ADAPTERS[type(pipe).__name__]
    inverted = pipe.scheduler.config.get("invert_sigmas")
    if type(pipe.scheduler).__name__ != TAKES or adapter.own_solver or inverted:
        with pytest.raises(SettingsError, match=f"expected {TAKES}$|expected its own: it|which unipc cannot follow"):
            stgfast.solver(pipe, "unipc")
        return
    stgfast.accelerate(stgfast.solver(pipe, "unipc"), Guidance(Perturbation([family.layers[1]], kind=family.kinds[0])))
    made = family.run(pipe, cfg=family.cfg is not None)
    assert distance(family.run(stgfast.restore(pipe), cfg=family.cfg is not None), made) > 1e-4


def test_what_cannot_be_is_said():
    with pytest.raises(SettingsError, match="solver: got 'heun', expected one of unipc, unipc3, dpm\\+\\+"):
        stgfast.solver(LTX.pipe(), "heun")
    with pytest.raises(SettingsError, match="got EulerDiscreteScheduler, expected FlowMatchEulerDiscreteScheduler"):
        stgfast.solver(stable_video_diffusion.build(), "unipc")
    with pytest.raises(SettingsError, match="got UniPCMultistepScheduler, expected FlowMatchEulerDiscreteScheduler"):
        stgfast.solver(wan.FAMILIES[0].pipe(), "unipc")
    released = models.pipeline("mochi", scheduler=diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True))
    with pytest.raises(SettingsError, match="got invert_sigmas=True, which unipc cannot follow"):
        stgfast.solver(released, "unipc")
