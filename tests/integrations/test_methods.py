"""The paper's algorithms and related ones, end to end, each against its formula in this file."""

import dataclasses
import functools

import pytest
import torch

import stgfast
from stgfast import BySigma, Guidance, Perturbation, SettingsError
from stgfast.schedules import Moment
from tests.integrations.families import hunyuan_video, latte, ltx, mochi, stable_video_diffusion, wan
from tests.precision import distance, same

pytestmark = pytest.mark.usefixtures("float64")

FAMILIES = {
    family.name: family
    for module in (hunyuan_video, latte, ltx, mochi, stable_video_diffusion, wan)
    for family in module.FAMILIES
}
FACTORISED = [FAMILIES["Stable Video Diffusion"], FAMILIES["Latte"]]
STACKED, SEQUENTIAL = FAMILIES["Mochi"], FAMILIES["Wan"]
several = pytest.mark.parametrize("family", [STACKED, SEQUENTIAL], ids=lambda family: family.name)
factorised = pytest.mark.parametrize("family", FACTORISED, ids=lambda family: family.name)


def dot(one, other):
    """Inner products per prompt, in the shape of predictions."""
    return (one * other).flatten(1).sum(1).reshape(-1, *[1] * (one.ndim - 1))


def made_by(family, guidance, prompts=2, steps=None, **settings):
    settings |= {} if steps is None else {"num_inference_steps": steps}
    return family.run(stgfast.accelerate(family.pipe(), guidance), prompts, **settings)


def along_axes(family, **options):
    return Guidance(
        [
            Perturbation([family.layers[0]], kind="attention", scale=1.5, axis="spatial"),
            Perturbation([family.layers[1]], kind="attention", scale=0.8, axis="temporal"),
        ],
        **options,
    )


def scale_of(family):
    """The CFG scale of a call; for Stable Video Diffusion, one for each frame."""
    return family.cfg(None, "unet") if callable(family.cfg) else family.cfg


# Algorithm 2: both terms, each with its scale. Algorithm 5: of the second only the part orthogonal to the first.


@factorised
@pytest.mark.parametrize("orthogonal", [False, True])
@pytest.mark.parametrize("phi", [0.0, 0.7])
def test_two_terms(family, orthogonal, phi):
    scale = scale_of(family)

    def formula(cond, uncond, perturbed, step):
        spatial, temporal = (cond - prediction for prediction in perturbed)
        if orthogonal:
            temporal = temporal - dot(temporal, spatial) / dot(spatial, spatial) * spatial
        g = uncond + scale * (cond - uncond) + 1.5 * spatial + 0.8 * temporal
        if phi:
            each = zip(cond, g, strict=True)
            g = torch.stack([one * (phi * c.std() / one.std() + 1 - phi) for c, one in each])
        return g

    guidance = along_axes(family, project="orthogonal" if orthogonal else "", rescale=phi)
    expected = family.plain(guidance, 2, formula=formula)
    made = made_by(family, guidance)
    same(made, expected)
    if orthogonal:
        assert distance(made, made_by(family, along_axes(family, rescale=phi))) > 1e-5


RELATIVES = {
    "CFG-Zero*": Guidance(Perturbation([3], scale=1.5), project="along-uncond"),
    "CFG-Zero* alone": Guidance(project="along-uncond"),
    "APG": Guidance(Perturbation([3], scale=1.5), project="along-cond", rescale=0.7),
    "APG with some of the parallel part": Guidance(Perturbation([3], scale=1.5), project="along-cond", eta=0.3),
    "orthogonal": Guidance([Perturbation([1], scale=1.5), Perturbation([3])], project="orthogonal"),
}


def relative(guidance, scale, cond, uncond, perturbed, step):
    change = cond - uncond
    if guidance.project == "along-uncond":
        uncond = dot(cond, uncond) / dot(uncond, uncond) * uncond
        g = uncond + scale * (cond - uncond)
    elif guidance.project == "along-cond":
        parallel = dot(change, cond) / dot(cond, cond) * cond
        g = cond + (scale - 1) * (change - parallel + guidance.eta * parallel)
    else:
        g = uncond + scale * change
        first = cond - perturbed[0]
        second = cond - perturbed[1]
        perturbed = [perturbed[0], cond - (second - dot(second, first) / dot(first, first) * first)]
    for part, prediction in zip(guidance.perturbations, perturbed, strict=True):
        g = g + part.scale * (cond - prediction)
    phi = guidance.rescale
    if phi:
        g = torch.stack([one * (phi * c.std() / one.std() + 1 - phi) for c, one in zip(cond, g, strict=True)])
    return g


@several
@pytest.mark.parametrize("name", RELATIVES)
def test_relatives(family, name):
    guidance = RELATIVES[name]
    expected = family.plain(guidance, 2, formula=functools.partial(relative, guidance, family.cfg))
    made = made_by(family, guidance)
    same(made, expected)
    without = Guidance(guidance.perturbations, rescale=guidance.rescale)
    assert distance(made, made_by(family, without)) > 1e-3


# Schedules over sigma


@pytest.mark.parametrize("family", [STACKED, SEQUENTIAL, FAMILIES["LTX"]], ids=lambda family: family.name)
def test_a_schedule_over_sigma(family):
    """Equal to the same numbers given as a list over steps."""
    pipe = family.pipe()
    family.run(pipe, num_inference_steps=5)
    # Fractions of noise, also if the scheduler has fractions of data.
    inverted = pipe.scheduler.config.get("invert_sigmas")
    sigmas = [1 - float(sigma) if inverted else float(sigma) for sigma in pipe.scheduler.sigmas[:5]]
    assert sigmas == sorted(sigmas, reverse=True)
    middle = (sigmas[1] + sigmas[2]) / 2
    schedule = BySigma([(middle, 2.0), (sigmas[3], 0.0), (sigmas[3] / 2, 0.5)])
    listed = [2.0, 2.0, 0.0, 0.0, schedule.at(sigmas[4])]
    options = {"rescale": BySigma([(sigmas[2], 0.0), (sigmas[3], 0.7)])}
    by_sigma = Guidance(Perturbation([3], scale=schedule), **options)
    by_step = Guidance(Perturbation([3], scale=listed), rescale=[0.0, 0.0, 0.0, 0.7, 0.7])
    one, other = (made_by(family, guidance, 1, steps=5) for guidance in (by_sigma, by_step))
    assert torch.equal(one, other)
    arguments = family.arguments(1) | {"num_inference_steps": 5}
    explained = stgfast.explain(stgfast.accelerate(family.pipe(), by_sigma), **arguments)
    assert "by sigma (2 down to" in str(explained)
    assert explained.block_rows == stgfast.explain(stgfast.accelerate(family.pipe(), by_step), **arguments).block_rows


def test_a_scheduler_without_sigmas_says_so():
    from tests.integrations.families import cogvideox

    family = next(one for one in cogvideox.FAMILIES if one.name == "CogVideoX")
    pipe = stgfast.accelerate(family.pipe(), Guidance(Perturbation([1], scale=BySigma([(0.5, 1.0)]))))
    with pytest.raises(
        SettingsError, match=r"a schedule over sigma: got 'CogVideoX\w+', expected a scheduler that has"
    ):
        family.run(pipe)


def test_the_13b_preset_follows_the_models_own_table():
    """The table of the model's configuration, looked up as in the model's code."""
    times = [1.0, 0.996, 0.9933, 0.9850, 0.9767, 0.9008, 0.6180]
    layers = [[], [11, 25, 35, 39], [22, 35, 39], [28], [28], [28], [28]]
    cfg, stg, rescaling = [1, 1, 6, 8, 6, 1, 1], [0, 0, 4, 4, 4, 2, 1], [1, 1, 0.5, 0.5, 1, 1, 1]
    preset = Guidance.preset("ltx-13b")
    for thousandth in range(1001):
        sigma = thousandth / 1000
        row = next((i for i, time in enumerate(times) if time <= sigma), len(times) - 1)
        moment = Moment(0, 1, sigma)
        weights = preset.weights(moment, 3.0)
        assert 1.0 - weights.get("uncond", 0.0) == cfg[row]
        perturbed = {name: -weights[name] for name in preset.names if name in weights}
        assert list(perturbed.values()) == ([float(stg[row])] if stg[row] else [])
        for name in perturbed:
            assert list(preset.perturbations[preset.names.index(name)].layers) == layers[row]
        if stg[row]:
            assert preset.phi(moment) == (0.0 if rescaling[row] == 1 else rescaling[row])


# Reuse


def newton(steps, values, at):
    """The polynomial through these values, by divided differences."""
    if len(values) == 1:
        return values[0]
    head, tail = newton(steps[:-1], values[:-1], at), newton(steps[1:], values[1:], at)
    return ((at - steps[0]) * tail - (at - steps[-1]) * head) / (steps[-1] - steps[0])


def kept(guidance, scale, off):
    """The differences of branches from their bases in steps that compute them, and extrapolated in the others. How far
    each extrapolation is off is appended to `off`.
    """
    order, past, asked = guidance.reuse_order or 0, {}, {}
    every = {"uncond": guidance.reuse_cfg, **dict.fromkeys(range(len(guidance.perturbations)), guidance.reuse)}
    reused = [name for name, steps in every.items() if steps != 1]

    def formula(cond, uncond, perturbed, step):
        strength_of_cfg = scale if guidance.cfg is None else guidance.cfg[step]
        if not guidance.start <= step / 7 < guidance.stop:
            return uncond + scale * (cond - uncond)
        if guidance.cfg is not None and guidance.cfg[step] == 1:
            uncond = None

        def known(name, base, prediction):
            if name not in reused:
                return prediction
            if order and asked.get(name, step) < step - 1:
                past.pop(name)
            asked[name] = step
            steps, values = past.setdefault(name, ([], []))
            named = isinstance(every[name], tuple)
            warm = 2 + reused.index(name) % every[name] if order and not named else 1
            if len(steps) < warm or (step in every[name] if named else step - steps[-1] >= every[name]):
                steps.append(step)
                values.append(base - prediction)
            extrapolated = base - newton(steps[-order - 1 :], values[-order - 1 :], step)
            off.append(distance(extrapolated, prediction))
            return extrapolated

        if uncond is not None:
            uncond = known("uncond", cond, uncond)
        g = guided = cond if uncond is None else uncond + strength_of_cfg * (cond - uncond)
        plain = {"cond": cond, "uncond": uncond, "guided": guided}
        for number, (part, prediction) in enumerate(zip(guidance.perturbations, perturbed, strict=True)):
            strength = part.scale[step] if isinstance(part.scale, tuple) else part.scale
            if strength:
                g = g + strength * (plain[part.base] - known(number, plain[part.base], prediction))
        if guidance.rescale:
            pairs = zip(cond, g, strict=True)
            g = torch.stack([one * (guidance.rescale * c.std() / one.std() + 1 - guidance.rescale) for c, one in pairs])
        return g

    return formula


BOTH = Guidance([Perturbation([3]), Perturbation([1], kind="attention", scale=0.5)], reuse=2, reuse_cfg=3)
REUSED = {
    "with CFG off for a while": Guidance(
        Perturbation([3]), cfg=[3, 3, 3, 1, 3, 3, 3], reuse=2, reuse_cfg=3, reuse_order=1
    ),
    "in a part of the run": Guidance(Perturbation([3]), start=0.2, stop=0.8, reuse=2, reuse_cfg=3),
    "in named steps": dataclasses.replace(BOTH, reuse=(0, 2, 3), reuse_cfg=(1, 2, 4, 5), reuse_order=1),
    "a perturbed branch": Guidance(Perturbation([3], scale=1.5), reuse=2, reuse_order=0),
    "rescaled": Guidance(Perturbation([3], kind="attention"), reuse=3, rescale=0.7, reuse_order=0),
    "CFG": Guidance(Perturbation([3]), reuse_cfg=2, reuse_order=0),
    "both": dataclasses.replace(BOTH, reuse_order=0),
    "both, by a line": dataclasses.replace(BOTH, reuse_order=1),
    "both, by a parabola": dataclasses.replace(BOTH, reuse_order=2),
    "against the CFG result": Guidance(Perturbation([3], of="uncond", base="guided"), reuse=2, reuse_cfg=2),
    "with steps of scale 0": Guidance(Perturbation([3], scale=[0, 1, 1, 0, 1, 1, 1]), reuse=3, reuse_order=0),
    "with steps of scale 0, by a line": Guidance(
        Perturbation([3], scale=[1, 1, 1, 0, 1, 1, 1]), reuse=3, reuse_cfg=2, reuse_order=1
    ),
}
every_protocol = pytest.mark.parametrize(
    "family", [STACKED, SEQUENTIAL, FAMILIES["HunyuanVideo"], FACTORISED[0]], ids=lambda family: family.name
)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        *((family, name) for family in (STACKED, SEQUENTIAL, FAMILIES["HunyuanVideo"]) for name in REUSED),
        *((FACTORISED[0], name) for name in ("rescaled", "both")),  # a scale for every frame; slow
    ],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_reuse(family, name):
    guidance, steps, off = REUSED[name], {"num_inference_steps": 7}, []
    expected = family.plain(guidance, 2, formula=kept(guidance, scale_of(family), off), **steps)
    same(made_by(family, guidance, **steps), expected)
    assert max(off) > 1e-4


@every_protocol
def test_reuse_computes_only_what_is_due(family):
    guidance = Guidance(Perturbation([2]), reuse=2, reuse_cfg=3, reuse_order=0)
    stock, pipe = family.pipe(), stgfast.accelerate(family.pipe(), guidance)
    with family.counted(stock) as one:
        family.run(stock, num_inference_steps=6)
    with family.counted(pipe) as rows:
        family.run(pipe, num_inference_steps=6)
    counts = {"cond": 6, "uncond": 2, "perturbed": 3}
    layers = [part.layer for part in family.facts.parts(family.denoisers(pipe)[0])]
    last = len(layers) - 1 - layers[::-1].index(2)
    for number, layer in enumerate(layers):
        perturbed = 0 if number < layers.index(2) or layer == 2 else counts["perturbed"] if number > last else 0
        assert rows[number] * 12 == one[number] * (counts["cond"] + counts["uncond"] + perturbed), layer
    explained = stgfast.explain(pipe, **family.arguments(1) | {"num_inference_steps": 6})
    assert explained.block_rows == sum(12 * made / per for made, per in zip(rows, one, strict=True))
    assert "approximately: cond - uncond computed in every 3rd step, repeated in the others; memory: 1 pred" in str(
        explained
    )


@every_protocol
@pytest.mark.parametrize("order", [1, 2])
def test_what_is_carried_on_is_what_explain_counts(family, order):
    """The first steps are computed; after that one branch or the other is, or none."""
    guidance = Guidance([Perturbation([2]), Perturbation([3])], reuse=2, reuse_cfg=3, reuse_order=order)
    pipe, steps = stgfast.accelerate(family.pipe(), guidance), {"num_inference_steps": 9}
    stock = family.pipe()
    with family.counted(stock) as one:
        family.run(stock, **steps)
    with family.counted(pipe) as rows:
        family.run(pipe, **steps)
    explained = stgfast.explain(pipe, **family.arguments(1) | steps)
    cfg = 1 if family.cfg is None else 2
    assert explained.block_rows == sum(9 * cfg * made / per for made, per in zip(rows, one, strict=True))
    assert explained.block_rows < stgfast.explain(pipe, **family.arguments(1) | steps, stg=EXACT).block_rows
    assert f"memory: {2 * (order + 1)} predictions per prompt" in str(explained)


EXACT = Guidance([Perturbation([2]), Perturbation([3])])


def test_a_restart_begins_anew():
    """Added noise invalidates what earlier steps computed."""
    guidance = Guidance(Perturbation([2]), reuse=3, reuse_cfg=3, reuse_order=2)
    family, steps = FAMILIES["LTX"], {"num_inference_steps": 8}
    pipe = family.pipe()
    pipe.scheduler = stgfast.restart(pipe.scheduler, t_min=0.3, t_max=0.7)
    stgfast.accelerate(pipe, guidance)
    with family.counted(pipe) as rows:
        family.run(pipe, **steps)
    explained = stgfast.explain(pipe, **family.arguments(1) | steps)
    assert explained.block_rows == sum(rows)
    together = stgfast.explain(
        stgfast.accelerate(family.pipe(), guidance), num_inference_steps=len(pipe.scheduler.timesteps)
    )
    assert explained.block_rows > together.block_rows


@every_protocol
def test_named_steps_are_what_explain_counts(family):
    guidance = Guidance([Perturbation([2]), Perturbation([3])], reuse=(0, 1, 4), reuse_cfg=(0, 2, 3, 7))
    pipe, steps = stgfast.accelerate(family.pipe(), guidance), {"num_inference_steps": 8}
    stock = family.pipe()
    with family.counted(stock) as one:
        family.run(stock, **steps)
    with family.counted(pipe) as rows:
        family.run(pipe, **steps)
    explained = stgfast.explain(pipe, **family.arguments(1) | steps)
    cfg = 1 if family.cfg is None else 2
    assert explained.block_rows == sum(8 * cfg * made / per for made, per in zip(rows, one, strict=True))
    assert explained.block_rows < stgfast.explain(pipe, **family.arguments(1) | steps, stg=EXACT).block_rows
    assert "base - perturbed computed in steps 0, 1, 4, extrapolated quadratically in the others" in str(explained)
    with pytest.raises(
        stgfast.SettingsError, match="reuse_cfg: got step 7, expected those of a run of 7 steps, from 0"
    ):
        family.run(pipe, num_inference_steps=7)


def test_the_two_models_of_wan_keep_nothing_for_one_another():
    family = FAMILIES["Wan of two transformers"]
    pipe = stgfast.accelerate(family.pipe(), Guidance(Perturbation([2], scale=1.5), reuse=100, reuse_order=0))
    with family.counted(pipe) as rows:
        family.run(pipe, num_inference_steps=6)
    depth = len(pipe.transformer.blocks)
    assert rows[depth - 1] > 1
    assert rows[2 * depth - 1] > 1
    assert rows[depth - 1] + rows[2 * depth - 1] == 2 * 6 + 2  # cond and uncond in every step, perturbed once for each
    assert stgfast.explain(pipe, **family.arguments(1) | {"num_inference_steps": 6}).block_rows == sum(rows)
