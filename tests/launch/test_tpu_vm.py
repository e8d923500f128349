"""TPU VMs by queued resources, on hosts that are folders, in which a fake gcloud runs the scripts."""

import os
import pathlib
import signal
import subprocess
import time

import pytest

from launch import common, tpu_vm
from tests.launch.conftest import check_shell

OPTIONS = (
    "--name=run1",
    "--zone=us-east5-a",
    "--accelerator_type=v5p-16",
    "--poll_seconds=0.02",
    "--grace_seconds=3",
)


def job(fakes, script: str) -> list[str]:
    """A command that runs the script on each host; $SHARED outlasts the hosts, as a bucket does."""
    file = fakes.root / "job.sh"
    shared = fakes.root / "shared"
    shared.mkdir(exist_ok=True)
    file.write_text(f'SHARED={shared} FAKE_ROOT={fakes.root}\nhost=$(basename "$HOME")\n{script}')
    return ["--", "bash", str(file)]


COUNT = """
steps=$SHARED/$host.steps
touch $steps
for step in 1 2 3 4 5 6; do
    [ $step -gt $(wc -l < $steps) ] || continue
    echo step $step | tee -a $steps
    case $host$step in host02|host04)
        if [ ! -f $SHARED/at$step ]; then touch $SHARED/at$step $FAKE_ROOT/preempt; exit 42; fi ;;
    esac
done
"""


def test_the_machines_are_asked_for_installed_run_to_the_end_and_deleted(fakes):
    fakes.plan(states=[["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]])
    done = fakes.run("tpu_vm", *OPTIONS, *job(fakes, "echo I am $host with $A; [ -f constraints.txt ]"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "run1: ABSENT",
        "run1: WAITING_FOR_RESOURCES",
        "run1: PROVISIONING",
        "run1: ACTIVE",
        "I am host0 with",
        "run1: ended with exit code 0.",
    ]
    assert fakes.verbs() == ["create", "scp", "ssh", "ssh", "ssh", "ssh", "delete"]
    creation = next(call["arguments"] for call in fakes.calls() if call["arguments"][3] == "create")
    assert creation[4:] == [
        "run1",
        "--zone=us-east5-a",
        "--quiet",
        "--accelerator-type=v5p-16",
        "--runtime-version=v2-alpha-tpuv5",
        "--node-id=run1",
    ]


def test_variables_slices_and_other_options_reach_gcloud_and_the_command(fakes):
    fakes.plan()
    more = (
        "--env=A=b c",
        "--setup=echo mounted > set-up",
        "--num_slices=2",
        "--spot",
        "--project=p",
        "--create=--reserved",
        "--keep",
    )
    done = fakes.run("tpu_vm", *OPTIONS, *more, *job(fakes, 'echo "with $A, $(cat set-up)"'))
    assert "with b c, mounted" in done.stdout.splitlines()
    creation = next(call["arguments"] for call in fakes.calls() if call["arguments"][3] == "create")
    assert {"--node-count=2", "--spot", "--project=p", "--reserved"} < set(creation)
    assert "--node-id=run1" not in creation
    assert "delete" not in fakes.verbs()


def test_a_run_preempted_twice_asks_for_machines_again_and_ends_where_one_without_would(fakes):
    fakes.plan(create=["", "", "RESOURCE_EXHAUSTED: Quota limit 'TPUV5PPerProject' has been exceeded."])
    done = fakes.run("tpu_vm", *OPTIONS, "--spot", "--max_restarts=0", *job(fakes, COUNT))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for host in ("host0", "host1"):
        assert (fakes.root / "shared" / f"{host}.steps").read_text().split()[1::2] == list("123456")
    assert fakes.verbs().count("create") == 4
    assert fakes.verbs().count("delete") == 3
    assert any("not asked for again yet: ERROR: RESOURCE_EXHAUSTED" in line for line in lines)


@pytest.mark.parametrize("how", ["lost", "cut after 2"])
def test_a_lost_connection_neither_ends_the_command_nor_repeats_a_line(fakes, how):
    fakes.plan(ssh=["", "", how, "lost", ""])  # install, start, follow, follow, follow
    script = "for i in 1 2 3 4 5; do echo line $i; sleep 0.05; done; echo once >> $SHARED/$host"
    done = fakes.run("tpu_vm", *OPTIONS, *job(fakes, script))
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith("line")] == [f"line {i}" for i in range(1, 6)]
    assert (fakes.root / "shared" / "host0").read_text() == "once\n"
    assert fakes.verbs().count("create") == 1


def test_a_lost_host_starts_all_of_them_again_on_the_same_machines(fakes):
    fakes.plan()
    script = """
    if [ $host = host1 ] && [ ! -f $SHARED/died ]; then touch $SHARED/died; kill -KILL $$; fi
    if [ $host = host0 ] && [ ! -f $SHARED/aborted ]; then touch $SHARED/aborted; exit 134; fi
    echo $host again
    """
    done = fakes.run("tpu_vm", *OPTIONS, *job(fakes, script))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "run1: exit code 137; the command starts again." in done.stdout
    assert "host0 again" in done.stdout.splitlines()
    assert fakes.verbs().count("create") == 1


def test_a_preempted_run_starts_again_on_machines_that_are_still_there_and_counts_as_no_restart(fakes):
    fakes.plan()
    script = "echo start >> $SHARED/$host; [ $(wc -l < $SHARED/$host) = 3 ] || exit 42"
    done = fakes.run("tpu_vm", *OPTIONS, "--max_restarts=0", *job(fakes, script))
    assert done.returncode == 0, done.stdout + done.stderr
    assert (fakes.root / "shared" / "host0").read_text() == "start\n" * 3
    assert fakes.verbs().count("create") == 1


def test_a_hanging_host_is_killed_where_the_others_have_ended(fakes):
    fakes.plan()
    script = """
    if [ ! -f $SHARED/$host.pid ]; then
        echo $$ > $SHARED/$host.pid
        [ $host = host0 ] || exec sleep 1000
        while [ ! -f $SHARED/host1.pid ]; do sleep 0.01; done
        exit 134
    fi
    echo $host again; touch $SHARED/$host.again
    """
    options = [option for option in OPTIONS if "grace" not in option]
    done = fakes.run("tpu_vm", *options, "--grace_seconds=1", *job(fakes, script))
    assert done.returncode == 0, done.stdout + done.stderr
    assert (fakes.root / "shared" / "host1.again").exists()
    with pytest.raises(ProcessLookupError):
        os.kill(int((fakes.root / "shared" / "host1.pid").read_text()), 0)


def test_a_host_that_shuts_down_leaves_the_exit_code_of_the_process_that_saved(tmp_path):
    options, _ = tpu_vm.parse([*OPTIONS, "--", "true"])
    (tmp_path / "run1").mkdir()
    saves = "trap 'echo saved; exit 42' TERM; echo ready; while :; do sleep 0.01; done"
    _, start = tpu_vm.scripts(options, saves)
    subprocess.run(["bash", "-c", start], cwd=tmp_path, check=True)
    folder = tmp_path / "run1"
    wait_for(folder / "job.log", "ready\n")
    os.killpg(int((folder / "job.pid").read_text()), signal.SIGTERM)
    wait_for(folder / "job.exit", "42\n")
    assert (folder / "job.log").read_text().endswith("saved\n")


def wait_for(file: pathlib.Path, text: str) -> None:
    deadline = time.monotonic() + 100
    while not file.exists() or file.read_text() != text:
        assert time.monotonic() < deadline, file
        time.sleep(0.01)


@pytest.mark.parametrize("code", [1, 2, 130])
def test_an_error_that_no_start_mends_ends_with_its_code_and_each_hosts_last_words(fakes, code):
    fakes.plan()
    done = fakes.run("tpu_vm", *OPTIONS, *job(fakes, f"echo words of $host; exit {code}"))
    assert done.returncode == code
    assert [line.partition(": ")[2] for line in done.stdout.splitlines() if ": words" in line] == [
        "words of host0",
        "words of host1",
    ]
    assert fakes.verbs()[-1] == "delete"


def test_what_never_ends_well_is_started_max_restarts_times(fakes):
    fakes.plan()
    done = fakes.run("tpu_vm", *OPTIONS, "--max_restarts=2", *job(fakes, "echo start >> $SHARED/$host; exit 139"))
    assert done.returncode == 139
    assert (fakes.root / "shared" / "host0").read_text() == "start\n" * 3


@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        (
            {"create": ["RESOURCE_EXHAUSTED: Quota limit exceeded."]},
            "RESOURCE_EXHAUSTED: Quota limit exceeded.",
        ),
        (
            {"describe": ["PERMISSION_DENIED: no access to the project."]},
            "PERMISSION_DENIED: no access to the project.",
        ),
        ({"states": [["FAILED"]]}, "no such network"),
    ],
)
def test_what_gcloud_refuses_is_one_sentence_and_leaves_nothing_behind(fakes, plan, expected):
    fakes.plan(**plan)
    done = fakes.run("tpu_vm", *OPTIONS, *job(fakes, "true"))
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert expected in done.stderr
    assert not (fakes.root / "states.json").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 42)])
def test_a_signal_ends_the_launcher_alone_and_the_same_line_watches_again(fakes, number, code):
    fakes.plan()
    command = job(fakes, "echo begun; while [ ! -f $SHARED/go ]; do sleep 0.01; done; wc -c < constraints.txt")
    first = fakes.start("tpu_vm", *OPTIONS, *command)
    assert first.stdout is not None
    while first.stdout.readline() != "begun\n":
        assert first.poll() is None
    first.send_signal(number)
    _, err = first.communicate(timeout=300)
    assert first.returncode == code
    assert "the job goes on" in err

    (fakes.root / "project" / "constraints.txt").write_text("new")  # not under a command that runs
    other = fakes.run("tpu_vm", *OPTIONS, "--env=A=b", *command)
    assert other.returncode == 2
    assert "another command runs as run1" in other.stderr
    (fakes.root / "shared" / "go").touch()
    second = fakes.run("tpu_vm", *OPTIONS, *command)
    assert second.returncode == 0, second.stderr
    assert second.stdout.splitlines()[1:3] == ["begun", "0"]
    assert fakes.verbs().count("create") == 1


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ([0, 0], 0),
        ([42, 42], 42),
        ([134, 2], 2),
        ([134, 137], 137),
        ([1, 42], 42),
        ([134, 134], 134),
        ([0, 1], 1),
    ],
)
def test_the_hosts_exit_codes_are_one(found, expected):
    assert tpu_vm.verdict(found) == expected


def test_an_unknown_accelerator_needs_its_image(fakes):
    done = fakes.run("tpu_vm", "--name=r", "--zone=z", "--accelerator_type=v9-8", "--", "true")
    assert done.returncode == 2
    assert "v5p-N" in done.stderr
    assert "--runtime_version" in done.stderr


def test_a_dry_run_prints_every_line_and_calls_nothing(fakes):
    done = fakes.run("tpu_vm", *OPTIONS, "--dry_run", "--", "python", "-m", "experiments.pretrain")
    assert done.returncode == 0
    assert fakes.calls() == []
    for verb in ("create", "describe", "scp", "ssh", "delete"):
        assert f"queued-resources {verb} " in done.stdout
    assert "exec python -m experiments.pretrain" in done.stdout


def test_the_hosts_scripts_pass_shellcheck():
    options, _ = tpu_vm.parse([*OPTIONS, "--", "true"])
    line = common.shell(["true"], [("A", "b c")])
    for script in (
        *tpu_vm.scripts(options, line),
        tpu_vm.follow(options, 3),
        tpu_vm.codes(options),
    ):
        check_shell(script)
    check_shell(tpu_vm.FORGET.format(name="run1"))
