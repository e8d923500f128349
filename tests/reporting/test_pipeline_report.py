"""The report of a pipeline: what each stage changed, samples side by side, lineage."""

import json
import pathlib
import re

from jaxgpt.reporting.pipeline_report import Lineage, Verdict, write_pipeline_report


def table(page: str, heading: str) -> list[list[str]]:
    """The cells of the table under a heading, row by row."""
    body = page.split(f"<h2>{heading}</h2>")[1].split("</table>")[0]
    return [re.split("<t[dh][^>]*>", row)[1:] for row in body.split("<tr>")[1:]]


def test_before_and_after_samples_and_lineage_are_shown(tmp_path):
    rows = {
        "sft": [{"step": 0, "eval/loss": 4.0}, {"step": 5, "train/loss": 3.0}, {"step": 9, "eval/loss": 2.0}],
        "reward": [{"step": 0, "eval/loss": 0.7, "eval/accuracy": 0.5, "eval/margin": 0.0},
                   {"step": 8, "eval/loss": 0.25, "eval/accuracy": 0.875, "eval/margin": 2.0}],
        "ppo": [{"step": 0, "eval/loss": -0.1, "eval/scores": 0.5, "eval/gold": 0.1},
                {"step": 20, "eval/loss": -0.2, "eval/scores": 0.75, "eval/gold": 0.2}],
    }  # fmt: skip
    for name, some in rows.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    for name, stage in (("judged", "evaluate"), ("final", "finalize")):
        (tmp_path / name).mkdir()
        manifest = {"stage": stage, "final_metrics": {"win_rate/win_rate": 0.625}}
        (tmp_path / name / "manifest.json").write_text(json.dumps(manifest))
    parents = {"sft": set(), "reward": {"sft"}, "ppo": {"sft"}, "final": {"ppo"}, "judged": {"sft", "final"}}
    stages = {name: Lineage(f"title of {name}", f"{i}" * 64, parents[name]) for i, name in enumerate(parents)}
    samples = {name: [{"prompt": "<What>?", "response": f"{name} & co"}] for name in ("sft", "ppo")}
    page = pathlib.Path(write_pipeline_report(str(tmp_path), stages, samples)).read_text()
    assert table(page, "Before and after each stage")[1:] == [
        ["sft", "loss (nats per token)", "4", "0", "2", "9"],
        ["reward", "preference loss", "0.7", "0", "0.25", "8"],
        ["reward", "share of pairs in the right order", "0.5", "0", "0.875", "8"],
        ["reward", "margin of the better response (reward units)", "0", "0", "2", "8"],
        ["ppo", "score", "0.5", "0", "0.75", "20"],
        ["ppo", "gold reward", "0.1", "0", "0.2", "20"],
        ["judged", "win_rate/win_rate", "", "", "0.625", ""],
    ]
    assert table(page, "The same prompts, answered after each stage")[1] == [
        "&lt;What&gt;?", "sft &amp; co", "ppo &amp; co"
    ]  # fmt: skip
    assert table(page, "Lineage")[3:5] == [["ppo", "sft", "2" * 12], ["final", "ppo", "3" * 12]]


def test_a_failed_expectation_comes_first_and_in_plain_words(tmp_path):
    good, bad = Verdict("first.a < 1", 0.5, 1.0, True), Verdict("final_metrics.r.high > 0.4", 0.31, 0.4, False)
    stages = {"sft": Lineage("", "0" * 64, set(), [good]), "judged": Lineage("", "1" * 64, {"sft"}, [good, bad])}
    page = pathlib.Path(write_pipeline_report(str(tmp_path), stages, {})).read_text()
    assert "<p class=sub>2 of 3 expectations held.</p>" in page
    failure = "final_metrics.r.high &gt; 0.4 should hold, but 0.31 stands against 0.4."
    assert (
        page.index("The stage judged has not done what is expected of it:") < page.index(failure) < page.index("<h2>")
    )
    assert table(page, "Expectations")[1:] == [
        ["sft", "first.a &lt; 1", "0.5", "1", "yes"],
        ["judged", "first.a &lt; 1", "0.5", "1", "yes"],
        ["judged", "final_metrics.r.high &gt; 0.4", "0.31", "0.4", "no"],
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
