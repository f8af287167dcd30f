"""Every supported pipeline against the plain method, on a tiny random model."""

import dataclasses
import importlib
import pkgutil
import re

import diffusers
import pytest
import torch

import stgfast
from stgfast import Guidance, Perturbation, SettingsError
from tests import precision
from tests.integrations import families
from tests.precision import distance, same

pytestmark = pytest.mark.usefixtures("float64")

MODULES = [
    importlib.import_module(f"{families.__name__}.{found.name}") for found in pkgutil.iter_modules(families.__path__)
]
FAMILIES = {family.name: family for module in MODULES for family in module.FAMILIES}
BLURRED = {name: family for name, family in FAMILIES.items() if family.facts.lies is not None}
blurred = pytest.mark.parametrize("family", BLURRED.values(), ids=BLURRED)
every = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
# kind, rescale, prompts, other scheduler, CFG, rows at once
CASES = {
    "attention, rescaled, two prompts": ("attention", 0.7, 2, False, True, None),
    "residual, another scheduler, all rows at once": ("residual", 0.0, 1, True, True, "all"),
    "both, rescaled, no CFG, row by row": ("both", 0.7, 1, False, False, 1),
}


@every
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_the_plain_method(family, case):
    kind, rescale, prompts, other, cfg, max_rows = case
    early, late = family.layers
    kinds = family.kinds if kind == "both" else (kind,)
    if not set(kinds) <= set(family.kinds):
        pytest.skip(f"{family.name} has no {kind} perturbation")
    # If the call does not decide about CFG, the family's setting stays.
    cfg = (cfg or not family.cfg_asked) and family.cfg is not None
    parts = [Perturbation([late, early][n:], kind=one, scale=1.5 - n) for n, one in enumerate(kinds)]
    guidance = Guidance(parts, rescale=rescale)
    expected = family.plain(guidance, prompts, cfg, other)
    pipe = stgfast.accelerate(family.pipe(other=other), guidance, max_rows=max_rows)
    same(family.run(pipe, prompts, cfg), expected)


# A layer of these has no bfloat16 on a CPU.
NEEDS_A_GPU = ("Kandinsky 5", "Cosmos from an image", "modular HunyuanVideo15")


WIDE_VAE = ("Lucy Edit",)  # the pipeline passes float32 for any dtype of the VAE


def lowered(family, dtype):
    """A family whose models and embeddings have this dtype."""

    def build(other=False):
        pipe = family.build(other=other)
        for name, part in pipe.components.items():
            if isinstance(part, torch.nn.Module) and not (name == "vae" and family.name in WIDE_VAE):
                part.to(dtype)
        return pipe

    def arguments(prompts, cfg=True):
        made = family.arguments(prompts, cfg=cfg)
        floats = {name for name, value in made.items() if isinstance(value, torch.Tensor) and value.is_floating_point()}
        return made | {name: made[name].to(dtype) for name in floats if name.endswith("embeds")}

    return dataclasses.replace(family, build=build, arguments=arguments)


@pytest.mark.float32
@every
def test_no_worse_than_the_plain_method(family):
    """In bfloat16, with all kinds at once: the error against float64, compared with the plain method's. `test_one_call`
    has float32 and float16.
    """
    if family.name.startswith(NEEDS_A_GPU):
        pytest.skip(f"needs a GPU: a layer of {family.name} has no bfloat16 on a CPU")
    early, late = family.layers
    parts = [Perturbation([late, early][n:], kind=kind, scale=1.5 - n) for n, kind in enumerate(family.kinds)]
    guidance, cfg = Guidance(parts, rescale=0.7), family.cfg is not None
    with precision.computing_in(torch.float64):
        exact = family.plain(guidance, 1, cfg)
    with precision.computing_in(torch.bfloat16):
        low = lowered(family, torch.bfloat16)
        plain = low.plain(guidance, 1, cfg)
        made = low.run(stgfast.accelerate(low.build(), guidance), 1, cfg)
    precision.no_worse(made, plain, exact)


@blurred
def test_blur_equals_the_plain_method(family):
    """With a finite and an infinite sigma, in frames that are not square if possible."""
    early, late = family.layers
    guidance = Guidance(
        [Perturbation([early, late], kind="blur", sigma=0.8), Perturbation([early], kind="blur", scale=2.0)]
    )
    cfg, oblong = family.cfg is not None, family.facts.oblong
    expected = family.plain(guidance, 1, cfg, **oblong)
    stock, pipe = family.pipe(), stgfast.accelerate(family.pipe(), guidance)
    with family.counted(stock) as one:
        plain = family.run(stock, 1, cfg, **oblong)
    with family.counted(pipe) as guided:
        made = family.run(pipe, 1, cfg, **oblong)
    same(made, expected)
    assert distance(made, plain) > 1e-3
    rows = 2 if cfg else 1
    assert [rows * count for count in guided] == [
        count * per for count, per in zip(family.histories(pipe, guidance, cfg), one, strict=True)
    ]


@every
def test_no_history_runs_twice(family):
    early, late = family.layers
    guidance = Guidance(
        [Perturbation([late], kind=family.kinds[0]), Perturbation([early, late], kind=family.kinds[-1])]
    )
    cfg = family.cfg is not None
    stock, pipe = family.pipe(), family.pipe()
    with family.counted(stock) as one:
        family.run(stock, 2, cfg)
    stgfast.accelerate(pipe, guidance)
    with family.counted(pipe) as guided:
        family.run(pipe, 2, cfg)
    wanted = family.histories(pipe, guidance, cfg)
    rows = 2 if cfg else 1
    assert [rows * made for made in guided] == [count * per for count, per in zip(wanted, one, strict=True)]


@every
def test_scale_0_and_restore_leave_the_stock_result(family):
    stock = family.pipe()
    expected = family.run(stock)
    before = dict(vars(stock))
    pipe = stgfast.accelerate(stock, Guidance(Perturbation([family.layers[1]], kind=family.kinds[0])))
    assert torch.equal(family.run(pipe, stg_scale=0.0), expected)
    stgfast.restore(pipe)
    assert vars(pipe).keys() == before.keys()
    assert all(vars(pipe)[name] is value for name, value in before.items() if isinstance(value, torch.nn.Module))
    for model in family.denoisers(pipe):
        assert all("_compiled_call_impl" not in vars(module) for module in model.modules())
    assert torch.equal(family.run(pipe), expected)


@every
def test_explain_counts_what_runs(family):
    guidance = Guidance(Perturbation([family.layers[1]], kind=family.kinds[0]))
    pipe = stgfast.accelerate(family.pipe(), guidance)
    cfg = family.cfg is not None
    explained = stgfast.explain(pipe, **family.arguments(1, cfg=cfg))
    first = family.facts.parts(family.denoisers(pipe)[0])
    assert explained.phases[0].rows == tuple(family.histories(pipe, guidance, cfg)[: len(first)])
    assert str(explained)


@every
def test_explain_counts_what_runs_where_branches_are_carried_on(family):
    cfg = family.cfg is not None
    perturbed = Perturbation([family.layers[1]], kind=family.kinds[0])
    guidance = Guidance(perturbed, reuse=2, reuse_cfg=2 if cfg else 1, reuse_order=0)
    stock, pipe = family.pipe(), stgfast.accelerate(family.pipe(), guidance)
    with family.counted(stock) as plain:
        family.run(stock, cfg=cfg)
    with family.counted(pipe) as rows:
        family.run(pipe, cfg=cfg)
    explained = stgfast.explain(pipe, **family.arguments(1, cfg=cfg))
    exact = stgfast.explain(pipe, **family.arguments(1, cfg=cfg), stg=guidance.exact)
    # As a fraction of the layer's work without guidance, which is known in block-rows.
    parts = [made / per for made, per in zip(rows, plain, strict=True)]
    assert explained.block_rows == pytest.approx(explained.cfg_alone * sum(parts) / len(parts))
    assert explained.block_rows < exact.block_rows or len(family.denoisers(pipe)) > 1  # each starts again


@every
def test_a_call_without_the_cfg_that_its_guidance_needs_is_told_how_to_ask_for_it(family):
    pipe = family.pipe()
    guiders = [name for name in ("guider", "guider_2") if getattr(pipe, name, None) is not None]
    for name in guiders:
        setattr(pipe, name, diffusers.ClassifierFreeGuidance(guidance_scale=1.0))
    uncond = Guidance(Perturbation([family.layers[1]], kind=family.kinds[0], of="uncond"))
    stgfast.accelerate(pipe, uncond)
    for guidance, needs in ((uncond, "a perturbation of uncond against uncond"), (Guidance(cfg=3.0), "a cfg schedule")):
        said = re.escape(f"{needs}: got a call without CFG, expected ") + r"(.*\b)?(\w+) above 1\b.*"
        with pytest.raises(SettingsError) as refused:
            family.run(pipe, cfg=False, stg=guidance)
        told = re.fullmatch(said, str(refused.value))
        assert told, refused.value
        if guiders:
            assert hasattr(getattr(pipe, guiders[0]), told[2])
        else:
            assert family.arguments(1, cfg=False)[told[2]] <= 1 < family.arguments(1, cfg=True)[told[2]]
