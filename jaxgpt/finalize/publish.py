"""From a run to an artifact: load, average, measure, store, read back, prove, and only then publish."""

import dataclasses
import functools
import json
import os
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from jaxgpt import partition, tree
from jaxgpt.config import to_dict
from jaxgpt.finalize.average import Member, find_members, mean
from jaxgpt.finalize.config import FinalizeConfig
from jaxgpt.finalize.encode import Encoder, WeightWriter
from jaxgpt.finalize.held_out import HeldOut, held_out
from jaxgpt.finalize.lineage import lineage
from jaxgpt.finalize.proof import check_reload, outputs
from jaxgpt.generate.text import stop_ids
from jaxgpt.runs import manifest as manifests
from jaxgpt.runs import workdir as workdirs
from jaxgpt.runs.artifact import digests, load_artifact
from jaxgpt.runs.load import Run, abstract_params, load_plain, parent_of, read_run, without_adapters
from jaxgpt.runs.weights import write_weights
from jaxgpt.types import Params

# Of the source's manifest, what the artifact says of itself, too; a reward model is one by its reward_shift.
_INHERITED = ("final_metrics", "step", "data_fingerprint", "reward_shift", "report_card")
_FREE_FIELDS = ("model", "finalize.mesh", "finalize.max_loss_increase")


def finished(config: FinalizeConfig, workdir: str) -> dict | None:
    """The manifest of an artifact that is there already, None without one.

    Raises ValueError where the folder holds a run, or the artifact of another config or another source.
    """
    manifest = manifests.read_manifest(workdir)
    if manifest is None:
        return None
    if manifest["stage"] != "finalize":
        raise ValueError(f"--workdir={workdir} holds a run of {manifest['stage']}; use another folder.")
    workdirs.check_same(workdir, _resolved(config, None), ignore=_FREE_FIELDS)
    source = manifests.read_manifest(config.init_from)
    named = manifest["parents"]["init_from"]["digest"]
    if source is not None and manifests.manifest_digest(source) != named:
        raise ValueError(
            f"init_from: {config.init_from} has the digest {manifests.manifest_digest(source)[:12]} now, but {workdir} was "
            f"made from {named[:12]}; use another --workdir."
        )
    return manifest


def publish(config: FinalizeConfig, workdir: str, card: Callable[[dict, dict], str]) -> dict:
    """Make the artifact of a finished run in the new folder `workdir`, and return its manifest.

    card: (manifest, config) -> the model card. All is written to a folder beside it, which becomes `workdir` at the end.

    Raises ValueError where the folder is not new, where the source, its tokenizer, template or parents are not what
    manifests name, where the loss rises too much, or where what is read back is not what was written.
    """
    if jax.process_count() > 1:
        raise ValueError("experiments.finalize runs in one process; start it without a launcher.")
    mesh = partition.make_mesh(config.mesh)
    run = read_run(config.init_from)
    with workdirs.new_folder(workdir) as partial:
        return _make(config, run, partial, mesh, card)


def _make(config: FinalizeConfig, run: Run, folder: str, mesh: Mesh, card: Callable[[dict, dict], str]) -> dict:
    """Write the artifact to a folder, the manifest last: without it the folder is no artifact."""
    members = find_members(run, config.average)
    runs = list({member.run.field: member.run for member in members}.values())
    history = lineage(runs)
    resolved = _resolved(config, run)
    workdirs.write_config(folder, resolved)
    run.tokenizer.save(folder)
    if run.template is not None:
        run.template.save(folder)
    model = without_adapters(run.config)
    if model.head == "lm":
        workdirs.write_atomic(
            os.path.join(folder, "generation.json"), json.dumps(_generation(config, run), indent=2) + "\n"
        )
    written, measured = _store(config, run, members, folder, mesh)
    source = run.manifest()
    manifest = manifests.base_manifest(
        stage="finalize",
        source_stage=source.get("source_stage", source["stage"]),
        config=resolved,
        tokenizer_digest=run.tokenizer.digest,
        chat_template_digest=run.template.digest if run.template is not None else None,
        special_ids=run.tokenizer.special_ids,
        vocab_size=run.tokenizer.vocab_size,
        parents={member.field: parent_of(member, run.tokenizer, run.template) for member in runs},
        lineage=history,
        files=written,
        **measured,
        **{name: source[name] for name in _INHERITED if name in source},
    )
    with open(os.path.join(folder, "README.md"), "w", encoding="utf-8") as file:
        file.write(card(manifest, resolved))
    manifests.write_manifest(folder, manifest)
    return manifest


def _store(
    config: FinalizeConfig, run: Run, members: list[Member], folder: str, mesh: Mesh
) -> tuple[dict[str, str], dict[str, Any]]:
    """Write the weights and read them back: (file -> sha256, of all that is in the folder; what the manifest says)."""
    model = without_adapters(run.config)
    measure = held_out(config, run, mesh)
    _, params = load_plain(run, mesh)
    source, losses = outputs(model, params, mesh), _losses(measure, "source", params)
    if config.average.kind != "none":
        del params
        params = mean(functools.partial(member.load, mesh) for member in members)
        losses |= _losses(measure, "averaged", params)
    named = tree.named_leaves(params)
    count = sum(leaf.size for leaf in named.values())
    del params
    writer = WeightWriter(Encoder(model, config.dtype, config.group_size), named)
    files = write_weights(folder, writer.layout(), writer.read)
    written = digests(folder)
    meant = outputs(model, tree.from_named(writer.meant), mesh)
    del writer, named
    loaded = load_artifact(folder, abstract_params(model, mesh), {"files": written})
    proof = check_reload(meant, outputs(model, loaded, mesh), source, is_exact=not config.changes_values)
    losses |= _losses(measure, "artifact", loaded)
    size = sum(os.path.getsize(os.path.join(folder, name)) for name in files)
    result: dict[str, Any] = {
        "average": _described(config, members), "proof": proof,
        "num_parameters": count, "weight_bytes": size, "float32_bytes": 4 * count,
        "quantization": {"dtype": config.dtype} | ({"group_size": config.group_size} if config.dtype == "int4" else {}),
    }  # fmt: skip
    if measure is not None:
        result["held_out"] = _cost(config, measure, losses)
    return written, result


def _described(config: FinalizeConfig, members: list[Member]) -> dict[str, Any]:
    kind = config.average.kind
    steps = {"steps": [member.step for member in members]} if kind == "last_k" else {}
    return {"kind": kind} | steps | ({"models": len(members)} if kind == "soup" else {})


def _losses(measure: HeldOut | None, name: str, params: Params) -> dict[str, float]:
    return {} if measure is None else {name: measure.loss(params)}


def _cost(config: FinalizeConfig, measure: HeldOut, losses: dict[str, float]) -> dict[str, Any]:
    """The losses and their relative increase; ValueError where it is above the limit."""
    increase = losses["artifact"] / losses["source"] - 1
    if config.max_loss_increase is not None and not increase <= config.max_loss_increase:
        raise ValueError(
            f"max_loss_increase={config.max_loss_increase:g}, but the artifact's held-out loss is "
            f"{losses['artifact']:.5g} where the source's is {losses['source']:.5g}, an increase of {increase:.3g}; nothing "
            "is published."
        )
    return {"stage": measure.stage, "rows": measure.rows, "loss": losses, "relative_increase": increase}


def _resolved(config: FinalizeConfig, run: Run | None) -> dict[str, Any]:
    """config.json: the model as in every workdir, and how the artifact was made."""
    model = {} if run is None else to_dict(without_adapters(run.config))
    runs = tuple(os.path.abspath(path) for path in config.average.runs)
    config = dataclasses.replace(config, average=dataclasses.replace(config.average, runs=runs))
    settings = {name: value for name, value in to_dict(config).items() if name != "init_from"}
    return {"model": model, "init_from": os.path.abspath(config.init_from), "finalize": settings}


def _generation(config: FinalizeConfig, run: Run) -> dict[str, Any]:
    """generation.json: how to sample, and the ids that end a text."""
    tokenizer = run.tokenizer
    stop = run.template.stop_ids(tokenizer) if run.template is not None else stop_ids(tokenizer)
    ids = {"stop_ids": list(stop), "bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id, "pad_id": tokenizer.pad_id}
    return to_dict(config.generation.sampler) | {"max_new_tokens": config.generation.max_new_tokens} | ids
