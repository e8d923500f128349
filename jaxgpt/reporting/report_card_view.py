"""The report card of a reward model for the eye: an HTML fragment and a figure."""

import html
import os
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxgpt.reporting.plots import save

MAX_PLOTTED_SOURCES = 12


def report_card_html(card: dict[str, Any]) -> str:
    """The card as an HTML fragment with the heading "Report card": verdict, values beside their limits, all rates."""
    limits, length, fit = card["thresholds"], card["length"], card["calibration"]
    beaten = "less than the accuracy" if limits["must_beat_length"] else "not checked"
    correlation = _limit("size at most", limits["max_length_correlation"])
    symmetry = _limit("at most", limits["max_symmetry_gap"])
    rows = [
        ("accuracy", _rate_text(card["accuracy"]), _limit("at least", limits["min_accuracy"])),
        ("accuracy of preferring the longer response", _rate_text(length["longer_wins"]), beaten),
        ("expected calibration error", f"{fit['ece']:.4g}", _limit("at most", limits["max_ece"])),
        ("the same of a calibrated model, by chance", f"{fit['ece_if_calibrated']:.4g}", ""),
        ("Brier score", f"{fit['brier']:.4g}", ""),
        ("log loss (nats)", f"{fit['log_loss']:.4g}", ""),
        ("correlation of reward with length", f"{length['correlation']:.4g}", correlation),
        ("reward per 100 tokens", f"{length['reward_per_100_tokens']:.4g}", ""),
        ("mean reward of chosen", f"{card['rewards']['chosen_mean']:.4g}", ""),
        ("mean reward of rejected", f"{card['rewards']['rejected_mean']:.4g}", ""),
        ("change of a reward when a pair is swapped", f"{card['swap_gap']:.4g}", symmetry),
        ("change of a reward with other padding", f"{card['pad_gap']:.4g}", symmetry),
    ]
    groups = [
        (row["name"], _rate_text(row), f"{row['pairs']:,}", f"{row['prompts']:,}")
        for row in (card["accuracy"] | {"name": "all"}, *card["by_source"], *card["by_margin"])
    ]
    failures = "".join(f"<li>{html.escape(sentence)}" for sentence in card["failures"])
    return (
        f"<h2>Report card</h2><p><b>{'Passed' if card['passed'] else 'Failed'}</b></p>"
        f"{f'<ul>{failures}</ul>' if failures else ''}{_table(('', 'value', 'limit'), rows)}"
        f"<h3>Accuracy</h3>{_table(('of', 'accuracy (95 % interval)', 'pairs', 'prompts'), groups)}"
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(cell)}" for cell in header)
    body = "".join(
        f"<tr><td>{html.escape(name)}{''.join(f'<td class=number>{html.escape(cell)}' for cell in cells)}"
        for name, *cells in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def _rate_text(rate: dict[str, Any]) -> str:
    return f"{rate['accuracy']:.4f} ({rate['low']:.4f} to {rate['high']:.4f})"


def _limit(words: str, value: float | None) -> str:
    return "not checked" if value is None else f"{words} {value:g}"


def plot_report_card(card: dict[str, Any], folder: str) -> list[str]:
    """Draw the card into folder/report_card.png: calibration, rewards, reward by length, accuracies; returns its path."""
    os.makedirs(folder, exist_ok=True)
    figure = Figure(figsize=(11, 8), layout="constrained", dpi=110)
    for axes, draw in zip(figure.subplots(2, 2).flat, (_calibration, _rewards, _length, _accuracies), strict=True):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        draw(axes, card)
        axes.title.set_fontsize(10)
        axes.legend(frameon=False, fontsize=8)
    path = os.path.join(folder, "report_card.png")
    save(figure, path)
    return [path]


def _whiskers(rows: Sequence[dict[str, Any]]) -> list[list[float]]:
    """The lengths of error bars below and above each rate."""
    return [[r["accuracy"] - r["low"] for r in rows], [r["high"] - r["accuracy"] for r in rows]]


def _calibration(axes: Axes, card: dict[str, Any]) -> None:
    bins = card["calibration"]["bins"]
    x, y = [b["confidence"] for b in bins], [b["accuracy"] for b in bins]
    axes.plot([0.5, 1], [0.5, 1], color="0.5", linewidth=1, linestyle="--", label="calibrated")
    axes.errorbar(x, y, yerr=_whiskers(bins), fmt="o-", color="C0", markersize=4, capsize=2, label="model")
    for b in bins:
        axes.annotate(f"{b['pairs']:,}", (b["confidence"], b["high"]), xytext=(0, 3), textcoords="offset points",
                      ha="center", fontsize=7, color="0.4")  # fmt: skip
    axes.set(title=f"calibration: ECE {card['calibration']['ece']:.3f} (numbers: pairs)",
             xlabel="predicted probability of the preferred response", ylabel="how often it was the chosen")  # fmt: skip


def _rewards(axes: Axes, card: dict[str, Any]) -> None:
    rewards = card["rewards"]
    for name, color in (("chosen", "C0"), ("rejected", "C1")):
        axes.stairs(rewards[name], rewards["edges"], fill=True, alpha=0.5, color=color, label=name)
        axes.axvline(rewards[f"{name}_mean"], color=color, linewidth=1, linestyle="--")
    axes.set(title="rewards (dashed: means)", xlabel="reward", ylabel="responses")


def _length(axes: Axes, card: dict[str, Any]) -> None:
    length = card["length"]
    bins, slope = length["bins"], length["reward_per_100_tokens"] / 100
    x = [b["tokens"] for b in bins]
    axes.errorbar(x, [b["reward"] for b in bins], yerr=[b["std"] for b in bins], fmt="o", color="C0", markersize=4,
                  capsize=2, label="mean ± std")  # fmt: skip
    ends = [x[0], x[-1]]
    axes.plot(ends, [length["intercept"] + slope * end for end in ends], color="C1", label="least squares")
    axes.set(title=f"reward by length: correlation {length['correlation']:.3f}",
             xlabel="tokens of the response", ylabel="reward")  # fmt: skip


def _accuracies(axes: Axes, card: dict[str, Any]) -> None:
    sources = sorted(card["by_source"], key=lambda row: -row["pairs"])[:MAX_PLOTTED_SOURCES]
    rows = [card["accuracy"] | {"name": "all"}, *sources, *card["by_margin"]]
    axes.errorbar([r["accuracy"] for r in rows], range(len(rows)), xerr=_whiskers(rows), fmt="o", color="C0",
                  markersize=4, capsize=2)  # fmt: skip
    axes.axvline(0.5, color="0.5", linewidth=1, linestyle="--", label="chance")
    longer = card["length"]["longer_wins"]["accuracy"]
    axes.axvline(longer, color="C1", linewidth=1, linestyle=":", label="longer wins")
    # A name is the user's: a dollar sign in it is no formula.
    names = [r["name"] if len(r["name"]) <= 24 else f"{r['name'][:23]}…" for r in rows]
    axes.set_yticks(range(len(rows)), names, fontsize=8, parse_math=False)
    axes.invert_yaxis()
    axes.set(title="accuracy with 95 % intervals", xlabel="accuracy")
