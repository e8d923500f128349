"""report.html of a pipeline: what each stage changed, its curves, the same prompts answered after each, and the lineage."""

import glob
import html
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxgpt.reporting.plots import kind_of
from jaxgpt.reporting.report import image, page
from jaxgpt.runs.manifest import read_manifest
from jaxgpt.runs.workdir import read_metrics, write_atomic

# What held-out data say of a model, in the order of the stages: metric -> label, a label per kind of run where they differ.
# With RL eval/loss is minus the gold reward.
MEASURES: dict[str, str | dict[str, str]] = {
    "eval/loss": {"tokens": "loss (nats per token)", "preferences": "preference loss"},
    "eval/bits_per_byte": "bits per byte",
    "eval/accuracy": {"tokens": "next-token accuracy", "preferences": "share of pairs in the right order"},
    "eval/margin": "margin of the better response (reward units)",
    "eval/scores": "score",
    "eval/gold": "gold reward",
    "eval/kl": "KL to the reference (nats)",
    "eval/mean_length": "length of a response (tokens)",
}


class Verdict(NamedTuple):
    """An expectation, the two numbers that it compares, and whether it holds."""

    text: str
    left: float
    right: float
    holds: bool

    def __str__(self) -> str:
        return f"{self.text} ({self.left:.4g} against {self.right:.4g})"


class Lineage(NamedTuple):
    """A stage's title, the digest of its manifest, the stages it is built on, and what became of its expectations."""

    title: str
    digest: str
    parents: set[str]
    verdicts: Sequence[Verdict] = ()


def held(stages: Mapping[str, Lineage]) -> str:
    """How many of all expectations held, as a sentence; empty where there are none."""
    verdicts = [verdict for stage in stages.values() for verdict in stage.verdicts]
    return f"{sum(v.holds for v in verdicts)} of {len(verdicts)} expectations held." if verdicts else ""


def write_pipeline_report(
    root: str, stages: Mapping[str, Lineage], samples: Mapping[str, Sequence[Mapping[str, Any]]]
) -> str:
    """Write ROOT/report.html; returns its path.

    stages: name -> lineage, in order; the workdir of a stage is ROOT/NAME. samples: stage -> records with "prompt" and
    "response", the same prompts for each. What has not been as expected comes first.
    """
    title = f"pipeline: {os.path.basename(os.path.abspath(root))}"
    parts = [f"<h1>{html.escape(title)}</h1><p class=sub>{held(stages)}</p>", _failures(stages)]
    parts += [_before_and_after(root, stages), _side_by_side(samples), _expectations(stages)]
    for name, stage in stages.items():
        plots = sorted(glob.glob(os.path.join(root, name, "plots", "*.png")))
        if plots:
            link = f'<a href="{name}/report.html">its own report</a>'
            parts.append(f"<h2>{html.escape(name)}</h2><p class=sub>{html.escape(stage.title)} ({link})</p>")
            parts.append(f"<div class=plots>{''.join(image(path) for path in plots)}</div>")
    rows = "".join(
        f"<tr><td>{html.escape(name)}<td>{html.escape(', '.join(sorted(stage.parents)))}<td>{stage.digest[:12]}"
        for name, stage in stages.items()
    )
    parts.append(f"<h2>Lineage</h2><table><tr><th>stage<th>built on<th>digest of its manifest</tr>{rows}</table>")
    path = os.path.join(root, "report.html")
    write_atomic(path, page(title, parts))
    return path


def _failures(stages: Mapping[str, Lineage]) -> str:
    """What did not hold, in plain words."""
    return "".join(
        f'<p style="color: #d33"><b>The stage {html.escape(name)} has not done what is expected of it:</b> '
        f"{html.escape(verdict.text)} should hold, but {verdict.left:.4g} stands against {verdict.right:.4g}.</p>"
        for name, stage in stages.items()
        for verdict in stage.verdicts
        if not verdict.holds
    )


def _expectations(stages: Mapping[str, Lineage]) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(name)}<td>{html.escape(verdict.text)}<td class=number>{verdict.left:.4g}"
        f"<td class=number>{verdict.right:.4g}<td>{'yes' if verdict.holds else 'no'}"
        for name, stage in stages.items()
        for verdict in stage.verdicts
    )
    head = "<tr><th>stage<th>what is expected<th>left<th>right<th>held</tr>"
    return f"<h2>Expectations</h2><table>{head}{rows}</table>" if rows else ""


def _before_and_after(root: str, stages: Mapping[str, Lineage]) -> str:
    """Each stage's held-out measures at its first and its last evaluation; what an evaluation found counts as after."""
    body = []
    for name in stages:
        rows = read_metrics(os.path.join(root, name, "metrics.jsonl"))
        if not rows:
            manifest = read_manifest(os.path.join(root, name)) or {}
            body += [
                f"<tr><td>{html.escape(name)}<td>{html.escape(metric)}<td><td><td class=number>{value:.4g}<td>"
                for metric, value in manifest.get("final_metrics", {}).items()
                if manifest["stage"] == "evaluate" and value is not None
            ]
        kind = kind_of(rows)
        for metric, labels in MEASURES.items():
            label = labels if isinstance(labels, str) else labels.get(kind)
            values = [(row["step"], row[metric]) for row in rows if metric in row]
            if len(values) < 2 or label is None:
                continue
            (first_step, first), (last_step, last) = values[0], values[-1]
            body.append(
                f"<tr><td>{html.escape(name)}<td>{label}<td class=number>{first:.4g}<td class=number>{first_step:,}"
                f"<td class=number>{last:.4g}<td class=number>{last_step:,}"
            )
    head = "<tr><th>stage<th>on held-out data<th>before<th>at step<th>after<th>at step</tr>"
    return f"<h2>Before and after each stage</h2><table>{head}{''.join(body)}</table>" if body else ""


def _side_by_side(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    if not samples:
        return ""
    head = "".join(f"<th>after {html.escape(name)}" for name in samples)
    body = "".join(
        f"<tr><td>{html.escape(str(rows[0]['prompt']))}"
        + "".join(f"<td>{html.escape(str(row['response']))}" for row in rows)
        for rows in zip(*samples.values(), strict=True)
    )
    return f"<h2>The same prompts, answered after each stage</h2><table><tr><th>prompt{head}</tr>{body}</table>"
