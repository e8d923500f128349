"""Proof of the RL step: on tasks small enough to enumerate, the trained policy is the one that theory predicts.

    python -m experiments.closed_form [--algorithms=ppo,grpo_k2] [--kl_coefs=0.4,0.5,0.7] [--seeds=0,1,2]

A tiny transformer answers 4 prompts with at most 3 tokens out of 6, EOS among them; every response has a random reward.
With the KL in the reward, the optimum of E[r] - beta KL(pi || ref) is pi*(y|x) = ref(y|x) exp(r(x, y) / beta) / Z(x) (Korbak
et al. 2022, arXiv:2205.11275). All responses are enumerated, so KL(pi || pi*) is exact. With the KL in the loss and
responses of one token, k2 leads to the same pi*, and k3 to pi(y) = beta ref(y) / (c - r(y)), c such that it sums to 1.
"""

import argparse
import dataclasses
import functools
import itertools
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt import partition
from jaxgpt.models import decoder
from jaxgpt.models.config import ModelConfig
from jaxgpt.objectives.ppo import PPOConfig, make_policy, make_value
from jaxgpt.partition import DEFAULT_RULES, MeshConfig
from jaxgpt.rl import advantages
from jaxgpt.rl.rollout import Prompts, Rollout, RolloutConfig
from jaxgpt.rl.step import GroupConfig, RLState, Setup, Steps, make_rl_step
from jaxgpt.train.optimizer import OptimizerConfig, make_optimizer
from jaxgpt.train.step import init_state, make_train_step

VOCAB, EOS = 6, 2
PROMPTS = np.array([[1, 3, 3], [1, 3, 4], [1, 4, 3], [1, 4, 4]], np.int32)
GROUP = 8
RUNS = {name: (name, "reward", "k1", 3) for name in ("ppo", "rloo", "grpo")} | {
    f"grpo_{estimator}": ("grpo", "loss", estimator, 1) for estimator in ("k2", "k3")
}  # name -> algorithm, where the KL is, its estimator, tokens of a response
MODEL = ModelConfig(
    vocab_size=VOCAB, num_layers=2, embed_dim=32, num_heads=2, mlp_dim=64, max_seq_length=8, init="fan_in",
    tie_embeddings=False,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Task:
    """All responses of at most `length` tokens, and a random reward for each of them after each prompt.

    tokens_YR, mask_YR: the responses. rewards_XY: f64.
    """

    length: int
    seed: int

    @functools.cached_property
    def responses(self) -> tuple[np.ndarray, np.ndarray]:
        """(tokens_YR, mask_YR), padded with 0."""
        found = []
        for length in range(1, self.length + 1):
            for tokens in itertools.product(range(VOCAB), repeat=length):
                if EOS not in tokens[:-1] and (length == self.length or tokens[-1] == EOS):
                    found.append(tokens)
        tokens_YR = np.zeros((len(found), self.length), np.int32)
        mask_YR = np.zeros((len(found), self.length), np.int32)
        for row, tokens in enumerate(found):
            tokens_YR[row, : len(tokens)] = tokens
            mask_YR[row, : len(tokens)] = 1
        return tokens_YR, mask_YR

    @functools.cached_property
    def table(self) -> np.ndarray:
        """Rewards by prompt and tokens; VOCAB stands for a token after the end. f32 [X, VOCAB + 1, ...]."""
        shape = (len(PROMPTS), *[VOCAB + 1] * self.length)
        return np.random.default_rng(self.seed).normal(scale=0.7, size=shape).astype(np.float32)

    def rewards(self, prompt_B, tokens_BR, mask_BR):
        """The reward of each response, f32 [B]; jittable."""
        keys = jnp.where(mask_BR != 0, tokens_BR, VOCAB)
        return jnp.asarray(self.table)[(prompt_B, *jnp.moveaxis(keys, 1, 0))]

    @functools.cached_property
    def rewards_XY(self) -> np.ndarray:
        """The rewards of all responses, f64 [X, Y]."""
        tokens_YR, mask_YR = self.responses
        return np.array(
            [self.rewards(jnp.full(len(tokens_YR), x), tokens_YR, mask_YR) for x in range(len(PROMPTS))], float
        )

    def log_probs(self, params) -> np.ndarray:
        """Log pi(y|x) of all responses, f64 [X, Y]."""
        tokens_YR, mask_YR = self.responses
        count, prompt = len(tokens_YR), PROMPTS.shape[1]
        tokens = np.concatenate([np.repeat(PROMPTS, count, 0), np.tile(tokens_YR, (len(PROMPTS), 1))], axis=1)
        mask = np.tile(mask_YR, (len(PROMPTS), 1))
        segments = np.concatenate([np.ones((len(tokens), prompt), np.int32), mask], axis=1)
        logits = np.asarray(_forward(params, tokens, segments), np.float64)[:, prompt - 1 : -1]
        logp = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
        chosen = np.take_along_axis(logp, tokens[:, prompt:, None], axis=-1)[..., 0]
        return np.sum(chosen * mask, axis=1).reshape(len(PROMPTS), count)

    def optimum(self, reference_XY: np.ndarray, beta: float, estimator: str) -> np.ndarray:
        """Log pi* [X, Y]."""
        if estimator != "k3":
            star = reference_XY + self.rewards_XY / beta
            return star - np.logaddexp.reduce(star, axis=1, keepdims=True)
        low = self.rewards_XY.max(axis=1, keepdims=True)
        weight = beta * np.exp(reference_XY)
        low, high = low + 0 * low, low + beta  # at c = max r + beta the sum is at most 1
        for _ in range(200):
            middle = (low + high) / 2
            above = np.sum(weight / (middle - self.rewards_XY), axis=1, keepdims=True) > 1
            low, high = np.where(above, middle, low), np.where(above, high, middle)
        return np.log(weight / (high - self.rewards_XY))


_forward = jax.jit(functools.partial(decoder.forward, MODEL))


def divergence(log_p: np.ndarray, log_q: np.ndarray) -> float:
    """KL(p || q), mean over prompts, nats."""
    return float(np.mean(np.sum(np.exp(log_p) * (log_p - log_q), axis=1)))


class Problem(NamedTuple):
    """A task with the iteration that is to solve it, and the log-probs of its reference and its optimum [X, Y]."""

    task: Task
    step: Callable
    state: RLState
    frozen: dict
    prompts: Prompts
    reference: np.ndarray
    optimum: np.ndarray


def solve(algorithm: str, beta: float, seed: int, *, steps: int = 1000, **options) -> tuple[float, float]:
    """Train; returns KL(pi || pi*) before and after. The arguments are those of `make_problem`."""
    problem = make_problem(algorithm, beta, seed, steps=steps, **options)
    state = problem.state
    for _ in range(steps):
        state, _ = problem.step(state, problem.frozen, problem.prompts)
    log_probs = problem.task.log_probs(state.policy.params)
    return divergence(problem.reference, problem.optimum), divergence(log_probs, problem.optimum)


def make_problem(
    algorithm: str, beta: float, seed: int, *, steps: int, kl_in: str = "reward", estimator: str = "k1", length: int = 3,
    rows: int = 1024, learning_rate: float = 1e-3,
) -> Problem:  # fmt: skip
    """A random task and its RL iteration. algorithm: ppo, rloo or grpo (without std scaling).

    learning_rate: its first value, which falls to 0. At 3e-3 a policy may leave a rare response behind before it has
    sampled it often enough to know that it is good, and the way back is long.
    """
    task = Task(length, seed)
    mesh = partition.make_mesh(MeshConfig(), devices=jax.devices()[:1])
    ppo = PPOConfig(kl_coef=beta, kl_in=kl_in, kl_estimator=estimator, num_epochs=2, num_minibatches=2)  # type: ignore[arg-type]
    optimizer = make_optimizer(
        OptimizerConfig(
            learning_rate=learning_rate, warmup_steps=0, weight_decay=0.0, schedule="linear", final_lr_fraction=0.0
        ),
        4 * steps,
    )
    key, critic_key, rng = jax.random.split(jax.random.key(seed), 3)

    def fresh(model: ModelConfig, key):
        return init_state(functools.partial(decoder.init_params, model), optimizer, key, mesh, DEFAULT_RULES)

    train_step = functools.partial(make_train_step, optimizer=optimizer, mesh=mesh, rules=DEFAULT_RULES)
    policy, _, policy_shardings = fresh(MODEL, key)
    critic = critic_shardings = critic_step = critic_model = None
    if algorithm == "ppo":
        critic_model = dataclasses.replace(MODEL, head="scalar")
        critic, _, critic_shardings = fresh(critic_model, critic_key)
        critic_step = train_step(make_value(critic_model, ppo), shardings=critic_shardings)
    baseline = {"ppo": "mean", "grpo": "mean", "rloo": "leave_one_out"}[algorithm]
    setup = Setup(
        policy=MODEL, reference=MODEL, critic=critic_model, ppo=ppo, eos_ids=(EOS,), pad_id=0,
        rollout=RolloutConfig(
            batch_size=rows, max_prompt_length=PROMPTS.shape[1], max_new_tokens=length, num_samples_per_prompt=GROUP
        ),
        group=GroupConfig(scale="none", baseline=baseline),  # type: ignore[arg-type]
    )  # fmt: skip

    def score(frozen, rollout: Rollout):
        prompt_B = 2 * (rollout.tokens_BS[:, 1] - 3) + rollout.tokens_BS[:, 2] - 3
        return task.rewards(prompt_B, rollout.tokens_BS[:, PROMPTS.shape[1] :], rollout.response_mask_BR)

    whole = partition.replicated(mesh)
    shardings = RLState(
        step=whole, policy=policy_shardings, critic=critic_shardings, kl_coef=whole,
        moments=jax.tree.map(lambda _: whole, advantages.init_moments()), rng=whole,
    )  # fmt: skip
    steps_of = Steps(train_step(make_policy(MODEL, ppo, 1.0), shardings=policy_shardings), critic_step)
    step = make_rl_step(setup, steps_of, score, mesh, DEFAULT_RULES, shardings=shardings)
    frozen = {"reference": jax.tree.map(jnp.copy, policy.params)}
    state = RLState(jnp.zeros((), jnp.int32), policy, critic, jnp.float32(beta), advantages.init_moments(), rng)
    state = jax.device_put(state, shardings)
    index = np.repeat(np.arange(rows // GROUP) % len(PROMPTS), GROUP).astype(np.int32)
    prompts = Prompts(jnp.asarray(PROMPTS[index]), jnp.ones((rows, PROMPTS.shape[1])), jnp.asarray(index))
    reference = task.log_probs(frozen["reference"])
    optimum = task.optimum(reference, beta, estimator if kl_in == "loss" else "k1")
    return Problem(task, step, state, frozen, prompts, reference, optimum)


def main(flags: argparse.Namespace) -> None:
    """Print one row per run."""
    print("algorithm  KL in   estimator  tokens  beta  seed  KL before  KL after  seconds")
    for name, beta, seed in itertools.product(flags.algorithms, flags.kl_coefs, flags.seeds):
        algorithm, kl_in, estimator, length = RUNS[name]
        started = time.perf_counter()
        before, after = solve(algorithm, beta, seed, kl_in=kl_in, estimator=estimator, length=length, steps=flags.steps)
        print(f"{algorithm:<10} {kl_in:<7} {estimator:<10} {length:>6} {beta:>5} {seed:>5} {before:>10.3f} {after:>9.4f} "
              f"{time.perf_counter() - started:>8.0f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    several = lambda kind: lambda text: [kind(part) for part in text.split(",")]
    parser.add_argument("--algorithms", type=several(str), default=list(RUNS), help=f"of {', '.join(RUNS)}")
    parser.add_argument("--kl_coefs", type=several(float), default=[0.4, 0.5, 0.7])
    parser.add_argument("--seeds", type=several(int), default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1000, help="iterations of 1024 responses")
    arguments = parser.parse_args()
    if unknown := set(arguments.algorithms) - set(RUNS):
        parser.error(f"--algorithms: {', '.join(sorted(unknown))} is none of {', '.join(RUNS)}")
    main(arguments)
