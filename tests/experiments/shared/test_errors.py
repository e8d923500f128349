"""Errors that the environment makes are one sentence with the path; bugs keep their traceback."""

import errno
import logging
import os

import pytest

from experiments.shared import errors


def caught(function) -> BaseException:
    try:
        function()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.ENOSPC, "disk is full"), (errno.EROFS, "read-only"), (errno.EACCES, "no permission"), (errno.EIO, "broken"),
     (errno.EDQUOT, "quota"), (errno.ENOTDIR, "a file, not a folder"), (errno.EISDIR, "a folder, not a file"),
     (errno.ELOOP, "circle"), (errno.ENAMETOOLONG, "too long"), (errno.EBUSY, "mounted"), (errno.EMFILE, "ulimit")],
)  # fmt: skip
def test_an_error_of_the_disk_names_the_path_and_what_to_do(number, words):
    def fail():
        raise OSError(number, os.strerror(number), "/data/run/config.json.tmp")

    said = errors.sentence(caught(fail))
    assert said.startswith("/data/run/config.json: ")
    assert words in said
    assert said.endswith(".")

    def nameless():
        raise OSError(number, os.strerror(number))

    is_of_a_disk = number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
    assert ("/data/run" in errors.sentence(caught(nameless), "/data/run")) == is_of_a_disk


def test_an_error_of_no_file_names_no_workdir():
    def refused():
        raise ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")

    assert errors.sentence(caught(refused), "/data/run") == "Connection refused."

    def pipe():
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    assert errors.sentence(caught(pipe), "/data/run") is None


def test_what_a_library_wraps_is_seen():
    def wrapped():
        try:
            raise OSError(errno.ENOSPC, "No space left on device", "/data/run/checkpoints/4")
        except OSError as error:
            raise RuntimeError("Checkpoint failed\n  in a thread") from error

    assert errors.sentence(caught(wrapped)).startswith("/data/run/checkpoints/4: the disk is full")

    def tensorstore():
        raise ValueError(  # noqa: TRY004
            'RESOURCE_EXHAUSTED: Error writing "x" in OCDBT: Failed to write "/data/run/d/1": [OS error 28: ENOSPC No space]'
        )

    assert errors.sentence(caught(tensorstore)).startswith("/data/run/d/1: the disk is full")

    def newer_tensorstore():
        raise ValueError(  # noqa: TRY004
            'RESOURCE_EXHAUSTED: Error writing local file "/run/checkpoints/4.orbax-checkpoint-tmp/state/_sharding": Failed '
            "to write 10427 bytes to file 18: No space left on device [os_error_code='28']"
        )

    assert errors.sentence(caught(newer_tensorstore)).startswith("/run/checkpoints/4: the disk is full")

    def group():
        raise ExceptionGroup("two", [KeyError("x"), OSError(errno.EROFS, "x", "/data")])

    assert errors.sentence(caught(group)).startswith("/data: the disk is read-only")


def test_memory():
    def memory():
        raise MemoryError("Unable to allocate 8 TiB.")

    assert "not enough memory (Unable to allocate 8 TiB)" in errors.sentence(caught(memory))


def depth():
    return depth()


def test_tracebacks_that_orbax_logs_of_what_it_raises_are_no_news_and_all_else_is():
    def record(path, exc_info):
        return logging.LogRecord("absl", logging.ERROR, path, 1, "Save failed.", (), exc_info)

    raised = (OSError, OSError(errno.ENOSPC, "No space left on device"), None)
    assert not errors.is_news(record("/lib/orbax/checkpoint/async_checkpointer.py", raised))
    assert errors.is_news(record("/lib/orbax/checkpoint/async_checkpointer.py", None))
    assert errors.is_news(record("/clone/jaxgpt/runs/checkpoint.py", raised))


def decoding():
    return b"\xff".decode()


@pytest.mark.parametrize("wrong", [depth, decoding, lambda: {}["x"], lambda: int("x"), lambda: 1 / 0, lambda: [].x])
def test_a_bug_keeps_its_traceback(wrong):
    assert errors.sentence(caught(wrong)) is None


def in_a_handler():
    try:
        raise OSError(errno.ENOENT, "No such file or directory", "/nonexistent")
    except OSError:
        return {}["x"]


def in_place_of_it():
    try:
        raise OSError(errno.ENOENT, "No such file or directory", "/nonexistent")
    except OSError:
        raise TypeError("real bug") from None


@pytest.mark.parametrize("wrong", [in_a_handler, in_place_of_it])
def test_a_bug_while_an_error_of_the_disk_is_handled_keeps_its_traceback(wrong):
    assert errors.sentence(caught(wrong)) is None


def test_an_error_of_a_library_while_it_handles_one_of_the_disk_is_the_disks():
    source = """
def save():
    try:
        raise OSError(28, "No space left on device", "/data/run/checkpoints/4")
    except OSError:
        raise ValueError("cannot save")
"""
    for module, is_seen in (("orbax.checkpoint.handler", True), ("somebody.elses", False)):
        names = {"__name__": module}
        exec(source, names)
        said = errors.sentence(caught(names["save"]))
        assert (said == "/data/run/checkpoints/4: the disk is full; make room, or use another folder.") == is_seen


OURS = """
def zipped():
    return list(zip([1], [1, 2], strict=True))

def unpacked():
    a, b = [1, 2, 3]

def converted():
    return int("x")

def converted_for_a_message():
    raise ValueError(int("x"))

def said():
    raise ValueError(
        "batch_size must be at least 1, "
        f"not {0}."
    )

def said_again():
    try:
        int("x")
    except ValueError as error:
        raise ValueError("a wrong number") from error
"""


@pytest.mark.parametrize(
    ("name", "sentence"),
    [("zipped", None), ("unpacked", None), ("converted", None), ("converted_for_a_message", None),
     ("said", "batch_size must be at least 1, not 0."), ("said_again", "a wrong number")],
)  # fmt: skip
def test_a_value_error_is_the_projects_own_where_a_raise_of_its_code_made_it(name, sentence):
    names: dict = {}
    exec(compile(OURS, os.path.join(errors.ROOT, "jaxgpt", "somewhere.py"), "exec"), names)
    assert errors.sentence(caught(names[name])) == sentence
