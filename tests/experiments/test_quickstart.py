"""The quickstart: every stage after the other from nothing but Python's own library, and an exit code that tells."""

import json

import pytest

from experiments import quickstart
from tests.experiments.conftest import command


def test_every_stage_runs_from_nothing_and_ten_steps_are_not_enough(tmp_path):
    flags = [f"--workdir={tmp_path}", "--max_bytes=200000", "--num_train_steps=10", "--max_records=200"]
    done = command("quickstart", *flags)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "not better than where it started: pretrain" in done.stderr
    for stage in ("pretrain", "sft", "reward"):
        assert (tmp_path / stage / "report.html").exists()
    assert (tmp_path / "pretrain" / "samples.jsonl").read_text().count("\n") == 4


@pytest.mark.parametrize(
    ("name", "value", "learned"),
    [
        ("", 0, True),
        ("pretrain", 4.6, False),
        ("pretrain", float("nan"), False),
        ("sft", 3.7, False),
        ("reward", 0.49, False),
    ],
)
def test_a_stage_that_did_not_learn_is_an_error(tmp_path, capsys, name, value, learned):
    results = {"pretrain": 4.4, "sft": 3.5, "reward": 0.6} | {name: value}
    for stage in ("pretrain", "sft", "reward"):
        rate = {"accuracy": results["reward"] + 0.1, "low": results["reward"], "high": 0.9}
        manifest = {
            "final_metrics": {"eval/loss": results[stage], "eval/bits_per_byte": 2.0},
            "reference_lines": {"unigram entropy": 5.0}, "report_card": {"accuracy": rate},
        }  # fmt: skip
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "manifest.json").write_text(json.dumps(manifest))
        (tmp_path / stage / "metrics.jsonl").write_text('{"step": 0, "eval/loss": 4.0}\n')
    if learned:
        quickstart.judge(str(tmp_path))
    else:
        with pytest.raises(SystemExit) as exit_:
            quickstart.judge(str(tmp_path))
        assert exit_.value.code == 1
        assert f"started: {name}." in capsys.readouterr().err
