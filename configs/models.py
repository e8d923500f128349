"""Architectures of the known families, at their published sizes.

`model_config(name)` gives the fields that differ from jaxgpt.models.config.ModelConfig's defaults, to be put under
`model` of a stage's config; single fields are then overridden as --config.model.FIELD=value. tests/models/test_presets.py
checks each parameter count against the published one.
"""

import difflib


def model_config(name: str) -> dict:
    """The preset `name` as a plain dict; ValueError with the nearest name where there is none."""
    if name not in PRESETS:
        nearest = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.0)[0]
        raise ValueError(f"There is no model preset {name!r}; the nearest is {nearest!r}.")
    return dict(PRESETS[name])


def _shape(num_layers, embed_dim, num_heads, num_kv_heads, mlp_dim, head_dim=0) -> dict:
    """Sizes; those that follow from others by default are left out, so that overriding one moves them too."""
    shape = {"num_layers": num_layers, "embed_dim": embed_dim, "num_heads": num_heads}
    if num_kv_heads != num_heads:
        shape["num_kv_heads"] = num_kv_heads
    if mlp_dim != 4 * embed_dim:
        shape["mlp_dim"] = mlp_dim
    if head_dim:
        shape["head_dim"] = head_dim
    return shape


def _gpt2(num_layers, embed_dim, num_heads) -> dict:
    """Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"."""
    return _shape(num_layers, embed_dim, num_heads, num_heads, 4 * embed_dim) | {
        "vocab_size": 50_257,
        "max_seq_length": 1024,
        "position": "learned",
        "norm": "layernorm",
        "norm_bias": True,
        "activation": "gelu_tanh",
        "gated_mlp": False,
        "qkv_bias": True,
        "attention_out_bias": True,
        "mlp_bias": True,
    }


def _llama2(*shape) -> dict:
    """Touvron et al. 2023, arXiv:2307.09288."""
    return _shape(*shape) | {"vocab_size": 32_000, "max_seq_length": 4096, "tie_embeddings": False, "init": "fan_in"}


def _llama3(*shape, factor=8.0, tied=False) -> dict:
    """Llama 3.1 (8b, 70b, 405b) and 3.2 (1b, 3b): Grattafiori et al. 2024, arXiv:2407.21783."""
    return _shape(*shape) | {
        "vocab_size": 128_256,
        "max_seq_length": 131_072,
        "rope": {"theta": 500_000.0, "scaling": "llama3", "factor": factor, "original_max_seq_length": 8192},
        "tie_embeddings": tied,
        "init": "fan_in",
    }


def _gemma(*shape) -> dict:
    """Mesnard et al. 2024, arXiv:2403.08295."""
    return _shape(*shape, 256) | {
        "vocab_size": 256_000,
        "max_seq_length": 8192,
        "norm_scale_offset": True,
        "norm_eps": 1e-6,
        "activation": "gelu_tanh",
        "scale_embeddings": True,
        "init": "fan_in",
    }


def _gemma2(*shape, head_dim=256, query_scale=256**-0.5) -> dict:
    """Riviere et al. 2024, arXiv:2408.00118: sandwich norms, soft-caps, every other layer local."""
    return _gemma(*shape) | {
        "head_dim": head_dim,
        "norm_position": "sandwich",
        "sliding_window": 4096,
        "window_pattern": ("local", "global"),
        "attention_softcap": 50.0,
        "final_softcap": 30.0,
        "query_scale": query_scale,
    }


def _qwen3(*shape, tied=False) -> dict:
    """Yang et al. 2025, arXiv:2505.09388: per-head norms of queries and keys."""
    return _shape(*shape, 128) | {
        "vocab_size": 151_936,
        "max_seq_length": 40_960,
        "rope": {"theta": 1_000_000.0},
        "norm_eps": 1e-6,
        "qk_norm": True,
        "tie_embeddings": tied,
        "init": "fan_in",
    }


# Layers, width, heads, kv heads, mlp width.
PRESETS = {
    "gpt2-124m": _gpt2(12, 768, 12),
    "gpt2-355m": _gpt2(24, 1024, 16),
    "gpt2-774m": _gpt2(36, 1280, 20),
    "gpt2-1.5b": _gpt2(48, 1600, 25),
    "llama2-7b": _llama2(32, 4096, 32, 32, 11_008),
    "llama2-13b": _llama2(40, 5120, 40, 40, 13_824),
    "llama2-70b": _llama2(80, 8192, 64, 8, 28_672),
    "llama3-1b": _llama3(16, 2048, 32, 8, 8192, factor=32.0, tied=True),
    "llama3-3b": _llama3(28, 3072, 24, 8, 8192, factor=32.0, tied=True),
    "llama3-8b": _llama3(32, 4096, 32, 8, 14_336),
    "llama3-70b": _llama3(80, 8192, 64, 8, 28_672),
    "llama3-405b": _llama3(126, 16_384, 128, 8, 53_248),
    "gemma-2b": _gemma(18, 2048, 8, 1, 16_384),
    "gemma-7b": _gemma(28, 3072, 16, 16, 24_576),
    "gemma2-2b": _gemma2(26, 2304, 8, 4, 9216),
    "gemma2-9b": _gemma2(42, 3584, 16, 8, 14_336),
    "gemma2-27b": _gemma2(46, 4608, 32, 16, 36_864, head_dim=128, query_scale=144**-0.5),
    "qwen3-0.6b": _qwen3(28, 1024, 16, 8, 3072, tied=True),
    "qwen3-1.7b": _qwen3(28, 2048, 16, 8, 6144, tied=True),
    "qwen3-4b": _qwen3(36, 2560, 32, 8, 9728, tied=True),
    "qwen3-8b": _qwen3(36, 4096, 32, 8, 12_288),
    "qwen3-32b": _qwen3(64, 5120, 64, 8, 25_600),
    "mistral-7b": _shape(32, 4096, 32, 8, 14_336)  # Jiang et al. 2023, arXiv:2310.06825
    | {
        "vocab_size": 32_000,
        "max_seq_length": 32_768,
        "sliding_window": 4096,
        "tie_embeddings": False,
        "init": "fan_in",
    },
    "tiny": _shape(4, 128, 4, 4, 384) | {"max_seq_length": 256},
    "tiny-gpt2": _gpt2(4, 128, 4) | {"vocab_size": 0, "max_seq_length": 256},
    "cpu-14m": _gpt2(6, 384, 6) | {"vocab_size": 8192, "max_seq_length": 256},
}
