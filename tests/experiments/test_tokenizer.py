"""Training a tokenizer from the command line: killed at its last moment, and again."""

import json

import pytest

from jaxgpt.runs import manifest as manifests
from tests.experiments.conftest import here


@pytest.mark.parametrize("half_a_row", ["", '{"step": 0, "ev'])
def test_a_run_killed_before_its_manifest_is_finished_by_the_same_command(tmp_path, monkeypatch, half_a_row):
    (tmp_path / "text.txt").write_text("Ann sees Bob.\n\nBob sees Ann.")
    flags = [
        "--config=configs/tokenizer.py:char",
        f"--workdir={tmp_path}/run",
        f"--config.data.train={tmp_path}/text.txt",
    ]
    with monkeypatch.context() as patch:
        patch.setattr(manifests, "write_manifest", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            here("tokenizer", *flags)
    metrics = tmp_path / "run" / "metrics.jsonl"
    undisturbed = metrics.read_text()
    metrics.write_text(half_a_row or undisturbed)
    here("tokenizer", *flags)
    assert metrics.read_text() == undisturbed
    (row,) = map(json.loads, undisturbed.splitlines())
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert row == {"step": 0, **manifest["final_metrics"]}
