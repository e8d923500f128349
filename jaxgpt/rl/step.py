"""One iteration of reinforcement learning: rollout, score, advantages, and epochs of the ordinary train step over them.

`collect`, a score and `learn`, composed by `make_rl_step` into one jitted program; where the reward is computed on the
host, the same two halves with the host between them.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh

from jaxgpt import partition, tree
from jaxgpt.models.config import ModelConfig
from jaxgpt.numerics import masked_mean, masked_whiten
from jaxgpt.objectives.ppo import (
    PPOConfig,
    response_logprobs,
    response_values,
    shared_critic,
    token_means,
    token_weights,
)
from jaxgpt.partition import Rules
from jaxgpt.rl import advantages
from jaxgpt.rl.advantages import Moments
from jaxgpt.rl.rollout import Prompts, Rollout, RolloutConfig, roll_out
from jaxgpt.train.step import Step
from jaxgpt.types import Array, Metrics, Params, TrainState, Trajectory


@dataclasses.dataclass(frozen=True)
class GroupConfig:
    """Advantages without a critic: see `advantages.group_advantages`.

    drop_equal: groups whose responses all have the same reward do not count (DAPO's dynamic sampling, without resampling).
    """

    scale: advantages.Scale = "group"
    baseline: advantages.Baseline = "mean"
    drop_equal: bool = False


class RLState(struct.PyTreeNode):
    """Everything that an iteration changes. step: i32, iterations done.

    critic: None where advantages come from groups, or where the policy's trunk is the critic's, too.
    kl_coef: f32. moments: of the scores so far, for their normalisation. rng: the key of an iteration is fold_in(rng, step).
    """

    step: Array
    policy: TrainState
    critic: TrainState | None
    kl_coef: Array
    moments: Moments
    rng: Array

    @property
    def params(self) -> Params:
        """All parameters that are trained."""
        return {"policy": self.policy.params} | ({"critic": self.critic.params} if self.critic is not None else {})


@dataclasses.dataclass(frozen=True)
class Setup:
    """What an iteration is made of; static.

    policy: its config, adapters included. reference: the same model without them. critic: None for group advantages.
    Parameters that are frozen come in one tree: frozen["policy"], the base under adapters; frozen["critic"], that of the
    critic where it is another; and frozen["reference"], where the policy has no base that could serve.
    """

    policy: ModelConfig
    reference: ModelConfig
    critic: ModelConfig | None
    rollout: RolloutConfig
    ppo: PPOConfig
    group: GroupConfig
    eos_ids: tuple[int, ...]
    pad_id: int


class Steps(NamedTuple):
    """The train steps of policy and critic over a Trajectory; of both in one where they share a trunk."""

    policy: Step
    critic: Step | None


Score = Callable[[Params, Rollout], Array]  # (frozen, rollout) -> scores f32 [B]


def make_rl_step(
    setup: Setup, steps: Steps, score: Score, mesh: Mesh, rules: Rules, *, shardings: Any
) -> Callable[[RLState, Params, Prompts], tuple[RLState, Metrics]]:
    """The jitted iteration step(state, frozen, prompts) -> (state, metrics); the state is donated."""

    def step(state: RLState, frozen: Params, prompts: Prompts) -> tuple[RLState, Metrics]:
        with partition.activate(mesh, rules):
            rollout = collect(setup, state, frozen, prompts)
            return learn(setup, steps, state, frozen, rollout, score(frozen, rollout))

    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, partition.replicated(mesh)))


def make_rl_halves(
    setup: Setup, steps: Steps, mesh: Mesh, rules: Rules, *, shardings: Any
) -> tuple[Callable[[RLState, Params, Prompts], Rollout], Callable[..., tuple[RLState, Metrics]]]:
    """(collect(state, frozen, prompts) -> rollout, learn(state, frozen, rollout, scores) -> (state, metrics)), jitted."""

    def first(state, frozen, prompts):
        with partition.activate(mesh, rules):
            return collect(setup, state, frozen, prompts)

    def second(state, frozen, rollout, scores):
        with partition.activate(mesh, rules):
            return learn(setup, steps, state, frozen, rollout, scores)

    whole = partition.replicated(mesh)
    return jax.jit(first, out_shardings=whole), jax.jit(second, donate_argnums=0, out_shardings=(shardings, whole))


def policy_params(state: RLState, frozen: Params) -> Params:
    """All of the policy's parameters."""
    return tree.merge(state.policy.params, frozen.get("policy", {}))


def critic_base(frozen: Params) -> Params:
    """What is frozen of a critic: its own base, or the trunk of the policy's."""
    return frozen["critic"] if "critic" in frozen else trunk(frozen.get("policy", {}))


def trunk(params: Params) -> Params:
    """A model's parameters but for its head."""
    return {name: leaf for name, leaf in params.items() if name != "head"}


def critic_params(state: RLState, frozen: Params) -> Params:
    """All of the critic's parameters."""
    if state.critic is None:
        return shared_critic(policy_params(state, frozen))
    return tree.merge(state.critic.params, critic_base(frozen))


def reference_params(frozen: Params) -> Params:
    """The reference's parameters: its own, or the base under the policy's adapters."""
    return frozen["reference"] if "reference" in frozen else frozen["policy"]


def rollout_logprobs(setup: Setup, model: ModelConfig, params: Params, rollout: Rollout) -> tuple[Array, Array]:
    """(log-probs, entropies) of a rollout's responses under a model, by the trainer's own forward pass, f32 [B, R]."""
    return response_logprobs(
        model, params, rollout.tokens_BS, rollout.segments_BS, rollout.positions_BS,
        num_response=rollout.response_mask_BR.shape[1], temperature=setup.rollout.temperature,
        chunk_tokens=setup.ppo.chunk_tokens,
    )  # fmt: skip


def collect(setup: Setup, state: RLState, frozen: Params, prompts: Prompts, rng: Array | None = None) -> Rollout:
    """Draw one response to each prompt from the policy; rng: of the draws, None for this iteration's own."""
    rng = _keys(state)[0] if rng is None else rng
    with jax.named_scope("rollout"):
        return roll_out(
            setup.policy, policy_params(state, frozen), prompts, rng, max_new=setup.rollout.max_new_tokens,
            sampler=setup.rollout.sampler, eos_ids=setup.eos_ids, pad_id=setup.pad_id, num_slots=setup.rollout.num_slots,
        )  # fmt: skip


def learn(
    setup: Setup, steps: Steps, state: RLState, frozen: Params, rollout: Rollout, scores_B: Array
) -> tuple[RLState, Metrics]:
    """Advantages of a rollout with these scores, and all epochs of updates on it."""
    with jax.named_scope("advantages"):
        trajectory, moments, metrics = make_trajectory(setup, state, frozen, rollout, scores_B)
    _, shuffle_rng = _keys(state)
    with jax.named_scope("update"):
        policy, critic, updates = update(setup, steps, state, frozen, trajectory, shuffle_rng)
    kl_coef = state.kl_coef
    if setup.ppo.kl_target is not None:
        kl_coef = advantages.adaptive_kl(
            kl_coef, metrics["objective/kl"], setup.ppo.kl_target, setup.ppo.kl_horizon, len(scores_B)
        )
    state = state.replace(step=state.step + 1, policy=policy, critic=critic, kl_coef=kl_coef, moments=moments)
    return state, metrics | updates | {"objective/kl_coef": kl_coef}


def _keys(state: RLState) -> tuple[Array, Array]:
    """(of the rollout, of the order of updates) in this iteration."""
    first, second = jax.random.split(jax.random.fold_in(state.rng, state.step))
    return first, second


def make_trajectory(
    setup: Setup, state: RLState, frozen: Params, rollout: Rollout, scores_B: Array
) -> tuple[Trajectory, Moments, dict[str, Array]]:
    """What the updates learn from: the rollout with log-probs, values, advantages; the score moments; metrics."""
    ppo, mask_BR = setup.ppo, rollout.response_mask_BR
    if not jnp.issubdtype(scores_B.dtype, jnp.floating):
        raise ValueError(f"Scores must be floating point, not {scores_B.dtype}: an integer would cut 0.5 to 0.")
    old_BR, entropy_BR = rollout_logprobs(setup, setup.policy, policy_params(state, frozen), rollout)
    reference_BR, _ = rollout_logprobs(setup, setup.reference, reference_params(frozen), rollout)

    scores_B = scores_B.astype(jnp.float32)
    moments = state.moments
    shaped_B = scores_B
    if ppo.normalize_rewards:
        # A score that the penalty replaces is no reward that was ever given.
        counted_B = None if ppo.missing_eos_penalty is None else rollout.has_eos_B
        moments = advantages.update_moments(moments, scores_B, counted_B)
        shaped_B = advantages.normalize(scores_B, moments)
    shaped_B = advantages.clip_scores(shaped_B, ppo.reward_clip)
    shaped_B = advantages.apply_missing_eos(shaped_B, rollout.has_eos_B, ppo.missing_eos_penalty)
    kl_coef = state.kl_coef if ppo.kl_in == "reward" else 0.0
    rewards_BR, _ = advantages.shaped_rewards(shaped_B, old_BR, reference_BR, mask_BR, kl_coef, ppo.kl_estimator)
    if ppo.whiten_rewards:
        rewards_BR = masked_whiten(rewards_BR, mask_BR, shift_mean=False)

    weights_BR, row_weights_B = token_weights(mask_BR, ppo.aggregation)
    returns_BR = values_BR = None
    metrics: dict[str, Array] = {}
    if setup.critic is not None:
        values_BR = response_values(
            setup.critic, critic_params(state, frozen), rollout.tokens_BS, rollout.segments_BS, rollout.positions_BS,
            num_response=mask_BR.shape[1],
        )  # fmt: skip
        advantages_BR, returns_BR = advantages.gae(rewards_BR, values_BR, mask_BR, gamma=ppo.gamma, lam=ppo.gae_lambda)
        if ppo.whiten_advantages:
            advantages_BR = masked_whiten(advantages_BR, mask_BR)
        metrics["value/explained_variance"] = advantages.explained_variance(values_BR, returns_BR, mask_BR)
    else:
        size = setup.rollout.num_samples_per_prompt
        totals_B = jnp.sum(rewards_BR, axis=1)
        advantages_B = advantages.group_advantages(
            totals_B, size, scale=setup.group.scale, baseline=setup.group.baseline
        )
        advantages_BR = advantages_B[:, None] * mask_BR
        if setup.group.drop_equal:
            used_B = advantages.has_spread(shaped_B, size).astype(jnp.float32)
            weights_BR, row_weights_B = weights_BR * used_B[:, None], row_weights_B * used_B
            metrics["rollout/used_fraction"] = jnp.mean(used_B)
    trajectory = Trajectory(
        tokens_BS=rollout.tokens_BS, segments_BS=rollout.segments_BS, positions_BS=rollout.positions_BS,
        response_mask_BR=mask_BR, old_logprobs_BR=old_BR, advantages_BR=advantages_BR, weights_BR=weights_BR,
        row_weights_B=row_weights_B, returns_BR=returns_BR, old_values_BR=values_BR,
        reference_logprobs_BR=reference_BR, kl_coef_B=jnp.broadcast_to(state.kl_coef, scores_B.shape),
    )  # fmt: skip
    return (
        trajectory,
        moments,
        metrics | _rollout_metrics(rollout, scores_B, rewards_BR, old_BR, reference_BR, entropy_BR),
    )


def _rollout_metrics(rollout, scores_B, rewards_BR, old_BR, reference_BR, entropy_BR) -> dict[str, Array]:
    """What a researcher watches, by TRL's names; sums per response, means over responses, unless said otherwise."""
    mask_BR = rollout.response_mask_BR
    per_response = lambda x_BR: jnp.mean(jnp.sum(jnp.where(mask_BR != 0, x_BR, 0.0), axis=1))
    reward = per_response(rewards_BR)
    score = jnp.mean(scores_B)
    gap_BR = jnp.where(mask_BR != 0, jnp.abs(old_BR - rollout.sampler_logprobs_BR), 0.0)
    reference_gap_BR = jnp.where(mask_BR != 0, jnp.abs(old_BR - reference_BR), 0.0)
    return {
        "objective/kl": per_response(old_BR - reference_BR),
        "objective/entropy": per_response(-old_BR),
        "objective/scores": score,
        "objective/scores_std": jnp.std(scores_B),
        "objective/rlhf_reward": reward,
        "objective/non_score_reward": reward - score,
        "policy/entropy": masked_mean(entropy_BR, mask_BR),
        "rollout/mean_length": jnp.mean(jnp.sum(mask_BR, axis=1)),
        "rollout/eos_fraction": jnp.mean(rollout.has_eos_B.astype(jnp.float32)),
        "rollout/logprob_gap": jnp.max(gap_BR),
        "rollout/reference_gap": jnp.max(reference_gap_BR),
        "rollout/mask_holes": jnp.sum(mask_BR[:, 1:] > mask_BR[:, :-1]).astype(jnp.float32),
    }


def update(
    setup: Setup, steps: Steps, state: RLState, frozen: Params, trajectory: Trajectory, rng: Array
) -> tuple[TrainState, TrainState | None, dict[str, Array]]:
    """All epochs of minibatch updates: (policy, critic, metrics: means over the minibatches)."""
    rows, count = len(trajectory.tokens_BS), setup.ppo.num_minibatches

    def minibatch(carry, batch):
        policy, critic, stopped = carry

        def advance():
            new_policy, metrics = steps.policy(policy, frozen.get("policy", {}), batch)
            out = _named("policy", metrics)
            if steps.critic is None or critic is None:
                return new_policy, critic, out
            new_critic, metrics = steps.critic(critic, critic_base(frozen), batch)
            return new_policy, new_critic, out | _named("value", metrics)

        if setup.ppo.target_kl is None:
            *models, metrics = advance()
            return (*models, stopped), metrics | {"policy/updates": jnp.ones(())}
        skipped = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(advance)[2])
        *models, metrics = jax.lax.cond(stopped, lambda: (policy, critic, skipped), advance)
        metrics["policy/updates"] = 1.0 - stopped.astype(jnp.float32)
        return (*models, stopped | (metrics["policy/approxkl"] > setup.ppo.target_kl)), metrics

    def epoch(carry, rng):
        order = jax.random.permutation(rng, rows)
        split = lambda x: partition.shard(
            x[order].reshape(count, rows // count, *x.shape[1:]), None, "batch", *(None,) * (x.ndim - 1)
        )
        return jax.lax.scan(minibatch, carry, jax.tree.map(split, trajectory))

    keys = jax.random.split(rng, setup.ppo.num_epochs)
    start = (state.policy, state.critic, jnp.zeros((), bool))
    (policy, critic, _), stacked = jax.lax.scan(epoch, start, keys)
    done = stacked.pop("policy/updates")
    finite = stacked.pop("policy/finite") | (done == 0)
    if critic is not None:
        finite &= stacked.pop("value/finite") | (done == 0)
    metrics = {name: jnp.sum(value) / jnp.sum(done) for name, value in stacked.items()}
    metrics |= {"policy/first_ratio": stacked["policy/ratio"][0, 0], "policy/updates": jnp.sum(done)}
    return policy, critic, metrics | {"finite": jnp.all(finite)}


def _named(group: str, metrics: Metrics) -> dict[str, Array]:
    """What a train step says, as means over tokens; sums of a shared trunk have the group in their names already."""
    for prefix in ("", "policy/", "value/"):
        metrics = token_means(metrics, prefix) if f"{prefix}tokens" in metrics else metrics
    shown = {name: value for name, value in metrics.items() if name not in ("objective", "weight")}
    return {name if "/" in name else f"{group}/{name}": value for name, value in shown.items()}
