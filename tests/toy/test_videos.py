"""Drawn videos: the same from the same numbers, and their pixels show what their sentences say."""

import math

import pytest
import torch

from stgfast.toy import videos
from stgfast.toy.videos import Scene, Shape

SEED = 7


def drawn(text, count=1):
    return videos.clips(SEED, range(count), [Scene.parse(text)] * count)


def cover(clips, colour):
    """The pixels that are nearer to a colour than to all others."""
    palette = torch.tensor([*videos.COLOURS.values(), *videos.GROUNDS.values()])
    distance = (clips.frames.unsqueeze(-4) - palette[:, :, None, None]).square().sum(-3)
    return distance.argmin(-3) == list(videos.COLOURS).index(colour)


def middle(mask):
    line = torch.arange(videos.SIZE) + 0.5
    mass = mask.float().sum((-1, -2))
    return torch.stack([(mask.sum(-2) * line).sum(-1), (mask.sum(-1) * line).sum(-1)], -1) / mass[..., None]


def test_same_numbers_same_clip():
    many, one = videos.clips(SEED, range(6)), videos.clips(SEED, [4])
    assert many.prompts[4] == one.prompts[0]
    assert torch.equal(many.frames[4], one.frames[0])
    assert not torch.equal(many.frames[4], videos.clips(SEED + 1, [4]).frames[0])
    assert many.frames.shape == (6, videos.FRAMES, 3, videos.SIZE, videos.SIZE)
    assert many.frames.min() >= 0
    assert many.frames.max() <= 1


def test_every_prompt_reads_back():
    scenes = [videos.plan(SEED, index).scene for index in range(300)]
    assert [Scene.parse(str(scene)) for scene in scenes] == scenes
    assert {len(scene.shapes) for scene in scenes} == {1, 2}
    seen = {shape for scene in scenes for shape in scene.shapes}
    for name, values in (("colour", videos.COLOURS), ("kind", videos.KINDS), ("motion", videos.MOTIONS)):
        assert {getattr(shape, name) for shape in seen} == set(values)
    assert {scene.ground for scene in scenes} == set(videos.GROUNDS)
    assert {scene.pattern for scene in scenes} == set(videos.PATTERNS)


@pytest.mark.parametrize("prompt", ["", "a cat", "a red square moves left", "a red square turns left over a grey wall"])
def test_other_sentences_are_refused(prompt):
    with pytest.raises(ValueError, match="expected the form"):
        Scene.parse(prompt)


@pytest.mark.parametrize("motion", videos.MOVES)
def test_a_shape_moves_as_told(motion):
    clips = drawn(f"a red star moves {motion} over a striped dark blue background", 3)
    places = middle(cover(clips, "red"))
    assert (places - clips.tracks[:, 0]).abs().max() < 1
    step = (places[:, -1] - places[:, 0]) / (videos.FRAMES - 1)
    way = torch.tensor(videos.MOVES[motion], dtype=torch.float32)
    speed = step @ way
    assert ((speed > 1.1) & (speed < 2.1)).all()
    assert (step - speed[:, None] * way).abs().max() < 0.1


@pytest.mark.parametrize("turn", videos.TURNS)
def test_a_shape_turns_as_told(turn):
    """The tip of a triangle is the pixel farthest from the middle, followed from frame to frame."""
    path = videos.plan(SEED, 0, Scene((Shape("red", "triangle", turn),), "black")).paths[0]
    angles = path.at()[:, 2]
    clip = drawn(f"a red triangle turns {turn} over a black background").frames[0]
    line = torch.arange(videos.SIZE) + 0.5
    for angle, frame in zip(angles, clip, strict=True):
        # Red reaches from the centre to each corner, but not as far between two corners.
        for offset, red in ((0, True), (math.pi / 3, False)):
            x = path.centre[0] + 1.2 * path.radius * math.sin(angle + offset)
            y = path.centre[1] - 1.2 * path.radius * math.cos(angle + offset)
            column, row = (int((line - value).abs().argmin()) for value in (x, y))
            assert bool(frame[0, row, column] > 0.5) == red
    assert (angles[-1] > angles[0]) == (turn == "clockwise")


def test_shapes_have_one_area_and_smooth_edges():
    x = torch.arange(videos.SIZE) + 0.5
    x, y = torch.meshgrid(x, x, indexing="xy")
    for kind in videos.KINDS:
        path = videos.Path(Shape("red", kind, "left"), (32, 32), 0.0, 10.0, 0.1, (1, 0, 0))
        covered = videos.covered([path], x, y)
        assert covered[0, 0].sum() == pytest.approx(math.pi * 100, rel=0.03)
        partly = ((covered > 0.02) & (covered < 0.98))[0, 0].sum()
        assert 30 < partly < 200


def test_of_two_shapes_the_first_is_in_front():
    text = "a white square moves left and a red circle moves right over a black background"
    clips = drawn(text, 4)
    both = clips.tracks[:, :, videos.FRAMES // 2].round().long()
    for clip, place in zip(clips.frames, both, strict=True):
        assert clip[videos.FRAMES // 2, :, place[0, 1], place[0, 0]].min() > 0.9
    assert not clips.tracks.isnan().any()
    alone = drawn("a white square moves left over a black background")
    assert alone.tracks[:, 1].isnan().all()


def test_patterns_differ_along_the_ground():
    for pattern, least in (("plain", 0.0), ("striped", 0.1), ("checked", 0.1)):
        look = "" if pattern == "plain" else f"{pattern} "
        clips = drawn(f"a red circle turns clockwise over a {look}grey background")
        assert clips.frames[0, 0, 1].diff(dim=0).abs().max() > least
        assert clips.frames[0, :, :, 0, 0].diff(dim=0).abs().max() == 0  # the background does not move
