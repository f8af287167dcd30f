"""The judge of the toy model's clips: it is right on drawn clips, and on what is wrong in others."""

import math

import numpy as np
import pytest
import torch

from stgfast.evaluate.judged import measure
from stgfast.toy import judge, videos

SEED = 55  # neither the judge nor the model was trained on these


def drawn(count, scenes=None):
    clips = videos.clips(SEED, range(count), scenes)
    frames = (clips.frames * 255).round().byte().permute(0, 1, 3, 4, 2).numpy()
    return frames, clips.prompts


def test_it_reads_what_is_drawn():
    clips, prompts = drawn(32)
    found = [measure().of(frames, prompt) for frames, prompt in zip(clips, prompts, strict=True)]
    assert np.mean([each.values["right"] for each in found]) >= 0.97
    strange = [measure().of(frames[::-1].transpose(0, 2, 1, 3)[..., ::-1].copy(), "") for frames in clips]
    near, far = (measure().real.distance(np.stack([each.features for each in some])) for some in (found, strange))
    assert far > 1.25 * near  # other colours, upside down; 32 clips have some distance because they are few


def test_motion_from_the_tracked_shape():
    scene = videos.Scene.parse("a red square moves left over a black background")
    speed = videos.plan(SEED, 0, scene).paths[0].speed
    frames, (prompt,) = drawn(1, [scene])
    values = measure().of(frames[0], prompt).values
    assert values["speed"] == pytest.approx(speed, rel=0.05)
    assert values["jerk"] < 0.2
    assert values["lost"] == 0
    # The same frames in another order: the shape jumps, and no longer moves left.
    mixed = measure().of(frames[0][[0, 9, 3, 12, 6, 15, 1, 10, 4, 13, 7, 16, 2, 11, 5, 14, 8]], prompt).values
    assert mixed["jerk"] > 3
    backwards = measure().of(frames[0][::-1].copy(), prompt).values
    assert (values["motion"], backwards["motion"]) == (1, 0)
    turning = videos.Scene.parse("a red square turns clockwise over a black background")
    frames, (prompt,) = drawn(1, [turning])
    assert math.isnan(measure().of(frames[0], prompt).values["speed"])


def test_another_prompt_is_not_what_is_seen():
    frames, (prompt,) = drawn(1, [videos.Scene.parse("a red square moves left over a black background")])
    for changed, attribute in (
        (prompt.replace("red", "blue"), "colour"),
        (prompt.replace("square", "star"), "shape"),
        (prompt.replace("left", "down"), "motion"),
        (prompt.replace("black", "brown"), "ground"),
        (prompt.replace("black", "striped black"), "pattern"),
    ):
        values = measure().of(frames[0], changed).values
        wrong = {name for name in judge.ATTRIBUTES if values[name] != 1}
        assert wrong == {attribute}
        assert values["right"] == 0


def test_other_sentences_are_not_judged():
    frames, _ = drawn(1)
    values = measure().of(frames[0], "a cat on a mat").values
    assert all(math.isnan(values[name]) for name in (*judge.ATTRIBUTES, "right", "speed"))
    assert values["contrast"] > 0


def test_a_saved_judge_is_nearly_the_same(tmp_path):
    torch.manual_seed(0)
    before, frames = judge.Judge().eval(), videos.clips(SEED, range(2)).frames
    features = torch.randn(200, judge.FEATURES)
    judge.save(tmp_path / "judge.safetensors", before, features)
    after, mean, covariance = judge.load(tmp_path / "judge.safetensors")
    with torch.no_grad():
        one, other = before(frames), after(frames)
    assert (one.kind - other.kind).abs().max() < 0.05 * one.kind.abs().max() + 0.02
    assert torch.allclose(mean, features.mean(0))
    assert torch.allclose(covariance, features.T.cov(), atol=1e-6)
