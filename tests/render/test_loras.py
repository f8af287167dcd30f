"""LoRAs of jobs: a clip is the same as alone, whatever LoRAs other clips had before it."""

import json

import numpy as np
import pytest
import torch
from diffusers import LattePipeline, WanPipeline

from stgfast import Guidance, Perturbation, accelerate
from stgfast.errors import SettingsError
from stgfast.queue.job import Job
from stgfast.queue.pack import pack
from stgfast.queue.readers import Bad, read
from stgfast.render import models
from stgfast.render.checks import check
from stgfast.render.files import metadata_of, read_frames
from stgfast.render.planning import BadJobs
from stgfast.render.run import render
from tests.render import pipes

peft = pytest.importorskip("peft")
TEXT = {"pipeline": {"max_sequence_length": 16}}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two LoRAs of this model, and one of another."""
    folder = tmp_path_factory.mktemp("loras")
    for seed, name in enumerate(("one", "two")):
        pipe = pipes.pipeline("wan")
        torch.manual_seed(seed + 1)
        wanted = ["to_q", "to_k", "to_v", "ffn.net.2"]
        pipe.transformer.add_adapter(peft.LoraConfig(r=4, target_modules=wanted, init_lora_weights=False))
        layers = peft.get_peft_model_state_dict(pipe.transformer)
        WanPipeline.save_lora_weights(folder / name, transformer_lora_layers=layers)
        (folder / name / "pytorch_lora_weights.safetensors").rename(folder / f"{name}.safetensors")
    from safetensors.torch import save_file

    other = {"unet.down.lora_A.weight": torch.zeros(4, 8), "unet.down.lora_B.weight": torch.zeros(8, 4)}
    save_file(other, folder / "other.safetensors")
    return folder


def job(number, *loras, **more):
    """A job with these `loras` by name and weight."""
    used = [{"path": name, "weight": weight} for name, weight in loras]
    return {**pipes.CALL, **TEXT, "prompt": "a red kite", "seed": 3, "name": f"k{number}", "loras": used, **more}


def write(files, jobs):
    path = files / "jobs.jsonl"
    path.write_text("\n".join(json.dumps(each) for each in jobs))
    return path


def go(model, jobs, out, events=None, **more):
    listener = None if events is None else events.append
    return render(model, jobs, out, **{"format": "png", "listener": listener, **more})


LOOKS = [
    (),
    (("one.safetensors", 1.0),),
    (("two.safetensors", 0.5),),
    (("one.safetensors", 0.3), ("two.safetensors", 1.0)),
]


def test_a_clip_is_what_it_is_alone(tmp_path, files):
    """And the same as in diffusers; a clip without LoRAs is the same bit for bit."""
    looks = [*LOOKS, LOOKS[1], LOOKS[0]]
    jobs = [job(number, *look, seed=number // len(LOOKS)) for number, look in enumerate(looks)]
    events = []
    assert go(pipes.guided(), write(files, jobs), tmp_path / "all", events).done == 6
    together = [event["files"] for event in events if event["event"] == "claimed"]
    assert sorted(map(len, together)) == [1, 1, 2, 2]  # those with the same ones
    clips = [read_frames(tmp_path / "all" / f"k{number}").astype(int) for number in range(6)]
    for number in (2, 3, 4, 5):  # each look once
        look = looks[number]
        go(pipes.guided(), write(files, [jobs[number]]), tmp_path / "alone")
        alone = read_frames(tmp_path / "alone" / f"k{number}").astype(int)
        assert np.abs(clips[number] - alone).max() <= 1
        pipe = pipes.guided()
        for place, (name, _) in enumerate(look):
            pipe.load_lora_weights(str(files / name), adapter_name=f"a{place}")
        if look:
            pipe.set_adapters([f"a{place}" for place in range(len(look))], [weight for _, weight in look])
        size = {name: pipes.CALL[name] for name in ("width", "height", "num_frames")}
        generator = torch.Generator().manual_seed(number // len(LOOKS))
        made = pipe("a red kite", **size, num_inference_steps=2, max_sequence_length=16, generator=generator).frames[0]
        assert np.abs(np.asarray(made) * 255 - clips[number]).max() <= 1.5
    for number in (1, 2, 3):
        assert np.abs(clips[number] - clips[0]).max() > 3
    go(pipes.guided(), [{**job(0), "name": "plain"}], tmp_path / "plain")
    go(
        pipes.guided(),
        write(files, [job(0, *LOOKS[1], name="a"), job(1, name="plain")]),
        tmp_path / "after",
        max_batch=1,
    )
    assert (read_frames(tmp_path / "after" / "plain") == read_frames(tmp_path / "plain" / "plain")).all()


def test_a_clip_says_which_it_had(tmp_path, files):
    assert go(pipes.guided(), write(files, [job(0, *LOOKS[2])]), tmp_path).done == 1
    said = metadata_of(tmp_path / "k0")["job"]
    (lora,) = said["loras"]
    assert (lora["path"], lora["weight"]) == (str(files / "two.safetensors"), 0.5)
    assert Job.from_dict(said).to_dict() == said
    assert '"loras": "two 0.5"' in (tmp_path / "index.html").read_text()
    assert go(pipes.guided(), [said], tmp_path).rendered == 0
    with pytest.raises(SettingsError, match="as when the job was made"):
        Job.from_dict({**said, "loras": [{**lora, "sha256": "0" * 64}]})
    with pytest.raises(BadJobs, match=r"with other settings \(loras\)"):
        go(pipes.guided(), write(files, [job(0, *LOOKS[1])]), tmp_path)


def test_one_that_is_of_another_model_fails_its_job(tmp_path, files):
    events = []
    jobs = [job(0), job(1, ("other.safetensors", 1.0)), job(2, *LOOKS[1]), job(3)]
    report = go(pipes.guided(), write(files, jobs), tmp_path, events, max_batch=1)
    assert (report.done, report.failed) == (3, 1)
    (failed,) = [event for event in events if event["event"] == "failed"]
    assert failed["file"] == "k1"
    assert "got 'other.safetensors', a file without weights for this model" in failed["error"]


def test_an_archive_is_rendered(tmp_path, files):
    assert pack(write(files, [job(0), job(1, *LOOKS[2])]), tmp_path / "night.zip") == (2, 1)
    assert go(pipes.guided(), tmp_path / "night.zip", tmp_path / "out").done == 2
    go(pipes.guided(), write(files, [job(0), job(1, *LOOKS[2])]), tmp_path / "files")
    one, other = (read_frames(tmp_path / where / "k1") for where in ("out", "files"))
    assert (one == other).all()
    assert go(pipes.guided(), tmp_path / "night.zip", tmp_path / "out").rendered == 0


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (3, "loras: got 3, expected a list such as"),
        ([3], "loras: got 3, expected a list such as"),
        ([{"weight": 1}], "loras: got 'dict', expected a list such as"),
        ([{"path": "one.safetensors", "wieght": 1}], "loras: got 'dict', expected a list such as"),
        ([{"path": "one.safetensors"}] * 9, "of 8 at most"),
        ([{"path": "one.safetensors", "weight": "x"}], "weight of a LoRA: got 'x', expected a number from -10 to 10"),
        ([{"path": "one.safetensors", "weight": float("1e9")}], "weight of a LoRA: got 1000000000.0"),
        ([{"path": "none.safetensors"}], "a .safetensors file that can be read (No such file or directory)"),
        ([{"path": "one.bin"}], "expected a .safetensors file that can be read"),
        ([{"path": "empty.safetensors"}], "a whole .safetensors file"),
        ([{"path": "https://x/y.safetensors"}], "expected a file"),
        ([{"path": "one.safetensors", "second": 1}], "second of a LoRA: got 1, expected true or false"),
    ],
)
def test_what_is_wrong_is_said(files, given, why):
    (files / "empty.safetensors").write_bytes(b"")
    (bad,) = read(write(files, [{"prompt": "a", "loras": given}]))
    assert isinstance(bad, Bad)
    assert why in bad.why


def test_pipelines_and_runs_that_take_none(tmp_path, files, monkeypatch):
    used = [{"path": str(files / "one.safetensors")}]
    with pytest.raises(SettingsError, match="loras: got 1, expected none: LattePipeline takes none"):
        check(models.Model("m", LattePipeline), Job(prompt="a", loras=used))
    pipe = accelerate(pipes.pipeline("wan"), Guidance(Perturbation([1])), compile=True)
    with pytest.raises(BadJobs, match="loras: got 1, expected none with compiled blocks"):
        go(pipe, write(files, [job(0, *LOOKS[1])]), tmp_path)
    pipe = pipes.guided()
    pipe.load_lora_weights(str(files / "two.safetensors"))
    report = go(pipe, write(files, [job(0), job(1, *LOOKS[1])]), tmp_path / "own")
    assert (report.done, report.failed) == (1, 1)
    assert pipe.get_list_adapters()  # its owner keeps them
