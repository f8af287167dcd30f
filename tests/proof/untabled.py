"""Tiny pipelines of diffusers without an adapter: those whose facts are found, and those that are refused."""

from __future__ import annotations

import functools
from dataclasses import replace

import diffusers
import torch
import transformers
from diffusers.models.controlnets import controlnet_cosmos
from diffusers.modular_pipelines.helios.modular_blocks_helios import HeliosAutoBlocks
from diffusers.pipelines.consisid import pipeline_consisid

from tests import models
from tests.integrations import test_ltx2
from tests.integrations.families import cogvideox, cosmos, easyanimate, modular, wan
from tests.integrations.family import Family
from tests.oracle import Facts, Part
from tests.render import wholes


def tokenizer():
    made = wholes.clip_tokenizer()
    made.model_max_length = 16
    return made


def reading():
    return {"text_encoder": wholes.clip(16), "tokenizer": tokenizer(), "vae": encoder(), "scheduler": ddim()}


def encoder():
    images = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(**images, block_out_channels=(8, 16), latent_channels=4, norm_num_groups=4).eval()


def ddim():
    return diffusers.DDIMScheduler(beta_schedule="linear", clip_sample=False)


def silent(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


WIDE = {"block_out_channels": (16, 32), "layers_per_block": 2, "cross_attention_dim": 16}
DOWN = ("CrossAttnDownBlock2D", "DownBlock2D")


def animated(cls, control=None, **changes):
    def build(other=False):
        torch.manual_seed(1)
        kinds = {"down_block_types": DOWN, "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}
        unet = diffusers.UNet2DConditionModel(**kinds, **WIDE, sample_size=8, norm_num_groups=2, attention_head_dim=4)
        motion = {"motion_layers_per_block": 2, "motion_norm_num_groups": 2, "motion_num_attention_heads": 4}
        adapter = diffusers.MotionAdapter(block_out_channels=(16, 32), **motion, **changes)
        models.spread(unet)
        models.spread(adapter)
        controlled = {} if control is None else {"controlnet": control()}
        pipe = cls(**reading(), unet=unet, motion_adapter=adapter, **controlled)
        pipe.unet.eval()
        return silent(pipe)

    return build


def control(cls=diffusers.ControlNetModel, **changes):
    kinds = {"down_block_types": DOWN, "conditioning_embedding_out_channels": (8, 8), **changes}
    made = cls(**WIDE, **kinds, in_channels=4, norm_num_groups=1, attention_head_dim=4)
    models.spread(made)
    return made.eval()


def sparse_control():
    kinds = {"down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"), "conditioning_channels": 3}
    motion = {"motion_num_attention_heads": 4, "motion_max_seq_length": 16}
    return control(diffusers.SparseControlNetModel, **kinds, **motion, use_simplified_condition_embedding=False)


def animated_xl(other=False):
    torch.manual_seed(1)
    kinds = {"down_block_types": ("DownBlockMotion", "CrossAttnDownBlockMotion")}
    kinds["up_block_types"] = ("CrossAttnUpBlockMotion", "UpBlockMotion")
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "transformer_layers_per_block": (1, 2)}
    added["projection_class_embeddings_input_dim"] = 6 * 8 + 16
    motion = {"motion_num_attention_heads": 4, "use_motion_mid_block": False}
    unet = diffusers.UNetMotionModel(**kinds, **WIDE, **added, **motion, norm_num_groups=2)
    models.spread(unet)
    none = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "motion_adapter"))
    parts = {"vae": encoder(), "scheduler": ddim(), "unet": unet.eval()}
    return silent(diffusers.AnimateDiffSDXLPipeline(**none, **parts))


def of_pooled_embeds(prompts, cfg=True):
    made = {**arguments(1, cfg), "generator": models.generators(1)[0]}
    del made["prompt"]
    for number, side in enumerate(("", "negative_")):
        seeded = torch.Generator().manual_seed(number)
        made[f"{side}prompt_embeds"] = torch.randn(1, 7, 16, generator=seeded)
        made[f"{side}pooled_prompt_embeds"] = torch.randn(1, 16, generator=seeded)
    return made


def with_a_face(other=False):
    torch.manual_seed(1)
    stock = cogvideox.builder(diffusers.CogVideoXPipeline)()
    sizes = {name: stock.transformer.config[name] for name in ("num_attention_heads", "attention_head_dim")}
    sizes |= {name: stock.transformer.config[name] for name in ("num_layers", "text_embed_dim", "time_embed_dim")}
    sizes |= {"in_channels": 8, "out_channels": 4, "use_rotary_positional_embeddings": True, "is_train_face": True}
    sizes |= {"cross_attn_dim_head": 8, "cross_attn_num_heads": 2}
    face = {"id_dim": 12, "vit_dim": 8, "dim_head": 8, "num_heads": 2, "num_id_token": 2, "num_querie": 4}
    face["output_dim"] = int(sizes["num_attention_heads"] * sizes["attention_head_dim"] / 3 * 2)
    model = diffusers.ConsisIDTransformer3DModel(**sizes, **{f"LFE_{name}": size for name, size in face.items()})
    models.spread(model)
    kept = {name: getattr(stock, name) for name in ("tokenizer", "text_encoder", "vae", "scheduler")}
    # By its own module: the package asks for OpenCV, with which key points are drawn.
    return silent(pipeline_consisid.ConsisIDPipeline(**kept, transformer=model.eval()))


def under_control(other=False):
    vars(controlnet_cosmos).setdefault("transforms", cosmos.TRANSFORMS)
    model = cosmos.transformer(**cosmos.WITH_MASK, **cosmos.PROJECTED, controlnet_block_every_n=2)
    names = ("num_attention_heads", "attention_head_dim", "mlp_ratio", "text_embed_dim", "adaln_lora_dim", "max_size")
    sizes = {**{name: model.config[name] for name in names}, **cosmos.PROJECTED, "img_context_dim_in": None}
    sizes |= {"n_controlnet_blocks": 2, "in_channels": 18, "latent_channels": 18, "model_channels": 32}
    torch.manual_seed(2)
    net = diffusers.CosmosControlNetModel(**sizes, patch_size=model.config.patch_size)
    models.spread(net)
    parts = {"text_encoder": None, "tokenizer": None, "safety_checker": cosmos.Unchecked()}
    parts |= {"vae": models.pipeline("wan").vae, "scheduler": cosmos.multistep(other), "controlnet": net.eval()}
    return silent(diffusers.Cosmos2_5_TransferPipeline(**parts, transformer=model))


def of_controls(prompts, cfg=True):
    controls = torch.rand(1, 9, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return {**cosmos.caller(num_frames=9, num_frames_per_chunk=9)(1, cfg), "controls": controls}


def of_a_face(prompts, cfg=True):
    seeded = torch.Generator().manual_seed(0)
    face = {"id_cond": torch.randn(1, 12, generator=seeded)}
    face["id_vit_hidden"] = [torch.randn(1, 6, 8, generator=seeded) for _ in range(5)]
    return {**cogvideox.from_image(prompts, cfg), **face}


UNET = {
    **{"block_out_channels": (4, 8), "layers_per_block": 1, "norm_num_groups": 2, "attention_head_dim": 4},
    **{"down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"), "cross_attention_dim": 16, "sample_size": 8},
    "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
}


def three_dimensional(cls):
    def build(other=False):
        torch.manual_seed(1)
        unet = diffusers.UNet3DConditionModel(**UNET)
        models.spread(unet)
        return silent(cls(**reading(), unet=unet.eval()))

    return build


def from_an_image(other=False):
    torch.manual_seed(1)
    unet = diffusers.I2VGenXLUNet(**UNET)
    models.spread(unet)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPVisionConfig(**sizes, image_size=16, patch_size=8, projection_dim=16)
    torch.manual_seed(0)
    seeing = {"image_encoder": transformers.CLIPVisionModelWithProjection(config).eval()}
    seeing["feature_extractor"] = transformers.CLIPImageProcessor(crop_size=16, size=16)
    return silent(diffusers.I2VGenXLPipeline(**reading(), **seeing, unet=unet.eval()))


def arguments(prompts, cfg=True):
    sizes = {"height": 16, "width": 16, "num_frames": 4, "num_inference_steps": 2, "output_type": "latent"}
    given = {"prompt": ["a prompt"] * prompts, "guidance_scale": 4.0 if cfg else 1.0}
    return {**sizes, **given, "generator": models.generators(prompts)}


def one(**more):
    def given(prompts, cfg=True):
        made = {name: value() if callable(value) else value for name, value in more.items()}
        return {**arguments(1, cfg), "prompt": "a prompt", "generator": models.generators(1)[0], **made}

    return given


def klein(other=False):
    torch.manual_seed(1)
    sizes = {"patch_size": 1, "in_channels": 16, "num_layers": 2, "num_single_layers": 3, "joint_attention_dim": 16}
    heads = {"attention_head_dim": 16, "num_attention_heads": 2, "axes_dims_rope": (4, 4, 4, 4)}
    model = diffusers.Flux2Transformer2DModel(**sizes, **heads, timestep_guidance_channels=16, guidance_embeds=False)
    models.spread(model)
    images = {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 4}
    vae = diffusers.AutoencoderKLFlux2(**images).eval()
    parts = {"text_encoder": None, "tokenizer": None, "scheduler": diffusers.FlowMatchEulerDiscreteScheduler()}
    return silent(diffusers.Flux2KleinPipeline(**parts, vae=vae, transformer=model.eval(), is_distilled=False))


def of_embeds(prompts, cfg=True):
    sizes = {"height": 64, "width": 64, "num_inference_steps": 2, "output_type": "latent"}
    made = {**sizes, "guidance_scale": 4.0 if cfg else 1.0, "generator": models.generators(prompts)}
    for number, side in enumerate(("", "negative_")):
        one = [torch.randn(1, 7, 16, generator=torch.Generator().manual_seed(10 * number + n)) for n in range(prompts)]
        made[f"{side}prompt_embeds"] = torch.cat(one)
    return made


def with_a_camera(other=False):
    torch.manual_seed(1)
    vae = diffusers.AutoencoderKLLTX2Video(**test_ltx2.VAE).eval()
    sizes = {"in_channels": vae.config.latent_channels, "num_layers": 4, "hidden_size": 48, "caption_channels": 16}
    heads = {"num_attention_heads": 2, "linear_head_dim": 24, "softmax_every_n": 2}
    camera = {"chunk_plucker_channels": 6 * vae.temporal_compression_ratio, "chunk_plucker_post_attn_blocks": 4}
    model = diffusers.SanaWMTransformer3DModel(**sizes, **heads, **camera, fp32_attention=False)
    models.spread(model)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=8.0)
    return silent(diffusers.SanaWMPipeline(None, None, vae, model.eval(), scheduler))


def of_a_camera(prompts, cfg=True):
    generator = torch.Generator().manual_seed(0)
    made = {"image": wan.image(), "prompt": None, "action": "w-16", "intrinsics": [30.0, 30.0, 16.0, 16.0]}
    made |= {"height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 2, "output_type": "latent"}
    for side in ("", "negative_"):
        made[f"{side}prompt_embeds"] = torch.randn(1, 1, 8, 16, generator=generator)
        made[f"{side}prompt_attention_mask"] = torch.ones(1, 8).long()
    return {**made, "guidance_scale": 4.0 if cfg else 1.0, "generator": models.generators(1)[0]}


def by_token(pipe, prediction):
    """The scheduler receives the negative prediction, by token."""
    return -prediction.flatten(2).transpose(1, 2)


def helios(other=False):
    stock = wan.in_chunks()
    parts = {name: getattr(stock, name) for name in ("transformer", "vae", "scheduler")}
    blocks = HeliosAutoBlocks()
    return modular.assembled(blocks, cls=diffusers.HeliosModularPipeline, **parts, guider=modular.guider())


def of_chunks(prompts, cfg=True):
    made = {**wan.of_chunks(1), "output": "latent_chunks"}
    return {name: value for name, value in made.items() if name not in ("output_type", "guidance_scale")}


def single_blocks(model):
    """Blocks of another kind, which precede these, return other arguments, and are not perturbed."""
    return [Part(block, n, {"": block.attn}) for n, block in enumerate(model.single_transformer_blocks)]


def of_a_video(prompts, cfg=True):
    made = one(video=lambda: wan.frames()[:4], strength=0.5, num_inference_steps=4)(1, cfg)
    return {name: value for name, value in made.items() if name not in ("height", "width", "num_frames")}


def transformers_of(unet):
    """In the order in which they run: down, middle, up."""
    parts = (unet.down_blocks, unet.mid_block, unet.up_blocks)
    kind = diffusers.models.transformers.transformer_2d.Transformer2DModel
    found = [module for part in parts for module in part.modules() if type(module) is kind]
    return [
        Part(module, n, {str(block): one.attn1 for block, one in enumerate(module.transformer_blocks)})
        for n, module in enumerate(found)
    ]


def frames_as_rows(pipe, prediction):
    return prediction.transpose(1, 2).flatten(0, 1)


FACTS = Facts(
    stacked=True,
    parts=transformers_of,
    unchanged=lambda given: (given[0],),
    denoisers=("unet",),
    repeated=("encoder_hidden_states", "down_block_additional_residuals", "mid_block_additional_residual"),
)
FLAT = replace(FACTS, sent=frames_as_rows)
animate = functools.partial(Family, facts=FACTS, cfg=4.0, layers=(1, 4))
FOUND = {
    family.name: family
    for family in (
        animate("AnimateDiff", animated(diffusers.AnimateDiffPipeline), arguments),
        animate("AnimateDiff from a video", animated(diffusers.AnimateDiffVideoToVideoPipeline), of_a_video),
        animate(
            "AnimateDiff, controlled",
            animated(diffusers.AnimateDiffControlNetPipeline, control),
            one(conditioning_frames=lambda: wan.frames()[:4]),
        ),
        animate(
            "AnimateDiff, controlled at some frames",
            animated(diffusers.AnimateDiffSparseControlNetPipeline, sparse_control),
            one(conditioning_frames=lambda: wan.frames()[:1], controlnet_frame_indices=lambda: [0]),
        ),
        animate(
            "AnimateDiff from a video, controlled",
            animated(diffusers.AnimateDiffVideoToVideoControlNetPipeline, control),
            lambda prompts, cfg=True: {**of_a_video(prompts, cfg), "conditioning_frames": wan.frames()[:4]},
        ),
        Family("AnimateDiff XL", animated_xl, of_pooled_embeds, FACTS, 4.0, layers=(1, 2)),
        Family("Cosmos 2.5, controlled", under_control, of_controls, Facts(stacked=False), 4.0, layers=(1, 2)),
        Family("ConsisID", with_a_face, of_a_face, cogvideox.FACTS, 6.0),
        animate("PIA", animated(diffusers.PIAPipeline, conv_in_channels=9), one(image=wan.image)),
        Family("Text to video", three_dimensional(diffusers.TextToVideoSDPipeline), one(), FLAT, 4.0, layers=(0, 2)),
        Family("I2VGen-XL", from_an_image, one(image=wan.image, clip_skip=None), FLAT, 4.0, layers=(0, 2)),
        Family(
            "Flux.2 Klein",
            klein,
            of_embeds,
            Facts(stacked=False, parts=single_blocks),
            4.0,
            layers=(0, 2),
            result=lambda output: output.images,
        ),
        Family(
            "Sana WM",
            with_a_camera,
            of_a_camera,
            Facts(
                stacked=True,
                parts=lambda model: [Part(block, n, {}) for n, block in enumerate(model.blocks)],
                sent=by_token,
            ),
            4.0,
            kinds=("residual",),
        ),
        Family(
            "modular Helios",
            helios,
            of_chunks,
            Facts(stacked=False),
            4.0,
            result=torch.cat,
            steps=(4, 4),
            cfg_asked=False,
        ),
    )
}


def normed(other=False):
    torch.manual_seed(1)
    sizes = {"patch_size": 2, "in_channels": 16, "out_channels": 4, "num_layers": 4, "joint_attention_dim": 16}
    heads = {"attention_head_dim": 16, "num_attention_heads": 2, "axes_dims_rope": (4, 6, 6)}
    model = diffusers.QwenImageTransformer2DModel(**sizes, **heads)
    models.spread(model)
    images = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1}
    vae = diffusers.AutoencoderKLQwenImage(**images, latents_mean=[0.0] * 4, latents_std=[1.0] * 4).eval()
    parts = {"text_encoder": None, "tokenizer": None, "scheduler": diffusers.FlowMatchEulerDiscreteScheduler()}
    return silent(diffusers.QwenImagePipeline(**parts, vae=vae, transformer=model.eval()))


def of_masked_embeds(prompts, cfg=True):
    made = of_embeds(prompts, cfg)
    masks = {f"{side}prompt_embeds_mask": torch.ones(prompts, 7).long() for side in ("", "negative_")}
    return {**made, **masks, "true_cfg_scale": made.pop("guidance_scale"), "height": 32, "width": 32}


def with_cache(other=False):
    pipe = wan.builder(diffusers.AnyFlowFARPipeline, diffusers.AnyFlowFARTransformer3DModel)(False)
    pipe.scheduler = diffusers.FlowMapEulerDiscreteScheduler()
    return pipe


def pyramid(other=False):
    pipe = wan.builder(diffusers.HeliosPyramidPipeline, diffusers.HeliosTransformer3DModel, rope_dim=(4, 4, 4))(False)
    pipe.scheduler = diffusers.HeliosScheduler(gamma=0.25)
    return pipe


def of_pyramid(prompts, cfg=True):
    chunks = {"num_frames": 9, "height": 128, "width": 128, "num_latent_frames_per_chunk": 3}
    made = wan.caller(**chunks, pyramid_num_inference_steps_list=[2, 2, 2])(1, cfg)
    return {name: value for name, value in made.items() if name != "num_inference_steps"}


def controlled(prompts, cfg=True):
    return {**easyanimate.arguments(prompts, cfg), "control_video": easyanimate.pixels(prompts)}


def with_audio(other=False):
    torch.manual_seed(1)
    sizes = {"in_visual_dim": 4, "out_visual_dim": 4, "in_audio_dim": 4, "out_audio_dim": 4, "axes_dims": (4, 6, 6)}
    widths = {"model_dim": 32, "model_dim_a": 32, "ff_dim": 32, "ff_dim_a": 32, "time_dim": 16, "time_dim_a": 16}
    texts = {"in_text_dim": 16, "in_text_dim2": 8, "num_text_blocks": 1, "num_visual_blocks": 3, "axes_dims_a": (16,)}
    model = diffusers.Kandinsky6Transformer3DModel(**sizes, **widths, **texts)
    models.spread(model)
    narrow = {"latent_channels": 4, "block_out_channels": (4, 4, 4, 4), "layers_per_block": 1, "norm_num_groups": 2}
    parts = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    vae = diffusers.AutoencoderKLHunyuanVideo(**narrow).eval()
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return silent(diffusers.Kandinsky6TI2VAPipeline(model.eval(), vae, scheduler=scheduler, **parts))


def of_both_texts(prompts, cfg=True):
    generator = torch.Generator().manual_seed(0)
    made = {"height": 64, "width": 64, "num_frames": 5, "num_inference_steps": 2, "output_type": "latent"}
    for side in ("", "negative_"):
        made[f"{side}prompt_embeds"] = torch.randn(1, 7, 16, generator=generator)
        made[f"{side}pooled_prompt_embeds"] = torch.randn(1, 8, generator=generator)
    return {**made, "sample_audio": False, "generator": torch.Generator().manual_seed(0)}


def in_a_list(other=False):
    torch.manual_seed(1)
    sizes = {"in_channels": 4, "dim": 32, "n_layers": 4, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2}
    axes = {"axes_dims": [4, 6, 6], "axes_lens": [64, 32, 32]}
    model = diffusers.ZImageTransformer2DModel(**sizes, **axes, cap_feat_dim=16)
    models.spread(model)
    vae = diffusers.AutoencoderKL(latent_channels=4, block_out_channels=(8,), norm_num_groups=4).eval()
    parts = {"text_encoder": None, "tokenizer": None, "scheduler": diffusers.FlowMatchEulerDiscreteScheduler()}
    return silent(diffusers.ZImagePipeline(**parts, vae=vae, transformer=model.eval()))


def of_lists(prompts, cfg=True):
    generator = torch.Generator().manual_seed(0)
    embeds = {f"{side}prompt_embeds": [torch.randn(7, 16, generator=generator)] for side in ("", "negative_")}
    sizes = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "latent"}
    return {**embeds, **sizes, "generator": torch.Generator().manual_seed(0)}


def of_packed_tokens(other=False):
    torch.manual_seed(1)
    vae = models.pipeline("wan").vae
    channels = vae.config.z_dim
    sizes = {"head_dim": 16, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3, "vocab_size": 4096}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "rope_axes_dim": (4, 2, 2)}
    latent = {"latent_channel": channels, "patch_latent_dim": 4 * channels}
    model = diffusers.Cosmos3OmniTransformer(**sizes, **heads, **latent)
    models.spread(model)
    read = wholes.chat_tokenizer()
    read.add_tokens(["<|vision_start|>"], special_tokens=True)
    read.eos_token = "<|im_end|>"
    flow = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    return silent(diffusers.Cosmos3OmniPipeline(model.eval(), read, vae, flow, enable_safety_checker=False))


def of_a_prompt(prompts, cfg=True):
    sizes = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 2, "output_type": "latent"}
    return {"prompt": "a kite", **sizes, "enable_safety_check": False, "generator": models.generators(1)[0]}


def of_distilled(prompts, cfg=True):
    made = {"prompt_embeds": torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(0))}
    sizes = {"height": 32, "width": 32, "num_frames": 9, "sigmas": [1.0, 0.5], "output_type": "latent"}
    mask = {"prompt_attention_mask": torch.ones(1, 8).long(), "generate_slots": False}
    return {**made, **sizes, **mask, "generator": models.generators(1)[0]}


def frame_by_frame(other=False):
    torch.manual_seed(1)
    kinds = {"down_block_types": DOWN, "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}
    unet = diffusers.UNet2DConditionModel(**kinds, **WIDE, sample_size=8, norm_num_groups=2, attention_head_dim=4)
    models.spread(unet)
    unchecked = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return silent(diffusers.TextToVideoZeroPipeline(**reading(), unet=unet.eval(), **unchecked))


def of_motion(prompts, cfg=True):
    sizes = {"height": 16, "width": 16, "video_length": 4, "num_inference_steps": 6, "output_type": "latent"}
    return {"prompt": "a kite", **sizes, "t0": 3, "t1": 4, "generator": models.generators(1)[0]}


# The builder of a pipeline, its call, and the error.
REFUSED = {
    "AnyFlowFARPipeline": (
        with_cache,
        wan.caller(num_frames=9, chunk_partition=[1, 2]),
        "combines 4 predictions in a step",
    ),
    "HeliosPyramidPipeline": (pyramid, of_pyramid, "makes 6 steps, which nothing on the pipeline says"),
    "AnimateDiffPAGPipeline": (
        animated(diffusers.AnimateDiffPAGPipeline),
        arguments,
        "combines 3 predictions in a step",
    ),
    "VideoToVideoSDPipeline": (
        three_dimensional(diffusers.VideoToVideoSDPipeline),
        of_a_video,
        "makes 2 steps, which nothing on the pipeline says",
    ),
    "Cosmos3OmniPipeline": (of_packed_tokens, of_a_prompt, "its denoiser takes no tensor of samples by name"),
    "Kandinsky6TI2VAPipeline": (with_audio, of_both_texts, "its blocks pass on nothing that the next one takes"),
    "LTX2DFRPipeline": (
        lambda: test_ltx2.build("LTX2DFRPipeline"),
        of_distilled,
        "its denoiser predicts 2 tensors in one call",
    ),
    "TextToVideoZeroPipeline": (frame_by_frame, of_motion, "combines 8 predictions in a step"),
    "ZImagePipeline": (in_a_list, of_lists, "its denoiser takes no tensor of samples by name"),
    "QwenImagePipeline": (normed, of_masked_embeds, "the pipeline's own step, by the formula with rescale 0"),
}
BROKEN = easyanimate.builder(diffusers.EasyAnimateControlPipeline, in_channels=8), controlled
