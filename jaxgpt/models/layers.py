"""The parts of a block: einsum layers, norms, rotary positions, MLP. Axis legend in jaxgpt/types.py."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxgpt.models.config import LoraConfig, ModelConfig, RopeConfig
from jaxgpt.partition import shard
from jaxgpt.types import Array


def compute_dtype(cfg: ModelConfig) -> Any:
    """The dtype of activations: cfg.dtype, or for `auto` bfloat16 on TPU and GPU and float32 on CPU."""
    if cfg.dtype == "auto":
        return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    return jnp.dtype(cfg.dtype)


def kernel_std(cfg: ModelConfig, fan_in: int, *, residual: bool = False) -> float:
    """Standard deviation of a kernel's normal initialization.

    `gpt2`: 0.02, and 0.02 / sqrt(2 L) for the projections that write to the residual stream, which add up over 2 L
    sub-layers (Radford et al. 2019, §2.3). `fan_in`: 1 / sqrt(fan_in) with the same factor for those.
    """
    std = 0.02 if cfg.init == "gpt2" else 1 / math.sqrt(fan_in)
    return std / math.sqrt(2 * cfg.num_layers) if residual else std


class Einsum(nn.Module):
    """A linear map written as an einsum, with an optional bias over its output axes and an optional LoRA branch.

    equation: e.g. "BTD,DNH->BNTH". shape, names: of the kernel, with its logical axes. bias_axes: indices of the kernel
      axes the bias has, and the shape it is broadcast from. lora: the adapter, None without one; its dropout is on where
      there is an rng named "dropout".
    """

    equation: str
    shape: tuple[int, ...]
    names: tuple[str | None, ...]
    std: float
    dtype: Any
    bias_axes: tuple[int, ...] | None = None
    bias_shape: tuple[int, ...] = ()
    lora: LoraConfig | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        init = nn.with_logical_partitioning(nn.initializers.normal(self.std), self.names)
        kernel: Any = self.param("kernel", init, self.shape, jnp.float32)
        out = _einsum(self.equation, x, kernel.astype(self.dtype))
        if self.lora is not None:
            out = self.adapt(self.lora, x, kernel, out)
        if self.bias_axes is not None:
            names = tuple(self.names[i] for i in self.bias_axes)
            zeros = nn.with_logical_partitioning(nn.initializers.zeros, names)
            bias: Any = self.param("bias", zeros, tuple(self.shape[i] for i in self.bias_axes), jnp.float32)
            out = out + bias.astype(self.dtype).reshape(self.bias_shape)
        return out

    def adapt(self, lora: LoraConfig, x: Array, kernel: Array, out: Array) -> Array:
        """The map's output with the adapter's; A starts normal with std 1 / sqrt(fan_in), B at 0 (Hu et al. 2021, §4.1)."""
        (left, right), result = self.equation.split("->")[0].split(","), self.equation.split("->")[1]
        inputs = [i for i, axis in enumerate(right) if axis in left]
        outputs = [i for i, axis in enumerate(right) if axis not in left]
        shape_of, names_of = lambda axes: [self.shape[i] for i in axes], lambda axes: [self.names[i] for i in axes]

        def parameter(name: str, init, names: list, shape: list) -> Any:
            return self.param(name, nn.with_logical_partitioning(init, tuple(names)), tuple(shape), jnp.float32)

        std = 1 / math.sqrt(math.prod(shape_of(inputs)))
        names, shape = [*names_of(inputs), "lora"], [*shape_of(inputs), lora.rank]
        a = parameter("lora_a", nn.initializers.normal(std), names, shape)
        names, shape = ["lora", *names_of(outputs)], [lora.rank, *shape_of(outputs)]
        b = parameter("lora_b", nn.initializers.zeros, names, shape)
        if lora.dropout and self.has_rng("dropout"):
            kept = jax.random.bernoulli(self.make_rng("dropout"), 1 - lora.dropout, x.shape)
            x = jnp.where(kept, x / (1 - lora.dropout), 0).astype(x.dtype)
        a_axes, b_axes = "".join(right[i] for i in inputs) + "Z", "Z" + "".join(right[i] for i in outputs)
        low = _einsum(f"{left},{a_axes}->BTZ", x, a.astype(self.dtype))
        out = out + lora.scale * _einsum(f"BTZ,{b_axes}->{result}", low, b.astype(self.dtype))
        if lora.dora:
            norm_of = lambda w: jnp.sqrt(jnp.sum(jnp.square(w), axis=tuple(inputs)))
            magnitude = parameter("magnitude", lambda *_: norm_of(kernel), names_of(outputs), shape_of(outputs))
            merged = kernel + lora.scale * jnp.einsum(f"{a_axes},{b_axes}->{right}", a, b)
            norm = jax.lax.stop_gradient(norm_of(merged))  # a constant in the gradient (Liu et al. 2024, §4.3)
            out = out * (magnitude / norm).astype(out.dtype).reshape(_broadcast(result, b_axes[1:], norm.shape))
        return out


def _broadcast(result: str, axes: str, shape: tuple[int, ...]) -> list[int]:
    """The shape in which an array with `axes` multiplies one with the axes `result`."""
    sizes = dict(zip(axes, shape, strict=True))
    return [sizes.get(axis, 1) for axis in result]


def kernel_input_axes(name: str, ndim: int) -> tuple[int, ...]:
    """Which axes of a stacked kernel [L, ...] are contracted with the input; the attention output's is [L, N, H, D]."""
    return tuple(range(1, ndim - 1)) if name.split("/")[-2] == "out" else (1,)


def lora_for(cfg: ModelConfig, name: str) -> LoraConfig | None:
    """The adapter of a layer's linear map, None where it has none."""
    return cfg.lora if cfg.lora.adapts(name) else None


def _einsum(equation: str, x: Array, kernel: Array) -> Array:
    """jnp.einsum; on CPU with B and T merged where input and output both lead with them.

    XLA's CPU backend computes the kernel's gradient of the three-axis form from transposed copies of the activations
    that it fuses with what made them: 50 ms where the merged form takes 11 (16 x 256 tokens, 256 -> 768).
    """
    left, right = equation.split("->")
    if jax.default_backend() == "cpu" and left.startswith("BT") and right.startswith("BT"):
        out = jnp.einsum(equation.replace("BT", "X"), x.reshape(-1, *x.shape[2:]), kernel)
        return out.reshape(*x.shape[:2], *out.shape[1:])
    return jnp.einsum(equation, x, kernel)


class Norm(nn.Module):
    """LayerNorm (Ba et al. 2016) or RMSNorm (Zhang & Sennrich 2019) over the last axis, computed in float32.

    kind, eps, offset, use_bias: as in ModelConfig; with offset the factor is 1 + scale and scale starts at 0 (Gemma).
    """

    kind: str
    eps: float
    offset: bool = False
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        init = nn.initializers.zeros if self.offset else nn.initializers.ones
        features = (x.shape[-1],)
        scale: Any = self.param("scale", nn.with_logical_partitioning(init, ("norm",)), features, jnp.float32)
        y = x.astype(jnp.float32)
        if self.kind == "layernorm":
            y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        y = y * (scale + 1 if self.offset else scale)
        if self.use_bias:
            zeros = nn.with_logical_partitioning(nn.initializers.zeros, ("norm",))
            bias: Any = self.param("bias", zeros, features, jnp.float32)
            y = y + bias
        return y.astype(x.dtype)


def make_norm(cfg: ModelConfig, name: str) -> Norm:
    """The model's norm over D."""
    return Norm(cfg.norm, cfg.norm_eps, cfg.norm_scale_offset, cfg.norm_bias, name=name)


ACTIVATIONS = {
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_exact": lambda x: jax.nn.gelu(x, approximate=False),
    "silu": jax.nn.silu,
    "relu_squared": lambda x: jnp.square(jax.nn.relu(x)),  # So et al. 2021, arXiv:2109.08668
}


class MLP(nn.Module):
    """down(act(up x)), or gated: down(act(gate x) * up x) (Shazeer 2020, arXiv:2002.05202)."""

    cfg: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: Array) -> Array:
        cfg, dtype, act = self.cfg, x_BTD.dtype, ACTIVATIONS[self.cfg.activation]
        dim, hidden = cfg.embed_dim, cfg.mlp_dim
        bias = (1,) if cfg.mlp_bias else None

        def project(name: str) -> Array:
            std = kernel_std(cfg, dim)
            layer = Einsum("BTD,DF->BTF", (dim, hidden), ("embed", "mlp"), std, dtype, bias, (hidden,),
                           lora_for(cfg, f"mlp/{name}"), name=name)  # fmt: skip
            return shard(layer(x_BTD), "batch", "length", "act_mlp")

        h_BTF = act(project("gate")) * project("up") if cfg.gated_mlp else act(project("up"))
        std = kernel_std(cfg, hidden, residual=True)
        down = Einsum("BTF,FD->BTD", (hidden, dim), ("mlp", "embed"), std, dtype, bias, (dim,),
                      lora_for(cfg, "mlp/down"), name="down")  # fmt: skip
        return down(h_BTF)


def rope_frequencies(rope: RopeConfig, head_dim: int) -> tuple[np.ndarray, float]:
    """Angles per position, f64 [H/2], and the factor on cos and sin (1 but for YaRN), after context scaling."""
    half = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    frequency = rope.theta**-half
    if rope.scaling == "linear":
        return frequency / rope.factor, 1.0
    if rope.scaling == "llama3":
        # Wavelengths short against the original context stay, long ones are stretched, those between interpolate.
        turns = rope.original_max_seq_length * frequency / (2 * np.pi)
        smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        smooth = np.clip(smooth, 0.0, 1.0)
        return frequency * (smooth + (1 - smooth) / rope.factor), 1.0
    if rope.scaling == "yarn":
        # Peng et al. 2023, §3.2: dimensions that turn more than beta_fast times over the original context stay, those
        # below beta_slow are interpolated; between, a ramp over the dimension index. §3.4: the temperature.
        def dimension(turns):
            return head_dim * math.log(rope.original_max_seq_length / (turns * 2 * np.pi)) / (2 * math.log(rope.theta))

        low = max(math.floor(dimension(rope.beta_fast)), 0)
        high = min(math.ceil(dimension(rope.beta_slow)), head_dim - 1)
        ramp = np.clip((np.arange(head_dim // 2) - low) / max(high - low, 0.001), 0.0, 1.0)
        return frequency * ((1 - ramp) + ramp / rope.factor), 0.1 * math.log(rope.factor) + 1.0
    return frequency, 1.0


def rope_tables(rope: RopeConfig, head_dim: int, positions_BT: Array) -> tuple[Array, Array]:
    """(cos, sin) of each position, f32 [B, T, H/2]."""
    frequency, factor = rope_frequencies(rope, head_dim)
    angles = positions_BT[..., None].astype(jnp.float32) * jnp.asarray(frequency, jnp.float32)
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def apply_rope(x_BNTH: Array, tables: tuple[Array, Array]) -> Array:
    """Rotate the pairs (i, i + H/2), the half-split convention of GPT-NeoX, Llama and Hugging Face; f32 inside."""
    cos, sin = (t[:, None] for t in tables)
    first, second = jnp.split(x_BNTH.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BNTH.dtype)


def sinusoidal_positions(positions_BT: Array, dim: int) -> Array:
    """Vaswani et al. 2017, §3.5: sines then cosines of dim/2 geometric wavelengths, f32 [B, T, D]."""
    half = dim // 2
    frequency = np.exp(-math.log(10_000.0) * np.arange(half) / max(half - 1, 1))
    angles = positions_BT[..., None].astype(jnp.float32) * jnp.asarray(frequency, jnp.float32)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def alibi_slopes(num_heads: int) -> np.ndarray:
    """Press et al. 2022 (arXiv:2108.12409): 2^(-8i/n) for n a power of two; others interleave those of 2n; f64 [N]."""
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = 2.0 ** (-8.0 * np.arange(1, power + 1) / power)
    extra = 2.0 ** (-8.0 * np.arange(1, 2 * power + 1, 2) / (2 * power))
    return np.concatenate([slopes, extra])[:num_heads]
