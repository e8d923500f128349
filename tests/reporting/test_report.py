"""The report of a run: complete, readable, and safe whatever the run left."""

import json
import pathlib

import numpy as np
import pytest

from jaxgpt.reporting import plots
from jaxgpt.reporting.plots import plot_curves, running_mean
from jaxgpt.reporting.report import write_report

ROWS = [
    {"step": s, "train/loss": 5 * 0.99**s, "train/learning_rate": 1e-3, "train/grad_norm": 1.0}
    | ({"eval/loss": 5.1 * 0.99**s} if s % 10 == 0 else {})
    for s in range(0, 100, 2)
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_full_run_is_shown_in_one_file(tmp_path):
    write(tmp_path / "metrics.jsonl", ROWS)
    write(tmp_path / "samples.jsonl", [{"step": 90, "prompt": "<b>&", "response": "<script>alert(1)</script>"}])
    (tmp_path / "config.json").write_text(json.dumps({"num_train_steps": 98}))
    manifest = {"stage": "pretrain", "reference_lines": {"uniform": 8.32}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    page = pathlib.Path(write_report(str(tmp_path))).read_text()
    assert "finished at step 98 of 98" in page
    assert "<script>" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "uniform" in page
    assert page.count("data:image/png;base64,") == 3
    assert {p.name for p in (tmp_path / "plots").iterdir()} == {"loss.png", "learning_rate.png", "grad_norm.png"}


@pytest.mark.parametrize(
    ("metrics", "labels"),
    [
        (
            {"train/loss": 1, "train/accuracy": 0.5, "eval/log_z": 1, "eval/accuracy": 0.5},
            {"loss": "loss (nats per token)", "accuracy": "next-token accuracy"},
        ),
        (
            {"train/loss": 1, "reward/accuracy": 0.5, "reward/margin": 1, "eval/accuracy": 0.5},
            {
                "loss": "preference loss (mean over prompts)",
                "accuracy": "share of pairs in the right order",
                "margin": "margin of the better response (reward units)",
            },
        ),
        ({"objective/kl": 1, "eval/loss": -1, "eval/scores": 1}, {"score": "score (reward units)"}),
    ],
)
def test_an_axis_says_what_the_stage_measures(tmp_path, monkeypatch, metrics, labels):
    found = {}
    draw = plots._draw
    monkeypatch.setattr(plots, "_draw", lambda axes, *rest: found.setdefault(axes, None) or draw(axes, *rest))
    paths = plot_curves([{"step": 0, **metrics}, {"step": 1, **metrics}], str(tmp_path), {})
    shown = {axes.get_ylabel() for axes in found}
    names = {pathlib.Path(path).stem for path in paths}
    assert labels.keys() <= names
    assert set(labels.values()) <= shown
    assert ("loss" in names) == ("train/loss" in metrics)
    assert ("next-token accuracy" in shown) == ("eval/log_z" in metrics)


def test_a_run_of_reinforcement_learning_shows_where_gold_leaves_the_score(tmp_path):
    row = lambda s: {
        "objective/kl": s / 9,
        "eval/kl": s / 9,
        "eval/scores": float(s),
        "eval/gold": s * (5 - s),
        "eval/loss": 0,
    }
    write(tmp_path / "metrics.jsonl", [{"step": s, **row(s)} for s in range(5)])
    write(tmp_path / "samples.jsonl", [{"step": 4, "prompt": "?", "response": "!", "scores": 1.25, "gold": 0.5}])
    page = pathlib.Path(write_report(str(tmp_path))).read_text()
    assert {p.stem for p in (tmp_path / "plots").iterdir()} == {"score", "gold", "kl", "overoptimization"}
    assert "scores 1.25, gold 0.5" in page


def test_an_interrupted_run_is_shown_without_its_half_line(tmp_path):
    write(tmp_path / "metrics.jsonl", ROWS[:3])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "train/lo')
    page = pathlib.Path(write_report(str(tmp_path))).read_text()
    assert "unfinished at step 4" in page


def test_an_empty_folder_gives_a_report_that_says_so(tmp_path):
    assert "Nothing was logged yet" in pathlib.Path(write_report(str(tmp_path))).read_text()


def test_plots_have_something_on_them(tmp_path):
    from matplotlib.image import imread

    for path in plot_curves(ROWS, str(tmp_path), {"unigram entropy": 4.0}):
        image = imread(path)
        assert image.shape[0] > 300
        assert len(np.unique(image[..., 0])) > 10


@pytest.mark.parametrize("width", [1, 3, 100])
def test_the_running_mean_looks_back(width):
    values = np.random.default_rng(0).normal(size=12)
    expected = [values[max(0, i - width + 1) : i + 1].mean() for i in range(12)]
    np.testing.assert_allclose(running_mean(list(values), width), expected, rtol=1e-12)


def test_an_evaluation_is_shown_with_its_intervals_and_samples(tmp_path):
    metric = {"value": 0.25, "stderr": 0.1, "low": 0.125, "high": 0.5, "n": 1234}
    task = {"kind": "multiple_choice", "metrics": {"accuracy": metric}, "counts": {"records": 1234, "truncated": 7}}
    plain = {"kind": "perplexity", "metrics": {"loss": metric | {"low": None, "high": None}}, "counts": {}}
    (tmp_path / "results.json").write_text(json.dumps({"tasks": {"<b>quiz": task, "text": plain}}))
    (tmp_path / "manifest.json").write_text(json.dumps({"stage": "evaluate"}))
    rows = [{"task": "<b>quiz", "prompt": f"question {i}.", "response": "<i>"} for i in range(30)]
    write(tmp_path / "samples.jsonl", [*rows, {"task": "text", "prompt": "a text"}])
    page = pathlib.Path(write_report(str(tmp_path))).read_text()
    assert "<b>quiz" not in page
    assert "<i>" not in page
    for words in (
        "&lt;b&gt;quiz",
        "0.2500",
        "0.1250 to 0.5000",
        "1,234",
        "truncated 7",
        "question 0.",
        "a text",
        "finished",
    ):
        assert words in page
    assert "question 29." not in page
