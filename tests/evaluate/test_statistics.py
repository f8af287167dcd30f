"""Statistics of many clips, against closed forms and against counting by hand."""

import itertools
import math

import numpy as np
import pytest

from stgfast.evaluate.statistics import Cloud, Estimate, diversity, estimated, mean, quantile


def test_a_mean_has_its_textbook_interval():
    values = np.random.default_rng(0).normal(size=20)
    found = estimated(lambda chosen: mean(values[chosen]), np.arange(20))
    assert found.value == pytest.approx(values.mean())
    assert found.half == pytest.approx(quantile(19) * values.std(ddof=1) / math.sqrt(20))


def test_intervals_hold_as_often_as_they_say():
    random = np.random.default_rng(1)
    hits = 0
    for _ in range(600):
        # Clips of a prompt are similar. If they counted as independent, the interval would be too short.
        values = np.repeat(random.normal(size=40), 4) + 0.3 * random.normal(size=160)
        found = estimated(lambda chosen, values=values: mean(values[chosen]), np.repeat(np.arange(40), 4))
        hits += abs(found.value) <= found.half
    assert 0.92 <= hits / 600 <= 0.98


def test_few_clips_have_no_interval():
    found = estimated(lambda chosen: mean(np.ones(3)[chosen]), np.arange(3))
    assert found.value == 1
    assert math.isnan(found.half)
    assert not found.apart
    assert str(found) == "1"
    assert str(Estimate(0.25, 0.0123)) == "0.25 ± 0.012"


def test_students_t():
    for freedom, right in ((3, 3.1824), (7, 2.3646), (31, 2.0395)):
        assert quantile(freedom) == pytest.approx(right, rel=0.01)


def test_means_of_what_is_there():
    assert mean(np.array([1.0, math.nan, 3.0])) == 2
    assert math.isnan(mean(np.array([math.nan])))


def test_diversity_is_the_distance_of_pairs():
    random = np.random.default_rng(2)
    features, prompts = random.normal(size=(9, 5)), np.array([0, 0, 0, 1, 1, 1, 1, 2, 2])
    by_prompt = []
    for prompt in range(3):
        pairs = itertools.combinations(features[prompts == prompt], 2)
        by_prompt.append(math.sqrt(np.mean([np.square(one - other).mean() for one, other in pairs])))
    assert diversity(features, prompts) == pytest.approx(np.mean(by_prompt))
    assert math.isnan(diversity(features[:2], np.array([0, 1])))


def test_frechet_distance_of_normal_distributions():
    random = np.random.default_rng(3)
    turn = np.linalg.qr(random.normal(size=(4, 4)))[0]
    one, other = np.diag([1.0, 4.0, 0.25, 2.0]), np.diag([4.0, 1.0, 0.25, 0.5])
    # Both have the same axes, so the distance is that of their deviations along each axis.
    right = 4 + np.square(np.sqrt(np.diag(one)) - np.sqrt(np.diag(other))).sum()
    cloud = Cloud.given(np.zeros(4), turn @ one @ turn.T)
    samples = random.normal(size=(20000, 4)) @ np.sqrt(other) @ turn.T
    samples += np.array([2.0, 0, 0, 0])
    assert cloud.distance(samples) == pytest.approx(right, rel=0.02)
    assert Cloud.of(samples).distance(samples) == pytest.approx(0, abs=1e-9)
    assert math.isnan(cloud.distance(samples[:1]))
