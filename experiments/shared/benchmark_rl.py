"""What an iteration of PPO costs here, part by part: `experiments.benchmark --config=configs/benchmark.py:rl`."""

import dataclasses
import functools
import heapq
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt import partition, tree
from jaxgpt.models import decoder
from jaxgpt.models.config import ModelConfig
from jaxgpt.objectives.ppo import PPOConfig, make_policy, make_value
from jaxgpt.objectives.reward import last_token_rewards
from jaxgpt.partition import DEFAULT_RULES
from jaxgpt.rl import advantages, step
from jaxgpt.rl.rollout import Prompts, RolloutConfig
from jaxgpt.train.config import PretrainConfig
from jaxgpt.train.optimizer import make_optimizer
from jaxgpt.train.step import init_state, make_train_step


def rows(
    train: PretrainConfig, rollout: RolloutConfig, ppo: PPOConfig, num_steps: int, mean_length: int = 0
) -> list[tuple[str, str]]:
    """The table: policy, critic, reference and reward model of one size, random prompts, one iteration.

    mean_length: of responses, roughly: that share of the vocabulary ends them; 0: nothing does.
    """
    mesh, model = partition.make_mesh(train.mesh, train.dcn_mesh), train.model
    optimizer = make_optimizer(train.optimizer, train.num_train_steps)
    scalar = dataclasses.replace(model, head="scalar")
    fresh = lambda cfg, seed: init_state(
        functools.partial(decoder.init_params, cfg), optimizer, jax.random.key(seed), mesh, DEFAULT_RULES
    )
    (policy, _, policy_sh), (critic, _, critic_sh) = fresh(model, 0), fresh(scalar, 1)
    frozen = {"reference": fresh(model, 0)[0].params, "reward": fresh(scalar, 2)[0].params}
    eos_ids = tuple(range(model.vocab_size // mean_length)) if mean_length else (-1,)
    setup = step.Setup(
        policy=model, reference=model, critic=scalar, rollout=rollout, ppo=ppo, group=step.GroupConfig(), eos_ids=eos_ids,
        pad_id=0,
    )  # fmt: skip
    make = functools.partial(make_train_step, optimizer=optimizer, mesh=mesh, rules=DEFAULT_RULES)
    steps = step.Steps(
        make(make_policy(model, ppo, rollout.temperature), shardings=policy_sh),
        make(make_value(scalar, ppo), shardings=critic_sh),
    )
    state = step.RLState(
        jnp.zeros((), jnp.int32), policy, critic, jnp.float32(ppo.kl_coef), advantages.init_moments(), jax.random.key(3)
    )
    size = rollout.batch_size
    prompts = Prompts(
        jax.random.randint(jax.random.key(4), (size, rollout.max_prompt_length), 0, model.vocab_size),
        jnp.ones((size, rollout.max_prompt_length)), jnp.arange(size),
    )  # fmt: skip
    score = lambda frozen, out: last_token_rewards(scalar, frozen["reward"], out.tokens_BS, out.segments_BS)
    on = lambda fn: jax.jit(functools.partial(_active, mesh, fn))
    short = dataclasses.replace(setup, rollout=dataclasses.replace(rollout, max_new_tokens=1))

    first, _ = timed(on(functools.partial(step.collect, short)), num_steps, state, frozen, prompts)
    collect, out = timed(on(functools.partial(step.collect, setup)), num_steps, state, frozen, prompts)
    scoring, scores = timed(on(score), num_steps, frozen, out)
    shaping, made = timed(on(functools.partial(step.make_trajectory, setup)), num_steps, state, frozen, out, scores)
    updating, _ = timed(
        on(functools.partial(step.update, setup, steps)), num_steps, state, frozen, made[0], jax.random.key(5)
    )
    whole = step.make_rl_step(
        setup, steps, score, mesh, DEFAULT_RULES, shardings=_shardings(state, policy_sh, critic_sh, mesh)
    )
    iteration, waited = loop(whole, num_steps, state, frozen, prompts)

    total = collect + scoring + shaping + updating
    lengths_B = np.sum(out.response_mask_BR, axis=1, dtype=int).tolist()
    new, slots = sum(lengths_B), rollout.num_slots or size
    num_decodes = decode_steps(lengths_B, slots)
    decode = (collect - first) / max(num_decodes, 1)
    bandwidth = copy_bandwidth()
    length = rollout.max_prompt_length + rollout.max_new_tokens
    floor = decode_bytes(model, policy.params, slots, length) / jax.device_count() / bandwidth
    share = lambda seconds: f"{seconds:.3f} s ({seconds / total:.0%})"
    return [
        ("policy", f"{tree.count(policy.params):,} parameters; critic, reference and reward model alike"),
        ("responses", f"{size} of {new / size:.1f} tokens to prompts of {rollout.max_prompt_length}"),
        ("prompts", f"{size / iteration:,.1f} per second of an iteration"),
        ("generated tokens", f"{new / iteration:,.0f} per second of an iteration"),
        ("generated tokens", f"{new / collect:,.0f} per second of rollout"),
        ("rollout", share(collect)),
        ("scoring", share(scoring)),
        ("log-probs, advantages", share(shaping)),
        ("updates", f"{share(updating)}, {ppo.num_epochs} epochs x {ppo.num_minibatches} minibatches"),
        ("one iteration, one program", f"{iteration:.3f} s"),
        ("device waited for the host", f"{waited:.1%}"),
        ("memory bandwidth, measured", f"{bandwidth / 1e9:,.1f} GB/s"),
        ("decode step", f"{decode * 1e3:.2f} ms, {num_decodes} steps of {slots} rows"),
        ("  weights and cache alone", f"{floor * 1e3:.2f} ms to read ({floor / decode:.0%})"),
    ]  # fmt: skip


def _active(mesh, fn: Callable, *args: Any) -> Any:
    with partition.activate(mesh, DEFAULT_RULES):
        return fn(*args)


def _shardings(state: step.RLState, policy: Any, critic: Any, mesh) -> Any:
    whole = partition.replicated(mesh)
    rest = jax.tree.map(lambda _: whole, state.replace(policy=None, critic=None))
    return rest.replace(policy=policy, critic=critic)


def timed(fn: Callable, num_steps: int, *args: Any) -> tuple[float, Any]:
    """(median seconds of a call after the first, the result)."""
    result = jax.block_until_ready(fn(*args))
    seconds = []
    for _ in range(num_steps):
        started = time.perf_counter()
        jax.block_until_ready(fn(*args))
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds), result


def loop(whole: Callable, num_steps: int, state: step.RLState, frozen: Any, prompts: Prompts) -> tuple[float, float]:
    """(seconds of an iteration that is waited for, share of a free-running loop that is not spent in iterations)."""
    state, metrics = whole(state, frozen, prompts)
    jax.block_until_ready(metrics)
    seconds = []
    for _ in range(num_steps):
        started = time.perf_counter()
        state, metrics = whole(state, frozen, prompts)
        jax.block_until_ready((state, metrics))
        seconds.append(time.perf_counter() - started)
    started = time.perf_counter()
    for _ in range(num_steps):
        state, metrics = whole(state, frozen, prompts)
    jax.block_until_ready((state, metrics))
    free = (time.perf_counter() - started) / num_steps
    return statistics.median(seconds), max(0.0, 1 - min(seconds) / free)


def copy_bandwidth(num_bytes: int = 1 << 28) -> float:
    """Bytes per second of one device: reads and writes of an addition of a constant to a large array."""
    x = jnp.zeros(num_bytes // 4, jnp.float32)
    add = jax.jit(lambda x: x + 1)
    best, _ = timed(add, 5, x)
    return 2 * num_bytes / best


def decode_steps(lengths: Iterable[int], num_slots: int) -> int:
    """Passes of one token that responses take, each in the first slot to be free; the prefill gives their first tokens."""
    free_at = [0] * num_slots
    for length in lengths:
        heapq.heapreplace(free_at, free_at[0] + max(length - 1, 0))
    return max(free_at)


def decode_bytes(model: ModelConfig, params: Any, batch: int, length: int) -> float:
    """What one decode step of a batch must read: every parameter as it is stored, and the cache of all slots."""
    weights = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    cache = 2 * model.num_layers * batch * length * model.num_kv_heads * model.head_dim
    return weights + cache * np.dtype(decoder.compute_dtype(model)).itemsize
