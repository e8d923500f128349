"""Floating-point operations of a training step, and the peak of the chip it runs on."""

from typing import NamedTuple

import jax

from jaxgpt.models.config import ModelConfig

# Dense bf16 FLOP/s of one jax device; the first key contained in device_kind counts. TPUs: cloud.google.com/tpu/docs.
# GPUs: the vendors' figures without sparsity, as torchtitan's table has them (B300: that of an HGX board).
PEAK_FLOPS = {
    "tpu7x": 1153.5e12,  # a TPU7x (Ironwood) chip has 2307e12 and two devices
    "v6 lite": 918e12,
    "v6e": 918e12,
    "v5p": 459e12,
    "v5 lite": 197e12,
    "v5e": 197e12,
    "v5": 459e12,
    "v4": 275e12,
    "v3": 61.5e12,  # a v3 chip has 123e12 and two devices
    "v2": 22.5e12,
    "gb300": 2500e12,
    "b300": 2250e12,
    "gb200": 2500e12,
    "b200": 2250e12,
    "h200": 989e12,
    "h100 nvl": 835e12,
    "h100 pcie": 756e12,
    "h100": 989e12,
    "h800": 989e12,
    "h20": 148e12,
    "a100": 312e12,
    "a800": 312e12,
    "l40s": 362e12,
    "l40": 181e12,
    "l4": 121e12,
    "mi355x": 2516e12,
    "mi325x": 1307e12,
    "mi300x": 1307e12,
    "mi250x": 191.5e12,  # a package has 383e12 and two devices
}


class TrainingFlops(NamedTuple):
    """FLOPs per token of a training step in the two conventions in use.

    causal: attention counts the keys that a query may see, which is what has to be computed (MaxText, FlashAttention).
    full: it counts all keys, as if nothing were masked (PaLM: Chowdhery et al. 2022, arXiv:2204.02311, appendix B; nanoGPT,
      torchtitan).
    """

    causal: float
    full: float


def peak_flops(device: jax.Device) -> float | None:
    """The published dense bf16 peak of a device in FLOP/s, None where it is unknown (a CPU)."""
    kind = device.device_kind.lower()
    return next((peak for name, peak in PEAK_FLOPS.items() if name in kind), None)


def training_flops_per_token(model: ModelConfig, sequence_length: int) -> TrainingFlops:
    """Matmul FLOPs per token of one forward and backward pass, without recomputation.

    6 per matmul parameter (the unembedding counts, the lookup does not) + 12 N H K per layer of attention, where K is the
    mean number of keys of a query: with full attention the sequence length, or the window of a local layer; with causal
    attention those up to the query, (T + 1) / 2 of a global layer. Documents packed into one sequence are not told apart.
    """
    heads, kv_heads, head_dim = model.num_heads, model.num_kv_heads, model.head_dim
    attention_params = model.embed_dim * head_dim * (2 * heads + 2 * kv_heads)
    mlp_params = model.embed_dim * model.mlp_dim * (3 if model.gated_mlp else 2)
    matmul_params = model.num_layers * (attention_params + mlp_params) + model.embed_dim * model.vocab_size
    kinds = [model.window_pattern[i % len(model.window_pattern)] for i in range(model.num_layers)]
    window = min(model.sliding_window or sequence_length, sequence_length)
    widths = [window if kind == "local" else sequence_length for kind in kinds]
    seen = lambda width: width - width * (width - 1) / (2 * sequence_length)  # the mean of min(t, width), t = 1 .. T
    flops = lambda keys: 6.0 * matmul_params + 12.0 * heads * head_dim * keys
    return TrainingFlops(causal=flops(sum(map(seen, widths))), full=flops(sum(widths)))
