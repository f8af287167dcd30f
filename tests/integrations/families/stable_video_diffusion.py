"""Stable Video Diffusion: a UNet with attention along two axes, and a CFG scale for each frame."""

import diffusers
import torch
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from tests import models
from tests.integrations.family import Family
from tests.oracle import Facts, Part

FRAMES = 3


def unet():
    """Four layers: one on the way down, one in the middle, two on the way up."""
    torch.manual_seed(1)
    model = diffusers.UNetSpatioTemporalConditionModel(
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        in_channels=8,
        out_channels=4,
        layers_per_block=1,
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=96,
        cross_attention_dim=32,
        num_attention_heads=(2, 4),
        num_frames=FRAMES,
        sample_size=8,
    )
    models.spread(model)
    return model.eval()


def build(other=False):
    settings = {"prediction_type": "v_prediction", "timestep_spacing": "leading", "steps_offset": 1}
    scheduler = diffusers.HeunDiscreteScheduler if other else diffusers.EulerDiscreteScheduler
    model = unet()
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2
    )
    clip = CLIPVisionConfig(
        hidden_size=32,
        projection_dim=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=32,
        intermediate_size=37,
        patch_size=8,
    )
    pipe = diffusers.StableVideoDiffusionPipeline(
        vae=vae.eval(),
        image_encoder=CLIPVisionModelWithProjection(clip).eval(),
        unet=model,
        scheduler=scheduler(**settings),
        feature_extractor=CLIPImageProcessor(crop_size=32, size=32),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def arguments(prompts, cfg=True):
    return {
        "image": torch.rand(prompts, 3, 32, 32, generator=torch.Generator().manual_seed(5)),
        "height": 8,
        "width": 8,
        "num_frames": FRAMES,
        "num_inference_steps": 2,
        "max_guidance_scale": 3.0 if cfg else 1.0,
        "generator": models.generators(prompts),
        "output_type": "latent",
    }


def parts(model):
    """The parts that the UNet runs, in order: residual blocks, transformers (the layers), resamplers."""
    found, layers = [], 0
    for block in (*model.down_blocks, model.mid_block, *model.up_blocks):
        transformers = list(getattr(block, "attentions", []))
        for number, resnet in enumerate(block.resnets):
            found.append(Part(resnet, None))
            if number < len(transformers):
                one = transformers[number]
                (spatial,), (temporal,) = one.transformer_blocks, one.temporal_transformer_blocks
                found.append(Part(one, layers, {"spatial": spatial.attn1, "temporal": temporal.attn1}))
                layers += 1
        found += [
            Part(one, None) for name in ("downsamplers", "upsamplers") for one in getattr(block, name, None) or ()
        ]
    return found


def cfg(pipe, denoiser):
    """From 1 at the first frame to 3 at the last."""
    return torch.linspace(1.0, 3.0, FRAMES).double()[None, :, None, None, None]


FAMILIES = [
    Family(
        "Stable Video Diffusion",
        build,
        arguments,
        Facts(
            stacked=True,
            parts=parts,
            unchanged=lambda given: (given[0],),
            denoisers=("unet",),
            oblong={"width": 24},
            lies=lambda tokens: (0, {48: (1, 4, 12), 12: (1, 2, 6)}[tokens]),  # every frame is a row
        ),
        cfg=cfg,
        steps=(2, 3),
    )
]
