"""Checkpoints: what is saved comes back, on any mesh; what is damaged is not used."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxgpt import partition
from jaxgpt.partition import MeshConfig
from jaxgpt.train.checkpoint import CheckpointConfig, Checkpointer, restore_params
from jaxgpt.types import TrainState


def make_state(step: int, mesh=None) -> TrainState:
    mesh = mesh or partition.make_mesh(MeshConfig(fsdp=2, data=4))
    params = {"w": jnp.arange(64, dtype=jnp.float32).reshape(8, 8) + step, "b": jnp.full((3,), step, jnp.float32)}
    split = NamedSharding(mesh, PartitionSpec("fsdp"))
    params = {"w": jax.device_put(params["w"], split), "b": params["b"]}
    return TrainState(jnp.int32(step), params, {"mu": params}, jax.random.key(step))


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    root = tmp_path_factory.mktemp("saved") / "checkpoints"
    with Checkpointer(str(root), CheckpointConfig(max_to_keep=3)) as checkpointer:
        for step in (2, 4, 6):
            checkpointer.save(step, make_state(step), {"skipped": step}, None)
    return root


def restore(root, target):
    with Checkpointer(str(root), CheckpointConfig(max_to_keep=3)) as checkpointer:
        return checkpointer.restore(abstract(target))


def assert_is(restored, step):
    state, meta, found = restored
    assert (found, meta) == (step, {"skipped": step})
    expected = make_state(step)
    for ours, theirs in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        if jnp.issubdtype(ours.dtype, jax.dtypes.prng_key):
            ours, theirs = jax.random.key_data(ours), jax.random.key_data(theirs)
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("sizes", [{"data": 4, "fsdp": 2}, {"data": 1, "fsdp": 8}, None], ids=str)
def test_a_state_comes_back_on_any_mesh(saved, sizes):
    devices = jax.devices() if sizes else jax.devices()[:1]
    mesh = partition.make_mesh(MeshConfig(**(sizes or {})), devices=devices)
    restored = restore(saved, make_state(0, mesh))
    assert_is(restored, 6)
    assert restored[0].params["w"].sharding.mesh.size == len(devices)


def flip(step):
    largest = max((p for p in step.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 3] ^= 4
    largest.write_bytes(content)


def truncate(step):
    largest = max((p for p in step.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1])


DAMAGE = {
    "flipped bit": flip,
    "truncated": truncate,
    "missing data": lambda step: max(
        (p for p in step.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size
    ).unlink(),
    "missing commit marker": lambda step: (step / "_CHECKPOINT_METADATA").unlink(),
    "empty meta": lambda step: (step / "meta" / "metadata").write_text(""),
    "a file too many": lambda step: (step / "state" / "more").write_text("x"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_newest_step_is_moved_away_and_the_one_before_used(saved, tmp_path, damage, caplog):
    root = tmp_path / "checkpoints"
    shutil.copytree(saved, root)
    DAMAGE[damage](root / "6")
    assert_is(restore(root, make_state(0)), 4)
    assert (root / "damaged" / "6").is_dir()
    assert not (root / "6").exists()
    assert "Checkpoint 6 is damaged" in caplog.text


def test_a_step_without_digests_was_interrupted_and_is_dropped(saved, tmp_path):
    root = tmp_path / "checkpoints"
    shutil.copytree(saved, root)
    (root / "digests" / "6.json").unlink()
    assert_is(restore(root, make_state(0)), 4)
    assert not (root / "damaged").exists()


def test_damage_everywhere_is_no_fresh_start(saved, tmp_path):
    root = tmp_path / "checkpoints"
    shutil.copytree(saved, root)
    for step in ("2", "4", "6"):
        flip(root / step)
    for _ in range(2):  # the second time too
        with pytest.raises(ValueError, match="Every checkpoint in .* is damaged"):
            restore(root, make_state(0))


def test_nothing_saved_is_a_fresh_start(tmp_path):
    assert restore(tmp_path / "checkpoints", make_state(0)) is None


def test_the_newest_and_the_best_are_kept_and_digests_of_others_forgotten(tmp_path):
    losses = {1: 3.0, 2: 1.0, 3: 2.0, 4: 2.5, 5: 2.2}
    with Checkpointer(str(tmp_path), CheckpointConfig(max_to_keep=2, keep_best=1)) as checkpointer:
        for step, loss in losses.items():
            checkpointer.save(step, make_state(step), {}, {"eval/loss": loss})
            checkpointer.wait()
        assert checkpointer.latest_step() == 5
        assert checkpointer.best_step() == 2
    kept = sorted(int(p.name) for p in tmp_path.iterdir() if p.name.isdecimal())
    assert kept == [2, 4, 5]
    assert sorted(int(p.stem) for p in (tmp_path / "digests").iterdir()) == kept


def test_saving_a_step_twice_is_an_error(tmp_path):
    with Checkpointer(str(tmp_path), CheckpointConfig()) as checkpointer:
        checkpointer.save(1, make_state(1), {}, None)
        with pytest.raises(RuntimeError, match="step 1 cannot be saved after step 1"):
            checkpointer.save(1, make_state(1), {}, None)


def test_parameters_alone_come_back_from_the_newest_trusted_step(saved, tmp_path):
    root = tmp_path / "checkpoints"
    shutil.copytree(saved, root)
    flip(root / "6")
    params = restore_params(str(root), abstract(make_state(0)).params)
    np.testing.assert_array_equal(params["w"], make_state(4).params["w"])
    assert (root / "6").is_dir(), "reading another run's checkpoints changes nothing there"


def test_parameters_of_another_shape_are_refused_by_name(saved):
    target = abstract(make_state(0)).params
    target["w"] = jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=target["b"].sharding)
    with pytest.raises(ValueError, match=r"\['w'\] is \(8, 8\) there and \(8, 4\)"):
        restore_params(str(saved), target)
    with pytest.raises(ValueError, match="no checkpoint that can be trusted"):
        restore_params(str(saved / "nowhere"), target)


def test_digests_are_sha256_of_the_files(saved):
    import hashlib

    recorded = json.loads((saved / "digests" / "6.json").read_text())
    assert len(recorded) == len([p for p in (saved / "6").rglob("*") if p.is_file()])
    for name, digest in recorded.items():
        assert hashlib.sha256((saved / "6" / name).read_bytes()).hexdigest() == digest
