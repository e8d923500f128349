"""The RL step against enumeration: gradients are those of theory, training ends at its optimum, and preflight sees errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import closed_form
from experiments.closed_form import MODEL, PROMPTS, Task
from jaxgpt import partition, tree
from jaxgpt.models import decoder
from jaxgpt.objectives.ppo import PPOConfig, kl_loss, policy_loss, response_logprobs
from jaxgpt.rl.config import RLConfig
from jaxgpt.rl.program import preflight

BETA = 0.7


def everything(length: int):
    """(arrays of all sequences [X * Y, S], mask [X * Y, R], rewards [X * Y], log-probs as a function of parameters)."""
    task = Task(length, seed=3)
    tokens_YR, mask_YR = task.responses
    count = len(tokens_YR)
    tokens = np.concatenate([np.repeat(PROMPTS, count, 0), np.tile(tokens_YR, (len(PROMPTS), 1))], axis=1)
    mask = np.tile(mask_YR, (len(PROMPTS), 1)).astype(np.float32)
    segments = np.concatenate([np.ones((len(tokens), PROMPTS.shape[1])), mask], axis=1).astype(np.int32)
    positions = np.maximum(np.cumsum(segments, axis=1) - 1, 0).astype(np.int32)
    arrays = [jnp.asarray(a, jnp.int32) for a in (tokens, segments, positions)]
    logp = lambda params: response_logprobs(
        MODEL, params, *arrays, num_response=length, temperature=1.0, chunk_tokens=10**6
    )[0]
    return jnp.asarray(mask), jnp.asarray(task.rewards_XY.reshape(-1), jnp.float32), logp


def init(seed: int):
    return partition.unbox(decoder.init_params(MODEL, jax.random.key(seed)))


def assert_same_gradient(one, other):
    for name, leaf in tree.named_leaves(one).items():
        scale = float(jnp.max(jnp.abs(leaf))) + 1e-6
        np.testing.assert_allclose(tree.named_leaves(other)[name], leaf, atol=2e-4 * scale, err_msg=name)


@pytest.fixture(scope="module")
def policies():
    return init(0), init(1)


def test_with_the_kl_in_the_reward_the_gradient_is_that_of_reward_minus_sequence_kl(policies):
    params, reference = policies
    mask, rewards, logp = everything(length=2)
    old_BR, reference_BR = logp(params), logp(reference)

    def exact(params):
        log_p = jnp.sum(logp(params) * mask, axis=1)
        return jnp.sum(jnp.exp(log_p) * (rewards - BETA * (log_p - jnp.sum(reference_BR * mask, axis=1))))

    def surrogate(params):
        totals = rewards - BETA * jnp.sum((old_BR - reference_BR) * mask, axis=1)
        probability = jnp.exp(jnp.sum(old_BR * mask, axis=1))
        weights = mask * probability[:, None]
        return -policy_loss(logp(params), old_BR, totals[:, None] * mask, weights, PPOConfig())[0]

    assert_same_gradient(jax.jit(jax.grad(exact))(params), jax.jit(jax.grad(surrogate))(params))


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_with_the_kl_in_the_loss_each_estimator_has_a_gradient_of_its_own(policies, estimator):
    """k1 none at all, k2 that of KL(pi || ref), k3 that of KL(ref || pi)."""
    params, reference = policies
    mask, _, logp = everything(length=1)
    old_BR, reference_BR = logp(params), logp(reference)

    def exact(params):
        log_p, log_ref = logp(params)[:, 0], reference_BR[:, 0]
        if estimator == "k2":
            return jnp.sum(jnp.exp(log_p) * (log_p - log_ref))
        return jnp.sum(jnp.exp(log_ref) * (log_ref - log_p)) if estimator == "k3" else 0 * jnp.sum(log_p)

    def surrogate(params):
        weights = jnp.exp(old_BR) * mask
        return kl_loss(logp(params), reference_BR, weights, estimator)[0]

    found, wanted = jax.jit(jax.grad(surrogate))(params), jax.jit(jax.grad(exact))(params)
    if estimator == "k1":
        assert max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(found)) < 1e-5
    else:
        assert_same_gradient(wanted, found)


@pytest.mark.parametrize(("algorithm", "kl_in", "estimator"), [("ppo", "reward", "k1"), ("grpo", "loss", "k3")])
def test_training_goes_to_the_closed_form(algorithm, kl_in, estimator):
    solve = functools.partial(closed_form.solve, kl_in=kl_in, estimator=estimator, length=1, steps=80, rows=256)
    before, after = solve(algorithm, 0.5, 0, learning_rate=5e-3)
    assert before > 0.3
    assert after < 0.02


def test_an_iteration_is_traced_and_compiled_once_and_never_asks_the_host():
    problem = closed_form.make_problem("ppo", 0.5, 0, steps=3, rows=32)
    assert "callback" not in problem.step.lower(problem.state, problem.frozen, problem.prompts).as_text()
    state = problem.state
    for _ in range(3):
        state, _ = problem.step(state, problem.frozen, problem.prompts)
    assert problem.step._cache_size() == 1
    assert int(state.step) == 3


GOOD = {
    "policy/first_ratio": 1.0, "rollout/reference_gap": 0.0, "rollout/mask_holes": 0.0, "rollout/logprob_gap": 1e-6,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("policy/first_ratio", 1.1, "ratio"),
        ("rollout/reference_gap", 0.5, "reference"),
        ("rollout/mask_holes", 1.0, "holes"),
        ("rollout/logprob_gap", float("nan"), "sampler"),
    ],
)
def test_preflight_names_the_invariant_that_does_not_hold(name, value, words):
    preflight(RLConfig(), GOOD)
    with pytest.raises(ValueError, match=words):
        preflight(RLConfig(), GOOD | {name: value})
