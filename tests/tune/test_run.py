"""A search on the model in the package, and the files in its folder."""

import json

import numpy as np
import pytest
import torch

import stgfast
from stgfast import Recipe, SettingsError, cli, toy
from stgfast.tune import run as tuning
from stgfast.tune.run import PAGE, RECIPE, STATE, tune
from tests.browser import until

pytestmark = pytest.mark.xdist_group("tune")  # one search for all of them
PROMPTS = toy.PROMPTS[:2]
SMALL = {"height": 32, "width": 32, "num_frames": 9}
FEW = {"clips": 2, "defaults": {"steps": 5, **SMALL}}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("tuned")
    return tune("toy", PROMPTS, out, cost=0.8, **FEW)


def test_distances_and_costs_are_those_of_the_clips(made):
    """For the chosen recipe, recomputed from its file; the converged clip is by UniPC with three times the steps."""
    recipe = Recipe.read(made.out / RECIPE)
    assert recipe.to_dict() == {**made.chosen.recipe.to_dict(), "found": recipe.found}
    off = []
    for number, prompt in enumerate(PROMPTS):
        clips = []
        for how in (recipe, Recipe(model=recipe.model, steps=15, solver="unipc")):
            pipe = stgfast.accelerate(toy.pipeline(), toy.GUIDANCE, recipe=how)
            size = {**SMALL, "guidance_scale": toy.CALL["guidance_scale"]}
            given = {**size, "output_type": "latent", "generator": torch.Generator().manual_seed(0)}
            clips.append(pipe(prompt, **given).frames.double())
        off.append(float((clips[0] - clips[1]).norm() / clips[1].norm()))
        kept = np.load(made.out / "converged" / f"{number:04}.npy")
        assert np.allclose(kept, clips[1].flatten().numpy(), rtol=1e-3, atol=1e-3)
    assert recipe.found["distance"] == pytest.approx(float(np.median(off)), rel=0.02)
    exact = stgfast.accelerate(toy.pipeline(), toy.GUIDANCE)
    usual = stgfast.explain(exact, num_inference_steps=5, guidance_scale=2.0).block_rows
    by_recipe = stgfast.explain(stgfast.accelerate(exact, toy.GUIDANCE, recipe=recipe), guidance_scale=2.0).block_rows
    assert recipe.found["cost"] == pytest.approx(by_recipe / usual, abs=1e-3)
    assert recipe.found["cost"] <= 0.8


def test_the_nearest_within_the_cost_is_chosen(made):
    whole = [trial for trial in made.trials if len(trial.distances) == 2 and trial.cost <= 0.8]
    assert made.chosen.distance == min(trial.distance for trial in whole)
    assert len(made.trials) > len(whole)  # some were given up, or cost too much


def test_the_folder_is_all_that_a_render_needs(made, tmp_path):
    jobs = [{"prompt": PROMPTS[0], **SMALL}]
    report = stgfast.render("toy", jobs, tmp_path, format="npz", same_process=True, recipe=made.out / RECIPE)
    assert report.rendered == 1


def test_it_goes_on_where_it_was_stopped(made, monkeypatch):
    """Nothing is made twice, and the result is the same; a truncated line is made again."""
    calls = []
    latents = tuning.Search._latents

    def watched(self, recipe, number):
        calls.append((str(recipe), number))
        return latents(self, recipe, number)

    monkeypatch.setattr(tuning.Search, "_latents", watched)
    again = tune("toy", PROMPTS, made.out, cost=0.8, **FEW)
    assert calls == []
    assert again.chosen.recipe == made.chosen.recipe
    state = made.out / STATE
    lines = state.read_text().splitlines()
    state.write_text("\n".join(lines)[:-10])
    tune("toy", PROMPTS, made.out, cost=0.8, **FEW)
    last = json.loads(lines[-1])
    assert calls == [(last["recipe"], last["clip"])]


def test_when_time_is_out_all_are_known_alike(tmp_path):
    tuned = tune("toy", PROMPTS, tmp_path, minutes=1e-9, clips=2, defaults={"steps": 2, **SMALL})
    assert [len(trial.distances) for trial in tuned.trials] == [1]
    assert tuned.chosen is tuned.usual


def test_the_page_shows_all_of_it(made, browser):
    browser.get((made.out / PAGE).as_uri())
    assert until(browser, "document.querySelectorAll('tbody tr').length") == len(made.trials)
    assert browser.execute_script("return document.querySelectorAll('video').length") == 3 * len(PROMPTS)
    assert str(made.chosen.recipe) in browser.execute_script("return document.getElementById('said').textContent")
    assert until(browser, "[...document.querySelectorAll('video')].every(video => video.readyState > 0)")
    assert browser.get_log("browser") == []


def test_the_command(tmp_path, capsys):
    few = ["--clips", "1", "--set", "steps=5", *(f"--set={name}={size}" for name, size in SMALL.items())]
    given = ["tune", "--model", "toy", "--out", str(tmp_path), *few]
    assert cli.main([*given, "--cost", "0.9", PROMPTS[0]]) == 0
    said = capsys.readouterr()
    assert "found, as an approximation: " in said.out
    assert "clip" in said.err  # the bar
    assert cli.main([*given, "--distance", "1e-9", "--quiet", PROMPTS[0]]) == 1
    said = capsys.readouterr()
    assert "no recipe meets it; the nearest is" in said.out
    assert "clip/s" not in said.err


WRONG = {
    "another's name": (["--model", "toy", "--trust", "other"], "trust: got 'other', expected the name of the model"),
    "no clips": (["--model", "toy", "--clips", "0"], "clips: got 0, expected a number of clips, 1 or more"),
    "a setting": (["--model", "toy", "--set", "stops=3"], "stops"),
    "minutes": (["--model", "toy", "--minutes", "0"], "minutes: got 0.0, expected a number above 0"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_say_so(name, tmp_path, capsys):
    arguments, message = WRONG[name]
    assert cli.main(["tune", *arguments, "--out", str(tmp_path / "out"), "a prompt"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_does_not_go_together_is_said(made):
    with pytest.raises(SettingsError, match="where another model or other clips were tuned, expected a new one"):
        tune("toy", PROMPTS[:1], made.out, **FEW)
    pipe = stgfast.accelerate(toy.pipeline(), toy.GUIDANCE, recipe=made.out / RECIPE)
    with pytest.raises(SettingsError, match="model: got a pipeline with a recipe, expected one without"):
        tune(pipe, PROMPTS, made.out / "more")
    with pytest.raises(SettingsError, match="prompts: got 'one', expected a list of prompts"):
        tune("toy", "one", made.out / "more")
