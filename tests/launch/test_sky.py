"""SkyPilot: a task file and the line that submits it."""

import subprocess

import pytest
import yaml

from tests.launch.conftest import check_shell
from tests.launch.shapes import SKY_TASK, differences

COMMAND = ("--", "python", "-m", "experiments.pretrain", "--workdir=/data/run 1")


def submitted(fakes, *options: str) -> dict:
    fakes.plan()
    done = fakes.run("sky", "--name=run1", *options, *COMMAND)
    assert done.returncode == 0, done.stderr
    (call,) = fakes.calls()
    assert (call["tool"], call["arguments"][:2]) == ("sky", ["jobs", "launch"])
    assert {"--yes", "--detach-run"} < set(call["arguments"])
    (text,) = call["files"].values()
    task = yaml.safe_load(text)
    assert differences(task, SKY_TASK) == []
    return task


def test_a_task_of_the_published_shape_recovers_what_a_new_start_may_mend(fakes):
    task = submitted(
        fakes,
        "--accelerators=H100:8",
        "--num_nodes=2",
        "--spot",
        "--infra=gcp/us-central1",
        "--env=A=b c",
        "--mount=gs://bucket:/data",
    )
    recovery = task["resources"].pop("job_recovery")
    assert task["resources"] == {
        "accelerators": "H100:8",
        "use_spot": True,
        "infra": "gcp/us-central1",
    }
    assert recovery["max_restarts_on_errors"] == 0
    assert 42 in recovery["recover_on_exit_codes"]
    assert not {1, 2, 130, 137} & set(recovery["recover_on_exit_codes"]), "SkyPilot warns of 137, which it uses itself"
    assert task["file_mounts"] == {"/data": {"source": "gs://bucket", "mode": "MOUNT"}}
    assert (task["num_nodes"], task["envs"]) == (2, {"A": "b c"})
    check_shell(task["setup"])


def test_the_nodes_of_gpus_are_told_their_coordinator_and_those_of_a_tpu_are_not(fakes):
    task = submitted(fakes, "--accelerators=H100:8", "--num_nodes=2")
    script = task["run"].replace(
        "exec python -m experiments.pretrain",
        'exec printf \'%s\\n\' "$JAX_COORDINATOR_ADDRESS" "$JAX_NUM_PROCESSES" "$JAX_PROCESS_ID"',
    )
    node = {
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NODE_RANK": "1",
    }
    done = subprocess.run(
        ["bash", "-c", script],
        env=fakes.environment | node,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == ["10.0.0.1:8476", "2", "1", "--workdir=/data/run 1"]
    check_shell(task["run"])


@pytest.mark.parametrize("options", [["--accelerators=tpu-v6e-16", "--num_nodes=1"], ["--accelerators=H100:8"]])
def test_one_machine_or_a_tpu_is_left_to_jax(fakes, options):
    task = submitted(fakes, *options)
    assert "JAX_" not in task["run"]
    assert (".[tpu]" in task["setup"]) == options[0].startswith("--accelerators=tpu")


def test_a_refused_task_is_exit_code_2_and_a_dry_run_calls_nothing(fakes):
    fakes.plan(sky=["ValueError: no such accelerator"])
    done = fakes.run("sky", "--name=run1", "--accelerators=H1000:8", "--dry_run", *COMMAND)
    assert (done.returncode, fakes.calls()) == (0, [])
    assert differences(yaml.safe_load(done.stdout), SKY_TASK) == []
    refused = fakes.run("sky", "--name=run1", "--accelerators=H1000:8", *COMMAND)
    assert refused.returncode == 2
    assert "no such accelerator" in refused.stderr
