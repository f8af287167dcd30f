"""Cosmos: one call for cond, then one for uncond, combined as c + s (c - u) after the conversion to x0."""

from types import SimpleNamespace

import diffusers
import torch

from tests import models
from tests.integrations.by_calls import ByCalls
from tests.oracle import Facts


class Unchecked(diffusers.ModelMixin):
    """Replaces the safety checker, which the pipelines require."""

    def __init__(self):
        super().__init__()
        self.one = torch.nn.Parameter(torch.ones(1))

    def check_text_safety(self, text):
        return True

    def check_video_safety(self, frames):
        return frames


def resize(mask, size, interpolation):
    return torch.nn.functional.interpolate(mask, size, mode="nearest")


# Replaces torchvision's, which resizes padding masks.
TRANSFORMS = SimpleNamespace(functional=SimpleNamespace(resize=resize), InterpolationMode=SimpleNamespace(NEAREST=0))


def transformer(**changes):
    torch.manual_seed(1)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 4, "mlp_ratio": 2.0}
    widths = {"text_embed_dim": 32, "adaln_lora_dim": 4, "max_size": (4, 32, 32)}
    # Padding needs torchvision; `test_cosmos.py` has it.
    model = diffusers.CosmosTransformer3DModel(**{**sizes, **widths, "concat_padding_mask": False, **changes})
    models.spread(model)
    return model.eval()


def encoder():
    torch.manual_seed(0)
    wide = {"encoder_block_out_channels": (8, 8, 8, 8), "decode_block_out_channels": (8, 8, 8, 8)}
    return diffusers.AutoencoderKLCosmos(**wide, attention_resolutions=(8,), resolution=64).eval()


def edm(other):
    if other:
        return diffusers.EDMEulerScheduler(sigma_data=1.0, sigma_schedule="exponential", prediction_type="v_prediction")
    return diffusers.EDMEulerScheduler(final_sigmas_type="sigma_min")


def flow(other):
    names = ("use_karras_sigmas", "use_exponential_sigmas")
    return diffusers.FlowMatchEulerDiscreteScheduler(**{names[other]: True})


def multistep(other):
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    return diffusers.UniPCMultistepScheduler(**flow, flow_shift=3.0 if other else 5.0)


def builder(cls, scheduler, **changes):
    def build(other=False):
        parts = {"text_encoder": None, "tokenizer": None, "safety_checker": Unchecked(), "scheduler": scheduler(other)}
        vae = encoder() if scheduler is edm else models.pipeline("wan").vae
        pipe = cls(**parts, transformer=transformer(**changes), vae=vae)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return build


def caller(**more):
    def arguments(prompts, cfg=True):
        sizes = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "latent", **more}
        made = {**sizes, "guidance_scale": 3.0 if cfg else 1.0, "generator": models.generators(prompts)}
        if "image" in more:
            made["image"] = torch.rand(prompts, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        return {**made, **models.prompt("wan", prompts)}

    return arguments


SEQUENTIAL = Facts(stacked=False, oblong={"width": 48}, lies=lambda tokens: (0, (tokens // 6, 2, 3)))
WITH_MASK = {"in_channels": 17}  # the latents, and a mask of given frames
SHORT = {"num_frames": 9}
PROJECTED = {"use_crossattn_projection": True, "crossattn_proj_in_channels": 32, "extra_pos_embed_type": None}
PROJECTED |= {"encoder_hidden_states_channels": 32}

FAMILIES = [
    ByCalls("Cosmos", builder(diffusers.CosmosTextToWorldPipeline, edm), caller(**SHORT), SEQUENTIAL, cfg=4.0),
    ByCalls(
        "Cosmos from an image",
        builder(diffusers.CosmosVideoToWorldPipeline, edm, **WITH_MASK),
        caller(**SHORT, image=None),
        SEQUENTIAL,
        cfg=4.0,
        known=False,
    ),
    ByCalls(
        "Cosmos from an image, with guidance on it",
        builder(diffusers.CosmosVideoToWorldPipeline, edm, **WITH_MASK),
        caller(**SHORT, image=None, input_frames_guidance=True, augment_sigma=0.1),
        SEQUENTIAL,
        cfg=4.0,
        known=False,
    ),
    ByCalls(
        "Cosmos 2 for images",
        builder(diffusers.Cosmos2TextToImagePipeline, flow),
        caller(),
        SEQUENTIAL,
        cfg=4.0,
        result=lambda output: output.images,
    ),
    ByCalls(
        "Cosmos 2 from an image",
        builder(diffusers.Cosmos2VideoToWorldPipeline, flow, **WITH_MASK),
        caller(**SHORT, image=None),
        SEQUENTIAL,
        cfg=4.0,
    ),
    ByCalls(
        "Cosmos 2.5",
        builder(diffusers.Cosmos2_5_PredictBasePipeline, multistep, **WITH_MASK, **PROJECTED),
        caller(**SHORT),
        SEQUENTIAL,
        cfg=4.0,
    ),
]
