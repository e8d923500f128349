"""A pretraining run from the command line: finished, resumed, killed, damaged, preempted, refused."""

import json
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from jaxgpt import partition, tree
from jaxgpt.partition import MeshConfig
from jaxgpt.runs.load import load_model
from jaxgpt.runs.workdir import CLOCK_METRICS
from tests.experiments.conftest import ROOT, command, environment, here

# A command that gets a signal when it has logged step 6: it saves after step 7.
SIGNALLED = """
import os, runpy, sys
from jaxgpt.runs.workdir import JsonLog

_, number, stage = sys.argv[:3]
append = JsonLog.append

def append_and_signal(log, at, *rows):
    append(log, at, *rows)
    if at == 6 and log._path.endswith("metrics.jsonl"):
        os.kill(os.getpid(), int(number))

JsonLog.append = append_and_signal
sys.argv = sys.argv[2:]
runpy.run_module(f"experiments.{stage}", run_name="__main__", alter_sys=True)
"""


def rows(workdir) -> list[dict]:
    """metrics.jsonl without what depends on the clock."""
    lines = (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in CLOCK_METRICS} for line in lines]


def parameters(workdir) -> str:
    import jax

    return tree.digest(load_model(str(workdir), partition.make_mesh(MeshConfig(), devices=jax.devices()[:1])).params)


def test_a_run_learns_and_leaves_what_the_contract_says(finished):
    workdir, done = finished
    assert "Finished at step 12" in done.stdout
    logged = rows(workdir)
    assert [row["step"] for row in logged] == [2, 4, 6, 8, 10, 12]
    assert logged[-1]["train/loss"] < logged[0]["train/loss"] - 0.5
    assert {"eval/loss", "eval/perplexity", "eval/bits_per_byte", "eval/accuracy"} < logged[-1].keys()
    assert logged[-1]["eval/perplexity"] == pytest.approx(np.exp(logged[-1]["eval/loss"]))
    manifest = json.loads((workdir / "manifest.json").read_text())
    assert manifest["stage"] == "pretrain"
    assert manifest["final_metrics"]["eval/loss"] == logged[-1]["eval/loss"]
    assert json.loads((workdir / "config.json").read_text())["model"]["embed_dim"] == 16
    samples = [json.loads(line) for line in (workdir / "samples.jsonl").read_text().splitlines()]
    assert [(s["step"], s["prompt"]) for s in samples] == [(6, "Ann"), (6, "Bob likes"), (12, "Ann"), (12, "Bob likes")]
    for name in ("report.html", "plots/loss.png", "tokenizer.model", "checkpoints/12"):
        assert (workdir / name).exists(), name
    assert list((workdir / "tensorboard").iterdir())


def test_the_same_command_on_a_finished_run_says_so(finished, arguments):
    workdir, _ = finished
    before = (workdir / "metrics.jsonl").read_bytes()
    done = command("pretrain", f"--workdir={workdir}", *arguments)
    assert done.returncode == 0
    assert "is finished: step 12" in done.stdout
    assert (workdir / "metrics.jsonl").read_bytes() == before


def start(workdir, arguments, **kwargs) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.pretrain", f"--workdir={workdir}", *arguments],
        cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **kwargs,
    )  # fmt: skip


def wait_for_step(workdir, step: int, process) -> None:
    """Until the run has logged `step`."""
    path = pathlib.Path(workdir) / "metrics.jsonl"
    while True:
        ended = process.poll() is not None  # asked first: what it wrote before it ended is seen below
        if path.exists() and f'{{"step": {step},' in path.read_text():
            return
        assert not ended, process.communicate()[0]
        time.sleep(0.005)


@pytest.mark.parametrize("step", [2, 6, 10])
def test_killed_and_restarted_equals_undisturbed_bit_for_bit(finished, arguments, tmp_path, step):
    process = start(tmp_path, arguments)
    wait_for_step(tmp_path, step, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done = command("pretrain", f"--workdir={tmp_path}", *arguments)
    assert done.returncode == 0, done.stderr
    assert rows(tmp_path) == rows(finished[0])
    assert parameters(tmp_path) == parameters(finished[0])


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGTERM, 42, "Preempted"), (signal.SIGINT, 130, "Interrupted")]
)
def test_a_signal_saves_is_told_from_a_finish_and_the_rest_is_the_same(
    finished, arguments, tmp_path, number, code, word
):
    done = subprocess.run(
        [sys.executable, "-c", SIGNALLED, str(number), "pretrain", f"--workdir={tmp_path}", *arguments],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert done.stderr.splitlines()[-1].endswith(f"{word} at step 7 of 12; the same command resumes.")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "manifest.json").exists()
    assert (tmp_path / "checkpoints/digests/7.json").exists()
    assert "unfinished at step 6 of 12" in (tmp_path / "report.html").read_text()
    done = command("pretrain", f"--workdir={tmp_path}", *arguments)
    assert done.returncode == 0, done.stderr
    assert "training from step 7" in done.stdout
    assert rows(tmp_path) == rows(finished[0])
    assert parameters(tmp_path) == parameters(finished[0])


def test_a_flipped_byte_in_the_newest_checkpoint_is_reported_and_the_one_before_used(finished, arguments, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished[0], workdir)
    (workdir / "manifest.json").unlink()
    largest = max((p for p in (workdir / "checkpoints/12").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    done = command("pretrain", f"--workdir={workdir}", *arguments)
    assert done.returncode == 0, done.stderr
    assert "Checkpoint 12 is damaged" in done.stderr
    assert "training from step 8" in done.stdout
    assert rows(workdir) == rows(finished[0])
    assert parameters(workdir) == parameters(finished[0])


def test_logs_that_lost_rows_are_refused_by_name_and_without_them_the_run_goes_on(
    finished, arguments, tmp_path, capsys
):
    run = tmp_path / "run"
    shutil.copytree(finished[0], run)
    (run / "manifest.json").unlink()
    metrics, samples = run / "metrics.jsonl", run / "samples.jsonl"
    flags = (f"--workdir={run}", *arguments)
    rows = metrics.read_bytes()
    metrics.write_bytes(b"")
    with pytest.raises(ValueError, match=r"metrics\.jsonl no longer holds the rows up to step 12"):
        here("pretrain", *flags)
    metrics.unlink()
    with pytest.raises(ValueError, match=r"metrics\.jsonl lacks the row of step 12"):
        here("pretrain", *flags)
    metrics.write_bytes(rows)
    samples.write_text(samples.read_text().replace("Bob", "Ann", 1))
    with pytest.raises(ValueError, match=r"samples\.jsonl no longer holds the rows up to step 12"):
        here("pretrain", *flags)
    samples.unlink()
    here("pretrain", *flags)
    assert "samples.jsonl is missing; the run goes on" in capsys.readouterr().err
    assert metrics.read_bytes() == rows
    assert (run / "manifest.json").exists()


def test_eight_devices_go_on_from_one_and_agree_to_rounding(finished, arguments, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished[0], workdir)
    (workdir / "manifest.json").unlink()
    shutil.rmtree(workdir / "checkpoints/12")
    done = command("pretrain", f"--workdir={workdir}", *arguments, "--config.mesh.data=2", "--config.mesh.fsdp=2",
                   "--config.mesh.tensor=2", devices=8)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "training from step 8" in done.stdout
    for ours, theirs in zip(rows(workdir), rows(finished[0]), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_a_second_run_on_the_workdir_is_refused(arguments, tmp_path):
    process = start(tmp_path, arguments)
    wait_for_step(tmp_path, 2, process)
    process.send_signal(signal.SIGSTOP)
    try:
        done = command("pretrain", f"--workdir={tmp_path}", *arguments)
    finally:
        process.kill()
        process.communicate()
    assert done.returncode == 2
    assert f"is in use by another run (process {process.pid}" in done.stderr


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(arguments, tmp_path):
    done = command("pretrain", f"--workdir={tmp_path}", *arguments, "--config.optimizer.learning_rate=1e30")
    assert done.returncode == 1
    assert "is not finite at step" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--config.model.num_head=2"], ["model.num_head", "model.num_heads"]),
        (["--config.batch_size=many"], ["batch_size", "an integer", "'many'"]),
        (["--config.model.num_heads=3"], ["model.embed_dim=16", "model.num_heads=3"]),
        (["--config.data.sequence_length=512"], ["data.sequence_length=512", "model.max_seq_length=64"]),
        (["--config.mesh.data=3"], ["mesh.data=3", "1 device"]),
        (["--config.data.train=nowhere.txt"], ["data.train", "nowhere.txt"]),
        (["--config.data.tokenizer=nowhere"], ["data.tokenizer", "nowhere"]),
        (["--config=configs/pretrian.py"], ["configs/pretrian.py", "pretrain.py"]),
        (["--config=configs/pretrain.py:tinny"], ["tinny", "tiny"]),
        (["--cnfig.batch_size=3"], ["cnfig"]),
        (["surplus"], ["surplus"]),
    ],
    ids=lambda x: x[0] if isinstance(x, list) else str(x),
)
def test_a_users_mistake_is_one_sentence_and_exit_code_2(arguments, tmp_path, flags, words):
    done = command("pretrain", f"--workdir={tmp_path}/run", *arguments, *flags)
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in errors[0]
    assert not (tmp_path / "run/checkpoints").exists()
