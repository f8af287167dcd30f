"""`explain` describes what a call then does."""

import dataclasses

import pytest

import stgfast
from stgfast import Guidance, Perturbation
from tests import models
from tests.oracle import blocks_of


@pytest.mark.parametrize("family", models.FAMILIES)
@pytest.mark.parametrize(
    "guidance",
    [
        Guidance(Perturbation([2])),
        Guidance([Perturbation([1, 3], scale=[0, 1, 1, 0]), Perturbation([4], kind="attention")], rescale=0.7),
        Guidance(Perturbation([5]), start=0.5),
        Guidance(),
    ],
    ids=["one", "two", "late", "none"],
)
def test_block_rows_are_those_of_the_call(family, guidance):
    pipe = stgfast.accelerate(models.pipeline(family), guidance)
    call = models.sizes(family)
    explained = stgfast.explain(pipe, **call)
    rows = [0] * explained.depth
    for number, block in enumerate(blocks_of(pipe.transformer)):

        def count(module, args, kwargs, number=number):
            rows[number] += len((*args, *kwargs.values())[0])

        block.register_forward_pre_hook(count, with_kwargs=True)
    pipe(**models.prompt(family), **call, generator=models.generators(1))
    assert sum(rows) == explained.block_rows
    assert rows == [sum(phase.steps * phase.rows[k] for phase in explained.phases) for k in range(explained.depth)]
    assert sum(phase.steps for phase in explained.phases) == call["num_inference_steps"]
    assert str(explained.block_rows) in str(explained)


def test_the_text_of_a_blur():
    guidance = Guidance([Perturbation([1], kind="blur", sigma=1.5), Perturbation([2, 3], kind="blur")])
    pipe = stgfast.accelerate(models.shared(models.pipeline, "mochi"), guidance)
    lines = str(stgfast.explain(pipe, **models.sizes("mochi")))
    assert lines.splitlines()[1:3] == [
        "perturbed0: cond with blur of sigma 1.5 at layer 1, scale 1, base cond",
        "perturbed1: cond with blur of infinite sigma at layers 2, 3, scale 1, base cond",
    ]


def test_the_text():
    guidance = Guidance(Perturbation([3], scale=2.0), rescale=0.7, start=0.5)
    pipe = stgfast.accelerate(models.shared(models.pipeline, "mochi"), guidance, max_rows=2)
    assert str(stgfast.explain(pipe, **models.sizes("mochi"))) == (
        "MochiPipeline: 6 blocks, stacked, CFG scale 4.5\n"
        "perturbed0: cond with residual at layer 3, scale 2, base cond\n"
        "rescale: 0.7\n"
        "steps 0 to 1 of 4: the pipeline's own\n"
        "steps 2 to 3 of 4: g = -3.5 uncond +6.5 cond -2 perturbed0, rescaled by 0.7\n"
        "  blocks 0 to 3: 2 rows\n"
        "  blocks 4 to 5: 3 rows\n"
        "block-rows per prompt: 52; 60 without sharing (13.3% saved); 48 without stgfast\n"
        "memory, in rows per prompt: 2 in a block at once, 3 kept between blocks; 2 in the pipeline's own calls"
    )


@pytest.mark.parametrize(("max_rows", "at_once"), [(None, 2), (1, 1), ("all", 3), (9, 3)])
def test_rows_are_what_memory_goes_by(max_rows, at_once):
    pipe = stgfast.accelerate(models.pipeline("mochi"), Guidance(Perturbation([3])), max_rows=max_rows)
    explained = stgfast.explain(pipe, **models.sizes("mochi"))
    assert (explained.rows_at_once, explained.rows_held, explained.rows_of_pipeline) == (at_once, 3, 2)
    seen = []
    for block in pipe.transformer.transformer_blocks:
        block.register_forward_pre_hook(lambda m, a, k: seen.append(len(k["hidden_states"])), with_kwargs=True)
    pipe(**models.sizes("mochi"), **models.prompt("mochi"), generator=models.generators(1))
    assert max(seen) == at_once


def test_the_text_of_projection_and_reuse():
    guidance = Guidance(Perturbation([3]), project="along-cond", eta=0.5, reuse=3, reuse_cfg=2, reuse_order=0)
    pipe = stgfast.accelerate(models.shared(models.pipeline, "mochi"), guidance)
    text = str(stgfast.explain(pipe, **models.sizes("mochi")))  # of four steps
    assert "projection: the part of cond - uncond along cond is removed (APG's projection), eta 0.5" in text
    kept = "repeated in the others; memory: 1 prediction per prompt\n"
    assert f"approximately: base - perturbed computed in every 3rd step, {kept}" in text
    assert f"approximately: cond - uncond computed in every 2nd step, {kept}" in text
    by_line = str(stgfast.explain(pipe, **models.sizes("mochi"), stg=dataclasses.replace(guidance, reuse_order=1)))
    assert "in every 3rd step, extrapolated linearly in the others; memory: 2 predictions per prompt" in by_line
    assert text.endswith(
        "  in 1 of them:\n  blocks 0 to 3: 2 rows\n  blocks 4 to 5: 3 rows\n"
        "  in 1 of them:\n  blocks 0 to 5: 1 row\n"
        "  in 1 of them:\n  blocks 0 to 5: 2 rows\n"
        "  in 1 of them:\n  blocks 0 to 3: 1 row\n  blocks 4 to 5: 2 rows\n"
        "block-rows per prompt: 40; 72 without sharing (44.4% saved); 48 without stgfast\n"
        "memory, in rows per prompt: 2 in a block at once, 3 kept between blocks; 2 in the pipeline's own calls"
    )


def test_a_calls_settings_are_explained():
    pipe = stgfast.accelerate(models.shared(models.pipeline, "mochi"), Guidance(Perturbation([3])))
    call = {"num_inference_steps": 4}
    assert stgfast.explain(pipe, **call, stg_layers=[0]).block_rows == 4 * (2 + 5 * 3)
    assert stgfast.explain(pipe, **call, stg_scale=0).block_rows == 4 * 12
    assert stgfast.explain(pipe, **call, guidance_scale=1.0).block_rows == 4 * (4 + 2 * 2)
    varying = str(stgfast.explain(pipe, **call, stg_scale=lambda progress: 1 + progress))
    assert "steps 0 to 3 of 4: g = -3.5 uncond +5.5 cond -1 perturbed0 at step 0, then by schedule" in varying
    with pytest.raises(stgfast.SettingsError, match="got \\[9\\]"):
        stgfast.explain(pipe, **call, stg_layers=[9])
    with pytest.raises(TypeError, match="typo"):
        stgfast.explain(pipe, typo=1)
