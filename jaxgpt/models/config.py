"""What a decoder may be: every architecture option, validated at construction."""

import dataclasses
import math
import re
from typing import Literal

from jaxgpt.config import check_bounds


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864) and its long-context scalings.

    scaling: `linear` divides positions by `factor` (Chen et al. 2023, arXiv:2306.15595); `llama3` rescales low
      frequencies only (Llama 3.1); `yarn` interpolates by parts and scales attention (Peng et al. 2023,
      arXiv:2309.00071).
    original_max_seq_length: the length the model was trained on before scaling (`llama3`, `yarn`).
    """

    theta: float = 10_000.0
    scaling: Literal["none", "linear", "llama3", "yarn"] = "none"
    factor: float = 1.0
    original_max_seq_length: int = 8192
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0

    def __post_init__(self):
        check_bounds(
            self, "model.rope.", theta="positive", factor=1, original_max_seq_length=1, low_freq_factor="positive",
            high_freq_factor="positive", beta_fast="positive", beta_slow="positive",
        )  # fmt: skip


# The linear maps of a layer, by the names that lora.target_modules is matched against.
LINEAR_MODULES = ("query", "key", "value", "out", "mlp/gate", "mlp/up", "mlp/down")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters beside frozen kernels: y = x W + s (dropout(x) A) B (Hu et al. 2021, arXiv:2106.09685).

    rank: Z; 0 is no adapters. alpha: s = alpha / rank, or alpha / sqrt(rank) where rank_stabilized (Kalajdzievski 2023,
      arXiv:2312.03732). dropout: on the adapter's input.
    target_modules: a regular expression that the whole name of an adapted map must match; the names are query, key,
      value, out, mlp/gate, mlp/up, mlp/down.
    dora: a trained magnitude per output, direction from W + s A B (Liu et al. 2024, arXiv:2402.09353).
    """

    rank: int = 0
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: str = ".*"
    rank_stabilized: bool = False
    dora: bool = False

    def __post_init__(self):
        if self.rank < 0:
            raise ValueError(f"lora.rank must be 0 (no adapters) or positive, not {self.rank}.")
        check_bounds(self, "lora.", alpha="positive")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout must be in [0, 1), not {self.dropout}.")
        try:
            targets = [name for name in LINEAR_MODULES if re.fullmatch(self.target_modules, name)]
        except re.error as error:
            raise ValueError(
                f"lora.target_modules={self.target_modules!r} is not a regular expression: {error}."
            ) from error
        if self.rank and not targets:
            raise ValueError(
                f"lora.target_modules={self.target_modules!r} matches no linear map; there are {', '.join(LINEAR_MODULES)}."
            )

    def adapts(self, name: str) -> bool:
        """Whether the linear map of this name has an adapter."""
        return self.rank > 0 and re.fullmatch(self.target_modules, name) is not None

    @property
    def scale(self) -> float:
        """The factor s on the adapter's output."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """One decoder-only transformer. Defaults are a small modern (Llama-like) one; presets fill in the known families.

    vocab_size: 0 means "take it from the tokenizer" and is resolved before a model is built.
    num_kv_heads: 0 means num_heads (MHA); 1 is MQA. head_dim: 0 means embed_dim // num_heads.
    mlp_dim: 0 means 4 * embed_dim. max_seq_length: size of the learned position table and upper bound of sequences.
    norm_scale_offset: Gemma's RMSNorm, which multiplies by (1 + scale).
    norm_position: `pre`; `post` (the norm after each residual sum, Vaswani et al. 2017); `sandwich` (before and after
      each sub-layer, Gemma 2).
    sliding_window: tokens a local layer may look back on, itself included. window_pattern is repeated over the layers:
      ("local", "global") alternates, starting local. Ignored where sliding_window is None.
    query_scale: queries are multiplied by it; 0 means head_dim ** -0.5.
    attention_softcap, final_softcap: x -> cap * tanh(x / cap); None switches it off.
    scale_embeddings: token embeddings are multiplied by sqrt(embed_dim) (Gemma).
    head: `lm` gives logits; `scalar` gives one value per token (reward and value models).
    init: `gpt2` (std 0.02, residual projections / sqrt(2 L)) or `fan_in` (std 1 / sqrt(fan_in)).
    dtype: compute dtype; `auto` is bfloat16 on TPU and GPU, float32 on CPU. Parameters are always float32 masters.
    attention_kernel: all kernels mean the same; `auto` picks by backend.
    scan_layers: None chooses by backend. The parameter layout is stacked either way, so checkpoints do not depend on it.
    remat: what the backward pass recomputes. `none` keeps everything, `dots` keeps matmul outputs, `full` keeps only
      the layer inputs; `auto` chooses by backend.
    lora: adapters beside the layers' kernels; stages that offer them set it.
    """

    vocab_size: int = 0
    num_layers: int = 4
    embed_dim: int = 128
    num_heads: int = 4
    num_kv_heads: int = 0
    head_dim: int = 0
    mlp_dim: int = 0
    max_seq_length: int = 256

    position: Literal["learned", "rope", "sinusoidal", "alibi", "none"] = "rope"
    rope: RopeConfig = RopeConfig()
    norm: Literal["layernorm", "rmsnorm"] = "rmsnorm"
    norm_position: Literal["pre", "post", "sandwich"] = "pre"
    norm_scale_offset: bool = False
    norm_bias: bool = False
    norm_eps: float = 1e-5
    activation: Literal["gelu_tanh", "gelu_exact", "silu", "relu_squared"] = "silu"
    gated_mlp: bool = True
    qkv_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    window_pattern: tuple[Literal["local", "global"], ...] = ("local",)
    query_scale: float = 0.0
    attention_softcap: float | None = None
    final_softcap: float | None = None
    tie_embeddings: bool = True
    scale_embeddings: bool = False
    head: Literal["lm", "scalar"] = "lm"
    dropout: float = 0.0
    init: Literal["gpt2", "fan_in"] = "gpt2"

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    attention_kernel: Literal["auto", "xla", "cudnn", "splash"] = "auto"
    scan_layers: bool | None = None
    remat: Literal["auto", "none", "dots", "full"] = "auto"
    lora: LoraConfig = LoraConfig()

    def __post_init__(self):
        check_bounds(
            self, "model.", num_layers=1, embed_dim=1, num_heads=1, max_seq_length=1, vocab_size=0, num_kv_heads=0,
            head_dim=0, mlp_dim=0, query_scale=0, norm_eps="positive", attention_softcap="positive",
            final_softcap="positive", sliding_window=1,
        )  # fmt: skip
        fill = lambda name, value: object.__setattr__(self, name, value)
        if not self.num_kv_heads:
            fill("num_kv_heads", self.num_heads)
        if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"model.num_heads={self.num_heads} is not a multiple of model.num_kv_heads={self.num_kv_heads}; "
                f"the nearest valid value is {_nearest_divisor(self.num_heads, self.num_kv_heads)}."
            )
        if not self.head_dim:
            if self.embed_dim % self.num_heads:
                raise ValueError(
                    f"model.embed_dim={self.embed_dim} is not a multiple of model.num_heads={self.num_heads}; the "
                    f"nearest valid number of heads is {_nearest_divisor(self.embed_dim, self.num_heads)}, or set "
                    "model.head_dim."
                )
            fill("head_dim", self.embed_dim // self.num_heads)
        if not self.mlp_dim:
            fill("mlp_dim", 4 * self.embed_dim)
        if not self.query_scale:
            fill("query_scale", 1 / math.sqrt(self.head_dim))
        if self.position == "rope" and self.head_dim % 2:
            raise ValueError(f"model.head_dim={self.head_dim} must be even for model.position='rope'.")
        if not self.window_pattern:
            raise ValueError("model.window_pattern must name at least one layer kind, 'local' or 'global'.")
        if self.sliding_window is not None and self.num_layers % len(self.window_pattern):
            raise ValueError(
                f"model.num_layers={self.num_layers} is not a multiple of the length of model.window_pattern "
                f"({len(self.window_pattern)})."
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.dropout must be in [0, 1), not {self.dropout}.")


def _nearest_divisor(n: int, wanted: int) -> int:
    """The divisor of `n` closest to `wanted`."""
    return min((d for d in range(1, n + 1) if n % d == 0), key=lambda d: abs(d - wanted))
