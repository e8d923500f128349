"""One meaning for every kernel, and a clear choice between them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import partition
from jaxgpt.models import attention
from jaxgpt.models.attention import Places
from jaxgpt.models.config import ModelConfig
from jaxgpt.partition import DEFAULT_RULES, MeshConfig

T = 128
CFG = ModelConfig(vocab_size=8, embed_dim=64, num_heads=4, num_kv_heads=2, head_dim=128)


def make_places(segments) -> Places:
    segments = np.asarray(segments, np.int32)
    positions = np.tile(np.arange(segments.shape[1], dtype=np.int32), (len(segments), 1))
    return Places(segments, positions, segments, positions, in_order=True, single=False)


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    draw = lambda heads: jnp.asarray(rng.normal(size=(2, heads, T, 128)), jnp.float32)
    segments = np.repeat([[1] * 50 + [2] * 78, [1] * 100 + [0] * 28], 1, axis=0)
    return draw(4), draw(2), draw(2), make_places(segments)


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (20, None), (None, 3.0)], ids=str)
def test_splash_means_the_same_as_xla(arrays, window, softcap):
    q, k, v, places = arrays
    cfg = dataclasses.replace(CFG, attention_softcap=softcap)
    real = (places.segments_BT != 0)[:, None, :, None]

    def loss(kernel, **kwargs):
        return lambda q, k, v: jnp.sum(jnp.sin(jnp.where(real, kernel(q, k, v, places, cfg, window, **kwargs), 0)))

    ours, ours_grad = jax.value_and_grad(loss(attention._splash, interpret=True), argnums=(0, 1, 2))(q, k, v)
    theirs, theirs_grad = jax.value_and_grad(loss(attention._xla), argnums=(0, 1, 2))(q, k, v)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-3)
    for a, b in zip(ours_grad, theirs_grad, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4)


def test_a_kernel_runs_per_device_under_a_mesh(arrays):
    q, k, v, places = arrays
    mesh = partition.make_mesh(MeshConfig(data=2, fsdp=1, tensor=2), devices=jax.devices()[:4])

    def on_mesh(q, k, v):
        with partition.activate(mesh, DEFAULT_RULES):
            return attention._splash(q, k, v, places, CFG, None, interpret=True)

    real = (places.segments_BT != 0)[:, None, :, None]
    expected = attention._xla(q, k, v, places, CFG, None)
    np.testing.assert_allclose(jnp.where(real, jax.jit(on_mesh)(q, k, v), 0), jnp.where(real, expected, 0), atol=2e-4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"attention_kernel": "cudnn"}, "'cudnn'.*model.dtype='float32'"),
        ({"attention_kernel": "cudnn", "attention_softcap": 5.0}, "'cudnn'.*model.attention_softcap"),
        ({"attention_kernel": "splash", "position": "alibi"}, "'splash'.*alibi"),
    ],
)
def test_a_kernel_that_cannot_express_an_option_is_an_error(arrays, change, words):
    q, k, v, places = arrays
    with pytest.raises(ValueError, match=f"model.attention_kernel={words}.*use 'xla' or 'auto'"):
        attention.attention(q, k, v, places, dataclasses.replace(CFG, **change), None)


def test_auto_falls_back_and_a_cache_is_read_by_xla(arrays):
    _, _, _, places = arrays
    assert attention.choose_kernel(CFG, jnp.float32, places) == "xla"  # on CPU
    splash = dataclasses.replace(CFG, attention_kernel="splash")
    assert attention.choose_kernel(splash, jnp.float32, places) == "splash"
    assert attention.choose_kernel(splash, jnp.float32, places._replace(in_order=False)) == "xla"
    with pytest.raises(ValueError, match="sequences of 100 tokens"):
        attention.choose_kernel(splash, jnp.float32, make_places(np.ones((1, 100))))
