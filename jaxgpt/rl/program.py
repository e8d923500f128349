"""An RL run put together as a program of `train.run`: prompts in their order, one iteration, its preflight."""

import functools
import itertools
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxgpt import partition
from jaxgpt.data.prompts import PromptSet, prompt_indices
from jaxgpt.partition import DEFAULT_RULES
from jaxgpt.rewards.functions import combine
from jaxgpt.rl.config import RLConfig
from jaxgpt.rl.evaluate import SampleLog, global_prompts, host_rewards, make_evaluate
from jaxgpt.rl.models import Builder
from jaxgpt.rl.rollout import Prompts
from jaxgpt.rl.step import RLState, make_rl_halves, make_rl_step
from jaxgpt.train.run import Program
from jaxgpt.types import Metrics, Params


def make_program(
    parts: Builder,
    prompts: PromptSet,
    eval_prompts: PromptSet | None,
    log_samples: SampleLog,
    on_start: Callable[[int], None],
) -> Program:
    """The run as a program of `train.run`."""
    config = parts.config
    per_update = config.ppo.num_epochs * config.ppo.num_minibatches
    train_step, evaluate = timed(make_train(parts, prompts), make_evaluate(parts, eval_prompts, log_samples))
    return Program(
        abstract=parts.abstract,
        create=parts.create,
        reload=parts.reload,
        train_step=with_preflight(config, train_step),
        batches=functools.partial(prompt_batches, config, prompts, parts.mesh),
        evaluate=evaluate,
        schedule=lambda step: parts.schedule(step * per_update),
        tokens_per_step=config.rollout.batch_size * (config.rollout.max_prompt_length + config.rollout.max_new_tokens),
        flops_per_token=None,
        on_start=on_start,
    )


def prompt_batches(config: RLConfig, prompts: PromptSet, mesh: Mesh, start: int) -> Iterator[Prompts]:
    """The prompts of iteration `start` on, each repeated for its samples."""
    rows, samples = config.rollout.batch_size, config.rollout.num_samples_per_prompt
    for step in itertools.count(start):
        indices = prompt_indices(step, rows // samples, len(prompts), config.seed)
        yield global_prompts(prompts, np.repeat(indices, samples), mesh)


def make_train(parts: Builder, prompts: PromptSet) -> Callable[[RLState, Params, Prompts], tuple[RLState, Metrics]]:
    """One iteration: one jitted program, or with rewards from the host two halves around them."""
    kwargs = {"shardings": parts.shardings}
    if not parts.config.rewards:
        return make_rl_step(parts.setup, parts.steps(), parts.score, parts.mesh, DEFAULT_RULES, **kwargs)
    collect, learn = make_rl_halves(parts.setup, parts.steps(), parts.mesh, DEFAULT_RULES, **kwargs)
    score = jax.jit(parts.score, out_shardings=partition.replicated(parts.mesh))
    host = combine(parts.config.rewards)

    def train_step(state, frozen, batch):
        rollout = collect(state, frozen, batch)
        scores_B = np.asarray(score(frozen, rollout))
        found = host_rewards(host, parts.start.tokenizer, prompts, np.asarray(batch.index_B), rollout)
        state, metrics = learn(state, frozen, rollout, jnp.asarray(scores_B + found.total_B))
        by_source = {f"rewards/{label}": np.float32(value_B.mean()) for label, value_B in found.by_source.items()}
        return state, dict(metrics) | by_source

    return train_step


def timed(train_step: Callable, evaluate: Callable) -> tuple[Callable, Callable]:
    """Both, so that a row of evaluation with time/rollout_seconds has time/update_seconds, too.

    An iteration is one program, into which no clock of the host sees. Its update is what the mean iteration since the last
    evaluation took beyond one rollout with its scores; logging and checkpoints are in it, compilation is not.
    """
    window: list[float] = []  # when it began, and the iterations since

    def step(state, frozen, batch):
        out = train_step(state, frozen, batch)
        if window:
            window[1] += 1
        else:
            jax.block_until_ready(out)
            window[:] = time.perf_counter(), 0
        return out

    def timed_evaluate(state, frozen, at):
        jax.block_until_ready(state)
        iteration = (time.perf_counter() - window[0]) / window[1] if window and window[1] else None
        window.clear()
        row = evaluate(state, frozen, at)
        if iteration is not None and "time/rollout_seconds" in row:
            row["time/update_seconds"] = max(iteration - row["time/rollout_seconds"], 0.0)
        return row

    return step, timed_evaluate


def with_preflight(config: RLConfig, train_step: Callable) -> Callable:
    """The train step, whose first call checks what must hold at the first update; ValueError before that is saved."""
    if not config.preflight:
        return train_step
    checked: list[bool] = []

    def step(state, frozen, batch):
        is_first = not checked and int(state.step) == 0
        state, metrics = train_step(state, frozen, batch)
        if is_first:
            preflight(config, {name: float(value) for name, value in jax.device_get(dict(metrics)).items()})
        checked.append(True)
        return state, metrics

    return step


def preflight(config: RLConfig, metrics: dict[str, float]) -> None:
    """ValueError naming the first invariant of the first update that does not hold.

    Tolerances allow for bfloat16; a mask or position that is off by one is far beyond them.
    """
    exact = config.rollout.top_k == 0 and config.rollout.top_p == 1
    invariants = [
        ("the ratio of new to old policy is 1", abs(metrics["policy/first_ratio"] - 1), 0.02),
        ("policy and reference agree on every token", metrics["rollout/reference_gap"], 0.1),
        ("response masks have no holes", metrics["rollout/mask_holes"], 0.0),
    ]
    if exact:
        invariants.append(("sampler and trainer agree on every token's log-prob", metrics["rollout/logprob_gap"], 0.3))
    for text, gap, tolerance in invariants:
        if not gap <= tolerance:
            raise ValueError(
                f"Preflight: {text} does not hold at the first update (off by {gap:.4g}, at most {tolerance:g}); "
                "preflight=False skips this check."
            )
