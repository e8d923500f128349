"""DPO against float64 numpy, golden numbers, and log-probs computed from whole logits."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import partition
from jaxgpt.models import decoder
from jaxgpt.models.config import ModelConfig
from jaxgpt.objectives.dpo import DPOConfig, dpo_loss, make_dpo, sequence_logprobs
from jaxgpt.types import PairBatch
from tests.objectives.reference import numeric_gradient

MODEL = ModelConfig(
    vocab_size=16,
    num_layers=1,
    embed_dim=16,
    num_heads=2,
    mlp_dim=32,
    max_seq_length=16,
    position="learned",
    init="fan_in",
    remat="none",
)
RANKS = np.array([[0, 1, 2], [1, 0, 0], [1, -1, 0], [0, 0, 0], [-1, 0, -1]], np.int32)
POLICY = np.random.default_rng(0).normal(-10, 3, RANKS.shape).astype(np.float32)
REFERENCE = (POLICY + np.random.default_rng(1).normal(0, 2, RANKS.shape)).astype(np.float32)


def log_sigmoid(x):
    return -np.logaddexp(0.0, -x)


def dpo64(policy, reference, ranks, config):
    """Pair by pair in float64: the loss of each prompt and the metric sums."""
    policy, reference = np.asarray(policy, np.float64), np.asarray(reference, np.float64)
    losses, sums = [], dict.fromkeys(("accuracy", "margin", "chosen_reward", "rejected_reward", "chosen_logprob",
                                      "rejected_logprob", "weight"), 0.0)  # fmt: skip
    for p, q, rank in zip(policy, reference, ranks, strict=True):
        pairs = [(i, j) for i, j in itertools.permutations(range(len(p)), 2) if 0 <= rank[i] < rank[j]]
        terms = []
        for i, j in pairs:
            h = (p[i] - q[i]) - (p[j] - q[j])
            x, e = config.beta * h, config.label_smoothing
            sigmoid = -(1 - e) * log_sigmoid(x) - e * log_sigmoid(-x)
            terms.append((h - 0.5 / config.beta) ** 2 if config.loss == "ipo" else sigmoid)
            values = {"accuracy": (h > 0) + 0.5 * (h == 0), "margin": x, "chosen_reward": config.beta * (p[i] - q[i]),
                      "rejected_reward": config.beta * (p[j] - q[j]), "chosen_logprob": p[i],
                      "rejected_logprob": p[j], "weight": 1}  # fmt: skip
            for name, value in values.items():
                sums[name] += value / len(pairs)
        losses.append(np.mean(terms) if pairs else 0.0)
    return np.array(losses), sums


@functools.partial(jax.jit, static_argnames="config")
def loss_and_gradient(policy, reference, ranks, config, scale=1.0):
    """((sum of scale * loss, (losses, metric sums)), its gradient)."""

    def total(policy):
        loss_B, sums = dpo_loss(policy, reference, ranks, config)
        return jnp.sum(scale * loss_B), (loss_B, sums)

    return jax.value_and_grad(total, has_aux=True)(policy)


@pytest.mark.parametrize(
    "config",
    [DPOConfig(), DPOConfig(beta=0.5, label_smoothing=0.1), DPOConfig(loss="ipo", beta=0.3)],
    ids=["sigmoid", "smoothed", "ipo"],
)
def test_losses_metrics_and_gradients_are_those_of_float64(config):
    scale = np.linspace(0.5, 2, len(RANKS))  # a different cotangent for each prompt
    (_, (loss_B, sums)), gradient = loss_and_gradient(POLICY, REFERENCE, RANKS, config, scale)
    losses, expected = dpo64(POLICY, REFERENCE, RANKS, config)
    np.testing.assert_allclose(loss_B, losses, rtol=2e-6)
    assert expected["weight"] == 3
    for name, value in (expected | {"loss": losses.sum()}).items():
        np.testing.assert_allclose(sums[name], value, rtol=2e-6, err_msg=name)
    assert set(sums) == {"loss", *expected}

    loss64 = lambda p: (scale * dpo64(p, REFERENCE, RANKS, config)[0]).sum()
    np.testing.assert_allclose(gradient, numeric_gradient(loss64, POLICY.astype(np.float64)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "losses", "gradient", "margin"),
    [
        (DPOConfig(beta=0.1), [0.6587595555486971, 0.7287595555486971, 0.5130152523999526],
         [-0.016083571411120344, -0.017249761922212992, -0.013377077996251601], 0.13333333333333333),
        (DPOConfig(beta=0.5, label_smoothing=0.1), [0.5683821554187771, 0.8483821554187768, 0.32692801104297253],
         [-0.05223040351377834, -0.08110292981955498, -0.0032004870036862567], 0.6666666666666666),
        (DPOConfig(loss="ipo", beta=0.1), [18.490000000000006, 32.489999999999995, 1.0],
         [-2.866666666666667, -3.7999999999999994, -0.6666666666666666], 0.13333333333333333),
    ],
    ids=["sigmoid", "smoothed", "ipo"],
)  # fmt: skip
def test_pairs_give_the_golden_numbers(config, losses, gradient, margin):
    policy = np.array([[-12.0, -13.0], [-8.5, -7.9], [-20.0, -25.0]], np.float32)
    reference = np.array([[-12.5, -12.8], [-8.0, -8.1], [-21.0, -22.0]], np.float32)
    ranks = np.tile(np.array([0, 1], np.int32), (3, 1))
    (_, (loss_B, sums)), slope = loss_and_gradient(policy, reference, ranks, config, 1 / 3)
    np.testing.assert_allclose(loss_B, losses, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(slope, np.stack([gradient, np.negative(gradient)], axis=1), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(sums["margin"] / 3, margin, atol=1e-6)
    np.testing.assert_allclose(sums["accuracy"] / 3, 2 / 3, atol=1e-6)
    rewards = config.beta * np.array([0.5, -0.5, 1.0])
    np.testing.assert_allclose(sums["chosen_reward"], rewards.sum(), atol=1e-6)


def test_absent_candidates_may_hold_anything_and_order_does_not_matter():
    wild = lambda a: np.where(RANKS >= 0, a, np.nan)
    for config in (DPOConfig(label_smoothing=0.2), DPOConfig(loss="ipo")):
        run = functools.partial(loss_and_gradient, config=config)
        (loss, sums), gradient = run(POLICY, REFERENCE, RANKS)
        jax.tree.map(np.testing.assert_array_equal, run(wild(POLICY), wild(REFERENCE), RANKS), ((loss, sums), gradient))
        order = [2, 0, 1]
        moved = run(POLICY[:, order], REFERENCE[:, order], RANKS[:, order])
        np.testing.assert_allclose(moved[0][0], loss, rtol=1e-6)
        np.testing.assert_allclose(moved[1], gradient[:, jnp.array(order)], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"beta": 0.0}, "dpo.beta"),
        ({"label_smoothing": 0.5}, "dpo.label_smoothing"),
        ({"loss": "ipo", "label_smoothing": 0.1}, "dpo.label_smoothing"),
        ({"chunk_tokens": 0}, "dpo.chunk_tokens"),
    ],
)
def test_configs_without_meaning_are_refused_by_field(fields, name):
    with pytest.raises(ValueError, match=name):
        DPOConfig(**fields)


@pytest.fixture(scope="module")
def params():
    init = jax.jit(lambda rng: partition.unbox(decoder.init_params(MODEL, rng)))
    return init(jax.random.key(0)) | {"reference": init(jax.random.key(1))}


def make_batch(side="right", length=8):
    """Three prompts of one token, two candidates each, their responses of 2 or 4 tokens; the last has one candidate."""
    rng = np.random.default_rng(3)
    tokens = np.full((3, 2, length + 1), 5, np.int32)
    segments, weights = np.zeros((3, 2, length), np.int32), np.zeros((3, 2, length), np.float32)
    for (i, j), size in np.ndenumerate([[5, 3], [3, 5], [5, 3]]):
        row = rng.integers(0, 16, size + 1)
        start = 0 if side == "right" else length - size
        if (i, j) != (2, 1):
            tokens[i, j, start : start + size + 1] = row
            segments[i, j, start : start + size] = 1
            weights[i, j, start + 1 : start + size] = 1  # the first target belongs to the prompt
    ranks = np.array([[0, 1], [1, 0], [0, -1]], np.int32)
    return PairBatch(tokens[..., :-1], tokens[..., 1:], weights, segments, ranks, np.zeros(3, np.float32))


forward = jax.jit(functools.partial(decoder.forward, MODEL))


def logprobs64(params, batch):
    """From the logits of each sequence alone, without padding, in float64."""
    out = np.zeros(batch.ranks_BC.shape)
    for index in np.ndindex(out.shape):
        real = batch.segments_BCT[index] > 0
        if real.any():
            logits = np.asarray(forward(params, batch.tokens_BCT[index][real][None]), np.float64)[0]
            log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            chosen = log_p[np.arange(real.sum()), batch.targets_BCT[index][real]]
            out[index] = (chosen * batch.weights_BCT[index][real]).sum()
    return out


def test_sequence_logprobs_are_sums_over_the_response_whatever_the_padding(params):
    expected = logprobs64(params, make_batch())
    assert expected[2, 1] == 0
    for chunk_tokens in (6, 1000):
        run = jax.jit(lambda batch, size=chunk_tokens: sequence_logprobs(MODEL, params, batch, size))
        for side in ("right", "left"):
            got = run(make_batch(side))
            assert got.dtype == jnp.float32
            np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6, err_msg=side)


def frozen_reference(params, batch):
    return sequence_logprobs(MODEL, params["reference"], batch, 16)


def test_the_objective_is_dpo_of_the_policy_and_the_frozen_reference(params):
    batch, config = make_batch(), DPOConfig(beta=0.5, chunk_tokens=16)
    run = jax.jit(jax.value_and_grad(make_dpo(MODEL, config, frozen_reference), has_aux=True))
    (loss, sums), gradient = run(params, batch, None)
    policy, reference = logprobs64(params, batch), logprobs64(params["reference"], batch)
    losses, expected = dpo64(policy, reference, batch.ranks_BC, config)
    np.testing.assert_allclose(loss, losses.sum(), rtol=1e-5)
    for name, value in expected.items():
        np.testing.assert_allclose(sums[name], value, rtol=1e-5, err_msg=name)
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(gradient["reference"]))
    assert all(np.any(leaf != 0) and np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient["layers"]))

    precomputed = batch.replace(reference_logprobs_BC=reference.astype(np.float32))
    # The reference is left alone where the batch brings its log-probs: this one could not be called.
    given = jax.jit(jax.value_and_grad(make_dpo(MODEL, config, lambda *_: 1 / 0), has_aux=True))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
        given(params, precomputed, None),
        ((loss, sums), gradient),
    )
    assert jax.eval_shape(make_dpo(MODEL, config, None), params, precomputed, None)[0].shape == ()


def test_gradients_reach_the_policy_as_through_whole_logits(params):
    """The chunked objective against plain autodiff through unchunked logits, one row of logits for each candidate."""
    batch, free = make_batch(), DPOConfig(chunk_tokens=6, reference_free=True)
    rows = lambda a: a.reshape(-1, a.shape[-1])

    def plain(p):
        logits = decoder.forward(MODEL, p, rows(batch.tokens_BCT), rows(batch.segments_BCT))
        log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), rows(batch.targets_BCT)[..., None], -1)[..., 0]
        h = jnp.sum(log_p * rows(batch.weights_BCT), axis=1).reshape(3, 2)
        signs = jnp.array([1, -1])  # the first prompt's first candidate won, the second prompt's second one
        return -jnp.sum(jax.nn.log_sigmoid(free.beta * signs * (h[:2, 0] - h[:2, 1])))

    policy = {name: leaf for name, leaf in params.items() if name != "reference"}
    ours = jax.jit(jax.grad(lambda p: make_dpo(MODEL, free, None)(p, batch, None)[0]))(policy)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), ours, jax.jit(jax.grad(plain))(policy)
    )


def test_a_policy_equal_to_its_reference_has_loss_log_2_and_moves_towards_the_chosen(params):
    batch, objective = make_batch(), make_dpo(MODEL, DPOConfig(), frozen_reference)
    policy, frozen = params["reference"], {"reference": params["reference"]}
    run = jax.jit(jax.value_and_grad(lambda p: objective(p | frozen, batch, None), has_aux=True))
    (loss, sums), gradient = run(policy)
    np.testing.assert_allclose(loss / sums["weight"], np.log(2), rtol=1e-6)
    assert sums["weight"] == 2
    np.testing.assert_allclose(sums["margin"], 0, atol=1e-5)
    (_, after), _ = run(jax.tree.map(lambda p, g: p - 0.1 * g, policy, gradient))
    assert after["margin"] > 0
    assert after["accuracy"] == 2


def test_a_missing_a_needless_or_an_impossible_reference_is_refused(params):
    with pytest.raises(ValueError, match="reference_logprobs_BC"):
        jax.eval_shape(make_dpo(MODEL, DPOConfig(), None), params, make_batch(), None)
    with pytest.raises(ValueError, match=r"dpo\.reference_free"):
        make_dpo(MODEL, DPOConfig(reference_free=True), frozen_reference)
    with pytest.raises(ValueError, match=r"model\.head"):
        make_dpo(ModelConfig(vocab_size=16, head="scalar"), DPOConfig(), None)
