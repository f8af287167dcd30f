"""Latte: blocks along two axes in turn, and a learned sigma in the output."""

import diffusers
import torch

from tests import models
from tests.integrations.family import Family
from tests.oracle import Facts, Part, lying


def transformer():
    torch.manual_seed(1)
    model = diffusers.LatteTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=8,
        num_layers=4,
        cross_attention_dim=24,
        attention_bias=True,
        sample_size=8,
        patch_size=2,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        caption_channels=16,
        video_length=3,
    )
    models.spread(model)
    for parameter in model.parameters():  # gates and CFG amplify rounding
        parameter.data *= 0.7 if parameter.ndim > 1 else 1.0
    model.proj_out.weight.data *= 0.2  # a learned sigma is an exponent
    return model.eval()


def build(other=False):
    model = transformer()
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(block_out_channels=(32,), latent_channels=4).eval()
    if other:  # one that also takes the learned sigma
        scheduler = diffusers.DDPMScheduler(variance_type="learned_range", clip_sample=False, beta_end=0.01)
    else:
        scheduler = diffusers.DDIMScheduler(clip_sample=False, beta_end=0.01)
    pipe = diffusers.LattePipeline(tokenizer=None, text_encoder=None, vae=vae, transformer=model, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def embeddings(prompts):
    made = [torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(number)) for number in range(prompts)]
    both = torch.stack(made, dim=1)
    return {"prompt_embeds": both[0], "negative_prompt_embeds": both[1]}


def arguments(prompts, cfg=True):
    return {
        **embeddings(prompts),
        "negative_prompt": None,
        "height": 8,
        "width": 8,
        "video_length": 3,
        "num_inference_steps": 2,
        "guidance_scale": 3.0 if cfg else 1.0,
        "generator": models.generators(prompts),
        "output_type": "latent",
    }


def parts(model):
    both = zip(model.transformer_blocks, model.temporal_transformer_blocks, strict=True)
    return [
        Part(block, layer, {axis: block.attn1})
        for layer, pair in enumerate(both)
        for axis, block in zip(("spatial", "temporal"), pair, strict=True)
    ]


def sent(pipe, prediction):
    """The learned sigma is passed only to a scheduler that takes it."""
    learned = pipe.scheduler.config.get("variance_type") == "learned_range"
    return prediction if learned else prediction.chunk(2, dim=1)[0]


FAMILIES = [
    Family(
        "Latte",
        build,
        arguments,
        Facts(stacked=True, parts=parts, sent=sent, half=True, oblong={"width": 16}, lies=lying((1, 4, 8))),
        cfg=3.0,
    )
]
