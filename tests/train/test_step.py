"""One train step: the same on every mesh, with and without accumulation, and safe against non-finite batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import partition, tree
from jaxgpt.models import decoder
from jaxgpt.models.config import ModelConfig
from jaxgpt.objectives.next_token import LossConfig, make_next_token
from jaxgpt.partition import DEFAULT_RULES, MeshConfig
from jaxgpt.train.optimizer import OptimizerConfig, make_optimizer
from jaxgpt.train.step import init_state, make_eval_step, make_train_step
from jaxgpt.types import LMBatch

MODEL = ModelConfig(
    vocab_size=32, num_layers=2, embed_dim=16, num_heads=4, num_kv_heads=2, mlp_dim=32, max_seq_length=8, remat="none"
)
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, warmup_steps=0)


def make_batch(seed: int, rows: int = 8) -> LMBatch:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 32, (rows, 9)).astype(np.int32)
    segments = np.sort(rng.integers(1, 3, (rows, 8)), axis=1).astype(np.int32)
    weights = (rng.random((rows, 8)) > 0.4).astype(np.float32) * np.arange(1, rows + 1, dtype=np.float32)[:, None]
    positions = np.tile(np.arange(8, dtype=np.int32), (rows, 1))
    return LMBatch(tokens[:, :-1], tokens[:, 1:], weights, segments, positions)


def run(mesh_config, *, accum=1, devices=None, model=MODEL, optimizer=OPTIMIZER, loss=None, steps=3):
    mesh = partition.make_mesh(mesh_config, devices=devices)
    objective = make_next_token(model, loss or LossConfig(chunk_tokens=16))
    rule = make_optimizer(optimizer, 10)
    init = lambda rng: decoder.init_params(model, rng)
    state, frozen, shardings = init_state(init, rule, jax.random.key(0), mesh, DEFAULT_RULES)
    step = make_train_step(objective, rule, mesh, DEFAULT_RULES, shardings=shardings, accum=accum)
    losses = []
    for i in range(steps):
        state, metrics = step(state, frozen, partition.to_global(make_batch(i), mesh, 8))
        losses.append(float(metrics["loss"]))
    return state, losses


@pytest.fixture(scope="module")
def single():
    return run(MeshConfig(), devices=jax.devices()[:1])


@pytest.mark.parametrize(
    "sizes",
    [{"data": 8}, {"data": 1, "fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"data": 2, "fsdp": 1, "tensor": 4},
     {"data": 2, "fsdp": 2, "context": 2}],
    ids=lambda s: "-".join(f"{k}{v}" for k, v in s.items()),
)  # fmt: skip
def test_every_mesh_shape_gives_the_loss_and_parameters_of_one_device(single, sizes):
    state, losses = run(MeshConfig(**sizes))
    np.testing.assert_allclose(losses, single[1], rtol=1e-5)
    for ours, theirs in zip(jax.tree.leaves(state.params), jax.tree.leaves(single[0].params), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)  # one Adam step moves 1e-2


def test_accumulation_gives_the_same_update_under_uneven_weights(single):
    for sizes in ({"data": 2, "fsdp": 2, "tensor": 2},):
        state, losses = run(MeshConfig(**sizes), accum=2)
        np.testing.assert_allclose(losses, single[1], rtol=1e-5)
        for ours, theirs in zip(jax.tree.leaves(state.params), jax.tree.leaves(single[0].params), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-4)  # one Adam step moves 1e-2


def test_parameters_and_their_moments_are_split_over_the_mesh():
    state, _ = run(MeshConfig(data=2, fsdp=2, tensor=2), steps=0)
    named = tree.named_leaves(state)
    up = next(v for k, v in named.items() if k.startswith("params") and k.endswith("up/kernel"))
    assert up.addressable_shards[0].data.shape == (2, 16 // 2, 32 // 2)
    moments = [v for k, v in named.items() if k.startswith("opt_state") and k.endswith("up/kernel")]
    assert len(moments) == 2
    for moment in moments:
        assert moment.sharding == up.sharding


def test_the_gradient_norm_is_that_of_the_mean_loss_by_finite_differences():
    mesh = partition.make_mesh(MeshConfig(), devices=jax.devices()[:1])
    objective = make_next_token(MODEL, LossConfig(chunk_tokens=16))
    rule = make_optimizer(OPTIMIZER, 10)
    init = lambda rng: decoder.init_params(MODEL, rng)
    state, frozen, shardings = init_state(init, rule, jax.random.key(0), mesh, DEFAULT_RULES)
    params = jax.tree.map(np.array, state.params)
    batch = make_batch(0)
    grads = jax.grad(lambda p: objective(p, batch, None)[0] / batch.weights_BT.sum())(params)
    _, metrics = make_train_step(objective, rule, mesh, DEFAULT_RULES, shardings=shardings)(state, frozen, batch)
    norm = np.sqrt(sum((np.asarray(g, np.float64) ** 2).sum() for g in jax.tree.leaves(grads)))
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)


def test_an_update_that_is_not_finite_leaves_the_state_alone():
    mesh = partition.make_mesh(MeshConfig(), devices=jax.devices()[:1])
    rule = make_optimizer(OPTIMIZER, 10)

    def objective(params, batch, rng):
        del rng
        total = jnp.sum(params["w"] * batch["x"])
        return total, {"weight": jnp.float32(batch["x"].size), "loss": total}

    init = lambda rng: {"w": jax.random.normal(rng, (4,))}
    state, frozen, shardings = init_state(init, rule, jax.random.key(0), mesh, DEFAULT_RULES)
    before = jax.tree.map(np.array, (state.params, state.opt_state))
    step = make_train_step(objective, rule, mesh, DEFAULT_RULES, shardings=shardings)
    state, metrics = step(state, frozen, {"x": np.array([1, 2, np.inf, 3], np.float32)})
    assert not metrics["finite"]
    assert state.step == 1
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves((state.params, state.opt_state)), strict=True):
        np.testing.assert_array_equal(old, new)
    state, metrics = step(state, frozen, {"x": np.ones(4, np.float32)})
    assert metrics["finite"]
    assert np.all(np.asarray(state.params["w"]) < before[0]["w"])


def test_dropout_draws_anew_each_step_and_evaluation_has_none():
    model = ModelConfig(**{f: getattr(MODEL, f) for f in ("vocab_size", "num_layers", "embed_dim", "num_heads")},
                        mlp_dim=32, max_seq_length=8, dropout=0.5)  # fmt: skip
    mesh = partition.make_mesh(MeshConfig(), devices=jax.devices()[:1])
    objective = make_next_token(model, LossConfig(chunk_tokens=64))
    params = partition.unbox(decoder.init_params(model, jax.random.key(0)))
    evaluate = make_eval_step(objective, mesh, DEFAULT_RULES)
    batch = make_batch(0)
    plain = float(evaluate(params, {}, batch)["loss"])
    assert plain == float(evaluate(params, {}, batch)["loss"])
    noisy = {float(objective(params, batch, jax.random.fold_in(jax.random.key(1), i))[1]["loss"]) for i in range(2)}
    assert len({plain, *noisy}) == 3


def test_a_model_learns_a_rule_to_near_zero_loss():
    """Next token = token + 1: learnable exactly, so the loss must approach 0 from log 32 = 3.47."""
    mesh = partition.make_mesh(MeshConfig())
    rule = make_optimizer(OptimizerConfig(learning_rate=2e-2, warmup_steps=5, weight_decay=0.0), 60)
    init = lambda rng: decoder.init_params(MODEL, rng)
    state, frozen, shardings = init_state(init, rule, jax.random.key(0), mesh, DEFAULT_RULES)
    step = make_train_step(
        make_next_token(MODEL, LossConfig(chunk_tokens=64)), rule, mesh, DEFAULT_RULES, shardings=shardings
    )
    losses = []
    for i in range(60):
        starts = np.random.default_rng(i).integers(0, 32, (8, 1))
        tokens = ((starts + np.arange(9)) % 32).astype(np.int32)
        batch = make_batch(i).replace(
            tokens_BT=tokens[:, :-1], targets_BT=tokens[:, 1:], weights_BT=np.ones((8, 8), np.float32)
        )
        state, metrics = step(state, frozen, partition.to_global(batch, mesh, 8))
        losses.append(float(metrics["loss"]))
    assert losses[0] == pytest.approx(np.log(32), abs=0.1)
    assert losses[-1] < 0.1, losses[-1]
