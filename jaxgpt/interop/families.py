"""Model families of Hugging Face transformers: config.json to ModelConfig and back.

Both spellings of config.json are read, that of transformers 4 (rope_theta, rope_scaling) and that of 5 (rope_parameters).
Options of training, such as dropout, are not taken over: they belong to the next run.
"""

import dataclasses
import difflib
import math
from collections.abc import Mapping
from typing import Any, Literal

from jaxgpt.interop.rope import read_rope, unsupported, write_rope
from jaxgpt.models.config import LoraConfig, ModelConfig, RopeConfig

ACTIVATIONS = {
    "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "gelu": "gelu_exact", "silu": "silu", "swish": "silu",
    "relu2": "relu_squared",
}  # fmt: skip
_LAYER_TYPES = {"sliding_attention": "local", "full_attention": "global"}
# Options that change what a model computes, with the values that mean what a ModelConfig means.
_ONLY: dict[str, tuple] = {
    "add_cross_attention": (False, None), "scale_attn_by_inverse_layer_idx": (False, None),
    "use_bidirectional_attention": (False, None), "quantization_config": (None,), "partial_rotary_factor": (1.0, None),
}  # fmt: skip
# What null means where it is not the default.
_NULLS = {
    "sliding_window": None, "attn_logit_softcapping": None, "final_logit_softcapping": None, "num_key_value_heads": 0,
    "head_dim": 0,
}  # fmt: skip
# What a run chooses, not the architecture.
_OF_RUNS = ("dropout", "init", "dtype", "attention_kernel", "scan_layers", "remat")
_CAUSAL, _CLASSIFIER = ("ForCausalLM", "LMHeadModel"), "ForSequenceClassification"


@dataclasses.dataclass(frozen=True)
class Family:
    """How a model_type of transformers says what a ModelConfig says.

    prefix: of its architectures' names. causal: the ending of the one with logits. fixed: fields of ModelConfig that all
    its models share. named: field -> the option of the same meaning. defaults: what transformers takes for an option that
    config.json leaves out. activation: options that name it, the first that is set counts. windows: which layers are
    local: none, all, or those of layer_types.
    """

    prefix: str
    fixed: Mapping[str, Any]
    named: Mapping[str, str]
    defaults: Mapping[str, Any]
    activation: tuple[str, ...] = ("hidden_act",)
    windows: Literal["none", "all", "layer_types"] = "none"
    causal: str = "ForCausalLM"


_LLAMA_NAMES = {
    "vocab_size": "vocab_size", "num_layers": "num_hidden_layers", "embed_dim": "hidden_size",
    "num_heads": "num_attention_heads", "num_kv_heads": "num_key_value_heads", "head_dim": "head_dim",
    "mlp_dim": "intermediate_size", "max_seq_length": "max_position_embeddings", "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}  # fmt: skip
_BIASES = {"qkv_bias": "attention_bias", "attention_out_bias": "attention_bias"}
_LLAMA_DEFAULTS = {
    "num_key_value_heads": 0, "head_dim": 0, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "hidden_act": "silu",
    "attention_bias": False, "mlp_bias": False,
}  # fmt: skip
_GEMMA_DEFAULTS = _LLAMA_DEFAULTS | {
    "head_dim": 256, "tie_word_embeddings": True, "hidden_act": "gelu_pytorch_tanh", "max_position_embeddings": 8192,
}  # fmt: skip
_LLAMA = {"position": "rope", "norm": "rmsnorm", "gated_mlp": True, "init": "fan_in"}
_GEMMA = _LLAMA | {"norm_scale_offset": True, "scale_embeddings": True}

FAMILIES = {
    "gpt2": Family(
        "GPT2",
        {
            "position": "learned", "norm": "layernorm", "norm_bias": True, "gated_mlp": False, "qkv_bias": True,
            "attention_out_bias": True, "mlp_bias": True, "init": "gpt2",
        },
        {
            "vocab_size": "vocab_size", "num_layers": "n_layer", "embed_dim": "n_embd", "num_heads": "n_head",
            "mlp_dim": "n_inner", "max_seq_length": "n_positions", "norm_eps": "layer_norm_epsilon",
            "tie_embeddings": "tie_word_embeddings",
        },
        {
            "n_inner": 0, "n_positions": 1024, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
            "activation_function": "gelu_new",
        },
        activation=("activation_function",),
        causal="LMHeadModel",
    ),
    "llama": Family(
        "Llama", _LLAMA, _LLAMA_NAMES | _BIASES | {"mlp_bias": "mlp_bias"},
        _LLAMA_DEFAULTS | {"max_position_embeddings": 2048},
    ),
    "mistral": Family(
        "Mistral", _LLAMA, _LLAMA_NAMES,
        _LLAMA_DEFAULTS | {"num_key_value_heads": 8, "max_position_embeddings": 131_072, "sliding_window": 4096},
        windows="all",
    ),
    "qwen3": Family(
        "Qwen3", _LLAMA | {"qk_norm": True}, _LLAMA_NAMES | _BIASES,
        _LLAMA_DEFAULTS
        | {"head_dim": 128, "max_position_embeddings": 32_768, "sliding_window": 4096, "max_window_layers": 28},
        windows="layer_types",
    ),
    "gemma": Family(
        "Gemma", _GEMMA, _LLAMA_NAMES | _BIASES, _GEMMA_DEFAULTS | {"num_key_value_heads": 16},
        activation=("hidden_activation", "hidden_act"),
    ),
    "gemma2": Family(
        "Gemma2", _GEMMA | {"norm_position": "sandwich"},
        _LLAMA_NAMES | _BIASES
        | {"attention_softcap": "attn_logit_softcapping", "final_softcap": "final_logit_softcapping"},
        _GEMMA_DEFAULTS
        | {
            "num_key_value_heads": 4, "sliding_window": 4096, "query_pre_attn_scalar": 256,
            "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
            "hidden_activation": "gelu_pytorch_tanh",
        },
        activation=("hidden_activation",),  # transformers reads no hidden_act here
        windows="layer_types",
    ),
}  # fmt: skip


def config_from_hf(values: Mapping[str, Any]) -> ModelConfig:
    """The ModelConfig of a config.json, dtype and training options at their defaults.

    Raises:
      ValueError: naming the option, for another model_type (with the nearest known one), for an architecture that is
        neither a causal language model nor a classifier with one label, or for what a ModelConfig cannot express.
    """
    name = values.get("model_type")
    if name not in FAMILIES:
        nearest = difflib.get_close_matches(str(name), FAMILIES, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"config.json: model_type={name!r} is not one of {', '.join(FAMILIES)}; the nearest is {nearest!r}."
        )
    family = FAMILIES[name]
    for option, meanings in _ONLY.items():
        if values.get(option) not in meanings:
            raise unsupported(option, values[option], meanings[0])
    options = dict(family.defaults) | {
        option: _NULLS[option] if value is None else value
        for option, value in values.items()
        if value is not None or option in _NULLS
    }
    missing = [option for option in family.named.values() if option not in options]
    if missing:
        raise ValueError(f"config.json has no {missing[0]}, which a model of model_type={name!r} needs.")
    fields = dict(family.fixed) | {field: options[option] for field, option in family.named.items()}
    fields["activation"] = _read_activation(name, family, options)
    if fields["position"] == "rope":
        fields["rope"] = read_rope(options)
    fields["sliding_window"], fields["window_pattern"] = _read_windows(family, options)
    if name == "gemma2":
        fields["query_scale"] = options["query_pre_attn_scalar"] ** -0.5
    if name == "gpt2" and not options.get("scale_attn_weights", True):
        fields["query_scale"] = 1.0
    fields["head"] = _read_head(values)
    return ModelConfig(**fields)


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The options of config.json, in the spelling of transformers 4, which 5 reads too.

    Raises ValueError naming the first field that keeps the nearest family from expressing the model.
    """
    failed: list[tuple[str, list[tuple[str, Any]]]] = []
    for name in FAMILIES:
        values = _to_family(name, config)
        different = _differences(config, name, values)
        if not different:
            return values
        failed.append((name, different))
    name, different = min(failed, key=lambda item: len(item[1]))
    field, theirs = different[0]
    raise ValueError(
        f"model.{field}={getattr(config, field)!r} cannot be exported: of the families of transformers, {name} is the "
        f"nearest, and has {theirs!r} there."
    )


def _to_family(name: str, config: ModelConfig) -> dict[str, Any]:
    """The options in which a family would write the model, whether they say all of it or not."""
    family = FAMILIES[name]
    architecture = family.prefix + (_CLASSIFIER if config.head == "scalar" else family.causal)
    values: dict[str, Any] = {"model_type": name, "architectures": [architecture]}
    values |= {option: getattr(config, field) for field, option in family.named.items()}
    activation = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}[config.activation]
    values |= dict.fromkeys(family.activation, activation)
    if "position" in family.fixed and family.fixed["position"] == "rope":
        values |= write_rope(config.rope)
    if name == "gpt2":
        values["scale_attn_weights"] = config.query_scale != 1.0
    if name == "gemma2":
        scalar = config.query_scale**-2
        values["query_pre_attn_scalar"] = round(scalar) if math.isclose(scalar, round(scalar)) else scalar
    if family.windows != "none":
        values["sliding_window"] = config.sliding_window
    if name == "gemma2" and config.sliding_window is None:  # transformers needs a window even where no layer has one
        values["sliding_window"] = config.max_seq_length
    if family.windows == "layer_types":
        local = config.sliding_window is not None
        kinds = [config.window_pattern[i % len(config.window_pattern)] for i in range(config.num_layers)]
        kinds = kinds if local else ["global"] * config.num_layers
        theirs = {ours: theirs for theirs, ours in _LAYER_TYPES.items()}
        values["layer_types"] = [theirs[kind] for kind in kinds]
        if name == "qwen3":  # its older releases know no layer_types
            first = kinds.index("local") if "local" in kinds else config.num_layers
            values |= {"use_sliding_window": local, "max_window_layers": first}
    if config.head == "scalar":
        values |= {"id2label": {"0": "reward"}, "label2id": {"reward": 0}}
    return values


def _differences(config: ModelConfig, name: str, values: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """(field, value there) of what the model that `values` say computes differently."""
    if name in ("gpt2", "llama", "gemma2") and config.embed_dim % config.num_heads:  # they refuse it
        return [("num_heads", f"a divisor of model.embed_dim={config.embed_dim}")] * len(FAMILIES)
    other = config_from_hf(values)
    ours, theirs = _canonical(config), _canonical(other)
    same = lambda a, b: math.isclose(a, b) if isinstance(a, float) and isinstance(b, float) else a == b
    fields = [field.name for field in dataclasses.fields(ModelConfig)]
    return [(f, getattr(other, f)) for f in fields if not same(getattr(ours, f), getattr(theirs, f))]


def _canonical(config: ModelConfig) -> ModelConfig:
    """The config with defaults in the fields that have no effect on what the model computes."""
    default = ModelConfig()
    changes: dict[str, Any] = {name: getattr(default, name) for name in _OF_RUNS}
    changes["rope"] = read_rope(write_rope(config.rope)) if config.position == "rope" else RopeConfig()
    if config.sliding_window is None or "local" not in config.window_pattern:
        changes |= {"sliding_window": None, "window_pattern": default.window_pattern}
    else:
        changes["window_pattern"] = _period(config.window_pattern)
    if not config.lora.rank:
        changes["lora"] = LoraConfig()
    return dataclasses.replace(config, **changes)


def _read_head(values: Mapping[str, Any]) -> Literal["lm", "scalar"]:
    architecture = (values.get("architectures") or [_CAUSAL[0]])[0]
    if architecture.endswith(_CAUSAL):
        return "lm"
    if not architecture.endswith(_CLASSIFIER):
        raise ValueError(
            f"config.json: architectures={architecture!r} is neither a causal language model (...{_CAUSAL[0]}) nor a reward "
            f"model (...{_CLASSIFIER})."
        )
    num_labels = values.get("num_labels", len(values.get("id2label") or (0, 1)))  # transformers takes two for none
    if num_labels != 1:
        raise ValueError(f"config.json: a reward model has num_labels=1, not {num_labels}.")
    return "scalar"


def _read_activation(name: str, family: Family, options: Mapping[str, Any]) -> str:
    option = next(option for option in family.activation if option in options)
    if options[option] not in ACTIVATIONS:
        nearest = difflib.get_close_matches(options[option], ACTIVATIONS, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"config.json: {option}={options[option]!r} is not one of {', '.join(ACTIVATIONS)}; the nearest is {nearest!r}."
        )
    if name == "gemma" and options[option] == "gelu":  # of the first release, whose weights mean the approximation
        return "gelu_tanh"
    return ACTIVATIONS[options[option]]


def _read_windows(family: Family, options: Mapping[str, Any]) -> tuple[int | None, tuple]:
    window = options.get("sliding_window")
    if family.windows == "none" or window is None:
        return None, ("local",)
    if family.windows == "all":
        return window, ("local",)
    layers = range(options["num_hidden_layers"])
    if "max_window_layers" in options:  # qwen3
        default = ["sliding_attention" if i >= options["max_window_layers"] else "full_attention" for i in layers]
        window = window if options.get("use_sliding_window", False) else None
    else:
        default = ["full_attention" if i % 2 else "sliding_attention" for i in layers]
    types = options.get("layer_types") or default
    unknown = [kind for kind in types if kind not in _LAYER_TYPES]
    if unknown or len(types) != len(layers):
        wrong = repr(unknown[0]) if unknown else f"a list of {len(types)} for {len(layers)} layers"
        raise ValueError(
            f"config.json: layer_types holds {wrong}; it names {' or '.join(_LAYER_TYPES)} for each layer."
        )
    if window is None or "sliding_attention" not in types:
        return None, ("local",)
    return window, _period(tuple(_LAYER_TYPES[kind] for kind in types))


def _period(kinds: tuple) -> tuple:
    """The shortest tuple that `kinds` repeats."""
    sizes = (n for n in range(1, len(kinds) + 1) if len(kinds) % n == 0)
    return next(kinds[:n] for n in sizes if kinds[:n] * (len(kinds) // n) == kinds)
