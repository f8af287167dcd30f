"""A model before and after loading; its folder runs no code."""

import json

import diffusers
import pytest
import torch

import stgfast
from stgfast import Guidance, Perturbation
from stgfast.errors import SettingsError, UnsupportedPipelineError
from stgfast.queue.job import Job
from stgfast.render.checks import check
from stgfast.render.loading import Loading
from stgfast.render.models import NAMED, Model, described
from tests.render import pipes

CPU = Loading(device="cpu")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    pipes.pipeline("wan").save_pretrained(folder)
    return folder


@pytest.fixture
def changed(saved, tmp_path):
    """A copy of the model with one file changed."""
    import shutil

    def change(name, edit):
        folder = tmp_path / "changed"
        shutil.copytree(saved, folder)
        data = json.loads((folder / name).read_text())
        edit(data)
        (folder / name).write_text(json.dumps(data))
        return folder

    return change


def test_a_folder_is_known_before_it_is_loaded(saved):
    model = described(saved)
    assert (model.name, model.kind) == (str(saved.resolve()), diffusers.WanPipeline)
    pipe = model.load(CPU)
    assert pipe.transformer.dtype == torch.float32
    assert stgfast.explain(pipe, num_inference_steps=2) is not None


def test_a_pipeline_is_left_as_it_was(saved):
    pipe = pipes.pipeline("wan")
    before = dict(vars(pipe))
    loaded = described(pipe).load()
    assert loaded is not pipe
    assert type(pipe) is diffusers.WanPipeline
    assert vars(pipe) == before
    guided = stgfast.accelerate(pipe, Guidance(Perturbation([4])))
    model = described(guided)
    assert model.load()._stgfast.given.perturbations[0].layers == (4,)
    assert model.settled(Job(prompt="a")).guidance == Guidance(Perturbation([4]))
    assert model.settled(Job(prompt="a", guidance=Guidance())).guidance == Guidance()


def test_a_graph_is_of_one_thread():
    pipe = pipes.pipeline("wan")
    for compilation in (
        {"mode": "reduce-overhead"},
        {"mode": "max-autotune"},
        {"options": {"triton.cudagraphs": True}},
    ):
        with pytest.raises(SettingsError, match="expected no CUDA graphs, as with 'max-autotune-no-cudagraphs'"):
            described(stgfast.accelerate(pipe, compile=compilation))
    for compilation in (True, {"mode": "max-autotune-no-cudagraphs"}):
        assert described(stgfast.accelerate(pipe, compile=compilation)).pipe is pipe


def test_code_in_a_folder(changed, tmp_path):
    """A class, a component, or a tokenizer with code in the folder."""
    ran = tmp_path / "ran"
    folder = changed("model_index.json", lambda index: index.update(_class_name=["pipeline", "Evil"]))
    (folder / "pipeline.py").write_text(f"open({str(ran)!r}, 'w')\n")
    with pytest.raises(SettingsError, match="loaded only if it is trusted by name"):
        described(folder)
    with pytest.raises(SettingsError, match="trust: got 'yes', expected the name of the model"):
        described(folder, trust="yes")
    assert not ran.exists()


@pytest.mark.parametrize("library", ["evil", "os", "diffusers_modules"])
def test_components_from_elsewhere(changed, library):
    folder = changed("model_index.json", lambda index: index.update(vae=[library, "Evil"]))
    with pytest.raises(SettingsError, match=f"library of vae in model_index.json: got '{library}'"):
        described(folder)
    with pytest.raises(SettingsError, match="library of vae"):  # as if it came from the hub
        Model(str(folder), diffusers.WanPipeline).load(CPU)


def test_configurations_that_ask_for_code(changed):
    edit = {"auto_map": {"AutoModel": "evil.Evil"}}
    folder = changed("text_encoder/config.json", lambda config: config.update(edit))
    with pytest.raises(SettingsError, match=r"auto_map in text_encoder/config.json"):
        described(folder)


def test_weights_that_are_pickled(saved, tmp_path):
    """Loaded from safetensors, or not at all."""
    import shutil

    folder = tmp_path / "pickled"
    shutil.copytree(saved, folder)
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    torch.save(pipes.pipeline("wan").transformer.state_dict(), weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises((OSError, SettingsError), match="safetensors"):
        described(folder).load(CPU)


def test_models_that_are_none(tmp_path, monkeypatch):
    with pytest.raises(SettingsError, match=r"a folder with model_index\.json"):
        described(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SettingsError, match="model: got 'no/such/name', expected a folder, or"):
        described("no/such/name")
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(SettingsError, match="a file with JSON"):
        described(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "DDPMPipeline"}')
    with pytest.raises(UnsupportedPipelineError, match="got DDPMPipeline, expected one that stgfast knows"):
        described(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(UnsupportedPipelineError, match="one that makes video"):
        described(tmp_path)


def test_models_with_a_name(monkeypatch):
    monkeypatch.setitem(NAMED, "tiny", pipes.NAMED)
    model = described("tiny")
    assert (model.name, model.kind) == ("tiny", diffusers.WanPipeline)
    assert model.load().text_encoder is not None


@pytest.mark.parametrize(
    ("kind", "job", "message"),
    [
        ("WanPipeline", {"pipeline": {"guidance_scal": 3}}, "an argument of WanPipeline, such as guidance_scale"),
        ("WanPipeline", {"width": 24}, "have to be divisible by 16"),
        ("LTXPipeline", {"height": 48}, "divisible by 32"),
        ("WanPipeline", {"image": True}, "none: WanPipeline takes none"),
        ("WanImageToVideoPipeline", {}, "begins with an image"),
        ("StableVideoDiffusionPipeline", {"image": True, "negative_prompt": "bad"}, "takes none"),
        ("Cosmos2VideoToWorldPipeline", {}, "begins with an image"),
        ("HunyuanVideo15ImageToVideoPipeline", {"image": True, "width": 32}, "width: got 32, expected none: Hunyuan"),
        ("EasyAnimatePipeline", {}, "negative_prompt: got None, expected one, if an empty one"),
        ("CogVideoXPipeline", {"width": 20 * 8 + 8 * 3, "height": 8 * 13}, None),
        ("LattePipeline", {"num_frames": 16}, None),
        ("WanImageToVideoPipeline", {"image": True}, None),
        ("MochiPipeline", {"width": 64, "steps": 3}, None),
    ],
)
def test_what_a_pipeline_cannot_do_is_known_at_once(kind, job, message, tmp_path):
    from PIL import Image

    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    job = {**job, **({"image": str(tmp_path / "a.png")} if "image" in job else {})}
    model = Model("m", getattr(diffusers, kind))
    job = Job(prompt="a", **job)
    if message is None:
        check(model, job)
    else:
        with pytest.raises(SettingsError, match=message):
            check(model, job)


def test_frames_in_a_second():
    rates = {"WanPipeline": 16, "MochiPipeline": 30, "LTXPipeline": 25, "HunyuanVideoPipeline": 24}
    for kind, rate in rates.items():
        assert Model("m", getattr(diffusers, kind)).fps(Job(prompt="a")) == rate
    assert Model("m", diffusers.LTXPipeline).fps(Job(prompt="a", pipeline={"frame_rate": 30})) == 30


@pytest.mark.parametrize(
    ("kind", "config", "fps"),
    [
        ("EasyAnimatePipeline", {}, 8),
        ("WanPipeline", {}, 16),
        ("WanPipeline", {"expand_timesteps": True}, 24),
        ("WanImageToVideoPipeline", {"expand_timesteps": True}, 24),
        ("MochiPipeline", {}, 30),
        ("CogVideoXPipeline", {}, 8),
        ("AllegroPipeline", {}, 15),
        ("LattePipeline", {}, 8),
        ("HunyuanVideoPipeline", {}, 24),
        ("SkyReelsV2Pipeline", {}, 24),
        ("Kandinsky5T2VPipeline", {}, 24),
        ("LTXPipeline", {}, 25),
        ("StableVideoDiffusionPipeline", {}, 7),
        ("Cosmos2VideoToWorldPipeline", {}, 16),
    ],
)
def test_frames_in_a_second_of_a_family(kind, config, fps):
    """As published: from the adapter, or from the pipeline's argument for it."""
    model = Model("m", getattr(diffusers, kind), config=config)
    assert model.fps(Job(prompt="a red kite")) == fps
