"""Curves of a run as PNG files."""

import contextlib
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


class Curve(NamedTuple):
    """One figure: its file name, the label with unit of its y axis, and the metrics it shows.

    kind: of the runs that have it, as of `kind_of`; "" for all.
    """

    name: str
    label: str
    metrics: tuple[str, ...]
    kind: str = ""


CURVES = (
    Curve("loss", "loss (nats per token)", ("train/loss", "eval/loss", "eval_ema/loss"), "tokens"),
    Curve("loss", "preference loss (mean over prompts)", ("train/loss", "eval/loss", "eval_ema/loss"), "preferences"),
    Curve("accuracy", "next-token accuracy", ("train/accuracy", "eval/accuracy"), "tokens"),
    Curve("accuracy", "share of pairs in the right order", ("reward/accuracy", "eval/accuracy"), "preferences"),
    Curve("margin", "margin of the better response (reward units)", ("reward/margin", "eval/margin"), "preferences"),
    Curve("learning_rate", "learning rate", ("train/learning_rate",)),
    Curve("grad_norm", "gradient norm before clipping", ("train/grad_norm",)),
    Curve("throughput", "tokens per second", ("train/tokens_per_second",)),
    Curve("score", "score (reward units)", ("objective/scores", "eval/scores")),
    Curve("gold", "gold reward, never optimised", ("eval/gold",)),
    Curve("kl", "KL to the reference (nats per response)", ("objective/kl", "eval/kl")),
    Curve("entropy", "entropy of the policy (nats per token)", ("policy/entropy",)),
    Curve("length", "length of a response (tokens)", ("rollout/mean_length", "eval/mean_length")),
    Curve("value", "explained variance of the critic", ("value/explained_variance",)),
)


def kind_of(rows: Iterable[Mapping[str, float]]) -> str:
    """What the loss of a run is over, by the metrics it has: tokens, preferences, or rewards (RL)."""
    names = {name for row in rows for name in row}
    if names & {"objective/kl", "eval/scores"}:
        return "rewards"
    return "preferences" if names & {"reward/margin", "eval/margin"} else "tokens"


def plot_curves(rows: Sequence[Mapping[str, float]], folder: str, reference_lines: Mapping[str, float]) -> list[str]:
    """Draw each curve that has points into folder/NAME.png; returns the paths.

    rows: of metrics.jsonl. reference_lines: name -> nats per token, drawn into the loss. Metrics of training are shown
    faint as they are and strong as their running mean.
    """
    os.makedirs(folder, exist_ok=True)
    paths = []
    kind = kind_of(rows)
    for curve in CURVES:
        if curve.kind not in ("", kind):
            continue
        figure = Figure(figsize=(7, 4), layout="constrained", dpi=110)
        axes = figure.add_subplot()
        drawn = [_draw(axes, rows, metric) for metric in curve.metrics]
        if not any(drawn):
            continue
        for i, (name, value) in enumerate(reference_lines.items() if curve.name == "loss" else ()):
            axes.axhline(value, color="0.5", linewidth=1, linestyle=("--", ":")[i % 2])
            axes.annotate(f"{name} {value:.2f}", (1, value), xycoords=("axes fraction", "data"), ha="right", va="bottom",
                          fontsize=8, color="0.4")  # fmt: skip
        axes.set_xlabel("step")
        axes.set_ylabel(curve.label)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if sum(drawn) > 1:
            axes.legend(frameon=False)
        path = os.path.join(folder, f"{curve.name}.png")
        save(figure, path)
        paths.append(path)
    return paths + plot_overoptimization(rows, folder)


def plot_overoptimization(rows: Sequence[Mapping[str, float]], folder: str) -> list[str]:
    """Score and gold reward of held-out answers against the square root of their KL, if rows have both; [path] or [].

    A proxy that is optimised too far is seen where gold turns down while the score goes on (Gao et al. 2023,
    arXiv:2210.10760, in whose laws the square root of the KL is the distance travelled).
    """
    points = [row for row in rows if {"eval/kl", "eval/scores", "eval/gold"} <= row.keys()]
    if len(points) < 2:
        return []
    distance = [math.sqrt(max(row["eval/kl"], 0.0)) for row in points]
    figure = Figure(figsize=(7, 4), layout="constrained", dpi=110)
    axes = figure.add_subplot()
    for side, metric, color in ((axes, "eval/scores", "C0"), (axes.twinx(), "eval/gold", "C1")):
        side.plot(distance, [row[metric] for row in points], color=color, marker="o", markersize=4, linewidth=1.6)
        side.set_ylabel(metric, color=color)
        side.spines["top"].set_visible(False)
    for x, row in zip(distance, points, strict=True):
        axes.annotate(f"{row['step']}", (x, row["eval/scores"]), fontsize=7, color="0.4", ha="center", va="bottom")
    axes.set_xlabel("sqrt of the KL to the reference (nats^0.5); numbers are steps")
    axes.grid(alpha=0.25)
    path = os.path.join(folder, "overoptimization.png")
    save(figure, path)
    return [path]


def save(figure: Figure, path: str) -> None:
    """Write a figure as PNG; a reader sees the old file or the new one whole."""
    temporary = f"{path}.tmp"
    try:
        FigureCanvasAgg(figure).print_png(temporary)
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise


COLORS = {"eval": "C1", "eval_ema": "C2"}  # of what is not training


def _draw(axes: Axes, rows: Sequence[Mapping[str, float]], metric: str) -> bool:
    """Whether the metric has points, which are then drawn."""
    points = [(row["step"], row[metric]) for row in rows if metric in row and math.isfinite(row[metric])]
    if not points:
        return False
    steps, values = zip(*points, strict=True)
    group = metric.split("/")[0]
    color = COLORS.get(group, "C0")
    if group not in COLORS and len(values) > 20:
        axes.plot(steps, values, color=color, alpha=0.3, linewidth=0.8)
        axes.plot(steps, running_mean(values, max(len(values) // 40, 2)), color=color, linewidth=1.6, label=group)
    else:
        axes.plot(
            steps, values, color=color, linewidth=1.6, marker="o" if len(values) < 40 else "", markersize=4, label=group
        )
    return True


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """The mean of each value and up to width - 1 before it."""
    return [sum(values[max(0, i + 1 - width) : i + 1]) / min(i + 1, width) for i in range(len(values))]
