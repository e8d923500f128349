"""The samplers against a float64 full sort, against counts, and by their properties."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxgpt.generate.samplers import (
    RowSamplers,
    SamplerConfig,
    sample,
    sample_by_row,
    warp_logits,
    warp_logits_by_row,
)

B, V = 3, 12
CONFIGS = [
    SamplerConfig(),
    SamplerConfig(temperature=0.0),
    SamplerConfig(temperature=0.0, repetition_penalty=1.7),
    SamplerConfig(temperature=0.6, repetition_penalty=1.3),
    SamplerConfig(top_k=1),
    SamplerConfig(temperature=1.5, top_k=4),
    SamplerConfig(top_p=0.9),
    SamplerConfig(top_p=0.01),
    SamplerConfig(min_p=0.2),
    SamplerConfig(temperature=0.7, top_k=6, top_p=0.8, min_p=0.1, repetition_penalty=1.2),
    SamplerConfig(temperature=2.0, top_k=50, top_p=0.5, repetition_penalty=0.5),
]
warp = jax.jit(warp_logits, static_argnums=2)
warp_by_row = jax.jit(warp_logits_by_row)
draw = jax.jit(sample, static_argnums=3)


def reference_row(logits, seen, config):
    """What transformers' processors leave of a row, by a stable full sort in float64; and ids on the top-p boundary."""
    z = logits.astype(np.float64)
    z = np.where(seen, np.where(z < 0, z * config.repetition_penalty, z / config.repetition_penalty), z)
    if config.temperature == 0:
        return np.where(np.arange(V) == np.argmax(z), z, -np.inf), []
    z = z / config.temperature
    boundary = []
    if config.top_k:
        z = np.where(z < np.sort(z)[::-1][min(config.top_k, V) - 1], -np.inf, z)
    if config.top_p < 1:
        order = np.argsort(-z, kind="stable")
        before = np.cumsum(softmax(z)[order]) - softmax(z)[order]
        boundary = [i for i, mass in zip(order, before, strict=True) if abs(mass - config.top_p) < 1e-5]
        z[order[before >= config.top_p]] = -np.inf
    if config.min_p:
        p = softmax(z)
        z = np.where(p < config.min_p * p.max() * (1 - 1e-6), -np.inf, z)
    return z, boundary


def softmax(z):
    e = np.exp(z - z.max())
    return e / e.sum()


# Multiples of 1/4 tie often, and differ by far more than float32 resolves.
LOGITS = hnp.arrays(np.int32, (B, V), elements=st.integers(-24, 24)).map(lambda a: a.astype(np.float32) / 4)
SEEN = hnp.arrays(np.bool_, (B, V))


@settings(max_examples=60, deadline=None)
@given(LOGITS, SEEN, st.sampled_from(CONFIGS))
def test_warped_logits_equal_a_float64_full_sort(logits, seen, config):
    warped = np.asarray(warp(logits, seen, config))
    assert warped.dtype == np.float32
    for row in range(B):
        check_row(warped[row], logits[row], seen[row], config)


def check_row(warped, logits, seen, config):
    expected, boundary = reference_row(logits, seen, config)
    sure = np.delete(np.arange(V), boundary)
    np.testing.assert_array_equal(np.isfinite(warped[sure]), np.isfinite(expected[sure]))
    kept = sure[np.isfinite(expected[sure])]
    np.testing.assert_allclose(warped[kept], expected[kept], rtol=1e-6)


@settings(max_examples=60, deadline=None)
@given(LOGITS, SEEN, st.lists(st.sampled_from(CONFIGS), min_size=B, max_size=B))
def test_rows_with_samplers_of_their_own_equal_a_float64_full_sort(logits, seen, configs):
    warped = np.asarray(warp_by_row(-logits, seen, RowSamplers.stack(configs)))  # a zero becomes a negative one
    assert warped.dtype == np.float32
    for row in range(B):
        check_row(warped[row], -logits[row], seen[row], configs[row])


def test_the_kth_largest_of_ties_between_both_zeros_keeps_them_all():
    logits = np.array([[0.0, -0.0, 1.0, -1.0, -0.0, 0.0]], np.float32)
    warped = warp_by_row(logits, np.zeros((1, 6), bool), RowSamplers.stack([SamplerConfig(top_k=2)]))
    np.testing.assert_array_equal(np.isfinite(warped[0]), [True, True, True, False, True, True])


def test_with_the_same_keys_rows_draw_what_they_draw_with_one_sampler_for_all():
    rng = np.random.default_rng(3)
    logits, seen = rng.normal(size=(len(CONFIGS), V)).astype(np.float32) * 2, rng.random((len(CONFIGS), V)) < 0.3
    for seed in range(3):
        key_B = jax.random.split(jax.random.key(seed), len(CONFIGS))
        together = jax.jit(sample_by_row)(key_B, logits, seen, RowSamplers.stack(CONFIGS))
        alone = [draw(key_B[i : i + 1], logits[i : i + 1], seen[i : i + 1], c)[0][0] for i, c in enumerate(CONFIGS)]
        assert together.tolist() == [int(token) for token in alone]


@settings(max_examples=60, deadline=None)
@given(LOGITS, SEEN, st.sampled_from(CONFIGS), st.integers(0, 2**31 - 1))
def test_a_draw_is_a_kept_token_with_its_renormalized_log_probability(logits, seen, config, seed):
    warped = np.asarray(warp(logits, seen, config), np.float64)
    tokens, logprobs = draw(jax.random.key(seed), logits, seen, config)
    assert np.isfinite(warped).any(axis=1).all()
    for row, (token, logprob) in enumerate(zip(np.asarray(tokens), np.asarray(logprobs), strict=True)):
        np.testing.assert_allclose(logprob, np.log(softmax(warped[row])[token]), atol=2e-6)


@pytest.mark.parametrize("config", [CONFIGS[0], CONFIGS[5], CONFIGS[9]])
def test_draws_follow_the_distribution(config):
    n = 8192
    logits = np.array([[1.5, -2.0, 0.25, 0.25, 3.0, 2.0, -1.0, 0.0, 1.0, 2.5, -0.5, 0.75]], np.float32)
    seen = np.arange(V)[None] % 3 == 0
    probs = softmax(reference_row(logits[0], seen[0], config)[0])
    tokens, _ = draw(jax.random.key(0), jnp.tile(logits, (n, 1)), jnp.tile(seen, (n, 1)), config)
    counts = np.bincount(np.asarray(tokens), minlength=V)
    kept = probs > 0
    assert counts[~kept].sum() == 0
    chi_square = np.sum((counts[kept] - n * probs[kept]) ** 2 / (n * probs[kept]))
    assert chi_square < 37.4  # the 1e-4 quantile at 11 degrees of freedom, the most there can be


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.5, [2]), (0.51, [2, 0]), (0.75, [2, 0]), (0.76, [2, 0, 1]), (0.876, [2, 0, 1, 3])]
)
def test_top_p_keeps_the_smallest_set_that_reaches_p(top_p, kept):
    logits = jnp.log2(jnp.array([[0.25, 0.125, 0.5, 0.125]])) * jnp.log(2.0)
    warped = np.asarray(warp_logits(logits, None, SamplerConfig(top_p=top_p)))[0]
    assert set(np.flatnonzero(np.isfinite(warped))) == set(kept)


def test_ties_top_k_keeps_all_top_p_only_as_many_as_it_needs():
    logits = jnp.zeros((1, 8))

    def kept(config):
        return np.flatnonzero(np.isfinite(np.asarray(warp_logits(logits, None, config))[0])).tolist()

    assert kept(SamplerConfig(top_k=2)) == list(range(8))
    assert kept(SamplerConfig(top_p=0.5)) == [0, 1, 2, 3]
    assert kept(SamplerConfig(min_p=1.0)) == list(range(8))
    assert kept(SamplerConfig(temperature=0)) == [0]


def test_a_row_draws_the_same_alone_and_among_others():
    logits = jax.random.normal(jax.random.key(1), (B, V)) * 2
    config, seen = CONFIGS[5], np.zeros((B, V), bool)
    tokens, logprobs = draw(jax.random.key(7), logits, seen, config)
    alone, logprob = draw(jax.random.key(7), logits[:1], seen[:1], config)
    np.testing.assert_array_equal(alone, tokens[:1])
    np.testing.assert_array_equal(logprob, logprobs[:1])
    key_B = jax.random.split(jax.random.key(3), B)
    by_key, _ = draw(key_B, logits, seen, config)
    last, _ = draw(key_B[-1:], logits[-1:], seen[-1:], config)
    np.testing.assert_array_equal(last, by_key[-1:])


def test_every_row_and_key_draws_for_itself():
    tokens = functools.partial(draw, logits_BV=jnp.zeros((64, V)), seen_BV=None, config=SamplerConfig())
    first, second = (np.asarray(tokens(jax.random.key(seed))[0]) for seed in (0, 1))
    assert len(set(first.tolist())) > V // 2
    assert (first != second).mean() > 0.5


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1.0),
        ("temperature", 1e-9),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
    ],
)
def test_a_value_out_of_range_names_its_field(field, value):
    with pytest.raises(ValueError, match=rf"sampler\.{field} must be .*{value}"):
        SamplerConfig(**{field: value})


def test_a_repetition_penalty_without_the_tokens_seen_is_an_error():
    with pytest.raises(ValueError, match=r"sampler\.repetition_penalty"):
        warp_logits(jnp.zeros((1, 4)), None, SamplerConfig(repetition_penalty=1.1))
