"""What is loaded from a run's workdir: what its manifest names, or an error."""

import json
import shutil

import jax
import numpy as np
import pytest

from jaxgpt.data.sentencepiece_tokenizer import TokenizerConfig, train_tokenizer
from jaxgpt.finalize.average import AverageConfig, find_members
from jaxgpt.runs.checkpoint import checkpoint_digest
from jaxgpt.runs.load import load_model, read_run
from jaxgpt.runs.manifest import manifest_digest
from tests.finalize.conftest import TEXT, Maker, one_device, random_params


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A finished run with checkpoints of steps 1, 2 and 3, and the parameters of each."""
    make = Maker(tmp_path_factory.mktemp("runs"), train_tokenizer([TEXT], TokenizerConfig("char", vocab_size=400)))
    params = [random_params(make.model, seed) for seed in range(3)]
    folder = make("run", params)
    manifest = json.loads((folder / "manifest.json").read_text())
    named = {"step": 3, "digest": checkpoint_digest(str(folder / "checkpoints"), 3)}
    (folder / "manifest.json").write_text(json.dumps(manifest | {"checkpoint": named}))
    return folder, params


@pytest.fixture
def workdir(made, tmp_path):
    return shutil.copytree(made[0], tmp_path / "run")


def damage(workdir, step: int) -> None:
    """Flip a bit of a step's parameters."""
    largest = max(
        (p for p in (workdir / f"checkpoints/{step}").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size
    )
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)


def is_step(workdir, made, step: int) -> bool:
    loaded, wanted = load_model(str(workdir), one_device()).params, made[1][step - 1]
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(wanted), strict=True))


@pytest.mark.parametrize("names", ["step and digest", "step"])
def test_a_damaged_checkpoint_that_a_manifest_names_is_an_error(made, workdir, names):
    if names == "step":
        content = json.loads((workdir / "manifest.json").read_text())
        del content["checkpoint"]
        (workdir / "manifest.json").write_text(json.dumps(content))
    assert is_step(workdir, made, 3)
    damage(workdir, 3)
    with pytest.raises(
        ValueError, match=r"step 3, which manifest\.json names, is damaged: state/.* has another sha256"
    ):
        load_model(str(workdir), one_device())
    run = read_run(str(workdir))
    with pytest.raises(ValueError, match="step 3, which"):
        find_members(run, AverageConfig("last_k", k=2))


def test_a_checkpoint_that_was_put_in_the_place_of_the_named_one_is_an_error(workdir):
    root = workdir / "checkpoints"
    shutil.rmtree(root / "3")
    shutil.copytree(root / "2", root / "3")
    shutil.copy(root / "digests/2.json", root / "digests/3.json")
    with pytest.raises(ValueError, match="another checkpoint than the one that was saved when the run finished"):
        load_model(str(workdir), one_device())
    shutil.rmtree(root / "3")
    with pytest.raises(ValueError, match=r"step 3, which manifest\.json names, is missing"):
        load_model(str(workdir), one_device())


def test_a_newer_checkpoint_than_the_named_one_is_not_loaded(made, workdir):
    content = json.loads((workdir / "manifest.json").read_text())
    named = {"step": 2, "digest": checkpoint_digest(str(workdir / "checkpoints"), 2)}
    (workdir / "manifest.json").write_text(json.dumps(content | {"checkpoint": named, "step": 2}))
    assert is_step(workdir, made, 2)
    assert [member.step for member in find_members(read_run(str(workdir)), AverageConfig("last_k", k=2))] == [1, 2]


def test_of_an_unfinished_run_the_newest_good_step_is_loaded_and_said(made, workdir, capsys):
    (workdir / "manifest.json").unlink()
    assert is_step(workdir, made, 3)
    assert capsys.readouterr().err == ""
    damage(workdir, 3)
    assert is_step(workdir, made, 2)
    assert "step 3 is damaged" in capsys.readouterr().err


def test_the_checkpoint_is_no_part_of_a_manifests_digest(made):
    """The same run done again names its parent by the same digest, though orbax's files have other bytes."""
    content = json.loads((made[0] / "manifest.json").read_text())
    other = content | {"checkpoint": {"step": 3, "digest": "0" * 64}}
    assert manifest_digest(content) == manifest_digest(other) != manifest_digest(content | {"step": 4})
