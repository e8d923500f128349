"""Results of a sweep: the table, the metric against what was searched, and report.html."""

import html
import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from jaxgpt.reporting.plots import save
from jaxgpt.reporting.report import image, page

Rows = Sequence[
    Mapping[str, Any]
]  # of results.jsonl: "trial", "values", "workdirs", and "metric" or "failed", "exit_code"


def ranked(rows: Rows, mode: str) -> list[Mapping[str, Any]]:
    """The rows from the best to the worst, then those without a number, then those that failed."""

    def order(row: Mapping[str, Any]) -> tuple[bool, bool, float]:
        metric = row.get("metric", math.nan)
        is_nan = math.isnan(metric)
        return "failed" in row, is_nan, 0.0 if is_nan else metric if mode == "min" else -metric

    return sorted(rows, key=order)


def table(rows: Rows, fields: Sequence[str], metric: str) -> list[list[str]]:
    """The head and a line for each row: trial, the values of the fields, the metric or how the trial failed."""
    lines = [["trial", *fields, metric]]
    for row in rows:
        result = f"{row['metric']:.5g}" if "metric" in row else f"{row['failed']} failed ({row['exit_code']})"
        lines.append([str(row["trial"]), *(show(row["values"][field]) for field in fields), result])
    return lines


def show(value: Any) -> str:
    """A value of a field, for the eye."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def print_table(lines: Sequence[Sequence[str]]) -> None:
    """Print the lines in columns."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())


def plot_sweep(rows: Rows, fields: Mapping[str, bool], metric: str, mode: str, folder: str) -> list[str]:
    """Draw the metric against the fields into folder/sweep.png; returns [path], [] without a number or a field.

    fields: those that vary -> whether their axis is logarithmic. Two are the axes of one plane, in which the metric is the
    color; else each has a panel. The best is ringed.
    """
    rows = ranked([row for row in rows if math.isfinite(row.get("metric", math.nan))], mode)
    if not rows or not fields:
        return []
    columns = 1 if len(fields) <= 2 else min(len(fields), 3)
    lines = 1 if len(fields) <= 2 else -(-len(fields) // columns)
    figure = Figure(figsize=(7 if columns == 1 else 4 * columns, 4 * lines), layout="constrained", dpi=110)
    found = [row["metric"] for row in rows]
    values = {field: _positions([row["values"][field] for row in rows]) for field in fields}
    if len(fields) == 2:
        axes = figure.add_subplot()
        (first, x), (second, y) = values.items()
        points = axes.scatter(x, y, c=found, s=160, cmap="viridis" if mode == "max" else "viridis_r")
        figure.colorbar(points, label=metric)
        axes.scatter(x[:1], y[:1], s=320, facecolors="none", edgecolors="C3", linewidths=2)
        _label(axes, "x", first, fields[first])
        _label(axes, "y", second, fields[second])
    else:
        for i, (field, x) in enumerate(values.items()):
            axes = figure.add_subplot(lines, columns, i + 1)
            axes.scatter(x, found, s=36)
            axes.scatter(x[:1], found[:1], s=140, facecolors="none", edgecolors="C3", linewidths=2)
            axes.set_ylabel(metric)
            _label(axes, "x", field, fields[field])
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, "sweep.png")
    save(figure, path)
    return [path]


def _positions(values: Sequence[Any]) -> list[Any]:
    """Numbers as they are, all others as categories."""
    is_number = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    return list(values) if is_number else [str(v) for v in values]


def _label(axes: Any, which: str, field: str, is_log: bool) -> None:
    getattr(axes, f"set_{which}label")(field)
    if is_log:
        getattr(axes, f"set_{which}scale")("log")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def write_sweep_report(
    root: str, rows: Rows, fields: Mapping[str, bool], metric: str, mode: str, config: Mapping[str, Any]
) -> str:
    """Write ROOT/plots and ROOT/report.html; returns its path.

    rows: of the trials that are finished or failed, best first. fields: as in plot_sweep. config: of the sweep, shown below.
    """
    title = f"sweep: {os.path.basename(os.path.abspath(root))}"
    plots = plot_sweep(rows, fields, metric, mode, os.path.join(root, "plots"))
    head, *lines = table(rows, list(fields), metric)
    body = "".join(
        f"<tr>{''.join(f'<td>{html.escape(text)}' for text in line)}<td>{_link(row)}"
        for line, row in zip(lines, rows, strict=True)
    )
    parts = [
        f"<h1>{html.escape(title)}</h1><p class=sub>{len(rows)} trials, the best first</p>",
        f"<table><tr>{''.join(f'<th>{html.escape(text)}' for text in head)}<th></tr>{body}</table>",
        f"<div class=plots>{''.join(image(path) for path in plots)}</div>",
        f"<h2>Config</h2><pre>{html.escape(json.dumps(config, indent=2))}</pre>",
    ]
    path = os.path.join(root, "report.html")
    with open(path, "w", encoding="utf-8") as file:
        file.write(page(title, parts))
    return path


def _link(row: Mapping[str, Any]) -> str:
    """To the report of the run that has the metric."""
    *_, workdir = row["workdirs"].values()
    return f'<a href="{html.escape(workdir)}/report.html">its report</a>' if "metric" in row else ""
