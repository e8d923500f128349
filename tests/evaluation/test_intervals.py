"""Intervals against closed forms, and the length effect against data where it is known."""

import math

import numpy as np
import pytest

from jaxgpt.evaluation.intervals import length_controlled_win_rate, mean_metric, ratio_metric


def test_a_rate_has_wilsons_interval():
    metric = mean_metric(np.array([1.0] * 7 + [0.0] * 3))
    # Its ends solve (p - x)^2 = z^2 x (1 - x) / n.
    z2, n, p = 1.959964**2, 10, 0.7
    ends = np.sort(np.roots([1 + z2 / n, -(2 * p + z2 / n), p**2]))
    np.testing.assert_allclose([metric["low"], metric["high"]], ends, rtol=1e-6)
    assert metric["value"] == pytest.approx(0.7)
    assert metric["stderr"] == pytest.approx(math.sqrt(0.21 / 9))
    assert metric["n"] == 10


def test_a_score_has_a_normal_interval_and_one_record_none():
    values = np.random.default_rng(0).uniform(size=50)
    metric = mean_metric(values)
    assert metric["stderr"] == pytest.approx(values.std(ddof=1) / math.sqrt(50))
    assert metric["high"] == pytest.approx(values.mean() + 1.959964 * metric["stderr"])
    assert mean_metric(np.array([0.3])) == {"value": 0.3, "stderr": None, "low": None, "high": None, "n": 1}
    assert mean_metric(np.ones(5))["low"] == pytest.approx(1 / (1 + 1.959964**2 / 5))


def test_a_ratio_varies_as_the_jackknife_says():
    rng = np.random.default_rng(1)
    weights = rng.integers(5, 50, 400)
    sums = weights * rng.normal(2, 0.3, 400) + rng.normal(0, 5, 400)
    metric = ratio_metric(sums, weights)
    assert metric["value"] == pytest.approx(sums.sum() / weights.sum())
    without = (sums.sum() - sums) / (weights.sum() - weights)
    jackknife = math.sqrt(399 / 400 * np.sum((without - without.mean()) ** 2))
    assert metric["stderr"] == pytest.approx(jackknife, rel=0.01)


def test_two_lengths_give_the_closed_form():
    # d = +-1 equally often: std is 1, and both groups are fitted exactly, logit(p) = a +- b tanh(1).
    n, p, q = 20_000, 0.8, 0.4
    wins = np.concatenate([np.arange(n) < p * n, np.arange(n) < q * n]).astype(float)
    found = length_controlled_win_rate(wins, np.repeat([7.0, -7.0], n))
    logit = lambda x: math.log(x / (1 - x))
    a = (logit(p) + logit(q)) / 2
    assert found["value"] == pytest.approx(1 / (1 + math.exp(-a)), abs=1e-5)
    stderr = math.sqrt((1 / (n * p * (1 - p)) + 1 / (n * q * (1 - q))) / 4)
    low, high = (1 / (1 + math.exp(-(a + sign * 1.959964 * stderr))) for sign in (-1, 1))
    np.testing.assert_allclose([found["low"], found["high"]], [low, high], atol=1e-5)


def test_wins_that_follow_the_curve_give_it_back_without_error():
    differences = np.random.default_rng(4).standard_cauchy(50_000)  # some are far out, where tanh is flat
    wins = 1 / (1 + np.exp(-0.7 + 1.2 * np.tanh(differences / differences.std())))
    found = length_controlled_win_rate(wins, differences)
    assert found["value"] == pytest.approx(1 / (1 + math.exp(-0.7)), abs=1e-4)
    assert found["high"] - found["low"] < 1e-3  # the wins are no coin tosses: the sandwich sees that


def test_the_win_rate_of_a_model_that_only_writes_longer_is_one_half():
    rng = np.random.default_rng(2)
    differences = rng.normal(30, 60, 20_000)
    chances = 1 / (1 + np.exp(-2.5 * np.tanh(differences / differences.std())))
    wins = (rng.uniform(size=20_000) < chances).astype(float)
    assert wins.mean() > 0.63
    found = length_controlled_win_rate(wins, differences)
    assert found["value"] == pytest.approx(0.5, abs=0.015)
    assert found["low"] < 0.5 < found["high"]


def test_ties_count_half_and_the_interval_covers():
    rng = np.random.default_rng(3)
    truth, inside = 1 / (1 + math.exp(-0.4)), 0
    for _ in range(200):
        differences = rng.normal(size=150)
        chances = 1 / (1 + np.exp(-0.4 - 1.5 * np.tanh(differences / differences.std())))
        wins = (rng.uniform(size=(2, 150)) < chances).mean(axis=0)  # of two looks: 0, 1/2 or 1
        found = length_controlled_win_rate(wins, differences)
        inside += found["low"] <= truth <= found["high"]
    assert 180 <= inside <= 199


def test_nothing_diverges_where_length_tells_all_or_nothing():
    differences = np.array([-3.0, -2, -1, 1, 2, 3])
    separated = length_controlled_win_rate((differences > 0).astype(float), differences)
    assert separated["value"] == pytest.approx(0.5)
    assert 0 < separated["low"] < 0.5 < separated["high"] < 1
    wins = np.array([1.0, 1, 0, 0.5])
    assert length_controlled_win_rate(wins, np.full(4, 9.0)) == mean_metric(wins)
    assert length_controlled_win_rate(np.ones(6), differences) == mean_metric(np.ones(6))
