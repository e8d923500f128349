"""Finalizing real runs from the command line, and what the stages do with the artifacts."""

import concurrent.futures
import json
import pathlib
import shutil

import pytest

from jaxgpt.finalize.config import FinalizeConfig
from jaxgpt.finalize.publish import publish
from jaxgpt.rl.config import RLConfig
from jaxgpt.rl.models import read_reward_model
from jaxgpt.train.finetune import start_from
from tests.experiments.conftest import PROMPT, command, files, finetuning, here
from tests.experiments.test_finetune import digest, manifest
from tests.experiments.test_pretrain import rows

GREEDY = ("--config=configs/generate.py:greedy", "--config.max_new_tokens=8")


def finalize(source, workdir, preset="float32", *flags):
    return command(
        "finalize", f"--config=configs/finalize.py:{preset}", f"--workdir={workdir}", f"--config.init_from={source}", *flags
    )  # fmt: skip


@pytest.fixture(scope="module")
def artifacts(runs, tmp_path_factory) -> dict[str, pathlib.Path]:
    """The adapted model and the reward model, which has adapters on adapters, as float32."""
    root = tmp_path_factory.mktemp("artifacts")
    names = ("lora", "reward")
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        made = pool.map(lambda name: finalize(runs[name].workdir, root / name), names)
    for name, done in zip(names, made, strict=True):
        assert done.returncode == 0, done.stderr
        assert f"Published {root / name}" in done.stdout
    return {name: root / name for name in names}


def test_int8_costs_less_than_half_a_percent_and_a_finished_one_says_so(runs, tmp_path):
    done = finalize(runs["lora"].workdir, tmp_path / "out", "int8")
    assert done.returncode == 0, done.stderr
    found = manifest(tmp_path / "out")
    assert found["held_out"]["stage"] == "sft"
    assert found["held_out"]["loss"]["source"] == pytest.approx(rows(runs["lora"].workdir)[-1]["eval/loss"], rel=1e-4)
    assert found["held_out"]["relative_increase"] < 0.005
    before = files(tmp_path)
    again = finalize(runs["lora"].workdir, tmp_path / "out", "int8")
    assert again.returncode == 0
    assert f"{tmp_path / 'out'} is finished: " in again.stdout
    assert files(tmp_path) == before


def test_the_cost_of_a_policy_is_measured_on_the_stage_it_comes_from(runs, tmp_path):
    config = FinalizeConfig(init_from=str(runs["dpo"].workdir), dtype="bfloat16")
    found = publish(config, str(tmp_path / "out"), lambda *_: "")
    assert found["held_out"]["stage"] == "sft"
    assert found["lineage"][0]["stage"] == "dpo"


def test_an_artifact_writes_the_tokens_of_its_run(runs, artifacts):
    flags = (*GREEDY, f"--config.prompt={PROMPT}")
    texts = [
        command("generate", *flags, f"--config.init_from={folder}")
        for folder in (runs["lora"].workdir, artifacts["lora"])
    ]
    assert texts[1].returncode == 0, texts[1].stderr
    assert texts[0].stdout == texts[1].stdout


def test_training_starts_from_an_artifact_where_its_run_ended(runs, artifacts, records, tmp_path):
    fields = {"num_train_steps": 2, "eval_at_start": True, "lora__rank": 2, "samples__num_heldout": 0}
    here("sft", f"--workdir={tmp_path}/run", *finetuning("sft", "lora", artifacts["lora"], records["last"], **fields))
    expected = rows(runs["lora"].workdir)[-1]["eval/loss"]
    assert rows(tmp_path / "run")[0]["eval/loss"] == pytest.approx(expected, rel=1e-3)
    parent = manifest(tmp_path / "run")["parents"]["init_from"]
    assert parent == {"path": str(artifacts["lora"]), "digest": digest(manifest(artifacts["lora"]))}
    found = publish(FinalizeConfig(init_from=str(tmp_path / "run")), str(tmp_path / "again"), lambda *_: "")
    assert [entry["stage"] for entry in found["lineage"]] == ["sft", "finalize", "sft", "sft", "pretrain"]


def test_a_reward_model_scores_as_its_run_does_and_serves_reinforcement_learning(runs, artifacts, records, tmp_path):
    first = json.loads(pathlib.Path(records["first"]).read_text().splitlines()[0])
    (tmp_path / "ask.jsonl").write_text(json.dumps(first) + "\n")
    scores = []
    for name, folder in (("run", runs["reward"].workdir), ("artifact", artifacts["reward"])):
        output = tmp_path / f"{name}.jsonl"
        done = command(
            "reward", f"--workdir={folder}", f"--config.score={tmp_path}/ask.jsonl", f"--config.output={output}"
        )
        assert done.returncode == 0, done.stderr
        scores.append(json.loads(output.read_text())["reward"])
    assert scores[0] == scores[1]
    config = RLConfig(init_from=str(artifacts["lora"]), reward_model=str(artifacts["reward"]))
    start = start_from(config)
    reward = read_reward_model(config, start)
    assert reward.shift == manifest(runs["reward"].workdir)["reward_shift"]
    config = RLConfig(init_from=str(artifacts["lora"]), reward_model=str(artifacts["lora"]))
    with pytest.raises(ValueError, match="is a run of finalize, not a reward model"):
        read_reward_model(config, start)


def test_a_damaged_artifact_and_no_source_are_one_sentence_and_exit_code_2(artifacts, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(artifacts["lora"], folder)
    raw = bytearray((folder / "model.safetensors").read_bytes())
    raw[-100] ^= 4
    (folder / "model.safetensors").write_bytes(raw)
    for done, words in (
        (
            command("generate", *GREEDY, f"--config.init_from={folder}", "--config.prompt=x"),
            "model.safetensors is damaged",
        ),
        (finalize(tmp_path / "nowhere", tmp_path / "out"), "init_from"),
        (finalize(folder, tmp_path / "out"), "model.safetensors is damaged"),
        (
            command("finalize", "--config=configs/finalize.py:int8", f"--workdir={tmp_path / 'out'}"),
            "init_from is required",
        ),
    ):
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr
        (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert words in error
    assert not (tmp_path / "out").exists()
