"""Training runs from end to end, continues after a stop, and writes a folder that stock diffusers loads."""

import dataclasses

import diffusers
import pytest
import torch

from stgfast.toy import judge, model, videos
from stgfast.toy.muon import orthogonal
from stgfast.toy.train import Settings, Stage, train, vae_loss

TINY = {"vae_steps": 2, "vae_batch": 1, "clips": 4, "shard": 2, "steps": 2, "batch": 2, "decoder_steps": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return train(Settings(tmp_path_factory.mktemp("toy"), **TINY))


def test_stock_diffusers_loads_and_renders(folder):
    assert sum(path.stat().st_size for path in folder.rglob("*.safetensors")) < 10e6
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    assert type(pipe) is diffusers.LTXPipeline
    assert {pipe.vae.dtype, pipe.text_encoder.dtype, pipe.transformer.dtype} == {torch.float32}
    pipe.set_progress_bar_config(disable=True)
    prompt = videos.clips(0, [0]).prompts[0]
    renders = [
        pipe(
            prompt,
            **model.CALL,
            num_inference_steps=2,
            max_sequence_length=length,
            output_type="pt",
            generator=torch.Generator().manual_seed(0),
        ).frames
        for length in (20, 20)
    ]
    assert renders[0].shape == (1, videos.FRAMES, 3, videos.SIZE, videos.SIZE)
    assert torch.equal(*renders)


@pytest.mark.again
def test_the_same_seed_gives_the_same_weights(folder, tmp_path):
    again = train(Settings(tmp_path, **TINY))
    name = "transformer/diffusion_pytorch_model.safetensors"
    assert (again / name).read_bytes() == (folder / name).read_bytes()


def test_every_word_of_every_prompt_is_known():
    tokenizer = model.tokenizer()
    prompts = [str(videos.plan(0, index).scene) for index in range(300)]
    ids = tokenizer(prompts).input_ids
    assert max(map(len, ids)) <= 20
    assert not any(tokenizer.unk_token_id in row for row in ids)
    assert tokenizer.unk_token_id in tokenizer("a red zebra").input_ids


def test_training_goes_on_where_it_stopped(tmp_path):
    def stage(name):
        torch.manual_seed(0)
        settings = Settings(tmp_path / name, save_every=3)
        settings.out.mkdir(exist_ok=True)
        return Stage("net", torch.nn.Linear(3, 2), settings, steps=8, average=0.9)

    def losses(net, until=None):
        def loss(generator, step):
            if step == until:
                raise KeyboardInterrupt
            return {"loss": net(torch.randn(4, 3, generator=generator)).square().mean()}

        return loss

    whole, parted = stage("whole"), stage("parted")
    whole.run(losses(whole.network))
    with pytest.raises(KeyboardInterrupt):
        parted.run(losses(parted.network, until=5))
    parted = stage("parted")
    assert parted.step == 3
    parted.run(losses(parted.network))
    assert torch.equal(whole.network.weight, parted.network.weight)


def test_motion_counts_more_than_what_stands_still():
    frames = videos.clips(0, [0]).frames.transpose(1, 2)
    wrong = frames.clone()
    wrong[..., :32] += 0.1
    zero = torch.zeros(1, 2, 5, 4, 4)
    loss = vae_loss(frames, wrong, zero, zero)
    assert loss["squares"] == pytest.approx(0.005, rel=1e-3)
    assert loss["pixels"] > 0.05
    assert loss["divergence"] == 0


def test_a_step_turns_all_directions_alike():
    matrix = torch.randn(20, 50, generator=torch.Generator().manual_seed(0))
    for one in (matrix, matrix.T):
        turned = orthogonal(one)
        values = torch.linalg.svdvals(turned)
        assert turned.shape == one.shape
        assert values.min() > 0.5
        assert values.max() < 1.3


def test_the_judge_trains_and_reads(tmp_path):
    trained = judge.train(Settings(tmp_path), steps=2, batch=2)
    drawn = videos.clips(0, range(3))
    with torch.no_grad():
        reading = trained(drawn.frames)
    assert reading.features.shape == (3, judge.FEATURES)
    truth = judge.labels(drawn.scenes)
    perfect = dataclasses.replace(
        reading,
        present=(truth["kind"] >= 0).float(),
        **{
            name: torch.nn.functional.one_hot(truth[name].clamp(min=0), getattr(reading, name).shape[-1])
            for name in ("kind", "motion", "ground", "pattern")
        },
    )
    assert all((values == 1).all() for values in judge.right(perfect, drawn.scenes).values())
    blind = dataclasses.replace(perfect, present=1 - perfect.present)
    assert judge.right(blind, drawn.scenes)["colour"].sum() == 0


def test_the_tracker_follows_a_shape():
    scenes = [videos.Scene((videos.Shape(colour, "square", "left"),), "grey", "checked") for colour in videos.COLOURS]
    drawn = videos.clips(0, range(len(scenes)), scenes)
    for frames, colour, truth in zip(drawn.frames, videos.COLOURS, drawn.tracks[:, 0], strict=True):
        assert (judge.track(frames, colour) - truth).abs().max() < 0.5
    assert judge.track(torch.zeros(2, 3, 64, 64), "red").isnan().all()
