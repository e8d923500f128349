"""The mesh, the rule table and the rows of each process."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from jaxgpt import partition
from jaxgpt.partition import DEFAULT_RULES, MeshConfig


def test_minus_one_takes_the_devices_that_are_left():
    mesh = partition.make_mesh(MeshConfig(data=2, fsdp=-1, tensor=2))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "context": 1, "expert": 1, "tensor": 2}


@pytest.mark.parametrize("sizes", [{"data": 3}, {"data": -1, "tensor": 3}, {"data": 1, "fsdp": 4}, {"data": 16}])
def test_sizes_that_do_not_fit_the_devices_are_named(sizes):
    with pytest.raises(ValueError, match="mesh.*8 device"):
        partition.make_mesh(MeshConfig(**sizes))


def test_only_one_axis_may_be_minus_one():
    with pytest.raises(ValueError, match=r"mesh\.data=-1.*mesh\.fsdp=-1"):
        MeshConfig(data=-1, fsdp=-1)


def test_specs_follow_the_table_and_leave_what_does_not_divide_whole():
    mesh = partition.make_mesh(MeshConfig(data=1, fsdp=2, tensor=4))
    spec = lambda names, shape: partition.spec_for(names, shape, mesh, DEFAULT_RULES)
    assert spec(("vocab", "embed"), (512, 64)) == P(("tensor",), ("fsdp",))
    assert spec(("vocab", "embed"), (50257, 64)) == P(None, ("fsdp",))
    assert spec(("layers", "embed", "kv_heads", "head_dim"), (2, 64, 1, 16)) == P(None, ("fsdp",), None, None)
    assert spec(("batch", None), (8, 3)) == P(("data", "fsdp"), None)


def test_an_unknown_logical_axis_is_an_error_with_the_nearest():
    mesh = partition.make_mesh(MeshConfig())
    with pytest.raises(ValueError, match="'embd'.*'embed'"):
        partition.spec_for(("embd",), (8,), mesh, DEFAULT_RULES)
    with pytest.raises(ValueError, match="'heads'.*'tensr'.*'tensor'"):
        partition.check_rules({"heads": "tensr"})


def test_shard_constrains_inside_activate_and_is_the_identity_outside():
    mesh = partition.make_mesh(MeshConfig(data=4, tensor=2))
    x = jnp.zeros((8, 6))
    assert partition.shard(x, "batch", "act_mlp") is x

    def inside(x):
        with partition.activate(mesh, DEFAULT_RULES):
            return partition.shard(x, "batch", "act_mlp")

    assert jax.jit(inside)(x).addressable_shards[0].data.shape == (2, 3)


def test_rows_of_one_process_are_all_of_the_batch_and_must_divide():
    mesh = partition.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    assert partition.local_rows(mesh, 12) == slice(0, 12)
    with pytest.raises(ValueError, match="batch_size=10.*4.*8"):
        partition.local_rows(mesh, 10)
    with pytest.raises(ValueError, match="rollout.num_slots=6.*4.*8"):
        partition.local_rows(mesh, 6, "rollout.num_slots")


def test_global_arrays_keep_the_rows_in_order():
    mesh = partition.make_mesh(MeshConfig(data=4, tensor=2))
    rows = jnp.arange(16).reshape(8, 2)
    out = partition.to_global({"x": rows}, mesh, 8)["x"]
    assert (out == rows).all()
    assert out.addressable_shards[0].data.shape == (2, 2)
