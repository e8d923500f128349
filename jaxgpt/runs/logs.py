"""What a checkpoint knows of the logs beside it: the bytes that they had when it was saved."""

import hashlib
import os
import sys

import jax

LOGS = ("metrics.jsonl", "samples.jsonl")


def marks(workdir: str) -> dict[str, dict]:
    """{"metrics.jsonl": {"bytes", "sha256"}, ...} of the logs that are there now."""
    paths = {name: os.path.join(workdir, name) for name in LOGS}
    return {name: _mark(path, os.path.getsize(path)) for name, path in paths.items() if os.path.isfile(path)}


def check(workdir: str, stored: dict[str, dict], step: int) -> None:
    """ValueError where a log no longer begins with the bytes of `stored`, the marks in the checkpoint of `step`.

    Without its file a log begins anew, which is said in a line.
    """
    for name, mark in stored.items():
        path = os.path.join(workdir, name)
        if not os.path.isfile(path):
            if jax.process_index() == 0:
                lost = f"{path} is missing; the run goes on without the rows up to step {step} that it had."
                print(lost, file=sys.stderr, flush=True)
        elif _mark(path, mark["bytes"]) != mark:
            raise ValueError(
                f"{path} no longer holds the rows up to step {step} as they were when its checkpoint was saved; restore it "
                "from a copy, or remove it to go on without them."
            )


def _mark(path: str, size: int) -> dict:
    """Of the first `size` bytes of a file, or of all where it has fewer."""
    hashed, left = hashlib.sha256(), size
    with open(path, "rb") as file:
        while left and (chunk := file.read(min(left, 1 << 20))):
            hashed.update(chunk)
            left -= len(chunk)
    return {"bytes": size - left, "sha256": hashed.hexdigest()}
