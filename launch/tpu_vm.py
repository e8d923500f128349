r"""A job on TPU VMs by queued resources: asked for, installed, run on every host and watched.

    python -m launch.tpu_vm --name=run1 --zone=us-east5-a --accelerator_type=v5p-128 \
        [--num_slices=2] [--spot] [--dry_run] -- python -m experiments.pretrain ...

The command goes on without this launcher: after Ctrl-C or a lost connection the same line watches
it again. A request that was suspended (a spot machine taken away) is deleted and made again, and
the command starts again; so it does after exit code 42 or a killed process. At the end the request
is deleted, unless --keep. Where a cluster is at hand, launch.gke is the better way: Google calls
this interface legacy.
"""

import argparse
import json
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import tarfile
import tempfile
import time

from launch import common

RUNTIMES = {
    "v4": "tpu-ubuntu2204-base",
    "v5p": "v2-alpha-tpuv5",
    "v5litepod": "v2-alpha-tpuv5-lite",
    "v6e": "v2-alpha-tpuv6e",
}

# Scripts for the hosts. What is installed is not touched until a job of that name was forgotten.
INSTALL = """set -e
mkdir -p {name} && cd {name}
[ ! -f job.pid ] || exit 0
tar -xzf ../{name}.tar.gz
apt="sudo apt-get -o DPkg::Lock::Timeout=600 -qq"  # a new machine updates itself first
[ -x .venv/bin/pip ] || python3.11 -m venv --clear .venv 2> /dev/null ||
    {{ $apt update && $apt install -y python3.11-venv && python3.11 -m venv --clear .venv; }}
.venv/bin/pip install --quiet --editable '.[tpu]' --constraint constraints.txt
{setup}
"""
# Does nothing where the command runs or has ended.
START = """cd {name} || exit 1
printf '%s\\n' {line} > job.new
if [ -f job.pid ]; then
    cmp -s job.new job.sh || echo {other}
    exit 0
fi
mv job.new job.sh
rm -f job.exit
# This shell outlives a SIGTERM to all, so that the exit code of the process that saves is written.
setsid nohup bash -c 'trap : TERM; bash job.sh; echo $? > job.exit' > job.log 2>&1 < /dev/null &
echo $! > job.pid
"""
FOLLOW = 'cd {name} && tail --pid="$(cat job.pid)" --lines=+{line} --sleep-interval={interval} --follow=name job.log'
# Each host's exit code; a killed one's, where it still runs long after the first host's has ended.
CODES = """cd {name} || exit 1
for _ in $(seq {seconds}); do [ -f job.exit ] && break; sleep 1; done
code=137
[ ! -f job.exit ] || code=$(cat job.exit)
case $code in 0|42) ;; *) tail --lines=30 job.log | sed "s/^/$(hostname): /" ;; esac
echo "{code} $code"
"""
FORGET = 'cd {name} && {{ kill -KILL -- "-$(cat job.pid)" 2> /dev/null; rm -f job.pid job.exit; }}'
OTHER, CODE = "launch.tpu_vm: another command", "launch.tpu_vm: exit code"


def main(arguments: list[str]) -> int:
    """Run the job; returns its exit code, or 130 or 42 where a signal ends the watching."""
    options, command = parse(arguments)
    line = f'export PATH="$PWD/.venv/bin:$PATH"; exec {common.shell(command, options.env)}'
    if options.dry_run:
        print_plan(options, line)
        return 0
    heard: list[int] = []

    def stop(number: int, _: object) -> None:
        heard.append(number)
        raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    try:
        return run_until_done(options, line)
    except KeyboardInterrupt:
        print(
            f"This launcher ends, the job goes on; the same line watches it again, and it ends by "
            f"`{shlex.join(on_request(options, 'delete', '--force'))}`.",
            file=sys.stderr,
        )
        return common.PREEMPTED if signal.SIGTERM in heard else common.INTERRUPTED


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options, and the command after --."""
    parser = common.Parser("tpu_vm", __doc__)
    common.add_job_options(parser)
    common.add_restarts(parser)
    parser.add_argument("--zone", required=True, help="e.g. us-east5-a")
    parser.add_argument("--project", help="empty: gcloud's own")
    parser.add_argument("--accelerator_type", required=True, help="as gcloud names it, e.g. v5p-128 or v6e-256")
    parser.add_argument("--runtime_version", help="of the machines' image; empty: the one for the accelerator")
    common.add_num_slices(parser)
    parser.add_argument("--spot", action="store_true", help="cheaper machines that may be taken away")
    parser.add_argument(
        "--create",
        action="append",
        default=[],
        metavar="OPTION",
        help="any other option of the request, e.g. --create=--reserved; may be repeated",
    )
    parser.add_argument("--setup", default="", help="a line for every host's shell, once the project is there")
    parser.add_argument("--keep", action="store_true", help="keep, and pay for, the machines at the end")
    parser.add_argument("--poll_seconds", type=float, default=30.0, help="between looks at the request")
    parser.add_argument(
        "--grace_seconds",
        type=common.at_least(0),
        default=120,
        help="for other hosts, once the first one has ended",
    )
    options, command = parser.parse(arguments)
    kind = options.accelerator_type.rpartition("-")[0]
    options.runtime_version = options.runtime_version or RUNTIMES.get(kind)
    if not options.runtime_version:
        parser.error(
            f"--accelerator_type={options.accelerator_type} is none of {', '.join(f'{k}-N' for k in RUNTIMES)}; it "
            "needs --runtime_version."
        )
    return options, command


def on_request(options, verb: str, *rest: str) -> list[str]:
    """A line of gcloud about the job's queued resource."""
    project = [f"--project={options.project}"] if options.project else []
    words = [
        "gcloud",
        "compute",
        "tpus",
        "queued-resources",
        verb,
        options.name,
        f"--zone={options.zone}",
    ]
    return [*words, *project, "--quiet", *rest]


def creation(options) -> list[str]:
    """The line that asks for the machines."""
    nodes = f"--node-count={options.num_slices}" if options.num_slices > 1 else f"--node-id={options.name}"
    words = [
        f"--accelerator-type={options.accelerator_type}",
        f"--runtime-version={options.runtime_version}",
        nodes,
    ]
    return on_request(options, "create", *words, *(["--spot"] if options.spot else []), *options.create)


def ssh(options, script: str, everywhere: bool = True) -> list[str]:
    """The line that runs a script on every host, or on the first one, whose process prints."""
    return on_request(
        options,
        "ssh",
        *(["--worker=all", "--node=all"] if everywhere else []),
        f"--command={script}",
    )


def copying(options, archive: str) -> list[str]:
    """The line that copies the project to every host."""
    words = on_request(options, "scp", "--worker=all", "--node=all")
    at = words.index(options.name)
    return [*words[:at], archive, f"{options.name}:{options.name}.tar.gz", *words[at + 1 :]]


def scripts(options, line: str) -> tuple[str, str]:
    """The scripts that install the project and start its command."""
    start = START.format(name=options.name, line=shlex.quote(line), other=shlex.quote(OTHER))
    return INSTALL.format(name=options.name, setup=options.setup), start


def follow(options, seen: int) -> str:
    """The script that prints the log after its first `seen` lines until the command has ended."""
    return FOLLOW.format(name=options.name, line=seen + 1, interval=min(1.0, options.poll_seconds))


def print_plan(options, line: str) -> None:
    """Print everything that would be run, in its order."""
    install, start = scripts(options, line)
    plan = {
        "Until it is ACTIVE; after SUSPENDED it is deleted and made again:": [
            creation(options),
            on_request(options, "describe"),
        ],
        "Then:": [
            copying(options, f"{options.name}.tar.gz"),
            ssh(options, install),
            ssh(options, start),
        ],
        "Until the command has ended:": [ssh(options, follow(options, 0), everywhere=False)],
        "Then, to start again or to end with:": [ssh(options, codes(options))],
        "At the end:": [] if options.keep else [on_request(options, "delete", "--force")],
    }
    for title, lines in plan.items():
        print(f"# {title}", *map(shlex.join, lines), sep="\n")


def codes(options) -> str:
    """The script that prints a host's exit code."""
    return CODES.format(name=options.name, seconds=options.grace_seconds, code=CODE)


def run_until_done(options, line: str) -> int:
    """Ask for machines, run and watch, as often as it takes; returns the job's exit code."""
    job, seen, restarts = Job(options, line), "", 0
    while True:
        state, why = describe(options)
        if state != seen:
            print(f"{options.name}: {state}", flush=True)
        if not seen and state == "UNKNOWN":
            common.fail(f"gcloud says nothing of {options.name}: {why}")
        if state == "ABSENT":
            job = Job(options, line)
            refused, _, said = ask(creation(options))
            if refused and not seen:
                common.fail(f"the machines were not asked for, as gcloud says: {said}")
            if refused:
                print(f"{options.name}: not asked for again yet: {said}", flush=True)
        elif state in ("SUSPENDED", "FAILED"):
            ask(on_request(options, "delete", "--force"))
            if state == "FAILED":
                common.fail(f"the request failed and was deleted: {why or 'gcloud gives no reason'}")
        elif state == "ACTIVE":
            code = job.attend()
            if code is not None:
                restarts += code not in (*common.FINAL, common.PREEMPTED)
                if code in common.FINAL or restarts > options.max_restarts:
                    return finish(options, code)
                print(f"{options.name}: exit code {code}; the command starts again.", flush=True)
                job.forget()
        seen = state
        time.sleep(options.poll_seconds)


class Job:
    """The command on the machines of one request."""

    def __init__(self, options, line: str):
        self._options, self._line = options, line
        self._is_started = False
        self._lines = 0  # of the log that are printed

    def attend(self) -> int | None:
        """Start it if need be, and print its log; returns its exit code, None where ssh is lost."""
        if not self._is_started:
            self._is_started = self._start()
        if not self._is_started or not self._follow():
            return None
        code, out, _ = ask(ssh(self._options, codes(self._options)))
        found = [int(word) for word in re.findall(rf"^{CODE} (\d+)$", out, re.MULTILINE)]
        if code or not found:
            return None
        for line in out.splitlines():
            if not line.startswith(CODE):
                print(line, flush=True)
        return verdict(found)

    def forget(self) -> None:
        """Kill what is left of it, so that it can be started again."""
        ask(ssh(self._options, FORGET.format(name=self._options.name)))
        self._is_started, self._lines = False, 0

    def _start(self) -> bool:
        install, start = scripts(self._options, self._line)
        with tempfile.TemporaryDirectory() as folder:
            archive = f"{folder}/{self._options.name}.tar.gz"
            pack(archive)
            for words in (
                copying(self._options, archive),
                ssh(self._options, install),
                ssh(self._options, start),
            ):
                code, out, said = ask(words)
                if code:
                    print(f"{self._options.name}: {said}", flush=True)
                    return False
        if OTHER in out:
            common.fail(f"another command runs as {self._options.name}; take another --name, or delete that one.")
        return True

    def _follow(self) -> bool:
        words = ssh(self._options, follow(self._options, self._lines), everywhere=False)
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, errors="replace") as process:
            try:
                for line in process.stdout or ():
                    print(line, end="", flush=True)
                    self._lines += 1
                return process.wait() == 0
            finally:
                process.kill()  # where a signal ends the launcher


def verdict(found: list[int]) -> int:
    """The job's exit code from its hosts': a lost or preempted one outranks those that failed then.

    134 says least: jax aborts a process whose peers are gone, whatever ended them.
    """
    lost = [code for code in found if code not in (*common.FINAL, 134)]
    return next(
        iter(
            [
                *lost,
                *(code for code in found if code in common.FINAL and code),
                *(c for c in found if c),
            ]
        ),
        0,
    )


def finish(options, code: int) -> int:
    """Delete the machines unless they are kept; returns the code."""
    if not options.keep:
        words = on_request(options, "delete", "--force")
        if ask(words)[0]:
            print(f"error: the machines are still there; run `{shlex.join(words)}`.", file=sys.stderr)
    print(f"{options.name}: ended with exit code {code}.", flush=True)
    return code


def describe(options) -> tuple[str, str]:
    """The request's state, ABSENT or UNKNOWN among them, and what gcloud says of it."""
    code, out, said = ask(on_request(options, "describe", "--format=json"))
    if code:
        return ("ABSENT" if "NOT_FOUND" in said else "UNKNOWN"), said
    state = json.loads(out).get("state", {})
    return state.get("state", "UNKNOWN"), state.get("failedData", {}).get("error", {}).get("message", "")


def ask(words: list[str]) -> tuple[int, str, str]:
    """A tool's exit code, its output, and the sentence that says what went wrong."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, errors="replace", check=False)
    except FileNotFoundError:
        common.missing(words[0])
    lines = done.stderr.strip().splitlines()
    return (
        done.returncode,
        done.stdout,
        next((line for line in lines if line.startswith("ERROR:")), "".join(lines[-1:])),
    )


def pack(archive: str) -> None:
    """Write the project's files, those that git does not ignore, to a tar.gz."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(listed, capture_output=True, text=True, check=False)
    if done.returncode:
        common.fail("this folder is no git repository; run the launcher in the project's.")
    with tarfile.open(archive, "w:gz") as tar:
        for name in done.stdout.split("\0"):
            if name and pathlib.Path(name).exists():
                tar.add(name, recursive=False)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
