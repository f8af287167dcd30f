"""LTX-2 as modular pipelines, with a guider for video and one for audio, against their own passes."""

import diffusers
import pytest
import torch
from diffusers.modular_pipelines.ltx2.modular_blocks_ltx2 import LTX2Blocks
from diffusers.modular_pipelines.ltx2.modular_blocks_ltx25 import LTX25AutoBlocks

import stgfast
from stgfast import Guidance, Perturbation, SettingsError
from tests.integrations import test_ltx2
from tests.models import generators
from tests.precision import distance, same

pytestmark = pytest.mark.usefixtures("float64")

DEPTH = test_ltx2.DEPTH
CLASSES = {"LTX2ModularPipeline": LTX2Blocks, "LTX25ModularPipeline": LTX25AutoBlocks}
VIDEO = {"guidance_scale": 3.0, "stg_scale": 1.0, "modality_scale": 3.0, "guidance_rescale": 0.7}
AUDIO = {**VIDEO, "guidance_scale": 7.0}
OFF = {"guidance_scale": 1.0, "stg_scale": 0.0, "modality_scale": 1.0}


def guider(**settings):
    return diffusers.LTX2Guidance(spatio_temporal_guidance_blocks=[3], **settings)


def build(cls="LTX2ModularPipeline", video=VIDEO, audio=AUDIO):
    """Without the blocks that encode prompts and images, and decode."""
    stock, blocks = test_ltx2.build(), CLASSES[cls]()
    for name in list(blocks.sub_blocks):
        if name != "denoise":
            blocks.sub_blocks.pop(name)
    pipe = getattr(diffusers, cls)(blocks=blocks)
    parts = {name: getattr(stock, name) for name in ("transformer", "vae", "audio_vae", "scheduler")}
    pipe.update_components(**{name: part for name, part in parts.items() if name in pipe._component_specs})
    for name, part in parts.items():
        setattr(pipe, name, part)
    pipe.update_components(guider=guider(**video), audio_guider=guider(**audio))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(pipe, prompts=1, **changes):
    """Video and audio latents."""
    made = {}
    for number, side in enumerate(("", "negative_")):
        for kind, width in (("", 16), ("audio_", 16)):
            shape, seed = (1, 8, width), 10 * number + len(kind)
            one = [torch.randn(shape, generator=torch.Generator().manual_seed(seed + n)) for n in range(prompts)]
            made[f"{side}connector_{kind}prompt_embeds"] = torch.cat(one)
        made[f"{side}connector_attention_mask"] = torch.ones(prompts, 8).long()
    sizes = {"height": 16, "width": 16, "num_frames": 9, "num_inference_steps": 2, "batch_size": prompts}
    given = {"generator": generators(prompts), "dtype": torch.get_default_dtype()}
    with torch.no_grad():
        out = pipe(**{**made, **sizes, **given, **changes}, output=["latents", "audio_latents"])
    assert all(out[name].isfinite().all() for name in out)
    return out["latents"], out["audio_latents"]


def counted(pipe, **changes):
    rows, made = test_ltx2.counted(pipe, call, **changes)
    return sum(rows), made


GUIDERS = {
    "all of it": (VIDEO, AUDIO, 4, 17),
    "STG of video, CFG of audio": ({**OFF, "stg_scale": 1.5}, {**OFF, "guidance_scale": 5.0}, 3, 12),
    "modality alone": ({**OFF, "modality_scale": 3.0}, OFF, 2, 10),
    "for half of the run": ({**VIDEO, "stop": 0.5}, {**AUDIO, "stop": 0.5}, None, None),
    "none": (OFF, OFF, 1, 5),
}


@pytest.mark.parametrize(
    ("cls", "guiders", "prompts"), [(tuple(CLASSES)[n % 2], name, 1 + n % 2) for n, name in enumerate(GUIDERS)]
)
def test_equals_its_own_passes(cls, guiders, prompts):
    video, audio, passes, block_rows = GUIDERS[guiders]
    own, expected = counted(build(cls, video, audio), prompts=prompts)
    pipe = stgfast.accelerate(build(cls, video, audio))
    rows, made = counted(pipe, prompts=prompts)
    for one, other in zip(made, expected, strict=True):
        same(one, other)
    if passes is not None:
        assert own == 2 * passes * DEPTH * prompts
        assert rows == 2 * block_rows * prompts
    sizes = {"num_inference_steps": 2, "num_frames": 9}
    assert stgfast.explain(pipe, **sizes).block_rows * prompts == rows
    assert all(map(torch.equal, call(stgfast.restore(pipe), prompts), expected))


def test_the_guiders_matter():
    assert distance(call(build())[0], call(build(video=OFF, audio=OFF))[0]) > 1e-3


def test_verify():
    pipe = stgfast.accelerate(build())
    seen = {}
    test_call = type(pipe).__call__
    type(pipe).__call__ = lambda self, **given: seen.update(given) or test_call(self, **given)
    call(pipe)
    assert stgfast.verify(pipe, **seen).ok


def test_what_its_guiders_say_is_not_said_twice():
    with pytest.raises(SettingsError, match="expected none; set stg_scale and the other settings"):
        call(stgfast.accelerate(build(), Guidance(Perturbation([3]))))
    pipe = build()
    pipe.guider = diffusers.ClassifierFreeGuidance(guidance_scale=3.0)
    with pytest.raises(SettingsError, match="got ClassifierFreeGuidance, expected LTX2Guidance"):
        call(stgfast.accelerate(pipe))
    pipe = build()
    pipe.guider.spatio_temporal_guidance_blocks = [28]
    with pytest.raises(
        SettingsError, match=r"spatio_temporal_guidance_blocks: got \[28\], expected numbers from 0 to 4"
    ):
        call(stgfast.accelerate(pipe))


def test_carried_on():
    guidance, steps = Guidance(reuse=2, reuse_cfg=2), {"num_inference_steps": 7}
    pipe = stgfast.accelerate(build(), guidance)
    rows, made = counted(pipe, **steps)
    assert rows == stgfast.explain(pipe, **steps, num_frames=9).block_rows < 7 * 17
    assert distance(made[0], call(build(), **steps)[0]) > 1e-6
