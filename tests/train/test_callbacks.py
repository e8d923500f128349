"""Weights & Biases with a client that only remembers what it was told."""

import sys
import types

import pytest

from jaxgpt.train import callbacks
from jaxgpt.train.config import WandbConfig


@pytest.fixture
def runs(monkeypatch):
    """The arguments of each wandb.init."""
    started = []
    run = types.SimpleNamespace(log=lambda *_, **__: None, finish=lambda: None)
    client = types.SimpleNamespace(init=lambda **arguments: started.append(arguments) or run)
    monkeypatch.setitem(sys.modules, "wandb", client)
    return started


def start(workdir, **fields):
    workdir.mkdir(parents=True, exist_ok=True)
    callbacks.wandb(WandbConfig(project="p", **fields), str(workdir), {})


def test_two_workdirs_of_one_name_are_two_runs_and_a_resumed_one_goes_on(tmp_path, runs):
    for folder in ("a/sft", "b/sft", "a/sft"):
        start(tmp_path / folder)
    first, second, again = (run["id"] for run in runs)
    assert first == again != second
    assert [run["name"] for run in runs] == ["a/sft", "b/sft", "a/sft"]
    (tmp_path / "a" / "sft").rename(tmp_path / "moved")
    start(tmp_path / "moved")
    assert runs[-1]["id"] == first


def test_the_mode_is_left_to_wandb_unless_it_is_given(tmp_path, runs):
    start(tmp_path / "a")
    start(tmp_path / "a", mode="offline", group="sweep", tags=("x", "y"))
    assert [run["mode"] for run in runs] == [None, "offline"]
    assert [(run["group"], run["tags"]) for run in runs] == [(None, None), ("sweep", ("x", "y"))]
