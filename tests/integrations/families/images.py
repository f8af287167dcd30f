"""Image pipelines: for the engine, they are like those for video."""

import diffusers
import torch

from tests import models
from tests.integrations.family import Family
from tests.oracle import Facts, Part, lying

FLOW = {False: diffusers.FlowMatchEulerDiscreteScheduler, True: diffusers.FlowMatchLCMScheduler}
VAE = {
    **{"in_channels": 3, "out_channels": 3, "block_out_channels": (8,), "layers_per_block": 1, "latent_channels": 4},
    **{"norm_num_groups": 1, "use_quant_conv": False, "use_post_quant_conv": False, "scaling_factor": 1.0},
}


def vae(**changes):
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(**{**VAE, **changes}).eval()


def embeddings(prompts, width, pooled):
    made = {}
    for number, side in enumerate(("", "negative_")):
        seeds = [torch.Generator().manual_seed(10 * prompt + number) for prompt in range(prompts)]
        made[f"{side}prompt_embeds"] = torch.cat([torch.randn(1, 6, width, generator=seed) for seed in seeds])
        made[f"{side}pooled_prompt_embeds"] = torch.cat([torch.randn(1, pooled, generator=seed) for seed in seeds])
    return made


def ready(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def spread(model, **gain):
    models.spread(model, **gain)
    return model.eval()


def sd3(other=False):
    torch.manual_seed(1)
    model = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=5,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=16,
        caption_projection_dim=32,
        pooled_projection_dim=24,
        dual_attention_layers=(0, 1),
        qk_norm="rms_norm",
    )
    names = ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")
    return ready(
        diffusers.StableDiffusion3Pipeline(
            transformer=spread(model), vae=vae(), scheduler=FLOW[other](), **dict.fromkeys(names)
        )
    )


def sd3_parts(model):
    return [
        Part(block, i, {"": block.attn, **({"second": block.attn2} if block.use_dual_attention else {})})
        for i, block in enumerate(model.transformer_blocks)
    ]


def sd3_arguments(prompts, cfg=True):
    sizes = {"height": 8, "width": 8, "num_inference_steps": 2, "guidance_scale": 4.0 if cfg else 1.0}
    return {**embeddings(prompts, 16, 24), **sizes, "output_type": "latent", "generator": models.generators(prompts)}


def flux(other=False):
    torch.manual_seed(1)
    model = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=24,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    names = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    return ready(
        diffusers.FluxPipeline(transformer=spread(model), vae=vae(), scheduler=FLOW[other](), **dict.fromkeys(names))
    )


def flux_arguments(prompts, cfg=True):
    made = embeddings(prompts, 16, 24)
    if not cfg:
        made = {name: value for name, value in made.items() if "negative" not in name}
    sizes = {"height": 8, "width": 8, "num_inference_steps": 2, "true_cfg_scale": 4.0 if cfg else 1.0}
    return {**made, **sizes, "output_type": "latent", "generator": models.generators(prompts)}


def sdxl(other=False):
    torch.manual_seed(1)
    model = diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 2),
        projection_class_embeddings_input_dim=72,
        cross_attention_dim=16,
    )
    scheduler = diffusers.DPMSolverMultistepScheduler() if other else diffusers.EulerDiscreteScheduler()
    names = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    changes = {"use_quant_conv": True, "use_post_quant_conv": True}
    return ready(
        diffusers.StableDiffusionXLPipeline(
            unet=spread(model, gain=1.0), vae=vae(**changes), scheduler=scheduler, **dict.fromkeys(names)
        )
    )


def sdxl_parts(model):
    """The parts that the UNet runs, in order: residual blocks, transformers (the layers), resamplers."""
    found, layers = [], 0
    for block in (*model.down_blocks, model.mid_block, *model.up_blocks):
        transformers = list(getattr(block, "attentions", []))
        for number, resnet in enumerate(block.resnets):
            found.append(Part(resnet, None))
            if number < len(transformers):
                attentions = {str(n): one.attn1 for n, one in enumerate(transformers[number].transformer_blocks)}
                found.append(Part(transformers[number], layers, attentions))
                layers += 1
        found += [
            Part(one, None) for name in ("downsamplers", "upsamplers") for one in getattr(block, name, None) or ()
        ]
    return found


def sdxl_arguments(prompts, cfg=True):
    sizes = {"height": 8, "width": 8, "num_inference_steps": 2, "guidance_scale": 4.0 if cfg else 1.0}
    return {**embeddings(prompts, 16, 24), **sizes, "output_type": "latent", "generator": models.generators(prompts)}


def turned(given):
    return given[1], given[0]


WIDE = {"width": 12}
SD3 = Facts(stacked=True, parts=sd3_parts, unchanged=turned, oblong=WIDE, lies=lying((1, 8, 12)))
FLUX = Facts(False, unchanged=turned, oblong=WIDE, lies=lambda tokens: (tokens - 24, (1, 4, 6)))
SDXL = Facts(
    stacked=True,
    parts=sdxl_parts,
    unchanged=lambda given: (given[0],),
    denoisers=("unet",),
    oblong={"width": 16},
    lies=lying((1, 4, 8)),
)
FAMILIES = [
    Family("Stable Diffusion 3", sd3, sd3_arguments, SD3, 4.0, lambda output: output.images),
    Family("Flux", flux, flux_arguments, FLUX, 4.0, lambda output: output.images),
    Family("Stable Diffusion XL", sdxl, sdxl_arguments, SDXL, 4.0, lambda output: output.images),
]
