"""Where arrays live: the device mesh, one table from logical axis names to mesh axes, and the start of many hosts.

Model code names the axes of parameters and activations (`embed`, `heads`, `batch`, ...); the table says which mesh axis
each is split over. Nothing else in the library knows about devices.
"""

import contextlib
import contextvars
import dataclasses
import difflib
import functools
import importlib.util
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax._src.clusters import GceTpuCluster  # nothing public tells a slice from a TPU that is alone
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxgpt.types import Array

MESH_AXES = ("data", "fsdp", "context", "expert", "tensor")
BATCH_AXES = ("data", "fsdp")

Rules = Mapping[str, str | tuple[str, ...] | None]

# Logical axis -> mesh axes. `act_*` name the axes of activations, which follow other rules than those of parameters:
# `embed` of a parameter is split over fsdp (ZeRO-3), while the batch of an activation takes that mesh axis.
DEFAULT_RULES: Rules = {
    "batch": BATCH_AXES,
    "length": "context",
    "act_embed": None,
    "act_heads": "tensor",
    "act_kv_heads": "tensor",
    "act_mlp": "tensor",
    "act_vocab": "tensor",
    "vocab": "tensor",
    "positions": None,
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "expert": "expert",
    "lora": None,
    "norm": None,
    "layers": None,
}


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; at most one may be -1, which takes the devices that are left."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    context: int = 1
    expert: int = 1

    def __post_init__(self):
        sizes = {axis: getattr(self, axis) for axis in MESH_AXES}
        if self.expert != 1:
            raise ValueError(
                f"mesh.expert={self.expert} would split nothing: no model here has experts; use mesh.data, mesh.fsdp or "
                "mesh.tensor for these devices."
            )
        for axis, size in sizes.items():
            if size < 1 and size != -1:
                raise ValueError(f"mesh.{axis}={size} must be at least 1, or -1 to take the devices that are left.")
        if sum(size == -1 for size in sizes.values()) > 1:
            raise ValueError("Only one axis of mesh may be -1: " + ", ".join(f"mesh.{a}={s}" for a, s in sizes.items()))

    def shape(self, num_devices: int, field: str = "mesh") -> tuple[int, ...]:
        """Axis sizes in the order of MESH_AXES with -1 filled in; ValueError where they do not multiply to num_devices."""
        sizes = [getattr(self, axis) for axis in MESH_AXES]
        fixed = int(np.prod([s for s in sizes if s != -1]))
        if num_devices % fixed or (-1 not in sizes and fixed != num_devices):
            named = " x ".join(f"{field}.{a}={s}" for a, s in zip(MESH_AXES, sizes, strict=True) if s not in (1, -1))
            raise ValueError(
                f"{named or f'{field}.data=1'} does not fit {num_devices} device(s); the sizes must multiply to the "
                "number of devices, or to a divisor of it with one axis at -1."
            )
        return tuple(num_devices // fixed if s == -1 else s for s in sizes)


def make_mesh(config: MeshConfig, dcn: MeshConfig | None = None, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The device mesh, axes in the order of MESH_AXES.

    config: sizes within a slice (all devices where there is one slice). dcn: sizes across slices, which are joined by
      the slower data-centre network. Axes are Auto: Explicit axes, jax's default, break Linen's metadata.
    """
    devices = list(jax.devices() if devices is None else devices)
    slices = len({getattr(d, "slice_index", 0) for d in devices})
    types = (AxisType.Auto,) * len(MESH_AXES)
    outer = (dcn or MeshConfig()).shape(slices, "dcn_mesh")
    inner = config.shape(len(devices) // slices)
    if slices > 1:
        grid = mesh_utils.create_hybrid_device_mesh(inner, outer, devices=devices)
    else:
        grid = mesh_utils.create_device_mesh(inner, devices=devices)
    return Mesh(grid, MESH_AXES, axis_types=types)


def check_decoding(config: MeshConfig) -> None:
    """ValueError for a mesh that splits sequences, where tokens are drawn one at a time and there is nothing to split."""
    if config.context != 1:
        raise ValueError(
            f"mesh.context={config.context} splits nothing while text is generated; use mesh.data or mesh.tensor for these "
            "devices."
        )


def check_rules(rules: Rules) -> None:
    """ValueError where the table names a mesh axis that does not exist."""
    for name, axes in rules.items():
        for axis in (axes,) if isinstance(axes, str) else axes or ():
            if axis not in MESH_AXES:
                raise ValueError(
                    f"The sharding rule {name!r} names the mesh axis {axis!r}; {_nearest(axis, MESH_AXES)}"
                )


def spec_for(names: Sequence[str | None], shape: Sequence[int], mesh: Mesh, rules: Rules) -> PartitionSpec:
    """The PartitionSpec of an array whose dimensions carry these logical names.

    A dimension that its mesh axes do not divide (a vocabulary of 50257, one kv head) stays whole, on every device.
    Raises ValueError for a name that is not in the table: jax would silently leave it unsharded.
    """
    spec = []
    for name, size in zip(names, shape, strict=True):
        if name is not None and name not in rules:
            raise ValueError(f"The logical axis {name!r} has no sharding rule; {_nearest(name, rules)}")
        axes = rules[name] if name is not None else None
        axes = (axes,) if isinstance(axes, str) else tuple(axes or ())
        parts = int(np.prod([mesh.shape[axis] for axis in axes]))
        spec.append(axes if axes and parts > 1 and size % parts == 0 else None)
    return PartitionSpec(*spec)


def _nearest(name: str, choices) -> str:
    close = difflib.get_close_matches(name, list(choices), n=1, cutoff=0)
    return f"the nearest is {close[0]!r}." if close else "there are none."


_ACTIVE: contextvars.ContextVar[tuple[Mesh, Rules] | None] = contextvars.ContextVar("mesh_and_rules", default=None)


@contextlib.contextmanager
def activate(mesh: Mesh, rules: Rules):
    """Bind mesh and rules for `shard`. Enter it inside the jitted function: rules are not part of jit's cache key."""
    token = _ACTIVE.set((mesh, rules))
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def shard(x: Array, *names: str | None) -> Array:
    """Constrain an activation to the layout of its logical axes; the identity outside `activate` or on one device."""
    active = _ACTIVE.get()
    if active is None or active[0].size == 1:
        return x
    mesh, rules = active
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec_for(names, x.shape, mesh, rules)))


def unbox(params: Any) -> Any:
    """Plain arrays out of Linen's boxed parameters."""
    return nn.unbox(params)


def param_shardings(boxed: Any, mesh: Mesh, rules: Rules) -> Any:
    """NamedShardings, in the structure of the unboxed tree, from (abstract) parameters boxed with logical axis names."""

    def sharding(leaf):
        names = getattr(leaf, "names", None)
        value = nn.unbox(leaf)
        spec = spec_for(names, value.shape, mesh, rules) if names is not None else PartitionSpec()
        return NamedSharding(mesh, spec)

    return jax.tree.map(sharding, boxed, is_leaf=lambda leaf: isinstance(leaf, nn.meta.AxisMetadata))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over the data and fsdp axes."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same value on every device."""
    return NamedSharding(mesh, PartitionSpec())


def local_rows(mesh: Mesh, batch_size: int, field: str = "batch_size") -> slice:
    """The rows of a global batch that this process holds: one contiguous range in the order of its devices.

    Raises ValueError, which names the field, where the batch does not divide over the mesh.
    """
    shards = int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))
    if batch_size % shards:
        nearest = max(shards, round(batch_size / shards) * shards)
        raise ValueError(
            f"{field}={batch_size} is not a multiple of mesh.data x mesh.fsdp = {shards}; the nearest valid value is "
            f"{nearest}."
        )
    indices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    starts, stops = zip(*(i[0].indices(batch_size)[:2] for i in indices if i is not None), strict=True)
    return slice(min(starts), max(stops))


def to_global(batch: Any, mesh: Mesh, batch_size: int) -> Any:
    """Global arrays of batch_size rows from each process's own rows (see `local_rows`)."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(sharding, x, (batch_size, *x.shape[1:])), batch
    )


# Launchers that announce several processes: the name of each, jax's for it, the variables of the
# number of processes and of this one's rank, and the one from which jax finds the coordinator.
_LAUNCHERS = (
    ("Open MPI", "ompi", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_MCA_orte_hnp_uri"),
    ("SLURM", "slurm", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_STEP_NODELIST"),
)


def start_distributed(heartbeat_timeout_seconds: int = 30) -> None:
    """Join the multi-controller job this process belongs to; nothing to do where it is alone.

    The job is found by what is there, the first of: JAX_NUM_PROCESSES, JAX_PROCESS_ID and
    JAX_COORDINATOR_ADDRESS (launch.local sets them; JAX_NUM_PROCESSES=1 alone asks for none); Open
    MPI's or SLURM's variables; the hosts of a TPU slice as GKE, or a TPU VM's metadata, names them.
    Survivors notice a lost process within the heartbeat.

    Raises:
      ValueError: where several processes are announced and nothing names their coordinator.
    """
    env = os.environ
    join = functools.partial(jax.distributed.initialize, heartbeat_timeout_seconds=heartbeat_timeout_seconds)
    if "JAX_NUM_PROCESSES" in env:
        if _number("JAX_NUM_PROCESSES") > 1 or "JAX_COORDINATOR_ADDRESS" in env:
            _join_as_told(join, "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
        return
    for launcher in _LAUNCHERS:
        if launcher[3] in env and _number(launcher[2]) > 1:
            _join_of_launcher(join, *launcher)
            return
    if "JAX_COORDINATOR_ADDRESS" in env:
        raise ValueError(
            "JAX_COORDINATOR_ADDRESS is set, but nothing says how many processes there are; set "
            "JAX_NUM_PROCESSES and JAX_PROCESS_ID, too."
        )
    _join_slice(join)


def _join_as_told(join: Callable[..., None], count: str, rank: str) -> None:
    """Join by JAX_COORDINATOR_ADDRESS and these variables."""
    missing = [name for name in (rank, "JAX_COORDINATOR_ADDRESS") if name not in os.environ]
    if missing:
        raise ValueError(
            f"{count}={os.environ[count]} announces several processes, but {' and '.join(missing)} "
            "must be set, too (JAX_COORDINATOR_ADDRESS to HOST:PORT of process 0)."
        )
    address, number, index = os.environ["JAX_COORDINATOR_ADDRESS"], _number(count), _number(rank)
    if not index < number:
        raise ValueError(f"{rank}={index} must be at least 0 and less than {count}={number}.")
    if not re.fullmatch(r".+:\d+", address):
        raise ValueError(f"JAX_COORDINATOR_ADDRESS={address} must be HOST:PORT of process 0.")
    join(address, number, index)


def _join_of_launcher(join: Callable[..., None], name: str, method: str, count: str, rank: str, finder: str) -> None:
    """Join as a task of Open MPI or SLURM."""
    if finder in os.environ:
        join(cluster_detection_method=method)
    elif "JAX_COORDINATOR_ADDRESS" in os.environ:
        _join_as_told(join, count, rank)
    elif method == "ompi" and importlib.util.find_spec("mpi4py"):
        join(cluster_detection_method="mpi4py")  # Open MPI 5 names no coordinator
    else:
        how = "start it with srun" if method == "slurm" else "install mpi4py"
        raise ValueError(
            f"{name} announces {os.environ[count]} processes ({count}), but nothing names their "
            f"coordinator; {how}, or set JAX_COORDINATOR_ADDRESS to HOST:PORT of process 0, or "
            "JAX_NUM_PROCESSES=1 to run this process alone."
        )


def _join_slice(join: Callable[..., None]) -> None:
    """Join the hosts of a TPU slice, or of several; nothing to do without a TPU, or with one host."""
    env, platforms = os.environ, jax.config.values["jax_platforms"] or ""
    hosts = env.get("TPU_PROCESS_ADDRESSES", env.get("TPU_WORKER_HOSTNAMES", "")).split(",")
    number = len(hosts) * (_number("MEGASCALE_NUM_SLICES") if env.get("MEGASCALE_NUM_SLICES") else 1)
    if "tpu" not in platforms:  # jax puts it there where it sees one, unless JAX_PLATFORMS is set
        if number > 1 and not platforms:
            raise ValueError(
                f"TPU_WORKER_HOSTNAMES and MEGASCALE_NUM_SLICES announce {number} hosts of TPUs, but "
                "jax sees no TPU here; pip install -e '.[tpu]'."
            )
        return
    listed = "TPU_PROCESS_ADDRESSES_PATH" in env  # a file of them, which jax reads
    if listed or (hosts[0] and number > 1):
        join(cluster_detection_method="gketpu")
    elif not hosts[0] and GceTpuCluster.is_env_present() and GceTpuCluster.get_process_count() > 1:
        join(cluster_detection_method="gcetpu")


def _number(variable: str) -> int:
    """The whole number that an environment variable holds."""
    text = os.environ.get(variable, "1")
    if not re.fullmatch(r"\d+", text):
        raise ValueError(f"{variable}={text} must be a whole number of at least 0.")
    return int(text)


def per_device(fn, in_names: Sequence[tuple], out_names: tuple):
    """`fn` run on each device's own part of its arguments, for kernels the partitioner cannot see into.

    in_names, out_names: logical axes of each argument and of the result. Only axes that carry no communication
    (batch, heads) may be split. Outside `activate`, or on one device, it is `fn` itself.
    """
    active = _ACTIVE.get()
    if active is None or active[0].size == 1:
        return fn
    mesh, rules = active

    def split(*args):
        specs = [spec_for(names, x.shape, mesh, rules) for names, x in zip(in_names, args, strict=True)]
        out = spec_for(out_names, args[0].shape, mesh, rules)
        return jax.shard_map(fn, mesh=mesh, in_specs=tuple(specs), out_specs=out, check_vma=False)(*args)

    return split
