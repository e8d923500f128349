"""The flash kernels mean what the einsum means, on one device and on a mesh, and refuse what they cannot express."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import partition
from jaxgpt.models import attention
from jaxgpt.models.attention import Places
from jaxgpt.models.config import ModelConfig
from jaxgpt.partition import DEFAULT_RULES, MeshConfig

B, T, H = 2, 256, 8


@pytest.fixture
def interpreted(monkeypatch):
    """Splash attention, run by Pallas's interpreter."""
    monkeypatch.setitem(attention._KERNELS, "splash", functools.partial(attention._splash, interpret=True))


def inputs(heads, kv_heads, segments):
    rng = np.random.default_rng(0)
    shapes = [(B, heads, T, H), (B, kv_heads, T, H), (B, kv_heads, T, H), (B, heads, T, H)]
    arrays = [jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes]
    return arrays, jnp.asarray(segments, jnp.int32)


def packed_rows():
    """Two documents and padding at the end; padding at the start and one document."""
    ends = np.repeat([1, 2, 0], [150, 90, 16]), np.repeat([0, 1], [40, T - 40])
    return np.stack(ends)


def positions_of(segments):
    starts = np.diff(segments, axis=1, prepend=-1) != 0
    index = np.arange(T)[None].repeat(B, 0)
    return jnp.asarray(index - np.maximum.accumulate(np.where(starts, index, 0), axis=1), jnp.int32)


def value_and_gradients(kernel, cfg, window, arrays, segments):
    """Output and gradients where queries are real."""
    q, k, v, probe = arrays
    positions = positions_of(np.asarray(segments))
    real = (segments != 0)[:, None, :, None]

    def loss(q, k, v):
        places = Places(segments, positions, segments, positions, in_order=True, single=False)
        out = jnp.where(real, attention._KERNELS[kernel](q, k, v, places, cfg, window), 0)
        return jnp.sum(out * probe), out

    (_, out), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    return out, *gradients


def config(heads, kv_heads, **options):
    shape = {"embed_dim": heads * H, "num_heads": heads, "num_kv_heads": kv_heads, "vocab_size": 5}
    return ModelConfig(**shape, query_scale=0.4, **options)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (100, 3.0)])
def test_splash_equals_the_einsum_in_values_and_gradients(window, softcap):
    cfg = config(4, 2, attention_softcap=softcap)
    arrays, segments = inputs(4, 2, packed_rows())
    ours = value_and_gradients("splash", cfg, window, arrays, segments)
    for got, want in zip(ours, value_and_gradients("xla", cfg, window, arrays, segments), strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-5)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("kv_heads", [1, 2, 4], ids="kv_heads={}".format)
def test_splash_on_a_mesh_pairs_queries_with_their_own_keys(kv_heads):
    """Four ways over heads: one kv head for all, fewer than devices, one for each."""
    cfg = config(8, kv_heads)
    arrays, segments = inputs(8, kv_heads, packed_rows())
    want = value_and_gradients("xla", cfg, None, arrays, segments)
    mesh = partition.make_mesh(MeshConfig(data=2, tensor=4))
    with partition.activate(mesh, DEFAULT_RULES):
        ours = value_and_gradients("splash", cfg, None, arrays, segments)
    for got, expected in zip(ours, want, strict=True):
        np.testing.assert_allclose(got, expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("options", "length", "dtype", "message"),
    [
        ({"attention_kernel": "splash"}, 100, jnp.float32, "100 tokens"),
        ({"attention_kernel": "splash", "position": "alibi"}, 128, jnp.float32, "model.position='alibi'"),
        ({"attention_kernel": "cudnn"}, 128, jnp.float32, "model.dtype='float32'"),
        ({"attention_kernel": "cudnn"}, 127, jnp.bfloat16, "127 tokens"),
        ({"attention_kernel": "cudnn", "attention_softcap": 5.0}, 128, jnp.bfloat16, "model.attention_softcap"),
        ({"attention_kernel": "cudnn", "head_dim": 12}, 128, jnp.bfloat16, "model.head_dim=12"),
    ],
)
def test_a_kernel_asked_for_by_name_refuses_what_it_cannot_express(options, length, dtype, message):
    row = jnp.zeros((1, length), jnp.int32)
    cfg = ModelConfig(**options)
    with pytest.raises(ValueError, match="model.attention_kernel=.*" + message + ".*'xla'"):
        attention.choose_kernel(cfg, dtype, Places(row, row, row, row, True, False))


@pytest.mark.parametrize(
    ("backend", "options", "length", "expected"),
    [
        ("cpu", {}, 128, "xla"),
        ("tpu", {}, 128, "splash"),
        ("tpu", {}, 130, "xla"),
        ("tpu", {"position": "alibi"}, 128, "xla"),
        ("tpu", {"attention_softcap": 5.0}, 128, "splash"),
    ],
)
def test_auto_takes_the_fastest_kernel_that_can_express_the_options(monkeypatch, backend, options, length, expected):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    row = jnp.zeros((1, length), jnp.int32)
    assert (
        attention.choose_kernel(ModelConfig(**options), jnp.bfloat16, Places(row, row, row, row, True, False))
        == expected
    )


def test_a_cache_is_read_by_the_einsum_whatever_kernel_is_named():
    row = jnp.zeros((1, 128), jnp.int32)
    cfg = ModelConfig(attention_kernel="splash")
    assert attention.choose_kernel(cfg, jnp.float32, Places(row, row, row, row, False, False)) == "xla"
