"""The table, plot and page of a sweep."""

import math
import pathlib

import pytest
from matplotlib.image import imread

from jaxgpt.reporting.sweep_report import plot_sweep, ranked, table, write_sweep_report

NAMES = ("sft.lr", "sft.rank", "sft.norm")


def rows(metrics=(0.5, math.nan, 0.25, None)) -> list[dict]:
    """Four trials; the last has failed."""
    choices = zip((1e-4, 1e-3, 1e-2, 1e-1), (1, 2, 4, 8), ("<pre>", "post", "post", "none"), strict=True)
    made = []
    for number, (values, metric) in enumerate(zip(choices, metrics, strict=True)):
        result = {"failed": "sft", "exit_code": 2} if metric is None else {"metric": metric}
        values = dict(zip(NAMES, values, strict=True))
        made.append(
            {"trial": number, "values": values, **result, "workdirs": {"a": "stages/a", "sft": f"stages/s-{number}"}}
        )
    return made


@pytest.mark.parametrize(("mode", "order"), [("min", [2, 0, 1, 3]), ("max", [0, 2, 1, 3])])
def test_the_best_comes_first_then_what_has_no_number_then_what_failed(mode, order):
    assert [row["trial"] for row in ranked(rows(), mode)] == order


def test_the_table_has_a_line_for_each_trial():
    lines = table(rows(), NAMES[:2], "sft.loss")
    assert lines[0] == ["trial", "sft.lr", "sft.rank", "sft.loss"]
    assert lines[1:3] == [["0", "0.0001", "1", "0.5"], ["1", "0.001", "2", "nan"]]
    assert lines[4] == ["3", "0.1", "8", "sft failed (2)"]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_number_of_fields_has_a_picture_with_the_best_ringed(count, tmp_path):
    fields = {name: name == "sft.lr" for name in NAMES[:count]}
    (path,) = plot_sweep(rows(), fields, "sft.loss", "min", str(tmp_path))
    image = imread(path)[..., :3]
    red = (abs(image - (0.839, 0.153, 0.157)) < 0.02).all(-1)  # C3, the color of the ring alone
    assert red.sum() > 20
    assert plot_sweep(rows()[3:], fields, "sft.loss", "min", str(tmp_path)) == []
    assert plot_sweep(rows(), {}, "sft.loss", "min", str(tmp_path)) == []


def test_the_page_escapes_and_links_finished_trials(tmp_path):
    fields = dict.fromkeys(NAMES, False)
    path = write_sweep_report(str(tmp_path), rows(), fields, "sft.loss", "min", {"metric": "sft.loss"})
    text = pathlib.Path(path).read_text(encoding="utf-8")
    assert "<td>&lt;pre&gt;" in text
    assert text.count('/report.html">its report') == 3
    assert 'href="stages/s-0/report.html"' in text
    assert "data:image/png" in text
