"""Rollouts: what is told to generation, and what cannot be asked of it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import partition
from jaxgpt.models import decoder
from jaxgpt.objectives.ppo import PPOConfig
from jaxgpt.rl import step
from jaxgpt.rl.config import RLConfig
from jaxgpt.rl.models import Builder
from jaxgpt.rl.rollout import Prompts, RolloutConfig
from tests.generate.reference import CFG, params
from tests.generate.test_decode import pad

PROMPTS = [[3, 9, 1], [7], [2, 16, 5], [8, 8]]


def collect(num_slots, params):
    rollout = RolloutConfig(batch_size=4, max_prompt_length=5, max_new_tokens=6, num_slots=num_slots)
    setup = step.Setup(
        policy=CFG, reference=CFG, critic=None, rollout=rollout, ppo=PPOConfig(), group=step.GroupConfig(), eos_ids=(2, 11),
        pad_id=0,
    )  # fmt: skip
    # Of the state, a rollout with a key of its own needs the policy's parameters alone.
    state = step.RLState(None, step.TrainState(None, params, None, None), None, None, None, None)
    tokens_BP, mask_BP = pad(PROMPTS)
    return step.collect(setup, state, {}, Prompts(tokens_BP, mask_BP, jnp.arange(4)), jax.random.key(2))


def test_num_slots_responses_are_decoded_at_once_and_change_nothing(monkeypatch):
    shapes, decode = [], decoder.decode

    def seen(cfg, params, tokens_BT, *rest):
        shapes.append(tokens_BT.shape)
        return decode(cfg, params, tokens_BT, *rest)

    monkeypatch.setattr(decoder, "decode", seen)
    slots, plain = (jax.jit(functools.partial(collect, n))(params()) for n in (2, 0))
    assert shapes[0] == shapes[-2] == (4, 5)
    assert (shapes[1], shapes[-1]) == ((2, 1), (4, 1))
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-5), slots, plain)


@pytest.mark.parametrize("num_slots", [-1, 9])
def test_slots_must_fit_the_batch(num_slots):
    with pytest.raises(ValueError, match=f"rollout.num_slots must be 0 .* rollout.batch_size=8, not {num_slots}"):
        RolloutConfig(batch_size=8, num_slots=num_slots)


def test_slots_must_divide_over_the_mesh():
    mesh = partition.make_mesh(partition.MeshConfig(data=4, fsdp=2))
    with pytest.raises(ValueError, match="rollout.num_slots=12 is not a multiple of mesh.data x mesh.fsdp = 8"):
        Builder(RLConfig(rollout=RolloutConfig(num_slots=12)), None, None, mesh)
