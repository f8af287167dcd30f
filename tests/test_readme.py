"""The README is true: its table is what the planner says, its settings exist, its explanation is printed."""

import inspect
import re
from pathlib import Path

import diffusers
import pytest

import stgfast
from stgfast import Guidance, Perturbation, toy
from stgfast.batching.plan import branches_for, make_plan
from stgfast.call import SETTINGS
from stgfast.guidance import Moment
from stgfast.integrations import ADAPTERS

README = (Path(__file__).parent.parent / "README.md").read_text()
ROWS = re.findall(
    r"^\| `(\w+)`(?: \((.*?)\))? \| (\w+) \| layer (\d+), scale (\d)(?:, rescale ([\d.]+))? \| (\d+) "
    r"\| (\d+), (\d+), (\d+) \| ([\d.]+)% \|$",
    README,
    re.MULTILINE,
)
DEPTHS = {  # of the released models: what the classes of diffusers have as defaults, and CogVideoX-5B
    "MochiPipeline": diffusers.MochiTransformer3DModel,
    "LTXPipeline": diffusers.LTXVideoTransformer3DModel,
    "CogVideoXPipeline": diffusers.CogVideoXTransformer3DModel,
    "HunyuanVideoPipeline": diffusers.HunyuanVideoTransformer3DModel,
    "WanPipeline": diffusers.WanTransformer3DModel,
}


def depth_of(pipeline, variant):
    if variant == "5B":
        return 42
    parameters = inspect.signature(DEPTHS[pipeline].__init__).parameters
    return sum(parameters[name].default for name in ("num_layers", "num_single_layers") if name in parameters)


def test_every_pipeline_is_in_the_table():
    assert {row[0] for row in ROWS} == set(ADAPTERS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[0]} {row[1]}")
def test_table(row):
    pipeline, variant, protocol, layer, scale, rescale, depth, plain, fast, alone, saved = row
    adapter = ADAPTERS[pipeline]
    perturbation = adapter.defaults.perturbations[0]
    assert adapter.protocol == protocol
    assert perturbation.layers == (int(layer),)
    assert perturbation.scale == float(scale)
    assert adapter.defaults.rescale == float(rescale or 0)
    assert int(depth) == depth_of(pipeline, variant)
    cfg = None if protocol == "embedded" else 4.0
    weights = adapter.defaults.weights(Moment(0, 1), cfg)
    plans = [make_plan(branches_for(adapter.defaults, call, weights), int(depth)) for call in adapter.calls(bool(cfg))]
    computed = sum(sum(plan.computed) for plan in plans)
    branches = sum(len(plan.branches) for plan in plans)
    assert (computed, branches * int(depth)) == (int(fast), int(plain))
    assert (branches - 1) * int(depth) == int(alone)
    assert saved == f"{100 * (1 - int(fast) / int(plain)):.1f}"


def test_wan_at_a_late_layer():
    late = Guidance(Perturbation([30], of="uncond", base="guided"))
    plans = [make_plan(branches_for(late, (source,), {"uncond", "perturbed0"}), 40) for source in ("cond", "uncond")]
    assert "Wan at layer 30\ntakes 89 block-rows in place of 120" in README
    assert sum(sum(plan.computed) for plan in plans) == 89


def test_the_explanation_is_what_is_printed():
    pipe = stgfast.accelerate(toy.pipeline())
    assert str(stgfast.explain(pipe)) in README


def test_every_setting_is_named():
    for name in SETTINGS:
        assert f"`{name}`" in README
    for name in ("make demo", "make test", "stgfast.accelerate", "restore", "explain", "max_rows"):
        assert name in README
