"""A multi-controller job on one machine: several processes that jax.distributed joins, as on many hosts.

    python -m launch.local --num_processes=2 [--devices_per_process=4] [--dry_run] -- python -m experiments.pretrain ...

Each process's lines are printed behind [its number]. When one ends badly the others are ended too, and the last line
says which it was and how; run the same command again to resume, or let --max_restarts=N do so after 42 and where a process
was killed. One that saved after SIGTERM or Ctrl-C ends with its exit code, 42 or 130.
"""

import argparse
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time

from launch import common

GRACE_SECONDS = 15.0  # for survivors to notice, save and end by themselves


def main(arguments: list[str]) -> int:
    """Run the job; returns the exit code of the process that ended it (128 + signal where a signal did)."""
    options, command = parse(arguments)
    if options.dry_run:
        for added in environments(options):
            print(*(f"{name}={shlex.quote(value)}" for name, value in added.items()), shlex.join(command))
        return 0
    processes: list[subprocess.Popen] = []
    heard: list[int] = []

    def pass_on(number: int, _: object) -> None:
        if number in heard and number == signal.SIGINT:
            for process in processes:
                process.kill()
        heard.append(number)
        for process in processes:
            if process.poll() is None:
                process.terminate()  # not SIGINT: a terminal has sent that to all, and a second one would not let them save

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, pass_on)
    for left in reversed(range(options.max_restarts + 1)):
        code, how = run(options, command, processes, heard)
        again = left and code not in common.FINAL and not heard
        if how:
            print(f"error: {how} first; the job {'starts again' if again else 'is over'}.", file=sys.stderr)
        elif again:
            print("The job was preempted; it starts again.", file=sys.stderr)
        if not again:
            break
    return common.INTERRUPTED if code == common.PREEMPTED and signal.SIGINT in heard else code


def run(
    options: argparse.Namespace, command: list[str], processes: list[subprocess.Popen], heard: list[int]
) -> tuple[int, str]:
    """Start the processes, which are put into the list, and wait for all of them.

    heard: signals that the launcher got, also while this runs. Returns the job's exit code and which
    process ended it how, "" where all have finished or saved.
    """
    processes.clear()
    for added in environments(options):
        processes.append(
            subprocess.Popen(
                command, env=os.environ | added, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
        if heard:
            processes[-1].terminate()  # the signal came before there was this one
    printers = [threading.Thread(target=forward, args=(i, p)) for i, p in enumerate(processes)]
    for printer in printers:
        printer.start()
    first = wait(processes)
    for printer in printers:
        printer.join()
    if first is None:
        return 0, ""
    code = processes[first].returncode
    if code in (common.PREEMPTED, common.INTERRUPTED):
        return code, ""
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return 128 - code if code < 0 else code, f"process {first} of {len(processes)} {how}"


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The launcher's options, and the command after --."""
    parser = common.Parser("local", __doc__)
    parser.add_argument("--num_processes", type=common.at_least(1), default=2, help="processes to start")
    parser.add_argument(
        "--devices_per_process", type=int, default=0, help="simulated CPU devices of each; 0: as they are"
    )
    parser.add_argument(
        "--max_restarts", type=common.at_least(0), default=0, help="starts after 42 or a killed process"
    )
    return parser.parse(arguments)


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def environments(options: argparse.Namespace) -> list[dict[str, str]]:
    """What each process finds in its environment; all have one coordinator."""
    port = free_port()
    return [environment(index, port, options) for index in range(options.num_processes)]


def environment(index: int, port: int, options: argparse.Namespace) -> dict[str, str]:
    """What process `index` finds in its environment (see jaxgpt.partition.start_distributed)."""
    added = {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(options.num_processes),
        "JAX_PROCESS_ID": str(index),
        "PYTHONUNBUFFERED": "1",
    }
    if options.devices_per_process:
        others = [f for f in os.environ.get("XLA_FLAGS", "").split() if "host_platform_device_count" not in f]
        count = f"--xla_force_host_platform_device_count={options.devices_per_process}"
        added["XLA_FLAGS"] = " ".join([*others, count])
    return added


def forward(index: int, process: subprocess.Popen) -> None:
    """Print the process's lines as they come."""
    for line in process.stdout or ():
        print(f"[{index}] {line}", end="", flush=True)


def wait(processes: list[subprocess.Popen]) -> int | None:
    """Wait for all; the index of the first that ended badly, after whom the others have GRACE_SECONDS, or None."""
    first, deadline = None, float("inf")
    while any(p.poll() is None for p in processes):
        failed = [i for i, p in enumerate(processes) if p.poll()]
        if failed and first is None:
            first, deadline = failed[0], time.monotonic() + GRACE_SECONDS
        if time.monotonic() > deadline:
            for process in processes:
                process.kill()
        time.sleep(0.05)
    failed = [i for i, p in enumerate(processes) if p.returncode]
    return first if first is not None else next(iter(failed), None)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
