"""GKE: the line for gcluster and the JobSet for kubectl."""

import shlex
import tomllib

import pytest
import yaml

from launch import gke
from tests.launch.conftest import ROOT
from tests.launch.shapes import JOBSET, differences

COMMAND = (
    "--",
    "python",
    "-m",
    "experiments.pretrain",
    "--workdir=/data/run 1",
    "--config.name=$(x)",
)
KUBECTL = ("--name=run1", "--by=kubectl", "--image=registry/jaxgpt", "--queue=multislice-queue")


@pytest.mark.parametrize(
    ("text", "machine", "hosts"),
    [
        ("v5p:4x4x4", "ct5p-hightpu-4t", 16),
        ("v5e:16x16", "ct5lp-hightpu-4t", 64),
        ("v6e:2x4", "ct6e-standard-8t", 1),
        ("v6e:1x1", "ct6e-standard-1t", 1),
        ("v4:2x2x1", "ct4p-hightpu-4t", 1),
        ("tpu7x:4x4x8", "tpu7x-standard-4t", 32),
        ("v5e:4x4", "ct5lp-hightpu-4t", 4),
    ],
)
def test_a_slice_has_the_published_machines(text, machine, hosts):
    found = gke.parse_slice(text)
    assert (found.machine_type, found.hosts) == (machine, hosts)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("v7:4x4", "v6e"),
        ("v5p:4x4", "3 sizes, such as v5p:4x4x4"),
        ("v6e:4x4x4", "2 sizes"),
        ("v5p", "3 sizes"),
        ("v5p:1x1x2", "2 chips"),
        ("v5e:0x4", "2 sizes"),
    ],
)
def test_a_slice_that_is_none_is_one_sentence_with_a_valid_one(fakes, text, expected):
    done = fakes.run("gke", "--name=run1", f"--slice={text}", "--image=i", "--cluster=c", *COMMAND)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert expected in done.stderr
    assert fakes.calls() == []


def test_gcluster_gets_the_image_the_slice_and_the_codes_to_restart_on(fakes):
    fakes.plan()
    mount = "--mount=gs://bucket:/data"
    done = fakes.run(
        "gke",
        "--name=run1",
        "--slice=v5p:4x4x4",
        "--num_slices=2",
        "--base_image=python:3.12",
        "--cluster=c",
        "--location=us-east5",
        mount,
        "--env=A=b c",
        *COMMAND,
    )
    assert done.returncode == 0, done.stderr
    (call,) = fakes.calls()
    assert (call["tool"], call["arguments"][:2]) == ("gcluster", ["job", "submit"])
    words = call["arguments"][2:]
    given = dict(zip(words[::2], words[1::2], strict=True))
    assert given == {
        "--name": "run1",
        "--cluster": "c",
        "--location": "us-east5",
        "--base-image": "python:3.12",
        "--build-context": ".",
        "--compute-type": "ct5p-hightpu-4t",
        "--topology": "4x4x4",
        "--num-slices": "2",
        "--restarts": "100",
        "--restart-on-exit-codes": "42,134,135,137,139,143",
        "--grace-period": "300s",
        "--mount": "gs://bucket:/data:rw",
        "--command": given["--command"],
    }
    assert shlex.split(given["--command"]) == ["exec", "env", "A=b c", *COMMAND[1:]]
    assert "gcluster job logs run1 --follow --cluster c --location us-east5" in done.stdout


def test_kubectl_gets_a_jobset_of_the_published_shape(fakes):
    fakes.plan()
    done = fakes.run(
        "gke",
        *KUBECTL,
        "--slice=v5p:4x4x4",
        "--num_slices=2",
        "--mount=gs://bucket:/data",
        "--env=A=b c",
        "--service_account=trainer",
        "--grace_seconds=60",
        "--max_restarts=7",
        *COMMAND,
    )
    assert done.returncode == 0, done.stderr
    (call,) = fakes.calls()
    assert (call["tool"], call["arguments"]) == ("kubectl", ["create", "--filename=-"])
    jobset = yaml.safe_load(call["input"])
    assert differences(jobset, JOBSET) == []
    assert jobset["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "multislice-queue"}
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] == 7
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert (
        replicated["replicas"],
        job["parallelism"],
        job["completions"],
        job["backoffLimit"],
    ) == (2, 16, 16, 0)
    pod = job["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "4x4x4",
    }
    assert (pod["restartPolicy"], pod["terminationGracePeriodSeconds"]) == ("Never", 60)
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert container["command"] == [*COMMAND[1:-1], "--config.name=$$(x)"], (
        "no shell, which would keep SIGTERM to itself"
    )
    assert container["env"] == [{"name": "A", "value": "b c"}]
    assert container["volumeMounts"] == [{"name": pod["volumes"][0]["name"], "mountPath": "/data"}]
    assert pod["volumes"][0]["csi"]["volumeAttributes"] == {"bucketName": "bucket"}


@pytest.mark.parametrize(
    ("code", "restarts"),
    [
        (42, True),
        (134, True),
        (137, True),
        (143, True),
        (139, True),
        (1, False),
        (2, False),
        (130, False),
        (127, False),
    ],
)
def test_the_jobset_starts_again_exactly_after_codes_that_a_new_start_may_mend(code, restarts):
    options, command = gke.parse([*KUBECTL, "--slice=v6e:4x4", *COMMAND])
    spec = gke.jobset(options, command)["spec"]
    (rule,) = spec["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]["rules"]
    assert (rule["action"], rule["onExitCodes"]["operator"]) == ("FailJob", "In")
    (final,) = spec["failurePolicy"]["rules"]
    assert (final["action"], final["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    assert (code not in rule["onExitCodes"]["values"]) == restarts


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--image=i", "--base_image=j", "--cluster=c"], "--image and --base_image"),
        (["--cluster=c"], "--image and"),
        (["--by=kubectl", "--image=i"], "--queue"),
        (["--by=xpk"], "gcluster"),
        (["--image=i", "--cluster=c", "--mount=bucket"], "gs://BUCKET:/FOLDER"),
        (["--image=i", "--cluster=c", "--env=A"], "NAME=VALUE"),
        (["--imge=i"], "--image"),
    ],
)
def test_a_mistake_is_one_sentence_and_submits_nothing(fakes, options, expected):
    done = fakes.run("gke", "--name=run1", "--slice=v5p:4x4x4", *options, *COMMAND)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert expected in done.stderr
    assert fakes.calls() == []


@pytest.mark.parametrize(
    "arguments",
    [
        (*KUBECTL, "--slice=v5p:4x4x4"),
        ("--name=run1", "--slice=v5p:4x4x4", "--image=i", "--cluster=c"),
    ],
)
def test_a_cluster_that_takes_no_job_is_exit_code_2_and_a_dry_run_calls_nothing(fakes, arguments):
    fakes.plan(kubectl=["error: exceeded quota"], gcluster=["error: exceeded quota"])
    done = fakes.run("gke", *arguments, "--dry_run", *COMMAND)
    assert (done.returncode, fakes.calls()) == (0, [])
    assert "experiments.pretrain" in done.stdout
    refused = fakes.run("gke", *arguments, *COMMAND)
    assert refused.returncode == 2
    assert "exceeded quota" in refused.stderr
    assert "nothing was started" in refused.stderr


def test_the_image_has_every_package_and_nothing_else():
    lines = (ROOT / "Containerfile").read_text().splitlines()
    copied = {word for line in lines if line.startswith("COPY") for word in line.split()[1:-1]}
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packages = {name.rstrip("*") for name in setup["packages"]["find"]["include"]}
    assert copied == packages | {"pyproject.toml", "constraints.txt", "README.md"}
    kept = (ROOT / ".dockerignore").read_text().splitlines()
    assert {line[1:] for line in kept if line.startswith("!")} == copied


def test_a_tool_that_is_not_installed_is_named(fakes):
    (fakes.root / "bin" / "kubectl").unlink()
    fakes.environment["PATH"] = str(fakes.root / "bin")
    done = fakes.run("gke", *KUBECTL, "--slice=v5p:4x4x4", *COMMAND)
    assert done.returncode == 2
    assert "kubectl is not on the PATH" in done.stderr
