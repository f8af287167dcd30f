"""What does sharing save? The paper's scheme beside `accelerate`, on a Mochi of 48 blocks with random weights.

The paper's scheme is a stack of three, `[uncond | cond | perturbed]`, every row through every block, the perturbed
row of the skipped layer thrown away afterwards. Both sides denoise the same clip in one process, in turns, after
their results were found to agree. What is reported is the ratio of the median times.

    python bench/sharing.py                                       on this machine's CPU, narrow blocks
    python bench/sharing.py --device cuda --size full             Mochi as it is, 10B parameters, bfloat16
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import torch

import stgfast

LAYER, SCALE, CFG = 34, 1.0, 4.5
CPU = f"{torch.get_num_threads()} cores, {platform.machine()}"
NARROW = {  # all widths of Mochi divided by 12, so that blocks have their share of the work
    "num_attention_heads": 4,
    "attention_head_dim": 64,
    "pooled_projection_dim": 128,
    "text_embed_dim": 344,
}
SIZES = {"small": (NARROW, torch.float32, 256), "full": ({}, torch.bfloat16, 480)}  # configuration, dtype, height


def pipeline(size: str, device: str) -> Any:
    config, dtype, _ = SIZES[size]
    torch.manual_seed(0)
    with torch.device(device):
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            transformer = diffusers.MochiTransformer3DModel(**config)
        finally:
            torch.set_default_dtype(before)
    vae = diffusers.AutoencoderKLMochi(
        encoder_block_out_channels=(32,) * 4, decoder_block_out_channels=(32,) * 4, layers_per_block=(1,) * 5
    )
    parts = {"vae": vae.to(device), "text_encoder": None, "tokenizer": None, "transformer": transformer.eval()}
    pipe = diffusers.MochiPipeline(scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def arguments(pipe: Any, size: str, frames: int, steps: int) -> dict[str, Any]:
    _, dtype, height = SIZES[size]
    config, device = pipe.transformer.config, pipe.transformer.device
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(2, 1, config.max_sequence_length, config.text_embed_dim, generator=generator).to(device, dtype)
    mask = torch.arange(config.max_sequence_length, device=device)[None] < config.max_sequence_length // 4
    return {
        "prompt_embeds": text[0],
        "negative_prompt_embeds": text[1],
        "prompt_attention_mask": mask,
        "negative_prompt_attention_mask": mask,
        "height": height,
        "width": 848 if size == "full" else height,
        "num_frames": frames,
        "num_inference_steps": steps,
        "guidance_scale": CFG,
        "output_type": "latent",
        "generator": generator.manual_seed(1),
    }


@contextmanager
def papers_scheme(pipe: Any) -> Iterator[None]:
    """Within the block, the pipeline is guided as the paper's code does it, computing every row of a stack of three."""
    model = pipe.transformer
    block = model.transformer_blocks[LAYER]
    forward, block_forward = model.forward, block.forward

    def skipping(**kwargs: Any) -> Any:
        states = block_forward(**kwargs)
        given = (kwargs["hidden_states"], kwargs["encoder_hidden_states"])
        return tuple(torch.cat([new[:2], old[2:]]) for new, old in zip(states, given, strict=True))

    def stacked(**kwargs: Any) -> Any:
        three = {
            name: torch.cat([value, value[1:]]) if isinstance(value, torch.Tensor) and value.ndim else value
            for name, value in kwargs.items()
        }
        uncond, cond, perturbed = forward(**three)[0].float().chunk(3)
        guided = uncond + CFG * (cond - uncond) + SCALE * (cond - perturbed)
        return (torch.cat([guided, guided]),)

    with mock.patch.object(model, "forward", stacked), mock.patch.object(block, "forward", skipping):
        yield


def timed(call: Callable[[], Any], device: str) -> tuple[float, torch.Tensor]:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    latents = call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, latents


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--size", default="small", choices=sorted(SIZES))
    parser.add_argument("--frames", type=int, default=13)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--save", type=Path, help="a file to add the result to, as one line of JSON")
    options = parser.parse_args()

    pipe = pipeline(options.size, options.device)
    guidance = stgfast.Guidance(stgfast.Perturbation([LAYER], scale=SCALE))

    def stock() -> Any:
        return pipe(**arguments(pipe, options.size, options.frames, options.steps)).frames

    def paper() -> Any:
        with papers_scheme(pipe):
            return stock()

    def fast() -> Any:
        stgfast.accelerate(pipe, guidance)
        try:
            return stock()
        finally:
            stgfast.restore(pipe)

    sides = {"stock": stock, "paper": paper, "stgfast": fast}
    latents = {name: call().double() for name, call in sides.items()}  # and the warm-up
    error = float((latents["stgfast"] - latents["paper"]).norm() / latents["paper"].norm())
    allowed = 1e-5 if options.size == "small" else 5e-2
    if not error <= allowed:
        print(f"the two sides disagree: relative error {error:.2g}, allowed {allowed:.2g}; nothing was timed")
        return 1

    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(options.rounds):
        for name, call in sides.items():
            seconds[name].append(timed(call, options.device)[0])
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    row = {
        "bench": "sharing",
        "size": options.size,
        "frames": options.frames,
        "steps": options.steps,
        "rounds": options.rounds,
        "device": torch.cuda.get_device_name() if options.device == "cuda" else CPU,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "stgfast": stgfast.__version__,
        "relative error": error,
        "seconds": {name: round(value, 4) for name, value in medians.items()},
        "spread": {name: [round(min(values), 4), round(max(values), 4)] for name, values in seconds.items()},
        "paper / stgfast": round(medians["paper"] / medians["stgfast"], 3),
        "block-rows: paper / stgfast": round(144 / 109, 3),
        "stgfast / stock": round(medians["stgfast"] / medians["stock"], 3),
        "block-rows: stgfast / stock": round(109 / 96, 3),
    }
    print(json.dumps(row, indent=1))
    if options.save:
        options.save.parent.mkdir(parents=True, exist_ok=True)
        with options.save.open("a") as file:
            file.write(json.dumps(row) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
