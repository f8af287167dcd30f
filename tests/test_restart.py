"""Restart sampling: the way back in closed form, solvers without memory of it, and runs against a written loop."""

import copy
import dataclasses
import functools
import inspect
from unittest import mock

import diffusers
import numpy as np
import pytest
import torch

import stgfast
from stgfast import Guidance, Perturbation, SettingsError
from tests import models
from tests.integrations import test_ltx2 as ltx2
from tests.integrations.families import cogvideox, ltx, mochi, modular, skyreels_v2, wan
from tests.integrations.families import stable_video_diffusion as svd
from tests.integrations.test_families import FAMILIES
from tests.precision import distance, same, within

pytestmark = pytest.mark.usefixtures("float64")

FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
SCHEDULERS = {
    "flow": diffusers.FlowMatchEulerDiscreteScheduler(),
    "flow, shifted": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "flow, shifted by size": diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.1),
    "flow, EDM": diffusers.FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True),
    "flow, Heun": diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0),
    "UniPC": diffusers.UniPCMultistepScheduler(),
    "UniPC, flow": diffusers.UniPCMultistepScheduler(**FLOW),
    "DPM": diffusers.DPMSolverMultistepScheduler(),
    "DPM, flow": diffusers.DPMSolverMultistepScheduler(**FLOW),
    "DDIM": diffusers.DDIMScheduler(),
    "DDPM": diffusers.DDPMScheduler(),
    "CogVideoX DDIM": diffusers.CogVideoXDDIMScheduler(
        rescale_betas_zero_snr=True, timestep_spacing="trailing", prediction_type="v_prediction"
    ),
    "CogVideoX DPM": diffusers.CogVideoXDPMScheduler(),
    "Euler": diffusers.EulerDiscreteScheduler(
        use_karras_sigmas=True,
        sigma_max=700.0,
        sigma_min=0.002,
        timestep_type="continuous",
        prediction_type="v_prediction",
    ),
    "Euler ancestral": diffusers.EulerAncestralDiscreteScheduler(),
    "Heun": diffusers.HeunDiscreteScheduler(),
}
every = pytest.mark.parametrize("name", SCHEDULERS)


def schedule(name, n=10):
    if name == "flow, EDM":  # as Cosmos 2 has it
        return {"sigmas": np.geomspace(80.0, 0.002, n)}
    return {"num_inference_steps": n, **({"mu": 0.8} if "by size" in name else {})}


def back_and_forth(order):
    """k and m, and the number of repeats, of the steps that were made."""
    jumps = [i for i in range(1, len(order)) if order[i] != order[i - 1] + 1]
    return order[jumps[0]], order[jumps[0] - 1] + 1, len(jumps)


def restarted(name, times=1, n=10, **settings):
    """The scheduler with its schedule set, the stock one too, and k and m from their timesteps."""
    stock = copy.deepcopy(SCHEDULERS[name])
    scheduler = stgfast.restart(stock, t_min=0.4, t_max=0.75, times=times, **settings)
    for one in (stock, scheduler):
        one.set_timesteps(**schedule(name, n))
    short, long = stock.timesteps.tolist(), scheduler.timesteps.tolist()
    m = next(i for i in range(len(short)) if i == len(short) - 1 or short[i + 1] != long[i + 1]) + 1
    k = m - (len(long) - len(short)) // times
    assert long == short[:m] + times * short[k:m] + short[m:]
    assert 0 < k < m < len(short)
    return scheduler, stock, k, m


def marginal(name, stock, step):
    """alpha and sigma at a step, from the function of diffusers that adds noise."""
    if name == "flow, EDM":
        return 1.0, float(stock.sigmas[step])
    one, none, t = torch.ones(1, 1).double(), torch.zeros(1, 1).double(), stock.timesteps[step : step + 1]
    stock.set_begin_index(step) if hasattr(stock, "set_begin_index") else None
    stock._step_index = step
    if hasattr(stock, "add_noise"):
        return float(stock.add_noise(one, none, t)), float(stock.add_noise(none, one, t))
    return float(stock.scale_noise(one, t, none)), float(stock.scale_noise(none, t, one))


def go_back(scheduler, stock, m, sample, **step):
    """The step before the way back, where the stock part returns `sample`."""
    scheduler._step_index = m - 1
    names = inspect.signature(scheduler.step).parameters
    given = {name: None for name in ("old_pred_original_sample", "timestep_back") if name in names}
    with mock.patch.object(type(stock), "step", return_value=(sample.clone(), None)):
        return scheduler.step(sample, timestep=scheduler.timesteps[m - 1], sample=sample, **given, **step)[0]


@every
def test_the_way_back_has_the_marginal_of_t_max(name):
    scheduler, stock, k, m = restarted(name, generator=torch.Generator().manual_seed(1))
    (a_m, s_m), (a_k, s_k) = (marginal(name, stock, step) for step in (m, k))
    ratio = a_k / a_m
    std = (s_k**2 - ratio**2 * s_m**2) ** 0.5
    # data that is -1 and 2, at the marginal of t_min
    x0 = torch.tensor([-1.0, 2.0]).double()[:, None].repeat(1, 20_000)
    x = a_m * x0 + s_m * torch.randn(x0.shape, generator=torch.Generator().manual_seed(0), dtype=x0.dtype)
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(1), dtype=x0.dtype)
    made = go_back(scheduler, stock, m, x)
    within(distance(made, ratio * x + std * noise), 1e-5)  # closed form; timesteps and sigmas are float32
    assert abs(ratio * a_m - a_k) < 1e-9
    assert abs(ratio**2 * s_m**2 + std**2 - s_k**2) < 1e-6 * s_k**2
    # moments: five standard errors of a mean, and of a variance, of so many values
    count = x0.shape[1]
    for row, value in zip(made, (-1.0, 2.0), strict=True):
        assert abs(row.mean() - a_k * value) < 5 * s_k / count**0.5
        assert abs(row.var() / s_k**2 - 1) < 5 * (2 / count) ** 0.5


def test_flow_matching_and_edm_are_the_formulas_of_the_papers():
    for name, formula in {
        "flow, shifted": lambda x, eps, s, r: (
            (1 - r) / (1 - s) * x + (r**2 - s**2 * (1 - r) ** 2 / (1 - s) ** 2) ** 0.5 * eps
        ),
        "Euler": lambda x, eps, s, r: x + (r**2 - s**2) ** 0.5 * eps,
    }.items():
        scheduler, stock, k, m = restarted(name, generator=torch.Generator().manual_seed(1))
        x = torch.randn(1, 64)
        eps = torch.randn(1, 64, generator=torch.Generator().manual_seed(1))
        within(distance(go_back(scheduler, stock, m, x), formula(x, eps, stock.sigmas[m], stock.sigmas[k])), 1e-5)


def test_mochi_counts_the_other_way_round():
    """diffusers cannot add noise for this scheduler: its sigmas are fractions of data."""
    stock = diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    scheduler = stgfast.restart(stock, t_min=0.25, t_max=0.75, generator=torch.Generator().manual_seed(1))
    for one in (stock, scheduler):
        one.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    assert scheduler.timesteps.tolist() == [0.0, 250.0, 500.0, 250.0, 500.0, 750.0]
    x, eps = torch.randn(1, 64), torch.randn(1, 64, generator=torch.Generator().manual_seed(1))
    made = go_back(scheduler, stock, 3, x)
    within(distance(made, 0.25 / 0.75 * x + (0.75**2 - (0.25 * 0.25 / 0.75) ** 2) ** 0.5 * eps), 1e-5)


def test_shares_of_noise_mean_the_nearest_step():
    def steps(t_min, t_max, times=1):
        scheduler = stgfast.restart(SCHEDULERS["flow"], t_min=t_min, t_max=t_max, times=times)
        scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
        assert len(scheduler.sigmas) == len(scheduler.timesteps) + 1
        assert torch.equal(scheduler.sigmas[:-1] * 1000, scheduler.timesteps)
        return [int(t) for t in scheduler.timesteps]

    assert steps(0.25, 0.75) == [1000, 750, 500, 750, 500, 250]
    assert steps(0.3, 0.65, 2) == [1000, 750, 500, 750, 500, 750, 500, 250]
    assert steps(0.45, 0.8) == [1000, 750, 750, 500, 250]
    assert steps(0.0, 1.0) == [1000, 750, 500, 250, 1000, 750, 500, 250]
    assert steps(0.1, 0.2, 3) == [1000, 750, 500, 250, 250, 250, 250]


def test_heun_goes_back_between_its_steps_of_two_evaluations():
    scheduler = stgfast.restart(diffusers.FlowMatchHeunDiscreteScheduler(1001), t_min=0.4, t_max=0.7)
    scheduler.set_timesteps(4)
    seen = [round(t / 100) for t in scheduler.timesteps.tolist()]
    assert seen == [10, 7, 7, 3, 7, 3, 3, 0, 0]  # to 3 and corrected there; from 7 again; from 3


# Solvers


def make_steps(scheduler, x, first, last, model=torch.sin):
    """Steps `first` to `last` of a run, made as in the pipeline of CogVideoX if the scheduler is its own."""
    old = None
    for i in range(first, last):
        t = scheduler.timesteps[i]
        x_in = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        if isinstance(scheduler, diffusers.CogVideoXDPMScheduler):
            back = scheduler.timesteps[i - 1] if i > first else None
            x, old = scheduler.step(model(x_in), old, t, back, x, generator=torch.Generator().manual_seed(i - first))
        else:
            given = {"generator": torch.Generator().manual_seed(i - first)}
            given = given if "generator" in inspect.signature(scheduler.step).parameters else {}
            x = scheduler.step(model(x_in), t, x, **given, return_dict=False)[0]
    return x


@every
def test_solvers_forget_on_the_way_back(name):
    """After the way back they make the same steps as a fresh scheduler."""
    scheduler, stock, k, m = restarted(name)
    x = torch.randn(2, 8, generator=torch.Generator().manual_seed(0)) * float(getattr(scheduler, "init_noise_sigma", 1))
    if name == "flow, EDM":
        x = 80 * x
    x = make_steps(scheduler, x, 0, m)
    fresh = copy.deepcopy(stock)
    fresh._step_index = k
    expected = make_steps(fresh, x, k, len(fresh.timesteps))
    assert torch.equal(make_steps(scheduler, x, m, len(scheduler.timesteps)), expected)
    if hasattr(stock, "model_outputs"):  # so that a remaining memory is visible
        fresh = copy.deepcopy(stock)
        make_steps(fresh, x, 0, k)
        assert distance(make_steps(fresh, x, k, len(fresh.timesteps)), expected) > 1e-4


# Noise


def whole(scheduler, x, **given):
    for t in scheduler.timesteps:
        x = scheduler.step(torch.sin(x), t, x, **given, return_dict=False)[0]
    return x


def flow_run(x, given=None, **settings):
    scheduler = stgfast.restart(SCHEDULERS["flow"], t_min=0.3, t_max=0.8, times=2, **settings)
    scheduler.set_timesteps(5)
    return whole(scheduler, x, **(given or {}))


def test_noise_is_seeded_by_the_samples():
    x = torch.randn(3, 4, 5)
    before = torch.get_rng_state()
    made = flow_run(x)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(flow_run(x), made)
    for row in range(3):  # whatever the batch
        assert torch.equal(flow_run(x[row : row + 1])[0], made[row])
    near = x.clone()
    near[0, 0, 0] += 1e-6
    assert distance(flow_run(near)[:1], made[:1]) > 0.1
    assert torch.equal(flow_run(near)[1:], made[1:])
    assert flow_run(x.bfloat16()).dtype == torch.bfloat16
    assert distance(flow_run(x.bfloat16())[:1], flow_run(x.bfloat16())[1:2]) > 0.1


def test_noise_from_generators():
    x = torch.randn(2, 4, 5)

    def given(count=2):
        return models.generators(count)

    made = flow_run(x, generator=given())
    assert torch.equal(flow_run(x, {"generator": given()}), made)
    assert torch.equal(flow_run(x, {"generator": given()}, generator=torch.Generator().manual_seed(9)), made)
    assert torch.equal(flow_run(x[1:], generator=given()[1])[0], made[1])
    assert distance(flow_run(x, generator=given()[0])[1:], made[1:]) > 0.1
    with pytest.raises(SettingsError, match="got 3, expected one, or one for each of 2 samples"):
        flow_run(x, generator=given(3))


# Attributes that pipelines read


def test_it_is_the_stock_class_to_all_who_ask(tmp_path):
    stock = diffusers.CogVideoXDPMScheduler()
    before = copy.deepcopy(vars(stock))
    scheduler = stgfast.restart(stock, t_min=0.3, t_max=0.6)
    scheduler.set_timesteps(8)
    assert type(stock) is diffusers.CogVideoXDPMScheduler
    assert str(vars(stock)) == str(before)
    assert isinstance(scheduler, diffusers.CogVideoXDPMScheduler)
    assert not hasattr(scheduler, "set_begin_index")
    assert scheduler.config == stock.config
    assert scheduler.order == stock.order
    for method in ("step", "set_timesteps"):
        assert inspect.signature(getattr(scheduler, method)) == inspect.signature(getattr(stock, method))
    pipe = models.pipeline("cogvideox", scheduler=scheduler)
    assert pipe.config["scheduler"] == ("diffusers", "CogVideoXDPMScheduler")
    scheduler.save_pretrained(tmp_path)
    saved = diffusers.CogVideoXDPMScheduler.from_pretrained(tmp_path)
    assert not hasattr(saved, "restarts")
    assert type(scheduler).from_config(scheduler.config).restarts(num_inference_steps=8) > 0
    copied = copy.deepcopy(scheduler)
    copied.set_timesteps(8)
    assert len(copied.timesteps) > 8
    again = stgfast.restart(scheduler, t_min=0.3, t_max=0.6, times=3)
    assert again.restarts(num_inference_steps=8) == 3 * scheduler.restarts(num_inference_steps=8) > 0
    assert type(again).__mro__[2] is diffusers.CogVideoXDPMScheduler


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"t_min": 0.6, "t_max": 0.6}, r"got \(0.6, 0.6\), expected shares of noise with 0 <= t_min < t_max <= 1"),
        ({"t_min": 300, "t_max": 600}, r"got \(300, 600\), expected shares of noise"),
        ({"t_min": float("nan")}, "t_min: got nan, expected a share of noise"),
        ({"t_max": float("inf")}, "t_max: got inf"),
        ({"t_max": "0.6"}, "t_max: got '0.6'"),
        ({"times": 0}, "times: got 0, expected a whole number, 1 or more"),
        ({"times": 1.5}, "times: got 1.5"),
        ({"generator": 42}, "generator: got 42, expected a torch.Generator"),
        ({"generator": []}, r"generator: got \[\]"),
        (
            {"scheduler": diffusers.LCMScheduler()},
            "scheduler to restart: got 'LCMScheduler', expected one of CogVideoXD",
        ),
        ({"scheduler": "euler"}, "scheduler to restart: got 'str'"),
        ({"scheduler": diffusers.UniPCMultistepScheduler(solver_p=diffusers.DDIMScheduler())}, "solver_p"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(SettingsError, match=message):
        stgfast.restart(**{"scheduler": SCHEDULERS["flow"], "t_min": 0.3, "t_max": 0.6, **settings})


def test_settings_that_do_not_fit_the_schedule():
    sigmas = [1.0, 0.75, 0.5, 0.25]
    with pytest.raises(SettingsError, match=r"got \(0.5, 0.55\), expected a step between.*at 1, 0.75, 0.5, 0.25, 0$"):
        stgfast.restart(SCHEDULERS["flow"], t_min=0.5, t_max=0.55).set_timesteps(sigmas=sigmas)
    with pytest.raises(SettingsError, match=r"t_max: got 0\.9, expected at most 0.75, the share of noise at the run's"):
        stgfast.restart(SCHEDULERS["flow"], t_min=0.3, t_max=0.9).set_timesteps(sigmas=sigmas[1:])
    scheduler = stgfast.restart(SCHEDULERS["flow"], t_min=0.3, t_max=0.75)
    scheduler.set_timesteps(sigmas=sigmas)
    with pytest.raises(SettingsError, match="first step of the run: got step 2, expected at most 1"):
        scheduler.set_begin_index(2)


# Whole runs


def back_by_sigma(x, eps, scheduler, k, m):
    s, r = scheduler.sigmas[m], scheduler.sigmas[k]
    if scheduler.config.get("invert_sigmas"):
        s, r = 1 - s, 1 - r
    return (1 - r) / (1 - s) * x + (r**2 - s**2 * (1 - r) ** 2 / (1 - s) ** 2) ** 0.5 * eps


def back_by_alphas(x, eps, scheduler, k, m):
    one, other = (scheduler.alphas_cumprod[scheduler.timesteps[step]] for step in (m, k))
    return (other / one) ** 0.5 * x + (1 - other / one) ** 0.5 * eps


def back_by_edm(x, eps, scheduler, k, m):
    s, r = scheduler.sigmas[m], scheduler.sigmas[k]
    return x + (r**2 - s**2) ** 0.5 * eps


class FirstStep(Exception):
    """Raised where the scheduler of a run would make a step."""


def first_step(pipe, arguments):
    """The arguments of the first step of a pipeline's scheduler."""
    step, seen = pipe.scheduler.step, {}

    @functools.wraps(step)
    def stop(*args, **kwargs):
        seen.update(inspect.signature(step).bind(*args, **kwargs).arguments)
        raise FirstStep

    with mock.patch.object(pipe.scheduler, "step", stop), pytest.raises(FirstStep), torch.no_grad():
        pipe(**arguments)
    return seen


def predict(pipe, arguments, x, i):
    """The arguments of a stock pipeline's scheduler at step i with latents x: a run that starts there."""
    scheduler, set_timesteps = pipe.scheduler, pipe.scheduler.set_timesteps

    @functools.wraps(set_timesteps)
    def at(*args, **kwargs):
        set_timesteps(*args, **kwargs)
        scheduler.timesteps = scheduler.timesteps[i : i + 1]
        if hasattr(scheduler, "sigmas"):
            scheduler.sigmas = scheduler.sigmas[i : i + 2]

    with (
        mock.patch.object(scheduler, "set_timesteps", at),
        mock.patch.object(type(scheduler), "init_noise_sigma", 1.0, create=True),
    ):
        return first_step(pipe, {**arguments, "latents": x})["model_output"]


def written_out(build, arguments, back, k, m, times, generators=None):
    """Algorithm 3 with stock parts: steps 0 to m-1; `times` times noise and steps k to m-1; the rest."""
    pipe, given = build(), arguments()
    seen = first_step(pipe, given)
    fresh, x = copy.deepcopy(pipe.scheduler), seen["sample"]
    generators = generators or given["generator"]  # which were used for the latents already
    extra = {"generator": seen["generator"]} if "generator" in seen else {}

    def denoised(x, first, last):
        scheduler = copy.deepcopy(fresh)
        scheduler._step_index, old = first, None
        for i in range(first, last):
            v, t = predict(pipe, arguments(), x, i), fresh.timesteps[i]
            if isinstance(scheduler, diffusers.CogVideoXDPMScheduler):
                x, old = scheduler.step(v, old, t, fresh.timesteps[i - 1] if i > first else None, x, **extra)
            else:
                x = scheduler.step(v, t, x, **extra, return_dict=False)[0]
        return x

    x = denoised(x, 0, m)
    for again in range(times):
        eps = torch.cat([torch.randn(1, *x.shape[1:], generator=one) for one in generators])
        x = back(x, eps, fresh, k, m)
        x = denoised(x, k, m if again < times - 1 else len(fresh.timesteps))
    return x


def built(family, other=False, scheduler=None):
    def build():
        pipe = family.build(other=other)
        if scheduler is not None:
            pipe.scheduler = copy.deepcopy(scheduler)
        return pipe

    return build


def calm_svd():
    """With weights that amplify roundings less, over the same number of steps."""
    pipe = svd.build()
    torch.manual_seed(1)
    models.spread(pipe.unet, gain=1.0)
    return pipe


SIZED = diffusers.FlowMatchEulerDiscreteScheduler(
    use_dynamic_shifting=True, shift_terminal=0.1, base_shift=0.95, max_shift=2.05
)
INVERTED = diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
# family, its pipeline, the way back, t_min and t_max, k and m of four steps, whether the step is given generators
RUNS = {
    "Wan, UniPC": (wan.FAMILIES[0], built(wan.FAMILIES[0]), back_by_sigma, (0.5, 0.9), (1, 3), False),
    "Wan, Euler": (wan.FAMILIES[0], built(wan.FAMILIES[0], other=True), back_by_sigma, (0.1, 0.9), (1, 3), False),
    "CogVideoX, DDIM": (
        cogvideox.FAMILIES[0],
        built(cogvideox.FAMILIES[0]),
        back_by_alphas,
        (0.1, 0.7),
        (1, 3),
        True,
    ),
    "CogVideoX, DPM": (
        cogvideox.FAMILIES[0],
        built(cogvideox.FAMILIES[0], other=True),
        back_by_alphas,
        (0.5, 0.87),
        (0, 2),
        True,
    ),
    "SVD, Euler": (svd.FAMILIES[0], calm_svd, back_by_edm, (0.1, 0.8), (1, 3), False),
    "LTX": (ltx.FAMILIES[0], built(ltx.FAMILIES[0]), back_by_sigma, (0.3, 0.6), (2, 3), False),
    "LTX, shifted by size": (
        ltx.FAMILIES[0],
        built(ltx.FAMILIES[0], scheduler=SIZED),
        back_by_sigma,
        (0.2, 0.8),
        (1, 3),
        False,
    ),
    "Mochi": (mochi.FAMILIES[0], built(mochi.FAMILIES[0]), back_by_sigma, (0.7, 0.99), (1, 3), False),
    "Mochi, the other way round": (
        mochi.FAMILIES[0],
        built(mochi.FAMILIES[0], scheduler=INVERTED),
        back_by_sigma,
        (0.7, 0.99),
        (1, 3),
        False,
    ),
}
runs = pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
TIMES = 2


def restarting(build, shares, times=TIMES, generator=None):
    pipe = build()
    t_min, t_max = shares
    pipe.scheduler = stgfast.restart(pipe.scheduler, t_min=t_min, t_max=t_max, times=times, generator=generator)
    return pipe


def four_steps(family, prompts=2):
    return {**family.arguments(prompts), "num_inference_steps": 4}


def longer(family, build, shares, steps):
    """The same family, with calls of four steps made longer by restarts."""
    return dataclasses.replace(
        family,
        build=lambda other=False: restarting(build, shares),
        arguments=lambda prompts, cfg=True: {**family.arguments(prompts, cfg), "num_inference_steps": 4},
        steps=(steps, steps),
    )


@runs
def test_equals_the_loop_written_out(run):
    family, build, back, shares, (k, m), passes = run
    own = None if passes else functools.partial(models.generators, 2, 100)
    with torch.no_grad():
        expected = written_out(build, lambda: four_steps(family), back, k, m, TIMES, own and own())
        pipe, seen = restarting(build, shares, generator=own and own()), []

        def callback(pipe, i, t, kwargs):
            seen.append(i)
            return kwargs

        made = family.result(pipe(**four_steps(family), callback_on_step_end=callback))
    assert seen == list(range(4 + TIMES * (m - k)))
    assert pipe.num_timesteps == len(seen)
    assert made.shape == expected.shape
    same(made, expected)
    plain = family.result(build()(**four_steps(family)))
    assert distance(made, plain) > 1e-2


@runs
def test_guided_and_explained_over_the_longer_run(run):
    family, build, _, shares, (k, m), _ = run
    steps = 4 + TIMES * (m - k)
    family = longer(family, build, shares, steps)
    kind = family.kinds[-1]
    guidance = Guidance(
        Perturbation([family.layers[1]], kind=kind, scale=[1.5 - 0.1 * i for i in range(steps)]), rescale=0.3
    )
    expected = family.plain(guidance)
    pipe = stgfast.accelerate(family.pipe(), guidance)
    same(family.run(pipe), expected)
    explained = stgfast.explain(pipe, **family.arguments(1))
    assert sum(phase.steps for phase in explained.phases) == steps
    with pytest.raises(SettingsError, match=f"got 4 numbers, expected {steps}, one for every step"):
        family.run(pipe, stg_scale=[1.0] * 4)


RESTARTED = {
    name: family
    for name, family in FAMILIES.items()
    # Some refuse, one needs conditions of another strength and has tests of its own, and the last one does not set
    # its number of steps itself.
    if not name.startswith("modular") and name not in ("LTX from conditions", "LTX, long")
}


@pytest.mark.parametrize("family", RESTARTED.values(), ids=RESTARTED)
def test_steps_are_known_beforehand(family):
    """The adapter knows mu and sigmas that the pipeline passes to its scheduler; with more of them, there are more
    restarts.
    """
    pipe = family.pipe()
    kind = type(pipe.scheduler).__name__
    if kind in ("EDMEulerScheduler", "FlowMapEulerDiscreteScheduler", "HeliosScheduler"):
        with pytest.raises(SettingsError, match=f"scheduler to restart: got '{kind}'"):
            stgfast.restart(pipe.scheduler, t_min=0.5, t_max=0.75)
        return
    pipe.scheduler = stgfast.restart(pipe.scheduler, t_min=0.5, t_max=0.75)
    stgfast.accelerate(pipe, Guidance(Perturbation([family.layers[1]], kind=family.kinds[0])))
    arguments = {**family.arguments(1), "num_inference_steps": 6}
    with torch.no_grad():
        assert family.result(pipe(**arguments)).isfinite().all()
    steps = sum(phase.steps for phase in stgfast.explain(pipe, **arguments).phases)
    assert steps == pipe.num_timesteps > 6 * arguments.get("strength", 1)


def test_a_scale_that_changes_with_the_steps_of_the_call():
    """The dynamic CFG of CogVideoX depends on the requested number of steps."""
    family = next(family for family in cogvideox.FAMILIES if family.name == "CogVideoX from an image")
    family = longer(family, family.build, (0.1, 0.7), 8)
    guidance = Guidance(Perturbation([1]))
    assert family.arguments(1)["use_dynamic_cfg"]
    same(family.run(stgfast.accelerate(family.pipe(), guidance)), family.plain(guidance))


@pytest.mark.parametrize("family", modular.FAMILIES, ids=lambda family: family.name)
def test_a_modular_pipeline_says_that_its_guider_does_not_count(family):
    pipe = family.pipe()
    pipe.update_components(scheduler=stgfast.restart(pipe.scheduler, t_min=0.3, t_max=0.9))
    stgfast.accelerate(pipe, Guidance(Perturbation([1])))
    with pytest.raises(SettingsError, match="a modular pipeline's guider does not count repeated steps"):
        family.run(pipe)


def test_a_call_repeats_whatever_the_batch():
    """It depends only on the generators of the call: the samples themselves seed the noise."""
    family, build, _, shares, _, _ = RUNS["Wan, UniPC"]
    pipe = restarting(build, shares)
    both = family.result(pipe(**four_steps(family)))
    again = family.result(pipe(**four_steps(family)))
    alone = family.result(pipe(**four_steps(family, 1)))
    assert torch.equal(both, again)
    same(both[:1], alone)


@pytest.mark.parametrize("other", [False, True], ids=["CogVideoX DDIM", "CogVideoX DPM"])
def test_a_run_over_a_part_of_the_schedule(other):
    """From a video, 7 steps of 10: they start before t_max, or the call is refused."""
    family = next(family for family in cogvideox.FAMILIES if "video" in family.name)
    arguments = {**family.arguments(1), "num_inference_steps": 10, "strength": 0.7}
    pipe = family.build(other=other)
    stock = copy.deepcopy(pipe.scheduler)
    stock.set_timesteps(10)
    seen = []

    def callback(pipe, i, t, kwargs):
        seen.append(int(t))
        return kwargs

    pipe.scheduler = stgfast.restart(stock, t_min=0.5, t_max=0.65)
    family.result(pipe(**arguments, callback_on_step_end=callback))
    times = stock.timesteps.tolist()
    jump = next(i for i in range(1, len(seen)) if seen[i] > seen[i - 1])
    m = times.index(seen[jump - 1]) + 1
    assert seen == times[3:m] + times[times.index(seen[jump]) :]
    # A run that starts after t_max, or at its timestep, is noticed at the step that would go back.
    arguments["strength"] = (10 - m + 0.5) / 10
    with pytest.raises(SettingsError, match=r"timestep after a restart: got .*begin at or before t_max"):
        pipe(**arguments)
    pipe.scheduler = stgfast.restart(stock, t_min=0.5, t_max=0.87)
    arguments["strength"] = 0.7
    with pytest.raises(SettingsError, match="first step of the run: got step 3, expected at most"):
        pipe(**arguments)


def test_wan_from_a_video():
    family = next(family for family in wan.FAMILIES if family.name == "Wan from a video")
    arguments = {**family.arguments(1), "num_inference_steps": 6, "strength": 0.7}
    pipe = family.pipe()
    pipe.scheduler = stgfast.restart(pipe.scheduler, t_min=0.5, t_max=0.8)
    stgfast.accelerate(pipe, Guidance(Perturbation([1])))
    pipe(**arguments)
    assert pipe.num_timesteps == sum(phase.steps for phase in stgfast.explain(pipe, **arguments).phases) > 4


def test_tokens_that_are_held_to_loosely_are_refused():
    family = next(family for family in ltx.FAMILIES if family.name == "LTX from conditions")
    pipe = family.pipe()
    pipe.scheduler = stgfast.restart(pipe.scheduler, t_min=0.3, t_max=0.99)
    arguments = {**family.arguments(1), "num_inference_steps": 6}
    with pytest.raises(SettingsError, match=r"time of a token at the first step: got 200\.0, expected 0, or 1000"):
        pipe(**arguments)
    arguments["conditions"][1].strength = 1.0
    assert family.result(pipe(**arguments)).isfinite().all()
    assert pipe.num_timesteps > 6


def test_ltx2_restarts_video_and_audio():
    own = {"num_inference_steps": 3, "spatio_temporal_guidance_blocks": [3]}

    def made(accelerated):
        pipe = ltx2.build()
        pipe.scheduler = stgfast.restart(pipe.scheduler, t_min=0.3, t_max=0.7)
        if accelerated:
            stgfast.accelerate(pipe)
            assert sum(phase.steps for phase in stgfast.explain(pipe, **own).phases) == 4
        return ltx2.call(pipe, **own)

    plain, guided, stock = made(False), made(True), ltx2.call(ltx2.build(), **own)
    for one, other, without in zip(plain, guided, stock, strict=True):
        same(other, one)
        assert distance(one, without) > 1e-2


def test_every_frame_restarts_by_itself():
    """SkyReels has a scheduler for each frame; each goes back at its own step."""
    family = next(family for family in skyreels_v2.FAMILIES if "frame after frame" in family.name)
    pipe = family.pipe()
    pipe.scheduler = stgfast.restart(pipe.scheduler, t_min=0.5, t_max=0.9)
    arguments = {**family.arguments(1), "num_inference_steps": 4}
    stgfast.accelerate(pipe, Guidance(Perturbation([1])))
    result = family.result(pipe(**arguments))
    assert result.isfinite().all()
    assert pipe.num_timesteps == sum(phase.steps for phase in stgfast.explain(pipe, **arguments).phases)
    assert torch.equal(family.result(pipe(**{**arguments, "generator": family.arguments(1)["generator"]})), result)
