"""Clips with first images, several in one call: if the adapter allows that, each is the same as alone."""

import inspect
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from stgfast.integrations import ADAPTERS
from stgfast.integrations.clips import EACH
from tests.integrations.test_families import FAMILIES
from tests.precision import distance, same

pytestmark = pytest.mark.usefixtures("float64")

APART = {
    *("Kandinsky5I2VPipeline", "LTXConditionPipeline", "LTX2ImageToVideoPipeline"),
    "Cosmos2_5_PredictBasePipeline",  # it needs torchvision for an image
    *("HunyuanVideoFramepackPipeline", "MotifVideoImage2VideoPipeline", "WanAnimatePipeline", "HeliosPipeline"),
    *("WanImage2VideoModularPipeline", "Wan22Image2VideoModularPipeline"),
}
SHOWN = {name: family for name, family in FAMILIES.items() if "image" in family.arguments(1)}


def images(family, count):
    """Images as loaded from files."""
    given = family.arguments(1)
    size = given["image"].size if isinstance(given["image"], Image.Image) else (given["width"], given["height"])
    drawn = np.random.default_rng(0).integers(0, 255, (count, *reversed(size), 3), dtype=np.uint8)
    return [Image.fromarray(each) for each in drawn]


def of_one(value, place):
    rows = (isinstance(value, torch.Tensor) and value.ndim) or isinstance(value, list)
    return value[place : place + 1] if rows and len(value) == 2 else value


def seen_by_svd():
    """The pipeline resizes images that are files."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "projection_dim": 32, "intermediate_size": 37, "num_hidden_layers": 1}
    config = CLIPVisionConfig(**sizes, num_attention_heads=2, image_size=224, patch_size=32)
    return CLIPVisionModelWithProjection(config).eval()


@pytest.mark.parametrize("family", SHOWN.values(), ids=SHOWN)
def test_several_in_one_call(family):
    pipe = family.pipe()
    how = ADAPTERS[type(pipe).__name__].clips.images
    if not how:
        assert type(pipe).__name__ in APART  # where clips differ, or need more arguments
        return
    if "Stable" in family.name:
        pipe.image_encoder = seen_by_svd()
        pipe.feature_extractor.crop_size = pipe.feature_extractor.size = {"height": 224, "width": 224}
    shown = images(family, 2) if how == EACH else images(family, 1) * 2

    def run(arguments):
        torch.manual_seed(0)
        with torch.no_grad():
            return family.result(pipe(**arguments))

    together = run({**family.arguments(2), "image": shown if how == EACH else shown[0]})
    assert len(together) == 2
    for place in range(2):
        alone = {name: of_one(value, place) for name, value in family.arguments(2).items()}
        same(together[place : place + 1], run({**alone, "image": shown[place]}))
    other = replace(family, arguments=lambda prompts, cfg=True: {**family.arguments(prompts), "image": shown[1]})
    if how == EACH:
        alone = {name: of_one(value, 0) for name, value in other.arguments(2).items()}
        assert distance(together[:1], run(alone)) > 1e-3  # the image has an effect


@pytest.mark.xdist_group("pipelines.py")  # these import all pipelines
def test_all_that_take_an_image_are_looked_at():
    import diffusers

    video = {"num_frames", "video_length", "frames"}
    takes = {
        name
        for name in ADAPTERS
        if (cls := getattr(diffusers, name, None)) is not None
        and "image" in (call := inspect.signature(cls.__call__).parameters)
        and video & set(call)
    }
    assert {name for name in ADAPTERS if ADAPTERS[name].clips.images} == takes - APART
    assert {type(family.pipe()).__name__ for family in SHOWN.values()} >= takes - APART
