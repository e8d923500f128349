"""Floating-point operations of a training step, and the peak of the chip it runs on."""

import jax

from jaxgpt.models.config import ModelConfig

# Dense bf16 FLOP/s of one jax device, from the vendors' data sheets; the first key contained in device_kind counts.
PEAK_FLOPS = {
    "v6 lite": 918e12,
    "v6e": 918e12,
    "v5p": 459e12,
    "v5 lite": 197e12,
    "v5e": 197e12,
    "v5": 459e12,
    "v4": 275e12,
    "v3": 61.5e12,  # a v3 chip has 123e12 and two devices
    "v2": 22.5e12,
    "b200": 2250e12,
    "h200": 989e12,
    "h100": 989e12,
    "a100": 312e12,
    "l4": 121e12,
}


def peak_flops(device: jax.Device) -> float | None:
    """The published dense bf16 peak of a device in FLOP/s, None where it is unknown (a CPU)."""
    kind = device.device_kind.lower()
    return next((peak for name, peak in PEAK_FLOPS.items() if name in kind), None)


def training_flops_per_token(model: ModelConfig, sequence_length: int) -> float:
    """Matmul FLOPs per token of one forward and backward pass, without recomputation.

    6 per matmul parameter (the unembedding counts, the lookup does not) + 12 N H T_mean per layer of attention, where
    T_mean is the whole sequence length, or the window of a local layer, as if no key were masked: the convention of
    Chowdhery et al. 2022 (arXiv:2204.02311), appendix B.
    """
    heads, kv_heads, head_dim = model.num_heads, model.num_kv_heads, model.head_dim
    attention_params = model.embed_dim * head_dim * (2 * heads + 2 * kv_heads)
    mlp_params = model.embed_dim * model.mlp_dim * (3 if model.gated_mlp else 2)
    matmul_params = model.num_layers * (attention_params + mlp_params) + model.embed_dim * model.vocab_size
    window = min(model.sliding_window or sequence_length, sequence_length)
    kinds = [model.window_pattern[i % len(model.window_pattern)] for i in range(model.num_layers)]
    keys = sum(window if kind == "local" else sequence_length for kind in kinds)
    return 6.0 * matmul_params + 12.0 * heads * head_dim * keys
