"""Everything a training run is told, and the checks that need more than one section."""

import dataclasses
from typing import Literal

from jax.sharding import Mesh

from jaxgpt.config import check_bounds
from jaxgpt.data.config import DataConfig
from jaxgpt.data.sources import check_fields
from jaxgpt.data.tokenizer import load_tokenizer
from jaxgpt.generate.samplers import SamplerConfig
from jaxgpt.models.config import ModelConfig
from jaxgpt.models.memory import cache_bytes, check_fits, num_parameters
from jaxgpt.objectives.next_token import LossConfig
from jaxgpt.partition import MeshConfig, local_rows
from jaxgpt.runs.checkpoint import CheckpointConfig
from jaxgpt.train.optimizer import OptimizerConfig


@dataclasses.dataclass(frozen=True)
class NonfiniteConfig:
    """What a loss or gradient that is not finite leads to: `stop` the run, or `skip` up to max_skipped batches of it."""

    action: Literal["stop", "skip"] = "stop"
    max_skipped: int = 10

    def __post_init__(self):
        check_bounds(self, "nonfinite.", max_skipped=0)


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
    """A window of steps recorded with jax.profiler into WORKDIR/profile; num_steps = 0 records nothing."""

    start_step: int = 10
    num_steps: int = 0

    def __post_init__(self):
        check_bounds(self, "profile.", start_step=0, num_steps=0)


@dataclasses.dataclass(frozen=True)
class SamplesConfig:
    """Texts generated at evaluations, into samples.jsonl; no prompts, no samples.

    num_heldout: so many prompts of each held-out set, in stages whose records have prompts.
    """

    prompts: tuple[str, ...] = ()
    num_heldout: int = 0
    max_new_tokens: int = 64
    sampler: SamplerConfig = SamplerConfig(temperature=0.8, top_k=50)

    def __post_init__(self):
        check_bounds(self, "samples.", num_heldout=0, max_new_tokens=1)


@dataclasses.dataclass(frozen=True)
class WandbConfig:
    """Logging to Weights & Biases (extra `wandb`); an empty project switches it off.

    name: of the run; empty is the last two parts of its workdir's path. group, tags: by which runs are found together.
    mode: empty is what WANDB_MODE or wandb's own settings say.
    """

    project: str = ""
    name: str = ""
    group: str = ""
    tags: tuple[str, ...] = ()
    mode: Literal["", "online", "offline", "disabled"] = ""


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """What every training stage is told.

    batch_size: global sequences (of preferences: prompts) per update, over all hosts and micro-batches.
    num_train_steps: updates; 0 where num_epochs decides them.
    num_epochs: passes over the rows of all training sources, rounded to whole batches, so that a few rows may be left out or
      seen once more; 0 where num_train_steps decides. One of the two on the command line takes the place of the other in the
      config file.
    eval_interval_steps: 0 evaluates at the end alone. eval_at_start: also before the first update.
    init_from: the workdir of the run whose parameters are the start.
    """

    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    dcn_mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    nonfinite: NonfiniteConfig = NonfiniteConfig()
    profile: ProfileConfig = ProfileConfig()
    wandb: WandbConfig = WandbConfig()
    batch_size: int = 16
    gradient_accumulation_steps: int = 1
    num_train_steps: int = 1000
    num_epochs: float = 0.0
    seed: int = 0
    log_interval_steps: int = 10
    eval_interval_steps: int = 200
    eval_at_start: bool = False
    init_from: str = ""

    def __post_init__(self):
        check_bounds(
            self, "", batch_size=1, gradient_accumulation_steps=1, log_interval_steps=1, eval_interval_steps=0,
            num_epochs=0, num_train_steps=0 if self.num_epochs else 1,
        )  # fmt: skip
        if self.batch_size % self.gradient_accumulation_steps:
            raise ValueError(
                f"batch_size={self.batch_size} is not a multiple of "
                f"gradient_accumulation_steps={self.gradient_accumulation_steps}."
            )

    def check_complete(self) -> None:
        """ValueError naming what is missing of models and data, which a preset may leave open."""
        self.data.check_complete()

    @property
    def batch_field(self) -> str:
        """The field that says how many rows there are, for messages."""
        return "batch_size"

    @property
    def row_length(self) -> int:
        """Tokens of a row."""
        return self.data.sequence_length

    @property
    def rows_at_a_time(self) -> int:
        """Rows that one forward and backward pass sees."""
        return self.batch_size // self.gradient_accumulation_steps

    def num_steps(self, rows: int) -> int:
        """Updates of the run, given the rows of one epoch: whole batches, at least one."""
        return max(1, round(self.num_epochs * rows / self.batch_size)) if self.num_epochs else self.num_train_steps

    def length(self, rows: int) -> str:
        """How long the run is, for people, and which rows a whole number of batches leaves out or repeats."""
        steps = self.num_steps(rows)
        count = f"{steps:,} step{'' if steps == 1 else 's'}"
        if not self.num_epochs:
            return f"{count} ({steps * self.batch_size / rows:.3g} epochs of {rows:,} rows)"
        seen, wanted = steps * self.batch_size, round(self.num_epochs * rows)
        epochs = f"{self.num_epochs:g} epoch{'' if self.num_epochs == 1 else 's'} of {rows:,} rows"
        if seen == wanted:
            return f"{count} ({epochs})"
        rest = f"{abs(seen - wanted):,} {'are seen once more' if seen > wanted else 'are left out'}"
        return f"{count} ({epochs}, of which whole batches of {self.batch_size:,} make {seen:,}: {rest})"


@dataclasses.dataclass(frozen=True)
class PretrainConfig(RunConfig):
    """One pretraining run; with init_from it goes on from an earlier one (continued pretraining)."""

    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    samples: SamplesConfig = SamplesConfig()

    def __post_init__(self):
        super().__post_init__()
        check_fields(self.data.fields, ("text",))
        check_lengths(self.data, self.model)
        if self.model.lora.rank:
            raise ValueError(
                "model.lora is set by the stages that train adapters, as lora; pretraining trains everything."
            )

    def check_complete(self) -> None:
        """ValueError naming what is missing of tokenizer and data, which a preset may leave open."""
        if not self.data.tokenizer:
            load_tokenizer(self.data.tokenizer)  # which says so; one of an earlier stage may not be there yet
        super().check_complete()


def check_lengths(data: DataConfig, model: ModelConfig) -> None:
    """ValueError where the rows are longer than the model's sequences."""
    if data.sequence_length > model.max_seq_length:
        raise ValueError(
            f"data.sequence_length={data.sequence_length} is longer than model.max_seq_length={model.max_seq_length}."
        )


def check_memory(config: RunConfig, model: ModelConfig, mesh: Mesh, *, is_trained: bool) -> None:
    """ValueError, with the numbers, where a run can never fit the devices: a batch or a model out of all proportion.

    Counted are parameters in float32 and the rows themselves; gradients and one activation of each layer where the model
    is trained, otherwise the keys and values of the rows.
    """
    copies = 2 if is_trained and not model.lora.rank else 1
    activations = 2 * config.rows_at_a_time * config.row_length * model.embed_dim * model.num_layers
    sizes = f"model.num_layers={model.num_layers}, model.embed_dim={model.embed_dim}"
    rows = f"{config.batch_field}={config.batch_size} rows of {config.row_length} tokens"
    check_fits(
        {
            f"The parameters{' and gradients' if is_trained else ''} of a model with {sizes}": 4
            * copies
            * num_parameters(model),
            f"The {'activations' if is_trained else 'keys and values'} of {rows}": activations
            if is_trained
            else cache_bytes(model, config.batch_size, config.row_length),
            f"The tokens of {rows}": 4 * 4 * config.batch_size * config.row_length,
        },
        mesh.size,
    )


def check_mesh(config: RunConfig, model: ModelConfig, mesh: Mesh, *, is_trained: bool = True) -> None:
    """ValueError naming the field where the model or the batch does not divide over the mesh, or can never fit it."""
    check_memory(config, model, mesh, is_trained=is_trained)
    tensor = mesh.shape["tensor"]
    for name in ("num_heads", "mlp_dim"):
        if getattr(model, name) % tensor:
            raise ValueError(f"model.{name}={getattr(model, name)} is not a multiple of mesh.tensor={tensor}.")
    if config.data.sequence_length % mesh.shape["context"]:
        raise ValueError(
            f"data.sequence_length={config.data.sequence_length} is not a multiple of "
            f"mesh.context={mesh.shape['context']}."
        )
    local_rows(mesh, config.batch_size)
    micro = config.batch_size // config.gradient_accumulation_steps
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if micro % shards:
        raise ValueError(
            f"batch_size={config.batch_size} / gradient_accumulation_steps={config.gradient_accumulation_steps} = {micro} "
            f"rows are not a multiple of mesh.data x mesh.fsdp = {shards}."
        )
