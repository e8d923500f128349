"""Pipelines as data: order, flags, what makes a stage another one, and expectations."""

import pytest

from jaxgpt import config as config_lib
from jaxgpt.pipeline.graph import PipelineConfig, StageConfig, flatten, key, substitute


def build(**stages) -> PipelineConfig:
    return config_lib.build(PipelineConfig, {"stages": stages})


def stage(command="sft", **fields) -> dict:
    return {"command": command, "fields": fields}


def test_parents_come_first_and_only_brings_what_it_is_built_on():
    config = build(
        ppo=stage("ppo", init_from="@sft", rewards={"a": {"name": "@reward/r.py:f"}}),
        reward=stage("reward", init_from="@sft"),
        sft=stage(init_from="@pretrain"),
        pretrain=stage("pretrain"),
        other=stage("pretrain"),
    )
    assert config.order() == ["pretrain", "sft", "reward", "ppo", "other"]
    assert config_lib.build(PipelineConfig, {"stages": config.stages, "only": ["reward"]}).order() == [
        "pretrain",
        "sft",
        "reward",
    ]


def test_flags_are_the_nested_fields_with_workdirs_put_in():
    one = StageConfig("sft", fields={"data": {"train": ["@data/a", "b"], "fields": {}}, "x": 1.5, "y": "{'p': 'q{0}'}"})
    assert one.flags({"data": "/w/data"}) == [
        "--config=configs/sft.py", "--config.data.train=['/w/data/a', 'b']", "--config.data.fields={}", "--config.x=1.5",
        "--config.y={'p': 'q{0}'}",
    ]  # fmt: skip
    assert one.parents() == {"data"}
    assert dict(flatten({"a": {"b": 1}, "c": 2})) == {"a.b": 1, "c": 2}
    assert substitute("{data} @data", {"data": "x"}) == "{data} @data"
    assert substitute([{"path": "@data/a", "weight": 1}], {"data": "x"}) == [{"path": "x/a", "weight": 1}]


def test_a_field_of_a_stage_is_overridden_from_the_command_line():
    values = {"stages": {"sft": stage(optimizer={"learning_rate": 1.0})}}
    for path, text in (("optimizer.learning_rate", "0.5"), ("data.train", "@x/y.jsonl"), ("num_epochs", "3")):
        config_lib.override(values, PipelineConfig, f"stages.sft.fields.{path}", text)
    fields = values["stages"]["sft"]["fields"]
    assert fields == {"optimizer": {"learning_rate": 0.5}, "data": {"train": "@x/y.jsonl"}, "num_epochs": 3}


def test_a_stage_is_another_one_when_its_config_fields_parents_or_files_change(tmp_path):
    data = tmp_path / "data.txt"
    data.write_text("a")
    one = StageConfig("sft", fields={"data": {"train": str(data)}})
    same = key({"batch_size": 8}, one, {"pretrain": "abc"})
    assert key({"batch_size": 8}, StageConfig("sft", title="x", fields=one.fields), {"pretrain": "abc"}) == same
    others = [
        key({"batch_size": 9}, one, {"pretrain": "abc"}),
        key({"batch_size": 8}, one, {"pretrain": "abd"}),
        key({"batch_size": 8}, StageConfig("dpo", fields=one.fields), {"pretrain": "abc"}),
        key({"batch_size": 8}, StageConfig("sft", fields={**one.fields, "seed": 1}), {"pretrain": "abc"}),
    ]
    data.write_text("ab")
    others.append(key({"batch_size": 8}, one, {"pretrain": "abc"}))
    assert len({same, *others}) == 6


def test_a_stage_is_another_one_when_a_file_of_a_list_a_pattern_or_a_folder_changes(tmp_path):
    (tmp_path / "more").mkdir()
    file, among_others, inside = tmp_path / "a.txt", tmp_path / "b_1.txt", tmp_path / "more" / "model.safetensors"
    named = [{"path": str(file)}, str(tmp_path / "b_*.txt"), str(tmp_path / "more")]
    now = lambda values, fields: key(values, StageConfig("sft", fields=fields), {})
    for changed in (file, among_others, inside):
        before = now({"train": named}, {}), now({}, {"data": {"train": named}})
        changed.write_text("new")
        after = now({"train": named}, {}), now({}, {"data": {"train": named}})
        assert len({*before, *after}) == 4
    (tmp_path / "c.txt").write_text("of no stage")
    (tmp_path / "more" / "file_digests.json").write_text("what a run writes to its cache")
    assert now({"train": named}, {}) == after[0]


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        ({}, "at least one stage"),
        ({"sft": stage(init_from="@pretrian"), "pretrain": stage()}, "'pretrain'"),
        ({"a": stage(x="@b"), "b": stage(x="@c"), "c": stage(x="@b")}, "b -> c -> b"),
        ({"sft": {"fields": {}}}, r"stages\.sft\.command"),
        ({"sft/2": stage()}, "sft/2"),
        ({"sft": {"command": "sft", "expect": ["loss is low"]}}, "loss is low"),
        (
            {"quiz": {"command": "evaluate", "expect": ["final_metrics.q/accuracy > 0.5"]}},
            r"compare \.low or \.high of fin",
        ),
    ],
)
def test_mistakes_are_one_sentence(stages, words):
    with pytest.raises(ValueError, match=words):
        build(**stages)
