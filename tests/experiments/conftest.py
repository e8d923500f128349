"""A tiny corpus, its tokenizer and the command line of a tiny pretraining run, shared by the tests of the stages."""

import concurrent.futures
import importlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
from typing import NamedTuple

import numpy as np
import pytest

from jaxgpt.data.chat import CHAT_TEMPLATES, ChatTemplate

ROOT = pathlib.Path(__file__).parents[2]

# A command that kills itself once FILE holds the rows of STEP: it dies at that very place, however busy the machine is.
KILLED = """
import os, runpy, signal, sys
from jaxgpt.runs.workdir import JsonLog

_, name, step, stage = sys.argv[:4]
append = JsonLog.append

def append_and_die(log, at, *rows):
    append(log, at, *rows)
    if at == int(step) and log._path.endswith(name):
        os.kill(os.getpid(), signal.SIGKILL)

JsonLog.append = append_and_die
sys.argv = sys.argv[3:]
runpy.run_module(f"experiments.{stage}", run_name="__main__", alter_sys=True)
"""


def command(stage: str, *arguments: str, devices: int = 1, **kwargs) -> subprocess.CompletedProcess:
    """Run a stage in a process of its own and return what it printed."""
    return subprocess.run(
        [sys.executable, "-m", f"experiments.{stage}", *arguments],
        cwd=ROOT, env=environment(devices), capture_output=True, text=True, timeout=900, check=False, **kwargs,
    )  # fmt: skip


def killed(file: str, step: int, stage: str, *arguments: str) -> subprocess.CompletedProcess:
    """Run a stage that is killed as soon as it has written the rows of a step to one of its logs."""
    return subprocess.run(
        [sys.executable, "-c", KILLED, file, str(step), stage, *arguments],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip


def here(stage: str, *arguments: str) -> None:
    """Run a stage in this process, on its eight devices; ValueError where the command would say it and exit with 2."""
    from experiments.shared import cli
    from jaxgpt.train.config import PretrainConfig

    module = importlib.import_module(f"experiments.{stage}")
    rest, overrides = cli.split_overrides(["", *arguments])
    flags = dict(flag.removeprefix("--").split("=", 1) for flag in rest[1:])
    config = cli.load_config(str(ROOT / flags["config"]), overrides, getattr(module, "Config", PretrainConfig))
    module.main(config, flags["workdir"])


def environment(devices: int = 1) -> dict[str, str]:
    """This process's environment with another number of simulated devices."""
    flags = [f for f in os.environ["XLA_FLAGS"].split() if "device_count" not in f]
    return os.environ | {"XLA_FLAGS": " ".join([*flags, f"--xla_force_host_platform_device_count={devices}"])}


def with_template(workdir, folder: pathlib.Path) -> str:
    """A copy of a finished run as if it had been trained on a chat template."""
    shutil.copytree(workdir, folder)
    template = ChatTemplate(CHAT_TEMPLATES["roles"], "roles")
    template.save(str(folder))
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"chat_template_digest": template.digest}))
    return str(folder)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> str:
    """300 short documents with some structure to learn."""
    rng = np.random.default_rng(0)
    names, verbs = ("Ann", "Bob", "Cid", "Dora"), ("sees", "likes", "calls")
    lines = [f"{rng.choice(names)} {rng.choice(verbs)} {rng.choice(names)} and {i % 7}." for i in range(300)]
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text("\n\n".join(lines))
    return str(path)


@pytest.fixture(scope="session")
def tokenizer(corpus, tmp_path_factory) -> str:
    """The workdir of a character tokenizer."""
    workdir = str(tmp_path_factory.mktemp("tokenizer"))
    done = command(
        "tokenizer", "--config=configs/tokenizer.py:char", f"--workdir={workdir}", f"--config.data.train={corpus}"
    )
    assert done.returncode == 0, done.stderr
    return workdir


@pytest.fixture(scope="session")
def arguments(corpus, tokenizer) -> list[str]:
    """Flags of a pretraining run of 12 steps that takes seconds."""
    fields = {
        "data.train": corpus, "data.text_separator": "\n\n", "data.tokenizer": tokenizer,
        "data.sequence_length": 32, "data.packing": "best_fit", "data.holdout.fraction": 0.1, "data.eval_batches": 2,
        "model.num_layers": 1, "model.embed_dim": 16, "model.num_heads": 2, "model.mlp_dim": 32,
        "model.max_seq_length": 64, "batch_size": 8, "num_train_steps": 12, "log_interval_steps": 2,
        "eval_interval_steps": 6, "checkpoint.save_interval_steps": 4, "checkpoint.max_to_keep": 3,
        "optimizer.learning_rate": 0.01, "optimizer.warmup_steps": 2, "model.dropout": 0.1,
    }  # fmt: skip
    return ["--config=configs/pretrain.py:tiny", *(f"--config.{k}={v}" for k, v in fields.items())]


@pytest.fixture(scope="session")
def finished(arguments, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("finished") / "run"
    done = command("pretrain", f"--workdir={workdir}", *arguments, "--config.samples.prompts=Ann,Bob likes",
                   "--config.samples.max_new_tokens=8")  # fmt: skip
    assert done.returncode == 0, done.stderr
    return workdir, done


NAMES, VERBS = ("Ann", "Bob", "Cid", "Dora"), ("sees", "likes", "calls")


@pytest.fixture(scope="session")
def records(tmp_path_factory) -> dict[str, str]:
    """Files of records: two tasks that the prompt tells apart, and preferences for answers that go on with " and 6"."""
    folder = tmp_path_factory.mktemp("records")
    pairs = [(f"{a} {verb} {b}", a, b) for a in NAMES for b in NAMES for verb in VERBS if a != b]
    preferences = [
        {"prompt": f"{text}?", "chosen": f"{b}{' and 6' * k}.", "rejected": f"{b}{' sees' * (3 - k)}."}
        for text, _, b in pairs for k in (1, 2)
    ]  # fmt: skip
    contents = {
        "first": [{"prompt": f"first of {text}?", "response": f"{a}."} for text, a, _ in pairs],
        "last": [{"prompt": f"last of {text}?", "response": f"{b} and 6."} for text, _, b in pairs],
        "preferences": [row for i, row in enumerate(preferences) if i % 8 > 1],
        "preferences_eval": [row for i, row in enumerate(preferences) if i % 8 < 2],
        "ranked": [
            {"prompt": f"{text}?", "responses": [f"{b} and 6.", [f"{b}.", f"{b}!"], f"{b} sees."]} for text, _, b in pairs
        ],
    }  # fmt: skip
    for name, rows in contents.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {name: str(folder / f"{name}.jsonl") for name in contents}


def finetuning(stage: str, preset: str, parent, data: str, **fields) -> list[str]:
    """Flags of a run of 12 steps that starts from a workdir; fields are written a__b for a.b."""
    fields = {
        "init_from": parent, "data.train": data, "data.sequence_length": 48, "data.holdout.fraction": 0.2,
        "batch_size": 8, "num_epochs": 0, "num_train_steps": 12, "log_interval_steps": 2, "eval_interval_steps": 6,
        "checkpoint.save_interval_steps": 4, "checkpoint.max_to_keep": 3, "optimizer.learning_rate": 0.02,
        "optimizer.warmup_steps": 2,
    } | {name.replace("__", "."): value for name, value in fields.items()}  # fmt: skip
    return [f"--config=configs/{stage}.py:{preset}", *(f"--config.{k}={v}" for k, v in fields.items())]


ADAPTED = ("query", "value", "mlp/down")
LORA = {"lora__rank": 4, "lora__alpha": 4, "lora__target_modules": "|".join(ADAPTED)}
PROMPT = "first of Ann likes Bob?"


class Run(NamedTuple):
    """A finished run and the command that made it."""

    stage: str
    arguments: list[str]
    workdir: pathlib.Path
    done: subprocess.CompletedProcess


def files(folder: pathlib.Path) -> dict[str, bytes]:
    found = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock")
    return {str(path): path.read_bytes() for path in found}


@pytest.fixture(scope="session")
def runs(finished, records, tmp_path_factory) -> dict[str, Run]:
    """The stages in a chain, each undisturbed: pretrained -> sft -> lora -> reward (with adapters), and sft -> dpo."""
    root = tmp_path_factory.mktemp("finetune")
    sft = root / "sft"
    samples = {"samples__prompts": PROMPT, "samples__num_heldout": 1, "samples__max_new_tokens": 6}
    # Adam divides even gradients that are nothing but rounding errors by themselves; eps keeps 8 devices close to 1.
    adapters = LORA | {"optimizer__learning_rate": 0.02, "optimizer__eps": 1e-4}
    pairs = {"data__eval": records["preferences_eval"], "model__dropout": 0.0}
    plans = {
        "sft": finetuning("sft", "full", finished[0], records["first"], **samples),
        "lora": finetuning("sft", "lora", sft, records["last"], **adapters, lora__dropout=0.1),
        "reward": finetuning(
            "reward", "lora", root / "lora", records["preferences"], **adapters, **pairs, report_card__max_ece="none"
        ),
        "dpo": finetuning("dpo", "full", sft, records["preferences"], **pairs),
    }

    def train(name: str) -> Run:
        stage = "sft" if name == "lora" else name
        done = command(stage, f"--workdir={root / name}", *plans[name])
        assert done.returncode == 0, done.stderr
        return Run(stage, plans[name], root / name, done)

    made = {"sft": train("sft")}
    base = files(sft)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:  # most of a command's time is one core's
        dpo = pool.submit(train, "dpo")
        made |= {"lora": train("lora")}
        made |= {"reward": train("reward"), "dpo": dpo.result()}
    assert files(sft) == base, "a run wrote into its parent's workdir"
    return made


# The config file of a pipeline whose four stages are as small as they may be.
PIPELINE = """
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


@pytest.fixture(scope="session")
def pipeline_config(tmp_path_factory) -> str:
    """The config file of a small pipeline: data, tokenizer, pretrain, sft."""
    path = tmp_path_factory.mktemp("pipeline_config") / "small.py"
    path.write_text(PIPELINE)
    return str(path)
