"""Complete tiny pipelines of every video class: from a prompt, or an image, to frames. Random weights, and tokenizers
of whole words or of letters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import diffusers
import torch
import transformers

from stgfast import Guidance, Perturbation
from tests import models
from tests.integrations import test_ltx2
from tests.integrations.families import (
    allegro,
    cogvideox,
    cosmos,
    easyanimate,
    hunyuan_video,
    hunyuan_video15,
    kandinsky5,
    latte,
    ltx,
    mochi,
    motif_video,
    sana_video,
    skyreels_v2,
    stable_video_diffusion,
    wan,
)
from tests.render import pipes

CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{{ part.text }}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN_WORDS = len(pipes.WORDS) + 5  # with three special tokens of their own, and two of a chat
LETTERS = 256  # for the tokenizers of CLIP and ByT5, one byte each


def chat_tokenizer() -> Any:
    """Words are split into pieces of at most seven letters: the pipelines drop 108 or 128 tokens of their own
    instructions from the front, and with whole words part of the prompt would be dropped too.
    """
    from tokenizers import Regex, pre_tokenizers

    made = pipes.tokenizer(2048)
    pieces = Regex(r"\w{1,7}|[^\w\s]")
    made.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(pieces, behavior="removed", invert=True)
    made.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    made.chat_template = CHAT
    return made


def qwen(kind: str, width: int) -> torch.nn.Module:
    """Three layers, because pipelines take the output of one before the last."""
    sizes = {"hidden_size": width, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    sections = [width // 4 - 2 * (width // 12), width // 12, width // 12]  # of half a head
    text = {
        **{**sizes, "num_key_value_heads": 1, "vocab_size": QWEN_WORDS, "bos_token_id": None, "eos_token_id": 1},
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": sections},
    }
    seeing = {"depth": 1, "num_heads": 2, "patch_size": 4}  # required, but never called
    torch.manual_seed(0)
    if kind == "2.5 text":
        made = transformers.Qwen2_5_VLTextModel(transformers.Qwen2_5_VLTextConfig(**text))
    elif kind == "2.5":
        vision = {**seeing, "hidden_size": 16, "intermediate_size": 16, "out_hidden_size": width}
        config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config={**vision, "fullatt_block_indexes": [0]})
        made = transformers.Qwen2_5_VLForConditionalGeneration(config)
    else:
        vision = {**seeing, "embed_dim": 16, "hidden_size": width, "mlp_ratio": 1}
        made = transformers.Qwen2VLForConditionalGeneration(
            transformers.Qwen2VLConfig(text_config=text, vision_config=vision)
        )
    models.spread(made, gain=1.0)
    return made.eval()


def clip_tokenizer() -> Any:
    from tokenizers import pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    return transformers.CLIPTokenizer({token: number for number, token in enumerate(tokens)}, [])


def clip(width: int) -> torch.nn.Module:
    sizes = {"hidden_size": width, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    torch.manual_seed(0)
    made = transformers.CLIPTextModel(transformers.CLIPTextConfig(**sizes, **ends, vocab_size=2 + 2 * LETTERS))
    models.spread(made, gain=1.0)
    return made.eval()


def byt5(width: int) -> torch.nn.Module:
    sizes = {"d_model": width, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    torch.manual_seed(0)
    made = transformers.T5EncoderModel(transformers.T5Config(**sizes, vocab_size=3 + LETTERS))
    models.spread(made, gain=1.0)
    return made.eval()


def whole(made: Any, **parts: Any) -> Any:
    """Built each time, because other tests set attributes of a pipeline that are not saved in its folder."""
    pipe = type(made)(**{**made.components, **parts})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def hunyuan_video15_pipeline(from_image: bool = False) -> Any:
    """With a VAE of its own, because the tests of the family share theirs."""
    made = hunyuan_video15.from_image() if from_image else hunyuan_video15.build()
    torch.manual_seed(0)
    return whole(
        made,
        vae=diffusers.AutoencoderKLHunyuanVideo15(**hunyuan_video15.VAE).eval(),
        text_encoder=qwen("2.5 text", hunyuan_video15.TRANSFORMER["text_embed_dim"]),
        tokenizer=chat_tokenizer(),
        text_encoder_2=byt5(hunyuan_video15.TRANSFORMER["text_embed_2_dim"]),
        tokenizer_2=transformers.ByT5Tokenizer(extra_ids=0),
    )


def kandinsky5_pipeline(cls: Any, **changes: Any) -> Any:
    """Without Qwen's processor around its tokenizer, which requires a part for videos and torchvision."""
    made = kandinsky5.builder(cls, **changes)()
    return whole(
        made,
        text_encoder=qwen("2.5", made.transformer.config.in_text_dim),
        tokenizer=chat_tokenizer(),
        text_encoder_2=clip(made.transformer.config.in_text_dim2),
        tokenizer_2=clip_tokenizer(),
    )


def easyanimate_pipeline(cls: Any, **changes: Any) -> Any:
    made = easyanimate.builder(cls, **changes)()
    text_encoder = qwen("2", made.transformer.config.text_embed_dim)
    return whole(made, text_encoder=text_encoder, tokenizer=chat_tokenizer())


def llama(width: int) -> torch.nn.Module:
    sizes = {"hidden_size": width, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    torch.manual_seed(0)
    made = transformers.LlamaModel(transformers.LlamaConfig(**sizes, vocab_size=QWEN_WORDS))
    models.spread(made, gain=1.0)
    return made.eval()


def hunyuan_video_pipeline(cls: Any, **changes: Any) -> Any:
    made = hunyuan_video.builder(cls, **changes)()
    config = made.transformer.config
    read = {"text_encoder": llama(config.text_embed_dim), "text_encoder_2": clip(config.pooled_projection_dim)}
    return whole(made, **read, tokenizer=chat_tokenizer(), tokenizer_2=clip_tokenizer())


def allegro_pipeline() -> Any:
    torch.manual_seed(0)
    sizes = {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 2}
    sizes["sample_size"] = 128  # of a tile: it returns nothing for less than one
    vae = diffusers.AutoencoderKLAllegro(**sizes).eval()
    return reading(allegro.build, 16, vae=vae)


def hunyuan_image_pipeline() -> Any:
    """Llava encodes the prompt and the image, as 576 tokens of 14 by 14 pixels each."""
    made = hunyuan_video.builder(diffusers.HunyuanVideoImageToVideoPipeline, image_condition_type="token_replace")()
    config = made.transformer.config
    tokenizer = chat_tokenizer()
    marks = ["<image>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokenizer.add_tokens(marks, special_tokens=True)
    sizes = {"intermediate_size": 16, "num_attention_heads": 2}
    seeing = transformers.CLIPVisionConfig(**sizes, hidden_size=16, num_hidden_layers=2, image_size=336, patch_size=14)
    reads = transformers.LlamaConfig(
        **sizes, hidden_size=config.text_embed_dim, num_hidden_layers=3, vocab_size=QWEN_WORDS + len(marks)
    )
    ends = {"image_token_id": tokenizer.convert_tokens_to_ids("<image>"), "pad_token_id": 0}
    torch.manual_seed(0)
    llava = transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(vision_config=seeing, text_config=reads, image_seq_length=576, **ends)
    )
    models.spread(llava, gain=1.0)
    return whole(
        made,
        text_encoder=llava.eval(),
        tokenizer=tokenizer,
        text_encoder_2=clip(config.pooled_projection_dim),
        tokenizer_2=clip_tokenizer(),
        image_processor=transformers.CLIPImageProcessor(size={"shortest_edge": 336}, crop_size=336),
    )


def video_diffusion_pipeline() -> Any:
    """CLIP takes an image of 224 by 224 for every model."""
    sizes = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPVisionConfig(**sizes, projection_dim=32, patch_size=56, image_size=224)
    torch.manual_seed(0)
    return whole(
        stable_video_diffusion.build(), image_encoder=transformers.CLIPVisionModelWithProjection(config).eval()
    )


def reading(build: Callable[[], Any], width: int, kind: str = "t5", **parts: Any) -> Any:
    """A pipeline with T5 or UMT5 as text encoder."""
    return whole(build(), text_encoder=pipes.text_encoder(width, kind), tokenizer=pipes.tokenizer(), **parts)


def of_golden(cls: Any, family: Any, name: str, **changes: Any) -> Any:
    config = models.config(name)
    width = config.get("text_embed_dim") or config.get("caption_channels") or config["text_dim"]
    return reading(family.builder(cls, **changes), width, "umt5" if name == "wan" else "t5")


def ltx2_pipeline(cls: str) -> Any:
    return test_ltx2.build(cls, text_encoder=pipes.text_encoder(16, "t5"), tokenizer=pipes.tokenizer())


def sana_pipeline(cls: Any) -> Callable[[], Any]:
    return partial(reading, sana_video.builder(cls), 8)


def framepack_pipeline() -> Any:
    made = hunyuan_video.packed()
    config = made.transformer.config
    read = {"text_encoder": llama(config.text_embed_dim), "text_encoder_2": clip(config.pooled_projection_dim)}
    return whole(made, **read, tokenizer=chat_tokenizer(), tokenizer_2=clip_tokenizer())


def motif_image_pipeline() -> Any:
    """Its text encoder has a vision part."""
    made = motif_video.builder(diffusers.MotifVideoImage2VideoPipeline, image_embed_dim=8)()
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    encoder = pipes.text_encoder(16, "t5")
    torch.manual_seed(0)
    config = transformers.SiglipVisionConfig(**sizes, image_size=16, patch_size=8)
    encoder.vision_tower = transformers.SiglipVisionModel(config).eval()
    seeing = transformers.SiglipImageProcessor(size={"height": 16, "width": 16})
    return whole(made, text_encoder=encoder, tokenizer=pipes.tokenizer(), feature_extractor=seeing)


def cosmos25_pipeline() -> Any:
    """The model uses the output of all three layers."""
    width = 16
    changes = {**cosmos.WITH_MASK, **cosmos.PROJECTED, "crossattn_proj_in_channels": 3 * width}
    made = cosmos.builder(diffusers.Cosmos2_5_PredictBasePipeline, cosmos.multistep, **changes)()
    return whole(made, text_encoder=qwen("2.5", width), tokenizer=chat_tokenizer())


PLAIN_SANA = {"use_resolution_binning": False, "complex_human_instruction": None, "max_sequence_length": 16}
WAN_TEXT = models.config("wan")["text_dim"]
FIRST = Guidance(Perturbation([1]))


@dataclass(frozen=True)
class Whole:
    """How to build a pipeline, and a job for it."""

    build: Callable[[], Any]
    num_frames: int = 5
    size: Mapping[str, int] = field(default_factory=lambda: {"height": 32, "width": 32})
    pipeline: Mapping[str, Any] = field(default_factory=dict)
    image: bool = False
    negative: str | None = None
    guidance: Guidance = FIRST
    saved: bool = True  # whether all its components support it

    def job(self, image: str) -> dict[str, Any]:
        job = {**self.size, "num_frames": self.num_frames, "steps": 2, "pipeline": dict(self.pipeline)}
        job |= {"image": image} if self.image else {}
        return job | ({"negative_prompt": self.negative} if self.negative else {})


SHORT = {"max_sequence_length": 16}
OWN = SHORT | {"spatio_temporal_guidance_blocks": [3]}
AXES = Guidance([Perturbation([1], kind="attention", axis=axis) for axis in ("spatial", "temporal")])
SQUARE: dict[str, int] = {}  # the image sets the size
WHOLES: dict[str, Whole] = {
    "MochiPipeline": Whole(partial(reading, mochi.build, 32), 7, pipeline=SHORT),
    "LTXPipeline": Whole(partial(of_golden, diffusers.LTXPipeline, ltx, "ltx"), 9, pipeline=SHORT),
    "LTXImageToVideoPipeline": Whole(
        partial(of_golden, diffusers.LTXImageToVideoPipeline, ltx, "ltx"), 9, pipeline=SHORT, image=True
    ),
    "LTXConditionPipeline": Whole(
        partial(of_golden, diffusers.LTXConditionPipeline, ltx, "ltx"), 9, pipeline=SHORT, image=True
    ),
    "LTXI2VLongMultiPromptPipeline": Whole(
        ltx.long, 17, pipeline=SHORT | {"temporal_tile_size": 16, "temporal_overlap": 8}
    ),
    "LTX2Pipeline": Whole(partial(ltx2_pipeline, "LTX2Pipeline"), 9, pipeline=OWN),
    "LTX2ImageToVideoPipeline": Whole(partial(ltx2_pipeline, "LTX2ImageToVideoPipeline"), 9, pipeline=OWN, image=True),
    "LTX2ConditionPipeline": Whole(partial(ltx2_pipeline, "LTX2ConditionPipeline"), 9, pipeline=OWN),
    "CogVideoXPipeline": Whole(partial(of_golden, diffusers.CogVideoXPipeline, cogvideox, "cogvideox"), pipeline=SHORT),
    "CogVideoXImageToVideoPipeline": Whole(
        partial(of_golden, diffusers.CogVideoXImageToVideoPipeline, cogvideox, "cogvideox", in_channels=8),
        pipeline=SHORT,
        image=True,
    ),
    "AllegroPipeline": Whole(allegro_pipeline, 24, {"height": 128, "width": 128}, pipeline=SHORT),
    "LattePipeline": Whole(partial(reading, latte.build, 16), 3, {"height": 16, "width": 16}, guidance=AXES),
    "StableVideoDiffusionPipeline": Whole(
        video_diffusion_pipeline, 3, {"height": 16, "width": 16}, image=True, guidance=AXES
    ),
    "HunyuanVideoPipeline": Whole(partial(hunyuan_video_pipeline, diffusers.HunyuanVideoPipeline), pipeline=SHORT),
    "HunyuanVideoImageToVideoPipeline": Whole(hunyuan_image_pipeline, pipeline=SHORT, image=True),
    "HunyuanSkyreelsImageToVideoPipeline": Whole(
        partial(
            hunyuan_video_pipeline,
            diffusers.HunyuanSkyreelsImageToVideoPipeline,
            in_channels=8,
            guidance_embeds=False,
        ),
        pipeline=SHORT,
        image=True,
    ),
    "HunyuanVideo15Pipeline": Whole(hunyuan_video15_pipeline, size={"height": 16, "width": 16}),
    "HunyuanVideo15ImageToVideoPipeline": Whole(
        partial(hunyuan_video15_pipeline, from_image=True), size=SQUARE, image=True
    ),
    "WanPipeline": Whole(partial(of_golden, diffusers.WanPipeline, wan, "wan"), pipeline=SHORT),
    "WanImageToVideoPipeline": Whole(
        partial(of_golden, diffusers.WanImageToVideoPipeline, wan, "wan", **wan.WITH_IMAGE), image=True
    ),
    "WanVACEPipeline": Whole(
        partial(
            of_golden,
            diffusers.WanVACEPipeline,
            wan,
            "wan",
            model=diffusers.WanVACETransformer3DModel,
            **wan.HINTS,
        ),
        pipeline=SHORT,
    ),
    "SkyReelsV2Pipeline": Whole(partial(of_golden, diffusers.SkyReelsV2Pipeline, skyreels_v2, "wan"), pipeline=SHORT),
    "SkyReelsV2ImageToVideoPipeline": Whole(
        partial(of_golden, diffusers.SkyReelsV2ImageToVideoPipeline, skyreels_v2, "wan", **skyreels_v2.WITH_IMAGE),
        image=True,
    ),
    "SkyReelsV2DiffusionForcingPipeline": Whole(
        partial(of_golden, skyreels_v2.FORCED, skyreels_v2, "wan"), pipeline=SHORT | {"base_num_frames": 97}
    ),
    "SkyReelsV2DiffusionForcingImageToVideoPipeline": Whole(
        partial(of_golden, skyreels_v2.FORCED_IMAGE, skyreels_v2, "wan"),
        pipeline=SHORT | {"base_num_frames": 97},
        image=True,
    ),
    "CosmosTextToWorldPipeline": Whole(
        partial(reading, cosmos.builder(diffusers.CosmosTextToWorldPipeline, cosmos.edm), 32),
        9,
        pipeline=SHORT,
        saved=False,
    ),
    "CosmosVideoToWorldPipeline": Whole(
        partial(reading, cosmos.builder(diffusers.CosmosVideoToWorldPipeline, cosmos.edm, **cosmos.WITH_MASK), 32),
        9,
        pipeline=SHORT,
        image=True,
        saved=False,
    ),
    "Cosmos2VideoToWorldPipeline": Whole(
        partial(reading, cosmos.builder(diffusers.Cosmos2VideoToWorldPipeline, cosmos.flow, **cosmos.WITH_MASK), 32),
        9,
        pipeline=SHORT,
        image=True,
        saved=False,
    ),
    "Kandinsky5T2VPipeline": Whole(partial(kandinsky5_pipeline, diffusers.Kandinsky5T2VPipeline), 9),
    "Kandinsky5I2VPipeline": Whole(  # it adjusts the first latent frames to later ones: 17 is the least
        partial(kandinsky5_pipeline, diffusers.Kandinsky5I2VPipeline, visual_cond=True), 17, image=True
    ),
    "EasyAnimatePipeline": Whole(partial(easyanimate_pipeline, diffusers.EasyAnimatePipeline), 9, negative="bad"),
    "EasyAnimateInpaintPipeline": Whole(
        partial(easyanimate_pipeline, diffusers.EasyAnimateInpaintPipeline, in_channels=12), 9, negative="bad"
    ),
    "SanaVideoPipeline": Whole(sana_pipeline(diffusers.SanaVideoPipeline), pipeline=PLAIN_SANA),
    "SanaImageToVideoPipeline": Whole(
        sana_pipeline(diffusers.SanaImageToVideoPipeline), pipeline=PLAIN_SANA, image=True
    ),
    "MotifVideoPipeline": Whole(
        partial(reading, motif_video.builder(diffusers.MotifVideoPipeline), 16), pipeline=SHORT, saved=False
    ),
    "MotifVideoImage2VideoPipeline": Whole(motif_image_pipeline, pipeline=SHORT, image=True, saved=False),
    "AnyFlowPipeline": Whole(partial(reading, wan.flow_map, WAN_TEXT, "umt5"), pipeline=SHORT),
    "HeliosPipeline": Whole(
        partial(reading, wan.in_chunks, WAN_TEXT, "umt5"), 9, pipeline=SHORT | {"num_latent_frames_per_chunk": 3}
    ),
    "ChronoEditPipeline": Whole(
        partial(
            of_golden,
            diffusers.ChronoEditPipeline,
            wan,
            "wan",
            model=diffusers.ChronoEditTransformer3DModel,
            **wan.WITH_IMAGE,
        ),
        image=True,
    ),
    "HunyuanVideoFramepackPipeline": Whole(
        framepack_pipeline, 9, pipeline=SHORT | {"latent_window_size": 2}, image=True
    ),
    "Cosmos2_5_PredictBasePipeline": Whole(cosmos25_pipeline, 9, pipeline=SHORT, saved=False),
    "LTX2InContextPipeline": Whole(partial(ltx2_pipeline, "LTX2InContextPipeline"), 9, pipeline=OWN),
    "LTX2HDRPipeline": Whole(partial(ltx2_pipeline, "LTX2HDRPipeline"), 9, pipeline=OWN),
}
