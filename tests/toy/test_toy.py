"""The model in the package: loaded by stock diffusers, the same clip from the same seed, and what it shows."""

import subprocess
import sys

import pytest
import torch

from stgfast import accelerate, toy
from tests import forks

STOCK = """
import sys
sys.modules["stgfast"] = None  # importing it fails
import torch
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1])
generator = torch.Generator().manual_seed(0)
call = dict(height=64, width=64, num_frames=17, num_inference_steps=2, output_type="pt")
print(type(pipe).__name__, tuple(pipe("a red star turns clockwise over a grey background", **call).frames.shape))
"""


def clips(pipe, prompts, **changes):
    generators = [torch.Generator().manual_seed(n) for n in range(len(prompts))]
    return pipe(list(prompts), **{**toy.CALL, **changes}, generator=generators, output_type="pt").frames


@pytest.fixture(scope="module")
def pipe():
    return toy.pipeline()


def test_stock_diffusers_alone_loads_it(tmp_path):
    code = [sys.executable, *forks.FORKED, "-c", STOCK, str(toy.FOLDER)]
    done = subprocess.run(code, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "LTXPipeline (1, 17, 3, 64, 64)\n"


def test_weights_are_small():
    weights = list(toy.FOLDER.parent.rglob("*.safetensors"))
    assert len(weights) == 4
    assert sum(path.stat().st_size for path in weights) <= 10_000_000


def test_the_same_seed_gives_the_same_clip(pipe):
    prompt = toy.PROMPTS[:1]
    one, again = (clips(pipe, prompt, num_inference_steps=3) for _ in range(2))
    assert torch.equal(one, again)
    generator = torch.Generator().manual_seed(1)
    other = pipe(list(prompt), **{**toy.CALL, "num_inference_steps": 3}, generator=generator, output_type="pt").frames
    assert not torch.equal(one, other)


def test_words_it_never_saw(pipe):
    with pytest.warns(
        UserWarning, match=r"got 'zebra', 'dances', which the toy model was not trained on; it knows a, and"
    ):
        made = clips(pipe, ["A red zebra dances over a grey background"], num_inference_steps=1)
    assert made.isfinite().all()


def test_words_it_knows(pipe, recwarn):
    clips(pipe, toy.PROMPTS[:1], num_inference_steps=1)
    assert not [each for each in recwarn if "never saw" in str(each.message)]


def test_its_guidance_is_one_that_it_can_do(pipe):
    accelerate(toy.pipeline(), toy.GUIDANCE)
