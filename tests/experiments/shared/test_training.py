"""What surrounds the loop of every training command: the report, while a run goes on and when it ends."""

import json
import os

import pytest

from experiments.shared import training
from jaxgpt.reporting import report


@pytest.fixture
def workdir(tmp_path):
    """A run that was killed after its manifest."""
    rows = [{"step": step, "train/loss": 3.0 - step / 10, "eval/loss": 3.0} for step in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "manifest.json").write_text(json.dumps({"stage": "sft"}))
    return tmp_path


def test_the_report_of_a_finished_run_is_written_where_it_is_missing_or_older(workdir, capsys):
    training.renew_report(str(workdir))
    assert "finished at step 2" in (workdir / "report.html").read_text()
    assert "report.html" in capsys.readouterr().out
    (workdir / "report.html").write_text("kept")
    os.utime(workdir / "report.html", (2_000_000_000, 2_000_000_000))
    training.renew_report(str(workdir))
    assert (workdir / "report.html").read_text() == "kept"
    os.utime(workdir / "report.html", (1, 1))
    training.renew_report(str(workdir))
    assert "finished at step 2" in (workdir / "report.html").read_text()


def test_evaluations_write_the_report_and_other_rows_do_not(workdir):
    (workdir / "manifest.json").unlink()
    (watcher,) = training.reports(str(workdir))
    watcher.on_log(1, {"train/loss": 1.0})
    assert not (workdir / "report.html").exists()
    watcher.on_log(2, {"eval/loss": 1.0})
    assert "unfinished at step 2" in (workdir / "report.html").read_text()


def test_reports_take_a_twentieth_of_the_time(workdir, monkeypatch):
    now, written = [0.0], []

    def write(_):
        written.append(now[0])
        now[0] += 2.0  # what a report takes

    monkeypatch.setattr(training, "write_report", write)
    monkeypatch.setattr(training.time, "monotonic", lambda: now[0])
    (watcher,) = training.reports(str(workdir))
    for _ in range(90):
        watcher.on_log(1, {"eval/loss": 1.0})
        now[0] += 1.0
    assert written == [0.0, 40.0, 80.0]  # 2 seconds, then none for 38


def test_a_report_that_cannot_be_written_is_a_sentence_and_leaves_the_old_one(workdir, monkeypatch, capsys):
    training.try_report(str(workdir))
    before = (workdir / "report.html").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report, "write_atomic", full)
    capsys.readouterr()
    training.try_report(str(workdir))
    assert "could not be written ([Errno 28] No space left on device)" in capsys.readouterr().err
    (watcher,) = training.reports(str(workdir))
    watcher.on_log(2, {"eval/loss": 1.0})
    assert (workdir / "report.html").read_bytes() == before
    assert not list(workdir.rglob("*.tmp"))
