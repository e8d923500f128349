"""A command that a signal stops says so in one sentence, with an exit code of its own, wherever it was."""

import signal
import subprocess
import sys

import pytest

from experiments.shared import signals
from experiments.shared.stages import wait
from jaxgpt.runs.workdir import Stopped
from tests.experiments.conftest import ROOT, environment

SLEEP = "while True: time.sleep(0.01)"  # Python would hear a signal that comes just before one long sleep only after it
CASES = [(signal.SIGTERM, 42, "Preempted"), (signal.SIGINT, 130, "Interrupted")]


@pytest.fixture(autouse=True)
def handlers():
    """This process's handlers, put back afterwards."""
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def stopped(arguments: list[str], number: int) -> subprocess.CompletedProcess:
    """A process that gets a signal once it has written a line."""
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    try:
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


@pytest.mark.parametrize(("number", "code", "word"), CASES)
def test_while_modules_are_imported(number, code, word):
    script = "import sys, time; sys.argv = ['-m']; import experiments; print('ready', flush=True)\n" + SLEEP
    done = stopped(["-c", script], number)
    assert done.returncode == code
    assert done.stderr == f"{word}; the same command starts again, or goes on where it was.\n"


@pytest.mark.parametrize(("number", "code", "word", "flags"), [
    (*CASES[0], []), (*CASES[1], []), (signal.SIGTERM, 7, "Preempted", ["--preempted_exit_code=7"]),
])  # fmt: skip
def test_while_a_command_starts(tmp_path, number, code, word, flags):
    config = tmp_path / "slow.py"
    config.write_text(f"import time\n\ndef get_config():\n    print('ready', flush=True)\n    {SLEEP}\n")
    command = ["-m", "experiments.tokenizer", f"--config={config}", f"--workdir={tmp_path}/run", *flags]
    done = stopped(command, number)
    assert done.returncode == code, done.stderr
    assert done.stderr == f"{word}; the same command starts again, or goes on where it was.\n"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("number", "code", "word"), CASES)
def test_anywhere_else(number, code, word, capsys):
    with pytest.raises(SystemExit) as ended, signals.one_sentence(lambda: 42):
        signal.raise_signal(number)
    assert ended.value.code == code
    assert capsys.readouterr().err.startswith(f"{word}; ")


@pytest.mark.parametrize(("number", "code", "word"), CASES)
def test_a_run_that_has_saved_says_where(number, code, word, capsys):
    with pytest.raises(SystemExit) as ended, signals.one_sentence(lambda: 42):
        raise Stopped(number, f"{word} at step 3 of 9.")
    assert (ended.value.code, capsys.readouterr().err) == (code, f"{word} at step 3 of 9.\n")


# A stage that signals the process that waits for it, and ends with an exit code when it is asked to.
@pytest.mark.parametrize(("first", "second", "code"), [
    (signal.SIGINT, signal.SIGTERM, 130), (signal.SIGTERM, signal.SIGINT, 42), (signal.SIGTERM, signal.SIGTERM, 42)
])  # fmt: skip
def test_a_second_signal_while_it_ends_changes_nothing(first, second, code, capsys):
    with pytest.raises(SystemExit) as end, signals.one_sentence(lambda: 42):
        signal.raise_signal(first)
    signal.raise_signal(second)  # as the interpreter's own end would get it
    assert end.value.code == code
    assert len(capsys.readouterr().err.splitlines()) == 1


STAGE = (
    """
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: os._exit(int(sys.argv[2])))
os.kill(os.getppid(), int(sys.argv[1]))
"""
    + SLEEP
)


@pytest.mark.parametrize("code", [42, 0])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_waits_for_a_stage_passes_a_signal_on_and_does_not_go_on(number, code):
    child = subprocess.Popen([sys.executable, "-S", "-c", STAGE, str(int(number)), str(code)])
    with pytest.raises(Stopped) as stopped:
        wait(child)
    assert stopped.value.number == number
    assert child.returncode == code


@pytest.mark.parametrize(("code", "number"), [(42, signal.SIGTERM), (130, signal.SIGINT)])
def test_a_stage_that_was_stopped_by_itself_stops_what_waits_for_it(code, number):
    with pytest.raises(Stopped) as stopped:
        wait(subprocess.Popen([sys.executable, "-S", "-c", f"import os; os._exit({code})"]))
    assert stopped.value.number == number
    assert wait(subprocess.Popen([sys.executable, "-S", "-c", "import os; os._exit(3)"])) == 3
