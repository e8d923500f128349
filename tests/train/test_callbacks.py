"""Weights & Biases with a client that only remembers what it was told; TensorBoard's events."""

import errno
import os
import struct
import sys
import types

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

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


def test_tensorboard_has_the_rows_at_once_and_a_full_disk_is_an_error_of_the_row(tmp_path, monkeypatch):
    watcher = callbacks.tensorboard(str(tmp_path), start_step=4)
    watcher.on_log(6, {"step": 6, "train/loss": 2.5})
    (path,) = (tmp_path / "tensorboard").iterdir()
    events = [Event.FromString(record) for record in records(path.read_bytes())]
    assert (events[1].step, events[1].session_log.status) == (5, SessionLog.START)
    (value,) = events[2].summary.value
    assert (events[2].step, value.tag, value.simple_value) == (6, "train/loss", 2.5)

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            watcher.on_log(8, {"step": 8, "train/loss": 2.0})
    watcher.close()


def records(content: bytes) -> list[bytes]:
    """What a file of TFRecords holds: length (8 bytes), its CRC (4), the record, its CRC (4)."""
    found = []
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        found.append(content[12 : 12 + length])
        content = content[16 + length :]
    return found
