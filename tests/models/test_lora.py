"""Adapters: what they compute against float64 numpy, where they start, and that merging them changes nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import partition, tree
from jaxgpt.models import decoder, lora
from jaxgpt.models.config import LoraConfig, ModelConfig
from jaxgpt.models.layers import Einsum

BASE = ModelConfig(vocab_size=17, num_layers=2, embed_dim=16, num_heads=4, num_kv_heads=2, mlp_dim=24, qkv_bias=True)
TOKENS = jax.random.randint(jax.random.key(9), (2, 7), 0, 17)


def adapted(**options) -> tuple[ModelConfig, dict]:
    """A config with adapters, and parameters whose adapters are not at their start."""
    cfg = dataclasses.replace(BASE, lora=LoraConfig(**{"rank": 3, "alpha": 5.0} | options))
    named = tree.named_leaves(partition.unbox(decoder.init_params(cfg, jax.random.key(0))))
    for i, (name, leaf) in enumerate(named.items()):
        if lora.is_adapter(name):
            named[name] = leaf + 0.3 * jax.random.normal(jax.random.key(i), leaf.shape)
    return cfg, tree.from_named(named)


@pytest.mark.parametrize(("equation", "shape"), [("BTD,DNH->BNTH", (6, 2, 4)), ("BNTH,NHD->BTD", (2, 4, 6))])
@pytest.mark.parametrize("dora", [False, True])
def test_a_map_equals_float64_numpy(equation, shape, dora):
    config = LoraConfig(rank=3, alpha=5.0, rank_stabilized=dora, dora=dora)
    layer = Einsum(equation, shape, (None,) * 3, 0.5, jnp.float32, lora=config)
    left, right = equation.split("->")[0].split(",")
    x = np.random.default_rng(0).normal(size=[dict(zip(right, shape, strict=True)).get(axis, 5) for axis in left])
    params = partition.unbox(layer.init(jax.random.key(1), jnp.asarray(x, jnp.float32)))["params"]
    params = {name: np.asarray(leaf, np.float64) + (name != "kernel") * 0.2 for name, leaf in params.items()}
    fan_in = int(np.prod([n for axis, n in zip(right, shape, strict=True) if axis in left]))
    kernel = params["kernel"].reshape(fan_in, -1)
    scale = 5 / np.sqrt(3) if dora else 5 / 3
    merged = kernel + scale * params["lora_a"].reshape(fan_in, 3) @ params["lora_b"].reshape(3, -1)
    if dora:
        merged *= params["magnitude"].reshape(1, -1) / np.linalg.norm(merged, axis=0)
    expected = np.einsum(equation, x, merged.reshape(shape))
    got = layer.apply({"params": jax.tree.map(jnp.float32, params)}, jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(got, expected, atol=2e-5)


@pytest.mark.parametrize("options", [{}, {"dora": True}, {"rank_stabilized": True, "target_modules": "query|mlp/down"}])
def test_merged_and_unmerged_logits_agree(options):
    cfg, params = adapted(**options)
    plain_cfg, plain = lora.merge(cfg, params)
    assert plain_cfg == BASE
    assert not any(lora.is_adapter(name) for name in tree.named_leaves(plain))
    merged, unmerged = decoder.forward(plain_cfg, plain, TOKENS), decoder.forward(cfg, params, TOKENS)
    np.testing.assert_allclose(merged, unmerged, atol=1e-5)
    base = tree.split(params, lambda name: not lora.is_adapter(name))[0]
    assert np.abs(decoder.forward(BASE, base, TOKENS) - merged).max() > 1e-2


@pytest.mark.parametrize("dora", [False, True])
def test_fresh_adapters_change_nothing(dora):
    cfg = dataclasses.replace(BASE, lora=LoraConfig(rank=2, dora=dora))
    base = partition.unbox(decoder.init_params(BASE, jax.random.key(5)))
    fresh, _ = tree.split(partition.unbox(decoder.init_params(cfg, jax.random.key(6))), lora.is_adapter)
    starts = tree.named_leaves(lora.magnitudes(cfg, base))
    params = tree.from_named(tree.named_leaves(fresh) | starts | tree.named_leaves(base))
    assert (len(starts) > 0) == dora
    np.testing.assert_allclose(decoder.forward(cfg, params, TOKENS), decoder.forward(BASE, base, TOKENS), atol=1e-5)


def test_several_adapters_share_one_base():
    cfg, params = adapted()
    one, base = tree.split(params, lora.is_adapter)
    two = jax.tree.map(lambda leaf: -2 * leaf, one)
    before = tree.digest(base)
    outputs = [decoder.forward(*lora.merge(cfg, tree.merge(adapter, base)), TOKENS) for adapter in (one, two)]
    for adapter, output in zip((one, two), outputs, strict=True):
        np.testing.assert_allclose(decoder.forward(cfg, tree.merge(adapter, base), TOKENS), output, atol=1e-5)
    assert np.abs(outputs[0] - outputs[1]).max() > 1e-2
    assert tree.digest(base) == before


def test_target_modules_choose_the_adapted_maps():
    cfg, params = adapted(target_modules="query|mlp/.*")
    found = {name.split("/lora_a")[0] for name in tree.named_leaves(params) if name.endswith("lora_a")}
    assert found == {f"layers/{name}" for name in ("query", "mlp/gate", "mlp/up", "mlp/down")}
    per_layer = 3 * ((16 + 16) + 2 * (16 + 24) + (24 + 16))
    assert tree.count(tree.split(params, lora.is_adapter)[0]) == cfg.num_layers * per_layer


def test_dropout_touches_the_adapter_alone():
    cfg, params = adapted(dropout=0.5)
    run = lambda key: decoder.hidden_states(cfg, params, TOKENS, dropout_rng=key)
    assert np.abs(run(jax.random.key(1)) - run(jax.random.key(2))).max() > 1e-3
    base = jax.tree.map(lambda leaf: leaf, params)
    named = {name: leaf * (0 if name.endswith("lora_b") else 1) for name, leaf in tree.named_leaves(base).items()}
    still = lambda key: decoder.hidden_states(cfg, tree.from_named(named), TOKENS, dropout_rng=key)
    np.testing.assert_array_equal(still(jax.random.key(1)), still(jax.random.key(2)))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": -1}, "lora.rank"),
        ({"rank": 1, "target_modules": "qury"}, "mlp/gate"),
        ({"rank": 1, "target_modules": "("}, "not a regular expression"),
        ({"rank": 1, "dropout": 1.0}, "lora.dropout"),
    ],
)
def test_mistakes_name_the_field(options, words):
    with pytest.raises(ValueError, match=words):
        LoraConfig(**options)
