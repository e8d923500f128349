"""A workdir or an artifact as something to start from: its model, tokenizer, template, and parameters as one plain model."""

import dataclasses
import functools
import os
from collections.abc import Callable

import jax
from jax.sharding import Mesh

from jaxgpt import config as config_lib
from jaxgpt import partition, tree
from jaxgpt.data.chat import ChatTemplate
from jaxgpt.data.tokenizer import Tokenizer, load_tokenizer
from jaxgpt.models import decoder, lora
from jaxgpt.models.config import LoraConfig, ModelConfig
from jaxgpt.models.decoder import VALUE_HEAD
from jaxgpt.partition import DEFAULT_RULES
from jaxgpt.runs.artifact import check_files, check_identity, is_artifact, load_artifact
from jaxgpt.runs.checkpoint import check_named_step, newest_good_step, restore_params, stored_sources
from jaxgpt.runs.manifest import manifest_digest, read_manifest
from jaxgpt.runs.workdir import read_json
from jaxgpt.types import Params


@dataclasses.dataclass(frozen=True)
class Run:
    """What a training workdir, or an artifact, says of itself.

    config: of the model, adapters included. base: what adapters stand on.

    field: the config field that named it, for messages.
    """

    workdir: str
    config: ModelConfig
    base: str
    field: str = "init_from"

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer it was trained with."""
        return load_tokenizer(self.workdir)

    @functools.cached_property
    def template(self) -> ChatTemplate | None:
        """The chat template it was trained with, None for a model that knows none."""
        return ChatTemplate.from_dir(self.workdir)

    def manifest(self) -> dict:
        """The manifest; ValueError where the run has not finished."""
        manifest = read_manifest(self.workdir)
        if manifest is None:
            raise ValueError(f"{self.field}: {self.workdir} has no manifest.json: the run there has not finished.")
        return manifest

    def digest(self) -> str:
        """The manifest's digest, by which runs name their parents."""
        return manifest_digest(self.manifest())


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A run and its parameters: plain arrays on the mesh they were loaded for, adapters merged in."""

    config: ModelConfig
    params: Params
    tokenizer: Tokenizer
    template: ChatTemplate | None


def read_run(workdir: str, field: str = "init_from") -> Run:
    """The run of a workdir, finished or not, or an artifact; ValueError naming what is missing or does not agree.

    Tokenizer, template and vocabulary of what is finished are those that its manifest names.
    """
    values = read_json(os.path.join(workdir, "config.json"))
    if values is None:
        raise ValueError(f"{field}: {workdir} is not the workdir of a training run: it has no config.json.")
    if "model" not in values:
        raise ValueError(
            f"{field}: {workdir} holds no model of this project: its config.json has no section model; point to a training "
            "run's workdir or an artifact."
        )
    if is_artifact(workdir) and (manifest := read_manifest(workdir)) is not None:
        check_files(workdir, manifest, weights=False)
    if not isinstance(values["model"], dict):
        raise ValueError(
            f"{field}: {os.path.join(workdir, 'config.json')} is damaged: its model is of type "
            f"{type(values['model']).__name__}, not a section."
        )
    run = Run(workdir, config_lib.build(ModelConfig, values["model"], "model"), values.get("init_from", ""), field)
    if is_artifact(workdir) or read_manifest(workdir) is not None:
        check_identity(workdir, run.manifest(), run.config, run.tokenizer, run.template)
    return run


def load_model(workdir: str, mesh: Mesh) -> LoadedModel:
    """The parameters of a training workdir (see `step_to_load`), or an artifact; ValueError naming what is missing."""
    run = read_run(workdir)
    config, params = load_plain(run, mesh)
    return LoadedModel(config, params, run.tokenizer, run.template)


def load_plain(run: Run, mesh: Mesh, *, step: int | None = None, ema: bool = False) -> tuple[ModelConfig, Params]:
    """A run's config and parameters without adapters: those it has are merged into the base they were trained on.

    step, ema: which of a training run's checkpoints, and whether the optimizer's average (`restore_params`).

    Raises ValueError where the base is no longer the one that the run's checkpoints name.
    """
    abstract = abstract_params(run.config, mesh)
    if not run.config.lora.rank:
        return run.config, load_params(run.workdir, abstract, step=step, ema=ema)
    base_params = load_trunk(adapter_base(run), tree.split(abstract, trainable(run.config))[1], mesh)
    plain = without_adapters(run.config)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_params(plain, mesh))
    merge = jax.jit(lambda params: lora.merge(run.config, params)[1], out_shardings=shardings)
    return plain, merge(tree.merge(load_adapters(run, mesh, step=step, ema=ema), base_params))


def abstract_adapters(run: Run, mesh: Mesh) -> Params:
    """What a run with adapters trains: those, and a scalar head; as `abstract_params`."""
    return tree.split(abstract_params(run.config, mesh), trainable(run.config))[0]


def load_adapters(run: Run, mesh: Mesh, *, step: int | None = None, ema: bool = False) -> Params:
    """What a run with adapters has trained, without its base; step, ema: as of `load_plain`."""
    return load_params(run.workdir, abstract_adapters(run, mesh), step=step, ema=ema)


def adapter_base(run: Run) -> Run:
    """The run whose model a run's adapters stand on; ValueError where it is gone, or not the one they were trained on."""
    if not os.path.isdir(run.base):
        raise ValueError(
            f"{run.field}: the adapters in {run.workdir} stand on the model in {run.base}, which is missing."
        )
    base = read_run(run.base, run.field)
    stored = _named_base(run.workdir)
    if stored is not None and stored != base.digest():
        raise ValueError(
            f"{run.field}: the adapters in {run.workdir} were trained on the base {stored[:12]}, but {run.base} now has the "
            f"digest {base.digest()[:12]}."
        )
    return base


def _named_base(workdir: str) -> str | None:
    """The digest of the base that a run's checkpoints name."""
    sources = stored_sources(os.path.join(workdir, "checkpoints"))
    return sources["init_from"] if sources is not None else None


def load_trunk(run: Run, abstract: Params, mesh: Mesh) -> Params:
    """Those parameters of `abstract` that the run has: all but new adapters, and a value head where the run has none.

    Raises ValueError naming the first parameter in which the two models differ.
    """
    config, params = load_plain(run, mesh)
    theirs, ours = tree.named_leaves(params), tree.named_leaves(abstract)
    is_value_model = "bias" in abstract.get("head", {})
    found = {}
    for name, leaf in ours.items():
        if lora.is_adapter(name) or (name.startswith("head/") and is_value_model and config.head != "scalar"):
            continue
        if name not in theirs or theirs[name].shape != leaf.shape:
            there = f"the shape {theirs[name].shape}" if name in theirs else "no such parameter"
            raise ValueError(f"{run.field}: {name} has the shape {leaf.shape} here, but {run.workdir} has {there}.")
        found[name] = theirs[name]
    return tree.from_named(found)


def trainable(config: ModelConfig) -> Callable[[str], bool]:
    """Which parameters a run of this model trains and keeps: all; with adapters those, and scalar heads."""
    if not config.lora.rank:
        return lambda name: True
    heads = (f"{VALUE_HEAD}/", "head/") if config.head == "scalar" else (f"{VALUE_HEAD}/",)
    return lambda name: lora.is_adapter(name) or name.startswith(heads)


def abstract_params(config: ModelConfig, mesh: Mesh) -> Params:
    """The model's parameters as ShapeDtypeStructs with their shardings."""
    boxed = jax.eval_shape(functools.partial(decoder.init_params, config), jax.random.key(0))
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        partition.unbox(boxed),
        partition.param_shardings(boxed, mesh, DEFAULT_RULES),
    )


def load_params(workdir: str, abstract: Params, *, step: int | None = None, ema: bool = False) -> Params:
    """Parameters of a checkpoint of `workdir`, or of an artifact, in the shapes and shardings of `abstract`.

    step: a good one (`checkpoint.good_steps`); None is the one of `step_to_load`. ema: as in `restore_params`.
    """
    if is_artifact(workdir):
        return load_artifact(workdir, abstract)
    step = step_to_load(workdir) if step is None else step
    return restore_params(os.path.join(workdir, "checkpoints"), abstract, step, ema=ema)


def step_to_load(workdir: str) -> int:
    """The step of a training run that is loaded: of a finished one that which its manifest names, else the newest good one.

    Raises ValueError where what the manifest names is missing or damaged, or where there is no good checkpoint at all.
    """
    root, manifest = os.path.join(workdir, "checkpoints"), read_manifest(workdir)
    if manifest is None:
        return newest_good_step(root)
    named = manifest.get("checkpoint", {"step": manifest["step"]})
    check_named_step(root, named["step"], named.get("digest"))
    return named["step"]


def without_adapters(config: ModelConfig) -> ModelConfig:
    """The same model, plain."""
    return dataclasses.replace(config, lora=LoraConfig())


def parent_of(run: Run, tokenizer: Tokenizer, template: ChatTemplate | None = None) -> dict[str, str]:
    """{"path", "digest"} of a finished parent; ValueError where it is missing, or has another tokenizer or template."""
    digest = run.digest()
    pairs = [("tokenizer", "data.tokenizer", run.tokenizer.digest, tokenizer.digest)]
    if run.template is not None and template is not None:
        pairs.append(("chat template", "chat_template", run.template.digest, template.digest))
    for what, field, theirs, ours in pairs:
        if theirs != ours:
            raise ValueError(
                f"{run.field}: {run.workdir} was trained with the {what} {theirs[:12]}, {field} is {ours[:12]}; use the "
                "parent's."
            )
    return {"path": os.path.abspath(run.workdir), "digest": digest}
