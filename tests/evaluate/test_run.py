"""Measure folders of clips: settings are found in jobs, and compared with CFG alone on equal prompts and seeds."""

import json
import math

import numpy as np
import pytest

from stgfast import Guidance, Perturbation
from stgfast.cli import main
from stgfast.errors import SettingsError
from stgfast.evaluate.measures import Measure, Measured
from stgfast.evaluate.run import evaluate
from stgfast.queue.job import Job
from stgfast.queue.store import Store
from stgfast.render.files import Form, write

CALL = {"width": 16, "height": 16, "num_frames": 3, "steps": 2}
PERTURBED = Guidance(Perturbation([1], scale=0.5))


def level(job):
    """A grey level that depends on the job: brighter by prompt and seed, and by 2 with guidance."""
    guided = job.guidance is not None and bool(job.guidance.perturbations)
    return 20 * int(job.prompt) + 3 * job.seed + 2 * guided + 10 * int(job.pipeline.get("guidance_scale", 0))


def folder(out, jobs, failed=()):
    """An output folder as a run leaves it, made without a model."""
    with Store(out) as store:
        for number, job in enumerate(jobs):
            store.stage(job.named("m"), Form(kind="npz").file(f"{number:03}"), number, "", "m")
        with store.taking_up([]) as bad:
            assert not list(bad)
        while batch := store.claim(1, "cpu"):
            (task,) = batch.tasks
            if int(task.file[:3]) in failed:
                store.fail(task, "why", {})
                continue
            aside = store.scratch / task.file
            grey = np.full((3, 16, 16, 3), level(task.job), np.uint8)
            write(aside, grey, Form(kind="npz"), {})
            store.finish(task, aside, {"denoise": 1.0, "decode": 0.5})
    return out


def jobs(settings, prompts=6, seeds=2):
    return [
        Job(prompt=str(prompt), seed=seed, guidance=guidance, pipeline=pipeline, **CALL)
        for prompt in range(prompts)
        for seed in range(seeds)
        for guidance, pipeline in settings
    ]


def brightness(frames, prompt):
    return Measured({"brightness": float(frames.mean())}, frames.mean((0, 1, 2)).astype(float))


def test_settings_beside_cfg_alone(tmp_path):
    settings = [(Guidance(), {}), (PERTURBED, {}), (PERTURBED, {"guidance_scale": 3.0})]
    seen: list[int] = []
    with pytest.warns(DeprecationWarning, match="told: use progress"):
        found = evaluate(folder(tmp_path / "out", jobs(settings)), measure=Measure(brightness), told=seen.append)
    assert seen == list(range(1, len(seen) + 1)) != []
    alone, perturbed, other = found.summaries
    assert [each.name for each in found.summaries] == [
        "CFG alone",
        "residual, layer 1, scale 0.5",
        "residual, layer 1, scale 0.5; guidance_scale 3.0",
    ]
    assert [each.clips for each in found.summaries] == [12, 12, 12]
    assert alone.seconds == 1.5
    assert alone.estimates["brightness"].value == pytest.approx(50 + 1.5)
    assert alone.estimates["brightness"].half > 20  # prompts are far apart
    # but the same prompt and seed are always 2 apart
    assert perturbed.base == "CFG alone"
    assert perturbed.differences["brightness"].value == pytest.approx(2)
    assert perturbed.differences["brightness"].half == pytest.approx(0, abs=1e-9)
    assert perturbed.differences["brightness"].apart
    assert not alone.differences
    assert not other.differences  # CFG alone was not rendered at that scale
    assert alone.estimates["diversity"].value == pytest.approx(3)
    table = found.table(["brightness"])
    assert "| residual, layer 1, scale 0.5 | 12 | 53.5 ± " in table
    assert table.count("▲") == 1


def test_clips_that_are_missing_are_left_out_of_both(tmp_path):
    given = jobs([(Guidance(), {}), (PERTURBED, {})])
    found = evaluate(folder(tmp_path / "out", given, failed={0, 3}), measure=Measure(brightness))
    alone, perturbed = sorted(found.summaries, key=lambda each: each.name)
    assert found.left_out == 2
    assert (alone.clips, perturbed.clips) == (11, 11)
    assert perturbed.differences["brightness"].value == pytest.approx(2)


def test_one_prompt_many_seeds(tmp_path):
    found = evaluate(
        folder(tmp_path / "out", jobs([(Guidance(), {})], prompts=1, seeds=5)), measure=Measure(brightness)
    )
    assert math.isfinite(found.summaries[0].estimates["brightness"].half)


def test_the_command(tmp_path, capsys):
    out = folder(tmp_path / "out", jobs([(Guidance(), {}), (PERTURBED, {})]), failed={1})
    assert main(["evaluate", str(out), "--columns", "contrast", "diversity", "--save", str(tmp_path / "all.json")]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("| setting | clips | contrast | diversity |\n")
    assert "1 jobs have no clip" in printed
    saved = json.loads((tmp_path / "all.json").read_text())
    assert [each["name"] for each in saved["settings"]] == ["CFG alone", "residual, layer 1, scale 0.5"]
    assert saved["settings"][0]["estimates"]["flicker"] == {"value": 0.0, "half": 0.0}


def test_wrong_folders(tmp_path, capsys):
    with pytest.raises(SettingsError, match="expected an output folder of stgfast render"):
        evaluate(tmp_path / "none")
    assert not (tmp_path / "none").exists()
    assert main(["evaluate", str(tmp_path)]) == 2
    assert "stgfast evaluate: folder: got" in capsys.readouterr().err
    failed = folder(tmp_path / "out", jobs([(PERTURBED, {})], 1, 1), failed={0})
    with pytest.raises(SettingsError, match="no clip that is done"):
        evaluate(failed)


def test_wrong_columns(tmp_path, capsys):
    out = folder(tmp_path / "out", jobs([(PERTURBED, {})], 1, 1))
    assert main(["evaluate", str(out), "--columns", "contrast", "beauty"]) == 2
    assert "columns: got ['beauty'], expected some of dynamics, flicker" in capsys.readouterr().err


def test_what_is_not_known_is_null_in_json(tmp_path):
    saved = tmp_path / "all.json"
    assert main(["evaluate", str(folder(tmp_path / "out", jobs([(PERTURBED, {})], 1, 1))), "--save", str(saved)]) == 0
    assert json.loads(saved.read_text())["settings"][0]["estimates"]["contrast"] == {"value": 0.0, "half": None}
