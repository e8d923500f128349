"""The pipeline command: it runs what is missing, keeps what is finished, and survives being killed."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from typing import NamedTuple

import pytest

from tests.experiments.conftest import ROOT, command, environment


class Runs(NamedTuple):
    """Two runs of the small pipeline and what the second printed; both were made in the folder of the first."""

    killed: pathlib.Path
    undisturbed: pathlib.Path
    done: subprocess.CompletedProcess


@pytest.fixture(scope="module")
def runs(pipeline_config, tmp_path_factory) -> Runs:
    """A pipeline that was killed in its third stage, or soon after, and then run again; and one that was left alone."""
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
    aside, undisturbed = root.with_name("aside"), root.with_name("undisturbed")
    root.rename(aside)
    done = command("pipeline", f"--config={pipeline_config}", f"--workdir={root}")
    assert done.returncode == 0, done.stdout + done.stderr
    root.rename(undisturbed)
    aside.rename(root)
    return Runs(root, undisturbed, done)


def manifest(root: pathlib.Path) -> dict:
    return json.loads((root / "manifest.json").read_text())


def digests(root: pathlib.Path) -> dict[str, str]:
    return {name: parent["digest"] for name, parent in manifest(root)["parents"].items()}


def test_a_killed_pipeline_run_again_ends_as_an_undisturbed_one(runs):
    assert runs.done.stdout.count("$ python -m experiments.") == 4
    assert "1 of 1 expectations held. Report: " in runs.done.stdout
    assert manifest(runs.killed) == manifest(runs.undisturbed)
    report = (runs.killed / "report.html").read_text()
    assert "answered after each stage" in report
    assert report.count("<th>after ") == 2
    assert "<td>pretrain<td>loss (nats per token)" in report
    assert manifest(runs.killed)["parents"]["sft"]["digest"][:12] in report


def test_a_finished_pipeline_does_nothing_again_and_a_changed_stage_takes_along_what_is_built_on_it(
    pipeline_config, runs, tmp_path
):
    root = tmp_path / "copy"
    shutil.copytree(runs.killed, root)
    before = digests(root)
    done = command("pipeline", f"--config={pipeline_config}", f"--workdir={root}")
    assert done.returncode == 0, done.stderr
    assert "$ python" not in done.stdout
    assert digests(root) == before
    flag = "--config.stages.pretrain.fields.num_train_steps=14"
    done = command("pipeline", f"--config={pipeline_config}", f"--workdir={root}", flag)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("$ python -m experiments.") == 2
    after = digests(root)
    assert {name for name in after if after[name] != before[name]} == {"pretrain", "sft"}
    assert len(list((root / "replaced").iterdir())) == 2


def test_what_is_expected_and_does_not_hold_is_exit_code_1_and_in_the_report(pipeline_config, runs, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(runs.undisturbed, root)
    (root / "report.html").unlink()
    flag = "--config.stages.sft.expect=('final_metrics.eval/loss < 0.01',)"
    done = command("pipeline", f"--config={pipeline_config}", f"--workdir={root}", flag)
    assert done.returncode == 1
    assert "error: the stage sft has not done what is expected of it: final_metrics.eval/loss < 0.01" in done.stderr
    assert "to run the stage anew, change a field (--config.stages.sft.fields.FIELD=VALUE) or move" in done.stderr
    assert "1 of 2 expectations held. Report: " in done.stdout
    assert "$ python" not in done.stdout  # at once: what is finished does not run again
    assert "The stage sft has not done what is expected of it" in (root / "report.html").read_text()


def test_a_mistake_in_a_stage_ends_the_pipeline_with_its_sentence_and_code(pipeline_config, tmp_path):
    flags = ["--config.stages.data.fields.forget_carry=2", f"--workdir={tmp_path / 'run'}"]
    done = command("pipeline", f"--config={pipeline_config}", *flags)
    assert done.returncode == 2
    assert done.stderr == "error: stages.data: forget_carry must be in [0, 1], not 2.0.\n"
    assert not (tmp_path / "run").exists()
