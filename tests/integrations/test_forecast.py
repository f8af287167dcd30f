"""Block residuals extrapolated to steps in which no block runs, against a separate implementation."""

import dataclasses

import pytest

import stgfast
from stgfast import Guidance, Perturbation, SettingsError
from stgfast.combining import Combining
from stgfast.installed import installed_on
from tests.integrations import test_ltx2 as ltx2
from tests.integrations.test_families import FAMILIES
from tests.integrations.test_methods import newton
from tests.oracle import Facts
from tests.precision import distance, same

pytestmark = pytest.mark.usefixtures("float64")
PERTURBED = Perturbation([2], scale=1.5)  # not the last block: a skipped block runs no hooks


def as_list(state):
    return list(state) if isinstance(state, tuple) else [state]


def forecast(blocks, facts, guidance, runs):
    """A stock model that runs several times in each step. Every block computes; its results are not used in
    extrapolated steps. Returns a list, to which is appended how far each extrapolation is off.
    """
    spacing, order = guidance.reuse_blocks, guidance.reuse_order
    done, past, now, off = 0, {}, {}, []

    def whole(step, known):
        if isinstance(spacing, tuple):
            return not known or step in spacing
        return len(known) < (2 if order else 1) or step - known[-1][0] >= spacing

    def enter(module, args, kwargs):
        step, run = divmod(done, runs)
        known = past.setdefault(run, [])
        state = facts.unchanged([*args, *(kwargs[name] for name in facts.passed if name in kwargs)])
        now.update(step=step, known=known, before=as_list(state), whole=whole(step, known))

    def leave(module, args, kwargs, output):
        nonlocal done
        last = module is blocks[-1]
        done += last
        if now["whole"]:
            if last:
                now["known"].append((now["step"], [a - b for a, b in zip(as_list(output), now["before"], strict=True)]))
            return output
        state = facts.unchanged([*args, *(kwargs[name] for name in facts.passed if name in kwargs)])
        if not last:
            return state
        steps = [step for step, _ in now["known"]][-order - 1 :]
        added = zip(*(parts for _, parts in now["known"][-order - 1 :]), strict=True)
        made = [one + newton(steps, list(parts), now["step"]) for one, parts in zip(now["before"], added, strict=True)]
        off.append(distance(made[0], as_list(output)[0]))
        return tuple(made) if isinstance(output, tuple) else made[0]

    blocks[0].register_forward_pre_hook(enter, with_kwargs=True)
    for block in blocks:
        block.register_forward_hook(leave, with_kwargs=True)
    return off


CASES = {
    "held": Guidance(PERTURBED, reuse_blocks=2, reuse_order=0),
    "by a line": Guidance(PERTURBED, reuse_blocks=3),
    "in named steps, by a parabola, rescaled": Guidance(
        PERTURBED, rescale=0.5, reuse_blocks=(0, 1, 2, 5), reuse_order=2
    ),
}


@pytest.mark.parametrize("guidance", CASES.values(), ids=CASES)
@pytest.mark.parametrize("name", ["LTX", "Wan", "Mochi", "CogVideoX"])
def test_equals_what_is_written_apart(name, guidance):
    family, steps = FAMILIES[name], {"num_inference_steps": 7}
    stock = dataclasses.replace(family, shared=False).pipe()
    (model,) = family.denoisers(stock)
    blocks = [part.module for part in family.facts.parts(model)]
    off = forecast(blocks, family.facts, guidance, runs=2 if family.facts.stacked else 3)  # the last is perturbed
    plain = dataclasses.replace(family, build=lambda other=False: stock, shared=False)
    expected = plain.plain(guidance.exact, 2, **steps)
    same(family.run(stgfast.accelerate(family.pipe(), guidance), 2, **steps), expected)
    assert max(off) > 1e-5


@pytest.mark.parametrize(
    "guidance", [Guidance(reuse_blocks=2, reuse_order=0), Guidance(reuse_blocks=3)], ids=["held", "line"]
)
def test_ltx2_too(guidance):
    """Video and audio, in all passes."""
    steps = {"num_inference_steps": 7}
    stock = ltx2.build()
    facts = Facts(
        stacked=True, unchanged=lambda given: (given[0], given[1]), passed=("hidden_states", "audio_hidden_states")
    )
    off = forecast(list(stock.transformer.transformer_blocks), facts, guidance, runs=3)
    expected = ltx2.call(stock, **steps)
    pipe = stgfast.accelerate(ltx2.pipeline(), guidance)
    rows, made = ltx2.counted(pipe, **steps)
    for one, other in zip(made, expected, strict=True):
        same(one, other)
    explained = stgfast.explain(pipe, **steps, spatio_temporal_guidance_blocks=[3], num_frames=9)
    assert sum(rows) == explained.block_rows < 5 * 17
    assert max(off) > 1e-5


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_explain_counts_what_runs_or_says_why_not(family):
    cfg = family.cfg is not None
    perturbed = Perturbation([family.layers[1]], kind=family.kinds[0])
    guidance = Guidance(perturbed, reuse_blocks=2, reuse_order=0)
    stock, pipe = family.pipe(), stgfast.accelerate(family.pipe(), guidance)
    if installed_on(pipe).adapter.blocks.full:
        with pytest.raises(SettingsError, match="model works on hidden states between its blocks, expected reuse and"):
            family.run(pipe, cfg=cfg)
        return
    with family.counted(stock) as plain:
        family.run(stock, cfg=cfg)
    with family.counted(pipe) as rows:
        family.run(pipe, cfg=cfg)
    explained = stgfast.explain(pipe, **family.arguments(1, cfg=cfg))
    parts = [made / per for made, per in zip(rows, plain, strict=True)]
    assert explained.block_rows == pytest.approx(explained.cfg_alone * sum(parts) / len(parts))
    exact = stgfast.explain(pipe, **family.arguments(1, cfg=cfg), stg=guidance.exact)
    assert explained.block_rows < exact.block_rows or len(family.denoisers(pipe)) > 1


OFF = {
    "scale": ({"scale": [1, 1, 0, 1, 1, 1, 1, 1]}, {0, 1, 3, 4, 7}),
    "CFG": ({"cfg": [3, 3, 1, 3, 3, 3, 3, 3]}, {0, 1, 3, 4, 7}),
    "part of the run": ({"start": 0.3, "stop": 0.8}, {0, 1, 2, 3, 4, 7}),
}


@pytest.mark.parametrize(("settings", "whole"), OFF.values(), ids=OFF)
def test_a_branch_that_is_off_for_a_while_begins_anew(settings, whole):
    """And all branches of a step with it: one decision holds for all of them."""
    family, steps = FAMILIES["LTX"], {"num_inference_steps": 8}
    more = {key: value for key, value in settings.items() if key != "scale"}
    guidance = Guidance(Perturbation([3], scale=settings.get("scale", 1.0)), reuse_blocks=3, **more)
    pipe = stgfast.accelerate(dataclasses.replace(family, shared=False).pipe(), guidance)
    calls, ran = [], set()
    pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(0))
    pipe.transformer.transformer_blocks[0].register_forward_pre_hook(lambda *_: ran.add(len(calls) - 1))
    with family.counted(pipe) as rows:
        family.run(pipe, **steps)
    assert ran == whole
    assert stgfast.explain(pipe, **family.arguments(1) | steps).block_rows == sum(rows)


def test_the_text():
    family = FAMILIES["LTX"]
    pipe = stgfast.accelerate(family.pipe(), Guidance(PERTURBED, reuse_blocks=2))
    text = str(stgfast.explain(pipe, **family.arguments(1) | {"num_inference_steps": 5}))
    kept = "memory: 6 hidden states per prompt"
    assert f"block residuals computed in every 2nd step, extrapolated linearly in the others; {kept}" in text
    assert "  blocks 0 to 5: 0 rows\n" in text


def test_what_does_not_go_with_it_is_said():
    with pytest.raises(SettingsError, match="reuse_blocks with reuse and reuse_cfg: got both, expected one of them"):
        Guidance(PERTURBED, reuse=2, reuse_cfg=2, reuse_blocks=2)
    with pytest.raises(SettingsError, match="reuse_blocks: got 0, expected a number of steps, 1"):
        Guidance(PERTURBED, reuse_blocks=0)


def test_nothing_is_held_where_nothing_is_carried_on():
    """Hidden states are large."""
    family = FAMILIES["LTX"]
    strategy = Combining(Guidance(PERTURBED))
    assert strategy.blocks.ends is None
    assert family.run(stgfast.accelerate(family.pipe(), Guidance(PERTURBED, reuse_blocks=1))).equal(
        family.run(stgfast.accelerate(family.pipe(), Guidance(PERTURBED)))
    )
