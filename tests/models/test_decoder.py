"""The decoder against float64 numpy, and what must not depend on what: causality, segments, padding, cache, layout."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import partition, tree
from jaxgpt.models import decoder
from jaxgpt.models.config import ModelConfig
from tests.models import reference

V, T = 13, 7
SMALL = {"vocab_size": V, "num_layers": 2, "embed_dim": 16, "num_heads": 4, "mlp_dim": 24, "max_seq_length": 16}
GPT2 = {
    "position": "learned", "norm": "layernorm", "norm_bias": True, "activation": "gelu_tanh", "gated_mlp": False,
    "qkv_bias": True, "attention_out_bias": True, "mlp_bias": True,
}  # fmt: skip
OPTIONS = {
    "gpt2": GPT2,
    "llama": {"num_kv_heads": 2, "tie_embeddings": False},
    "gemma2": {
        "num_kv_heads": 1, "head_dim": 8, "norm_scale_offset": True, "activation": "gelu_tanh", "scale_embeddings": True,
        "norm_position": "sandwich", "sliding_window": 3, "window_pattern": ("local", "global"),
        "attention_softcap": 2.0, "final_softcap": 1.5, "query_scale": 0.5,
    },
    "qwen3": {"qk_norm": True, "num_kv_heads": 2, "head_dim": 6},
    "alibi-post": {"position": "alibi", "norm_position": "post", "norm": "layernorm", "activation": "relu_squared",
                   "gated_mlp": False},
    "sinusoidal-exact": {"position": "sinusoidal", "activation": "gelu_exact", "mlp_bias": True},
    "nothing-windowed": {"position": "none", "sliding_window": 2},
}  # fmt: skip


# One program each instead of hundreds of small ones.
init_params = jax.jit(lambda cfg, rng: partition.unbox(decoder.init_params(cfg, rng)), static_argnums=0)
forward = jax.jit(decoder.forward, static_argnums=0)
hidden_states = jax.jit(decoder.hidden_states, static_argnums=0)
decode = jax.jit(decoder.decode, static_argnums=0)


def make(options: dict, seed: int = 0):
    """A config and parameters that are random everywhere, norms and biases included."""
    cfg = ModelConfig(**{**SMALL, **options})
    params = init_params(cfg, jax.random.key(seed))
    rng = np.random.default_rng(seed)
    return cfg, jax.tree.map(lambda p: p + jnp.asarray(rng.normal(size=p.shape) * 0.3, jnp.float32), params)


@pytest.fixture(scope="module", params=OPTIONS, ids=str)
def model(request):
    return make(OPTIONS[request.param])


TOKENS = np.random.default_rng(1).integers(0, V, (2, T)).astype(np.int32)


def test_logits_equal_the_float64_reference(model):
    cfg, params = model
    for row, tokens in zip(forward(cfg, params, TOKENS), TOKENS, strict=True):
        np.testing.assert_allclose(row, reference.forward(params, tokens, cfg), rtol=2e-4, atol=2e-4)


def test_decoding_with_the_cache_equals_the_full_forward(model):
    """Prefill of ragged prompts, one left- and one right-padded, then single tokens."""
    cfg, params = model
    full = forward(cfg, params, TOKENS)
    prompts = np.array([[0, 0, *TOKENS[0, :3]], [*TOKENS[1, :4], 0]], np.int32)
    segments = np.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]], np.int32)
    positions = np.array([[0, 0, 0, 1, 2], [0, 1, 2, 3, 0]], np.int32)
    x, cache = decode(cfg, params, prompts, segments, positions, decoder.init_cache(cfg, 2, 12))
    head = decoder.head_params(cfg, params)
    got = decoder.logits(cfg, head, x)
    np.testing.assert_allclose(got[0, 2:], full[0, :3], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(got[1, :4], full[1, :4], rtol=1e-4, atol=1e-4)
    for i in range(3):
        at = np.array([[3 + i], [4 + i]], np.int32)
        tokens = np.take_along_axis(TOKENS, at, axis=1)
        x, cache = decode(cfg, params, tokens, np.ones((2, 1), np.int32), at, cache)
        expected = np.take_along_axis(full, at[..., None], axis=1)
        np.testing.assert_allclose(decoder.logits(cfg, head, x), expected, rtol=1e-4, atol=1e-4)


def sensitivity(cfg, params, segments=None, positions=None):
    """|d hidden_t / d embedding of token s|, [T, T], for the first row, through distinct tokens."""
    tokens = np.arange(T, dtype=np.int32)[None]

    def hidden(table):
        moved = tree.merge({k: v for k, v in params.items() if k != "embedder"}, {"embedder": {"embedding": table}})
        return decoder.hidden_states(cfg, moved, tokens, segments, positions)[0]

    jacobian = jax.jit(jax.jacrev(hidden))(params["embedder"]["embedding"])  # [T, D, V, D]
    return np.abs(np.asarray(jacobian)).sum((1, 3))[:, :T]


@pytest.mark.parametrize("name", ["gpt2", "llama", "alibi-post"])
def test_no_gradient_flows_from_the_future_and_some_from_all_of_the_past(name):
    influence = sensitivity(*make(OPTIONS[name]))
    assert np.all(influence[np.triu_indices(T, 1)] == 0)
    assert np.all(influence[np.tril_indices(T)] > 0)


def test_a_window_ends_what_a_layer_sees():
    cfg, params = make({"sliding_window": 2, "num_layers": 1})
    influence = sensitivity(cfg, params)
    t, s = np.indices((T, T))
    np.testing.assert_array_equal(influence > 0, (s <= t) & (t - s < 2))


@pytest.mark.parametrize("name", ["gpt2", "llama", "alibi-post"])
def test_no_gradient_flows_between_packed_segments(name):
    segments = np.array([[1, 1, 1, 2, 2, 2, 0]], np.int32)
    positions = np.array([[0, 1, 2, 0, 1, 2, 0]], np.int32)
    influence = sensitivity(*make(OPTIONS[name]), segments, positions)
    t, s = np.indices((6, 6))
    np.testing.assert_array_equal(influence[:6, :6] > 0, (s <= t) & (segments[0, t] == segments[0, s]))
    assert np.all(influence[:6, 6] == 0)


def test_packed_padded_and_plain_rows_give_the_same_numbers(model):
    cfg, params = model
    a, b = TOKENS[0, :3], TOKENS[1, :4]
    packed = np.concatenate([b, a, [0, 0]])[None]
    left = np.concatenate([[0, 0], a])[None]
    places = lambda *rows: (np.array([row], np.int32) for row in rows)
    alone = forward(cfg, params, a[None])[0]
    in_pack = forward(cfg, params, packed, *places([1, 1, 1, 1, 2, 2, 2, 0, 0], [0, 1, 2, 3, 0, 1, 2, 0, 0]))[0]
    in_left = forward(cfg, params, left, *places([0, 0, 1, 1, 1], [0, 0, 0, 1, 2]))[0]
    np.testing.assert_allclose(in_pack[4:7], alone, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(in_left[2:], alone, rtol=1e-4, atol=1e-5)
    assert np.all(np.isfinite(in_pack))


@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
@pytest.mark.parametrize(
    "change", [{"scan_layers": True}, {"remat": "dots"}, {"scan_layers": True, "remat": "full"}], ids=str
)
def test_scanning_and_recomputing_change_neither_values_nor_gradients(name, change):
    cfg, params = make(OPTIONS[name] | {"scan_layers": False, "remat": "none"})
    loss = lambda cfg: jax.jit(jax.value_and_grad(lambda p: jnp.sum(jnp.sin(decoder.forward(cfg, p, TOKENS)))))
    value, gradient = loss(cfg)(params)
    other_value, other_gradient = loss(dataclasses.replace(cfg, **change))(params)
    np.testing.assert_allclose(other_value, value, rtol=1e-5)
    for ours, theirs in zip(jax.tree.leaves(other_gradient), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4)


def test_a_cached_step_may_be_scanned():
    cfg, params = make(OPTIONS["gemma2"])
    scanned = dataclasses.replace(cfg, scan_layers=True)
    one = np.ones((2, T), np.int32)
    places = np.tile(np.arange(T, dtype=np.int32), (2, 1))
    x, cache = decode(cfg, params, TOKENS, one, places, decoder.init_cache(cfg, 2, 9))
    y, other = decode(scanned, params, TOKENS, one, places, decoder.init_cache(cfg, 2, 9))
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(cache.k_LBKSH, other.k_LBKSH, rtol=1e-5, atol=1e-5)


def test_gradients_through_padding_are_finite(model):
    cfg, params = model
    segments = np.array([[0] * T, [0, 1, 1, 1, 0, 0, 0]], np.int32)
    gradient = jax.jit(jax.grad(lambda p: jnp.sum(decoder.forward(cfg, p, TOKENS, segments) ** 2)))(params)
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(gradient))


def test_dropout_needs_a_key_and_keeps_the_mean():
    x = jnp.ones((100, 1000))
    assert decoder.dropout(x, 0.3, None) is x
    dropped = np.asarray(decoder.dropout(x, 0.3, jax.random.key(0)))
    np.testing.assert_allclose(np.unique(dropped), [0, 1 / 0.7], rtol=1e-6)
    assert abs(dropped.mean() - 1) < 5 * np.sqrt(0.3 / 0.7 / x.size)
    cfg, params = make({"dropout": 0.5})
    plain = hidden_states(cfg, params, TOKENS)
    np.testing.assert_array_equal(plain, hidden_states(dataclasses.replace(cfg, dropout=0.0), params, TOKENS))
    noisy = hidden_states(cfg, params, TOKENS, dropout_rng=jax.random.key(1))
    assert np.abs(noisy - plain).max() > 0.1


def test_initial_standard_deviations_are_the_documented_ones():
    cfg = ModelConfig(vocab_size=500, num_layers=4, embed_dim=96, num_heads=4, mlp_dim=400, head="scalar", init="gpt2")
    params = init_params(cfg, jax.random.key(0))
    std = lambda leaf: float(jnp.std(leaf))
    assert std(params["embedder"]["embedding"]) == pytest.approx(0.02, rel=0.03)
    assert std(params["layers"]["query"]["kernel"]) == pytest.approx(0.02, rel=0.03)
    assert std(params["layers"]["out"]["kernel"]) == pytest.approx(0.02 / np.sqrt(8), rel=0.03)
    assert std(params["layers"]["mlp"]["down"]["kernel"]) == pytest.approx(0.02 / np.sqrt(8), rel=0.03)
    assert std(params["head"]["kernel"]) == pytest.approx(1 / np.sqrt(97), rel=0.25)
    fan_in = init_params(dataclasses.replace(cfg, init="fan_in"), jax.random.key(0))
    assert std(fan_in["layers"]["query"]["kernel"]) == pytest.approx(1 / np.sqrt(96), rel=0.03)
    assert std(fan_in["layers"]["mlp"]["down"]["kernel"]) == pytest.approx(1 / np.sqrt(400 * 8), rel=0.03)


def test_the_scalar_head_is_a_linear_read_of_the_hidden_state():
    cfg, params = make({"head": "scalar"})
    x = hidden_states(cfg, params, TOKENS)
    expected = np.asarray(x, np.float64) @ np.asarray(params["head"]["kernel"])[:, 0] + params["head"]["bias"][0]
    np.testing.assert_allclose(decoder.values(cfg, params, x), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="model.head='lm'"):
        decoder.values(ModelConfig(**SMALL), params, x)
