"""The pipeline command: it runs what is missing, keeps what is finished, and survives being killed."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from tests.experiments.conftest import ROOT, command, environment


@pytest.fixture(scope="module")
def root(pipeline_config, tmp_path_factory) -> pathlib.Path:
    """A pipeline that was killed in its third stage, or soon after, and then run again."""
    root = tmp_path_factory.mktemp("pipeline") / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "experiments.pipeline", f"--config={pipeline_config}", f"--workdir={root}"],
        cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while process.poll() is None and not (root / "pretrain/metrics.jsonl").exists():
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    done = command("pipeline", f"--config={pipeline_config}", f"--workdir={root}")
    assert done.returncode == 0, done.stdout + done.stderr
    return root


def manifest(root: pathlib.Path) -> dict:
    return json.loads((root / "manifest.json").read_text())


def test_a_killed_pipeline_run_again_ends_as_an_undisturbed_one(pipeline_config, root, tmp_path_factory):
    killed = manifest(root)
    aside = root.with_name("aside")
    root.rename(aside)
    try:
        done = command("pipeline", f"--config={pipeline_config}", f"--workdir={root}")
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.count("$ python -m experiments.") == 4
        assert manifest(root) == killed
    finally:
        root.rename(root.with_name("undisturbed"))
        aside.rename(root)
    report = (root / "report.html").read_text()
    assert "answered after each stage" in report
    assert report.count("<th>after ") == 2
    assert "<td>pretrain<td>loss (nats per token)" in report
    assert manifest(root)["parents"]["sft"]["digest"][:12] in report


def test_a_finished_pipeline_does_nothing_again_and_a_changed_stage_takes_along_what_is_built_on_it(
    pipeline_config, root
):
    before = manifest(root)
    done = command("pipeline", f"--config={pipeline_config}", f"--workdir={root}")
    assert done.returncode == 0, done.stderr
    assert "$ python" not in done.stdout
    assert manifest(root) == before
    flag = "--config.stages.pretrain.fields.num_train_steps=14"
    done = command("pipeline", f"--config={pipeline_config}", f"--workdir={root}", flag)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("$ python -m experiments.") == 2
    after = manifest(root)
    changed = {name for name in after["parents"] if after["parents"][name] != before["parents"][name]}
    assert changed == {"pretrain", "sft"}
    assert len(list((root / "replaced").iterdir())) == 2


def test_what_is_expected_and_does_not_hold_is_exit_code_1(pipeline_config, root):
    flag = "--config.stages.sft.expect=('final_metrics.eval/loss < 0.01',)"
    done = command("pipeline", f"--config={pipeline_config}", f"--workdir={root.with_name('undisturbed')}", flag)
    assert done.returncode == 1
    assert "error: the stage sft has not done what is expected of it: final_metrics.eval/loss < 0.01" in done.stderr


def test_a_mistake_in_a_stage_ends_the_pipeline_with_its_sentence_and_code(pipeline_config, tmp_path):
    flags = ["--config.stages.data.fields.forget_carry=2", f"--workdir={tmp_path / 'run'}"]
    done = command("pipeline", f"--config={pipeline_config}", *flags)
    assert done.returncode == 2
    assert "forget_carry must be a probability, not 2.0" in done.stderr
    assert "the stage data ended with exit code 2" in done.stderr
