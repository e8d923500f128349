"""Mistakes in later stages of a pipeline or a sweep, which are said before the first stage runs."""

import copy
import re

import pytest

from experiments import sweep
from experiments.pipeline import compare, main
from experiments.shared import cli
from experiments.shared.stage_configs import check_stages
from jaxgpt import config as config_lib
from jaxgpt.pipeline.graph import PipelineConfig
from jaxgpt.pipeline.sweep import SweepConfig, plan

CHANGES = [
    ({"command": "stf"}, [], ["stages.sft", "'stf'", "'sft'"]),
    ({"config": "configs/stf.py"}, [], ["stages.sft", "configs/stf.py"]),
    ({"config": "configs/sft.py:ful"}, [], ["stages.sft", "'ful'", "full"]),
    ({}, ["lora.rnk=3"], ["stages.sft", "lora.rnk", "lora.rank"]),
    ({}, ["learning_rate=3"], ["stages.sft", "optimizer.learning_rate"]),
    ({}, ["batch_size=many"], ["stages.sft", "batch_size", "integer"]),
    ({}, ["lora.rank=-1"], ["stages.sft", "lora.rank", "-1"]),
    ({}, ["data.train=missing.jsonl"], ["stages.sft", "data.train", "missing.jsonl"]),
    ({}, ["init_from=missing"], ["stages.sft", "init_from", "missing"]),
    ({}, ["num_epochs=1", "num_train_steps=4"], ["stages.sft", "num_epochs", "num_train_steps"]),
    ({}, ["data.fields.promt=q"], ["stages.sft", "data.fields", "prompt"]),
]


QUIZ = {"kind": "multiple_choice"}
LATER = [
    ("sft", {"data": {"train": "@data/a.jsonl"}}, "init_from is required"),
    ("sft", {"init_from": "@pretrain"}, "data.train is empty"),
    ("sft", {"init_from": "@pretrain", "data": {"train": "@data/a.jsonl"}, "chat_template": "chatmml"}, "'chatml'"),
    ("sft", {"init_from": "@pretrain", "data": {"train": "@data/a.jsonl"}, "chat_template": "x.jinja"}, "x.jinja"),
    ("sft", {"init_from": "@pretrain", "data": {"train": {"a": {"path": "missing.jsonl"}}}}, "data.train.a.path"),
    ("pretrain", {"data": {"train": "@data/a.jsonl"}}, "data.tokenizer"),
    ("tokenizer", {}, "data.train is empty"),
    ("finalize", {}, "init_from is required"),
    ("reward", {"data": {"train": "@data/a.jsonl"}}, "init_from is required"),
    ("grpo", {"init_from": "@sft", "data": {"train": "@data/a.jsonl"}}, "no reward"),
    ("grpo", {"init_from": "@sft", "data": {"train": "@data/a.jsonl"}, "rewards": {"r": {"name": "/nonexistent.py:f"}}},
     "rewards.r.name"),
    ("grpo", {"init_from": "@sft", "data": {"train": "@data/a.jsonl"}, "rewards": {"r": {"name": "numeric_answer"}},
              "gold": {"g": {"name": "/nonexistent.py:f"}}}, "gold.g.name"),
    ("ppo", {"init_from": "@sft", "data": {"train": "@data/a.jsonl"}, "rewards": {"r": {"name": "numeric_answer"}}},
     "critic_init"),
    ("evaluate", {"init_from": "@sft"}, "tasks is empty"),
    ("evaluate", {"init_from": "@sft", "tasks": {"quiz": QUIZ}}, "tasks.quiz.path is empty"),
    ("evaluate", {"init_from": "@sft", "tasks": {"quiz": {**QUIZ, "path": "missing.jsonl"}}}, "tasks.quiz.path"),
    ("evaluate", {"init_from": "@sft", "tasks": {"quiz": {**QUIZ, "path": "@data/a.jsonl", "num_shots": 1,
                                                          "shots": "missing.jsonl"}}}, "tasks.quiz.shots"),
    ("evaluate", {"init_from": "@sft", "tasks": {"sums": {"kind": "generation", "path": "@data/a.jsonl", "metrics":
                                                          {"m": {"name": "/nonexistent.py:f"}}}}},
     "tasks.sums.metrics.m.name"),
    ("evaluate", {"init_from": "@sft", "baseline": "@pretrain", "judge": "/nonexistent.py:f",
                  "tasks": {"w": {"kind": "win_rate", "path": "@data/a.jsonl"}}}, "judge"),
]  # fmt: skip


def folders(root) -> dict[str, str]:
    return {name: str(root / name) for name in ("data", "tokenizer", "pretrain", "sft")}


@pytest.fixture
def values(pipeline_config) -> dict:
    return copy.deepcopy(cli.plain_config(pipeline_config))


def test_a_right_pipeline_passes(values, tmp_path):
    check_stages(config_lib.build(PipelineConfig, values), folders(tmp_path))


@pytest.mark.parametrize(("changes", "overrides", "words"), CHANGES)
def test_a_mistake_in_the_last_stage_is_said_before_the_first_runs(values, tmp_path, changes, overrides, words):
    values["stages"]["sft"] |= changes
    for override in overrides:
        field, text = override.split("=")
        config_lib.override(values, PipelineConfig, f"stages.sft.fields.{field}", text)
    if "num_epochs=1" in overrides:  # one after the other they replace each other
        values["stages"]["sft"]["fields"] |= {"num_epochs": 1.0, "num_train_steps": 4}
    config = config_lib.build(PipelineConfig, values)
    with pytest.raises(ValueError, match=".") as error:
        main(config, str(tmp_path / "run"))
    for word in words:
        assert word in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("command", "fields", "words"), LATER)
def test_what_a_later_stage_lacks_is_said_before_the_first_runs(values, tmp_path, command, fields, words):
    values["stages"]["later"] = {"command": command, "fields": fields}
    pipeline = config_lib.build(PipelineConfig, values)
    with pytest.raises(ValueError, match=rf"^stages\.later: .*{re.escape(words)}"):
        check_stages(pipeline, {**folders(tmp_path), "later": str(tmp_path / "later")})


def test_a_reward_model_that_scores_a_file_needs_nothing_to_start_from(values, tmp_path):
    values["stages"]["later"] = {"command": "reward", "fields": {"score": "@data/a.jsonl"}}
    check_stages(config_lib.build(PipelineConfig, values), {**folders(tmp_path), "later": str(tmp_path / "later")})


def test_the_presets_pass(tmp_path):
    for spec in ("configs/pipeline.py", "configs/arithmetic.py"):
        config = cli.load_config(spec, [], PipelineConfig)
        check_stages(config, {name: str(tmp_path / name) for name in config.stages})


def test_a_misspelt_field_of_a_sweep_is_said_at_once(pipeline_config, tmp_path):
    search = {"tokenizer": {"tokenizer": {"vocab_sise": [300, 400]}}}
    config = SweepConfig(pipeline=pipeline_config, search=search, metric="sft.final_metrics.eval/loss")
    with pytest.raises(ValueError, match=r"stage tokenizer of trial 0: .*tokenizer\.vocab_sise.*tokenizer\.vocab_size"):
        sweep.main(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("metric", "nearest"),
    [("sft.final_metrics.eval/los", "eval/loss"), ("sft.final_metric.eval/loss", "final_metrics"),
     ("sft.final_metrics.reward/acuracy", "reward/accuracy")],
)  # fmt: skip
def test_a_misspelt_metric_of_a_sweep_is_said_at_once(pipeline_config, tmp_path, metric, nearest):
    config = SweepConfig(pipeline=pipeline_config, search={"sft.seed": [1, 2]}, metric=metric)
    with pytest.raises(ValueError, match=nearest):
        sweep.main(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_metric_of_the_users_own_names_is_let_through(values):
    pipeline = config_lib.build(PipelineConfig, values)
    for name in ("eval/gold/f1", "sums/exact_match", "win_rate/win_rate", "eval/code/loss"):
        config = SweepConfig(pipeline="p.py", search={"sft.seed": [1, 2]}, metric=f"sft.final_metrics.{name}")
        assert len(plan(config, pipeline, lambda spec: {})) == 2


REQUIRED = """
from ml_collections import ConfigDict, config_dict

def get_config():
    return ConfigDict({"seed": config_dict.placeholder(int, required=True), "batch_size": 8, "data": {"packing": "best_fit"}})
"""


@pytest.mark.parametrize(("fields", "ends"), [({"seed": 3}, False), ({}, True)])
def test_what_a_config_file_leaves_to_the_stage_is_no_mistake_where_the_stage_sets_it(values, tmp_path, fields, ends):
    (tmp_path / "required.py").write_text(REQUIRED)
    values["stages"]["sft"] |= {"config": str(tmp_path / "required.py")}
    values["stages"]["sft"]["fields"] |= fields
    pipeline = config_lib.build(PipelineConfig, values)
    search = SweepConfig(pipeline="p.py", search={"sft.batch_size": [4, 8]}, metric="sft.final_metrics.eval/loss")
    trials = plan(search, pipeline, cli.plain_config)
    assert len({trial.last.folder for trial in trials}) == 2
    if ends:
        with pytest.raises(ValueError, match=r"stages\.sft: The config field seed is required"):
            check_stages(pipeline, folders(tmp_path))
    else:
        check_stages(pipeline, folders(tmp_path))


def test_prompts_to_compare_that_are_not_utf8_are_named_with_their_line(values, tmp_path):
    values["compare"] |= {"stages": ["sft"], "prompts_file": "@data/bad.jsonl"}
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "bad.jsonl").write_bytes(b'{"prompt": "1"}\n{"prompt": "\xff"}\n')
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 2: not valid UTF-8"):
        compare(config_lib.build(PipelineConfig, values), folders(tmp_path), {"sft": "0" * 64})
