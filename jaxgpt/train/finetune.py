"""What the stages that start from a model share: its config with overrides, adapters beside it, and how both are loaded."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

from jax.sharding import Mesh

from jaxgpt import tree
from jaxgpt.data.chat import ChatTemplate
from jaxgpt.data.tokenizer import Tokenizer, load_tokenizer
from jaxgpt.models import decoder, lora
from jaxgpt.models.config import LoraConfig, ModelConfig
from jaxgpt.runs.load import Run, load_trunk, parent_of, read_run, trainable, without_adapters
from jaxgpt.train.config import RunConfig
from jaxgpt.types import Params

DEFAULT_TEMPLATE = "roles"


@dataclasses.dataclass(frozen=True)
class ModelOverrides:
    """What may differ from the model of init_from; None keeps what it has. See ModelConfig for the meanings."""

    dropout: float | None = None
    max_seq_length: int | None = None
    dtype: Literal["auto", "float32", "bfloat16"] | None = None
    attention_kernel: Literal["auto", "xla", "cudnn", "splash"] | None = None
    scan_layers: bool | None = None
    remat: Literal["auto", "none", "dots", "full"] | None = None


@dataclasses.dataclass(frozen=True)
class FinetuneConfig(RunConfig):
    """A run that starts from the model of init_from.

    lora: rank > 0 freezes the model and trains adapters (and a new head) alone. chat_template: a name (plain, chatml,
      llama3, gemma, roles) or a .jinja file; empty takes the parent's, or `roles` where it has none.
    """

    model: ModelOverrides = ModelOverrides()
    lora: LoraConfig = LoraConfig()
    chat_template: str = ""

    def check_parent(self) -> None:
        """ValueError where there is no model to start from."""
        if not self.init_from:
            raise ValueError("init_from is required: --config.init_from=DIR, the workdir of the model to start from.")

    def check_complete(self) -> None:
        """ValueError naming what is missing of model and data, or a template that is neither a name nor a file."""
        self.check_parent()
        if self.chat_template and not self.chat_template.endswith(".jinja"):
            ChatTemplate.from_config(self.chat_template, "chat_template")
        super().check_complete()


@dataclasses.dataclass(frozen=True)
class Start:
    """Where a run starts: its parent, the model it trains, the tokenizer and template it shares with the parent."""

    parent: Run
    parents: dict[str, dict[str, str]]
    model: ModelConfig
    tokenizer: Tokenizer
    template: ChatTemplate

    def init_fn(self) -> Callable[[Any], Any]:
        """Rng -> boxed parameters of the model."""
        return functools.partial(decoder.init_params, self.model)

    def load(self, abstract: Params, mesh: Mesh) -> Params:
        """The parent's parameters where the model has the same; see `load_start`."""
        return load_start(self.parent, self.model, abstract, mesh)

    def trainable(self) -> Callable[[str], bool]:
        """Which parameters are trained."""
        return trainable(self.model)


def load_start(run: Run, model: ModelConfig, abstract: Params, mesh: Mesh) -> Params:
    """A run's parameters where `model` has the same, and the magnitudes that fresh DoRA adapters on them start with."""
    base = load_trunk(run, abstract, mesh)
    named = tree.named_leaves(abstract)
    starts = {name: leaf for name, leaf in tree.named_leaves(lora.magnitudes(model, base)).items() if name in named}
    return tree.from_named(tree.named_leaves(base) | starts)


def start_from(config: FinetuneConfig, *, head: Literal["lm", "scalar"] = "lm") -> Start:
    """Read the parent of a run and settle what depends on it.

    Raises ValueError where init_from is missing or not finished, or where tokenizer or template are not the parent's (with
    the digests).
    """
    config.check_parent()
    parent = read_run(config.init_from)
    tokenizer = load_tokenizer(config.data.tokenizer) if config.data.tokenizer else parent.tokenizer
    template = parent.template
    if config.chat_template or template is None:
        template = ChatTemplate.from_config(config.chat_template or DEFAULT_TEMPLATE, "chat_template")
    changed = {name: v for name, v in dataclasses.asdict(config.model).items() if v is not None}
    model = dataclasses.replace(without_adapters(parent.config), head=head, lora=config.lora, **changed)
    if model.position == "learned" and model.max_seq_length != parent.config.max_seq_length:
        raise ValueError(
            f"model.max_seq_length={model.max_seq_length} cannot differ from the parent's {parent.config.max_seq_length}: "
            "its positions are learned."
        )
    if head == "lm" and parent.config.head != "lm":
        raise ValueError(f"init_from: {config.init_from} is a reward model; it has no logits to train.")
    return Start(parent, {"init_from": parent_of(parent, tokenizer, template)}, model, tokenizer, template)
