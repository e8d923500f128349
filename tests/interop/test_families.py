"""config.json and ModelConfig: each family both ways, and what is refused."""

import dataclasses
import json

import pytest

from configs.models import PRESETS, model_config
from jaxgpt import config as config_lib
from jaxgpt.interop.families import FAMILIES, config_from_hf, config_to_hf
from jaxgpt.models.config import LoraConfig, ModelConfig, RopeConfig

LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 32, "hidden_size": 16,
    "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 4,
}  # fmt: skip
PUBLISHED = [name for name in PRESETS if not name.startswith(("tiny", "cpu"))]


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_is_exported_to_its_family_and_comes_back(name):
    config = config_lib.build(ModelConfig, model_config(name), "model")
    values = json.loads(json.dumps(config_to_hf(config)))
    family = name.split("-")[0]
    assert values["model_type"] == {"llama2": "llama", "llama3": "llama"}.get(family, family)
    assert config_from_hf(values) == config


# The published config.json of Qwen3 0.6B, Llama 3.2 1B, Gemma 2 27B and Mistral 7B v0.1, in what concerns the architecture.
HUB = {
    "qwen3-0.6b": {
        "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "head_dim": 128,
        "hidden_act": "silu", "hidden_size": 1024, "intermediate_size": 3072, "max_position_embeddings": 40960,
        "max_window_layers": 28, "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None,
        "tie_word_embeddings": True, "use_sliding_window": False, "vocab_size": 151936,
    },
    "llama3-1b": {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "attention_bias": False, "head_dim": 64,
        "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 8192, "max_position_embeddings": 131072,
        "mlp_bias": False, "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8,
        "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "tie_word_embeddings": True,
        "vocab_size": 128256,
        "rope_scaling": {
            "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
    },
    "gemma2-27b": {
        "model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"], "attention_bias": False,
        "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "head_dim": 128,
        "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 4608,
        "intermediate_size": 36864, "max_position_embeddings": 8192, "num_attention_heads": 32,
        "num_hidden_layers": 46, "num_key_value_heads": 16, "query_pre_attn_scalar": 144, "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0, "sliding_window": 4096, "vocab_size": 256000,
    },
    "mistral-7b": {
        "model_type": "mistral", "architectures": ["MistralForCausalLM"], "hidden_act": "silu", "hidden_size": 4096,
        "intermediate_size": 14336, "max_position_embeddings": 32768, "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 10000.0,
        "sliding_window": 4096, "tie_word_embeddings": False, "vocab_size": 32000,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", HUB)
def test_a_published_config_gives_the_preset(name):
    assert config_from_hf(HUB[name]) == config_lib.build(ModelConfig, model_config(name), "model")


def test_both_spellings_of_rope_are_read():
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    old = config_from_hf(LLAMA | {"rope_theta": 500.0, "rope_scaling": scaling})
    new = config_from_hf(LLAMA | {"rope_parameters": scaling | {"rope_theta": 500.0}})
    assert old == new
    assert old.rope == RopeConfig(theta=500.0, scaling="yarn", factor=4.0, original_max_seq_length=16)
    assert config_from_hf(LLAMA | {"rope_scaling": {"type": "linear", "factor": 2}}).rope.factor == 2.0


def test_layer_types_become_the_shortest_pattern():
    qwen3 = LLAMA | {"model_type": "qwen3", "sliding_window": 8, "use_sliding_window": True}
    assert config_from_hf(qwen3 | {"max_window_layers": 0}).window_pattern == ("local",)
    assert config_from_hf(qwen3 | {"max_window_layers": 1}).window_pattern == ("global", "local", "local", "local")
    assert config_from_hf(qwen3 | {"max_window_layers": 4}).sliding_window is None
    assert config_from_hf(qwen3 | {"use_sliding_window": False, "max_window_layers": 0}).sliding_window is None
    types = ["sliding_attention", "full_attention"] * 2
    assert config_from_hf(qwen3 | {"layer_types": types}).window_pattern == ("local", "global")


def test_gemma2_reads_its_own_name_of_the_activation_only():
    """transformers' Gemma2Config has hidden_activation, gelu_pytorch_tanh where nothing is said, whatever hidden_act is."""
    gemma2 = HUB["gemma2-27b"]
    bare = {option: value for option, value in gemma2.items() if option not in ("hidden_act", "hidden_activation")}
    read = lambda **options: config_from_hf(bare | options).activation
    assert (read(), read(hidden_act="gelu"), read(hidden_activation="gelu")) == ("gelu_tanh", "gelu_tanh", "gelu_exact")


def test_gemma2_without_windows_is_exported_with_one_that_no_layer_has():
    """transformers builds the mask of a window for Gemma 2 whatever its layers are, and fails where there is no window."""
    config = dataclasses.replace(config_from_hf(HUB["gemma2-27b"]), sliding_window=None, window_pattern=("local",))
    values = config_to_hf(config)
    assert (values["model_type"], values["sliding_window"]) == ("gemma2", config.max_seq_length)
    assert set(values["layer_types"]) == {"full_attention"}
    assert config_from_hf(values) == config


def test_older_releases_of_qwen3_find_the_first_local_layer():
    config = config_from_hf(
        LLAMA | {"model_type": "qwen3", "sliding_window": 8, "use_sliding_window": True, "max_window_layers": 3}
    )
    values = config_to_hf(config)
    assert (values["max_window_layers"], values["use_sliding_window"], values["sliding_window"]) == (3, True, 8)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "qwen2"}, "model_type='qwen2'.*nearest is 'qwen3'"),
        ({"model_type": "mixtral"}, "nearest is 'mistral'"),
        ({"architectures": ["LlamaForTokenClassification"]}, "LlamaForTokenClassification"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "num_labels=1, not 2"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type='dynamic'.*yarn"),
        ({"rope_scaling": {"rope_type": "linear"}}, "no factor"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "attention_factor": 1.0}}, "attention_factor=1.0.*1.069"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "layer type"),
        ({"hidden_act": "gelu_fast"}, "hidden_act='gelu_fast'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_size": None}, "no hidden_size"),
        ({"model_type": "gemma2", "layer_types": ["chunked_attention"] * 4}, "chunked_attention"),
        ({"model_type": "gemma2", "layer_types": ["full_attention"]}, "a list of 1 for 4 layers"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_refused_by_name(change, words):
    with pytest.raises(ValueError, match=words) as error:
        config_from_hf(LLAMA | change)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"position": "alibi"}, "model.position='alibi'.*'rope'"),
        ({"norm_position": "post"}, "model.norm_position='post'"),
        ({"activation": "relu_squared", "gated_mlp": False}, "model.gated_mlp=False"),
        ({"query_scale": 0.5}, "model.query_scale=0.5"),
        ({"attention_softcap": 5.0}, "model.attention_softcap=5.0"),
        ({"sliding_window": 8, "window_pattern": ("global", "local")}, "model.window_pattern"),
        ({"lora": LoraConfig(rank=2)}, "model.lora"),
    ],
)
def test_what_no_family_has_is_refused_by_field(changes, words):
    with pytest.raises(ValueError, match=words) as error:
        config_to_hf(dataclasses.replace(ModelConfig(vocab_size=32), **changes))
    assert "\n" not in str(error.value)


def test_a_reward_model_has_one_label():
    config = ModelConfig(vocab_size=32, head="scalar")
    values = config_to_hf(config)
    assert values["architectures"] == ["LlamaForSequenceClassification"]
    assert config_from_hf(values).head == "scalar"


def test_a_family_is_added_with_its_table():
    from jaxgpt.interop.names import TABLES

    assert FAMILIES.keys() == TABLES.keys()
