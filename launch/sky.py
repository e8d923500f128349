r"""A job wherever SkyPilot finds room: GPUs and TPUs of any cloud, spot machines, Kubernetes.

    python -m launch.sky --name=run1 --accelerators=H100:8 [--num_nodes=4] [--spot] \
        [--infra=gcp/us-central1] [--mount=gs://bucket:/data] [--dry_run] \
        -- python -m experiments.pretrain ...

It becomes a managed job: SkyPilot copies this folder, installs it, and after a preemption or a lost
machine finds others and starts the command again. The workdir must outlast the machines: in a
mounted bucket, for one.
"""

import pathlib
import shlex
import sys
import tempfile

from launch import common

PORT = 8476  # of jax's coordinator, on the first node
RESTARTED = [code for code in common.RESTARTED if code != 137]  # SkyPilot keeps that one for itself
# One process per node on GPUs; on a TPU, jax knows its hosts by itself.
HOSTS = f"""JAX_COORDINATOR_ADDRESS="$(echo "$SKYPILOT_NODE_IPS" | head -n 1):{PORT}"
export JAX_COORDINATOR_ADDRESS
export JAX_NUM_PROCESSES="$SKYPILOT_NUM_NODES"
export JAX_PROCESS_ID="$SKYPILOT_NODE_RANK"
"""


def main(arguments: list[str]) -> int:
    """Submit the job; returns 0 once SkyPilot has taken it."""
    parser = common.Parser("sky", __doc__)
    common.add_job_options(parser)
    parser.add_argument(
        "--accelerators",
        required=True,
        help="of each node, e.g. H100:8 or tpu-v6e-16 (see `sky gpus list`)",
    )
    parser.add_argument(
        "--num_nodes",
        type=common.at_least(1),
        default=1,
        help="machines; a TPU slice counts as one",
    )
    parser.add_argument("--spot", action="store_true", help="cheaper machines that may be taken away")
    parser.add_argument("--infra", help="cloud[/region[/zone]] or k8s[/context]; empty: the cheapest that has room")
    common.add_mounts(parser)
    options, command = parser.parse(arguments)
    text = common.to_yaml(task(options, command))
    if options.dry_run:
        print(
            f"# sky jobs launch --yes --detach-run --name {options.name} TASK.yaml",
            text,
            sep="\n",
            end="",
        )
        return 0
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder, "task.yaml")
        file.write_text(text)
        code = common.call(["sky", "jobs", "launch", "--yes", "--detach-run", "--name", options.name, str(file)])
    return common.submitted(
        code,
        "sky",
        [
            "sky jobs queue",
            f"sky jobs logs --name {options.name}",
            f"sky jobs cancel --name {options.name}",
        ],
    )


def task(options, command: list[str]) -> dict:
    """SkyPilot's task."""
    is_tpu = options.accelerators.lower().startswith("tpu")
    resources = {
        "accelerators": options.accelerators,
        "use_spot": options.spot,
        "job_recovery": {"max_restarts_on_errors": 0, "recover_on_exit_codes": RESTARTED},
    }
    if options.infra:
        resources["infra"] = options.infra
    extra = "tpu" if is_tpu else "gpu"
    hosts = "" if is_tpu or options.num_nodes == 1 else HOSTS
    mounts = {folder: {"source": f"gs://{bucket}", "mode": "MOUNT"} for bucket, folder in options.mount}
    return {
        "name": options.name,
        "num_nodes": options.num_nodes,
        "workdir": ".",
        "resources": resources,
        "envs": dict(options.env),
        "file_mounts": mounts,
        "setup": "uv venv --seed --python 3.12 .venv || exit 1\n"
        f".venv/bin/pip install --quiet --editable '.[{extra}]' --constraint constraints.txt\n",
        "run": f'export PATH="$PWD/.venv/bin:$PATH"\n{hosts}exec {shlex.join(command)}\n',
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
