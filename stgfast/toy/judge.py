"""What is visible in a clip: a small classifier of videos, and a tracker of coloured shapes.

The classifier is trained on drawn videos, independently of the model that it judges: `python -m stgfast.toy.judge --out
DIR`. For each colour it says whether a shape has it, which shape, and how it moves. So it works for clips with one
shape and with two.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from stgfast.toy import videos
from stgfast.toy.train import Settings, Stage

log = logging.getLogger(__name__)

COLOURS, GROUNDS = list(videos.COLOURS), list(videos.GROUNDS)
FEATURES = 128
ATTRIBUTES = ("colour", "shape", "motion", "ground", "pattern")
SHIPPED = Path(__file__).with_name("judge.safetensors")
REAL = 4096  # drawn clips; features of rendered clips are compared with theirs


@dataclass(frozen=True)
class Reading:
    """The classifier's scores, one row for each clip."""

    features: Tensor
    present: Tensor  # clip, colour
    kind: Tensor  # clip, colour, kind
    motion: Tensor  # clip, colour, motion
    ground: Tensor
    pattern: Tensor


class Judge(nn.Module):
    def __init__(self) -> None:
        super().__init__()

        def layer(before: int, after: int, stride: tuple[int, int, int], times: int = 1) -> list[nn.Module]:
            conv = nn.Conv3d(before, after, (times, 3, 3), stride, padding=(times // 2, 1, 1), bias=False)
            return [conv, nn.GroupNorm(8, after), nn.ReLU()]

        # Every frame by itself down to what a shape is; then how that changes.
        self.layers = nn.Sequential(
            nn.Conv3d(3 + len(COLOURS) + 1, 16, (1, 5, 5), (1, 2, 2), padding=(0, 2, 2)),
            nn.ReLU(),
            *layer(16, 32, (1, 2, 2)),
            *layer(32, 48, (1, 1, 1)),
            *layer(48, 64, (1, 2, 2)),
            *layer(64, 64, (1, 1, 1)),
            *layer(64, 96, (2, 1, 1), times=3),
            *layer(96, FEATURES, (2, 2, 2), times=3),
        )
        self.sizes = {"present": 1, "kind": len(videos.KINDS), "motion": len(videos.MOTIONS)}
        self.about = nn.Sequential(
            nn.Linear(FEATURES + 1, FEATURES), nn.ReLU(), nn.Linear(FEATURES, sum(self.sizes.values()))
        )
        self.back = nn.Linear(FEATURES, len(GROUNDS) + len(videos.PATTERNS))

    def forward(self, frames: Tensor) -> Reading:
        """Classify frames from 0 to 1: clip, frame, channel, y, x."""
        near = torch.stack([nearness(frames, colour) for colour in COLOURS], 1)
        seen = self.layers(torch.cat([frames.transpose(1, 2) * 2 - 1, near, near.amax(1, keepdim=True)], 1))
        # What is seen where a colour is, and how much of the colour there is: clip, colour, feature.
        where = nn.functional.adaptive_avg_pool3d(near, seen.shape[2:]).flatten(2)
        amount = where.mean(2, keepdim=True)
        shapes = where @ seen.flatten(2).transpose(1, 2).to(where.dtype) / (where.sum(2, keepdim=True) + 1e-4)
        about = self.about(torch.cat([shapes, (amount + 1e-4).log()], 2))
        present, kind, motion = about.split(list(self.sizes.values()), -1)
        features = seen.mean((2, 3, 4))
        ground, pattern = self.back(features).split([len(GROUNDS), len(videos.PATTERNS)], -1)
        return Reading(features, present[..., 0], kind, motion, ground, pattern)


def labels(scenes: Sequence[videos.Scene]) -> dict[str, Tensor]:
    """Class numbers; -1 for the shape and motion of a colour that is absent."""
    made = {name: torch.full((len(scenes), len(COLOURS)), -1) for name in ("kind", "motion")}
    for n, scene in enumerate(scenes):
        for shape in scene.shapes:
            colour = COLOURS.index(shape.colour)
            made["kind"][n, colour] = videos.KINDS.index(shape.kind)
            made["motion"][n, colour] = videos.MOTIONS.index(shape.motion)
    made["ground"] = torch.tensor([GROUNDS.index(scene.ground) for scene in scenes])
    made["pattern"] = torch.tensor([videos.PATTERNS.index(scene.pattern) for scene in scenes])
    return made


def right(reading: Reading, scenes: Sequence[videos.Scene]) -> dict[str, Tensor]:
    """For each clip and attribute, the fraction of what the prompt says that is seen.

    Shape and motion are read at the colours with the best scores, so that a wrong colour is one mistake.
    """
    found: dict[str, list[float]] = {name: [] for name in ATTRIBUTES}
    for n, scene in enumerate(scenes):
        count = len(scene.shapes)
        seen = {COLOURS[int(index)]: int(index) for index in reading.present[n].topk(count).indices}
        spare = [index for colour, index in seen.items() if colour not in {shape.colour for shape in scene.shapes}]
        hits = {"colour": 0, "shape": 0, "motion": 0}
        for shape in scene.shapes:
            index = seen[shape.colour] if shape.colour in seen else spare.pop()
            hits["colour"] += COLOURS[index] == shape.colour
            hits["shape"] += videos.KINDS[int(reading.kind[n, index].argmax())] == shape.kind
            hits["motion"] += videos.MOTIONS[int(reading.motion[n, index].argmax())] == shape.motion
        for name, hit in hits.items():
            found[name].append(hit / count)
        found["ground"].append(float(GROUNDS[int(reading.ground[n].argmax())] == scene.ground))
        found["pattern"].append(float(videos.PATTERNS[int(reading.pattern[n].argmax())] == scene.pattern))
    return {name: torch.tensor(values) for name, values in found.items()}


def nearness(frames: Tensor, colour: str) -> Tensor:
    """1 for pixels close to a colour, 0 for distant ones: like `frames`, without channels."""
    wanted = frames.new_tensor(videos.COLOURS[colour])[:, None, None]
    distance: Tensor = (frames - wanted).square().sum(-3).sqrt()
    return ((0.45 - distance) / 0.2).clamp(0, 1)


def track(frames: Tensor, colour: str) -> Tensor:
    """x and y of the shape with a colour, in each frame of one clip; NaN if fewer than 12 pixels have the colour."""
    weight = nearness(frames, colour)  # frame, y, x
    line = torch.arange(frames.shape[-1], device=frames.device) + 0.5
    mass = weight.sum((1, 2))
    sums = torch.stack([(weight.sum(1) * line).sum(1), (weight.sum(2) * line).sum(1)], -1)
    sums[mass < 12] = torch.nan
    place: Tensor = sums / mass[:, None]
    return place


def save(path: Path, judge: Judge, real: Tensor) -> None:
    """The weights as bytes, with a scale for each output of a layer, and the distribution of features of drawn
    clips.
    """
    from safetensors.torch import save_file

    kept = {"real.mean": real.mean(0), "real.covariance": real.T.cov()}
    for name, weight in judge.state_dict().items():
        if weight.ndim > 1:
            scale = weight.abs().amax(tuple(range(1, weight.ndim)), keepdim=True) / 127
            kept |= {name: (weight / scale).round().to(torch.int8), f"{name}.scale": scale}
        else:
            kept[name] = weight
    save_file({name: value.contiguous() for name, value in kept.items()}, path)


def load(path: Path = SHIPPED) -> tuple[Judge, Tensor, Tensor]:
    """The judge, with the mean and covariance of the features of drawn clips."""
    from safetensors.torch import load_file

    kept = load_file(path)
    mean, covariance = (kept.pop(f"real.{name}") for name in ("mean", "covariance"))
    scales = {name.removesuffix(".scale"): kept.pop(name) for name in list(kept) if name.endswith(".scale")}
    judge = Judge()
    judge.load_state_dict({name: value * scales[name] if name in scales else value for name, value in kept.items()})
    return judge.eval(), mean, covariance


def judge_loss(reading: Reading, truth: dict[str, Tensor]) -> dict[str, Tensor]:
    there = (truth["kind"] >= 0).float()
    presence = nn.functional.binary_cross_entropy_with_logits(reading.present, there)
    terms = {"presence": presence * 3}
    for name in ("kind", "motion", "ground", "pattern"):
        scores: Tensor = getattr(reading, name)
        terms[name] = nn.functional.cross_entropy(
            scores.flatten(0, -2), truth[name].flatten(), ignore_index=-1, label_smoothing=0.02
        )
    return {"loss": torch.stack(list(terms.values())).sum(), **terms}


def degraded(frames: Tensor, generator: torch.Generator) -> Tensor:
    """A clip with blur or noise, which do not change what it shows."""
    soft: Tensor = nn.functional.avg_pool2d(frames.flatten(0, 1), 3, 1, 1, count_include_pad=False).view_as(frames)
    amount, strength = torch.rand(2, len(frames), 1, 1, 1, 1, generator=generator)
    made: Tensor = frames.lerp(soft, amount) + 0.06 * strength * torch.randn(frames.shape, generator=generator)
    return made


def train(settings: Settings, *, steps: int = 2400, batch: int = 16) -> Judge:
    settings.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(settings.seed)
    judge = Judge()

    def loss(generator: torch.Generator, step: int) -> dict[str, Tensor]:
        drawn = videos.clips(settings.seed + 3, range(step * batch, (step + 1) * batch))
        truth = {name: value.to(settings.device) for name, value in labels(drawn.scenes).items()}
        with settings.autocast():
            reading = judge(degraded(drawn.frames, generator).to(settings.device))
        return judge_loss(reading, truth)

    Stage("judge", judge, settings, steps=steps, average=0.998).run(loss)
    return judge


@torch.no_grad()
def features_of_drawn(judge: Judge, seed: int, count: int) -> Tensor:
    """Features of drawn clips as they would be stored: in whole levels of brightness."""
    parts = []
    for first in range(0, count, 64):
        frames = videos.clips(seed, range(first, min(first + 64, count))).frames
        parts.append(judge((frames * 255).round() / 255).features)
    return torch.cat(parts)


@torch.no_grad()
def accuracy(judge: Judge, seed: int, count: int = 1024) -> dict[str, float]:
    """The accuracy on drawn clips that the judge was not trained on, and the error of the tracker in pixels."""
    sums: dict[str, float] = dict.fromkeys((*ATTRIBUTES, "track"), 0.0)
    singles = 0
    for first in range(0, count, 64):
        drawn = videos.clips(seed, range(first, min(first + 64, count)))
        for name, values in right(judge(drawn.frames), drawn.scenes).items():
            sums[name] += float(values.sum()) / count
        for n, scene in enumerate(drawn.scenes):
            if len(scene.shapes) == 1:
                found = track(drawn.frames[n], scene.shapes[0].colour)
                sums["track"] += float((found - drawn.tracks[n, 0]).norm(dim=-1).mean())
                singles += 1
    return {**sums, "track": sums["track"] / max(1, singles)}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    settings = Settings(arguments.out, seed=arguments.seed, device=arguments.device)
    trained = train(settings, steps=arguments.steps).cpu()
    path = settings.out / SHIPPED.name
    save(path, trained, features_of_drawn(trained, settings.seed + 6, REAL))
    log.info("%s, on held-out clips: %s", path, accuracy(load(path)[0], settings.seed + 4))


if __name__ == "__main__":
    main()
