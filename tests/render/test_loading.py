"""Options of loading: which components stay exact, where they are kept, and one sentence for what is impossible."""

import inspect
import shutil

import accelerate
import diffusers
import pytest
import torch

import stgfast
from stgfast import Guidance, Perturbation
from stgfast.batching import fastest
from stgfast.errors import DeviceError, SettingsError
from stgfast.integrations import ADAPTERS
from stgfast.queue.store import Store
from stgfast.render import loading
from stgfast.render.files import metadata_of, read_frames
from stgfast.render.loading import Loading, moves
from stgfast.render.models import Model, described
from stgfast.render.run import render
from tests.render import pipes

JOB = {**pipes.CALL, "prompt": "a red kite", "pipeline": {"max_sequence_length": 16}, "name": "k"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    pipes.pipeline("wan").save_pretrained(folder)
    return folder


def frames(model, out, **settings):
    assert render(model, [JOB], out, format="png", device="cpu", same_process=True, **settings).done == 1
    return torch.from_numpy(read_frames(out / "k"))


def test_some_parts_are_exact_in_any_type(saved):
    pipe = described(saved).load(Loading(device="cpu", dtype="bfloat16"))
    assert pipe.transformer.dtype == pipe.text_encoder.dtype == torch.bfloat16
    assert pipe.vae.dtype == torch.float32
    for one, other in zip(pipe.vae.parameters(), pipes.pipeline("wan").vae.parameters(), strict=True):
        assert torch.equal(one, other)


def test_where_parts_are(saved):
    """On the meta device, because there may be no other."""
    for offload, where in ((None, "meta"), ("text", "cpu")):
        pipe = described(saved).load(Loading(device="meta", offload=offload))
        assert pipe.transformer.device.type == pipe.vae.device.type == "meta"
        assert pipe.text_encoder.device.type == where
        assert pipe.transformer.dtype == torch.bfloat16


def test_exact_parts_are_parts_of_pipelines():
    kinds = [getattr(diffusers, name) for name in ADAPTERS if hasattr(diffusers, name)]
    parts = {name for kind in kinds for name in inspect.signature(kind.__init__).parameters}
    exact = {name for adapter in ADAPTERS.values() for name in adapter.clips.exact}
    assert exact == {"vae", "image_encoder"}
    assert exact < parts


@pytest.mark.parametrize(
    "offload",
    [
        lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
        lambda pipe: accelerate.cpu_offload(pipe.transformer, "cpu"),  # as `enable_sequential_cpu_offload` for each
        lambda pipe: pipe.transformer.enable_group_offload(torch.device("cpu"), offload_type="leaf_level"),
    ],
    ids=["model", "sequential", "group"],
)
def test_offloading_that_was_set_up_before_is_seen(offload):
    pipe = pipes.pipeline("wan")
    assert not moves(pipe)
    offload(pipe)
    assert moves(pipe)


@pytest.mark.parametrize("offload", loading.OFFLOADS)
def test_offloading_changes_nothing(saved, tmp_path, offload):
    plain = frames(saved, tmp_path / "plain")
    assert torch.equal(frames(saved, tmp_path / "other", offload=offload), plain)
    pipe = described(saved).load(Loading(device="cpu", offload=offload))
    assert moves(pipe) == (offload != "text")


def test_blocks_are_compiled(saved, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda call, **options: compiled.append(options) or call)
    plain = frames(saved, tmp_path / "plain")
    assert compiled == []
    assert torch.equal(frames(saved, tmp_path / "compiled", compile=True), plain)
    assert compiled == [{}] * len(compiled) != []


def test_attention_by_what_is_fastest(saved, tmp_path, monkeypatch):
    seen, attend = [], fastest.masked_attention
    monkeypatch.setattr(fastest, "masked_attention", lambda *q, **how: seen.append(how) or attend(*q, **how))
    plain = frames(saved, tmp_path / "plain")
    assert seen == []
    other = frames(saved, tmp_path / "fastest", attention="auto")
    assert (other.int() - plain.int()).abs().max() <= 1
    assert seen


def test_decoding_in_tiles(saved, tmp_path):
    """Tiling is set on the VAE of the run only, and recorded in the clip."""
    plain = frames(saved, tmp_path / "plain")
    pipe = described(saved).load(Loading(device="cpu", vae_tiling=True))
    assert pipe.vae.use_tiling
    pipe = pipes.pipeline("wan")
    render(pipe, [JOB], tmp_path / "tiled", format="png", vae_tiling=True)
    assert not pipe.vae.use_tiling
    assert read_frames(tmp_path / "tiled" / "k").shape == tuple(plain.shape)  # smaller than a tile
    for folder, tiled in (("plain", False), ("tiled", True)):
        said = metadata_of(tmp_path / folder / "k")
        assert said["vae_tiling"] is tiled
        assert (said["dtype"], said["device"], said["torch"]) == ("float32", "cpu", torch.__version__)


def test_a_decoder_that_knows_no_tiles(saved):
    pipe = pipes.pipeline("wan")
    pipe.vae = torch.nn.Identity()
    with pytest.raises(SettingsError, match="vae_tiling: got True, expected False: Identity decodes a clip as a whole"):
        Loading(vae_tiling=True).prepared(pipe)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("dtype", "float32"),
        ("device", "cpu"),
        ("offload", "model"),
        ("offload", "group"),
        ("compile", True),
        ("attention", "auto"),
    ],
)
def test_a_pipeline_that_is_loaded_is_used_as_it_is(tmp_path, setting, value):
    with pytest.raises(SettingsError, match=f"{setting}: got {value!r}, expected none for a pipeline that is loaded"):
        render(pipes.pipeline("wan"), [JOB], tmp_path / "out", **{setting: value})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("dtype", "int8", "dtype: got 'int8', expected bfloat16, float16, float32, or None"),
        ("offload", "disk", "offload: got 'disk', expected text, model, group, or None"),
        ("attention", "flash", "attention: got 'flash', expected auto, or None"),
        ("device", "cuda:99", "device: got 'cuda:99', expected (one of the|cpu)"),
        ("device", "gpu", "device: got 'gpu', expected the name of a device, such as cuda, cuda:1 or cpu"),
    ],
)
def test_settings_that_are_wrong(saved, tmp_path, setting, value, message):
    with pytest.raises(SettingsError, match=message):
        render(saved, [JOB], tmp_path / "out", **{setting: value})


def test_what_fits_is_remembered_for_how_the_model_was_loaded(tmp_path):
    settings = {"format": "png", "max_batch": 2}
    render(pipes.pipeline("wan"), [JOB], tmp_path, **settings)
    with Store(tmp_path) as store:
        model, shape = store.connection.execute("SELECT model, shape FROM jobs JOIN stacks").fetchone()
        store.bound(f"cpu, {model}: {shape}", 1)
    for tiling, rows in ((False, [1, 1]), (True, [2])):
        jobs = [{**JOB, "seed": seed, "name": f"{tiling} {seed}"} for seed in range(2)]
        events = []
        render(pipes.pipeline("wan"), jobs, tmp_path, vae_tiling=tiling, listener=events.append, **settings)
        assert [len(event["files"]) for event in events if event["event"] == "claimed"] == rows
    assert Loading().footprint == Loading(device="cuda", compile=True).footprint == ""
    assert Loading("float16", offload="model").footprint == ", dtype float16, offload model"


def test_files_that_are_wrong(saved, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    (weights,) = (folder / "transformer").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(SettingsError, match=r"model: got one that cannot be loaded: \w*Error: "):
        render(folder, [JOB], tmp_path / "out", device="cpu", same_process=True)


def test_a_device_that_is_too_small(saved, tmp_path, monkeypatch):
    def full(self, pipe, device):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Loading, "_place", full)
    with pytest.raises(DeviceError, match="cpu has less memory than the model takes: offload text, model or group"):
        render(saved, [JOB], tmp_path / "out", device="cpu", same_process=True)


def test_what_was_set_when_it_was_handed_over_stays(saved):
    pipe = stgfast.accelerate(pipes.pipeline("wan"), Guidance(Perturbation([4])), max_rows=1)
    assert described(pipe).load()._stgfast == pipe._stgfast
    assert isinstance(Model("m", diffusers.WanPipeline, build=lambda: pipe).load(), diffusers.WanPipeline)
