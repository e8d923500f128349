"""SLURM: the batch script, which is queued again as long as a new start may mend something."""

import os
import subprocess

import pytest

from tests.launch.conftest import check_shell

COMMAND = ("--", "python", "-m", "experiments.pretrain", "--workdir=/data/run 1")


def script(fakes, *options: str) -> str:
    fakes.plan()
    done = fakes.run("slurm", "--name=run1", *options, *COMMAND)
    assert done.returncode == 0, done.stderr
    (call,) = fakes.calls()
    assert (call["tool"], call["arguments"]) == ("sbatch", [])
    return call["input"]


def starts(fakes, text: str, codes: list[int]) -> list[int]:
    """Exit codes of the script's starts, each asked for by the one before; codes: those of srun."""
    for name, does in {
        "srun": 'read -r code < codes; sed -i 1d codes; printf "%s\\n" "$@" > srun.said; exit "$code"',
        "scontrol": 'echo "$@" >> scontrol.said',
    }.items():
        (fakes.root / "bin" / name).write_text(f"#!/bin/bash\ncd {fakes.root} && {does}\n")
        (fakes.root / "bin" / name).chmod(0o755)
    (fakes.root / "codes").write_text("".join(f"{code}\n" for code in codes))
    found, asked = [], fakes.root / "scontrol.said"
    while not found or (asked.exists() and len(asked.read_text().splitlines()) == len(found)):
        job = {"SLURM_JOB_ID": "7"} | ({"SLURM_RESTART_COUNT": str(len(found))} if found else {})
        done = subprocess.run(
            ["bash", "-c", text],
            env=fakes.environment | job,
            capture_output=True,
            text=True,
            check=False,
        )
        found.append(done.returncode)
    if asked.exists():
        assert set(asked.read_text().splitlines()) == {"requeue 7"}
    return found


def test_one_process_per_gpu_an_early_sigterm_and_a_requeue(fakes):
    text = script(
        fakes,
        "--nodes=4",
        "--time=24:00:00",
        "--grace_seconds=90",
        "--sbatch=--partition=gpu",
        "--env=A=b c",
    )
    lines = text.splitlines()
    assert lines[0] == "#!/bin/bash"
    assert [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH")] == [
        "--job-name=run1",
        "--output=run1-%j.log",
        "--open-mode=append",
        "--nodes=4",
        "--ntasks-per-node=8",
        "--gpus-per-node=8",
        "--time=24:00:00",
        "--requeue",
        "--signal=TERM@90",
        "--partition=gpu",
    ]
    assert "export A='b c'" in lines
    check_shell(text)


def test_without_gpus_there_is_one_process_per_node(fakes):
    text = script(fakes, "--nodes=2", "--gpus_per_node=0")
    assert "--ntasks-per-node=1" in text
    assert "gpus" not in text


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ([0], [0]),
        ([42, 42, 0], [42, 42, 0]),
        ([137, 134, 0], [137, 134, 0]),
        ([1], [1]),
        ([42, 2], [42, 2]),
        ([130], [130]),
        ([127], [127]),
        ([139] * 9, [139] * 4),
        ([42] * 6 + [0], [42] * 6 + [0]),
    ],
)
def test_a_start_follows_exactly_where_it_may_mend_something(fakes, codes, expected):
    assert starts(fakes, script(fakes, "--max_restarts=3"), codes) == expected
    assert (fakes.root / "srun.said").read_text().splitlines()[-1] == "--workdir=/data/run 1"


def test_the_script_waits_for_its_tasks_where_it_gets_their_sigterm(fakes):
    text = script(fakes).replace("srun --kill-on-bad-exit=0", 'kill -TERM $$; sh -c "sleep 0.1; exit 42" #')
    (fakes.root / "bin" / "scontrol").write_text("#!/bin/sh\n")
    os.chmod(fakes.root / "bin" / "scontrol", 0o755)
    done = subprocess.run(["bash", "-c", text], env=fakes.environment | {"SLURM_JOB_ID": "7"}, check=False)
    assert done.returncode == 42


def test_a_refused_job_is_exit_code_2_and_a_dry_run_calls_nothing(fakes):
    fakes.plan(sbatch=["sbatch: error: Invalid partition"])
    done = fakes.run("slurm", "--name=run1", "--dry_run", *COMMAND)
    assert (done.returncode, fakes.calls()) == (0, [])
    check_shell(done.stdout)
    refused = fakes.run("slurm", "--name=run1", *COMMAND)
    assert refused.returncode == 2
    assert "Invalid partition" in refused.stderr


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--name=Run_1"], "'run-1'"),
        (["--name=r", "--nodes=0"], "at least 1"),
        (["--name=r", "--gpu_per_node=8"], "--gpus_per_node"),
        ([], "--name"),
    ],
)
def test_a_mistake_is_one_sentence_and_submits_nothing(fakes, options, expected):
    done = fakes.run("slurm", *options, *COMMAND)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert expected in done.stderr
    assert fakes.calls() == []
