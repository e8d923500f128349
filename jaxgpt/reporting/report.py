"""report.html: one file that shows what a run did, to keep or to send."""

import base64
import html
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from jaxgpt.reporting.plots import plot_curves
from jaxgpt.reporting.report_card_view import plot_report_card, report_card_html
from jaxgpt.runs.workdir import read_json, read_metrics, read_rows, write_atomic

MAX_TASK_SAMPLES = 20  # an evaluation has one for every record

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: 0; } h2 { margin-top: 2.5rem; } .sub { opacity: .7; margin-top: 0; }
table { border-collapse: collapse; } td, th { text-align: left; padding: .25rem .9rem .25rem 0;
border-bottom: 1px solid var(--line); vertical-align: top; } td.number { font-variant-numeric: tabular-nums; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 1rem; }
.plots img { width: 100%; background: white; border-radius: 6px; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--soft); padding: .8rem; border-radius: 6px; }
pre b { opacity: .65; font-weight: normal; } details { margin: .5rem 0; } summary { cursor: pointer; }
"""


def write_report(workdir: str) -> str:
    """Write WORKDIR/plots/*.png and WORKDIR/report.html from what the run has left so far; returns the report's path.

    Works for a run that is unfinished, or was killed: files that are missing are left out.
    """
    rows = read_metrics(os.path.join(workdir, "metrics.jsonl"))
    samples = read_rows(os.path.join(workdir, "samples.jsonl"))
    config = _load(os.path.join(workdir, "config.json"))
    manifest = _load(os.path.join(workdir, "manifest.json"))
    plots = plot_curves(rows, os.path.join(workdir, "plots"), manifest.get("reference_lines", {}))
    title = f"{manifest.get('stage', 'run')}: {os.path.basename(os.path.abspath(workdir))}"
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f"<p class=sub>{_status(rows, config, manifest)}</p>",
        _report_card(workdir),
        _evaluation(workdir),
        _metrics_table(rows, manifest),
        f"<h2>Curves</h2><div class=plots>{''.join(image(p) for p in plots)}</div>" if plots else "",
        _samples(samples),
        _details("Config", config),
        _details("Provenance", {k: v for k, v in manifest.items() if k not in ("config", "final_metrics")}),
    ]
    path = os.path.join(workdir, "report.html")
    write_atomic(path, page(title, parts))
    return path


def page(title: str, parts: Sequence[str]) -> str:
    """A whole HTML document from the parts of its body."""
    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>{''.join(parts)}</body></html>"
    )


def _load(path: str) -> dict[str, Any]:
    return read_json(path) or {}


def _status(rows: list[dict], config: dict, manifest: dict) -> str:
    if not rows:
        return "finished" if manifest else "Nothing was logged yet."
    steps = config.get("num_train_steps")
    end = "finished" if manifest else "unfinished"
    return f"{end} at step {rows[-1]['step']:,}" + (f" of {steps:,}" if steps else "")


def _report_card(workdir: str) -> str:
    """The judgement of a reward model, where the run left one in WORKDIR/report_card.json."""
    card = _load(os.path.join(workdir, "report_card.json"))
    if "passed" not in card:
        return ""
    images = "".join(image(path) for path in plot_report_card(card, os.path.join(workdir, "plots")))
    return f"{report_card_html(card)}<div class=plots>{images}</div>"


def _evaluation(workdir: str) -> str:
    """The results of an evaluation, where the run left some in WORKDIR/results.json."""
    results = _load(os.path.join(workdir, "results.json"))
    return _evaluation_html(results["tasks"]) if results else ""


def _evaluation_html(tasks: Mapping[str, dict[str, Any]]) -> str:
    """A table of all metrics, what they are of, and report cards; tasks: as in results.json."""
    rows, notes, cards = [], [], []
    for label, task in tasks.items():
        name = html.escape(label)
        for metric, m in task["metrics"].items():
            interval = "" if m["low"] is None else f"{m['low']:.4f} to {m['high']:.4f}"
            rows.append(
                f"<tr><td>{name}<td>{html.escape(task['kind'])}<td>{html.escape(metric)}<td class=number>{m['value']:.4f}"
                f"<td class=number>{interval}<td class=number>{m['n']:,}"
            )
        counts = ", ".join(f"{html.escape(what)} {value:,.6g}" for what, value in task["counts"].items())
        notes.append(f"<li>{name}: {counts}")
        if "report_card" in task:
            cards.append(f"<h2>{name}</h2>{report_card_html(task['report_card'])}")
    head = "<tr><th>task<th>kind<th>metric<th>value<th>95 % interval<th>n</tr>"
    return f"<h2>Results</h2><table>{head}{''.join(rows)}</table><ul>{''.join(notes)}</ul>{''.join(cards)}"


def _metrics_table(rows: list[dict], manifest: dict) -> str:
    """The last value of every metric, and what guessing would give."""
    last: dict[str, tuple[int, float]] = {}
    for row in rows:
        last |= {name: (row["step"], value) for name, value in row.items() if name != "step"}
    body = "".join(
        f"<tr><td>{html.escape(name)}<td class=number>{value:,.5g}<td class=number>{step:,}"
        for name, (step, value) in sorted(last.items())
    )
    body += "".join(
        f"<tr><td>loss of guessing: {html.escape(name)}<td class=number>{value:,.5g}<td>"
        for name, value in manifest.get("reference_lines", {}).items()
    )
    return f"<h2>Metrics</h2><table><tr><th>metric<th>last value<th>at step</tr>{body}</table>" if body else ""


def image(path: str) -> str:
    """A PNG file as an img element that holds it."""
    with open(path, "rb") as file:
        data = base64.b64encode(file.read()).decode()
    name = os.path.splitext(os.path.basename(path))[0].replace("_", " ")
    return f'<img alt="{html.escape(name)}" src="data:image/png;base64,{data}">'


def _samples(samples: list[dict]) -> str:
    """The texts of the last step that has any, then those of the others, folded; of an evaluation, the first of each task."""
    groups: dict[str, list[dict]] = {}
    for row in sorted(samples, key=lambda row: -row.get("step", 0)):
        groups.setdefault(f"step {row['step']:,}" if "step" in row else row["task"], []).append(row)
    parts = []
    for i, (name, rows) in enumerate(groups.items()):
        shown = rows if "step" in rows[0] else rows[:MAX_TASK_SAMPLES]
        texts = "".join(
            f"<pre><b>{html.escape(str(row['prompt']))}</b>{html.escape(str(row.get('response', '')))}{_judged(row)}</pre>"
            for row in shown
        )
        opened = "" if i else " open"
        parts.append(f"<details{opened}><summary>{html.escape(name)}</summary>{texts}</details>")
    return f"<h2>Samples</h2>{''.join(parts)}" if parts else ""


def _judged(row: dict) -> str:
    shown = ", ".join(f"{name} {row[name]:.4g}" for name in ("scores", "gold", "kl") if name in row)
    return f"\n<b>{shown}</b>" if shown else ""


def _details(title: str, content: dict) -> str:
    if not content:
        return ""
    text = html.escape(json.dumps(content, indent=2, sort_keys=True))
    return f"<h2>{title}</h2><details><summary>show</summary><pre>{text}</pre></details>"
