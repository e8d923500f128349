"""Expectations: numbers and bounds of a manifest, and why a bare mean over a sample is none."""

import importlib
import pathlib

import numpy as np
import pytest

from jaxgpt.evaluation.intervals import mean_metric
from jaxgpt.evaluation.results import final_metrics, intervals
from jaxgpt.pipeline.expectations import check_expectation, judge

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
MANIFEST = {
    "final_metrics": {"eval/loss": 3.0, "eval/scores": 0.5, "eval/scores_stderr": 0.1, "q/rate": 0.5, "q/one": 1.0},
    "intervals": {"q/rate": {"low": 0.378, "high": 0.622}, "q/one": {"low": None, "high": None}},
    "reference_lines": {"unigram entropy": 5.0},
    "report_card": {"accuracy": {"accuracy": 0.55, "low": 0.49, "high": 0.61}},
}
FIRST = {"eval/loss": 4.0, "eval/scores": 0.2, "eval/scores_stderr": 0.05}


@pytest.mark.parametrize(
    ("text", "left", "right", "holds"),
    [
        ("final_metrics.eval/loss < 0.9 * first.eval/loss", 3.0, 3.6, True),
        ("final_metrics.eval/loss < 0.7 * first.eval/loss", 3.0, 2.8, False),
        ("final_metrics.eval/loss > 2.9", 3.0, 2.9, True),
        ("reference_lines.unigram entropy > final_metrics.eval/loss", 5.0, 3.0, True),
        ("report_card.accuracy.low > 0.5", 0.49, 0.5, False),
        ("final_metrics.q/rate.high > 0.5", 0.622, 0.5, True),
        ("final_metrics.q/rate.low > 0.4", 0.378, 0.4, False),
        ("final_metrics.eval/scores.low > 1 * first.eval/scores.high", 0.304, 0.298, True),
        ("first.eval/scores.low > -0.5 * final_metrics.eval/scores.high", 0.102, -0.348, True),
    ],
)
def test_numbers_and_bounds_are_compared(text, left, right, holds):
    (verdict,) = judge([text], MANIFEST, FIRST)
    assert (verdict.text, verdict.holds) == (text, holds)
    assert (verdict.left, verdict.right) == pytest.approx((left, right), abs=1e-5)
    assert str(verdict) == f"{text} ({verdict.left:.4g} against {verdict.right:.4g})"


def test_nan_fulfils_nothing():
    manifest = {"final_metrics": {"eval/loss": float("nan")}}
    texts = ["final_metrics.eval/loss < 1", "final_metrics.eval/loss > 1"]
    assert [verdict.holds for verdict in judge(texts, manifest, {})] == [False, False]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("final_metrics.eval/los < 1", "nearest is 'eval/loss'"),
        ("final_metrics.eval/loss.low < 1", "no interval for final_metrics.eval/loss"),
        ("first.eval/loss.high < 1", "no interval for first.eval/loss"),
        ("final_metrics.q/one.low < 1", "no interval for final_metrics.q/one"),
        ("report_card.accuracy < 1", "not a number"),
    ],
)
def test_a_path_that_leads_nowhere_is_one_sentence(text, words):
    with pytest.raises(ValueError, match=words):
        judge([text], MANIFEST, FIRST)


@pytest.mark.parametrize(
    ("command", "text", "words"),
    [
        ("sft", "loss is low", "is not a comparison"),
        ("evaluate", "final_metrics.win_rate/win_rate > 0.5", "of final_metrics.win_rate/win_rate, the bounds"),
        ("evaluate", "0.5 < final_metrics.sums/exact_match", "of final_metrics.sums/exact_match, the bounds"),
        ("ppo", "final_metrics.eval/scores.low > first.eval/scores", "of first.eval/scores, the bounds"),
        ("grpo", "final_metrics.eval/gold > 0.9", "of final_metrics.eval/gold, the bounds"),
        (
            "grpo",
            "final_metrics.eval/loss < 0.9",
            "of final_metrics.eval/gold or final_metrics.eval/scores, the bounds",
        ),
        ("reward", "report_card.accuracy.accuracy > 0.5", "of report_card.accuracy, the bounds"),
        ("reward", "final_metrics.eval/accuracy > 0.5", "of report_card.accuracy, the bounds"),
    ],
)
def test_a_bare_mean_over_a_sample_is_refused_with_the_bound_to_compare(command, text, words):
    with pytest.raises(ValueError, match=words):
        check_expectation(text, command)


@pytest.mark.parametrize(
    ("command", "text"),
    [
        ("evaluate", "final_metrics.win_rate/win_rate.high > 0.4"), ("ppo", "final_metrics.eval/kl < 5"),
        ("ppo", "final_metrics.eval/scores.high > first.eval/scores.low"), ("reward", "report_card.accuracy.low > 0.4"),
        ("sft", "final_metrics.eval/loss < 0.9 * first.eval/loss"), ("evaluate", "counts.q > 3"),
    ],
)  # fmt: skip
def test_bounds_and_what_is_no_sample_are_not_refused(command, text):
    check_expectation(text, command)


def test_an_evaluation_has_the_bounds_of_all_its_metrics():
    tasks = {
        "win_rate": {"metrics": {"win_rate": mean_metric(np.repeat([1, 0.5, 0], [27, 7, 27])), "one": mean_metric([1])}}
    }
    manifest = {"final_metrics": final_metrics(tasks), "intervals": intervals(tasks)}
    # Wilson's interval of half of 61, by hand.
    half = 1.959963985 / (1 + 1.959963985**2 / 61) * (0.25 / 61 + 1.959963985**2 / (4 * 61**2)) ** 0.5
    high, low = judge([f"final_metrics.win_rate/win_rate.{side} > 0.4" for side in ("high", "low")], manifest, {})
    assert (high.holds, low.holds) == (True, False)
    assert (high.left, low.left) == pytest.approx((0.5 + half, 0.5 - half), abs=1e-9)


def chance(rate: float, count: int, bound: float, side: str) -> float:
    """The probability that count answers, each right at this rate, have an interval with a bound on the wrong side."""
    rng = np.random.default_rng(0)
    rates = rng.binomial(count, rate, 20_000) / count
    z = 1.959963985
    half = z / (1 + z**2 / count) * np.sqrt(rates * (1 - rates) / count + z**2 / (4 * count**2))
    center = (rates + z**2 / (2 * count)) / (1 + z**2 / count)
    low, high = center - half, center + half
    return float(np.mean({"low >": low <= bound, "high >": high <= bound, "low <": low >= bound}[side]))


# What was measured with right programs, at its worst: rate, answers, and the expectation that must hold all the same.
@pytest.mark.parametrize(
    ("rate", "count", "side", "bound", "text"),
    [
        (0.5, 61, "high >", 0.4, "final_metrics.win_rate/win_rate.high > 0.4"),
        (0.63, 182, "low >", 0.4, "report_card.accuracy.low > 0.4"),
        (0.955, 512, "low >", 0.8, "final_metrics.eval/scores.low > 0.8"),
        (0.526, 512, "low <", 0.7, "first.eval/scores.low < 0.7"),
        (0.959, 1000, "low >", 0.8, "final_metrics.sums/exact_match.low > 0.8"),
        (0.526, 1000, "low <", 0.7, "final_metrics.sums/exact_match.low < 0.7"),
    ],
)
def test_what_a_user_runs_first_does_not_fail_by_chance(rate, count, side, bound, text):
    expected = [
        text
        for name in ("pipeline", "arithmetic")
        for stage in importlib.import_module(f"configs.{name}").get_config().stages.values()
        for text in stage.get("expect", ())
    ]
    assert text in expected
    assert chance(rate, count, bound, side) < 1e-4
