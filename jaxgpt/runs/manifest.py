"""A run's manifest: what a finished artifact says of itself, and the digest by which later stages name it."""

import hashlib
import importlib.metadata
import os
import subprocess
import sys
from typing import Any

import jax

from jaxgpt.json_object import to_json
from jaxgpt.runs.workdir import read_json, write_atomic

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "sentencepiece", "numpy")


def base_manifest(*, stage: str, **content: Any) -> dict[str, Any]:
    """What every artifact says of itself: the stage, what the caller adds, versions and the git commit of the source.

    It holds no time and no host, so that the same run gives the same manifest.
    """
    versions = {name: importlib.metadata.version(name) for name in PACKAGES} | {"python": sys.version.split()[0]}
    return {"stage": stage, **content, "versions": versions, "git_commit": _git_commit()}


def _git_commit() -> str | None:
    root = os.path.dirname(os.path.abspath(__file__))
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None


def write_manifest(workdir: str, manifest: dict) -> None:
    """manifest.json, the mark of a finished run, from process 0."""
    if jax.process_index() == 0:
        write_atomic(os.path.join(workdir, "manifest.json"), to_json(manifest, indent=2, sort_keys=True) + "\n")


def read_manifest(workdir: str) -> dict | None:
    """The manifest, or None where the run has not finished."""
    return read_json(os.path.join(workdir, "manifest.json"))


def manifest_digest(manifest: dict) -> str:
    """sha256 (hex) of the manifest's content, independent of formatting, by which it is named as a parent.

    Its entry `checkpoint` is left out: orbax writes names and times of its own into a checkpoint, so that the same
    parameters have other bytes when the same run is done again.
    """
    content = {name: value for name, value in manifest.items() if name != "checkpoint"}
    return hashlib.sha256(to_json(content, sort_keys=True).encode()).hexdigest()
