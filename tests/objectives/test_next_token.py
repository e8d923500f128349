"""What a uniform model says of texts, by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import partition
from jaxgpt.models import decoder
from jaxgpt.models.config import ModelConfig
from jaxgpt.objectives.next_token import LossConfig, make_next_token
from jaxgpt.types import LMBatch


def test_bits_per_byte_are_of_the_tokens_that_have_a_loss():
    """log2 V bits for each, over their bytes, both by weight: a row of weight 0.5 counts half on either side."""
    model = ModelConfig(vocab_size=6, num_layers=1, embed_dim=8, num_heads=2, max_seq_length=4, remat="none")
    zeros = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
        jax.eval_shape(lambda: partition.unbox(decoder.init_params(model, jax.random.key(0)))),
    )
    token_bytes_V = np.array([0, 0, 0, 1, 2, 5], np.int32)  # 0 to 2 are reserved
    targets_BT = np.array([[3, 4, 5, 2], [5, 5, 2, 0]], np.int32)
    weights_BT = np.array([[0, 1, 1, 1], [0.5, 0.5, 0.5, 0]], np.float32)
    ones_BT = np.ones((2, 4), np.int32)
    positions_BT = np.tile(np.arange(4, dtype=np.int32), (2, 1))
    batch = LMBatch(ones_BT, targets_BT, weights_BT, ones_BT, positions_BT)
    objective = make_next_token(model, LossConfig(chunk_tokens=8), token_bytes_V)
    _, sums = objective(zeros, batch, jax.random.key(0))
    assert float(sums["bytes"]) == 2 + 5 + 0.5 * (5 + 5)
    assert float(sums["weight"]) == 3 + 1.5
    assert float(sums["loss"]) == pytest.approx(4.5 * math.log(6), rel=1e-6)
