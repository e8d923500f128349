"""Training adapters: the base gets no gradient, no optimizer state and no change."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import partition, tree
from jaxgpt.models import decoder, lora
from jaxgpt.models.config import LoraConfig, ModelConfig
from jaxgpt.objectives.next_token import LossConfig, make_next_token
from jaxgpt.partition import DEFAULT_RULES, MeshConfig
from jaxgpt.runs.load import trainable
from jaxgpt.train.optimizer import OptimizerConfig, make_optimizer
from jaxgpt.train.step import init_state, make_train_step
from jaxgpt.types import LMBatch

FULL = ModelConfig(vocab_size=64, num_layers=2, embed_dim=64, num_heads=4, mlp_dim=256, max_seq_length=32)
ADAPTED = dataclasses.replace(FULL, lora=LoraConfig(rank=2))


def batch() -> LMBatch:
    tokens = jax.random.randint(jax.random.key(0), (4, 33), 0, 64)
    ones = jnp.ones((4, 32), jnp.int32)
    positions = jnp.tile(jnp.arange(32, dtype=jnp.int32), (4, 1))
    return LMBatch(tokens[:, :-1], tokens[:, 1:], ones.astype(jnp.float32), ones, positions)


def make(cfg: ModelConfig):
    """(step, state, frozen) on one device."""
    mesh = partition.make_mesh(MeshConfig(), devices=jax.devices()[:1])
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.02, warmup_steps=1), 20)
    init = lambda rng: decoder.init_params(cfg, rng)
    state, frozen, shardings = init_state(init, optimizer, jax.random.key(0), mesh, DEFAULT_RULES, trainable(cfg))
    objective = make_next_token(cfg, LossConfig())
    return make_train_step(objective, optimizer, mesh, DEFAULT_RULES, shardings=shardings), state, frozen


@pytest.fixture(scope="module")
def adapted():
    step, state, frozen = make(ADAPTED)
    return step.lower(state, frozen, batch()).compile(), state, frozen


def test_no_weight_gradient_of_a_frozen_matrix_is_computed(adapted):
    """Forward and backward through activations are two of the three products of full training."""
    step, state, frozen = make(FULL)
    full = step.lower(state, frozen, batch()).compile().cost_analysis()["flops"]
    assert 0.6 < adapted[0].cost_analysis()["flops"] / full <= 0.75


def test_adapters_learn_while_the_base_keeps_every_bit(adapted):
    step, state, frozen = adapted
    before = tree.digest(frozen)
    losses = []
    for _ in range(20):
        state, metrics = step(state, frozen, batch())
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.1
    assert tree.digest(frozen) == before
    assert all(lora.is_adapter(name) for name in tree.named_leaves(state.params))
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert sum(leaf.size for leaf in moments) == 2 * tree.count(state.params)  # Adam's two
    merged = lora.merge(ADAPTED, tree.merge(state.params, frozen))
    unmerged = decoder.forward(ADAPTED, tree.merge(state.params, frozen), batch().tokens_BT)
    np.testing.assert_allclose(decoder.forward(*merged, batch().tokens_BT), unmerged, atol=1e-4)
