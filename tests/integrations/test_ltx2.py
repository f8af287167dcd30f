"""LTX-2 against its own four passes, video and audio."""

import diffusers
import PIL.Image
import pytest
import torch
from diffusers.pipelines.ltx2 import LTX2TextConnectors
from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder

import stgfast
from stgfast import Guidance, Perturbation
from stgfast.errors import SettingsError
from tests.integrations.test_methods import newton
from tests.launches import launched
from tests.models import generators, shared, spread
from tests.precision import distance, near, same

pytestmark = pytest.mark.usefixtures("float64")

DEPTH = 5
TRANSFORMER = {
    **{"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 8},
    **{"cross_attention_dim": 16, "audio_in_channels": 4, "audio_out_channels": 4, "audio_num_attention_heads": 2},
    **{"audio_attention_head_dim": 4, "audio_cross_attention_dim": 8, "num_layers": DEPTH, "caption_channels": 16},
    **{"rope_double_precision": False, "perturbed_attn": True},
}
# 2.3 has gates in its attention and no projection of prompts
VERSIONS = {
    "2.0": {},
    "2.3": {"gated_attn": True, "audio_gated_attn": True, "cross_attn_mod": True, "audio_cross_attn_mod": True},
}
CONNECTORS = {
    **{"caption_channels": 16, "text_proj_in_factor": 2, "rope_double_precision": False},
    **{"video_connector_num_attention_heads": 2, "video_connector_attention_head_dim": 8},
    **{"video_connector_num_layers": 1, "video_connector_num_learnable_registers": None},
    **{"audio_connector_num_attention_heads": 2, "audio_connector_attention_head_dim": 8},
    **{"audio_connector_num_layers": 1, "audio_connector_num_learnable_registers": None},
}
VAE = {
    **{"latent_channels": 4, "block_out_channels": (8,), "decoder_block_out_channels": (8,), "layers_per_block": (1,)},
    **{"decoder_layers_per_block": (1, 1), "spatio_temporal_scaling": (True,), "patch_size": 2, "patch_size_t": 1},
    **{"decoder_spatio_temporal_scaling": (True,), "decoder_inject_noise": (False, False)},
    **{"downsample_type": ("spatial",), "upsample_residual": (False,), "upsample_factor": (1,)},
    **{"down_block_types": ("LTX2VideoDownBlock3D",), "upsample_type": ("spatiotemporal",)},
}
AUDIO_VAE = {
    **{"base_channels": 4, "ch_mult": (1,), "num_res_blocks": 1, "resolution": 32, "latent_channels": 2},
    **{"sample_rate": 16000, "mel_hop_length": 160, "mel_bins": 8},
}
VOCODER = {
    **{"in_channels": 16, "hidden_channels": 4, "upsample_kernel_sizes": [4, 4], "upsample_factors": [2, 2]},
    **{"resnet_kernel_sizes": [3], "resnet_dilations": [[1, 3, 5]], "output_sampling_rate": 16000},
}


def build(cls="LTX2Pipeline", version="2.3", text_encoder=None, tokenizer=None, **changes):
    torch.manual_seed(0)
    model = diffusers.LTX2VideoTransformer3DModel(**{**TRANSFORMER, **VERSIONS[version], **changes})
    spread(model)
    parts = {
        "transformer": model.eval(),
        "connectors": LTX2TextConnectors(**CONNECTORS).eval(),
        "vae": diffusers.AutoencoderKLLTX2Video(**VAE).eval(),
        "audio_vae": diffusers.AutoencoderKLLTX2Audio(**AUDIO_VAE).eval(),
        "vocoder": LTX2Vocoder(**VOCODER).eval(),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(),
        "text_encoder": text_encoder,
        "tokenizer": tokenizer,
    }
    pipe = getattr(diffusers, cls)(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pipeline(*cls, **settings):
    """As built, for tests that do not change its models."""
    return shared(build, *cls, **settings)


def call(pipe, prompts=1, **changes):
    """Video and audio latents."""
    made = {}
    for side in ("", "negative_"):
        one = [
            torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(n + 9 * len(side))) for n in range(prompts)
        ]
        made |= {f"{side}prompt_embeds": torch.cat(one), f"{side}prompt_attention_mask": torch.ones(prompts, 8).long()}
    sizes = {"height": 32, "width": 32, "num_frames": 9, "num_inference_steps": 2, "output_type": "latent"}
    given = {"spatio_temporal_guidance_blocks": [3], "generator": generators(prompts)}
    with torch.no_grad():
        out = pipe(**{**made, **sizes, **given, **changes})
    assert out.frames.isfinite().all()
    return (out.frames,) if out.audio is None else (out.frames, out.audio)


def rows_of(pipe, run=None, **changes):
    """The number of rows that each block runs on in one call, of this file or another."""
    return counted(pipe, run, **changes)[0]


def counted(pipe, run=None, **changes):
    """The same, and what the call made."""
    counts = [0] * DEPTH

    def hook(number):
        def count(module, args, kwargs):
            counts[number] += len(kwargs["hidden_states"])

        return count

    handles = [
        block.register_forward_pre_hook(hook(n), with_kwargs=True)
        for n, block in enumerate(pipe.transformer.transformer_blocks)
    ]
    made = (run or call)(pipe, **changes)
    for handle in handles:
        handle.remove()
    return counts, made


OWN = {
    "its defaults": {},
    "STG alone": {
        "guidance_scale": 1.0,
        "audio_guidance_scale": 1.0,
        "modality_scale": 1.0,
        "audio_modality_scale": 1.0,
    },
    "modality alone": {"guidance_scale": 1.0, "audio_guidance_scale": 1.0, "stg_scale": 0.0, "audio_stg_scale": 0.0},
    "CFG and STG, not rescaled": {
        **{"modality_scale": 1.0, "audio_modality_scale": 1.0, "guidance_rescale": 0.0, "audio_guidance_rescale": 0.0},
        **{"stg_scale": 2.0, "audio_stg_scale": 0.5, "spatio_temporal_guidance_blocks": [1, 4]},
    },
    "two prompts": {"prompts": 2},
}


def image():
    pixels = torch.randint(256, (32, 32, 3), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    return PIL.Image.fromarray(pixels.numpy())


@pytest.mark.parametrize("own", OWN.values(), ids=OWN)
@pytest.mark.parametrize("version", VERSIONS)
def test_equals_its_own_four_passes(version, own):
    expected = call(pipeline(version=version), **own)
    made = call(stgfast.accelerate(pipeline(version=version)), **own)
    for one, other in zip(made, expected, strict=True):
        same(one, other)


@pytest.mark.parametrize("cls", ["LTX2ImageToVideoPipeline", "LTX2ConditionPipeline"])
def test_with_an_image_too(cls):
    from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition

    if cls == "LTX2ImageToVideoPipeline":
        given = {"image": image(), "image_crf": 0}
    else:
        given = {"conditions": [LTX2VideoCondition(frames=image(), index=0, crf=0)]}
    expected = call(pipeline(cls), **given)
    made = call(stgfast.accelerate(pipeline(cls)), **given)
    for one, other in zip(made, expected, strict=True):
        same(one, other)


@pytest.mark.parametrize("version", VERSIONS)
def test_all_rows_of_a_marked_layer_attend_in_one_call(version):
    """Gates are computed from the rows before attention, when two of them were still one."""
    given = {"prompts": 2, "spatio_temporal_guidance_blocks": [1, 3]}
    expected = call(pipeline(version=version), **given)
    pipe = stgfast.accelerate(pipeline(version=version), max_rows="all")
    for one, other in zip(call(pipe, **given), expected, strict=True):
        same(one, other)
    explained = stgfast.explain(pipe, num_inference_steps=2, spatio_temporal_guidance_blocks=[1, 3], num_frames=9)
    assert next(iter(explained.attention.items())) == ("all rows in one call of the module", [1])


@pytest.mark.float32
@pytest.mark.interpreted
def test_one_launch_for_every_marked_attention():
    """One for video and one for audio, at two layers, in two steps."""
    given = {"spatio_temporal_guidance_blocks": [1, 3], "num_frames": 1}
    expected = call(pipeline(), **given)
    with launched() as launches:
        made = call(stgfast.accelerate(pipeline(), max_rows="all"), **given)
    for one, other in zip(made, expected, strict=True):
        near(one, other)
    assert launches == [(3, 1)] * 2 * 2 * 2


def reference(cls):
    """A video that the clip follows, as extra tokens."""
    from diffusers.pipelines.ltx2.pipeline_ltx2_hdr_lora import LTX2HDRReferenceCondition
    from diffusers.pipelines.ltx2.pipeline_ltx2_ic_lora import LTX2ReferenceCondition

    frames = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    condition = LTX2ReferenceCondition if cls == "LTX2InContextPipeline" else LTX2HDRReferenceCondition
    return {"reference_conditions": [condition(frames=frames, strength=0.8)]}


ALL_OF_IT = {"guidance_scale": 3.0, "stg_scale": 1.0, "modality_scale": 3.0, "guidance_rescale": 0.7}


@pytest.mark.parametrize(
    ("cls", "prompts", "masked"),
    [("LTX2InContextPipeline", 1, False), ("LTX2InContextPipeline", 2, True), ("LTX2HDRPipeline", 1, False)],
)
def test_with_a_reference_too(cls, prompts, masked):
    given = {**reference(cls), **ALL_OF_IT, "num_inference_steps": 1 + (prompts == 1)}
    given |= {"conditioning_attention_strength": 0.5} if masked else {}
    expected = call(pipeline(cls), prompts, **given)
    pipe = stgfast.accelerate(pipeline(cls))
    for one, other in zip(call(pipe, prompts, **given), expected, strict=True):
        same(one, other)
    if prompts == 1:
        assert rows_of(pipe, **given) == [2 * 3] * 3 + [2 * 4] * 2
        perturbed = Guidance(Perturbation([3], kind="attention", scale=0.5))
        expected = call(pipeline(cls), **given | {"stg_scale": 0.5, "modality_scale": 1.0, **audio_off(cls)})
        for one, other in zip(call(stgfast.accelerate(pipe, perturbed), **given), expected, strict=True):
            same(one, other)


def audio_off(cls):
    return {} if cls == "LTX2HDRPipeline" else {"audio_stg_scale": 0.5, "audio_modality_scale": 1.0}


def test_a_pass_that_audio_leaves_on_is_told(caplog):
    """A scale for video alone does not switch the pass off."""
    pipe, sizes = stgfast.accelerate(pipeline()), {"spatio_temporal_guidance_blocks": [3], "num_frames": 9}
    explained = stgfast.explain(pipe, **sizes, guidance_scale=1.0, modality_scale=1.0)
    assert (
        "guidance_scale=1 does not switch its pass off, because audio_guidance_scale=7: set both to 1"
        in explained.notice
    )
    assert "modality_scale=1 does not switch its pass off, because audio_modality_scale=3" in str(explained)
    assert "stg_scale" not in explained.notice
    assert not stgfast.explain(pipe, **sizes).notice
    for _ in range(2):
        call(pipe, guidance_scale=1.0)
    said = [record.getMessage() for record in caplog.records if record.name == "stgfast"]
    assert len(said) == 1
    assert said[0].startswith("LTX2Pipeline: guidance_scale=1 does not switch its pass off")
    off = {"guidance_scale": 1.0, "audio_guidance_scale": 1.0}
    assert not stgfast.explain(pipe, **sizes, **off).notice


def test_no_history_runs_twice():
    assert rows_of(pipeline()) == [2 * 4] * DEPTH
    # uncond, cond and the isolated one everywhere; the perturbed one from its layer on
    assert rows_of(stgfast.accelerate(pipeline())) == [2 * 3] * 3 + [2 * 4] * 2
    explained = stgfast.explain(
        stgfast.accelerate(pipeline()), num_inference_steps=2, spatio_temporal_guidance_blocks=[3], num_frames=9
    )
    assert explained.phases[0].rows == (3, 3, 3, 4, 4)
    assert (explained.unshared, explained.cfg_alone, explained.block_rows) == (2 * 20, 2 * 20, 2 * 17)
    assert "the pipeline asks for uncond, cond, perturbed, isolated" in str(explained)


def test_audio_alone_can_be_switched_off():
    """The stock pipeline takes an audio scale of 0 as not given."""
    off = {"stg_scale": 1.5, "audio_stg_scale": 0.0}
    _, taken = call(pipeline(), **off)
    _, alike = call(pipeline(), stg_scale=1.5, audio_stg_scale=1.5)
    assert torch.equal(taken, alike)
    tiny = call(pipeline(), stg_scale=1.5, audio_stg_scale=1e-30)  # equal to off, up to rounding
    made = call(stgfast.accelerate(pipeline()), **off)
    for one, other in zip(made, tiny, strict=True):
        same(one, other)
    assert distance(made[1], taken) > 1e-3


def test_0_switches_all_of_it_off():
    zero = {"stg_scale": 0.0, "audio_stg_scale": 0.0, "modality_scale": 0.0, "audio_modality_scale": 0.0}
    expected = call(pipeline(), **{**zero, "modality_scale": 1.0, "audio_modality_scale": 1.0})
    for one, other in zip(call(stgfast.accelerate(pipeline()), **zero), expected, strict=True):
        assert torch.equal(one, other)
    pipe = pipeline()
    assert all(map(torch.equal, call(stgfast.restore(stgfast.accelerate(pipe))), call(pipeline())))
    assert all("_compiled_call_impl" not in vars(module) for module in pipe.transformer.modules())


def test_stg_where_the_model_would_ignore_it():
    """Without `perturbed_attn` the stock pipeline computes an STG pass that equals the conditional one."""
    pipe = pipeline(perturbed_attn=False)
    same(call(pipe)[0], call(pipe, stg_scale=0.0, audio_stg_scale=0.0)[0])
    expected = call(pipeline(perturbed_attn=True))
    for one, other in zip(call(stgfast.accelerate(pipe)), expected, strict=True):
        same(one, other)


def test_a_guidance_in_place_of_its_arguments():
    guidance = Guidance(
        [Perturbation([3], kind="attention", scale=0.5), Perturbation(range(DEPTH), "isolate", scale=1.5)]
    )
    expected = call(pipeline(), stg_scale=0.5, audio_stg_scale=0.5, modality_scale=2.5, audio_modality_scale=2.5)
    for one, other in zip(call(stgfast.accelerate(pipeline(), guidance)), expected, strict=True):
        same(one, other)


@pytest.mark.parametrize("scales", [[1.0, 0.0], [0.0, 2.0]])
def test_a_schedule(scales):
    """A step with scale 0 computes no perturbed branch."""
    pipe = stgfast.accelerate(pipeline(), Guidance(Perturbation([3], kind="residual", scale=scales)))
    assert rows_of(pipe) == [2 + 2] * 4 + [2 + 3]
    assert distance(call(pipe)[0], call(pipeline(), stg_scale=0.0, audio_stg_scale=0.0)[0]) > 1e-3


def carried_on(pipe, guidance):
    """The passes of this pipeline, each computed: used directly in steps that compute, and extrapolated as a difference
    from cond in others.
    """
    kept = {}
    every = {"uncond": guidance.reuse_cfg, "perturbed": guidance.reuse, "isolated": guidance.reuse}
    state = {"step": 0, "turn": 0}
    forward = type(pipe.transformer).forward

    def known(name, cond, made):
        step, past = state["step"], kept.setdefault(name, ([], []))
        number = list(every).index(name)
        warm = 2 + number % every[name] if guidance.reuse_order else 1
        if len(past[0]) < warm or step - past[0][-1] >= every[name]:
            past[0].append(step)
            past[1].append(tuple(c - m for c, m in zip(cond, made, strict=True)))
            return made
        steps, values = (each[-guidance.reuse_order - 1 :] for each in past)
        gone = [newton(steps, [value[n] for value in values], step) for n in range(2)]
        return tuple(c - difference for c, difference in zip(cond, gone, strict=True))

    def stand_in(*args, **kwargs):
        made = forward(pipe.transformer, *args, **kwargs)
        if state["turn"] == 0:
            uncond, cond = zip(*(part.chunk(2) for part in made), strict=True)
            state["cond"] = cond
            pairs = zip(known("uncond", cond, uncond), cond, strict=True)
            made = tuple(torch.cat(pair) for pair in pairs)
        else:
            made = known(("perturbed", "isolated")[state["turn"] - 1], state["cond"], made)
        state["turn"] = (state["turn"] + 1) % 3
        state["step"] += state["turn"] == 0
        return made

    pipe.transformer.forward = stand_in
    return pipe


@pytest.mark.parametrize("order", [0, 1, 2])
def test_reuse(order):
    """For video and for audio, as the difference of each pass from the conditional one."""
    guidance, steps = Guidance(reuse=2, reuse_cfg=3, reuse_order=order), {"num_inference_steps": 8}
    expected = call(carried_on(build(), guidance), **steps)
    made = call(stgfast.accelerate(pipeline(), guidance), **steps)
    for one, other, exact in zip(made, expected, call(pipeline(), **steps), strict=True):
        same(one, other)
        assert distance(one, exact) > 1e-5


@pytest.mark.parametrize("order", [0, 2])
def test_reuse_computes_what_explain_counts(order):
    guidance, steps = Guidance(reuse=2, reuse_cfg=2, reuse_order=order), {"num_inference_steps": 9}
    pipe = stgfast.accelerate(pipeline(), guidance)
    explained = stgfast.explain(pipe, **steps, spatio_temporal_guidance_blocks=[3], num_frames=9)
    assert sum(rows_of(pipe, **steps)) == explained.block_rows < 9 * (4 * DEPTH - 3)
    assert explained.cfg_alone == explained.unshared == 9 * 4 * DEPTH
    kept = f"memory: {2 * (order + 1)} predictions per prompt"
    assert "approximately: base - perturbed computed in every 2nd step" in str(explained)
    assert kept in str(explained)


def test_reuse_beside_a_guidance_that_is_off_for_a_while():
    """Nothing is extrapolated over steps without the pass; the plain copy in the first step is no difference."""
    scales = [0.0, 1.0, 1.0, 1.0, 1.0, 0.0, 1.0, 1.0]
    perturbed = Guidance(Perturbation([3], kind="residual", scale=scales), reuse=2)
    pipe, steps = stgfast.accelerate(pipeline(), perturbed), {"num_inference_steps": 8}
    explained = stgfast.explain(pipe, **steps, num_frames=9)
    rows, made = counted(pipe, **steps)
    assert sum(rows) == explained.block_rows
    # The perturbed branch, one block of five: in steps 1, 2, 4, and 6, 7 after it was off.
    assert explained.block_rows == 8 * 2 * DEPTH + 5
    assert distance(made[0], call(stgfast.accelerate(pipeline(), perturbed.exact), **steps)[0]) > 1e-6


def test_wrong_settings_say_so():
    pipe = stgfast.accelerate(pipeline())
    with pytest.raises(
        SettingsError, match=r"spatio_temporal_guidance_blocks: got \[28\], expected numbers from 0 to 4"
    ):
        call(pipe, spatio_temporal_guidance_blocks=[28])
    wrong = {
        "cfg and rescale": Guidance(Perturbation([3]), rescale=0.5),
        "several perturbations": Guidance([Perturbation([3]), Perturbation([2])]),
        "another branch": Guidance(Perturbation([3], of="uncond")),
    }
    for message, guidance in wrong.items():
        with pytest.raises(SettingsError, match=message):
            call(stgfast.accelerate(pipeline(), guidance))
    assert call(pipe)[0].shape[1] == 4
