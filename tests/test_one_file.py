"""A new kind of perturbation, formula or pipeline needs one file, and no change elsewhere."""

import dataclasses
import importlib.util

import pytest
import torch

import stgfast
from stgfast import Guidance, Perturbation, integrations
from stgfast.formulas import FORMULAS
from stgfast.integrations import families
from stgfast.kinds import KINDS
from tests.integrations.test_own_adapter import ADAPTER, WIDTH, HomemadePipeline
from tests.precision import distance, same

pytestmark = pytest.mark.usefixtures("float64")

KIND = '''
from stgfast.kinds import Kind, Mark, register


class Damped(Kind):
    """Self-attention gives a part of what it would."""

    name = "damped"
    alias = "half of it"
    inside = True

    def mark(self, part, unit, layout):
        return Mark(self.name)

    def attend(self, mark, attention):
        return attention.plain() / 2


register(Damped())
'''

FORMULA = '''
from stgfast.formulas import COND, UNCOND, Formula, Lost, register


class BesideCfg(Formula):
    """Of the perturbation's difference, what CFG says already is lost."""

    name = "beside-cfg"
    words = "of the perturbation, what lies along cond - uncond is left out"
    of_cfg = True
    shares = True

    def lost(self, guidance, branches):
        return Lost(guidance.names[0], {COND: 1.0, UNCOND: -1.0}, guidance.eta)


register(BesideCfg())
'''

PIPELINE = """
from stgfast.batching.layout import Blocks
from stgfast.guidance import Guidance
from stgfast.integrations.spec import Adapter
from stgfast.perturbation import Perturbation

HOMEMADE = Adapter(
    pipeline="HomemadePipeline",
    protocol="stacked",
    blocks=Blocks(
        lists=("layers",), state=("tokens",), attention="mixer", rows=frozenset({"x", "prompt", "time", "tokens"})
    ),
    requested=lambda call: call["strength"],
    live=lambda pipe, call, denoiser: pipe.strength,
    steps=lambda pipe: pipe.rounds,
    steps_asked=lambda call: call["rounds"],
    denoisers=("model",),
    sample="x",
    defaults=Guidance(Perturbation([4])),
)
"""


def imported(folder, name, text):
    path = folder / f"{name}.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


def dot(one, other):
    return (one * other).flatten(1).sum(1)[:, None, None]


def written_out(prompt, perturbing, combined, strength=3.0, rounds=4):
    """A clip by `combined(none, text, perturbed)`; `perturbing(block, x, prompt, time)` is the perturbed block 2."""
    pipe, x = HomemadePipeline(), torch.randn(len(prompt), 5, WIDTH, generator=torch.Generator().manual_seed(1))
    for i in range(rounds):
        time = torch.full((len(x),), 1 - i / rounds)
        (none,), (text,) = pipe.model(x, torch.zeros_like(prompt), time), pipe.model(x, prompt, time)
        perturbed = x
        for number, block in enumerate(pipe.model.layers):
            perturbed = perturbing(block, perturbed, prompt, time) if number == 2 else block(perturbed, prompt, time)
        x = x - 0.1 * (none + strength * (text - none) + combined(none, text, perturbed))
    return x


def made(guidance, prompt):
    pipe = stgfast.accelerate(HomemadePipeline(), guidance, adapter=ADAPTER)
    assert stgfast.explain(pipe).block_rows == 4 * (3 * 2 + 3 * 3 + (guidance.perturbations[0].kind == "damped"))
    with torch.no_grad():
        return pipe(prompt)


def test_a_kind_of_perturbation(tmp_path):
    imported(tmp_path, "damped", KIND)
    try:
        guidance = Guidance(Perturbation([2], kind="damped", scale=1.5))
        assert Guidance.from_json(guidance.to_json()) == guidance
        assert str(guidance) == "damped, layer 2, scale 1.5"
        prompt = torch.randn(2, WIDTH)

        def perturbing(block, x, prompt, time):
            x = x + block.mixer(x) / 2 + block.text(prompt)[:, None]
            return x + torch.tanh(block.ff(x)) * time[:, None, None]

        with torch.no_grad():
            expected = written_out(prompt, perturbing, lambda none, text, perturbed: 1.5 * (text - perturbed))
        same(made(guidance, prompt), expected)
        with pytest.raises(stgfast.SettingsError, match=r"'damped' \(half of it\)"):
            Perturbation([2], kind="dampd")
    finally:
        del KINDS["damped"]


def test_a_formula(tmp_path):
    imported(tmp_path, "beside_cfg", FORMULA)
    try:
        guidance = Guidance(Perturbation([2], scale=1.5), project="beside-cfg", eta=0.25)
        assert Guidance.from_json(guidance.to_json()) == guidance
        prompt = torch.randn(2, WIDTH)

        def combined(none, text, perturbed):
            cfg, difference = text - none, text - perturbed
            lost = dot(difference, cfg) / dot(cfg, cfg) * cfg
            return 1.5 * (difference - 0.75 * lost)

        with torch.no_grad():
            expected = written_out(prompt, lambda block, x, prompt, time: x, combined)
        same(made(guidance, prompt), expected)
        assert distance(expected, made(Guidance(guidance.perturbations), prompt)) > 1e-4
        pipe = stgfast.accelerate(HomemadePipeline(), guidance, adapter=ADAPTER)
        assert "along cond - uncond is left out, eta 0.25" in str(stgfast.explain(pipe))
        without = dataclasses.replace(ADAPTER, requested=lambda call: None)
        with pytest.raises(stgfast.SettingsError, match="project='beside-cfg': got a call without CFG"):
            stgfast.accelerate(HomemadePipeline(), guidance, adapter=without)(prompt)
    finally:
        del FORMULAS["beside-cfg"]


def test_a_pipeline(tmp_path, monkeypatch):
    (tmp_path / "homemade.py").write_text(PIPELINE)
    assert "HomemadePipeline" not in integrations.ADAPTERS
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(tmp_path)])
    monkeypatch.setattr(integrations, "ADAPTERS", integrations.discovered())
    prompt = torch.randn(2, WIDTH)
    with torch.no_grad():
        theirs = stgfast.accelerate(HomemadePipeline(), adapter=ADAPTER)(prompt)
        assert torch.equal(stgfast.accelerate(HomemadePipeline())(prompt), theirs)
