"""The files of a workdir, and what a kill may do to them."""

import errno
import json
import math
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import pytest

from jaxgpt.runs import manifest as manifests
from jaxgpt.runs import workdir as workdirs
from jaxgpt.runs.workdir import JsonLog, StopSignal

HOLD = """import sys, time
from jaxgpt.runs.workdir import lock
with lock(sys.argv[1]):
    print('held', flush=True)
    time.sleep(600)
"""


def test_a_second_holder_is_refused_until_the_first_is_killed(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with (
        pytest.raises(ValueError, match=rf"{tmp_path} is in use by another run \(process {holder.pid} on"),
        workdirs.lock(str(tmp_path)),
    ):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    with workdirs.lock(str(tmp_path)):
        assert str(os.getpid()) in (tmp_path / ".lock").read_text()


def test_a_mistake_leaves_no_folder_and_takes_none(tmp_path):
    with pytest.raises(ValueError, match="a mistake"), workdirs.lock(str(tmp_path / "runs" / "a")):
        raise ValueError("a mistake")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="a mistake"), workdirs.lock(str(tmp_path / "there")):
        raise ValueError("a mistake")
    assert (tmp_path / "there").is_dir()
    with pytest.raises(ValueError, match="'late'"), workdirs.lock(str(tmp_path / "b")):
        [(tmp_path / "b" / "config.json").write_text("{}"), int("late")]
    assert (tmp_path / "b" / "config.json").exists()
    os.symlink("nothing", tmp_path / "link")
    with pytest.raises(ValueError, match="leads to nothing"), workdirs.lock(str(tmp_path / "link")):
        pass


def test_rows_after_the_restored_step_and_half_a_line_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = JsonLog(str(path))
    for step in (2, 4, 6):
        log.append(step, {"train/loss": 1 / 3 + step})
    with open(path, "a") as file:
        file.write('{"step": 8, "tr')
    log = JsonLog(str(path))
    log.truncate_after(4)
    log.append(5, {"train/loss": 0.1})
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows == [
        {"step": 2, "train/loss": 1 / 3 + 2},
        {"step": 4, "train/loss": 1 / 3 + 4},
        {"step": 5, "train/loss": 0.1},
    ]
    with pytest.raises(RuntimeError, match="step 5 after step 5"):
        log.append(5, {"train/loss": 0.1})


def test_a_changed_field_is_named_and_a_free_one_is_not(tmp_path):
    config = {"seed": 1, "model": {"width": 8}, "mesh": {"data": 2}, "pattern": ("a", "b")}
    workdirs.check_same(str(tmp_path), config)  # a new workdir
    workdirs.write_config(str(tmp_path), config)
    workdirs.check_same(str(tmp_path), config | {"mesh": {"data": 4}}, ignore=("mesh",))
    with pytest.raises(ValueError, match=r"model\.width=9 differs from 8"):
        workdirs.check_same(str(tmp_path), config | {"model": {"width": 9}}, ignore=("mesh",))
    with pytest.raises(ValueError, match=r"mesh\.data=4 differs from 2"):
        workdirs.check_same(str(tmp_path), config | {"mesh": {"data": 4}})


def test_the_manifest_says_versions_and_its_digest_sees_content_not_format(tmp_path):
    import jax

    manifest = manifests.base_manifest(stage="pretrain", vocab_size=5)
    assert manifest["versions"]["jax"] == jax.__version__
    manifests.write_manifest(str(tmp_path), manifest)
    read = manifests.read_manifest(str(tmp_path))
    assert read == manifest
    digest = manifests.manifest_digest(manifest)
    assert digest == manifests.manifest_digest(dict(reversed(read.items())))
    assert digest != manifests.manifest_digest(manifest | {"vocab_size": 6})
    assert manifests.read_manifest(str(tmp_path / "nowhere")) is None


def test_what_is_not_finite_is_null_in_files_and_absent_from_the_metrics_read_back(tmp_path):
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    path = tmp_path / "metrics.jsonl"
    log = JsonLog(str(path))
    log.append(1, {"train/loss": math.nan, "train/accuracy": 0.5})
    log.append(2, {"train/loss": 2.0, "nested": [{"x": math.inf}]})
    log.truncate_after(2)
    rows = [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]
    assert rows == [
        {"step": 1, "train/loss": None, "train/accuracy": 0.5},
        {"step": 2, "train/loss": 2.0, "nested": [{"x": None}]},
    ]
    assert workdirs.read_metrics(str(path))[0] == {"step": 1, "train/accuracy": 0.5}
    manifest = manifests.base_manifest(stage="pretrain", final_metrics={"eval/loss": -math.inf, "train/loss": 2.0})
    manifests.write_manifest(str(tmp_path), manifest)
    read = json.loads((tmp_path / "manifest.json").read_text(), parse_constant=refuse)
    assert manifests.manifest_digest(read) == manifests.manifest_digest(manifest)
    assert workdirs.summary(read["final_metrics"]) == "train/loss 2.0000"


def test_a_first_signal_asks_and_the_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop:
        assert not stop.should_stop(1)
        signal.raise_signal(signal.SIGTERM)
        assert stop.should_stop(2)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not valid JSON"),
        (b'{\n"a": ', ", line 2: not valid JSON"),
        (b'{\n"a": "\xff"}', ", line 2: not valid UTF-8"),
        (b"[1, 2]", "expected a JSON object, found list"),
        (b"3", "expected a JSON object, found int"),
        (b'{"a": ' + b"[" * 100_000, "nested too deeply"),
    ],
)
def test_a_damaged_file_beside_a_run_is_a_sentence_with_its_line(tmp_path, content, words):
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(ValueError, match=words) as error:
        manifests.read_manifest(str(tmp_path))
    assert str(tmp_path / "manifest.json") in str(error.value)


@pytest.mark.parametrize("row", [b'{"step": 2, "train/loss": ', b"[3]", b"\xff", b'{"loss": 3}', b'{"step": "2"}', b""])
def test_a_row_damaged_in_the_middle_is_named_and_stays(tmp_path, row):
    path = tmp_path / "metrics.jsonl"
    content = b'{"step": 1}\n' + row + b'\n{"step": 3}\n'
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{path}, line 2: "):
        JsonLog(str(path))
    assert path.read_bytes() == content


@pytest.mark.parametrize(("first", "word"), [(signal.SIGTERM, "Preempted"), (signal.SIGINT, "Interrupted")])
def test_the_first_signal_says_how_a_run_was_stopped(first, word):
    with StopSignal() as stop:
        signal.raise_signal(first)
        signal.raise_signal(signal.SIGTERM)
    stopped = stop.stopped("at step 3 of 9")
    assert (str(stopped), stopped.number) == (f"{word} at step 3 of 9; the same command resumes.", first)


def publish(workdir, fail=None) -> None:
    """What finalize, import and export do: write, the manifest last."""
    with workdirs.new_folder(str(workdir)) as folder:
        os.makedirs(os.path.join(folder, "sub"))
        for name in ("weights", "sub/more", "manifest.json"):
            pathlib.Path(folder, name).write_text(name)
        if fail is not None:
            raise fail


def is_published(workdir) -> bool:
    """Whether all is there, and nothing else, beside it neither."""
    found = sorted(str(path.relative_to(workdir)) for path in workdir.rglob("*") if path.is_file())
    return found == ["manifest.json", "sub/more", "weights"] and list(workdir.parent.iterdir()) == [workdir]


def test_a_folder_is_published_where_there_is_none_or_an_empty_one(tmp_path):
    publish(tmp_path / "new/run")
    assert is_published(tmp_path / "new/run")
    (tmp_path / "old/run").mkdir(parents=True)
    publish(tmp_path / "old/run")
    assert is_published(tmp_path / "old/run")
    with pytest.raises(ValueError, match="is not empty"):
        publish(tmp_path / "old/run")
    assert is_published(tmp_path / "old/run")


@pytest.mark.parametrize("is_there", [False, True])
def test_what_fails_while_it_is_written_leaves_nothing(tmp_path, is_there):
    if is_there:
        (tmp_path / "run").mkdir()
    with pytest.raises(KeyboardInterrupt):
        publish(tmp_path / "run", KeyboardInterrupt())
    assert [str(path) for path in tmp_path.rglob("*")] == ([str(tmp_path / "run")] if is_there else [])


@pytest.mark.parametrize("number", [errno.EBUSY, errno.EXDEV, errno.EPERM])
def test_what_cannot_be_renamed_is_moved_and_never_deleted(tmp_path, monkeypatch, number):
    replace = os.replace

    def refuse(source, target):
        if os.path.isdir(source):
            raise OSError(number, os.strerror(number))
        replace(source, target)

    for name in ("replace", "rename"):
        monkeypatch.setattr(os, name, refuse)
    publish(tmp_path / "new")
    (tmp_path / "old").mkdir()
    publish(tmp_path / "old")
    monkeypatch.undo()
    for name in ("new", "old"):
        (tmp_path / f"of_{name}").mkdir()
        shutil.move(tmp_path / name, tmp_path / f"of_{name}/run")
        assert is_published(tmp_path / f"of_{name}/run")


@pytest.mark.parametrize("count", [0, 1, 2])
def test_a_kill_while_it_is_moved_is_no_artifact_and_the_same_command_makes_it(tmp_path, monkeypatch, count):
    (tmp_path / "run").mkdir()
    move, moved = shutil.move, []

    def die(source, target):
        if len(moved) == count:
            raise KeyboardInterrupt  # after which nothing is cleaned: the content was complete
        moved.append(target)
        move(source, target)

    monkeypatch.setattr(workdirs.shutil, "move", die)
    with pytest.raises(KeyboardInterrupt):
        publish(tmp_path / "run")
    monkeypatch.undo()
    assert manifests.read_manifest(str(tmp_path / "run")) is None
    publish(tmp_path / "run")
    assert is_published(tmp_path / "run")


def test_a_mount_point_is_published_to(tmp_path):
    mount = tmp_path / "only/run"
    mount.mkdir(parents=True)
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount)], capture_output=True, check=False
    )
    if made.returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    try:
        publish(mount)
        assert is_published(mount)
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def test_what_a_killed_run_was_writing_is_removed_and_nothing_else(tmp_path):
    for folder in ("plots", "checkpoints/digests"):
        (tmp_path / folder).mkdir(parents=True)
    left = ["manifest.json.tmp", "metrics.jsonl.tmp", "report.html.tmp", "tokenizer.model.tmp", "chat_template.jinja.tmp",
            "plots/loss.png.tmp", "checkpoints/digests/4.json.tmp"]  # fmt: skip
    for name in (*left, "manifest.json", "mine.tmp", "plots/loss.png"):
        (tmp_path / name).write_text("x")
    with workdirs.lock(str(tmp_path)):
        assert not [name for name in left if (tmp_path / name).exists()]
        (tmp_path / "config.json.tmp").write_text("of this run")
        with pytest.raises(workdirs.InUseError), workdirs.lock(str(tmp_path)):
            pass
        assert (tmp_path / "config.json.tmp").exists(), "another process may not remove what the holder writes"
    for name in ("manifest.json", "mine.tmp", "plots/loss.png"):
        assert (tmp_path / name).exists()


def test_what_an_earlier_version_did_not_note_is_said_and_not_refused(capsys):
    workdirs.check_sources("runs/x", {"init_from": "a" * 64}, {"init_from": "a" * 64, "data.train": "b" * 64})
    assert "data.train" in capsys.readouterr().err
    with pytest.raises(ValueError, match="init_from has other content"):
        workdirs.check_sources("runs/x", {"init_from": "a" * 64}, {"init_from": "c" * 64, "data.train": "b" * 64})


def test_a_link_is_followed_and_a_device_stays_one(tmp_path):
    (tmp_path / "file").write_text("old")
    for name, target in (("link", tmp_path / "file"), ("device", "/dev/null")):
        (tmp_path / name).symlink_to(target)
        workdirs.write_atomic(str(tmp_path / name), "new")
        assert (tmp_path / name).is_symlink()
    assert (tmp_path / "file").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["device", "file", "link"]
