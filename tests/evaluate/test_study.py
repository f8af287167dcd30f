"""The study of STG on the toy model: it runs, continues after a stop, and its recorded results are repeated."""

import dataclasses
import json
import math
from collections import Counter
from pathlib import Path

import pytest

from stgfast import Guidance, toy
from stgfast.evaluate import study
from stgfast.evaluate.study import STUDIES, Study, perturbed, run
from stgfast.render import batch_run

RECORDED = Path(__file__).parents[2] / "bench" / "results" / "toy.json"
PERTURBED = perturbed("residual", 6, 0.5)


def test_a_study_goes_on_where_it_stopped(tmp_path, monkeypatch):
    monkeypatch.setitem(toy.CALL, "num_inference_steps", 2)
    monkeypatch.setattr(study, "SEEDS", 2)
    small = Study(seed=7, prompts=1, settings=[(2.0, Guidance()), (2.0, PERTURBED)])
    found = run(small, tmp_path / "clips")
    assert [each.name for each in found.summaries] == [
        *("as drawn", "as drawn, through the VAE"),
        *("CFG alone", "residual, layer 6, scale 0.5"),
    ]
    assert [each.clips for each in found.summaries] == [study.SEEDS] * 4
    assert found.summaries[0].estimates["right"].value == 1
    assert set(found.summaries[3].differences) >= {"Fréchet", "right", "diversity", "jerk", "flicker"}
    told = []
    monkeypatch.setattr(study, "_log", lambda event: told.append(event["event"]))
    again = run(small, tmp_path / "clips")
    assert "done" not in told
    assert again.to_dict() == found.to_dict()

    # If a job has no clip, the study is unfinished; it does not get smaller.
    def fails(*_):
        raise RuntimeError("no picture")

    monkeypatch.setattr(batch_run, "write", fails)
    more = dataclasses.replace(small, settings=[(2.0, perturbed("residual", 9, 0.5))])
    with pytest.raises(RuntimeError, match="got 0 clips, expected 2; start it again"):
        run(more, tmp_path / "other")


def test_what_is_reported_was_not_chosen_on_the_same_clips():
    seeds = {name: {job.seed for job in made().jobs()} for name, made in STUDIES.items()}
    assert seeds["scales"] == seeds["tuning"]
    for one, other in (("tuning", "reported"), ("tuning", "best"), ("reported", "best")):
        assert not seeds[one] & seeds[other]
    for name, clips in (("reported", 1024), ("best", 512)):
        jobs = list(STUDIES[name]().jobs())
        counts = Counter(json.dumps([job.to_dict()["guidance"], dict(job.pipeline)]) for job in jobs)
        assert set(counts.values()) == {clips}
        assert len({job.name for job in jobs}) == len(jobs)


@pytest.fixture(scope="module")
def recorded():
    return {each["name"]: each for each in json.loads(RECORDED.read_text())["settings"]}


def test_the_model_shows_what_prompts_say(recorded):
    """Lower limits below the results of 1,024 clips. The numbers of the README come from the same file."""
    alone = recorded["CFG alone; guidance_scale 2.0"]
    assert alone["clips"] == 1024
    for attribute, floor in FLOORS.items():
        assert alone["estimates"][attribute]["value"] >= floor


FLOORS = {"colour": 0.95, "ground": 0.97, "pattern": 0.98, "motion": 0.8, "shape": 0.72, "right": 0.6}


@pytest.mark.again
def test_a_slice_is_as_recorded(tmp_path, recorded):
    """Clips of the reported study are rendered again: the correct shares agree with those of 1,024 clips."""
    whole = STUDIES["reported"]()
    settings = [(2.0, Guidance()), (2.0, toy.GUIDANCE)]
    assert all(setting in whole.settings for setting in settings)
    found = run(dataclasses.replace(whole, prompts=3, settings=settings), tmp_path)
    for summary, name in zip(found.summaries[2:], ("CFG alone", str(toy.GUIDANCE)), strict=True):
        assert summary.name == name
        long = recorded[f"{name}; guidance_scale 2.0"]["estimates"]
        for attribute in ("colour", "shape", "motion", "right"):
            share, clips = long[attribute]["value"], summary.clips
            # A few clips may all be right, which does not show a small error.
            error = 1.96 * math.hypot((share * (1 - share) / clips) ** 0.5, long[attribute]["half"] / 1.96) + 0.05
            assert abs(summary.estimates[attribute].value - share) <= 1.5 * error, attribute
