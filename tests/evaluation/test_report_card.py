"""The report card of a reward model against closed forms, published intervals and samples of known calibration."""

import dataclasses
import json
import math
import pathlib

import numpy as np
import pytest

from jaxgpt.config import build
from jaxgpt.evaluation.intervals import wilson_interval
from jaxgpt.evaluation.report_card import (
    PairScores,
    Thresholds,
    accuracy_interval,
    calibration,
    equal_count_groups,
    report_card,
)
from jaxgpt.reporting.report import write_report
from jaxgpt.reporting.report_card_view import plot_report_card, report_card_html


def pairs(difference, **fields):
    """Scores with these reward differences; every pair from a prompt of its own, of one source, with equal lengths."""
    difference = np.asarray(difference, np.float64)
    n = len(difference)
    defaults = {
        "chosen_N": difference / 2,
        "rejected_N": -difference / 2,
        "chosen_lengths_N": np.full(n, 10),
        "rejected_lengths_N": np.full(n, 10),
        "sources_N": np.full(n, "web"),
        "margins_N": np.zeros(n),
        "prompts_N": np.arange(n),
    }
    return PairScores(**defaults | fields)


def card_of(scores, thresholds=None, **gaps):
    return report_card(scores, thresholds or Thresholds(), **{"swap_gap": 0.0, "pad_gap": 0.0} | gaps)


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [
        (8, 10, 0.4902, 0.9433),
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)  # the last four: Newcombe 1998, Two-sided confidence intervals for the single proportion, table I, method 3
def test_accuracy_and_its_interval_are_the_published_ones(right, count, low, high):
    rate = card_of(pairs([1.0] * right + [-1.0] * (count - right)))["accuracy"]
    assert rate["accuracy"] == right / count
    assert (rate["pairs"], rate["prompts"]) == (count, count)
    np.testing.assert_allclose([rate["low"], rate["high"]], [low, high], atol=5e-5)


def test_the_interval_holds_its_rate_and_stays_a_probability():
    for count in range(1, 60):
        for right in range(count + 1):
            low, high = wilson_interval(right / count, count)
            assert 0 <= low <= right / count <= high <= 1
        assert wilson_interval(0, count)[0] == 0
        assert wilson_interval(1, count)[1] == 1


def test_ties_count_half():
    assert card_of(pairs([2.0, 0.0, 0.0, -1.0, 3.0]))["accuracy"]["accuracy"] == 0.6


@pytest.mark.parametrize(("prompts", "trials"), [(40, 39), (8, 8)])
def test_pairs_that_repeat_one_another_tell_no_more_than_their_prompts(prompts, trials):
    """All pairs of a prompt agree: as if each were one trial (less one for estimating that, where there are enough)."""
    once = np.arange(prompts) % 4 > 0
    interval = accuracy_interval(np.repeat(once, 6).astype(float), np.repeat(np.arange(prompts), 6))
    np.testing.assert_allclose(interval, wilson_interval(0.75, trials), rtol=1e-12)


def test_a_perfect_score_on_few_prompts_is_not_certain():
    low, high = accuracy_interval(np.ones(60), np.repeat(np.arange(20), 3))
    assert high == 1
    np.testing.assert_allclose(low, 20 / (20 + 1.959963985**2), rtol=1e-9)


@pytest.mark.parametrize(("prompts", "share"), [(300, 1), (60, 6)])
def test_the_interval_holds_the_truth_nineteen_times_of_twenty(prompts, share):
    rng = np.random.default_rng(0)
    ids = np.repeat(np.arange(prompts), share)
    covered = naive = 0
    for _ in range(1000):
        rates = rng.beta(1.4, 0.6, size=prompts)  # mean 0.7; two pairs of a prompt correlate by 1/3
        correct = (rng.random(prompts * share) < np.repeat(rates, share)).astype(float)
        low, high = accuracy_interval(correct, ids)
        covered += low <= 0.7 <= high
        low, high = wilson_interval(correct.mean(), len(correct))
        naive += low <= 0.7 <= high
    assert 930 <= covered <= 970  # 950 ± 3 standard errors of 1000 draws
    assert (naive > 930) == (share == 1)


def at(probability, right, wrong):
    """Differences whose sigmoid is the probability of the preferred response, which is the chosen `right` times."""
    size = math.log(probability / (1 - probability))
    return [size] * right + [-size] * wrong


def test_calibrated_bins_have_no_error():
    scores = pairs(at(0.75, 30, 10) + at(0.9, 36, 4) + at(0.5, 20, 0))
    fit = card_of(scores)["calibration"]
    assert fit["ece"] < 1e-12
    np.testing.assert_allclose([b["confidence"] for b in fit["bins"]], [0.5, 0.75, 0.9], rtol=1e-12)
    np.testing.assert_allclose([b["accuracy"] for b in fit["bins"]], [0.5, 0.75, 0.9], rtol=1e-12)


def test_miscalibration_by_hand():
    fit = card_of(pairs(at(0.75, 20, 20) + at(0.9, 36, 4)))["calibration"]
    np.testing.assert_allclose(fit["ece"], (0.25 + 0) / 2, rtol=1e-12)
    np.testing.assert_allclose(fit["brier"], ((0.25**2 + 0.75**2) / 2 + 0.9 * 0.1**2 + 0.1 * 0.9**2) / 2, rtol=1e-12)
    loss = (-(math.log(0.75) + math.log(0.25)) / 2 - 0.9 * math.log(0.9) - 0.1 * math.log(0.1)) / 2
    np.testing.assert_allclose(fit["log_loss"], loss, rtol=1e-12)
    assert [b["pairs"] for b in fit["bins"]] == [40, 40]


def test_a_reward_of_nothing_scores_as_a_coin():
    fit = card_of(pairs(np.zeros(30)))["calibration"]
    assert (fit["ece"], fit["brier"]) == (0, 0.25)
    np.testing.assert_allclose(fit["log_loss"], math.log(2), rtol=1e-12)


def test_a_large_difference_overflows_nothing():
    fit = card_of(pairs([1e4, -1e4]))["calibration"]
    assert fit["log_loss"] == 5e3
    assert fit["brier"] == 0.5


def bradley_terry(rng, count):
    """Differences chosen - rejected of a judge who prefers by sigmoid of the reward."""
    difference = rng.normal(size=(2, count)).T @ np.array([1.0, -1.0])
    return np.where(rng.random(count) < 1 / (1 + np.exp(-difference)), difference, -difference)


def test_the_true_reward_is_calibrated_and_three_times_it_is_not():
    difference, prompts = bradley_terry(np.random.default_rng(1), 20_000), np.arange(20_000)
    true, scaled = calibration(difference, prompts), calibration(3 * difference, prompts)
    assert true["ece"] < 0.02  # the standard error of a bin of 2000 is at most 0.011
    assert scaled["ece"] > 0.1
    assert true["log_loss"] < scaled["log_loss"]
    assert true["brier"] < scaled["brier"]


def test_the_error_expected_by_chance_is_what_calibrated_samples_show():
    rng = np.random.default_rng(2)
    fits = [calibration(bradley_terry(rng, 400), np.arange(400)) for _ in range(60)]
    seen = [fit["ece"] for fit in fits]
    standard_error = np.std(seen) / math.sqrt(len(seen))
    assert abs(np.mean(seen) - np.mean([fit["ece_if_calibrated"] for fit in fits])) < 4 * standard_error


@pytest.mark.parametrize(("slope", "correlation"), [(0.02, 1.0), (-0.005, -1.0), (0.0, 0.0)])
def test_a_reward_linear_in_length(slope, correlation):
    chosen, rejected = np.arange(5, 65), np.arange(120, 60, -1)
    scores = pairs(np.zeros(60), chosen_lengths_N=chosen, rejected_lengths_N=rejected,
                   chosen_N=slope * chosen - 1.0, rejected_N=slope * rejected - 1.0)  # fmt: skip
    length = card_of(scores)["length"]
    np.testing.assert_allclose(length["reward_per_100_tokens"], 100 * slope, rtol=1e-12)
    np.testing.assert_allclose(length["intercept"], -1, rtol=1e-12)
    np.testing.assert_allclose(length["correlation"], correlation, rtol=1e-12)
    for b in length["bins"]:
        assert b["responses"] == 12
        np.testing.assert_allclose(b["reward"], slope * b["tokens"] - 1, rtol=1e-12)


def test_the_slope_of_noisy_rewards_is_numpys():
    rng = np.random.default_rng(3)
    fields = {f"{side}_lengths_N": rng.integers(1, 300, 80) for side in ("chosen", "rejected")}
    scores = pairs(rng.normal(size=80), **fields)
    lengths = np.concatenate([scores.chosen_lengths_N, scores.rejected_lengths_N])
    rewards = np.concatenate([scores.chosen_N, scores.rejected_N])
    length = card_of(scores)["length"]
    slope, intercept = np.polyfit(lengths, rewards, 1)
    np.testing.assert_allclose(length["reward_per_100_tokens"], 100 * slope, rtol=1e-9)
    np.testing.assert_allclose(length["intercept"], intercept, rtol=1e-9)
    np.testing.assert_allclose(length["correlation"], np.corrcoef(lengths, rewards)[0, 1], rtol=1e-9)


def test_the_baseline_prefers_the_longer_response():
    scores = pairs(np.ones(5), chosen_lengths_N=np.array([9, 9, 3, 4, 7], np.uint8),
                   rejected_lengths_N=np.array([8, 2, 5, 4, 1], np.uint8))  # fmt: skip
    longer = card_of(scores)["length"]["longer_wins"]
    assert longer["accuracy"] == 3.5 / 5


def test_sources_are_judged_apart():
    scores = pairs([1.0, -1.0, 1.0, 1.0], sources_N=np.array(["b", "b", "a", "a"]), prompts_N=np.array([0, 0, 0, 1]))
    rows = card_of(scores)["by_source"]
    assert [(r["name"], r["accuracy"], r["pairs"], r["prompts"]) for r in rows] == [("a", 1.0, 2, 2), ("b", 0.5, 2, 1)]


def test_buckets_go_by_stated_margins_and_keep_the_pairs_without_one_apart():
    card = card_of(pairs([1.0, -1.0, 1.0, 1.0, -1.0], margins_N=np.array([1.0, -1.0, 2.0, 3.0, 0.0])))
    assert card["margin_kind"] == "stated margin"
    assert [(r["name"], r["pairs"], r["accuracy"]) for r in card["by_margin"]] == [
        ("stated margin 1", 2, 0.5),
        ("stated margin 2", 1, 1),
        ("stated margin 3", 1, 1),
        ("no stated margin", 1, 0),
    ]


def test_without_margins_the_buckets_go_by_the_models_own_difference():
    card = card_of(pairs([-0.1, 0.2, 0.3, -0.4, 5, 6, 7, 8]))
    assert card["margin_kind"] == "reward difference"
    assert [(r["name"], r["accuracy"]) for r in card["by_margin"]] == [
        ("reward difference 0.1 to 0.2", 0.5),
        ("reward difference 0.3 to 0.4", 0.5),
        ("reward difference 5 to 6", 1),
        ("reward difference 7 to 8", 1),
    ]


@pytest.mark.parametrize(("count", "groups"), [(100, 10), (101, 10), (7, 3), (3, 4), (1, 4)])
def test_groups_are_of_equal_size_whatever_the_order(count, groups):
    values = np.random.default_rng(4).permutation(count).astype(float)
    found = equal_count_groups(values, groups)
    sizes = [len(g) for g in found]
    assert len(found) == min(count, groups)
    assert max(sizes) - min(sizes) <= 1
    assert np.concatenate([np.sort(values[g]) for g in found]).tolist() == list(range(count))


def test_equal_values_are_not_parted():
    values = np.array([2.0, 1, 2, 2, 1, 3])
    assert [values[g].tolist() for g in equal_count_groups(values, 3)] == [[1, 1], [2, 2, 2], [3]]


def test_every_reward_is_in_the_histogram():
    rng = np.random.default_rng(5)
    rewards = card_of(pairs(rng.normal(size=77), rejected_N=rng.normal(-5, 1, size=77)))["rewards"]
    assert len(rewards["edges"]) == len(rewards["chosen"]) + 1
    assert sum(rewards["chosen"]) == sum(rewards["rejected"]) == 77
    center = np.convolve(rewards["edges"], [0.5, 0.5], "valid")
    np.testing.assert_allclose(center @ rewards["rejected"] / 77, rewards["rejected_mean"], atol=0.2)


@pytest.mark.parametrize("level", [0.0, 3.0, -1e6])
def test_a_model_that_gives_everything_one_reward_breaks_no_histogram(level):
    chosen, nearly = np.full(4, level), np.array([level, level, np.nextafter(level, 1), level])
    rewards = card_of(pairs(np.zeros(4), chosen_N=chosen, rejected_N=nearly))["rewards"]
    assert sum(rewards["chosen"]) == sum(rewards["rejected"]) == 4
    assert min(np.diff(rewards["edges"])) > 0
    assert card_of(pairs(np.zeros(4), chosen_N=chosen, rejected_N=chosen))["failures"] == [
        "The accuracy is 0.5, below report_card.min_accuracy=0.55."
    ]


GOOD = at(0.75, 30, 10)  # accuracy 0.75, calibrated
LONG = {"chosen_lengths_N": np.repeat([20, 5], [30, 10]), "rejected_lengths_N": np.full(40, 10)}  # longer is as good
OFF = {"min_accuracy": None, "max_ece": None, "max_symmetry_gap": None, "max_length_correlation": None}


@pytest.mark.parametrize(
    ("difference", "fields", "limits", "gaps", "failures"),
    [
        (GOOD, {}, {}, {"swap_gap": 1e-3, "pad_gap": 1e-3}, []),
        (GOOD, {}, {"min_accuracy": 0.75}, {}, []),
        (GOOD, {}, {"min_accuracy": 0.76}, {}, ["The accuracy is 0.75, below report_card.min_accuracy=0.76."]),
        (at(0.99, 24, 16), {}, {}, {}, ["The expected calibration error is 0.39, above report_card.max_ece=0.15."]),
        (
            GOOD, {}, {}, {"swap_gap": 0.5, "pad_gap": 0.002},
            [
                "The change of a reward when a pair is swapped is 0.5, above report_card.max_symmetry_gap=0.001.",
                "The change of a reward with other padding is 0.002, above report_card.max_symmetry_gap=0.001.",
            ],
        ),
        (GOOD, {}, {"max_symmetry_gap": 0}, {}, []),
        (
            GOOD, {}, {"max_symmetry_gap": 0}, {"pad_gap": 1e-9},
            ["The change of a reward with other padding is 1e-09, above report_card.max_symmetry_gap=0."],
        ),
        (
            [1.0] * 8, {"chosen_lengths_N": np.full(8, 2)}, {"max_ece": None}, {},
            ["The correlation of reward with length is -1, above report_card.max_length_correlation=0.9 in size."],
        ),
        (
            GOOD, LONG, {"must_beat_length": True, "max_length_correlation": None}, {},
            [
                "The accuracy is 0.75 and preferring the longer response reaches 0.75, "
                "against report_card.must_beat_length=True."
            ],
        ),
        (GOOD, {}, {"must_beat_length": True}, {}, []),
        ([-5.0] * 20, {"chosen_lengths_N": np.full(20, 2)}, OFF, {"swap_gap": 9.0, "pad_gap": 9.0}, []),
    ],
)  # fmt: skip
def test_thresholds_fail_what_they_name_and_nothing_else(difference, fields, limits, gaps, failures):
    card = card_of(pairs(difference, **fields), Thresholds(**limits), **gaps)
    assert card["failures"] == failures
    assert card["passed"] == (not failures)


def test_thresholds_come_from_a_config():
    assert build(Thresholds, {"max_ece": None, "min_accuracy": 1}, "report_card") == Thresholds(1.0, None)


@pytest.mark.parametrize(
    ("field", "value"),
    [("min_accuracy", 1.1), ("max_ece", -0.1), ("max_length_correlation", math.nan), ("max_symmetry_gap", math.inf)],
)
def test_an_impossible_threshold_is_refused(field, value):
    with pytest.raises(ValueError, match=rf"report_card\.{field} must .* not {value}"):
        Thresholds(**{field: value})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rejected_N": np.array([1.0, math.nan])}, "rejected_N is nan at pair 1"),
        ({"margins_N": np.zeros(3)}, r"margins_N has shape \(3,\) where chosen_N has \(2,\)"),
        ({"chosen_lengths_N": np.ones(2)}, "chosen_lengths_N has the wrong dtype float64"),
        ({"sources_N": np.arange(2)}, "sources_N has the wrong dtype int64"),
    ],
)
def test_scores_that_cannot_be_judged_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        pairs(np.ones(2), **fields)


def test_no_pairs_and_impossible_gaps_are_refused():
    with pytest.raises(ValueError, match="chosen_N must hold the rewards of at least one pair"):
        pairs([])
    with pytest.raises(ValueError, match="pad_gap must be finite and not negative, not nan"):
        card_of(pairs([1.0]), pad_gap=math.nan)
    with pytest.raises(ValueError, match="swap_gap must be finite and not negative, not -1"):
        card_of(pairs([1.0]), swap_gap=-1)


NASTY = "$\\frac{$<script>alert(1)</script>"


def random_card(**limits):
    rng = np.random.default_rng(6)
    difference = bradley_terry(rng, 500)
    fields = {f"{side}_lengths_N": rng.integers(1, 300, 500) for side in ("chosen", "rejected")}
    sources = np.where(np.arange(500) % 2, "helpful", NASTY)
    return card_of(pairs(difference, sources_N=sources, prompts_N=np.arange(500) // 4, **fields), Thresholds(**limits))


def test_the_card_is_json_and_the_same_every_time():
    card = random_card()
    assert json.loads(json.dumps(card, allow_nan=False)) == card == random_card()
    assert card["thresholds"] == dataclasses.asdict(Thresholds())


def test_html_shows_the_values_and_escapes_the_names():
    page = report_card_html(random_card(min_accuracy=0.99, max_ece=None))
    card = random_card()
    assert "<script>" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "<b>Failed</b>" in page
    assert "<li>The accuracy is" in page
    assert "report_card.min_accuracy=0.99" in page
    assert (
        f"{card['accuracy']['accuracy']:.4f} ({card['accuracy']['low']:.4f} to {card['accuracy']['high']:.4f})" in page
    )
    assert "<td>expected calibration error<td class=number>" in page
    assert "<td class=number>not checked<tr><td>the same of a calibrated" in page
    assert "<b>Passed</b>" in report_card_html(card)
    assert "<li>" not in report_card_html(card)


def test_the_report_of_a_run_shows_the_card_before_the_metrics(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward/accuracy": 0.5}\n')
    assert "Report card" not in pathlib.Path(write_report(str(tmp_path))).read_text()
    (tmp_path / "report_card.json").write_text(json.dumps(random_card()))
    page = pathlib.Path(write_report(str(tmp_path))).read_text()
    assert 0 < page.index("<h2>Report card</h2>") < page.index("<h2>Metrics</h2>")
    assert page.count('<img alt="report card" src="data:image/png;base64,') == 1
    assert (tmp_path / "plots" / "report_card.png").exists()


def test_every_panel_of_the_plot_has_data_on_it(tmp_path):
    from matplotlib.image import imread

    (path,) = plot_report_card(random_card(), str(tmp_path / "plots"))
    assert path == str(tmp_path / "plots" / "report_card.png")
    is_colored = np.ptp(imread(path)[..., :3], axis=-1) > 0.2
    panels = [panel for half in np.array_split(is_colored, 2) for panel in np.array_split(half, 2, axis=1)]
    assert min(panel.sum() for panel in panels) > 1000  # a legend alone has about 100


@pytest.mark.parametrize("difference", [[1.0], [0.0, 0.0, 0.0], [-2.0, 1e4]])
def test_a_card_of_hardly_any_pairs_can_be_shown(difference, tmp_path):
    card = card_of(pairs(difference))
    (path,) = plot_report_card(card, str(tmp_path))
    assert pathlib.Path(path).stat().st_size > 10_000
    assert f"<td>all<td class=number>{card['accuracy']['accuracy']:.4f}" in report_card_html(card)
