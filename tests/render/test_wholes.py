"""Every video pipeline, from a folder to clips: a run renders the same as the pipeline itself."""

import contextlib
import dataclasses
import inspect

import diffusers
import numpy as np
import PIL.Image
import pytest
import torch

import stgfast
from stgfast.errors import UnsupportedPipelineError
from stgfast.integrations import ADAPTERS
from stgfast.render.calls import frames_argument
from stgfast.render.files import pixels, read_frames
from stgfast.render.models import Model, described
from stgfast.render.run import render
from tests.render.wholes import WHOLES

# Prompts that a pipeline cannot encode together, or would pad.
ALONE = {
    "LattePipeline": "prompts: got encodings of several lengths, which differ when they are padded",
    "Kandinsky5T2VPipeline": "prompts: got an encoding that has no row for each",
    "WanVACEPipeline": "ValueError: Passing a list of prompts is not yet supported.",
    "LTXI2VLongMultiPromptPipeline": "RuntimeError: The size of tensor a (32) must match",
}
PROMPTS = ("a red kite", "the grey sea over a dog")


def test_every_class_that_makes_video_is_here():
    renders = set()
    for name in ADAPTERS:
        with contextlib.suppress(AttributeError, UnsupportedPipelineError):  # Open-Sora's are no pipelines
            renders.add(Model(name, getattr(diffusers, name)).kind.__name__)
    assert renders == set(WHOLES)


@pytest.mark.parametrize("name", WHOLES)
def test_a_clip_is_what_the_pipeline_makes(name, tmp_path, monkeypatch):
    whole, adapter = WHOLES[name], ADAPTERS[name]
    if not adapter.announces(pipe := whole.build()):
        # Released models are deeper.
        monkeypatch.setitem(ADAPTERS, name, dataclasses.replace(adapter, defaults=whole.guidance))
    noise = torch.rand(32, 32, 3, generator=torch.Generator().manual_seed(0))
    image = PIL.Image.fromarray((noise * 255).byte().numpy())
    image.save(tmp_path / "image.png")
    jobs = [
        {**whole.job(str(tmp_path / "image.png")), "prompt": prompt, "seed": seed, "name": f"k{seed}"}
        for seed, prompt in enumerate(PROMPTS)
    ]
    if whole.saved:
        pipe.save_pretrained(tmp_path / "model")
        pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "model")
    assert type(pipe).__name__ == name
    events = []
    settings = {"device": "cpu"} if whole.saved else {}
    model = tmp_path / "model" if whole.saved else pipe
    built = described(model).skeleton  # by which calls are checked before a model loads
    parts = [getattr(built, name) for name in (adapter.denoisers[0], "vae")]
    assert all(part.device.type == "meta" for part in parts) or not whole.saved
    report = render(model, jobs, tmp_path / "out", format="png", listener=events.append, same_process=True, **settings)
    assert report.done == 2, [event for event in events if event["event"] in ("failed", "again")]
    again = [event["why"] for event in events if event["event"] == "again"]
    assert len(again) == (name in ALONE)
    assert all(why.startswith(ALONE[name]) for why in again)
    stgfast.accelerate(pipe)
    pipe.set_progress_bar_config(disable=True)
    if adapter.clips.tiled:
        pipe.vae.enable_tiling()
    frames = frames_argument(inspect.signature(type(pipe).__call__).parameters)
    for job in jobs:
        given = {**whole.size, frames: job["num_frames"], "num_inference_steps": 2, **job["pipeline"]}
        given |= {"image": image} if whole.image else {}
        given |= {"negative_prompt": whole.negative} if whole.negative else {}
        given |= {} if name == "StableVideoDiffusionPipeline" else {"prompt": job["prompt"]}
        made = pipe(**given, generator=torch.Generator().manual_seed(job["seed"]), output_type="np").frames[0]
        clip = read_frames(tmp_path / "out" / job["name"])
        assert np.abs(clip.astype(int) - pixels(made)).max() <= 1, job["name"]
        assert clip.std() > 1  # it is not black
