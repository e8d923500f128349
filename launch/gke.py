r"""A job on TPU slices of a GKE cluster: a JobSet in a queue of Kueue, restarted until it is done.

    python -m launch.gke --name=run1 --slice=v5p:4x4x4 [--num_slices=2] --image=REGISTRY/jaxgpt \
        [--mount=gs://bucket:/data] [--dry_run] -- python -m experiments.pretrain ...

gcluster (Cluster Toolkit, the successor of xpk) builds the image from this folder where
--base_image is given in place of --image; --by=kubectl --queue=LOCAL_QUEUE writes the JobSet
itself, for a cluster that is managed without it. A preempted run (42), a lost host and a killed
process start the whole set again, at most --max_restarts times; 1, 2 and 130 end it for good.
"""

import argparse
import dataclasses
import math
import re
import shlex
import sys

from launch import common


@dataclasses.dataclass(frozen=True)
class Generation:
    """A TPU as GKE names it: its nodes' label, its machines, and the dimensions of a topology."""

    label: str
    machine: str
    dimensions: int
    lone_hosts: tuple[int, ...] = (4,)  # chips of one-host slices; hosts of larger ones have 4


GENERATIONS = {
    "v4": Generation("tpu-v4-podslice", "ct4p-hightpu", 3),
    "v5e": Generation("tpu-v5-lite-podslice", "ct5lp-hightpu", 2, (1, 4, 8)),
    "v5p": Generation("tpu-v5p-slice", "ct5p-hightpu", 3),
    "v6e": Generation("tpu-v6e-slice", "ct6e-standard", 2, (1, 4, 8)),
    "tpu7x": Generation("tpu7x", "tpu7x-standard", 3),
}


@dataclasses.dataclass(frozen=True)
class Slice:
    """A slice such as v5p:4x4x4."""

    generation: Generation
    topology: str
    hosts: int
    chips_per_host: int

    @property
    def machine_type(self) -> str:
        """The type of its hosts."""
        return f"{self.generation.machine}-{self.chips_per_host}t"


# The pod that prints.
FIRST_POD = (
    "jobset.sigs.k8s.io/jobset-name={},jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
)


def parse_slice(text: str) -> Slice:
    """The slice of GENERATION:TOPOLOGY; a mistake names what is valid."""
    name, _, topology = text.partition(":")
    if name not in GENERATIONS:
        raise argparse.ArgumentTypeError(f"{text!r} must begin with one of {', '.join(GENERATIONS)}, as v5p:4x4x4")
    generation = GENERATIONS[name]
    example = "x".join(["4"] * generation.dimensions)
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", topology) or topology.count("x") != generation.dimensions - 1:
        raise argparse.ArgumentTypeError(
            f"{text!r} needs a topology of {generation.dimensions} sizes, such as {name}:{example}"
        )
    chips = math.prod(map(int, topology.split("x")))
    per_host = chips if chips in generation.lone_hosts else 4
    if chips % per_host:
        raise argparse.ArgumentTypeError(f"{text!r} has {chips} chips, no whole hosts of 4; {name}:{example} is valid")
    return Slice(generation, topology, chips // per_host, per_host)


def main(arguments: list[str]) -> int:
    """Submit the job; returns 0 once the cluster has taken it."""
    options, command = parse(arguments)
    if options.by == "gcluster":
        words = gcluster(options, command)
        if options.dry_run:
            print(shlex.join(words))
            return 0
        where = given({"--cluster": options.cluster, "--location": options.location})
        following = [["list"], ["logs", options.name, "--follow"], ["cancel", options.name]]
        return common.submitted(
            common.call(words),
            "gcluster",
            [shlex.join(["gcluster", "job", *rest, *where]) for rest in following],
        )
    text = common.to_yaml(jobset(options, command))
    words = [
        "kubectl",
        "create",
        "--filename=-",
    ]  # create, not apply: a JobSet of that name is another run
    if options.dry_run:
        print(f"# {shlex.join(words)}", text, sep="\n", end="")
        return 0
    return common.submitted(
        common.call(words, text),
        "kubectl",
        [
            f"kubectl get jobset {options.name}",
            f"kubectl logs --follow --selector={FIRST_POD.format(options.name)}",
            f"kubectl delete jobset {options.name}",
        ],
    )


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options, and the command after --."""
    parser = common.Parser("gke", __doc__)
    common.add_job_options(parser)
    common.add_restarts(parser)
    parser.add_argument("--by", choices=("gcluster", "kubectl"), default="gcluster", help="what submits the job")
    parser.add_argument("--slice", required=True, type=parse_slice, help="GENERATION:TOPOLOGY, e.g. v5p:4x4x4")
    common.add_num_slices(parser)
    parser.add_argument("--queue", help="Kueue's LocalQueue; gcluster finds the cluster's own")
    parser.add_argument("--image", help="a container with the project in its working folder (see Containerfile)")
    parser.add_argument("--base_image", help="what gcluster puts this folder into, instead of --image")
    parser.add_argument("--cluster", help="its name, for gcluster; empty: as `gcluster job config` has it")
    parser.add_argument("--location", help="its region or zone, for gcluster")
    parser.add_argument("--service_account", help="of Kubernetes, with access to the buckets")
    common.add_mounts(parser)
    parser.add_argument(
        "--grace_seconds",
        type=common.at_least(1),
        default=300,
        help="from SIGTERM to SIGKILL, to save in",
    )
    options, command = parser.parse(arguments)
    if bool(options.image) == bool(options.base_image):
        parser.error("one of --image and --base_image is needed.")
    if options.by == "kubectl" and not (options.image and options.queue):
        parser.error("--by=kubectl needs --image and --queue.")
    return options, command


def given(options: dict[str, str | None]) -> list[str]:
    """The options that have a value, as words of a command line."""
    return [word for name, value in options.items() if value for word in (name, value)]


def gcluster(options, command: list[str]) -> list[str]:
    """The line that submits the job by Cluster Toolkit."""
    words = ["gcluster", "job", "submit", "--name", options.name]
    words += given(
        {
            "--cluster": options.cluster,
            "--location": options.location,
            "--queue": options.queue,
            "--service-account": options.service_account,
            "--image": options.image,
            "--base-image": options.base_image,
            "--build-context": "." if options.base_image else None,
        }
    )
    words += ["--compute-type", options.slice.machine_type, "--topology", options.slice.topology]
    words += ["--num-slices", str(options.num_slices), "--restarts", str(options.max_restarts)]
    # It fails the job on every code that is not listed.
    words += ["--restart-on-exit-codes", ",".join(map(str, common.RESTARTED))]
    words += ["--grace-period", f"{options.grace_seconds}s"]
    words += [word for bucket, folder in options.mount for word in ("--mount", f"gs://{bucket}:{folder}:rw")]
    # exec: the pod's shell would not pass a SIGTERM on.
    return [*words, "--command", f"exec {common.shell(command, options.env)}"]


def jobset(options, command: list[str]) -> dict:
    """The JobSet's manifest."""
    tpu, hosts = options.slice, options.slice.hosts
    labels = {"kueue.x-k8s.io/queue-name": options.queue}
    alone = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}  # a node pool is a slice
    job = {
        "parallelism": hosts,
        "completions": hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,  # any lost pod ends the slice's Job: the set starts again as a whole
        "podFailurePolicy": {
            "rules": [
                {
                    "action": "FailJob",
                    "onExitCodes": {
                        "containerName": "jaxgpt",
                        "operator": "In",
                        "values": [c for c in common.FINAL if c],
                    },
                }
            ]
        },
        "template": pod(options, command),
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": options.name,
            "labels": labels,
            "annotations": alone if tpu.hosts > 1 else {},
        },
        "spec": {
            "failurePolicy": {
                "maxRestarts": options.max_restarts,
                "rules": [
                    {
                        "name": "final",
                        "action": "FailJobSet",
                        "onJobFailureReasons": ["PodFailurePolicy"],
                    }
                ],
            },
            "replicatedJobs": [{"name": "slice", "replicas": options.num_slices, "template": {"spec": job}}],
        },
    }


def pod(options, command: list[str]) -> dict:
    """The template of one host's pod; GKE tells it the slice's hosts, which jax reads."""
    tpu = options.slice
    container = {
        "name": "jaxgpt",
        "image": options.image,
        "command": [word.replace("$(", "$$(") for word in command],  # Kubernetes would put variables there
        "env": [{"name": name, "value": value.replace("$(", "$$(")} for name, value in options.env],
        "ports": [{"containerPort": port} for port in (8471, 8482)],  # of libtpu, and of jax's coordinator
        "resources": {"limits": {"google.com/tpu": tpu.chips_per_host}},
    }
    spec = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": options.grace_seconds,
        "nodeSelector": {
            "cloud.google.com/gke-tpu-accelerator": tpu.generation.label,
            "cloud.google.com/gke-tpu-topology": tpu.topology,
        },
        "containers": [container],
    }
    if options.service_account:
        spec["serviceAccountName"] = options.service_account
    if not options.mount:
        return {"spec": spec}
    container["volumeMounts"] = [{"name": f"bucket-{i}", "mountPath": f} for i, (_, f) in enumerate(options.mount)]
    spec["volumes"] = [
        {
            "name": f"bucket-{i}",
            "csi": {
                "driver": "gcsfuse.csi.storage.gke.io",
                "volumeAttributes": {"bucketName": bucket},
            },
        }
        for i, (bucket, _) in enumerate(options.mount)
    ]
    return {"metadata": {"annotations": {"gke-gcsfuse/volumes": "true"}}, "spec": spec}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
