"""Against what the paper's own pipelines gave for 13 settings on tiny random models."""

import pytest
import torch
from safetensors.torch import load_file

import stgfast
from tests import models

WAN_CODE = {"of": "uncond", "base": "guided"}


@pytest.mark.parametrize("case", models.index()["cases"], ids=lambda case: f"{case['model']}-{case['output']}")
def test_matches_the_papers_pipelines(case):
    family = case["model"]
    stored = load_file(models.GOLDEN / family / "case.safetensors")
    prompts = {name: tensor for name, tensor in stored.items() if not name.startswith("latents")}
    how = WAN_CODE if "perturbed_uncond" in case["combines"] else {}
    weak = stgfast.Perturbation(case["layers"], kind=case["mode"], scale=case["scale"], **how)
    pipe = stgfast.accelerate(models.pipeline(family), stgfast.Guidance(weak, rescale=case["rescale"]))
    generator = torch.Generator().manual_seed(models.index()["models"][family]["generator_seed"])
    latents = pipe(**prompts, **models.sizes(family), generator=generator).frames
    expected = stored[case["output"]]
    assert (latents - expected).norm() <= 1e-5 * expected.norm()
