r"""A job on a SLURM cluster: a batch script, one process per GPU, queued again until it is done.

    python -m launch.slurm --name=run1 --nodes=4 --gpus_per_node=8 --time=24:00:00 \
        [--sbatch=--partition=gpu] [--dry_run] -- python -m experiments.pretrain ...

Before its time is up, and when another job takes its place, every process gets a SIGTERM, saves and
ends with 42, and the job is queued again under its number; so is one whose node or process was
lost. The command runs in the folder in which this is typed, which all nodes must see, with the
Python of the PATH here. --dry_run prints the script, for changes by hand.
"""

import shlex
import sys

from launch import common

SCRIPT = """#!/bin/bash
{options}

trap : TERM  # the tasks get it from SLURM, and this shell waits for them
{exports}srun --kill-on-bad-exit=0 {command}
code=$?
case $code in
{final}) exit $code ;;
esac
if [ $code -ne {preempted} ] && [ "${{SLURM_RESTART_COUNT:-0}}" -ge {max_restarts} ]; then
    echo "error: exit code $code after $SLURM_RESTART_COUNT restarts; the job is over." >&2
    exit $code
fi
echo "Exit code $code; the job is queued again."
scontrol requeue "$SLURM_JOB_ID"
exit $code
"""


def main(arguments: list[str]) -> int:
    """Submit the job; returns 0 once sbatch has taken it."""
    parser = common.Parser("slurm", __doc__)
    common.add_job_options(parser)
    common.add_restarts(parser)
    parser.add_argument("--nodes", type=common.at_least(1), default=1, help="machines")
    parser.add_argument(
        "--gpus_per_node",
        type=common.at_least(0),
        default=8,
        help="one process each; 0: one, on the CPU",
    )
    parser.add_argument("--time", help="limit of each start, e.g. 24:00:00; empty: the partition's")
    parser.add_argument(
        "--grace_seconds",
        type=common.at_least(1),
        default=120,
        help="from SIGTERM to the end of the time, to save in",
    )
    parser.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="OPTION",
        help="any other option of sbatch, e.g. --sbatch=--partition=gpu; may be repeated",
    )
    options, command = parser.parse(arguments)
    text = script(options, command)
    if options.dry_run:
        print(text, end="")
        return 0
    code = common.call(["sbatch"], text)
    return common.submitted(
        code,
        "sbatch",
        [
            f"squeue --name={options.name}",
            f"tail -F {options.name}-*.log",
            f"scancel --name={options.name}",
        ],
    )


def script(options, command: list[str]) -> str:
    """The batch script."""
    tasks = max(1, options.gpus_per_node)
    lines = [
        f"--job-name={options.name}",
        f"--output={options.name}-%j.log",
        "--open-mode=append",  # one log over all starts
        f"--nodes={options.nodes}",
        f"--ntasks-per-node={tasks}",
        # Not --gpus-per-task: jax picks the GPU of a task by its number among all of the node's.
        *([f"--gpus-per-node={options.gpus_per_node}"] if options.gpus_per_node else []),
        *([f"--time={options.time}"] if options.time else []),
        "--requeue",
        f"--signal=TERM@{options.grace_seconds}",
        *options.sbatch,
    ]
    return SCRIPT.format(
        options="\n".join(f"#SBATCH {line}" for line in lines),
        exports="".join(f"export {name}={shlex.quote(value)}\n" for name, value in options.env),
        command=shlex.join(command),
        final="|".join(str(code) for code in common.FINAL),
        preempted=common.PREEMPTED,
        max_restarts=options.max_restarts,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
