"""The results of an evaluation for the eye: an HTML fragment."""

import html
from collections.abc import Mapping
from typing import Any

from jaxgpt.reporting.report_card_view import report_card_html


def evaluation_html(tasks: Mapping[str, dict[str, Any]]) -> str:
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
