"""Update rules against float64 numpy, schedules against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgpt.train import optimizer
from jaxgpt.train.optimizer import OptimizerConfig, make_optimizer, make_schedule

RNG = np.random.default_rng(0)
PARAMS = {
    "embedding": RNG.normal(size=(6, 4)).astype(np.float32),
    "layers": {
        "norm": {"scale": np.ones((2, 4), np.float32)},
        "mlp": {"up": {"kernel": RNG.normal(size=(2, 4, 5)).astype(np.float32)}},
    },
}
GRADS = [jax.tree.map(lambda p: RNG.normal(size=p.shape).astype(np.float32), PARAMS) for _ in range(3)]


def applied(config: OptimizerConfig, steps: int = 100):
    rule = make_optimizer(config, steps)
    params, state = jax.tree.map(jnp.asarray, PARAMS), None
    state = rule.init(params)
    for grads in GRADS:
        updates, state = rule.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def test_adamw_is_the_textbook_update_with_decay_on_matrices_alone():
    config = OptimizerConfig(learning_rate=0.1, warmup_steps=2, schedule="constant", max_grad_norm=1.0)
    params, _ = applied(config)
    norms = [np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in jax.tree.leaves(grads))) for grads in GRADS]

    def reference(name, p, gs):
        p, m, v = p.astype(np.float64), 0.0, 0.0
        for t, (g, norm) in enumerate(zip(gs, norms, strict=True), start=1):
            g = g / max(1.0, norm)
            m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
            decay = 0.1 * p if name != "scale" else 0.0
            lr = 0.1 * min(1.0, t / 2)
            p = p - lr * (m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8) + decay)
        return p

    for name, get in {
        "embedding": lambda t: t["embedding"],
        "scale": lambda t: t["layers"]["norm"]["scale"],
        "kernel": lambda t: t["layers"]["mlp"]["up"]["kernel"],
    }.items():
        np.testing.assert_allclose(get(params), reference(name, get(PARAMS), map(get, GRADS)), rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["lion", "adafactor", "muon"])
def test_other_rules_move_every_parameter_and_decay_no_norm(name):
    config = OptimizerConfig(name=name, learning_rate=0.01, warmup_steps=0, schedule="constant", weight_decay=0.0)
    params, _ = applied(config)
    decayed, _ = applied(OptimizerConfig(name=name, learning_rate=0.01, warmup_steps=0, schedule="constant"))
    for before, after in zip(jax.tree.leaves(PARAMS), jax.tree.leaves(params), strict=True):
        assert np.all(np.abs(before - np.asarray(after)) > 0)
    same = jax.tree.map(lambda a, b: bool(jnp.all(a == b)), params, decayed)
    assert same == {"embedding": False, "layers": {"norm": {"scale": True}, "mlp": {"up": {"kernel": False}}}}


def test_muon_updates_each_layer_matrix_by_an_orthogonal_one():
    config = OptimizerConfig(
        name="muon", learning_rate=0.01, warmup_steps=0, schedule="constant", weight_decay=0.0, max_grad_norm=0.0
    )
    rule = make_optimizer(config, 10)
    params = jax.tree.map(jnp.asarray, PARAMS)
    updates, _ = rule.update(GRADS[0], rule.init(params), params)
    for update in np.asarray(updates["layers"]["mlp"]["up"]["kernel"]):
        # Newton-Schulz in five steps leaves singular values near 1; consistent RMS scales them by 0.2 sqrt(5).
        values = np.linalg.svd(update, compute_uv=False) / (0.01 * 0.2 * np.sqrt(5))
        assert np.all((values > 0.5) & (values < 1.4)), values
    np.testing.assert_allclose(np.abs(updates["embedding"]), 0.01, rtol=1e-4)  # AdamW's first step is the sign


def test_lion_moves_by_the_sign():
    config = OptimizerConfig(
        name="lion", learning_rate=0.01, warmup_steps=0, schedule="constant", weight_decay=0.0, max_grad_norm=0.0
    )
    rule = make_optimizer(config, 10)
    updates, _ = rule.update(GRADS[0], rule.init(PARAMS), PARAMS)
    np.testing.assert_allclose(updates["embedding"], -0.01 * np.sign(GRADS[0]["embedding"]), rtol=1e-5)


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "constant"])
def test_schedules_follow_their_formulas(name):
    config = OptimizerConfig(
        schedule=name, learning_rate=2.0, warmup_steps=10, final_lr_fraction=0.1, decay_fraction=0.2
    )
    rates = np.array([float(make_schedule(config, 110)(s)) for s in range(111)])
    np.testing.assert_allclose(rates[:10], 2.0 * np.arange(1, 11) / 10, rtol=1e-6)
    t = np.arange(101) / 100
    shape = {
        "cosine": 0.5 * (1 + np.cos(np.pi * t)),
        "linear": 1 - t,
        "wsd": np.where(t < 0.8, 1.0, (1 - t) / 0.2),
        "constant": np.ones(101),
    }[name]
    floor = 1.0 if name == "constant" else 0.1
    np.testing.assert_allclose(rates[10:], 2.0 * (floor + (1 - floor) * shape), rtol=1e-5)


def test_the_average_of_parameters_is_the_recursion_in_float64():
    config = OptimizerConfig(ema_decay=0.9, learning_rate=0.1, warmup_steps=0)
    plain, rule = make_optimizer(OptimizerConfig(learning_rate=0.1, warmup_steps=0), 100), make_optimizer(config, 100)
    params = jax.tree.map(jnp.asarray, PARAMS)
    state, plain_state, average = rule.init(params), plain.init(params), PARAMS["embedding"].astype(np.float64)
    for grads in GRADS:
        updates, plain_state = plain.update(grads, plain_state, params)
        with_ema, state = rule.update(grads, state, params)
        np.testing.assert_array_equal(updates["embedding"], with_ema["embedding"])
        params = optax.apply_updates(params, updates)
        average = 0.9 * average + 0.1 * np.asarray(params["embedding"], np.float64)
    np.testing.assert_allclose(optimizer.ema_params(state)["embedding"], average, rtol=1e-6)
    assert optimizer.ema_params(plain_state) is None


@pytest.mark.parametrize(
    ("field", "value"), [("b1", 1.0), ("learning_rate", 0.0), ("warmup_steps", -1), ("final_lr_fraction", 1.5)]
)
def test_impossible_settings_are_named(field, value):
    with pytest.raises(ValueError, match=rf"optimizer\.{field}.*{value}"):
        OptimizerConfig(**{field: value})
