"""Against the results of the authors' pipelines for 13 settings on tiny random models."""

import pytest
import torch

import stgfast
from tests import models
from tests.precision import distance, within

pytestmark = pytest.mark.usefixtures("float64")

WAN_CODE = {"of": "uncond", "base": "guided"}


@pytest.mark.parametrize("case", models.index()["cases"], ids=lambda case: f"{case['model']}-{case['output']}")
def test_matches_the_papers_pipelines(case):
    family = case["model"]
    stored = models.stored(family, "case.safetensors")
    prompts = {name: tensor for name, tensor in stored.items() if not name.startswith("latents")}
    how = WAN_CODE if "perturbed_uncond" in case["combines"] else {}
    perturbed = stgfast.Perturbation(case["layers"], kind=case["mode"], scale=case["scale"], **how)
    pipe = stgfast.accelerate(models.pipeline(family), stgfast.Guidance(perturbed, rescale=case["rescale"]))
    generator = torch.Generator().manual_seed(models.index()["models"][family]["generator_seed"])
    latents = pipe(**prompts, **models.sizes(family), generator=generator).frames
    # Their results are in float32, so the distance is their rounding error: 8e-6 at most.
    within(distance(latents, stored[case["output"]]), 2e-5)
