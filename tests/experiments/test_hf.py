"""Export and import as commands: what was trained here goes out and comes back, and mistakes are sentences."""

import json
import shutil

import jax
import numpy as np
import pytest

from jaxgpt import partition, tree
from jaxgpt.interop.checkpoint import load_hf
from jaxgpt.models import decoder
from jaxgpt.partition import MeshConfig
from jaxgpt.runs.load import load_model, read_run
from jaxgpt.runs.manifest import read_manifest
from jaxgpt.runs.weights import open_weights
from tests.experiments.conftest import command, files, here

values = jax.jit(lambda cfg, p, tokens: decoder.values(cfg, p, decoder.hidden_states(cfg, p, tokens)), static_argnums=0)


@pytest.fixture(scope="module")
def exported(finished, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "hf"
    arguments = ["--config=configs/export_hf.py", f"--config.init_from={finished[0]}", f"--workdir={folder}"]
    here("export_hf", *arguments)
    return folder, arguments


def test_a_pretrained_model_goes_out_and_comes_back(finished, exported, tmp_path, capsys):
    pytest.importorskip("tokenizers")
    folder, _ = exported
    out = tmp_path / "imported"
    arguments = ["--config=configs/import_hf.py", f"--config.source={folder}", f"--workdir={out}"]
    here("import_hf", *arguments)
    assert "a llama model" in capsys.readouterr().out
    run, trained = read_run(str(out)), load_model(str(finished[0]), partition.make_mesh(MeshConfig()))
    text = "Ann likes Bob and 6."
    np.testing.assert_array_equal(run.tokenizer.encode(text), trained.tokenizer.encode(text))
    stored = open_weights(str(out))
    params = tree.named_leaves(trained.params)
    assert stored.keys() == params.keys()
    for name, tensor in stored.items():
        np.testing.assert_array_equal(tensor.read(), params[name])
    assert read_manifest(str(out))["stage"] == "import"
    here("import_hf", *arguments)
    assert "is finished" in capsys.readouterr().out
    with pytest.raises(ValueError, match="holds something else"):
        here("import_hf", *arguments, "--config.dtype=bfloat16")


def test_an_export_is_done_once_and_never_over_another(runs, exported, capsys):
    folder, arguments = exported
    before = (folder / "config.json").read_bytes()
    here("export_hf", *arguments)
    assert "is finished" in capsys.readouterr().out
    assert (folder / "config.json").read_bytes() == before
    for other in (f"--config.init_from={runs['sft'].workdir}", "--config.dtype=bfloat16"):
        with pytest.raises(ValueError, match="holds another model"):
            here("export_hf", *arguments, other)


def test_a_reward_model_with_adapters_is_a_classifier(runs, tmp_path):
    workdir = str(runs["reward"].workdir)
    here("export_hf", "--config=configs/export_hf.py", f"--config.init_from={workdir}", f"--workdir={tmp_path}/hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    mesh = partition.make_mesh(MeshConfig())
    ours = load_model(workdir, mesh)
    theirs = load_hf(str(tmp_path / "hf"), mesh)
    tokens = np.arange(16, 32, dtype=np.int32).reshape(2, 8)
    shift = read_manifest(workdir)["reward_shift"]
    expected = np.asarray(values(ours.config, ours.params, tokens)) - shift
    np.testing.assert_allclose(np.asarray(values(*theirs, tokens)) - config["reward_shift"], expected, atol=1e-5)
    assert (tmp_path / "hf" / "chat_template.jinja").read_text().startswith("{{- bos_token }}")


def test_nothing_is_written_over_what_is_there(finished, exported, tmp_path):
    pytest.importorskip("tokenizers")
    source = tmp_path / "source"
    shutil.copytree(exported[0], source)
    (source / "manifest.json").unlink()
    before = files(tmp_path)
    for stage, field, parent in (("import_hf", "source", source), ("export_hf", "init_from", finished[0])):
        with pytest.raises(ValueError, match=f"--workdir={source} is not empty"):
            here(stage, f"--config=configs/{stage}.py", f"--config.{field}={parent}", f"--workdir={source}")
    (source / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ValueError, match="no eos_token"):
        here("import_hf", "--config=configs/import_hf.py", f"--config.source={source}", f"--workdir={tmp_path / 'out'}")
    assert files(tmp_path).keys() == before.keys()
    assert [path for path, raw in files(tmp_path).items() if raw != before[path]] == [
        str(source / "tokenizer_config.json")
    ]


def test_a_mistake_is_one_sentence(exported, tmp_path):
    done = command("import_hf", f"--workdir={tmp_path / 'out'}")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "error: source is required" in done.stderr
    shutil.copytree(exported[0], tmp_path / "copy")
    weights = tmp_path / "copy" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    done = command("import_hf", f"--config.source={tmp_path / 'copy'}", f"--workdir={tmp_path / 'out'}")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "model.safetensors is cut off" in done.stderr
