"""Settings: their meaning, their checks when they are made, and their conversion to JSON and back."""

import dataclasses
import json
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stgfast import BySigma, Guidance, Perturbation, SettingsError
from stgfast.presets import PRESETS
from stgfast.schedules import Moment

FIRST = Moment(0, 4)


def test_weights_are_the_formula():
    # g = u + s (c - u) + w (c - p), with s = 4, w = 2
    weights = Guidance(Perturbation([3], scale=2.0)).weights(FIRST, 4.0)
    assert weights == {"uncond": -3.0, "cond": 6.0, "perturbed0": -2.0}


def test_weights_without_cfg():
    assert Guidance(Perturbation([3], scale=0.5)).weights(FIRST, None) == {"cond": 1.5, "perturbed0": -0.5}


def test_weights_against_the_guided_result():
    # g = cfg + w (cfg - p) with cfg = u + s (c - u), as the paper's code has it for Wan
    weights = Guidance(Perturbation([3], scale=2.0, of="uncond", base="guided")).weights(FIRST, 4.0)
    assert weights == {"uncond": -9.0, "cond": 12.0, "perturbed0": -2.0}


def test_a_branch_of_weight_0_is_left_out():
    assert Guidance(Perturbation([3], scale=0.0)).weights(FIRST, 1.0) == {"cond": 1.0}


@given(
    st.lists(
        st.tuples(st.floats(-4, 4), st.sampled_from(["cond", "uncond"]), st.sampled_from(["cond", "guided"])),
        max_size=5,
    ),
    st.one_of(st.none(), st.floats(1, 12)),
)
def test_weights_add_up_to_1(parts, cfg):
    guidance = Guidance([Perturbation([i], scale=w, of=of, base=base) for i, (w, of, base) in enumerate(parts)])
    assert math.isclose(sum(guidance.weights(FIRST, cfg).values()), 1.0, abs_tol=1e-9)


def test_schedules():
    def scales(schedule, steps=4):
        guidance = Guidance(Perturbation([1], scale=schedule))
        return [-guidance.weights(Moment(step, steps), None).get("perturbed0", 0.0) for step in range(steps)]

    assert scales(2) == [2.0] * 4
    assert scales([0, 1, 2, 3]) == [0.0, 1.0, 2.0, 3.0]
    assert scales(lambda progress: 4 * progress) == [0.0, 1.0, 2.0, 3.0]
    # A scheduler may make more calls than the requested steps: a list is stretched over them.
    assert scales([0, 1, 2], steps=6) == [0.0, 0.0, 1.0, 1.0, 2.0, 2.0]


@pytest.mark.parametrize("steps", [1, 3, 7, 49, 50, 64])
def test_a_list_of_one_number_a_step_gives_each_step_its_own(steps):
    guidance = Guidance(Perturbation([1]), rescale=[i / steps for i in range(steps)])
    assert [guidance.phi(Moment(i, steps)) for i in range(steps)] == [i / steps for i in range(steps)]


def test_range_of_steps():
    guidance = Guidance(Perturbation([1]), start=0.25, stop=0.75)
    assert [guidance.acts(Moment(step, 4)) for step in range(4)] == [False, True, True, False]
    assert not Guidance(Perturbation([1], scale=[0, 1])).acts(Moment(0, 2))
    assert Guidance(cfg=[1, 5]).acts(Moment(0, 2))


def test_layers_are_a_set():
    assert Perturbation([5, 3, 3]).layers == (3, 5)
    assert Perturbation(range(2)).layers == (0, 1)


def test_settings_are_frozen():
    guidance = Guidance(Perturbation([1]))
    with pytest.raises(dataclasses.FrozenInstanceError):
        guidance.rescale = 0.5
    assert hash(guidance) == hash(Guidance([Perturbation((1,))]))


levels = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, unique_by=lambda pair: pair[0])
by_sigma = levels.map(lambda pairs: BySigma(sorted(pairs, reverse=True)))
numbers = st.one_of(st.integers(0, 5), st.floats(0, 1), st.lists(st.floats(0, 1), min_size=1, max_size=4), by_sigma)
spacings = st.integers(1, 9) | st.sets(st.integers(0, 30), min_size=1).map(sorted)
reuse = st.fixed_dictionaries({"reuse": spacings, "reuse_cfg": spacings})
ALONG = {"project": "along-cond"}
projections = st.sampled_from([{}, {"project": "along-uncond"}, ALONG, {**ALONG, "eta": 0.5}])


@given(
    st.lists(
        st.builds(
            Perturbation,
            layers=st.lists(st.integers(0, 59), min_size=1),
            kind=st.sampled_from(["residual", "attention"]),
            scale=numbers,
            of=st.sampled_from(["cond", "uncond"]),
            base=st.sampled_from(["", "cond", "uncond", "guided"]),
        ),
        max_size=5,
    ),
    st.floats(0, 1),
    st.one_of(st.none(), numbers),
    st.floats(0, 0.4),
    reuse,
    projections,
)
def test_json_there_and_back(perturbations, rescale, cfg, start, reused, projected):
    guidance = Guidance(perturbations, rescale=rescale, cfg=cfg, start=start, **reused, **projected)
    assert Guidance.from_json(guidance.to_json()) == guidance


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name):
    guidance = Guidance.preset(name)
    assert Guidance.from_json(guidance.to_json()) == guidance
    assert guidance.perturbations
    assert PRESETS[name].source


def test_an_unknown_preset():
    with pytest.raises(SettingsError, match="preset: got 'mochi-2', expected one of mochi, svd"):
        Guidance.preset("mochi-2")


def test_by_sigma():
    schedule = BySigma([(0.9, 1.0), (0.5, 3), (0.2, 0.0)])
    assert [schedule.at(sigma) for sigma in (1.0, 0.9, 0.89, 0.5, 0.3, 0.2, 0.0)] == [1.0, 1.0, 3.0, 3.0, 0.0, 0.0, 0.0]
    guidance = Guidance(Perturbation([1], scale=schedule))
    assert guidance.by_sigma
    assert guidance.weights(Moment(0, 4, 0.6), None) == {"cond": 4.0, "perturbed0": -3.0}
    assert not guidance.acts(Moment(0, 4, 0.1))
    with pytest.raises(SettingsError, match="over sigma: got a run whose sigmas are not known"):
        guidance.weights(Moment(0, 4), None)


def test_what_changes_cfg_alone():
    changed = ({"project": "along-cond"}, {"project": "along-uncond"}, {"reuse_cfg": 2}, {"cfg": 4.0})
    for guidance in (Guidance(**settings) for settings in changed):
        assert not guidance.inert
        assert guidance.acts(Moment(1, 4))
    assert Guidance(reuse=4).inert


@pytest.mark.parametrize("sigma", [None, 2, 0.5, math.inf])
def test_a_sigma_there_and_back(sigma):
    guidance = Guidance(Perturbation([1], kind="blur", sigma=sigma))
    assert guidance.perturbations[0].sigma == (math.inf if sigma is None else sigma)
    text = guidance.to_json()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert Guidance.from_json(text) == guidance


def test_a_sigma_goes_with_its_kind():
    guidance = Guidance(Perturbation([1], kind="blur", sigma=2.0))
    (kept,), (gone,), (come,) = (
        one.perturbations
        for one in (
            guidance.with_perturbation(scale=3.0),
            guidance.with_perturbation(kind="attention"),
            Guidance(Perturbation([1])).with_perturbation(kind="blur"),
        )
    )
    assert (kept.sigma, gone.sigma, come.sigma) == (2.0, None, math.inf)


def test_a_function_is_not_data():
    with pytest.raises(SettingsError, match="scale of perturbed0 to be written as data"):
        Guidance(Perturbation([1], scale=lambda p: p)).to_json()


WRONG = {
    "no layers": (lambda: Perturbation([]), "layers: got [], expected layer numbers such as [8]"),
    "a layer below 0": (lambda: Perturbation([-1]), "layers: got [-1]"),
    "a layer that is no number": (lambda: Perturbation(["a"]), "layers: got ['a']"),
    "one layer, not a list": (lambda: Perturbation(8), "layers: got 8, expected layer numbers such as [8]"),
    "a fraction of a layer": (lambda: Perturbation([1.5]), "layers: got [1.5]"),
    "an unknown kind": (
        lambda: Perturbation([1], kind="STG-X"),
        "got 'STG-X', expected 'attention' (STG-A), 'blur' (SEG), 'isolate' or 'residual' (STG-R)",
    ),
    "NaN": (lambda: Perturbation([1], scale=math.nan), "scale: got nan, expected a finite number"),
    "infinity": (lambda: Perturbation([1], scale=-math.inf), "scale: got -inf, expected a finite number"),
    "NaN in a schedule": (lambda: Perturbation([1], scale=[1, math.nan]), "scale at step 1: got nan"),
    "an empty schedule": (lambda: Perturbation([1], scale=[]), "scale: got [], expected one finite number for every"),
    "a scale that is no number": (lambda: Perturbation([1], scale="2"), "scale: got '2', expected a finite number"),
    "no scale": (lambda: Perturbation([1], scale=None), "scale: got None, expected a finite number"),
    "an unknown branch": (lambda: Perturbation([1], of="text"), "`of`: got 'text', expected 'cond' or 'uncond'"),
    "an unknown base": (lambda: Perturbation([1], base="u"), "got 'u', expected 'cond', 'uncond' or 'guided'"),
    "a sigma of 0": (
        lambda: Perturbation([1], kind="blur", sigma=0),
        "sigma: got 0, expected a number of tokens above",
    ),
    "a sigma that is NaN": (lambda: Perturbation([1], kind="blur", sigma=math.nan), "sigma: got nan"),
    "a sigma that is no number": (lambda: Perturbation([1], kind="blur", sigma="wide"), "sigma: got 'wide'"),
    "a sigma of another kind": (
        lambda: Perturbation([1], sigma=1.0),
        "sigma of a perturbation of kind 'residual': got 1.0, expected none",
    ),
    "a blur over time": (
        lambda: Perturbation([1], kind="blur", axis="temporal"),
        "axis of a blur: got 'temporal', expected 'spatial' or ''",
    ),
    "rescale above 1": (lambda: Guidance(rescale=1.5), "rescale: got 1.5, expected a number from 0 to 1"),
    "stop before start": (lambda: Guidance(start=0.5, stop=0.2), "start and stop: got (0.5, 0.2)"),
    "stop in steps": (lambda: Guidance(stop=30), "start and stop: got (0.0, 30.0), expected fractions of the run"),
    "NaN for start": (lambda: Guidance(start=math.nan), "start: got nan, expected a finite number"),
    "no perturbation": (lambda: Guidance([8]), "perturbations: got [8], expected a Perturbation or a list of them"),
    "an unknown projection": (
        lambda: Guidance(project="cfgzero"),
        "project: got 'cfgzero', expected 'along-cond', 'along-uncond', 'orthogonal', or ''",
    ),
    "one perturbation orthogonal": (
        lambda: Guidance(Perturbation([1]), project="orthogonal"),
        "perturbations with project='orthogonal': got ['cond against cond'], expected two of cond against cond",
    ),
    "orthogonal to another base": (
        lambda: Guidance([Perturbation([1]), Perturbation([2], base="guided")], project="orthogonal"),
        "got ['cond against cond', 'cond against guided'], expected two of cond against cond",
    ),
    "eta without APG": (lambda: Guidance(eta=0.5), "eta: got 0.5, expected 0: only project='along-cond' uses it"),
    "reuse below 1": (lambda: Guidance(reuse=0), "reuse: got 0, expected a number of steps, 1 (off) or more"),
    "steps that do not rise": (lambda: Guidance(reuse=[0, 3, 3]), "reuse: got [0, 3, 3], expected a number of steps"),
    "no steps": (lambda: Guidance(reuse_cfg=[]), "reuse_cfg: got [], expected a number of steps"),
    "steps below 0": (lambda: Guidance(reuse=[-1, 3]), "reuse: got [-1, 3], expected a number of steps"),
    "reuse of a fraction": (lambda: Guidance(reuse_cfg=1.5), "reuse_cfg: got 1.5, expected a number of steps"),
    "no levels": (lambda: BySigma([]), "levels of BySigma: got [], expected pairs of sigma and number"),
    "levels that are numbers": (lambda: BySigma([1.0, 2.0]), "levels of BySigma: got [1.0, 2.0], expected pairs"),
    "rising sigmas": (lambda: BySigma([(0.5, 1), (0.9, 2)]), "sigmas of BySigma: got [0.5, 0.9], expected falling"),
    "rescale above 1 by sigma": (lambda: Guidance(rescale=BySigma([(0.5, 2)])), "expected numbers from 0 to 1"),
    "an unknown field": (lambda: Guidance.from_dict({"scale": 1}), "fields of Guidance: got ['scale'], expected some"),
    "an unknown field inside": (
        lambda: Guidance.from_dict({"perturbations": [{"layer": 1}]}),
        "fields of Perturbation: got ['layer']",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_settings_say_so(name):
    make, message = WRONG[name]
    with pytest.raises(SettingsError, match=re.escape(message)):
        make()


@pytest.mark.parametrize(
    ("guidance", "message"),
    [
        (
            Guidance(Perturbation([1], scale=[1, 2, 3])),
            "scale of perturbed0: got 3 numbers, expected 5",
        ),
        (Guidance(rescale=lambda p: 2 * p), "rescale at step 3: got 1.2"),
        (Guidance(cfg=lambda p: math.nan), "cfg at progress 0: got nan"),
        (Guidance(Perturbation([1], scale=lambda p: None)), "scale of perturbed0 at progress 0: got None"),
    ],
)
def test_wrong_schedules_are_found_before_the_first_step(guidance, message):
    with pytest.raises(SettingsError, match=re.escape(message)):
        guidance.check_steps(5)
