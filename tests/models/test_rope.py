"""RoPE scalings against the frequency tables that Hugging Face transformers 5.23 computes for published models."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.models.config import RopeConfig
from jaxgpt.models.layers import apply_rope, rope_frequencies, rope_tables

# ROPE_INIT_FUNCTIONS[rope_type](config), every fourth frequency.
PUBLISHED = {
    "Llama 3.2 1B": (
        RopeConfig(theta=500_000, scaling="llama3", factor=32, original_max_seq_length=8192),
        64,
        1.0,
        [1.0, 0.1939228, 0.03760603, 0.007292665, 0.0004295567, 8.570256e-06, 1.661967e-06, 3.222933e-07],
    ),
    "Llama 3.1 8B": (
        RopeConfig(theta=500_000, scaling="llama3", factor=8, original_max_seq_length=8192),
        128,
        1.0,
        [1.0, 0.4403666, 0.1939228, 0.0853971, 0.03760603, 0.01656044, 0.007292665, 0.003211446]
        + [0.000524846, 7.784655e-05, 3.428102e-05, 1.509622e-05, 6.64787e-06, 2.9275e-06, 1.289173e-06, 5.677088e-07],
    ),
    "Qwen3 with YaRN to 131,072": (
        RopeConfig(theta=1_000_000, scaling="yarn", factor=4, original_max_seq_length=32_768),
        128,
        1.138629436111989,
        [1.0, 0.4216965, 0.1778279, 0.07498942, 0.03162278, 0.01333521, 0.005375321, 0.001848277]
        + [0.0006029411, 0.0001798412, 4.445699e-05, 1.874736e-05, 7.905694e-06, 3.333804e-06]
        + [1.405853e-06, 5.928434e-07],
    ),
}


@pytest.mark.parametrize("model", PUBLISHED)
def test_frequencies_are_the_published_models(model):
    rope, head_dim, factor, expected = PUBLISHED[model]
    frequencies, attention_factor = rope_frequencies(rope, head_dim)
    np.testing.assert_allclose(frequencies[::4], expected, rtol=1e-6)
    np.testing.assert_allclose(attention_factor, factor, rtol=1e-12)


def test_rotation_is_the_complex_product():
    """Pairs (i, i + H/2) as complex numbers, times factor * exp(i position frequency), in float64."""
    rope, head_dim = RopeConfig(scaling="yarn", factor=4, original_max_seq_length=16), 8
    x_BNTH = np.random.default_rng(0).normal(size=(2, 3, 5, head_dim))
    positions_BT = np.array([[0, 1, 2, 3, 4], [7, 8, 0, 1, 100]])
    frequencies, factor = rope_frequencies(rope, head_dim)
    turn = factor * np.exp(1j * positions_BT[..., None] * frequencies)[:, None]
    rotated = (x_BNTH[..., :4] + 1j * x_BNTH[..., 4:]) * turn
    out = apply_rope(jnp.float32(x_BNTH), rope_tables(rope, head_dim, jnp.asarray(positions_BT)))
    np.testing.assert_allclose(out, np.concatenate([rotated.real, rotated.imag], -1), atol=1e-5)
