"""Which recipes are tried, given up and chosen."""

import math

import pytest

from stgfast import Recipe, SettingsError
from stgfast.spacing import eased, spaced, thinning
from stgfast.tune.search import Aim, Trial, candidates, front, given_up

USUAL = Recipe(model={"pipeline": "P"}, steps=30)


def trial(cost, *distances, steps=9):
    return Trial(Recipe(model=USUAL.model, steps=steps), cost, dict(enumerate(distances)))


def test_candidates_are_all_there_is_and_none_twice():
    tried = list(candidates(USUAL, ["", "unipc"], perturbed=True, cfg=True, blocks=True))
    assert len({str(recipe) for recipe in tried}) == len(tried)
    assert USUAL not in tried
    assert tried[0].solver == "unipc"
    assert {recipe.solver for recipe in tried} == {"", "unipc"}
    assert max(recipe.steps for recipe in tried) == 30
    assert {recipe.reuse_order for recipe in tried} == {None, 1, 2}
    assert all(recipe.reuse == recipe.reuse_cfg for recipe in tried)
    assert any(recipe.reuse_blocks == (0, 1, 2, 3, 4, 6, 9, 12, 15, 18, 21, 24, 27, 29) for recipe in tried)


def test_only_what_there_is_is_carried_on():
    assert all(recipe.reuse == 1 for recipe in candidates(USUAL, [""], perturbed=False, cfg=True, blocks=False))
    assert all(recipe.reuse_cfg == 1 for recipe in candidates(USUAL, [""], perturbed=True, cfg=False, blocks=False))
    assert all(
        recipe.reuse_order is None for recipe in candidates(USUAL, [""], perturbed=False, cfg=False, blocks=False)
    )


def test_steps_thin_out():
    assert thinning(20, 4, 0.0) == (0, 1, 2, 3, 5, 7, 9, 11, 13, 15, 17, 19)
    assert thinning(20, 4, 0.1) == (0, 1, 2, 3, 5, 7, 10, 12, 15, 18)
    assert thinning(3, 4, 0.1) == (0, 1, 2)


def test_steps_are_spaced():
    assert spaced(12, 3, 3) == (0, 1, 2, 5, 8, 11)
    assert spaced(13, 3, 3) == (0, 1, 2, 5, 8, 11, 12)
    assert eased(13, 3, 3) == (0, 1, 2, 4, 7, 10, 12)
    assert eased(13, 3, 2) == spaced(13, 3, 2) == (0, 1, 2, 4, 6, 8, 10, 12)
    assert spaced(2, 3, 3) == eased(2, 3, 3) == (0, 1)


def test_given_up_is_what_is_beaten_for_no_more_work():
    good, dearer, worse = trial(0.5, 0.02, 0.03), trial(0.6, 0.021, 0.031), trial(0.5, 0.04, 0.05)
    cheap, once = trial(0.2, 0.2, 0.3), trial(0.5, 0.9)
    assert given_up([good, dearer, worse, cheap, once]) == [worse]  # near enough, cheaper, or measured on too few clips
    assert given_up([trial(0.5, 0.0, 0.0), trial(0.5, 0.1, 0.1)]) == []


def test_the_front_is_of_those_that_made_all_clips():
    one, two, three, few = trial(0.2, 0.2, 0.2), trial(0.5, 0.1, 0.1), trial(0.6, 0.15, 0.15), trial(0.1, 0.0)
    assert front([three, few, two, one]) == [one, two]


def test_what_is_chosen():
    one, two, usual = trial(0.2, 0.2), trial(0.5, 0.1), trial(1.0, 0.12)
    every = [one, two, usual]
    assert Aim().choose(every, usual) is two
    assert Aim(distance=0.3).choose(every, usual) is one
    assert Aim(distance=0.05).choose(every, usual) is None
    assert Aim(cost=0.4).choose(every, usual) is one
    assert Aim(cost=0.1).choose(every, usual) is None
    assert math.isinf(trial(0.1).distance)


def test_wrong_aims_say_so():
    with pytest.raises(SettingsError, match="distance and cost: got both, expected one of them"):
        Aim(distance=0.1, cost=0.1)
    for wrong in ({"distance": 0}, {"cost": -1}, {"cost": math.nan}):
        with pytest.raises(SettingsError, match="expected a number above 0"):
            Aim(**wrong)
