"""Where a model comes from: its run and the runs before it, by the digests that their manifests name."""

import os
from collections.abc import Sequence
from typing import Any

from jaxgpt.runs.artifact import is_artifact
from jaxgpt.runs.load import Run
from jaxgpt.runs.manifest import manifest_digest, read_manifest

# What is kept of a run's last metrics.
_GROUPS = ("eval/", "objective/", "train/loss")


def lineage(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The runs and their ancestors, nearest first: {"role", "path", "digest", "stage", "step", "metrics"}.

    role: how its child names it ("init_from", "reward_model"). An ancestor that is no longer on disk has no stage; of an
    artifact's ancestors its manifest tells.

    Raises ValueError where a parent of a training run is gone, or an ancestor is not the one that its child names.
    """
    found: list[dict[str, Any]] = []
    waiting = [(run.field, os.path.abspath(run.workdir), run.digest(), "") for run in runs]
    sources = {path: field for field, path, _, _ in waiting}
    while waiting:
        role, path, digest, child = waiting.pop(0)
        if any(entry["digest"] == digest for entry in found):
            continue
        manifest = read_manifest(path)
        entry = {"role": role, "path": path, "digest": digest}
        if manifest is None:
            if child in sources and not is_artifact(child):
                raise ValueError(
                    f"{sources[child]}: the parent of {child}, {role}={path}, is missing: there is no manifest.json."
                )
            found.append(entry)
            continue
        now = manifest_digest(manifest)
        if now != digest:
            raise ValueError(
                f"{child} was made from {role}={path} with the digest {digest[:12]}, but that has the digest {now[:12]} now."
            )
        metrics = {name: v for name, v in manifest.get("final_metrics", {}).items() if name.startswith(_GROUPS)}
        found.append(entry | {"stage": manifest["stage"], "step": manifest.get("step"), "metrics": metrics})
        if "lineage" in manifest:
            known = {entry["digest"] for entry in found}
            found += [entry for entry in manifest["lineage"] if entry["digest"] not in known]
            continue
        parents = manifest.get("parents", {})
        waiting += [
            (name, p["path"], p["digest"], path) for name, p in parents.items() if {"path", "digest"} <= p.keys()
        ]
    return found
