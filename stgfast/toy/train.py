"""Train the toy model by one command: `python -m stgfast.toy.train --out DIR`.

First the VAE is trained on drawn videos. Then the text encoder and the transformer are trained together by flow
matching, on latents that are encoded once. Then the VAE's decoder alone is trained, for sharper pictures from the same
latents. The data of a step depends on the seed and its number only, and the same command continues where it was
stopped.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stgfast.toy import model, videos
from stgfast.toy.muon import Muon

log = logging.getLogger(__name__)

PART = 9  # frames that the VAE sees at a time, for most of its training
LONGEST = 20  # tokens of a prompt
DROPPED = 0.1  # the share of prompts that are left empty, for guidance

Loss = Callable[[torch.Generator, int], dict[str, Tensor]]  # the first is what is made smaller


@dataclass(frozen=True)
class Settings:
    out: Path
    seed: int = 0
    device: str = "cpu"
    bfloat16: bool = True
    vae_steps: int = 4500
    vae_batch: int = 6
    clips: int = 24576
    shard: int = 512  # clips in a file of latents
    steps: int = 10000
    batch: int = 32
    decoder_steps: int = 2500
    save_every: int = 100

    def autocast(self) -> AbstractContextManager[Any]:
        """Autocast for convolutions. The small matrices of the transformer gain nothing from it on a CPU."""
        return torch.autocast(self.device, torch.bfloat16, enabled=self.bfloat16)


class Stage:
    """A model in training, with an average of its weights, and checkpoints that are replaced atomically."""

    def __init__(
        self, name: str, network: nn.Module, settings: Settings, *, steps: int, average: float, rate: float = 0.01
    ):
        self.path = settings.out / f"{name}.pt"
        self.log = settings.out / f"{name}.jsonl"
        self.network = network.to(settings.device)
        self.settings, self.steps, self.average = settings, steps, average
        self.step = 0
        self.optimizer = optimizer(network, rate)
        self.averaged = {key: value.detach().clone() for key, value in network.state_dict().items()}
        if self.path.exists():
            saved = torch.load(self.path, map_location=settings.device)
            network.load_state_dict(saved["network"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.averaged, self.step = saved["averaged"], saved["step"]

    def run(self, loss: Loss) -> None:
        """Train to the end, and put the averaged weights into the network."""
        sums: dict[str, float] = {}
        began, first = time.perf_counter(), self.step
        self.network.train()
        while self.step < self.steps:
            for group in self.optimizer.param_groups:
                group["lr"] = group["highest"] * pace(self.step, self.steps)
            generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + self.step)
            terms = loss(generator, self.step)
            self.optimizer.zero_grad()
            next(iter(terms.values())).backward()
            nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
            self.optimizer.step()
            self.step += 1
            self.follow()
            for key, value in terms.items():
                sums[key] = sums.get(key, 0.0) + value.item()
            if self.step % 50 == 0 or self.step == self.steps:
                since = self.step - first
                means = {key: round(value / since, 5) for key, value in sums.items()}
                rate = round(since / (time.perf_counter() - began), 3)
                line = json.dumps({"step": self.step, **means, "steps_per_second": rate})
                log.info("%s %s", self.path.stem, line)
                with self.log.open("a") as file:
                    file.write(line + "\n")
                sums, began, first = {}, time.perf_counter(), self.step
            if self.step % self.settings.save_every == 0 or self.step == self.steps:
                self.save()
        self.network.load_state_dict(self.averaged)
        self.network.eval()

    def follow(self) -> None:
        """Update the average. It is short at first, so that it forgets the first weights."""
        part = 1 - min(self.average, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for key, value in self.network.state_dict().items():
                self.averaged[key].lerp_(value, part)

    def save(self) -> None:
        state = {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "averaged": self.averaged,
            "step": self.step,
        }
        written = self.path.with_suffix(".new")
        torch.save(state, written)
        os.replace(written, self.path)


def optimizer(network: nn.Module, rate: float) -> Muon:
    """Adam for vectors and embeddings, Muon for the rest."""
    tables = {id(module.weight) for module in network.modules() if isinstance(module, nn.Embedding)}
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for parameter in network.parameters():
        (others if parameter.ndim < 2 or id(parameter) in tables else matrices).append(parameter)
    return Muon(matrices, others, rate=rate, adam_rate=rate / 10)


def pace(step: int, steps: int) -> float:
    """The learning rate as a fraction of its maximum: a rise, a long constant part, and a fall over the last
    quarter.
    """
    return min(1.0, (step + 1) / min(200, steps), (steps - step) / (steps / 4))


def train_vae(settings: Settings) -> Any:
    torch.manual_seed(settings.seed)
    vae = model.vae()
    nn.init.constant_(vae.encoder.conv_out.conv.bias[-1:], -5.0)  # little noise, or nothing is learnt
    stage = Stage("vae", vae, settings, steps=settings.vae_steps, average=0.998)

    def loss(generator: torch.Generator, step: int) -> dict[str, Tensor]:
        first = step * settings.vae_batch
        drawn = videos.clips(settings.seed + 1, range(first, first + settings.vae_batch)).frames
        if step < 0.8 * settings.vae_steps:  # parts of clips teach nearly as much, and cost half
            start = int(torch.randint(videos.FRAMES - PART + 1, (), generator=generator))
            drawn = drawn[:, start : start + PART]
        frames = drawn.transpose(1, 2).to(settings.device) * 2 - 1
        with settings.autocast():
            posterior = vae.encode(frames).latent_dist
            mean, spread = posterior.mean.float(), posterior.logvar.float()
            noise = torch.randn(mean.shape, generator=generator).to(settings.device)
            decoded = vae.decode(mean + (spread / 2).exp() * noise).sample.float()
        return vae_loss(frames, decoded, mean, spread)

    stage.run(loss)
    return vae


def vae_loss(frames: Tensor, decoded: Tensor, mean: Tensor, spread: Tensor) -> dict[str, Tensor]:
    """The loss of pixels and edges, most of all where something moves, and a little of the usual divergence."""
    still = frames.mean(2, keepdim=True)
    moving = (frames - still).abs().amax(1, keepdim=True).clamp(0, 0.5) * 2
    weight = 1 + 4 * nn.functional.max_pool3d(moving, (1, 3, 3), 1, (0, 1, 1))
    pixels = ((decoded - frames).abs() * weight).mean()
    edges = sum(
        ((decoded.diff(dim=dim) - frames.diff(dim=dim)).abs() * weight.narrow(dim, 1, frames.shape[dim] - 1)).mean()
        for dim in (2, 3, 4)
    )
    divergence = 0.5 * (mean.square() + spread.exp() - 1 - spread).mean()
    error = (decoded - frames).square().mean()
    return {
        "loss": pixels + error + 0.3 * edges + 3e-4 * divergence,
        "pixels": pixels,
        "squares": error,
        "divergence": divergence,
    }


def train_decoder(settings: Settings, vae: Any) -> None:
    """Train the decoder on latents with a little noise, because generated latents are not perfect either."""

    def loss(generator: torch.Generator, step: int) -> dict[str, Tensor]:
        first = step * settings.vae_batch
        drawn = videos.clips(settings.seed + 5, range(first, first + settings.vae_batch)).frames
        frames = drawn.transpose(1, 2).to(settings.device) * 2 - 1
        with settings.autocast():
            with torch.no_grad():
                mean = vae.encode(frames).latent_dist.mean.float()
            decoded = vae.decode(mean + 0.1 * torch.randn(mean.shape, generator=generator).to(mean)).sample.float()
        return vae_loss(frames, decoded, mean, torch.zeros_like(mean))

    Stage("decoder", vae.decoder, settings, steps=settings.decoder_steps, average=0.998, rate=0.005).run(loss)


def encode(vae: Any, settings: Settings) -> tuple[Tensor, Tensor]:
    """Latents as token rows, and the token ids of their prompts. What is encoded already is loaded."""
    tokenizer = model.tokenizer()
    folder = settings.out / "latents"
    folder.mkdir(exist_ok=True)
    latents, ids = [], []
    shard = settings.shard
    for first in range(0, settings.clips, shard):
        path = folder / f"{first:06}.pt"
        if not path.exists():
            parts, prompts = [], []
            for start in range(first, first + shard, 8):
                drawn = videos.clips(settings.seed + 2, range(start, min(start + 8, first + shard)))
                with torch.no_grad(), settings.autocast():
                    frames = drawn.frames.transpose(1, 2).to(settings.device) * 2 - 1
                    parts.append(vae.encode(frames).latent_dist.mean.half().cpu())
                prompts += drawn.prompts
            words = tokenizer(prompts, padding="max_length", max_length=LONGEST, return_tensors="pt").input_ids
            written = path.with_suffix(".new")
            torch.save({"latents": torch.cat(parts), "ids": words}, written)
            os.replace(written, path)
            log.info("encoded %d of %d clips", first + shard, settings.clips)
        saved = torch.load(path)
        latents.append(saved["latents"])
        ids.append(saved["ids"])
    together = torch.cat(latents)[: settings.clips]
    some = together[:4096].float()
    vae.latents_mean.copy_(some.mean((0, 2, 3, 4)))
    vae.latents_std.copy_(some.std((0, 2, 3, 4)))
    mean, std = vae.latents_mean.cpu(), vae.latents_std.cpu()
    rows = together.flatten(2).transpose(1, 2)  # clip, token, channel
    return ((rows - mean) / std).half(), torch.cat(ids)[: settings.clips]


class Denoiser(nn.Module):
    """The text encoder and the transformer, called together."""

    def __init__(self, text: Any, transformer: Any):
        super().__init__()
        self.text, self.transformer = text, transformer

    def forward(self, noisy: Tensor, sigma: Tensor, ids: Tensor, padded: int) -> Tensor:
        # The pipeline's text encoder sees the padding too, the transformer does not.
        words = self.text(nn.functional.pad(ids, (0, padded - ids.shape[1])))[0][:, : ids.shape[1]]
        frames = (videos.FRAMES - 1) // 4 + 1
        side = videos.SIZE // 16
        predicted: Tensor = self.transformer(
            hidden_states=noisy,
            encoder_hidden_states=words,
            timestep=sigma * 1000,
            encoder_attention_mask=ids != 0,
            num_frames=frames,
            height=side,
            width=side,
            rope_interpolation_scale=(4 / 25, 16, 16),  # as the pipeline has it, at its 25 frames a second
            return_dict=False,
        )[0]
        return predicted


def train_denoiser(settings: Settings, latents: Tensor, ids: Tensor) -> Denoiser:
    torch.manual_seed(settings.seed)
    transformer = model.transformer()
    nn.init.zeros_(transformer.get_parameter("proj_out.weight"))
    denoiser = Denoiser(model.text_encoder(), transformer)
    stage = Stage("denoiser", denoiser, settings, steps=settings.steps, average=0.9995)
    empty = model.tokenizer()("", padding="max_length", max_length=LONGEST, return_tensors="pt").input_ids[0]

    def loss(generator: torch.Generator, step: int) -> dict[str, Tensor]:
        chosen = torch.randint(len(latents), (settings.batch,), generator=generator)
        clean, tokens = latents[chosen].float(), ids[chosen]
        dropped = torch.rand(settings.batch, generator=generator) < DROPPED
        tokens = torch.where(dropped[:, None], empty, tokens)
        # Most steps lie where motion is decided, a little above the middle.
        sigma = torch.sigmoid(torch.randn(settings.batch, generator=generator) + 0.3)
        noise = torch.randn(clean.shape, generator=generator)
        padded = model.PADDED if torch.rand((), generator=generator) < 0.5 else LONGEST
        noisy = clean.lerp(noise, sigma[:, None, None])
        on = settings.device
        predicted = denoiser(noisy.to(on), sigma.to(on), tokens.to(on), padded)
        return {"loss": (predicted - (noise - clean).to(on)).square().mean()}

    stage.run(loss)
    return denoiser


def train(settings: Settings) -> Path:
    """Train, and return the folder of the pipeline. Its weights are stored in half precision, and load in any."""
    settings.out.mkdir(parents=True, exist_ok=True)
    vae = train_vae(settings)
    denoiser = train_denoiser(settings, *encode(vae, settings))
    train_decoder(settings, vae)
    return model.save(settings.out / "pipeline", vae, denoiser.text, denoiser.transformer)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints and, at the end, `pipeline`")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--float32", dest="bfloat16", action="store_false", help="use float32, if bfloat16 is slow")
    for name in ("seed", "vae_steps", "clips", "steps", "batch", "decoder_steps"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(Settings, name))
    settings = Settings(**vars(parser.parse_args(argv)))
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    log.info("trained: %s", train(settings))


if __name__ == "__main__":
    main()
