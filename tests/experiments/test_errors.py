"""Errors that the environment makes are one sentence with the path; bugs keep their traceback."""

import errno
import logging
import os

import pytest

from experiments import errors


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

    assert "/data/run" in errors.sentence(caught(nameless), "/data/run")


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


def test_memory_and_depth():
    def memory():
        raise MemoryError("Unable to allocate 8 TiB.")

    assert "not enough memory (Unable to allocate 8 TiB)" in errors.sentence(caught(memory))

    def depth():
        return depth()

    assert "nested too deeply" in errors.sentence(caught(depth))


def test_a_bug_keeps_its_traceback():
    for wrong in (lambda: {}["x"], lambda: int("x"), lambda: 1 / 0, lambda: None.x):  # type: ignore[attr-defined]
        assert errors.sentence(caught(wrong)) is None


def test_tracebacks_that_orbax_logs_of_what_it_raises_are_no_news_and_all_else_is():
    def record(path, exc_info):
        return logging.LogRecord("absl", logging.ERROR, path, 1, "Save failed.", (), exc_info)

    raised = (OSError, OSError(errno.ENOSPC, "No space left on device"), None)
    assert not errors.is_news(record("/lib/orbax/checkpoint/async_checkpointer.py", raised))
    assert errors.is_news(record("/lib/orbax/checkpoint/async_checkpointer.py", None))
    assert errors.is_news(record("/clone/jaxgpt/train/checkpoint.py", raised))
