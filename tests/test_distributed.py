"""How a process finds the others of its job: by environment variables alone."""

import os
import socket
import subprocess
import sys

import jax
import pytest
from jax._src.clusters import ClusterEnv, GceTpuCluster

from jaxgpt import partition

SLURM = {
    "SLURM_JOB_ID": "4099",
    "SLURM_STEP_NODELIST": "gpu[007-008,012],big3",
    "SLURM_NTASKS": "32",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_NODES": "4",
}
OMPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
}
TOLD = {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1", "JAX_COORDINATOR_ADDRESS": "host:1234"}
ALL = [
    *SLURM,
    *OMPI,
    *TOLD,
    "TPU_WORKER_HOSTNAMES",
    "TPU_PROCESS_ADDRESSES",
    "TPU_PROCESS_ADDRESSES_PATH",
    "MEGASCALE_NUM_SLICES",
    "TPU_SKIP_MDS_QUERY",
]


@pytest.fixture
def joined(monkeypatch):
    """Sets these variables and no others, and joins; what jax is called with, [] where it is not.

    hosts: of the slice by the metadata of a TPU VM; 0 where there are none.
    """

    def join(variables: dict[str, str], platforms: str = "cpu", hosts: int = 0) -> list[tuple]:
        calls: list[tuple] = []

        def initialize(*given, heartbeat_timeout_seconds, **named):
            assert heartbeat_timeout_seconds == 30
            calls.append((*given, named))

        for name in ALL:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(jax.distributed, "initialize", initialize)
        monkeypatch.setattr(GceTpuCluster, "is_env_present", lambda: hosts > 0)
        monkeypatch.setattr(GceTpuCluster, "get_process_count", lambda: hosts)
        jax.config.update("jax_platforms", platforms or None)
        partition.start_distributed()
        return calls

    before = jax.config.values["jax_platforms"]
    yield join
    jax.config.update("jax_platforms", before)


GKE = {"TPU_WORKER_HOSTNAMES": "a,b,c,d", "TPU_WORKER_ID": "2"}
ONE_OF_GKE = {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}


@pytest.mark.parametrize(
    ("variables", "platforms", "expected"),
    [
        ({}, "cpu", []),
        ({}, "", []),
        (TOLD, "cpu", [("host:1234", 2, 1, {})]),
        (TOLD | SLURM | OMPI, "cpu", [("host:1234", 2, 1, {})]),
        ({"JAX_NUM_PROCESSES": "1"} | SLURM | GKE, "tpu,cpu", []),
        (SLURM, "cuda", [({"cluster_detection_method": "slurm"},)]),
        (SLURM | {"SLURM_NTASKS": "1"}, "cuda", []),
        (OMPI, "cuda", [({"cluster_detection_method": "ompi"},)]),
        (OMPI | SLURM, "cuda", [({"cluster_detection_method": "ompi"},)]),
        (OMPI | {"OMPI_COMM_WORLD_SIZE": "1"}, "cuda", []),
        (
            {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "JAX_COORDINATOR_ADDRESS": "a:1"},
            "",
            [("a:1", 4, 3, {})],
        ),
        (GKE, "tpu,cpu", [({"cluster_detection_method": "gketpu"},)]),
        (GKE, "cpu", []),
        (ONE_OF_GKE, "tpu,cpu", []),
        (ONE_OF_GKE | {"MEGASCALE_NUM_SLICES": "2"}, "tpu,cpu", [({"cluster_detection_method": "gketpu"},)]),
        ({"TPU_PROCESS_ADDRESSES": "a:8471,b:8471"}, "tpu,cpu", [({"cluster_detection_method": "gketpu"},)]),
        ({"TPU_PROCESS_ADDRESSES_PATH": "/hosts"}, "tpu,cpu", [({"cluster_detection_method": "gketpu"},)]),
        ({}, "tpu,cpu", []),
    ],
)
def test_a_job_is_joined_by_what_is_there(joined, variables, platforms, expected):
    assert joined(variables, platforms) == expected


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"JAX_NUM_PROCESSES": "2"}, "JAX_PROCESS_ID and JAX_COORDINATOR_ADDRESS must be set"),
        ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}, "but JAX_COORDINATOR_ADDRESS must be set"),
        (TOLD | {"JAX_PROCESS_ID": "2"}, "JAX_PROCESS_ID=2 must be at least 0 and less than JAX_NUM_PROCESSES=2"),
        (TOLD | {"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES=two must be a whole number"),
        (TOLD | {"JAX_COORDINATOR_ADDRESS": "host"}, "JAX_COORDINATOR_ADDRESS=host must be HOST:PORT"),
        ({"JAX_COORDINATOR_ADDRESS": "host:1234"}, "set JAX_NUM_PROCESSES and JAX_PROCESS_ID"),
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, r"SLURM announces 8 processes .*srun.*JAX_NUM_PROCESSES=1"),
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3"}, r"Open MPI announces 4 processes .*mpi4py"),
    ],
)
def test_several_processes_without_a_coordinator_are_one_sentence(joined, variables, expected):
    with pytest.raises(ValueError, match=expected):
        joined(variables)


def test_hosts_of_tpus_whose_library_is_not_installed_are_one_sentence(joined):
    with pytest.raises(ValueError, match=r"announce 8 hosts of TPUs, but jax sees no TPU here.*\.\[tpu\]"):
        joined(GKE | {"MEGASCALE_NUM_SLICES": "2"}, platforms="")


@pytest.mark.parametrize(
    ("hosts", "platforms", "joins"), [(4, "tpu,cpu", True), (1, "tpu,cpu", False), (4, "cpu", False)]
)
def test_tpu_vms_are_joined_where_their_metadata_name_several(joined, hosts, platforms, joins):
    # One that is alone joins nothing: the stages that a pipeline starts would find the port taken.
    assert joined({}, platforms, hosts) == ([({"cluster_detection_method": "gcetpu"},)] if joins else [])


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        # SLURM: the first host; the port is 61440 + job % 4096. Open MPI: the same of the job's id / 4096.
        (SLURM, ("gpu007:61443", 32, 9, [1])),
        (OMPI, ("10.96.0.1:62624", 4, 3, [1])),
    ],
)
def test_this_jax_finds_the_coordinator_from_these_variables(monkeypatch, variables, expected):
    for name in ALL:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    (method,) = (launcher[1] for launcher in partition._LAUNCHERS if launcher[4] in variables)
    assert ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, method, 1) == expected


def is_free(port: int) -> bool:
    with socket.socket() as tried:
        return tried.connect_ex(("127.0.0.1", port)) != 0


def test_two_tasks_of_slurm_form_one_job():
    job = next(number for number in range(4096) if is_free(61440 + number))
    script = (
        "import jax\nfrom jaxgpt import partition\npartition.start_distributed()\n"
        "print('I am', jax.process_index(), 'of', jax.process_count())"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ALL} | {"JAX_PLATFORMS": "cpu"}
    tasks = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment
            | SLURM
            | {
                "SLURM_JOB_ID": str(job),
                "SLURM_STEP_NODELIST": "127.0.0.1",
                "SLURM_NTASKS": "2",
                "SLURM_PROCID": str(rank),
                "SLURM_LOCALID": str(rank),
            },
        )
        for rank in range(2)
    ]
    try:
        said = [task.communicate(timeout=300)[0] for task in tasks]
    finally:
        for task in tasks:
            task.kill()
    assert said == ["I am 0 of 2\n", "I am 1 of 2\n"]


def test_a_command_says_that_the_coordinator_is_missing_and_leaves_nothing(tmp_path):
    command = ["-m", "experiments.pretrain", "--config=configs/pretrain.py:tiny", f"--workdir={tmp_path / 'run'}"]
    environment = {k: v for k, v in os.environ.items() if k not in ALL} | {"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}
    done = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 2
    (sentence,) = done.stderr.splitlines()
    assert sentence.startswith(
        "error: SLURM announces 2 processes (SLURM_NTASKS), but nothing names their coordinator;"
    )
    assert not (tmp_path / "run").exists()
