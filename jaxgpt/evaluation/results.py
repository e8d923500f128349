"""What an evaluation finds: the result of a task, as JSON and as a table."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxgpt.evaluation.intervals import Metric


class Result(NamedTuple):
    """metrics: name -> `intervals.Metric`. counts: what the metrics are of, and what was left out. samples: one record per
    example. more: what else is known, ready for JSON.
    """

    metrics: dict[str, Metric]
    counts: Mapping[str, float]
    samples: list[dict[str, Any]]
    more: dict[str, Any] = {}  # noqa: RUF012


def to_json(kind: str, result: Result) -> dict[str, Any]:
    """The task's entry in results.json: all but the samples."""
    return {"kind": kind, "metrics": result.metrics, "counts": dict(result.counts), **result.more}


def final_metrics(tasks: Mapping[str, dict[str, Any]]) -> dict[str, float]:
    """task/metric -> value, for the manifest; tasks: entries of results.json."""
    return {f"{label}/{name}": m["value"] for label, task in tasks.items() for name, m in task["metrics"].items()}


def intervals(tasks: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """task/metric -> the bounds of its 95 % interval, for the manifest; tasks: entries of results.json."""
    return {
        f"{label}/{name}": {"low": metric["low"], "high": metric["high"]}
        for label, task in tasks.items()
        for name, metric in task["metrics"].items()
    }


def table(tasks: Mapping[str, dict[str, Any]]) -> str:
    """The metrics of all tasks as lines of text."""
    rows = [("task", "metric", "value", "95 % interval", "n")]
    for label, task in tasks.items():
        for name, metric in task["metrics"].items():
            interval = "" if metric["low"] is None else f"{metric['low']:.4f} to {metric['high']:.4f}"
            rows.append((label, name, f"{metric['value']:.4f}", interval, f"{metric['n']:,}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    align = (str.ljust, str.ljust, str.rjust, str.rjust, str.rjust)
    cells = lambda row: (pad(cell, width) for pad, cell, width in zip(align, row, widths, strict=True))
    return "\n".join("  ".join(cells(row)).rstrip() for row in rows)
