"""A finished or running workdir as something to start from: its model, parameters and tokenizer."""

import dataclasses
import functools
import json
import os

import jax
from jax.sharding import Mesh

from jaxgpt import config as config_lib
from jaxgpt import partition
from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.models import decoder
from jaxgpt.models.config import ModelConfig
from jaxgpt.partition import DEFAULT_RULES
from jaxgpt.train.checkpoint import restore_params
from jaxgpt.train.workdir import manifest_digest, read_manifest
from jaxgpt.types import Params


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """What a workdir holds: params are plain arrays, laid out on the mesh they were loaded for."""

    config: ModelConfig
    params: Params
    tokenizer: Tokenizer


def load_model(workdir: str, mesh: Mesh) -> LoadedModel:
    """The newest good checkpoint of a training workdir; ValueError naming what is missing."""
    path = os.path.join(workdir, "config.json")
    if not os.path.isfile(path):
        raise ValueError(f"init_from: {workdir} is not the workdir of a training run: it has no config.json.")
    with open(path) as file:
        values = json.load(file)
    if "model" not in values:
        raise ValueError(f"init_from: {workdir} holds no model (stage without one); point to a training run's workdir.")
    config = config_lib.build(ModelConfig, values["model"], "model")
    abstract = abstract_params(config, mesh)
    return LoadedModel(config, load_params(workdir, abstract), Tokenizer.from_dir(workdir))


def abstract_params(config: ModelConfig, mesh: Mesh) -> Params:
    """The model's parameters as ShapeDtypeStructs with their shardings."""
    boxed = jax.eval_shape(functools.partial(decoder.init_params, config), jax.random.key(0))
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        partition.unbox(boxed),
        partition.param_shardings(boxed, mesh, DEFAULT_RULES),
    )


def load_params(workdir: str, abstract: Params) -> Params:
    """Parameters of the newest good checkpoint of `workdir`, in the shapes and shardings of `abstract`."""
    return restore_params(os.path.join(workdir, "checkpoints"), abstract)


def parent_of(workdir: str, tokenizer: Tokenizer) -> dict[str, str]:
    """{"path", "digest"} of a finished parent; ValueError where it is missing, or has another tokenizer."""
    manifest = read_manifest(workdir)
    if manifest is None:
        raise ValueError(f"init_from: {workdir} has no manifest.json: the run there has not finished.")
    if manifest["tokenizer_digest"] != tokenizer.digest:
        raise ValueError(
            f"init_from: {workdir} was trained with the tokenizer {manifest['tokenizer_digest'][:12]}, data.tokenizer is "
            f"{tokenizer.digest[:12]}; use the parent's."
        )
    return {"path": os.path.abspath(workdir), "digest": manifest_digest(manifest)}
