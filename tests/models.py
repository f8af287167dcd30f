"""Tiny pipelines of every supported family, built from configurations with seeded random weights."""

from __future__ import annotations

import copy
import json
import weakref
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.numpy import load_file

diffusers.utils.logging.set_verbosity_error()  # it warns about every cast of a random model

GOLDEN = Path(__file__).parent / "golden"
FAMILIES = ("mochi", "ltx", "cogvideox", "hunyuan", "wan")


@cache
def index() -> dict[str, Any]:
    return json.loads((GOLDEN / "index.json").read_text())


def config(family: str) -> dict[str, Any]:
    loaded = json.loads((GOLDEN / family / "config.json").read_text())
    return {name: value for name, value in loaded.items() if not name.startswith("_")}


def stored(family: str, name: str) -> dict[str, torch.Tensor]:
    """The tensors of a golden file."""
    return {name: torch.from_numpy(array) for name, array in load_file(GOLDEN / family / name).items()}


@cache
def weights(family: str) -> dict[str, torch.Tensor]:
    return stored(family, "transformer.safetensors")


def transformer(family: str, seed: int | None = None, **changes: Any) -> torch.nn.Module:
    """The golden model of a family, or a random one with a seed or other settings."""
    cls = getattr(diffusers, index()["models"][family]["transformer"])
    torch.manual_seed(seed or 0)
    model = cls(**{**config(family), **changes})
    if seed is None and not changes:
        model.load_state_dict(weights(family))
    else:
        spread(model)
    return model.eval()


def spread(model: torch.nn.Module, gain: float = 1.5) -> None:
    """Replace weights, because rows hardly differ with initial ones. A smaller gain is for models that amplify
    roundings.
    """
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "norm" not in name:
            torch.nn.init.normal_(parameter, std=gain / parameter[0].numel() ** 0.5)
        elif name.endswith("bias") or "pos_frequencies" in name:
            torch.nn.init.normal_(parameter, std=0.1)


def pipeline(
    family: str, model: torch.nn.Module | None = None, dtype: torch.dtype = torch.float32, scheduler: Any = None
) -> Any:
    """A pipeline without text encoders: prompts are embeddings."""
    built = index()["models"][family]
    model = transformer(family) if model is None else model
    torch.manual_seed(0)
    vae = getattr(diffusers, built["vae"])(**built["vae_config"]).eval()
    if scheduler is None:
        scheduler = getattr(diffusers, built["scheduler"])(**built["scheduler_config"])
    parts = {"transformer": model, "vae": vae, "scheduler": scheduler, "text_encoder": None, "tokenizer": None}
    if family == "hunyuan":
        parts |= {"text_encoder_2": None, "tokenizer_2": None}
    pipe = getattr(diffusers, built["pipeline"])(**parts)
    if dtype is not torch.float32:  # otherwise its models have the dtype in which they were built
        pipe.to(dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


# The pipelines that `shared` copies, by their builder, its arguments and dtype.
_built: weakref.WeakKeyDictionary[Callable[..., Any], dict[Any, Any]] = weakref.WeakKeyDictionary()


def shared(build: Callable[..., Any], *given: Any, **named: Any) -> Any:
    """A pipeline of its own, as built with these arguments. Its models are shared with other tests, so they must not be
    changed: building them takes as long as running the test.
    """
    built = _built.setdefault(build, {})
    key = given, tuple(sorted(named.items())), torch.get_default_dtype()
    if key not in built:
        built[key] = build(*given, **named)
    models = {id(part): part for part in built[key].components.values() if isinstance(part, torch.nn.Module)}
    return copy.deepcopy(built[key], models)


def prompt(family: str, prompts: int = 1, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Random embeddings for `prompts` prompts; the first ones are the same for any number of prompts."""
    settings = config(family)
    width = settings.get("text_embed_dim") or settings.get("caption_channels") or settings.get("text_dim")
    masked = {"mochi": torch.bool, "ltx": torch.int64, "hunyuan": torch.int64}
    made: list[dict[str, torch.Tensor]] = []
    for number in range(prompts):
        generator = torch.Generator().manual_seed(1000 * seed + number)
        one = {}
        for side in ("", "negative_"):
            one[f"{side}prompt_embeds"] = torch.randn(1, 16, width, generator=generator).to(dtype)
            if family in masked:
                length = int(torch.randint(4, 17, (1,), generator=generator))
                mask = (torch.arange(16) < length).to(masked[family])[None]
                one[f"{side}prompt_attention_mask"] = mask
            if family == "hunyuan":
                pooled = torch.randn(1, settings["pooled_projection_dim"], generator=generator).to(dtype)
                one[f"{side}pooled_prompt_embeds"] = pooled
        made.append(one)
    return {name: torch.cat([one[name] for one in made]) for name in made[0]}


def sizes(family: str, **changes: Any) -> dict[str, Any]:
    """The arguments of a small call, with latents as output."""
    return {**index()["models"][family]["call"], **changes}


def generators(count: int, seed: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed + number) for number in range(count)]
