"""Checkpoints: what is saved comes back, on any mesh; what is damaged is not used."""

import hashlib
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxgpt import partition
from jaxgpt.partition import MeshConfig
from jaxgpt.runs import checkpoint
from jaxgpt.runs.checkpoint import (
    CheckpointConfig,
    Checkpointer,
    check_named_step,
    checkpoint_digest,
    newest_good_step,
    restore_params,
)
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


LOST_DIGESTS = {
    "never written": lambda path: path.unlink(),
    "empty": lambda path: path.write_text(""),
    "cut": lambda path: path.write_text(path.read_text()[:40]),
    "of another type": lambda path: path.write_text("[1, 2]"),
    "not text": lambda path: path.write_bytes(b"\xff\xfe\xfa"),
}


@pytest.mark.parametrize("lose", LOST_DIGESTS)
def test_a_step_without_digests_is_used_said_and_verified_from_then_on(saved, tmp_path, lose, caplog):
    root = tmp_path / "checkpoints"
    shutil.copytree(saved, root)
    before = (root / "digests" / "6.json").read_bytes()
    LOST_DIGESTS[lose](root / "digests" / "6.json")
    assert_is(restore(root, make_state(0)), 6)
    assert "Checkpoint 6 has no digests" in caplog.text
    assert not (root / "damaged").exists()
    assert (root / "digests" / "6.json").read_bytes() == before
    caplog.clear()
    assert_is(restore(root, make_state(0)), 6)
    assert caplog.text == ""


def test_a_run_killed_between_commit_and_digests_loses_nothing_with_one_checkpoint(tmp_path, monkeypatch):
    root = tmp_path / "checkpoints"
    config = CheckpointConfig(max_to_keep=1)
    monkeypatch.setattr(checkpoint, "_write_digests", lambda root, step: None)  # the kill
    with Checkpointer(str(root), config) as checkpointer:
        for step in (2, 4):
            checkpointer.save(step, make_state(step), {"skipped": step}, None)
    monkeypatch.undo()
    assert not (root / "digests").exists()
    with Checkpointer(str(root), config) as checkpointer:
        assert_is(checkpointer.restore(abstract(make_state(0))), 4)


def test_all_digests_lost_in_a_copy_cost_nothing(saved, tmp_path):
    root = tmp_path / "checkpoints"
    shutil.copytree(saved, root)
    shutil.rmtree(root / "digests")
    assert_is(restore(root, make_state(0)), 6)
    assert sorted(p.name for p in root.iterdir() if p.name.isdecimal()) == ["2", "4", "6"]


def lose_arrays(step):
    for path in step.rglob("*"):
        if path.is_file() and path.parent.name == "d":  # where orbax keeps the arrays
            path.unlink()


UNREADABLE = {name: DAMAGE[name] for name in ("missing commit marker", "empty meta")} | {"missing arrays": lose_arrays}


@pytest.mark.parametrize("damage", UNREADABLE)
def test_a_step_without_digests_that_cannot_be_read_is_set_aside(saved, tmp_path, damage, caplog):
    root = tmp_path / "checkpoints"
    shutil.copytree(saved, root)
    (root / "digests" / "6.json").unlink()
    UNREADABLE[damage](root / "6")
    assert_is(restore(root, make_state(0)), 4)
    assert (root / "damaged" / "6" / "meta").is_dir()
    assert "Checkpoint 6 is damaged" in caplog.text


@pytest.mark.parametrize(
    "error",
    [
        OSError(24, "Too many open files"),
        MemoryError("no room for it"),
        ValueError("RESOURCE_EXHAUSTED: out of memory on device"),
    ],
)
def test_what_the_machine_lacks_is_no_damage_of_a_step_without_digests(saved, tmp_path, monkeypatch, error):
    root = tmp_path / "checkpoints"
    shutil.copytree(saved, root)
    (root / "digests" / "6.json").unlink()

    def fail(*_, **__):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(ocp.CheckpointManager, "restore", fail)
        with pytest.raises(type(error), match=str(error)[-12:]):
            restore(root, make_state(0))
    assert not (root / "damaged").exists()
    assert_is(restore(root, make_state(0)), 6)


def test_a_second_damaged_checkpoint_of_a_step_does_not_replace_the_first(saved, tmp_path):
    root = tmp_path / "checkpoints"
    for _ in range(2):
        shutil.copytree(saved, root, dirs_exist_ok=True)
        flip(root / "6")
        assert_is(restore(root, make_state(0)), 4)
    assert sorted(p.name for p in (root / "damaged").iterdir()) == ["6", "6-1", "6-1.json", "6.json"]


def full_disk(*_):
    raise OSError(28, "No space left on device")


def test_an_error_while_digests_are_written_ends_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "write_atomic", full_disk)
    with Checkpointer(str(tmp_path), CheckpointConfig()) as checkpointer:
        checkpointer.save(1, make_state(1), {}, None)
        with pytest.raises(OSError, match="No space left"):
            checkpointer.wait()
        checkpointer.save(2, make_state(2), {}, None)
        with pytest.raises(OSError, match="No space left"):
            checkpointer.save(3, make_state(3), {}, None)
    with pytest.raises(OSError, match="No space left"), Checkpointer(str(tmp_path), CheckpointConfig()) as checkpointer:
        checkpointer.save(4, make_state(4), {}, None)


def test_the_error_that_ends_a_run_is_not_hidden_by_one_of_its_last_save(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "write_atomic", full_disk)

    def run() -> None:
        with Checkpointer(str(tmp_path), CheckpointConfig()) as checkpointer:
            checkpointer.save(5, make_state(5), {}, None)
            raise FloatingPointError("diverged")

    with pytest.raises(FloatingPointError, match="diverged"):
        run()


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_parameters_that_are_not_finite_are_not_saved(tmp_path, value):
    state = make_state(2)
    bad = state.replace(params=state.params | {"b": state.params["b"].at[1].set(value)})
    with Checkpointer(str(tmp_path), CheckpointConfig(max_to_keep=1)) as checkpointer:
        checkpointer.save(1, make_state(1), {}, None)
        with pytest.raises(FloatingPointError, match="not finite after step 2"):
            checkpointer.save(2, bad, {}, None)
    assert newest_good_step(str(tmp_path)) == 1


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


def test_the_newest_good_step_is_found_and_what_is_passed_over_is_said(saved, tmp_path, capsys):
    root = tmp_path / "checkpoints"
    shutil.copytree(saved, root)
    assert newest_good_step(str(root)) == 6
    assert capsys.readouterr().err == ""
    flip(root / "6")
    assert newest_good_step(str(root)) == 4
    assert re.search(r"step 6 is damaged \(state/.* has another sha256\) and is passed over", capsys.readouterr().err)
    (root / "digests" / "4.json").write_text("")
    assert newest_good_step(str(root)) == 4
    assert "step 4 is loaded, but has no digests" in capsys.readouterr().err
    assert (root / "6").is_dir(), "reading another run's checkpoints changes nothing there"
    with pytest.raises(ValueError, match="no checkpoint that can be trusted"):
        newest_good_step(str(tmp_path / "nowhere"))


def test_a_named_step_is_that_one_or_an_error(saved, tmp_path):
    root = str(tmp_path / "checkpoints")
    shutil.copytree(saved, root)
    digest = hashlib.sha256((saved / "digests" / "6.json").read_bytes()).hexdigest()
    assert checkpoint_digest(root, 6) == digest
    check_named_step(root, 6, digest)
    check_named_step(root, 6, None)
    with pytest.raises(ValueError, match=r"step 6, which manifest\.json names, is damaged: it is another checkpoint"):
        check_named_step(root, 6, "0" * 64)
    shutil.rmtree(tmp_path / "checkpoints" / "digests")
    check_named_step(root, 6, digest)  # the manifest's digest is enough
    with pytest.raises(ValueError, match=r"digests/6\.json is missing or damaged"):
        checkpoint_digest(root, 6)
    shutil.copytree(saved / "digests", tmp_path / "checkpoints" / "digests")
    flip(tmp_path / "checkpoints" / "6")
    for named in (digest, None):
        with pytest.raises(ValueError, match=r"step 6, which .* is damaged: state/.* has another sha256"):
            check_named_step(root, 6, named)
    with pytest.raises(ValueError, match=r"step 8, which manifest\.json names, is missing"):
        check_named_step(root, 8, digest)


def test_parameters_alone_come_back(saved):
    params = restore_params(str(saved), abstract(make_state(0)).params, 4)
    np.testing.assert_array_equal(params["w"], make_state(4).params["w"])


def test_parameters_of_another_shape_are_refused_by_name(saved):
    target = abstract(make_state(0)).params
    target["w"] = jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=target["b"].sharding)
    with pytest.raises(ValueError, match=r"\['w'\] is \(8, 8\) there and \(8, 4\)"):
        restore_params(str(saved), target, 6)


def test_digests_are_sha256_of_the_files(saved):
    recorded = json.loads((saved / "digests" / "6.json").read_text())
    assert len(recorded) == len([p for p in (saved / "6").rglob("*") if p.is_file()])
    for name, digest in recorded.items():
        assert hashlib.sha256((saved / "6" / name).read_bytes()).hexdigest() == digest
