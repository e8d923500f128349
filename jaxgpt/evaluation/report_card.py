"""The report card of a reward model: what its rewards of held-out pairs say about it, and whether that is good enough.

Axes in this file: N pairs, M = 2 N responses (the chosen ones, then the rejected ones), G prompts.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxgpt.evaluation.intervals import wilson_interval
from jaxgpt.evaluation.scoring import ScoredPairs

MAX_BINS = 10  # of calibration and of length
MIN_PAIRS_PER_BIN = 20  # below, the calibration error of a bin is mostly luck
MARGIN_BUCKETS = 4
HISTOGRAM_BINS = 30
MIN_PROMPTS = 10  # fewer cannot show how far the pairs of a prompt agree


@dataclasses.dataclass(frozen=True, eq=False)
class PairScores:
    """A reward model's rewards of N held-out pairs; all fields are numpy arrays [N].

    chosen_N, rejected_N: floats, reward units, all finite. chosen_lengths_N, rejected_lengths_N: ints, tokens of the
    response. sources_N: strings, the name of the data source. margins_N: floats, how much better the chosen one is said
    to be, 0 where the data say nothing. prompts_N: ints; pairs of the same prompt share an id.

    Raises:
      ValueError: naming the field, for no pairs, unequal shapes, a wrong kind of value, or one that is not finite.
    """

    chosen_N: np.ndarray
    rejected_N: np.ndarray
    chosen_lengths_N: np.ndarray
    rejected_lengths_N: np.ndarray
    sources_N: np.ndarray
    margins_N: np.ndarray
    prompts_N: np.ndarray

    def __post_init__(self):
        kinds = {"chosen_N": "f", "rejected_N": "f", "margins_N": "f", "sources_N": "U"}
        shape = self.chosen_N.shape
        if len(shape) != 1 or not shape[0]:
            raise ValueError(f"chosen_N must hold the rewards of at least one pair, not an array of shape {shape}.")
        for field in dataclasses.fields(self):
            array, kind = getattr(self, field.name), kinds.get(field.name, "iu")
            if array.shape != shape:
                raise ValueError(f"{field.name} has shape {array.shape} where chosen_N has {shape}.")
            if array.dtype.kind not in kind:
                raise ValueError(f"{field.name} has the wrong dtype {array.dtype}.")
            if kind == "f" and not np.isfinite(array).all():
                where = int(np.flatnonzero(~np.isfinite(array))[0])
                raise ValueError(f"{field.name} is {array[where]} at pair {where}; every value must be finite.")


def pair_scores(sets: Mapping[str, ScoredPairs]) -> PairScores:
    """The pairs of all held-out sets together, each set a source."""
    joined = {name: np.concatenate([getattr(part, name) for part in sets.values()]) for name in ScoredPairs._fields}
    ends = np.cumsum([part.prompts_N.max(initial=-1) + 1 for part in sets.values()])
    first = np.repeat([0, *ends[:-1]], [len(part.prompts_N) for part in sets.values()])
    sources_N = np.repeat([*sets], [len(part.prompts_N) for part in sets.values()])
    return PairScores(**joined | {"prompts_N": joined["prompts_N"] + first}, sources_N=sources_N)


@dataclasses.dataclass(frozen=True)
class Thresholds:
    """What a reward model must reach (section `report_card`). None switches a check off; 0 is a limit like any other.

    A value equal to its limit passes.
    min_accuracy: applied to the point estimate, not to the lower end of its interval: the limit is about the model, and
      a smaller held-out set must not make it stricter. The card shows the interval beside it.
    max_ece: expected calibration error. max_symmetry_gap: reward units, for swap_gap and pad_gap.
    max_length_correlation: of the absolute correlation between reward and response length.
    must_beat_length: the accuracy must exceed that of preferring the longer response; False does not compare.
    """

    min_accuracy: float | None = 0.55
    max_ece: float | None = 0.15
    max_symmetry_gap: float | None = 1e-3
    max_length_correlation: float | None = 0.9
    must_beat_length: bool = False

    def __post_init__(self):
        for name in ("min_accuracy", "max_ece", "max_length_correlation"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"report_card.{name} must be in [0, 1] or None, not {value}.")
        gap = self.max_symmetry_gap
        if gap is not None and not (math.isfinite(gap) and gap >= 0):
            raise ValueError(f"report_card.max_symmetry_gap must be finite and not negative, or None, not {gap}.")


def report_card(scores: PairScores, thresholds: Thresholds, *, swap_gap: float, pad_gap: float) -> dict[str, Any]:
    """Judge a reward model by its rewards of held-out pairs.

    swap_gap, pad_gap: the largest absolute change of a reward, in reward units, when chosen and rejected are swapped in
    the batch, and when the sequences are padded differently.

    Returns:
      A dict ready for JSON. `accuracy`, each row of `by_source` and `by_margin` (with a "name"), and `length.longer_wins`
      are rates {pairs, prompts, accuracy, low, high}: ties count 1/2, [low, high] is the 95 % `accuracy_interval`.
      `margin_kind` says what `by_margin` goes by: the "stated margin", or where no pair has one the "reward difference".
      `calibration` as `calibration` returns it, `length` as `length_bias`. `rewards` holds a histogram. `passed` is
      whether `failures`, one sentence for each threshold that is not met, is empty.

    Raises:
      ValueError: if a gap is negative or not finite.
    """
    for name, gap in (("swap_gap", swap_gap), ("pad_gap", pad_gap)):
        if not (math.isfinite(gap) and gap >= 0):
            raise ValueError(f"{name} must be finite and not negative, not {gap}.")
    difference_N = scores.chosen_N.astype(np.float64) - scores.rejected_N
    correct_N = _wins(difference_N)
    by_source = [
        {"name": str(source), **_rate(correct_N, scores.prompts_N, np.flatnonzero(scores.sources_N == source))}
        for source in np.unique(scores.sources_N)
    ]
    margin_kind, by_margin = _by_margin(scores, difference_N)
    card = {
        "accuracy": _rate(correct_N, scores.prompts_N),
        "by_source": by_source,
        "margin_kind": margin_kind,
        "by_margin": by_margin,
        "calibration": calibration(difference_N, scores.prompts_N),
        "length": length_bias(scores),
        "rewards": _histogram(scores),
        "swap_gap": float(swap_gap),
        "pad_gap": float(pad_gap),
        "thresholds": dataclasses.asdict(thresholds),
    }
    failures = _failures(card, thresholds)
    return card | {"passed": not failures, "failures": failures}


def card_metrics(card: dict[str, Any]) -> dict[str, float]:
    """The single numbers of a card, by the names of metrics."""
    return {
        "eval/pair_accuracy": card["accuracy"]["accuracy"],
        "eval/ece": card["calibration"]["ece"],
        "eval/length_correlation": card["length"]["correlation"],
        "eval/longer_wins_accuracy": card["length"]["longer_wins"]["accuracy"],
        "eval/swap_gap": card["swap_gap"],
        "eval/pad_gap": card["pad_gap"],
    }


def card_summary(card: dict[str, Any]) -> dict[str, Any]:
    """What a manifest says of a card: verdict and values, without what only plots need."""
    kept = ("accuracy", "calibration", "length", "swap_gap", "pad_gap", "thresholds", "passed", "failures")
    return {name: card[name] for name in kept}


def accuracy_interval(correct_N: np.ndarray, prompts_N: np.ndarray) -> tuple[float, float]:
    """The 95 % interval (low, high) of the mean of correct_N (1, 0, or 1/2 for a tie), where pairs may share prompts.

    Pairs of one prompt tend to be right or wrong together, so that N of them tell less than N independent ones. The
    design effect is how many times larger the variance of the mean is, estimated from the sums of the residuals of each
    prompt; the interval is Wilson's with N / design effect trials: exactly Wilson's where no prompt is shared. It is
    deterministic, and stays sensible near 0 and 1, where a bootstrap over prompts has no width. Where the agreement
    cannot be estimated (fewer than 10 prompts, or all pairs alike) it is taken to be complete.

    Source: Rao and Scott 1992, A simple method for the analysis of clustered binary data.
    """
    count = len(correct_N)
    rate = float(correct_N.mean())
    _, group_N, sizes_G = np.unique(prompts_N, return_inverse=True, return_counts=True)
    groups = len(sizes_G)
    if groups < MIN_PROMPTS or rate in (0, 1):
        effect = float(np.sum(sizes_G**2)) / count  # 1 where no prompt is shared
    elif groups < count:
        residuals_G = np.bincount(group_N, weights=correct_N - rate)
        effect = groups / (groups - 1) * float(np.sum(residuals_G**2)) / (count * rate * (1 - rate))
    else:
        effect = 1.0
    return wilson_interval(rate, count / max(effect, 1.0))


def calibration(difference_N: np.ndarray, prompts_N: np.ndarray) -> dict[str, Any]:
    """How well sigmoid(reward difference) predicts which response of a pair people chose (Bradley-Terry).

    The chosen response comes first in the data, so each pair is turned to have the one the model prefers first: its
    confidence is sigmoid(|difference|), and the outcome whether that one was the chosen (1/2 where the rewards tie).
    Bins hold about equally many pairs; equal confidences share one.

    Returns:
      ece: sum over bins of its share of the pairs times |mean confidence - mean outcome|. ece_if_calibrated: about what
      that is by chance for a calibrated model and as many independent pairs. brier: mean (1 - P(chosen))^2. log_loss:
      mean -log P(chosen), nats. bins: rates with the mean "confidence", in ascending order.

    Source: Naeini et al. 2015, Obtaining well calibrated probabilities using Bayesian binning, section 5 (ECE).
    """
    count = len(difference_N)
    confidence_N = 1 / (1 + np.exp(-np.abs(difference_N)))
    outcome_N = _wins(difference_N)
    bins, ece, chance = [], 0.0, 0.0
    for members in equal_count_groups(confidence_N, min(MAX_BINS, max(count // MIN_PAIRS_PER_BIN, 1))):
        confidence = confidence_N[members]
        bins.append({"confidence": float(confidence.mean()), **_rate(outcome_N, prompts_N, members)})
        ece += abs(float(np.sum(confidence - outcome_N[members]))) / count
        chance += math.sqrt(2 / math.pi * float(np.sum(confidence * (1 - confidence)))) / count  # E|x|, x normal
    chosen_N = np.where(difference_N < 0, 1 - confidence_N, confidence_N)
    return {
        "ece": ece,
        "ece_if_calibrated": chance,
        "brier": float(np.mean((1 - chosen_N) ** 2)),
        "log_loss": float(np.mean(np.logaddexp(0, -difference_N))),
        "bins": bins,
    }


def length_bias(scores: PairScores) -> dict[str, Any]:
    """How far the reward goes by the length of the response; a response in several pairs counts in each.

    Returns:
      reward_per_100_tokens and intercept (reward units) of the least-squares line over all responses, their Pearson
      correlation (slope and correlation are 0 where lengths or rewards are constant), longer_wins: the rate at which the
      longer response is the chosen, and bins of about equally many responses: {responses, tokens, reward, std}, means
      and the standard deviation of the reward.
    """
    lengths_M = np.concatenate([scores.chosen_lengths_N, scores.rejected_lengths_N]).astype(np.float64)
    rewards_M = np.concatenate([scores.chosen_N, scores.rejected_N]).astype(np.float64)
    slope = correlation = 0.0
    if np.ptp(lengths_M) and np.ptp(rewards_M):
        x_M, y_M = lengths_M - lengths_M.mean(), rewards_M - rewards_M.mean()
        slope = float(x_M @ y_M / (x_M @ x_M))
        correlation = float(np.clip(x_M @ y_M / (np.linalg.norm(x_M) * np.linalg.norm(y_M)), -1, 1))
    longer_N = scores.chosen_lengths_N.astype(np.int64) - scores.rejected_lengths_N.astype(np.int64)
    bins = [
        {
            "responses": len(members),
            "tokens": float(lengths_M[members].mean()),
            "reward": float(rewards_M[members].mean()),
            "std": float(rewards_M[members].std()),
        }
        for members in equal_count_groups(lengths_M, MAX_BINS)
    ]
    return {
        "reward_per_100_tokens": 100 * slope,
        "intercept": float(rewards_M.mean() - slope * lengths_M.mean()),
        "correlation": correlation,
        "longer_wins": _rate(_wins(longer_N), scores.prompts_N),
        "bins": bins,
    }


def equal_count_groups(values_N: np.ndarray, groups: int) -> list[np.ndarray]:
    """The indices of at most `groups` groups of about equal size, by ascending value; equal values are never parted."""
    count = len(values_N)
    last = [k * count // groups - 1 for k in range(1, groups)]  # -1, the largest, parts nothing
    group_N = np.searchsorted(np.unique(np.sort(values_N)[last]), values_N)  # 0 up to and with the first edge
    return [np.flatnonzero(group_N == g) for g in np.unique(group_N)]


def _wins(difference_N: np.ndarray) -> np.ndarray:
    """1 where positive, 0 where negative, 1/2 where 0."""
    return (np.sign(difference_N) + 1) / 2


def _rate(correct_N: np.ndarray, prompts_N: np.ndarray, members: np.ndarray | slice = slice(None)) -> dict[str, Any]:
    correct, prompts = correct_N[members], prompts_N[members]
    low, high = accuracy_interval(correct, prompts)
    counts = {"pairs": len(correct), "prompts": len(np.unique(prompts))}
    return {**counts, "accuracy": float(correct.mean()), "low": low, "high": high}


def _by_margin(scores: PairScores, difference_N: np.ndarray) -> tuple[str, list[dict[str, Any]]]:
    """What the buckets go by, and the rate of each quarter of the pairs; pairs without a margin are one more bucket."""
    correct_N, has_margin_N = _wins(difference_N), scores.margins_N != 0
    kind, size_N = "stated margin", np.abs(scores.margins_N)
    if not has_margin_N.any():
        kind, size_N, has_margin_N = "reward difference", np.abs(difference_N), np.ones_like(has_margin_N)
    known = np.flatnonzero(has_margin_N)
    rows = []
    for group in equal_count_groups(size_N[known], MARGIN_BUCKETS):
        members = known[group]
        low, high = (f"{v:.3g}" for v in (size_N[members].min(), size_N[members].max()))
        name = f"{kind} {low}" + (f" to {high}" if high != low else "")
        rows.append({"name": name, **_rate(correct_N, scores.prompts_N, members)})
    if not has_margin_N.all():
        rows.append({"name": "no stated margin", **_rate(correct_N, scores.prompts_N, np.flatnonzero(~has_margin_N))})
    return kind, rows


def _histogram(scores: PairScores) -> dict[str, Any]:
    """Means, and counts of the chosen and the rejected rewards between common edges (the last bin holds both its ends)."""
    low = float(min(scores.chosen_N.min(), scores.rejected_N.min()))
    high = float(max(scores.chosen_N.max(), scores.rejected_N.max()))
    scale = max(abs(low), abs(high), 1.0)
    if high - low < 1e-9 * scale:  # a model that gives everything one reward
        low, high = low - scale / 2, high + scale / 2
    edges = np.linspace(low, high, HISTOGRAM_BINS + 1)
    return {
        "chosen_mean": float(scores.chosen_N.mean()),
        "rejected_mean": float(scores.rejected_N.mean()),
        "edges": edges.tolist(),
        "chosen": np.histogram(scores.chosen_N, edges)[0].tolist(),
        "rejected": np.histogram(scores.rejected_N, edges)[0].tolist(),
    }


def _failures(card: dict[str, Any], thresholds: Thresholds) -> list[str]:
    accuracy, longer = card["accuracy"]["accuracy"], card["length"]["longer_wins"]["accuracy"]
    found = []
    if thresholds.min_accuracy is not None and accuracy < thresholds.min_accuracy:
        found.append(f"The accuracy is {accuracy:.6g}, below report_card.min_accuracy={thresholds.min_accuracy}.")
    for text, value, name in (
        ("expected calibration error", card["calibration"]["ece"], "max_ece"),
        ("change of a reward when a pair is swapped", card["swap_gap"], "max_symmetry_gap"),
        ("change of a reward with other padding", card["pad_gap"], "max_symmetry_gap"),
        ("correlation of reward with length", card["length"]["correlation"], "max_length_correlation"),
    ):
        limit = getattr(thresholds, name)
        if limit is not None and abs(value) > limit:
            size = " in size" if value < 0 else ""
            found.append(f"The {text} is {value:.6g}, above report_card.{name}={limit}{size}.")
    if thresholds.must_beat_length and accuracy <= longer:
        found.append(
            f"The accuracy is {accuracy:.6g} and preferring the longer response reaches {longer:.6g}, "
            "against report_card.must_beat_length=True."
        )
    return found
