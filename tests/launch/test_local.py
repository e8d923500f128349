"""The local launcher, with commands that need no jax."""

import signal
import subprocess
import sys

import pytest

SHOW = "import os; print('I am', os.environ['JAX_PROCESS_ID'], 'of', os.environ['JAX_NUM_PROCESSES'])"


def launch(*arguments: str, code: str | None = None) -> subprocess.CompletedProcess:
    command = ["--", sys.executable, "-c", code] if code else []
    return subprocess.run(
        [sys.executable, "-m", "launch.local", *arguments, *command],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def test_every_process_knows_its_number_and_prints_behind_it():
    done = launch("--num_processes=3", code=SHOW)
    assert done.returncode == 0
    assert sorted(done.stdout.splitlines()) == [f"[{i}] I am {i} of 3" for i in range(3)]


def test_all_share_one_coordinator_and_the_simulated_devices():
    done = launch("--devices_per_process=4", "--dry_run", code=SHOW)
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert len({line.split()[0] for line in lines}) == 1
    assert lines[0].startswith("JAX_COORDINATOR_ADDRESS=127.0.0.1:")
    assert all("--xla_force_host_platform_device_count=4" in line for line in lines)


@pytest.mark.parametrize(
    ("end", "code", "how"),
    [("os._exit(7)", 7, "ended with exit code 7"), ("os.kill(os.getpid(), 9)", 137, "was ended by SIGKILL")],
)
def test_the_first_bad_end_ends_the_job_and_is_named(end, code, how):
    script = f"import os, time\nif os.environ['JAX_PROCESS_ID'] == '1': {end}\ntime.sleep(1)"
    done = launch(code=script)
    assert done.returncode == code
    assert f"process 1 of 2 {how} first" in done.stderr


@pytest.mark.parametrize(("number", "code", "expected"), [
    (signal.SIGTERM, 0, 0), (signal.SIGTERM, 42, 42), (signal.SIGINT, 42, 130), (signal.SIGINT, 130, 130)
])  # fmt: skip
def test_a_signal_reaches_every_process_and_their_exit_code_is_the_jobs(number, code, expected):
    script = (
        f"import signal, time, sys\nsignal.signal(15, lambda *_: sys.exit({code}))\nprint('ready')\n"
        "while True: time.sleep(0.01)"  # one long sleep would not end for a signal that comes just before it
    )
    job = subprocess.Popen(
        [sys.executable, "-m", "launch.local", "--", sys.executable, "-c", script], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert job.stdout is not None
    assert {job.stdout.readline(), job.stdout.readline()} == {"[0] ready\n", "[1] ready\n"}
    job.send_signal(number)
    try:
        _, err = job.communicate(timeout=300)
    finally:
        job.kill()
    assert job.returncode == expected
    assert err == "", "a job that has saved is no failure"


@pytest.mark.parametrize(
    ("ends", "restarts", "expected", "starts"),
    [
        (["42", "kill", "0"], 5, 0, 3),
        (["kill", "kill", "kill"], 1, 137, 2),
        (["134", "2"], 5, 2, 2),
        (["1"], 5, 1, 1),
        (["42"], 0, 42, 1),
    ],
)
def test_a_job_starts_again_as_often_as_it_may_and_only_where_that_may_mend_it(
    tmp_path, ends, restarts, expected, starts
):
    script = (
        "import os, pathlib, sys\n"
        "if os.environ['JAX_PROCESS_ID'] == '1': sys.exit(0)\n"
        f"count = pathlib.Path({str(tmp_path / 'count')!r})\n"
        "start = len(count.read_text()) if count.exists() else 0\n"
        "count.write_text('x' * (start + 1))\n"
        f"end = {ends}[start]\n"
        "os.kill(os.getpid(), 9) if end == 'kill' else sys.exit(int(end))"
    )
    done = launch(f"--max_restarts={restarts}", code=script)
    assert done.returncode == expected, done.stderr
    assert (tmp_path / "count").read_text() == "x" * starts
    assert done.stderr.count("starts again") == starts - 1


@pytest.mark.parametrize("arguments", [[], ["--num_processes=0", "--", "true"], ["--processes=2", "--", "true"]])
def test_a_mistake_is_exit_code_2(arguments):
    done = launch(*arguments)
    assert done.returncode == 2
    assert "error: " in done.stderr
