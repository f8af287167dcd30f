"""Videos drawn by a program: coloured shapes move, turn and cross over backgrounds, as a short sentence says.

Clip `i` of seed `s` depends on these two numbers only, whatever else is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

SIZE, FRAMES = 64, 17  # pixels along an edge; one frame and four groups of four
COLOURS = {
    "red": (0.93, 0.12, 0.10),
    "green": (0.15, 0.80, 0.20),
    "blue": (0.20, 0.45, 1.00),
    "yellow": (0.98, 0.88, 0.10),
    "purple": (0.72, 0.20, 0.88),
    "white": (0.97, 0.97, 0.97),
}
KINDS = ("circle", "square", "triangle", "star")
MOVES = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # y grows downwards, as in pictures
TURNS = {"clockwise": 1, "anticlockwise": -1}
MOTIONS = (*MOVES, *TURNS)
GROUNDS = {
    "black": (0.03, 0.03, 0.03),
    "grey": (0.40, 0.40, 0.40),
    "dark blue": (0.04, 0.08, 0.36),
    "dark green": (0.04, 0.25, 0.10),
    "brown": (0.34, 0.19, 0.07),
}
PATTERNS = ("plain", "striped", "checked")
PAIRS = 0.25  # the share of clips with two shapes

CORNERS = {"circle": 1, "square": 4, "triangle": 3, "star": 5}
DENT = 0.45  # how far a star's inner corners are out, beside its outer ones


@dataclass(frozen=True)
class Shape:
    colour: str
    kind: str
    motion: str

    def __str__(self) -> str:
        verb = "moves" if self.motion in MOVES else "turns"
        return f"a {self.colour} {self.kind} {verb} {self.motion}"


@dataclass(frozen=True)
class Scene:
    """What a prompt says. The first of two shapes is in front."""

    shapes: tuple[Shape, ...]
    ground: str
    pattern: str = "plain"

    def __str__(self) -> str:
        look = "" if self.pattern == "plain" else f"{self.pattern} "
        return f"{' and '.join(map(str, self.shapes))} over a {look}{self.ground} background"

    @classmethod
    def parse(cls, prompt: str) -> Scene:
        """The scene of a prompt; a sentence of another form is a `ValueError`."""
        try:
            front, _, back = prompt.removesuffix(" background").partition(" over a ")
            parts = (part.split() for part in front.split(" and "))
            shapes = tuple(Shape(colour, kind, motion) for _, colour, kind, _, motion in parts)
            first, _, rest = back.partition(" ")
            scene = cls(shapes, rest, first) if first in PATTERNS else cls(shapes, back)
        except ValueError:
            scene = None
        if scene is None or str(scene) != prompt or not scene.known():
            form = "a <colour> <shape> moves left [and a ...] over a [striped] <colour> background"
            raise ValueError(f"prompt: got {prompt!r}, expected the form {form!r} and words of stgfast.toy.videos")
        return scene

    def known(self) -> bool:
        shapes = all(
            shape.colour in COLOURS and shape.kind in KINDS and shape.motion in MOTIONS for shape in self.shapes
        )
        return shapes and self.ground in GROUNDS and self.pattern in PATTERNS


@dataclass(frozen=True)
class Path:
    """A shape and its movement. Lengths are pixels, angles radians, `speed` is per frame."""

    shape: Shape
    centre: tuple[float, float]  # in the middle of the clip
    speed: float
    radius: float  # of a circle of the same area
    angle: float
    tint: tuple[float, float, float]

    def at(self, frames: int = FRAMES) -> np.ndarray:
        """x, y and angle in each frame."""
        times = np.arange(frames) - (frames - 1) / 2
        move, turn = MOVES.get(self.shape.motion, (0, 0)), TURNS.get(self.shape.motion, 0)
        start, way = np.array([*self.centre, self.angle]), np.array([*move, turn])
        places: np.ndarray = start + self.speed * times[:, None] * way
        return places


@dataclass(frozen=True)
class Plan:
    """Everything from which a clip is drawn."""

    scene: Scene
    paths: tuple[Path, ...]
    base: tuple[float, float, float]
    contrast: float  # of the two shades of the background
    period: float  # of stripes and checks
    angle: float  # across which a background changes
    phase: tuple[float, float]


@dataclass(frozen=True)
class Clips:
    frames: Tensor  # clip, frame, channel, y, x; from 0 to 1
    scenes: tuple[Scene, ...]
    tracks: Tensor  # clip, shape, frame, (x, y); NaN where a clip has one shape

    @property
    def prompts(self) -> list[str]:
        return [str(scene) for scene in self.scenes]


def clips(seed: int, indices: Iterable[int], scenes: Sequence[Scene] | None = None) -> Clips:
    """The clips with these indices; with `scenes`, of these scenes instead of random ones."""
    plans = [plan(seed, index, scenes[n] if scenes else None) for n, index in enumerate(indices)]
    tracks = torch.full((len(plans), 2, FRAMES, 2), math.nan)
    for n, made in enumerate(plans):
        for m, path in enumerate(made.paths):
            tracks[n, m] = torch.from_numpy(path.at()[:, :2]).float()
    # A few at a time stay in the processor's cache, and take less than half of the time.
    frames = torch.cat([draw(plans[first : first + 8]) for first in range(0, len(plans), 8)])
    return Clips(frames, tuple(made.scene for made in plans), tracks)


def random_scene(random: np.random.Generator) -> Scene:
    count = 2 if random.random() < PAIRS else 1
    colours = random.permutation(list(COLOURS))[:count]
    shapes = []
    for colour in colours:
        kind = str(random.choice(KINDS))
        # Nobody sees a circle turn.
        motion = str(random.choice(list(MOVES) if kind == "circle" else MOTIONS))
        shapes.append(Shape(str(colour), kind, motion))
    return Scene(tuple(shapes), str(random.choice(list(GROUNDS))), str(random.choice(PATTERNS)))


def plan(seed: int, index: int, scene: Scene | None = None) -> Plan:
    random = np.random.default_rng((seed, index))
    chosen = random_scene(random)
    scene = scene or chosen
    paths: list[Path] = []
    for shape in scene.shapes:
        single = len(scene.shapes) == 1
        radius = random.uniform(8.5, 11) if single else random.uniform(7, 8.5)
        along, across = random.uniform(-3, 3), random.uniform(-13, 13)
        move = MOVES.get(shape.motion)
        if paths:
            centre = _beside(paths[0], shape, random)
        elif move is None:
            centre = tuple(SIZE / 2 + random.uniform(-11, 11, 2))
        else:
            centre = (SIZE / 2 + (along, across)[abs(move[1])], SIZE / 2 + (along, across)[abs(move[0])])
        speed = random.uniform(1.2, 2.0) if move else math.radians(random.uniform(6, 10))
        angle = random.uniform(-0.2, 0.2) if move else random.uniform(0, math.tau)
        paths.append(Path(shape, centre, speed, radius, angle, _tinted(COLOURS[shape.colour], random)))
    return Plan(
        scene,
        tuple(paths),
        _tinted(GROUNDS[scene.ground], random),
        contrast=random.uniform(0.35, 0.5),
        period=random.uniform(18, 26),
        angle=random.uniform(0, math.tau) if scene.pattern == "plain" else random.integers(2) * math.pi / 2,
        phase=tuple(random.uniform(0, 1, 2)),
    )


def _beside(first: Path, shape: Shape, random: np.random.Generator) -> tuple[float, float]:
    """The position of the second shape at half time: near the first if their paths cross, else apart."""
    one, other = (MOVES.get(name) for name in (first.shape.motion, shape.motion))
    cross = one is not None and other is not None and one != other
    axis = 1 if (one or other or (0, 1))[0] else 0  # apart means across the way of what moves
    far = random.uniform(2, 8) if cross else random.uniform(22, 26)
    centre = [first.centre[0] + random.uniform(-4, 4), first.centre[1] + random.uniform(-4, 4)]
    centre[axis] += far if first.centre[axis] < SIZE / 2 else -far
    return centre[0], centre[1]


def _tinted(colour: tuple[float, float, float], random: np.random.Generator) -> tuple[float, float, float]:
    red, green, blue = np.clip(np.array(colour) + random.uniform(-0.03, 0.03, 3), 0, 1)
    return float(red), float(green), float(blue)


def draw(plans: Sequence[Plan]) -> Tensor:
    """Frames from 0 to 1, anti-aliased: a pixel is covered by the distance of its center from an edge."""
    line = torch.arange(SIZE) + 0.5
    y, x = torch.meshgrid(line, line, indexing="ij")
    frames = _grounds(plans, x, y)[:, None].repeat(1, FRAMES, 1, 1, 1)
    for depth in (1, 0):  # from the back to the front
        drawn = [n for n, made in enumerate(plans) if len(made.paths) > depth]
        if drawn:
            paths = [plans[n].paths[depth] for n in drawn]
            cover = covered(paths, x, y)[:, :, None]
            tint = torch.tensor([path.tint for path in paths])[:, None, :, None, None]
            frames[drawn] += cover * (tint - frames[drawn])
    return frames


def covered(paths: Sequence[Path], x: Tensor, y: Tensor) -> Tensor:
    """How much of each pixel a shape covers: path, frame, y, x."""
    places = torch.from_numpy(np.stack([path.at() for path in paths])).float()
    left, top, angle = (places[:, :, n, None, None] for n in range(3))
    across, down = x - left, y - top
    radius = _column([path.radius for path in paths])
    distance = torch.hypot(across, down)
    edge = distance - radius
    cornered = [n for n, path in enumerate(paths) if path.shape.kind != "circle"]
    if cornered:
        kinds = [paths[n].shape.kind for n in cornered]
        corners = _column([float(CORNERS[kind]) for kind in kinds])
        half = math.pi / corners  # of the angle between two corners
        dent = _column([DENT if kind == "star" else math.cos(math.pi / CORNERS[kind]) for kind in kinds])
        outer = radius[cornered] * (math.pi / (corners * dent * half.sin())).sqrt()
        # Corners point upwards at angle 0, but for the square, which stands on a side.
        up = _column([math.pi / 4 if kind == "square" else 0.0 for kind in kinds])
        turned = torch.atan2(across[cornered], -down[cornered]) - angle[cornered] + up
        # All sides fold onto one half of a side: from an outer corner on the axis to an inner one.
        folded = (torch.remainder(turned + half, 2 * half) - half).abs()
        along, aside = distance[cornered] * folded.cos(), distance[cornered] * folded.sin()
        side_x, side_y = outer * dent * half.cos() - outer, outer * dent * half.sin()
        edge[cornered] = ((along - outer) * side_y - aside * side_x) / torch.hypot(side_x, side_y)
    return (0.5 - edge).clamp(0, 1)


def _grounds(plans: Sequence[Plan], x: Tensor, y: Tensor) -> Tensor:
    angle, period, contrast = (_column([getattr(made, name) for made in plans])[:, 0] for name in _NUMBERS)
    phases = [_column([made.phase[n] for made in plans])[:, 0] for n in range(2)]
    across = (x - SIZE / 2) * angle.cos() + (y - SIZE / 2) * angle.sin()
    along = (y - SIZE / 2) * angle.cos() - (x - SIZE / 2) * angle.sin()
    waves = [_wave(place, period, phase) for place, phase in zip((across, along), phases, strict=True)]
    patterns = [made.scene.pattern for made in plans]
    looks = {"plain": across / SIZE, "striped": waves[0], "checked": waves[0] * waves[1]}
    look = torch.stack([looks[pattern][n] for n, pattern in enumerate(patterns)])
    base = torch.tensor([made.base for made in plans])[:, :, None, None]
    return (base + (base + 0.08) * contrast[:, None] * look[:, None]).clamp(0, 1)


_NUMBERS = ("angle", "period", "contrast")


def _wave(place: Tensor, period: Tensor, phase: Tensor) -> Tensor:
    """A square wave from -1 to 1 with edges one pixel wide."""
    folded = (torch.remainder(place / period + phase, 1) - 0.5).abs() * period  # 0 to half a period and back
    return ((folded - period / 4) * 2).clamp(-1, 1)


def _column(numbers: Sequence[float]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float32)[:, None, None, None]
