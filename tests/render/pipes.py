"""Tiny pipelines with text encoders: random weights, and a tokenizer of whole words."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

from stgfast import Guidance, Perturbation, accelerate
from stgfast.render.models import Named
from tests import models

WORDS = ("a", "red", "blue", "kite", "over", "the", "grey", "sea", "dog", "runs", "bad")
CALL = {"width": 32, "height": 32, "num_frames": 5, "steps": 2}  # of a job, small


def tokenizer(length: int = 16) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    vocabulary = {word: number for number, word in enumerate([*special.values(), *WORDS])}
    built = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    built.pre_tokenizer = pre_tokenizers.Whitespace()
    built.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", vocabulary["</s>"])]
    )
    return PreTrainedTokenizerFast(tokenizer_object=built, model_max_length=length, **special)


def text_encoder(width: int, kind: str) -> torch.nn.Module:
    config, model = (UMT5Config, UMT5EncoderModel) if kind == "umt5" else (T5Config, T5EncoderModel)
    made = model(config(vocab_size=len(WORDS) + 3, d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    models.spread(made, gain=1.0)
    return made.eval()


def pipeline(family: str = "wan", seed: int = 0) -> Any:
    """A pipeline of `tests.models` with a text encoder."""
    pipe = models.pipeline(family, models.transformer(family, seed=seed))
    settings = models.config(family)
    width = settings.get("text_embed_dim") or settings.get("caption_channels") or settings.get("text_dim")
    torch.manual_seed(seed)
    encoder = text_encoder(width, "umt5" if family == "wan" else "t5")
    pipe.register_modules(tokenizer=tokenizer(), text_encoder=encoder)
    return pipe


def named(build: Any, guidance: Guidance = Guidance(Perturbation([1]))) -> Named:  # noqa: B008
    """A model with a name in `stgfast.render.models.NAMED`."""
    return Named(build, "WanPipeline", guidance)


def guided() -> Any:
    return accelerate(pipeline("wan"), Guidance(Perturbation([1])))


NAMED = named(guided)
