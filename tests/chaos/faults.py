"""A layer under Python's file operations that counts those below a folder, and lets one of them go wrong."""

import builtins
import errno
import io
import mmap
import os
import signal
import struct
import threading
from typing import Any, NamedTuple

_ERRORS = {"ENOSPC": errno.ENOSPC, "EROFS": errno.EROFS, "EIO": errno.EIO}
_FREES = ("remove", "unlink", "rmdir")  # what a full disk still allows


class Fault(NamedTuple):
    """What happens at the n-th operation, counted from 1.

    kind: `kill` (SIGKILL to the whole process group), `ENOSPC` or `EROFS` (it fails, and so does all that follows) or `EIO`
    (it alone fails). after: a kill comes when the operation is done, as when a file has been opened and nothing is in it.
    """

    kind: str
    at: int
    after: bool = False


class Counter:
    """A number that forked processes share."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 8)

    @property
    def value(self) -> int:
        """How many operations there have been."""
        return struct.unpack("q", self._memory[:8])[0]

    def next(self) -> int:
        """One more, and that number."""
        value = self.value + 1
        self._memory[:8] = struct.pack("q", value)
        return value


def install(root: str, counter: Counter, fault: Fault | None) -> None:
    """Wrap the operations of this process, for good: those on paths below `root` count."""
    lock, root = threading.Lock(), os.path.realpath(root)

    def below(path: Any, dir_fd: int | None = None) -> bool:
        try:
            if isinstance(path, int):
                path = os.readlink(f"/proc/self/fd/{path}")
            elif dir_fd is not None:
                path = os.path.join(os.readlink(f"/proc/self/fd/{dir_fd}"), os.fsdecode(path))
            path = os.path.abspath(os.fsdecode(path))
        except (OSError, TypeError, ValueError):
            return False
        return path == root or path.startswith(root + os.sep)

    def hit(name: str, path: Any) -> bool:
        """Count an operation; whether the process dies after it."""
        with lock:
            count = counter.next()
        if fault is None or count < fault.at:
            return False
        if fault.kind == "kill":
            if count == fault.at and not fault.after:
                os.killpg(0, signal.SIGKILL)
            return count == fault.at
        fails = {"EROFS": True, "ENOSPC": name not in _FREES, "EIO": count == fault.at}
        if fails[fault.kind]:
            number = _ERRORS[fault.kind]
            raise OSError(number, os.strerror(number), path if isinstance(path, str) else None)
        return False

    def wrap(module: Any, name: str, counts: Any) -> None:
        original = getattr(module, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if not (args and counts(*args, **kwargs)):
                return original(*args, **kwargs)
            dies = hit(name, args[0])
            result = original(*args, **kwargs)
            if dies:
                os.killpg(0, signal.SIGKILL)
            return result

        setattr(module, name, wrapped)

    def opens(path: Any, mode: Any = "r", *args: Any, **kwargs: Any) -> bool:
        return bool(set("wax+") & set(mode)) and not isinstance(path, int) and below(path)

    def opens_descriptor(path: Any, flags: int, *args: Any, dir_fd: int | None = None, **kwargs: Any) -> bool:
        return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)) and below(path, dir_fd)

    for module in (builtins, io):
        wrap(module, "open", opens)
    wrap(os, "open", opens_descriptor)
    for name in ("mkdir", "remove", "unlink", "rmdir"):
        wrap(os, name, lambda path, *args, dir_fd=None, **kwargs: below(path, dir_fd))
    for name in ("rename", "replace", "link"):
        wrap(os, name, lambda source, target, *args, dst_dir_fd=None, **kwargs: below(target, dst_dir_fd))
    for name in ("fsync", "truncate", "ftruncate"):
        wrap(os, name, lambda path, *args, **kwargs: below(path))
