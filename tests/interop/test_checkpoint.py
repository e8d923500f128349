"""Checkpoints against what transformers computed with them (golden), and there and back without a change."""

import dataclasses
import json
import math
import os
import shutil

import jax
import numpy as np
import pytest

from jaxgpt import tree
from jaxgpt.interop import checkpoint
from jaxgpt.interop.checkpoint import export_checkpoint, import_checkpoint, load_hf
from jaxgpt.interop.families import config_from_hf
from jaxgpt.models import decoder
from jaxgpt.models.config import ModelConfig
from jaxgpt.runs.load import read_run
from jaxgpt.runs.weights import StoredTensor, open_weights
from tests.interop.conftest import GOLDEN, NAMES

CAUSAL = [name for name in NAMES if not name.startswith("reward")]
REWARDS = [name for name in NAMES if name.startswith("reward")]
forward = jax.jit(decoder.forward, static_argnums=0)
values = jax.jit(lambda cfg, p, *batch: decoder.values(cfg, p, decoder.hidden_states(cfg, p, *batch)), static_argnums=0)


@pytest.fixture(scope="module")
def loaded(mesh):
    """Each golden checkpoint, on eight devices."""
    return {name: load_hf(str(GOLDEN / name), mesh) for name in NAMES}


@pytest.mark.parametrize("name", CAUSAL)
def test_logits_are_those_of_transformers(loaded, name):
    config, params = loaded[name]
    expected = np.load(GOLDEN / name / "expected.npz")
    logits = forward(dataclasses.replace(config, dtype="float32"), params, expected["tokens"])
    assert np.abs(expected["logits"]).max() > 0.5
    np.testing.assert_allclose(logits, expected["logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", REWARDS)
def test_rewards_are_those_of_transformers_at_the_last_token(loaded, name, side):
    config, params = loaded[name]
    expected = np.load(GOLDEN / name / "expected.npz")
    tokens = expected["tokens"]
    short = np.pad(tokens[1, 6:], (0, 6) if side == "right" else (6, 0))
    tokens = np.stack([tokens[0], short])
    segments = (tokens != 0).astype(np.int32)
    positions = np.maximum(np.cumsum(segments, 1) - 1, 0)
    last = [19, 13 if side == "right" else 19]
    rewards = np.asarray(values(config, params, tokens, segments, positions))[[0, 1], last]
    np.testing.assert_allclose(rewards, expected[f"logits_{side}"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_there_and_back_is_exact(loaded, trained, name, tmp_path):
    config, params = loaded[name]
    before = open_weights(str(GOLDEN / name))
    dtype = next(iter(before.values())).dtype.name
    export_checkpoint(config, params, trained["char"], None, str(tmp_path), dtype)
    after = open_weights(str(tmp_path))
    assert after.keys() == before.keys()
    for tensor, old in before.items():
        assert after[tensor].dtype == old.dtype
        np.testing.assert_array_equal(after[tensor].read(), old.read())
    assert config_from_hf(json.loads((tmp_path / "config.json").read_text())) == config


@pytest.mark.parametrize("name", ["gpt2", "llama3", "reward"])
def test_an_import_is_an_artifact_under_our_names(loaded, trained, template, name, tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(GOLDEN / name, source)
    trained["char"].save(str(source))
    template.save(str(source))
    config_file = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config_file | {"vocab_size": 320, "reward_shift": 0.25}))
    widen(source)
    out.mkdir()
    manifest = import_checkpoint(str(source), str(out), "bfloat16")
    assert (manifest["stage"], manifest["family"]) == ("import", config_file["model_type"])
    assert manifest["tokenizer_digest"] == trained["char"].digest
    assert manifest.get("reward_shift") == (0.25 if name == "reward" else None)
    run = read_run(str(out))
    assert run.config == dataclasses.replace(loaded[name][0], vocab_size=320)
    assert run.tokenizer.digest == trained["char"].digest
    assert run.template.source == template.source
    written = open_weights(str(out))
    params = tree.named_leaves(loaded[name][1])
    assert written.keys() == params.keys()
    for path, tensor in written.items():
        array = tensor.read().astype(np.float32)
        assert tensor.dtype.name == "bfloat16"
        np.testing.assert_array_equal(array[:32] if path == "embedder/embedding" else array, params[path])


def widen(folder) -> None:
    """Give a checkpoint rows for 320 tokens, which is what the tokenizer needs."""
    tensors = {name: tensor.read() for name, tensor in open_weights(str(folder)).items()}
    for path in folder.glob("model*"):
        path.unlink()
    for name in ("transformer.wte.weight", "model.embed_tokens.weight"):
        if name in tensors:
            tensors[name] = np.concatenate([tensors[name], np.zeros((288, 16), tensors[name].dtype)])
    checkpoint.write_weights(
        str(folder), {n: jax.ShapeDtypeStruct(a.shape, a.dtype) for n, a in tensors.items()}, tensors.__getitem__
    )


@pytest.mark.parametrize("name", ["gpt2", "llama3", "gemma2"])
def test_a_load_reads_no_more_at_a_time_than_a_device_holds_of_a_layer(mesh, name, monkeypatch):
    sizes = []
    read = StoredTensor.read

    def counted(tensor, index=...):
        array = read(tensor, index)
        sizes.append((array.size, math.prod(tensor.shape)))
        return array

    monkeypatch.setattr(StoredTensor, "read", counted)
    _, params = load_hf(str(GOLDEN / name), mesh)
    leaves = tree.named_leaves(params)
    layered = lambda path: leaves[path].shape[0] if path.startswith("layers/") else 1
    parts = {path: leaf.addressable_shards[0].data.size // layered(path) for path, leaf in leaves.items()}
    assert max(size for size, _ in sizes) == max(parts.values())
    # Eight devices, of which some hold the same; the norms and biases are on all.
    assert max(parts.values()) <= max(whole for _, whole in sizes) / 4
    assert sum(size for size, _ in sizes) <= 8 * sum(p * layered(path) for path, p in parts.items())


def test_an_import_holds_one_parameter_at_a_time(trained, tmp_path, monkeypatch):
    shutil.copytree(GOLDEN / "llama3", tmp_path / "source")
    trained["char"].save(str(tmp_path / "source"))
    config_file = json.loads((tmp_path / "source" / "config.json").read_text())
    (tmp_path / "source" / "config.json").write_text(json.dumps(config_file | {"vocab_size": 320}))
    widen(tmp_path / "source")
    sizes = []
    read = checkpoint._Source.read

    def counted(source, path, index, dtype):
        array = read(source, path, index, dtype)
        sizes.append(array.nbytes)
        return array

    monkeypatch.setattr(checkpoint._Source, "read", counted)
    (tmp_path / "out").mkdir()
    import_checkpoint(str(tmp_path / "source"), str(tmp_path / "out"))
    total = sum(os.path.getsize(path) for path in (tmp_path / "out").glob("*.safetensors"))
    assert max(sizes) == 320 * 16 * 2
    assert max(sizes) < total / 1.5


def test_several_files_are_written_beyond_the_limit(loaded, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "MAX_FILE_BYTES", 6_000)
    config, params = loaded["llama3"]
    export_checkpoint(config, params, trained["char"], None, str(tmp_path), "bfloat16")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert open_weights(str(tmp_path)).keys() == open_weights(str(GOLDEN / "llama3")).keys()


def broken(folder, change: str) -> None:
    """Damage a copy of a checkpoint."""
    weights, config = folder / "model.safetensors", folder / "config.json"
    options = json.loads(config.read_text())
    if change == "cut":
        weights.write_bytes(weights.read_bytes()[:-10])
    elif change == "garbage":
        weights.write_bytes(b"no safetensors" * 100)
    elif change == "json":
        config.write_text("{\n  broken")
    elif change == "pickle":
        weights.rename(folder / "pytorch_model.bin")
    elif change == "no config":
        config.unlink()
    else:
        config.write_text(json.dumps(options | json.loads(change)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("cut", "model.safetensors is cut off"),
        ("garbage", "model.safetensors is not a safetensors file"),
        ("pickle", "has no weights"),
        ("json", "config.json, line 2"),
        ("no config", "no config.json"),
        ('{"num_hidden_layers": 3}', "no tensor model.layers.2"),
        ('{"num_hidden_layers": 1}', "model.layers.1.* is no parameter"),
        ('{"attention_bias": false}', r"self_attn\.k_proj\.bias is no parameter"),
        ('{"hidden_size": 32}', r"has the shape \(32, 16\), but by config.json it is \(32, 32\)"),
        ('{"model_type": "falcon"}', "model_type='falcon'"),
    ],
)
def test_a_damaged_or_foreign_checkpoint_is_refused_in_a_sentence(mesh, tmp_path, change, words):
    shutil.copytree(GOLDEN / "llama2", tmp_path / "copy")
    broken(tmp_path / "copy", change)
    with pytest.raises(ValueError, match=words) as error:
        load_hf(str(tmp_path / "copy"), mesh)
    assert "\n" not in str(error.value)


def test_older_files_with_buffers_and_without_a_prefix_are_read(loaded, mesh, tmp_path):
    shutil.copytree(GOLDEN / "gpt2", tmp_path / "copy")
    old = {name.removeprefix("transformer."): t.read() for name, t in open_weights(str(GOLDEN / "gpt2")).items()}
    old |= {"h.0.attn.bias": np.ones((1, 1, 4, 4), np.float32), "lm_head.weight": old["wte.weight"]}
    shapes = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in old.items()}
    checkpoint.write_weights(str(tmp_path / "copy"), shapes, old.__getitem__)
    config, params = load_hf(str(tmp_path / "copy"), mesh)
    assert config == loaded["gpt2"][0]
    jax.tree.map(np.testing.assert_array_equal, params, loaded["gpt2"][1])


def test_a_head_that_differs_from_the_embedding_is_not_dropped(loaded, mesh, tmp_path, monkeypatch):
    """As in transformers 5: what is stored counts. Here it is the embedding doubled, which doubles the logits."""
    shutil.copytree(GOLDEN / "gpt2", tmp_path / "copy")
    stored = {name: tensor.read() for name, tensor in open_weights(str(GOLDEN / "gpt2")).items()}
    shapes = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in stored.items()}
    head = "lm_head.weight"
    shapes[head] = shapes["transformer.wte.weight"]
    stored[head] = 2 * stored["transformer.wte.weight"]
    checkpoint.write_weights(str(tmp_path / "copy"), shapes, stored.__getitem__)
    config, params = load_hf(str(tmp_path / "copy"), mesh)
    assert config == dataclasses.replace(loaded["gpt2"][0], tie_embeddings=False)
    expected = np.load(GOLDEN / "gpt2" / "expected.npz")
    logits = forward(dataclasses.replace(config, dtype="float32"), params, expected["tokens"])
    np.testing.assert_allclose(logits, 2 * expected["logits"], atol=2e-4, rtol=0)

    stored[head] = stored["transformer.wte.weight"].copy()
    stored[head][-1, -1] += 0.5  # one number, of the last row
    checkpoint.write_weights(str(tmp_path / "copy"), shapes, stored.__getitem__)
    monkeypatch.setattr(checkpoint, "_COMPARED", 48)  # three rows of 16 at a time, of 32
    assert not load_hf(str(tmp_path / "copy"), mesh)[0].tie_embeddings


def test_the_bias_of_a_reward_model_becomes_a_shift(loaded, trained, tmp_path):
    config, params = loaded["reward"]
    params = params | {"head": params["head"] | {"bias": np.array([0.75], np.float32)}}
    export_checkpoint(config, params, trained["char"], None, str(tmp_path), reward_shift=1.0)
    # ours - shift = (logit + bias) - shift = logit - (shift - bias)
    assert json.loads((tmp_path / "config.json").read_text())["reward_shift"] == 0.25


def test_an_exported_config_names_special_tokens_and_ends(loaded, trained, template, tmp_path):
    config, params = loaded["llama3"]
    export_checkpoint(config, params, trained["bpe"], template, str(tmp_path))
    written = json.loads((tmp_path / "config.json").read_text())
    assert (written["pad_token_id"], written["bos_token_id"], written["eos_token_id"]) == (0, 1, 2)
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [2, trained["bpe"].special_ids["<|end|>"]]


def test_a_config_that_no_family_has_is_refused_before_anything_is_written(trained, tmp_path):
    with pytest.raises(ValueError, match="model.position='alibi'"):
        export_checkpoint(ModelConfig(vocab_size=400, position="alibi"), {}, trained["bpe"], None, str(tmp_path))
    assert os.listdir(tmp_path) == []
