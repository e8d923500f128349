"""What a command says of an error that the user can act on, in one sentence; all others are bugs and keep their traceback."""

import dis
import errno
import logging
import os
import re
import types

ROOT = os.path.abspath(os.path.join(os.path.dirname(__file__), "..", ".."))
_PARTS = ("jaxgpt", "experiments", "configs", "launch")
_HINTS = {
    errno.ENOSPC: "the disk is full; make room, or use another folder",
    errno.EDQUOT: "your quota of the disk is used up; make room, or use another folder",
    errno.EROFS: "the disk is read-only; use a folder that can be written to",
    errno.EACCES: "there is no permission; see who owns it, or use another path",
    errno.EPERM: "there is no permission; see who owns it, or use another path",
    errno.ENOENT: "there is no such file or folder",
    errno.EEXIST: "a file of that name is in the way",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
    errno.EISDIR: "it is a folder, not a file",
    errno.ELOOP: "its symbolic links lead in a circle",
    errno.ENAMETOOLONG: "the name is too long for the disk",
    errno.EBUSY: "it is in use, or where a disk is mounted; use a folder below it",
    errno.EIO: "the disk cannot read or write it; it may be broken",
    errno.EMFILE: "too many files are open; raise the limit with `ulimit -n`",
    errno.ENOTEMPTY: "the folder is not empty",
    errno.ENOMEM: "there is not enough memory",
    errno.EADDRINUSE: "the address is in use; another port may be free",
}
_OF_A_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)  # which a write says without the file
_LIBRARIES = ("orbax", "tensorstore", "jax", "jaxlib")
_OF_CODE = (TypeError, LookupError, AttributeError, NameError, AssertionError)
_LESS_MEMORY = "a smaller batch_size, model or length needs less, as do more devices"


def sentence(error: BaseException, workdir: str = "") -> str | None:
    """The one line to show for an error of the user's or the environment's, None for a bug.

    workdir: what is named where a full or broken disk does not say which file it was.
    """
    chain = _chain(error)
    for one in chain:  # what a library wrapped: a full disk under a checkpoint is not a bug of orbax
        environment = _environment(one, workdir)
        if environment is not None:
            return environment
    if isinstance(error, ValueError) and is_ours(error):
        return " ".join(str(error).split())
    return None


def is_ours(error: BaseException) -> bool:
    """Whether the project itself raised it, for the user."""
    source = os.path.abspath(raised_in(error) or "")
    return any(source.startswith(os.path.join(ROOT, part, "")) for part in _PARTS)


def raised_in(error: BaseException) -> str | None:
    """The file whose `raise` made the error; None where what a line calls did, as int() or zip(), which may be a bug."""
    last = _last(error)
    if last is None:
        return None
    code = last.tb_frame.f_code
    return code.co_filename if dis.opname[code.co_code[last.tb_lasti]] == "RAISE_VARARGS" else None


def _last(error: BaseException) -> types.TracebackType | None:
    """Where it was raised: the innermost part of its traceback."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    return last


def is_news(record: logging.LogRecord) -> bool:
    """Whether a record of the log says more than the error that ends the command: orbax logs what it raises, too."""
    return not (record.exc_info and f"{os.sep}orbax{os.sep}" in record.pathname)


def _chain(error: BaseException) -> list[BaseException]:
    """The error, those it was raised from, and those that one of the environment's was raised while handling.

    What a bug was raised while handling says nothing of the bug.
    """
    found: list[BaseException] = []
    following: list[BaseException | None] = [error]
    while following:
        one = following.pop(0)
        if one is not None and one not in found:
            found.append(one)
            # A sentence of the project's own says all there is to say of its cause.
            if not (isinstance(one, ValueError) and is_ours(one)):
                is_wrapper = not one.__suppress_context__ and _is_of_the_environment(one)
                following += [one.__cause__, one.__context__ if is_wrapper else None, *getattr(one, "exceptions", ())]
    return found


def _is_of_the_environment(error: BaseException) -> bool:
    """Whether it is an error of the system, or of a library that reads and writes for the project."""
    if isinstance(error, OSError | BaseExceptionGroup):
        return True
    last = _last(error)
    made_in = last.tb_frame.f_globals.get("__name__", "") if last is not None else ""
    is_library = any(str(name).partition(".")[0] in _LIBRARIES for name in (type(error).__module__, made_in))
    return is_library and not isinstance(error, _OF_CODE)


def _environment(error: BaseException, workdir: str) -> str | None:
    """The sentence for an error of a disk or of memory; None for any other."""
    if isinstance(error, BrokenPipeError):
        return None  # of no disk; `cli.run` knows of the one that is no bug
    if isinstance(error, OSError) and error.errno is not None:
        return _of_a_path(error.errno, error.strerror, error.filename, error.filename2, workdir)
    text = str(error)
    wrapped = re.search(r"\[OS error (\d+)|os_error_code='(\d+)'", text)  # tensorstore's, of two versions
    if wrapped:
        path = re.search(r"[\"'](/[^\"']*)[\"']", text)
        return _of_a_path(int(wrapped[1] or wrapped[2]), None, path[1] if path else None, None, workdir)
    if isinstance(error, MemoryError):
        return f"There is not enough memory{f' ({text.rstrip(chr(46))})' if text else ''}; {_LESS_MEMORY}."
    if "RESOURCE_EXHAUSTED" in text and type(error).__name__ in ("XlaRuntimeError", "JaxRuntimeError"):
        wanted = re.search(r"allocat\w* ([\d.]+ ?[KMGTP]?i?B|\d+ bytes)", text)
        return f"The device has not enough memory{f' for another {wanted[1]}' if wanted else ''}; {_LESS_MEMORY}."
    return None


def _of_a_path(number: int, reason: str | None, path: object, other: object, workdir: str) -> str:
    if not path and number in _OF_A_DISK:
        path = workdir or None
    said = _HINTS.get(number) or (reason or os.strerror(number)).lower()
    name = path.decode(errors="replace") if isinstance(path, bytes) else path
    if name is None or isinstance(name, int):
        return f"{said[0].upper()}{said[1:]}."
    # A file that is written is made under another name first; the user knows the one it will have.
    full = str(other if number == errno.EBUSY and other else name)
    shown = re.sub(r"(\.[0-9a-f]{32})?\.tmp$|\.orbax-checkpoint-tmp(/.*)?$", "", full)
    return f"{shown if len(shown) < 300 else shown[:300] + '...'}: {said}."
