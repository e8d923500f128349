"""The pipeline command: it runs what is missing, keeps what is finished, and survives being killed."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from tests.experiments.conftest import ROOT, command, environment

CONFIG = """
from ml_collections import ConfigDict

def get_config():
    model = {"num_layers": 1, "embed_dim": 16, "num_heads": 2, "mlp_dim": 32, "max_seq_length": 64}
    text = {"train": "@data/corpus.jsonl", "holdout": {"fraction": 0.1}}
    stages = {
        "data": {"command": "make_data", "config": "configs/make_data.py:arithmetic",
                 "fields": {"largest": 19, "heldout_fraction": 0.5}},
        "tokenizer": {"command": "tokenizer", "config": "configs/tokenizer.py:char", "fields": {"data": text}},
        "pretrain": {
            "command": "pretrain", "fields": {
                "data": {**text, "tokenizer": "@tokenizer", "sequence_length": 32}, "model": model,
                "batch_size": 8, "num_train_steps": 12, "eval_interval_steps": 6, "log_interval_steps": 2,
                "checkpoint": {"save_interval_steps": 4}, "optimizer": {"learning_rate": 0.02, "warmup_steps": 2}},
            "expect": ("final_metrics.eval/loss < 0.9 * first.eval/loss",)},
        "sft": {"command": "sft", "fields": {
            "init_from": "@pretrain", "data": {"train": "@data/sft_train.jsonl", "eval": "@data/eval.jsonl",
                                               "sequence_length": 32},
            "batch_size": 8, "num_epochs": 0.0, "num_train_steps": 4, "eval_interval_steps": 2, "eval_at_start": True,
            "log_interval_steps": 2, "samples": {"max_new_tokens": 4}}},
    }
    return ConfigDict({"stages": stages, "compare": {
        "stages": ("pretrain", "sft"), "prompts_file": "@data/eval.jsonl", "num_prompts": 2, "max_new_tokens": 4}})
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("config") / "small.py"
    path.write_text(CONFIG)
    return str(path)


@pytest.fixture(scope="module")
def root(config, tmp_path_factory) -> pathlib.Path:
    """A pipeline that was killed in its third stage and then run again."""
    root = tmp_path_factory.mktemp("pipeline") / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "experiments.pipeline", f"--config={config}", f"--workdir={root}"],
        cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while process.poll() is None and not (root / "pretrain/metrics.jsonl").exists():
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (root / "sft").exists()
    done = command("pipeline", f"--config={config}", f"--workdir={root}")
    assert done.returncode == 0, done.stdout + done.stderr
    return root


def manifest(root: pathlib.Path) -> dict:
    return json.loads((root / "manifest.json").read_text())


def test_a_killed_pipeline_run_again_ends_as_an_undisturbed_one(config, root, tmp_path_factory):
    killed = manifest(root)
    aside = root.with_name("aside")
    root.rename(aside)
    try:
        done = command("pipeline", f"--config={config}", f"--workdir={root}")
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.count("$ python -m experiments.") == 4
        assert manifest(root) == killed
    finally:
        root.rename(root.with_name("undisturbed"))
        aside.rename(root)
    report = (root / "report.html").read_text()
    assert "answered after each stage" in report
    assert report.count("<th>after ") == 2
    assert "<td>pretrain<td>loss (nats per token)" in report
    assert manifest(root)["parents"]["sft"]["digest"][:12] in report


def test_a_finished_pipeline_does_nothing_again_and_a_changed_stage_takes_along_what_is_built_on_it(config, root):
    before = manifest(root)
    done = command("pipeline", f"--config={config}", f"--workdir={root}")
    assert done.returncode == 0, done.stderr
    assert "$ python" not in done.stdout
    assert manifest(root) == before
    flag = "--config.stages.pretrain.fields.num_train_steps=14"
    done = command("pipeline", f"--config={config}", f"--workdir={root}", flag)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("$ python -m experiments.") == 2
    after = manifest(root)
    changed = {name for name in after["parents"] if after["parents"][name] != before["parents"][name]}
    assert changed == {"pretrain", "sft"}
    assert len(list((root / "replaced").iterdir())) == 2


def test_what_is_expected_and_does_not_hold_is_exit_code_1(config, root):
    flag = "--config.stages.sft.expect=('final_metrics.eval/loss < 0.01',)"
    done = command("pipeline", f"--config={config}", f"--workdir={root.with_name('undisturbed')}", flag)
    assert done.returncode == 1
    assert "error: the stage sft has not done what is expected of it: final_metrics.eval/loss < 0.01" in done.stderr


def test_a_mistake_in_a_stage_ends_the_pipeline_with_its_sentence_and_code(config, tmp_path):
    flags = ["--config.stages.data.fields.forget_carry=2", f"--workdir={tmp_path / 'run'}"]
    done = command("pipeline", f"--config={config}", *flags)
    assert done.returncode == 2
    assert "forget_carry=2" in done.stderr
    assert "the stage data ended with exit code 2" in done.stderr
