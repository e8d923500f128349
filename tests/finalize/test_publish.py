"""Artifacts: what is in them, that they are what they were made from, and everything that is refused."""

import functools
import json
import pathlib
import re
import shutil

import jax
import numpy as np
import pytest

from jaxgpt import partition, tree
from jaxgpt.data.sentencepiece_tokenizer import TokenizerConfig, train_tokenizer
from jaxgpt.finalize import publish as publishing
from jaxgpt.finalize.average import AverageConfig
from jaxgpt.finalize.config import FinalizeConfig, HeldOutConfig
from jaxgpt.finalize.encode import Encoder
from jaxgpt.finalize.publish import finished, publish
from jaxgpt.models import decoder
from jaxgpt.models.config import LoraConfig, ModelConfig
from jaxgpt.partition import MeshConfig
from jaxgpt.reporting.model_card import model_card
from jaxgpt.runs import checkpoint
from jaxgpt.runs.artifact import digests
from jaxgpt.runs.load import abstract_params, load_model, load_params, load_plain, read_run
from jaxgpt.runs.weights import open_weights, write_weights
from tests.finalize.conftest import TEXT, one_device, random_params

FILES = {"README.md", "config.json", "generation.json", "manifest.json", "model.safetensors", "tokenizer.model"}


def card(manifest: dict, config: dict) -> str:
    return model_card("/data/runs/artifact", manifest, config)


def made(source, folder, **fields) -> pathlib.Path:
    publish(FinalizeConfig(init_from=str(source), **fields), str(folder), card)
    return folder


def params_of(folder, mesh=None) -> dict[str, np.ndarray]:
    return {
        k: np.asarray(v) for k, v in tree.named_leaves(load_model(str(folder), mesh or one_device()).params).items()
    }


def manifest_of(folder) -> dict:
    return json.loads((pathlib.Path(folder) / "manifest.json").read_text())


def change(folder, name: str, **fields) -> None:
    path = pathlib.Path(folder) / name
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def assert_equal(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)


@pytest.fixture(scope="module")
def artifacts(pretrained, tmp_path_factory) -> dict[str, pathlib.Path]:
    """The same run in each dtype."""
    root = tmp_path_factory.mktemp("artifacts")
    kwargs = {"int4": {"group_size": 8, "max_loss_increase": 0.1}}
    dtypes = ("float32", "bfloat16", "int8", "int4")
    return {dtype: made(pretrained, root / dtype, dtype=dtype, **kwargs.get(dtype, {})) for dtype in dtypes}


def test_a_float32_artifact_is_the_last_checkpoint_to_the_bit(pretrained, make, artifacts):
    folder = artifacts["float32"]
    assert {path.name for path in folder.iterdir()} == FILES
    assert {path.name for path in folder.parent.iterdir()} == set(artifacts)  # no half-written folders
    assert_equal(params_of(folder), tree.named_leaves(random_params(make.model, 2)))
    found = manifest_of(folder)
    assert found["stage"] == "finalize"
    assert found["source_stage"] == "pretrain"
    assert found["parents"] == {"init_from": {"path": str(pretrained), "digest": make.digest(pretrained)}}
    assert found["final_metrics"]["eval/loss"] == 5.5
    assert found["proof"] == {
        "logits_equal_reloaded": True, "max_logit_difference_from_source": 0.0, "greedy_tokens_equal_reloaded": True,
        "greedy_tokens_equal_to_source": 1.0,
    }  # fmt: skip
    generation = json.loads((folder / "generation.json").read_text())
    assert generation["stop_ids"] == [make.tokenizer.eos_id]
    assert generation["temperature"] == 0.7


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "int4"])
def test_stored_values_are_within_the_bound_of_their_dtype(make, artifacts, dtype):
    """The reference goes over every output channel, and over every group of its inputs, in float64."""
    exact, stored = tree.named_leaves(random_params(make.model, 2)), params_of(artifacts[dtype])
    assert exact.keys() == stored.keys()
    for name, leaf in exact.items():
        w, back = np.float64(leaf), np.float64(stored[name])
        if not name.endswith(("kernel", "embedding")) and dtype != "bfloat16":
            np.testing.assert_array_equal(w, back, err_msg=name)
            continue
        if dtype == "bfloat16":
            assert (np.abs(w - back) <= np.abs(w) * 2.0**-8).all()
            continue
        if name.startswith("layers/"):  # [L, inputs..., outputs...] -> [outputs, inputs]
            inputs = (1, 2) if "/out/" in name else (1,)
            rest = [axis for axis in range(w.ndim) if axis not in inputs]
            rows = lambda x, rest=rest, inputs=inputs: x.transpose(*rest, *inputs).reshape(
                int(np.prod([x.shape[a] for a in rest])), -1
            )
        else:
            rows = lambda x, name=name: x.T if name == "head/kernel" else x
        w, back = rows(w), rows(back)
        size = w.shape[1] if dtype == "int8" else 4 if "/out/" in name else 8  # heads of 4 are smaller than a group
        for begin in range(0, w.shape[1], size):
            part = slice(begin, begin + size)
            scale = np.abs(w[:, part]).max(axis=1) / (127 if dtype == "int8" else 7)
            assert (np.abs(w - back)[:, part].max(axis=1) <= scale / 2 * (1 + 1e-4)).all(), name
            assert (np.abs(w - back)[:, part].max(axis=1) > scale / 100).mean() > 0.5, name


@pytest.mark.parametrize("dtype", ["float32", "int8", "int4"])
def test_eight_devices_read_what_one_reads(artifacts, dtype):
    mesh = partition.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    assert_equal(params_of(artifacts[dtype], mesh), params_of(artifacts[dtype]))


def test_the_loss_it_costs_is_measured_and_written_down(artifacts, pretrained):
    for dtype in ("bfloat16", "int8", "int4"):
        found = manifest_of(artifacts[dtype])["held_out"]
        assert found["stage"] == "pretrain"
        loss = found["loss"]
        assert found["relative_increase"] == pytest.approx(loss["artifact"] / loss["source"] - 1)
        text = (artifacts[dtype] / "README.md").read_text()
        assert f"{loss['source']:.6f}" in text
        assert f"{loss['artifact']:.6f}" in text
        assert f"`{pretrained.name}`" in text
        assert str(pretrained.parent) not in text, "a card is published; paths of this machine are nobody's business"
    assert abs(manifest_of(artifacts["int8"])["held_out"]["relative_increase"]) < 0.005
    assert "held_out" not in manifest_of(artifacts["float32"])


def test_the_held_out_loss_is_the_mean_over_the_texts_own_tokens(make, artifacts):
    """Document by document, without packing, in float64."""
    model = load_model(str(artifacts["int8"]), one_device())
    forward = jax.jit(functools.partial(decoder.forward, model.config))
    losses = []
    for document in TEXT.split("\n\n"):
        ids = make.tokenizer.encode(document, add_bos=True, add_eos=True)
        logits = np.float64(forward(model.params, ids[None, :-1]))[0]
        logits -= logits.max(axis=-1, keepdims=True)
        logprobs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        losses += list(-logprobs[np.arange(len(ids) - 1), ids[1:]])
    assert manifest_of(artifacts["int8"])["held_out"]["loss"]["artifact"] == pytest.approx(np.mean(losses), rel=1e-5)


def test_int8_is_3_5_times_smaller_than_float32_at_the_size_of_the_quickstart_model(monkeypatch):
    model = ModelConfig(vocab_size=2048, num_layers=4, embed_dim=128, num_heads=4, mlp_dim=384)
    named = tree.named_leaves(abstract_params(model, one_device()))
    size = {}
    for dtype in ("float32", "int8", "int4"):
        encoder, header = Encoder(model, dtype, 32), {}
        for name, leaf in named.items():
            header |= encoder.layout(name, leaf.shape)
        data = sum(np.prod(t.shape) * np.dtype(t.dtype).itemsize for t in header.values())
        size[dtype] = data + 110 * len(header)  # a line of the header
    assert size["float32"] / size["int8"] > 3.8
    assert size["float32"] / size["int4"] > 6.2


def test_adapters_are_merged(make, pretrained, tmp_path):
    lora = LoraConfig(rank=2, alpha=6.0, target_modules="query|mlp/down")
    model = ModelConfig(**{**vars(make.model), "lora": lora})
    whole = tree.named_leaves(random_params(model, 5))
    adapters = {name: leaf for name, leaf in whole.items() if "lora" in name}
    run = make("adapters", [tree.from_named(adapters)], model=model, stage="sft", parent=pretrained, template="roles")
    folder = made(run, tmp_path / "merged")
    config, merged = load_plain(read_run(str(run)), one_device())
    assert config == read_run(str(folder)).config
    assert config.lora.rank == 0
    found = params_of(folder)
    assert_equal(found, {k: np.asarray(v) for k, v in tree.named_leaves(merged).items()})
    base = tree.named_leaves(random_params(make.model, 2))
    for module, equation in (("attention/query", "ldz,lznh->ldnh"), ("mlp/down", "lfz,lzd->lfd")):
        name = next(n for n in base if n.endswith(f"{module.split('/')[-1]}/kernel"))
        prefix = name.removesuffix("kernel")
        a, b = np.float64(adapters[f"{prefix}lora_a"]), np.float64(adapters[f"{prefix}lora_b"])
        expected = np.float64(base[name]) + 3.0 * np.einsum(equation, a, b)
        np.testing.assert_allclose(found[name], expected, atol=1e-6)
    assert (folder / "chat_template.jinja").read_bytes() == (run / "chat_template.jinja").read_bytes()
    assert len(json.loads((folder / "generation.json").read_text())["stop_ids"]) == 2
    assert [entry["stage"] for entry in manifest_of(folder)["lineage"]] == ["sft", "pretrain"]
    # An artifact is a source like any other, and remembers where it comes from when the runs are gone.
    (tmp_path / "moved").mkdir()
    shutil.copytree(folder, tmp_path / "moved" / "merged")
    change(tmp_path / "moved" / "merged", "config.json", init_from="/nowhere")
    sealed(tmp_path / "moved" / "merged")
    again = made(tmp_path / "moved" / "merged", tmp_path / "again")
    assert_equal(params_of(again), found)
    assert [entry["stage"] for entry in manifest_of(again)["lineage"]] == ["finalize", "sft", "pretrain"]


def test_averages_are_those_of_numpy(make, pretrained, tmp_path):
    trees = [tree.named_leaves(random_params(make.model, seed)) for seed in (0, 1, 2, 7)]
    mean = lambda parts: {name: np.mean([np.float64(part[name]) for part in parts], axis=0) for name in parts[0]}
    other = make("other", [tree.from_named(trees[3])])
    cases = {
        "last_k": (AverageConfig("last_k", k=2), mean(trees[1:3])),
        "soup": (AverageConfig("soup", runs=(str(other),)), mean([trees[2], trees[3]])),
        "ema": (AverageConfig("ema"), {name: value / 2 for name, value in trees[2].items()}),
    }  # fmt: skip
    for name, (average, expected) in cases.items():
        folder = made(pretrained, tmp_path / name, average=average, max_loss_increase=None)
        for leaf, value in params_of(folder).items():
            np.testing.assert_allclose(value, expected[leaf], rtol=0, atol=1e-6, err_msg=f"{name}: {leaf}")
        assert set(manifest_of(folder)["held_out"]["loss"]) == {"source", "averaged", "artifact"}
    assert manifest_of(tmp_path / "last_k")["average"] == {"kind": "last_k", "steps": [2, 3]}
    soup = manifest_of(tmp_path / "soup")
    assert set(soup["parents"]) == {"init_from", "average.runs[0]"}
    assert [entry["path"] for entry in soup["lineage"]] == [str(pretrained), str(other)]


@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_the_policy_is_chosen_from_the_state_of_reinforcement_learning(make, tmp_path, stage):
    params = random_params(make.model, 9)
    run = make(stage, [params], stage=stage, policy=True, ema=True)
    assert_equal(params_of(made(run, tmp_path / "out")), tree.named_leaves(params))
    folder = made(run, tmp_path / "ema", average=AverageConfig("ema"), max_loss_increase=None)
    assert_equal(params_of(folder), {name: leaf / 2 for name, leaf in tree.named_leaves(params).items()})


def test_a_reward_model_keeps_what_makes_it_one(make, tmp_path):
    model = ModelConfig(**{**vars(make.model), "head": "scalar", "tie_embeddings": True})
    report_card = {"passed": True}
    run = make("reward", [random_params(model, 3)], model=model, stage="reward", template="roles", reward_shift=0.25,
               report_card=report_card)  # fmt: skip
    folder = made(run, tmp_path / "out", dtype="int8", max_loss_increase=None)
    found = manifest_of(folder)
    assert found["reward_shift"] == 0.25
    assert found["report_card"] == report_card
    assert not (folder / "generation.json").exists()
    stored = open_weights(str(folder))
    assert stored["head/kernel"].dtype == np.float32
    assert stored["embedder/embedding"].dtype == np.int8
    assert "reward_model=artifact" in (folder / "README.md").read_text()


def flip(path: pathlib.Path, where: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[where] ^= 1
    path.write_bytes(raw)


def cut(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def sealed(folder: pathlib.Path) -> None:
    """Let the manifest name the files as they are now, as somebody would who means to deceive."""
    change(folder, "manifest.json", files=digests(str(folder)))


def foreign(folder: pathlib.Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["model"]["mlp_dim"] = 32
    (folder / "config.json").write_text(json.dumps(config))
    sealed(folder)


def deeper(folder: pathlib.Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["model"]["tie_embeddings"] = True
    (folder / "config.json").write_text(json.dumps(config))
    sealed(folder)


def other_tokenizer(folder: pathlib.Path) -> None:
    train_tokenizer([TEXT + "xyz"], TokenizerConfig(model_type="char", vocab_size=400)).save(str(folder))
    sealed(folder)


def other_template(folder: pathlib.Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    sealed(folder)


def rewrite_config(folder: pathlib.Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    sealed(folder)


WEIGHTS = "model.safetensors"
DIGESTS = "[0-9a-f]{12}.*[0-9a-f]{12}"
DAMAGE = {
    "tokenizer": (other_tokenizer, f"tokenizer {DIGESTS}"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.model").unlink(), "tokenizer.model"),
    "template": (other_template, "template [0-9a-f]{12}.*none"),
    "a file that nobody names": (lambda folder: (folder / "chat_template.jinja").write_text("{{ messages }}"),
                                 "chat_template.jinja is not among the files"),
    "a changed config": (lambda folder: change(folder, "config.json", init_from=""), f"config.json is damaged.*{DIGESTS}"),
    "a changed tokenizer": (lambda folder: flip(folder / "tokenizer.model", 9), f"tokenizer.model is damaged.*{DIGESTS}"),
    "changed defaults": (lambda folder: flip(folder / "generation.json", 3), f"generation.json is damaged.*{DIGESTS}"),
    "no digests": (lambda folder: change(folder, "manifest.json", files=[]), "manifest.json has no digests of the files"),
    "vocabulary": (lambda folder: change(folder, "manifest.json", vocab_size=9), "vocabulary of [0-9]+ pieces.* of 9"),
    "special ids": (lambda folder: change(folder, "manifest.json", special_ids={"<pad>": 1}), "another vocabulary"),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "no manifest.json.*has not finished"),
    "a flipped byte of data": (lambda folder: flip(folder / WEIGHTS, -9), f"{WEIGHTS} is damaged.*{DIGESTS}"),
    "a flipped byte of the header": (lambda folder: flip(folder / WEIGHTS, 20), f"{WEIGHTS} is damaged.*{DIGESTS}"),
    "cut off": (lambda folder: cut(folder / WEIGHTS), f"{WEIGHTS} is damaged.*{DIGESTS}"),
    "weights that nobody names": (lambda folder: shutil.copy(folder / WEIGHTS, folder / "more.safetensors"),
                                  "more.safetensors is not among"),
    "another shape": (foreign, r"another architecture.* layers/mlp/down/kernel is .*\[2, 24, 16\].* and \[2, 32, 16\]"),
    "another head": (deeper, "another architecture.* head/kernel is .* and missing in the config"),
    "a foreign config": (lambda folder: rewrite_config(folder, '{"model_type": "llama"}'), "no section model"),
    "a foreign field": (lambda folder: rewrite_config(folder, '{"model": {"num_layer": 2}}'),
                        "model.num_layer; the nearest field is model.num_layers"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_an_artifact_that_is_not_what_it_says_is_refused_in_one_sentence(artifacts, tmp_path, kind):
    damage, words = DAMAGE[kind]
    folder = tmp_path / "artifact"
    shutil.copytree(artifacts["int8"], folder)
    load_model(str(folder), one_device())
    damage(folder)
    with pytest.raises(ValueError, match=words) as error:
        load_model(str(folder), one_device())
    assert str(folder) in str(error.value) or kind == "a foreign field"
    assert "\n" not in str(error.value)


def test_a_missing_file_of_several_is_named(artifacts, tmp_path, monkeypatch):
    monkeypatch.setattr(publishing, "write_weights", functools.partial(write_weights, max_file_bytes=4000))
    folder = made(artifacts["float32"], tmp_path / "parts")
    assert len(manifest_of(folder)["files"]) > 6
    assert_equal(params_of(folder), params_of(artifacts["float32"]))
    (second,) = folder.glob("model-00002*")
    second.unlink()
    with pytest.raises(ValueError, match=f"{second.name} is missing"):
        load_model(str(folder), one_device())


def test_a_run_whose_parent_is_gone_or_another_is_refused(make, pretrained, tmp_path):
    parent = tmp_path / "parent"
    shutil.copytree(pretrained, parent)
    run = make("child", [random_params(make.model, 1)], stage="sft", parent=parent, template="roles")
    made(run, tmp_path / "good")
    change(parent, "manifest.json", step=99)
    with pytest.raises(ValueError, match=f"init_from={parent} with the digest {DIGESTS}"):
        made(run, tmp_path / "bad")
    shutil.rmtree(parent)
    with pytest.raises(ValueError, match=f"init_from={parent}, is missing"):
        made(run, tmp_path / "bad")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["good"]


def test_a_source_that_is_not_what_its_manifest_says_is_refused(pretrained, tmp_path):
    for kind in ("tokenizer", "template", "vocabulary", "no manifest"):
        damage, words = DAMAGE[kind]
        run = tmp_path / kind.replace(" ", "_")
        shutil.copytree(pretrained, run)
        damage(run)
        with pytest.raises(ValueError, match=words):
            made(run, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_a_soup_of_unlike_models_and_too_few_checkpoints_are_refused_by_name(make, pretrained, artifacts, tmp_path):
    deep = ModelConfig(**{**vars(make.model), "num_layers": 1})
    turned = ModelConfig(**{**vars(make.model), "rope": type(deep.rope)(theta=500.0)})
    strange = train_tokenizer([TEXT + "xyz"], TokenizerConfig(model_type="char", vocab_size=400))
    same_size = ModelConfig(**{**vars(make.model), "vocab_size": strange.vocab_size})
    runs = {
        "model.num_layers=1": make("deep", [random_params(deep, 1)], model=deep),
        "model.rope=.*500": make("turned", [random_params(turned, 1)], model=turned),
        f"tokenizer {DIGESTS}": make("strange", [random_params(same_size, 1)], model=same_size, tokenizer=strange),
        "chat template": make("template", [random_params(make.model, 1)], template="plain"),
    }
    for words, run in runs.items():
        average = AverageConfig("soup", runs=(str(artifacts["float32"]), str(run)))
        with pytest.raises(ValueError, match=rf"average.runs\[1\]: {run} has (the )?{words}"):
            made(pretrained, tmp_path / "out", average=average)
    with pytest.raises(ValueError, match=r"average.k=4, but .* keeps 3 good .*\[1, 2, 3\]"):
        made(pretrained, tmp_path / "out", average=AverageConfig("last_k", k=4))
    with pytest.raises(ValueError, match="optimizer.ema_decay was 0"):
        made(runs["chat template"], tmp_path / "out", average=AverageConfig("ema"))
    with pytest.raises(ValueError, match="artifact, with one set of weights"):
        made(artifacts["int8"], tmp_path / "out", average=AverageConfig("last_k"))
    with pytest.raises(ValueError, match="average.runs"):
        AverageConfig("soup")
    assert not list(tmp_path.iterdir())


def test_nothing_is_published_that_costs_too_much_or_is_not_what_was_written(make, pretrained, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="max_loss_increase=-1, but .* nothing is published"):
        made(pretrained, tmp_path / "out", dtype="int8", max_loss_increase=-1.0)
    nan = random_params(make.model, 1)
    nan["final_norm"]["scale"] = nan["final_norm"]["scale"].at[3].set(np.nan)
    monkeypatch.setattr(checkpoint, "_all_finite", lambda params: True)  # a run would not save it
    with pytest.raises(ValueError, match="final_norm/scale holds values that are not finite"):
        made(make("nan", [nan]), tmp_path / "out", max_loss_increase=None)
    with pytest.raises(ValueError, match="group_size=10 does not divide .*; the nearest group_size is 8"):
        made(pretrained, tmp_path / "out", dtype="int4", group_size=10)
    load = publishing.load_artifact
    for amount, words in ((1e-6, "does not give the logits of the parameters that were written"), (np.nan, "by nan")):
        wrong = lambda *a, amount=amount: jax.tree.map(lambda x: x + amount, load(*a))
        monkeypatch.setattr(publishing, "load_artifact", wrong)
        with pytest.raises(ValueError, match=words):
            made(pretrained, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_killed_finalization_leaves_no_artifact_and_does_not_disturb_the_next(pretrained, tmp_path, monkeypatch):
    def interrupt(manifest, config):
        folder = tmp_path / "out.partial"
        assert (folder / WEIGHTS).exists()
        shutil.copytree(folder, tmp_path / "left")
        raise KeyboardInterrupt

    config = FinalizeConfig(init_from=str(pretrained))
    with pytest.raises(KeyboardInterrupt):
        publish(config, str(tmp_path / "out"), interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["left"]
    with pytest.raises(ValueError, match="has not finished"):
        load_model(str(tmp_path / "left"), one_device())
    (tmp_path / "left" / "folder").mkdir()
    (tmp_path / "left").rename(tmp_path / "out.partial")
    made(pretrained, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES


def test_a_finished_artifact_says_so_and_another_one_is_refused(pretrained, artifacts, tmp_path):
    folder, source = tmp_path / "out", tmp_path / "source"
    shutil.copytree(pretrained, source)
    config = FinalizeConfig(init_from=str(source))
    assert finished(config, str(folder)) is None
    made(source, folder)
    assert finished(config, str(folder)) == manifest_of(folder)
    with pytest.raises(ValueError, match="finalize.dtype='int8' differs from 'float32'"):
        finished(FinalizeConfig(init_from=str(source), dtype="int8"), str(folder))
    change(source, "manifest.json", step=99)
    with pytest.raises(ValueError, match=f"init_from: {source} has the digest {DIGESTS}"):
        finished(config, str(folder))
    with pytest.raises(ValueError, match="holds a run of pretrain"):
        finished(config, str(source))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        made(source, tmp_path / "full")


def test_held_out_data_are_asked_for_where_the_sources_are_gone(make, tmp_path):
    run = make("without_data", [random_params(make.model, 1)])
    config = json.loads((run / "config.json").read_text())
    config["data"]["eval"] = str(tmp_path / "gone.txt")
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=re.compile("data.eval is needed.*gone.txt.*max_loss_increase=none")):
        made(run, tmp_path / "out", dtype="int8")
    folder = made(run, tmp_path / "out", dtype="int8", max_loss_increase=None)
    assert "held_out" not in manifest_of(folder)
    folder = made(run, tmp_path / "given", dtype="int8", data=HeldOutConfig(str(make.text)))
    assert manifest_of(folder)["held_out"]["rows"] > 0


def test_parameters_alone_are_loaded_from_an_artifact(make, artifacts):
    abstract = abstract_params(make.model, one_device())
    assert_equal(tree.named_leaves(load_params(str(artifacts["int8"]), abstract)), params_of(artifacts["int8"]))
