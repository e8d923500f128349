"""The sharded train state and the jitted steps over it; the same ones for every objective."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from jaxgpt import partition, tree
from jaxgpt.partition import Rules
from jaxgpt.types import Array, Metrics, Objective, Params, TrainState

Step = Callable[[TrainState, Params, Any], tuple[TrainState, Metrics]]


def abstract_state(
    init_fn: Callable[[Array], Any],
    optimizer: optax.GradientTransformation,
    rng: Array,
    mesh: Mesh,
    rules: Rules,
    trainable: Callable[[str], bool] = lambda name: True,
) -> tuple[TrainState, Params]:
    """The (state, frozen) that `init_state` would make, as ShapeDtypeStructs that carry their shardings.

    Nothing is allocated: what a checkpoint is restored into, and what a memory estimate needs.
    """
    partition.check_rules(rules)
    boxed = jax.eval_shape(init_fn, rng)
    shardings = partition.param_shardings(boxed, mesh, rules)
    params = jax.tree.map(_with_sharding, partition.unbox(boxed), shardings)
    params, frozen = tree.split(params, trainable)
    opt_state = jax.eval_shape(optimizer.init, params)
    whole = partition.replicated(mesh)
    make_state: Callable[..., TrainState] = TrainState  # of abstract leaves
    state = make_state(
        step=jax.ShapeDtypeStruct((), jnp.int32, sharding=whole),
        params=params,
        opt_state=jax.tree.map(_with_sharding, opt_state, _inherit(opt_state, params, whole)),
        rng=jax.ShapeDtypeStruct(rng.shape, rng.dtype, sharding=whole),
    )
    return state, frozen


def init_state(
    init_fn: Callable[[Array], Any],
    optimizer: optax.GradientTransformation,
    rng: Array,
    mesh: Mesh,
    rules: Rules,
    trainable: Callable[[str], bool] = lambda name: True,
    loaded: Params | None = None,
) -> tuple[TrainState, Params, Any]:
    """A fresh (state, frozen, shardings of the state), allocated on the mesh piece by piece where it belongs.

    init_fn: rng -> boxed parameters. trainable: predicate over path names; the rest of the parameters is `frozen`.
    loaded: some of the parameters, already on the mesh, in place of init_fn's, which are then never made.
    """
    state, frozen = abstract_state(init_fn, optimizer, rng, mesh, rules, trainable)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, (state, frozen))
    given = tree.named_leaves(loaded or {})
    is_missing = lambda name: name not in given

    def init(rng):
        params_rng, step_rng = jax.random.split(rng)
        return tree.split(partition.unbox(init_fn(params_rng)), is_missing)[0], jnp.zeros((), jnp.int32), step_rng

    missing = tree.split(tree.merge(shardings[0].params, shardings[1]), is_missing)[0]
    fresh, step, step_rng = jax.jit(init, out_shardings=(missing, shardings[0].step, shardings[0].rng))(rng)
    params, frozen = tree.split(tree.merge(fresh, loaded or {}), trainable)
    opt_state = jax.jit(optimizer.init, out_shardings=shardings[0].opt_state)(params)
    return TrainState(step, params, opt_state, step_rng), frozen, shardings[0]


def _with_sharding(leaf, sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _inherit(opt_state: Any, params: Params, default: NamedSharding) -> Any:
    """Each optimizer leaf gets the sharding of the parameter with its shape and the longest common path suffix."""
    named = {tuple(name.split("/")): leaf for name, leaf in tree.named_leaves(params).items()}

    def sharding(path, leaf):
        parts = tuple(tree.path_name(path).split("/"))
        same = [name for name, p in named.items() if p.shape == leaf.shape and _common_suffix(name, parts)]
        best = max(same, key=lambda name: _common_suffix(name, parts), default=None)
        return default if best is None else named[best].sharding

    return jax.tree_util.tree_map_with_path(sharding, opt_state)


def _common_suffix(a: tuple, b: tuple) -> int:
    return next((i for i, (x, y) in enumerate(zip(a[::-1], b[::-1], strict=False)) if x != y), min(len(a), len(b)))


def make_train_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    rules: Rules,
    *,
    shardings: Any,
    accum: int = 1,
) -> Step:
    """The jitted update step(state, frozen, batch) -> (state, metrics); the state is donated.

    The gradient is that of the objective's sum over the *global* batch divided by its global weight, whatever the
    devices or the accumulation. Metrics, f32 scalars: the objective's sums divided by the weight, "weight" itself,
    "grad_norm" before clipping, and "finite": 0 where the loss or the gradient is not finite; such an update is
    not applied, so that the state stays the last good one (the step counter moves on).

    accum: micro-batches run one after the other; the rows of the batch divide by it.
    """

    def grad_sums(params, frozen, batch, rng):
        def loss(params):
            return objective(tree.merge(params, frozen), batch, rng)

        (loss_sum, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return grads, dict(metrics) | {"objective": loss_sum}

    def step(state, frozen, batch):
        with partition.activate(mesh, rules):
            rng = jax.random.fold_in(state.rng, state.step)
            if accum == 1:
                grads, sums = grad_sums(state.params, frozen, batch, rng)
            else:
                grads, sums = _accumulate(grad_sums, state.params, frozen, batch, rng, accum)
            weight = jnp.maximum(sums["weight"], 1e-8)
            grads = jax.tree.map(lambda g: g / weight, grads)
            grad_norm = tree.global_norm(grads)
            finite = jnp.isfinite(sums["objective"]) & jnp.isfinite(grad_norm)
            with jax.named_scope("optimizer"):
                updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
                params = optax.apply_updates(state.params, updates)
            keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)
            state = state.replace(
                step=state.step + 1, params=keep(params, state.params), opt_state=keep(opt_state, state.opt_state)
            )
            metrics = {name: value / weight for name, value in sums.items() if name != "weight"}
            return state, metrics | {"weight": sums["weight"], "grad_norm": grad_norm, "finite": finite}

    whole = partition.replicated(mesh)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, whole))


def _accumulate(grad_sums, params, frozen, batch, rng, accum: int):
    """Sums of gradients and metrics over `accum` micro-batches.

    Micro-batch i holds rows i, accum + i, ...: each device then works on rows it already has.
    """
    micro = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, accum, *x.shape[1:]), 1, 0), batch)

    def body(sums, xs):
        index, batch = xs
        batch = jax.tree.map(lambda x: partition.shard(x, "batch", *(None,) * (x.ndim - 1)), batch)
        new = grad_sums(params, frozen, batch, jax.random.fold_in(rng, index))
        return jax.tree.map(jnp.add, sums, new), None

    first = jax.tree.map(lambda x: x[0], micro)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(grad_sums, params, frozen, first, rng))
    return jax.lax.scan(body, zeros, (jnp.arange(accum), micro))[0]


def make_eval_step(objective: Objective, mesh: Mesh, rules: Rules) -> Callable[[Params, Params, Any], Metrics]:
    """The jitted evaluation (params, frozen, batch) -> the objective's SUMS, without dropout; nothing is donated."""

    def step(params, frozen, batch):
        with partition.activate(mesh, rules):
            loss_sum, sums = objective(tree.merge(params, frozen), batch, None)
            return dict(sums) | {"objective": loss_sum}

    return jax.jit(step, out_shardings=partition.replicated(mesh))


def evaluate(
    eval_step: Callable[[Params, Params, Any], Metrics],
    params: Params,
    frozen: Params,
    batches: Iterable[Any],
    group: str,
) -> dict[str, float]:
    """Metrics over all batches: every sum divided by the total weight, so that ragged batches count by their tokens.

    Returns {group/loss in nats per token, group/perplexity, group/accuracy, group/bits_per_byte, ...}; bits per byte
    are those of the text's UTF-8 bytes, comparable between tokenizers.
    """
    sums: dict[str, float] = {}
    for batch in batches:
        for name, value in jax.device_get(dict(eval_step(params, frozen, batch))).items():
            sums[name] = sums.get(name, 0.0) + float(value)
    weight = sums["weight"]
    if not weight:
        raise ValueError(f"{group}: nothing in the held-out data counts (preferences that are all ties, for instance).")
    metrics = {f"{group}/{name}": sums[name] / weight for name in sums if name not in ("weight", "bytes", "objective")}
    if "log_z" in sums:  # a loss over a vocabulary
        metrics[f"{group}/perplexity"] = math.exp(min(sums["loss"] / weight, 700.0))
    if sums.get("bytes"):
        metrics[f"{group}/bits_per_byte"] = sums["loss"] / math.log(2) / sums["bytes"]
    return metrics
