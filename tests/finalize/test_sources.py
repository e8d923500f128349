"""What a run may be built on: runs, artifacts and imports that are not what they say are refused in one sentence."""

import dataclasses
import json
import pathlib
import shutil

import pytest

from experiments.shared import errors
from experiments.shared.score import score_file
from jaxgpt import tree
from jaxgpt.finalize.config import FinalizeConfig
from jaxgpt.finalize.publish import publish
from jaxgpt.interop.checkpoint import export_checkpoint, import_checkpoint
from jaxgpt.models.config import LoraConfig, ModelConfig
from jaxgpt.rl.config import RLConfig
from jaxgpt.rl.models import read_reward_model
from jaxgpt.runs.load import load_plain, read_run, trainable
from jaxgpt.train.config import RunConfig
from jaxgpt.train.finetune import start_from
from tests.finalize.conftest import Maker, one_device, random_params
from tests.finalize.test_publish import DIGESTS, WEIGHTS, change, flip, other_tokenizer, sealed


def models(make: Maker) -> dict[str, ModelConfig]:
    """A policy with rows for more ids than the tokenizer has, and a reward model."""
    policy = dataclasses.replace(make.model, qkv_bias=False, vocab_size=make.tokenizer.vocab_size + 8)
    return {"policy": policy, "reward": dataclasses.replace(policy, head="scalar")}


def as_artifact(run: pathlib.Path, folder: pathlib.Path) -> None:
    publish(FinalizeConfig(init_from=str(run)), str(folder), lambda *_: "")


def as_import(run: pathlib.Path, folder: pathlib.Path) -> None:
    pytest.importorskip("tokenizers")
    source, exported = read_run(str(run)), folder.with_name(f"{folder.name}-hf")
    for path in (exported, folder):
        path.mkdir()
    export_checkpoint(*load_plain(source, one_device()), source.tokenizer, source.template, str(exported))
    import_checkpoint(str(exported), str(folder))


@pytest.fixture(scope="module")
def runs(make) -> dict[str, pathlib.Path]:
    """A policy and a reward model as training leaves them."""
    said = {"policy": {"stage": "sft"}, "reward": {"stage": "reward", "reward_shift": 0.25}}
    return {
        role: make(f"{role}-run", [random_params(model, 1)], model=model, template="roles", **said[role])
        for role, model in models(make).items()
    }


@pytest.fixture(scope="module", params=["run", "artifact", "import"])
def source(request, runs, tmp_path_factory) -> dict[str, pathlib.Path]:
    """The same two as what may be built on."""
    if request.param == "run":
        return runs
    root, write = tmp_path_factory.mktemp(request.param), {"artifact": as_artifact, "import": as_import}[request.param]
    for role, run in runs.items():
        write(run, root / role)
    return {role: root / role for role in runs}


def built_on(policy: pathlib.Path, reward: pathlib.Path) -> None:
    """What PPO reads before its first step."""
    config = RLConfig(init_from=str(policy), reward_model=str(reward), require_report_card=False)
    start = start_from(config)
    rewards = read_reward_model(config, start)
    for run in (start.parent, rewards.run):
        load_plain(run, one_device())


def assert_sentence(error: Exception, folder: pathlib.Path) -> None:
    """That commands print it, and exit with 2."""
    assert errors.is_ours(error)
    assert str(folder) in str(error)
    assert "\n" not in str(error)


def reseal(folder: pathlib.Path) -> None:
    """Let an artifact's manifest name the files as they are now; what else it says must then tell."""
    if "files" in json.loads((folder / "manifest.json").read_text()):
        sealed(folder)


def another_tokenizer(folder: pathlib.Path) -> None:
    if (folder / "tokenizer.model").exists():
        other_tokenizer(folder)
    else:
        change(folder, "tokenizer_config.json", pad_token="<eos>")
    reseal(folder)


def another_architecture(folder: pathlib.Path) -> None:
    model = json.loads((folder / "config.json").read_text())["model"]
    change(folder, "config.json", model=model | {"mlp_dim": 32})
    reseal(folder)


def another_template(folder: pathlib.Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    reseal(folder)


def damage_weights(folder: pathlib.Path) -> None:
    files = [folder / WEIGHTS] if (folder / WEIGHTS).exists() else list((folder / "checkpoints/1/state").rglob("*"))
    for path in files:
        if path.is_file() and path.stat().st_size > 9:
            flip(path, -9)


KINDS = {
    "tokenizer": (another_tokenizer, f"has the tokenizer {DIGESTS}"),
    "template": (another_template, f"has the chat template {DIGESTS}"),
    "vocabulary": (lambda folder: change(folder, "manifest.json", vocab_size=9), "vocabulary of [0-9]+ pieces.* of 9"),
    "unfinished": (lambda folder: (folder / "manifest.json").unlink(), "no manifest.json.*has not finished"),
    "missing": (shutil.rmtree, "(init_from|reward_model): .*no config.json"),
    "no JSON": (lambda folder: (folder / "config.json").write_text("{\n  broken"), "config.json, line 2: not valid JSON"),
    "weights": (damage_weights, f"{WEIGHTS} is damaged.*{DIGESTS}|which manifest.json names, is damaged"),
    "architecture": (another_architecture, r"(another architecture|other parameters).*(\[2, 24, 16\]|\(2, 24, 16\)).*32"),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_what_it_says_is_refused_in_one_sentence(source, tmp_path, kind):
    damage, words = KINDS[kind]
    for role, folder in source.items():
        copy = tmp_path / role
        shutil.copytree(folder, copy)
        damage(copy)
        with pytest.raises(ValueError, match=words) as error:
            built_on(**source | {role: copy})
        assert_sentence(error.value, copy)


BASE_KINDS = {
    "digest": (lambda folder: change(folder, "manifest.json", step=99), f"the base {DIGESTS}"),
    "missing": (shutil.rmtree, "stand on the model in .*, which is missing"),
    "weights": KINDS["weights"],
}


@pytest.mark.parametrize("role", ["policy", "reward"])
def test_adapters_whose_base_is_gone_or_another_are_refused_in_one_sentence(make, source, tmp_path, role):
    base, model = tmp_path / "base", dataclasses.replace(models(make)[role], lora=LoraConfig(rank=2))
    shutil.copytree(source["policy"], base)
    adapters = tree.split(random_params(model, 5), trainable(model))[0]
    run = make(
        f"{role}-on-{source['policy'].parent.name}", [adapters], model=model, parent=base, stage="sft",
        template=str(base / "chat_template.jinja"), tokenizer=read_run(str(base)).tokenizer, reward_shift=0.0,
    )  # fmt: skip
    built_on(**source | {role: run})
    for damage, words in BASE_KINDS.values():
        damage(base)
        with pytest.raises(ValueError, match=words) as error:
            built_on(**source | {role: run})
        assert_sentence(error.value, base)
        shutil.rmtree(base, ignore_errors=True)
        shutil.copytree(source["policy"], base)


def test_a_reward_model_that_cannot_read_all_ids_of_the_policy_is_refused(make, runs, tmp_path):
    size = make.tokenizer.vocab_size
    shutil.copytree(runs["reward"], tmp_path / "reward")
    model = json.loads((tmp_path / "reward/config.json").read_text())["model"]
    change(tmp_path / "reward", "config.json", model=model | {"vocab_size": size})
    with pytest.raises(ValueError, match=f"reward_model: .*model.vocab_size={size}, but the policy .* {size + 8} ids"):
        built_on(runs["policy"], tmp_path / "reward")


def test_scores_need_a_template(runs, tmp_path):
    shutil.copytree(runs["reward"], tmp_path / "reward")
    (tmp_path / "reward/chat_template.jinja").unlink()
    change(tmp_path / "reward", "manifest.json", chat_template_digest=None)
    with pytest.raises(ValueError, match=f"--workdir={tmp_path}/reward has no chat template"):
        score_file(str(tmp_path / "reward"), "answers.jsonl", "", RunConfig())
