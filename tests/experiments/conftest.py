"""A tiny corpus, its tokenizer and the command line of a tiny pretraining run, shared by the tests of the stages."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[2]


def command(stage: str, *arguments: str, devices: int = 1, **kwargs) -> subprocess.CompletedProcess:
    """Run a stage in a process of its own and return what it printed."""
    return subprocess.run(
        [sys.executable, "-m", f"experiments.{stage}", *arguments],
        cwd=ROOT, env=environment(devices), capture_output=True, text=True, timeout=300, check=False, **kwargs,
    )  # fmt: skip


def environment(devices: int = 1) -> dict[str, str]:
    """This process's environment with another number of simulated devices."""
    flags = [f for f in os.environ["XLA_FLAGS"].split() if "device_count" not in f]
    return os.environ | {"XLA_FLAGS": " ".join([*flags, f"--xla_force_host_platform_device_count={devices}"])}


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
