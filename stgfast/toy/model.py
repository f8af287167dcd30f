"""The parts of the pipeline, small and untrained: diffusers' own classes, in an `LTXPipeline`.

Text tokens have a mask, so the padded length of prompts does not matter in the denoiser.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from stgfast.toy import videos

CHANNELS = 40  # of a latent: 4 frames of 16x16 pixels
LAYERS, HEADS, WIDTH = 12, 4, 28
TEXT = 64  # channels of a text token
PADDED = 128  # text tokens, the pipeline's default
WORDS = (
    *("a", "and", "over", "background", "moves", "turns"),
    *videos.COLOURS,
    *videos.KINDS,
    *videos.MOTIONS,
    *(pattern for pattern in videos.PATTERNS if pattern != "plain"),
    *dict.fromkeys(word for ground in videos.GROUNDS for word in ground.split()),
)
CALL = {"height": videos.SIZE, "width": videos.SIZE, "num_frames": videos.FRAMES}


def vae() -> Any:
    from diffusers import AutoencoderKLLTXVideo

    return AutoencoderKLLTXVideo(
        latent_channels=CHANNELS,
        block_out_channels=(24, 48, 64),
        decoder_block_out_channels=(32, 48),
        down_block_types=("LTXVideo095DownBlock3D",) * 2,
        downsample_type=("spatiotemporal",) * 2,
        layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(2, 1, 1),
        spatio_temporal_scaling=(True, True),
        decoder_spatio_temporal_scaling=(True, True),
        decoder_inject_noise=(False,) * 3,
        upsample_residual=(True,) * 2,
        upsample_factor=(1, 1),
        patch_size=4,
    )


def transformer(layers: int = LAYERS, heads: int = HEADS, width: int = WIDTH) -> Any:
    from diffusers import LTXVideoTransformer3DModel

    return LTXVideoTransformer3DModel(
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_attention_heads=heads,
        attention_head_dim=width,
        cross_attention_dim=heads * width,
        caption_channels=TEXT,
        num_layers=layers,
    )


def text_encoder() -> Any:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(
            vocab_size=len(WORDS) + 3,
            d_model=TEXT,
            d_kv=16,
            d_ff=2 * TEXT,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="relu",
        )
    )


def tokenizer() -> Any:
    """A tokenizer with one token for each word of prompts, and one for all other words."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    vocabulary = {word: number for number, word in enumerate([*special.values(), *WORDS])}
    built = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    built.normalizer = normalizers.Lowercase()
    built.pre_tokenizer = pre_tokenizers.Whitespace()
    built.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", vocabulary["</s>"])]
    )
    wrap: Any = PreTrainedTokenizerFast
    return wrap(tokenizer_object=built, model_max_length=PADDED, **special)


def pipeline(vae: Any, text_encoder: Any, transformer: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, LTXPipeline

    pipe = LTXPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer(),
        transformer=transformer,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def save(folder: Path, vae: Any, text_encoder: Any, transformer: Any) -> Path:
    """Save all parts in half precision except the text encoder: transformers loads it in its stored precision by
    default, and the rest of the pipeline must have the same.
    """
    pipe = pipeline(vae.half(), text_encoder.float(), transformer.half())
    pipe.save_pretrained(folder)
    # The name of the tokenizer's class that old and new versions of transformers know.
    for file, keys in (
        ("model_index.json", ("tokenizer", 1)),
        ("tokenizer/tokenizer_config.json", ("tokenizer_class",)),
    ):
        path = folder / file
        content = json.loads(path.read_text())
        inner = content
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = "PreTrainedTokenizerFast"
        path.write_text(json.dumps(content, indent=2) + "\n")
    return folder
