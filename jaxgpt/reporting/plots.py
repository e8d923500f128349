"""Curves of a run as PNG files."""

import math
import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


class Curve(NamedTuple):
    """One figure: its file name, the label with unit of its y axis, and the metrics it shows."""

    name: str
    label: str
    metrics: tuple[str, ...]


CURVES = (
    Curve("loss", "loss (nats per token)", ("train/loss", "eval/loss", "eval_ema/loss")),
    Curve("accuracy", "next-token accuracy", ("train/accuracy", "eval/accuracy")),
    Curve("learning_rate", "learning rate", ("train/learning_rate",)),
    Curve("grad_norm", "gradient norm before clipping", ("train/grad_norm",)),
    Curve("throughput", "tokens per second", ("train/tokens_per_second",)),
)


def plot_curves(rows: Sequence[Mapping[str, float]], folder: str, reference_lines: Mapping[str, float]) -> list[str]:
    """Draw each curve that has points into folder/NAME.png; returns the paths.

    rows: of metrics.jsonl. reference_lines: name -> nats per token, drawn into the loss. Training metrics are shown
    faint as they are and strong as their running mean.
    """
    os.makedirs(folder, exist_ok=True)
    paths = []
    for curve in CURVES:
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
        FigureCanvasAgg(figure).print_png(path)
        paths.append(path)
    return paths


COLORS = {"train": "C0", "eval": "C1", "eval_ema": "C2"}


def _draw(axes: Axes, rows: Sequence[Mapping[str, float]], metric: str) -> bool:
    """Whether the metric has points, which are then drawn."""
    points = [(row["step"], row[metric]) for row in rows if metric in row and math.isfinite(row[metric])]
    if not points:
        return False
    steps, values = zip(*points, strict=True)
    group = metric.split("/")[0]
    color = COLORS[group]
    if group == "train" and len(values) > 20:
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
