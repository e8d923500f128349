"""Several controllers are one run: the same numbers as one process with as many devices, one writer, one lock."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from jaxgpt import partition, tree
from jaxgpt.partition import MeshConfig
from jaxgpt.runs.load import load_model
from tests.experiments.conftest import ROOT, command, environment
from tests.experiments.test_pretrain import rows, wait_for_step

JOB = ["-m", "launch.local", "--num_processes=2", "--devices_per_process=2"]


def job(workdir, arguments, *options: str) -> list[str]:
    pretrain = [sys.executable, "-m", "experiments.pretrain", f"--workdir={workdir}", *arguments]
    return [sys.executable, *JOB, *options, "--", *pretrain]


def test_two_processes_equal_one_with_as_many_devices_also_after_preemption(arguments, tmp_path):
    arguments = [*arguments, "--config.mesh.data=2", "--config.mesh.fsdp=2"]
    one = command("pretrain", f"--workdir={tmp_path}/one", *arguments, devices=4)
    assert one.returncode == 0, one.stderr

    process = subprocess.Popen(job(tmp_path / "two", arguments), cwd=ROOT, env=environment(), text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    wait_for_step(tmp_path / "two", 6, process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 42, output
    assert "Preempted at step" in output
    assert "error" not in output

    done = subprocess.run(job(tmp_path / "two", arguments), cwd=ROOT, env=environment(), text=True, timeout=600,
                          capture_output=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for ours, theirs in zip(rows(tmp_path / "two"), rows(tmp_path / "one"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)  # reductions between processes add in another order
    mesh = partition.make_mesh(MeshConfig(), devices=jax.devices()[:1])
    ours, theirs = (tree.named_leaves(load_model(str(tmp_path / name), mesh).params) for name in ("two", "one"))
    for name, leaf in theirs.items():
        np.testing.assert_allclose(ours[name], leaf, atol=1e-4, err_msg=name)

    # The launcher starts a job again of which a process was killed; in the end nothing shows it.
    process = subprocess.Popen(
        job(tmp_path / "three", arguments, "--max_restarts=9"),
        cwd=ROOT,
        env=environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    killed: list[int] = []
    for step, index in ((4, 1), (8, 0)):
        while len(started := set(children(process)) - set(killed)) < 2:  # those of the next start
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.01)
        wait_for_step(tmp_path / "three", step, process)
        os.kill(sorted(started)[index], signal.SIGKILL)
        killed += started
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    assert output.count("was ended by SIGKILL first; the job starts again.") == 2
    assert rows(tmp_path / "three") == rows(tmp_path / "two")


def children(launcher: subprocess.Popen) -> list[int]:
    """The ids of the processes of its job, in their order."""
    return [
        int(word) for word in pathlib.Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    ]


LATE_SIGNAL = """
import os, signal, time
from jaxgpt import partition
from jaxgpt.runs.workdir import StopSignal
import jax
partition.start_distributed()
with StopSignal() as stop:
    assert not stop.should_stop(1)
    if jax.process_index() == 0 and {inside}:
        os.kill(os.getpid(), signal.SIGTERM)
if jax.process_index() == 0:
    if not {inside}:
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(2)  # the main process writes its report; the other one has nothing to do
"""


@pytest.mark.parametrize("inside", [True, False])
def test_a_signal_after_the_last_step_does_not_leave_processes_waiting_for_each_other(inside):
    script = LATE_SIGNAL.format(inside=inside)
    done = subprocess.run([sys.executable, *JOB, "--", sys.executable, "-c", script], cwd=ROOT, env=environment(), text=True,
                          timeout=600, capture_output=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
