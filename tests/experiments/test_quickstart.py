"""The quickstart: every stage after the other from nothing but Python's own library, and an exit code that tells."""

import json

import pytest

from experiments import quickstart
from tests.experiments.conftest import command


def test_every_stage_runs_from_nothing_and_ten_steps_are_not_enough(tmp_path):
    flags = [f"--workdir={tmp_path}", "--max_bytes=400000", "--num_train_steps=10"]
    done = command("quickstart", *flags)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "did not learn" in done.stderr
    assert "unigram entropy" in done.stdout
    assert (tmp_path / "pretrain" / "report.html").exists()
    assert (tmp_path / "pretrain" / "samples.jsonl").read_text().count("\n") == 4
    again = command("quickstart", *flags)
    assert "is finished: step 10" in again.stdout


@pytest.mark.parametrize(("loss", "learned"), [(4.4, True), (4.6, False), (float("nan"), False)])
def test_a_model_that_did_not_learn_is_an_error(tmp_path, capsys, loss, learned):
    manifest = {
        "final_metrics": {"eval/loss": loss, "eval/bits_per_byte": 2.0},
        "reference_lines": {"unigram entropy": 5.0, "uniform": 7.0},
    }
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    if learned:
        quickstart.judge(str(tmp_path))
    else:
        with pytest.raises(SystemExit) as exit_:
            quickstart.judge(str(tmp_path))
        assert exit_.value.code == 1
        assert "did not learn" in capsys.readouterr().err
