"""Recipes: used as a whole, only for the model that they were found for, and named in clips."""

import dataclasses
import json

import diffusers
import pytest
import torch

import stgfast
from stgfast import Guidance, Perturbation, Recipe, SettingsError, toy
from stgfast.integrations import ADAPTERS
from stgfast.recipes import model_of
from stgfast.render.files import metadata_of
from stgfast.solvers import REPLACED, SOLVERS
from tests import models
from tests.integrations.families import hunyuan_video, ltx, wan
from tests.integrations.test_families import FAMILIES
from tests.precision import distance

LTX, HUNYUAN = ltx.FAMILIES[0], hunyuan_video.FAMILIES[0]
GUIDANCE = Guidance(Perturbation([2]), rescale=0.5)
SIX = {"num_inference_steps": 6}
SETTINGS = {"steps": 6, "solver": "unipc", "reuse": 2, "reuse_cfg": (0, 1, 2, 4), "reuse_order": 1}


def solver_of(pipe):
    """None for a pipeline with a solver of its own."""
    if REPLACED not in vars(pipe):
        return ""
    given = pipe.scheduler
    made = type(given).__mro__[1].__name__, given.config.solver_order
    return next(name for name, known in SOLVERS.items() if known == made)


def recipe_for(pipe, **changes):
    original = type(stgfast.restore(pipe))
    return Recipe(**{"model": model_of(pipe, ADAPTERS[original.__name__]), **SETTINGS, **changes})


def test_is_what_its_parts_are():
    pipe = LTX.pipe()
    recipe = recipe_for(pipe)
    made = LTX.run(stgfast.accelerate(pipe, GUIDANCE, recipe=recipe), **SIX)
    by_hand = stgfast.solver(LTX.pipe(), "unipc")
    reused = dataclasses.replace(GUIDANCE, reuse=2, reuse_cfg=(0, 1, 2, 4), reuse_order=1)
    assert torch.equal(made, LTX.run(stgfast.accelerate(by_hand, reused), **SIX))
    exact = LTX.run(stgfast.accelerate(LTX.pipe(), GUIDANCE), **SIX)
    assert distance(made, exact) > 1e-4


def test_steps_are_the_recipes_where_a_call_does_not_say():
    pipe = stgfast.accelerate(LTX.pipe(), GUIDANCE, recipe=recipe_for(LTX.pipe()))
    given = {**LTX.arguments(1)}
    given.pop("num_inference_steps")
    assert stgfast.explain(pipe, **given).phases[-1].last == 5
    with torch.no_grad():
        pipe(**given)
    assert len(pipe.scheduler.timesteps) == 6
    for other in ({"num_inference_steps": 8}, {"timesteps": [900, 500, 100]}):
        with pytest.raises(SettingsError, match=r"steps with a recipe: got \d, expected the 6 that it was found for"):
            pipe(**given, **other)


def test_is_undone_and_exchanged():
    pipe = LTX.pipe()
    own, recipe = pipe.scheduler, recipe_for(pipe)
    stgfast.accelerate(pipe, GUIDANCE, recipe=recipe)
    assert solver_of(pipe) == "unipc"
    stgfast.accelerate(pipe, GUIDANCE, recipe=dataclasses.replace(recipe, solver="dpm++"))
    assert solver_of(pipe) == "dpm++"
    stgfast.accelerate(pipe, GUIDANCE)
    assert pipe.scheduler is own
    stgfast.accelerate(pipe, GUIDANCE, recipe=dataclasses.replace(recipe, solver=""))
    assert pipe.scheduler is own
    stgfast.accelerate(pipe, GUIDANCE, recipe=recipe)
    assert stgfast.restore(pipe).scheduler is own
    stgfast.accelerate(stgfast.solver(pipe, "unipc3"), GUIDANCE)  # one that was chosen by hand stays
    assert solver_of(pipe) == "unipc3"


def test_explain_names_it():
    pipe = stgfast.accelerate(LTX.pipe(), GUIDANCE, recipe=recipe_for(LTX.pipe()))
    text = str(stgfast.explain(pipe, **LTX.arguments(1) | SIX))
    said = "unipc, 6 steps, reuse 2, reuse_cfg but in steps 0, 1, 2, 4, order 1"
    assert f"approximately, by a recipe: {said}\n" in text
    assert "cond - uncond computed in steps 0, 1, 2, 4, extrapolated linearly in the others" in text


@pytest.mark.parametrize("name", FAMILIES)
def test_every_pipeline_takes_one(name):
    """One without a solver, and with the reuse that the pipeline supports."""
    family = FAMILIES[name]
    pipe, cfg = family.pipe(), family.cfg is not None
    given = family.arguments(1) if cfg else {**family.arguments(1, cfg=False)}
    steps = len(given["timesteps"]) if given.get("timesteps") else None
    guidance = Guidance(Perturbation([family.layers[1]], kind=family.kinds[0]))
    recipe = recipe_for(pipe, steps=steps or 5, solver="", reuse_cfg=2 if cfg else 1, reuse_order=0)
    stgfast.accelerate(pipe, guidance, recipe=recipe)
    given.pop("num_inference_steps", None)
    explained = stgfast.explain(pipe, **given)
    with torch.no_grad():
        pipe(**given)
    exact = stgfast.accelerate(family.pipe(), guidance)
    asked = {} if steps else {"num_inference_steps": 5}
    assert explained.block_rows < stgfast.explain(exact, **given, **asked).block_rows


def test_there_and_back(tmp_path):
    recipe = recipe_for(LTX.pipe(), found={"distance": 0.03})
    recipe.save(tmp_path / "recipe.json")
    assert Recipe.read(tmp_path / "recipe.json") == recipe
    pipe = stgfast.accelerate(LTX.pipe(), GUIDANCE, recipe=tmp_path / "recipe.json")
    direct = stgfast.accelerate(LTX.pipe(), GUIDANCE, recipe=recipe)
    assert torch.equal(LTX.run(pipe, **SIX), LTX.run(direct, **SIX))
    exact = recipe_for(LTX.pipe(), solver="", reuse=1, reuse_cfg=1, reuse_order=None)
    assert set(exact.to_dict()) == {"model", "steps"}


def test_is_for_its_model_alone():
    recipe = recipe_for(LTX.pipe())
    with pytest.raises(SettingsError, match="model of the recipe: got LTXPipeline, expected HunyuanVideoPipeline"):
        stgfast.accelerate(HUNYUAN.pipe(), GUIDANCE, recipe=recipe)
    wider = dict(recipe.model, transformer={**recipe.model["transformer"], "num_layers": 48})
    with pytest.raises(SettingsError, match="got one whose transformer has num_layers 48, expected one whose transf"):
        stgfast.accelerate(LTX.pipe(), GUIDANCE, recipe=dataclasses.replace(recipe, model=wider))
    without = {"pipeline": "LTXPipeline"}
    with pytest.raises(SettingsError, match="got one without transformer, expected one with transformer"):
        stgfast.accelerate(LTX.pipe(), GUIDANCE, recipe=dataclasses.replace(recipe, model=without))
    newer = dict(recipe.model, transformer={**recipe.model["transformer"], "of_another_version": 1})
    stgfast.accelerate(LTX.pipe(), GUIDANCE, recipe=dataclasses.replace(recipe, model=newer))


WRONG = {
    "no steps": (lambda ok: ok | {"steps": 0}, "steps of a recipe: got 0"),
    "steps that there are not": (lambda ok: ok | {"reuse": [0, 6]}, "reuse of a recipe: got step 6, expected those"),
    "an order of nothing": (
        lambda ok: ok | {"reuse": 1, "reuse_cfg": 1},
        "reuse_order: got 1, expected reuse, reuse_cfg or reuse_bl",
    ),
    "an unknown field": (lambda ok: ok | {"cost": 1}, "recipe: got .*, expected model and steps, and some of solver"),
    "no model": (lambda ok: {"steps": 6}, "recipe: got .'steps'., expected model and steps"),
    "a model's name": (lambda ok: ok | {"model": "ltx"}, "model of a recipe: got 'ltx'"),
    "no mapping": (lambda ok: [ok], "recipe: got .*, expected model and steps"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_ones_say_so(name, tmp_path):
    change, message = WRONG[name]
    (tmp_path / "recipe.json").write_text(json.dumps(change(recipe_for(LTX.pipe()).to_dict())))
    with pytest.raises(SettingsError, match=message):
        stgfast.accelerate(LTX.pipe(), recipe=tmp_path / "recipe.json")


def test_what_does_not_go_with_one_is_said(tmp_path):
    recipe = recipe_for(LTX.pipe())
    with pytest.raises(SettingsError, match="reuse of a Guidance and a recipe: got both, expected one of them"):
        stgfast.accelerate(LTX.pipe(), Guidance(Perturbation([2]), reuse=3), recipe=recipe)
    pipe = stgfast.accelerate(LTX.pipe(), GUIDANCE, recipe=recipe)
    with pytest.raises(SettingsError, match="and a recipe: got both"):
        LTX.run(pipe, stg=Guidance(Perturbation([2]), reuse=3), **SIX)
    with pytest.raises(SettingsError, match="reuse_cfg: got a call without CFG"):
        LTX.run(pipe, cfg=False, **SIX)
    with pytest.raises(SettingsError, match=r"recipe: got .*no.json.*, expected a file written by stgfast tune"):
        stgfast.accelerate(LTX.pipe(), recipe=tmp_path / "no.json")
    with pytest.raises(SettingsError, match=r"recipe: got 3, expected a stgfast.Recipe, or the path of its file"):
        stgfast.accelerate(LTX.pipe(), recipe=3)
    other = wan.FAMILIES[0].pipe()
    with pytest.raises(SettingsError, match="got UniPCMultistepScheduler, expected FlowMatchEulerDiscreteScheduler"):
        stgfast.accelerate(other, GUIDANCE, recipe=recipe_for(other))
    assert not hasattr(other, "_stgfast")


def test_a_folder_of_clips_by_a_recipe(tmp_path):
    recipe = recipe_for(toy.pipeline(), found={"distance": 0.1})
    recipe.save(tmp_path / "recipe.json")
    jobs = [{"prompt": prompt, "seed": 3} for prompt in toy.PROMPTS[:2]]
    given = {"format": "npz", "recipe": tmp_path / "recipe.json", "same_process": True}
    assert stgfast.render("toy", jobs, tmp_path / "out", **given).rendered == 2
    assert stgfast.render("toy", jobs, tmp_path / "out", **given).rendered == 0
    clip = next((tmp_path / "out").glob("*.npz"))
    said = metadata_of(clip)
    assert (said["job"]["solver"], said["job"]["steps"], said["job"]["guidance"]["reuse"]) == ("unipc", 6, 2)
    assert "recipe" not in said["job"]  # where these words come from
    page = (tmp_path / "out" / "index.html").read_text()
    assert "Approximate, by a recipe: unipc, 6 steps, reuse 2" in page
    assert '"approximate": "reuse 2; reuse_cfg but in steps 0, 1, 2, 4; order 1"' in page
    other = dataclasses.replace(recipe, solver="dpm++")
    assert (
        stgfast.render("toy", jobs[:1], tmp_path / "out", format="npz", same_process=True, recipe=other).rendered == 1
    )
    # A pipeline that was accelerated with a recipe makes the same clips, and other clips with another solver.
    pipe = stgfast.accelerate(toy.pipeline(), toy.GUIDANCE, recipe=recipe)
    assert (
        stgfast.render(
            pipe, [{**jobs[0], **toy.JOB, "steps": 6}], tmp_path / "mine", format="npz", same_process=True
        ).rendered
        == 1
    )
    mine = metadata_of(next((tmp_path / "mine").glob("*.npz")))["job"]
    assert {**mine, "prompt": "", "name": ""} == {**said["job"], "prompt": "", "name": ""}
    # Without it, a job with as many steps gives another clip.
    jobs[0]["steps"] = 6
    assert stgfast.render("toy", jobs[:1], tmp_path / "out", format="npz", same_process=True).rendered == 1


def test_jobs_that_do_not_go_with_a_recipe_stop_before_the_first(tmp_path):
    recipe = recipe_for(toy.pipeline())
    told = []
    with pytest.raises(SettingsError, match="1 bad line"):
        stgfast.render("toy", [{"prompt": "a", "steps": 9}], tmp_path, recipe=recipe, listener=told.append)
    assert "steps with a recipe: got 9, expected the 6" in told[0]["error"]
    with pytest.raises(SettingsError, match="1 bad line"):
        stgfast.render(
            "toy", [{"prompt": "a"}], tmp_path, recipe=recipe_for(LTX.pipe(), model={"pipeline": "WanPipeline"})
        )
    pipe = stgfast.accelerate(toy.pipeline(), GUIDANCE, recipe=recipe)
    with pytest.raises(SettingsError, match="recipe: got one, expected none: the pipeline has another"):
        stgfast.render(pipe, [{"prompt": "a", **toy.JOB, "steps": 6}], tmp_path, recipe=recipe)


def test_a_model_with_a_scheduler_of_its_own_is_said_before_it_is_used():
    pipe = models.pipeline("mochi", scheduler=diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True))
    with pytest.raises(SettingsError, match="got invert_sigmas=True, which unipc cannot follow"):
        stgfast.accelerate(pipe, GUIDANCE, recipe=recipe_for(pipe))
