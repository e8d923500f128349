"""What a policy answers: held-out prompts at evaluations, and what functions on the host say of responses."""

import itertools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxgpt import partition
from jaxgpt.data.prompts import PromptSet
from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.partition import DEFAULT_RULES
from jaxgpt.rewards.functions import CheckedRewardFn, combine
from jaxgpt.rl.config import RLConfig
from jaxgpt.rl.models import Builder, reward_scores
from jaxgpt.rl.rollout import Prompts, Rollout
from jaxgpt.rl.step import RLState, collect, policy_params, reference_params, rollout_logprobs
from jaxgpt.types import Array, Params

SampleLog = Callable[[int, list[dict[str, Any]]], None]


def global_prompts(prompts: PromptSet, index_B: np.ndarray, mesh: Mesh) -> Prompts:
    """The prompts at these indices as one global batch; every process gives all indices."""
    local = partition.local_rows(mesh, len(index_B))
    arrays: Any = (*prompts.batch(index_B[local]), index_B[local].astype(np.int32))
    return partition.to_global(Prompts(*arrays), mesh, len(index_B))


def host_rewards(
    host: CheckedRewardFn, tokenizer: Tokenizer, prompts: PromptSet, index_B: np.ndarray, rollout: Rollout
):
    """What functions on the host say of each response of a rollout."""
    texts = response_texts(tokenizer, rollout)
    pick = lambda values: [values[i] for i in index_B]
    return host(pick(prompts.texts), texts, pick(prompts.records), pick(prompts.where))


def response_texts(tokenizer: Tokenizer, rollout: Rollout) -> list[str]:
    """The text of each response, without what ended it."""
    tokens_BR, mask_BR, has_eos_B = jax.device_get(
        (rollout.tokens_BS[:, -rollout.response_mask_BR.shape[1] :], rollout.response_mask_BR, rollout.has_eos_B)
    )
    lengths_B = mask_BR.sum(axis=1).astype(int) - has_eos_B
    texts = []
    for tokens, length in zip(tokens_BR, lengths_B, strict=True):
        ids = tokens[:length]
        texts.append(tokenizer.decode(ids[ids < tokenizer.vocab_size]))
    return texts


def make_evaluate(
    parts: Builder, prompts: PromptSet | None, log_samples: SampleLog
) -> Callable[[RLState, Params, int], dict[str, float]]:
    """Answers to held-out prompts, always drawn with the same keys: their scores, gold, KL, lengths, and how long it took.

    eval/scores_stderr and eval/gold_stderr are standard errors over prompts, whose answers are not independent.
    """
    if prompts is None:
        return lambda state, frozen, step: {}
    config, setup, mesh = parts.config, parts.setup, parts.mesh
    rows, whole = config.rollout.batch_size, partition.replicated(mesh)

    def answer(state: RLState, frozen: Params, batch: Prompts, rng: Array):
        with partition.activate(mesh, DEFAULT_RULES):
            rollout = collect(setup, state, frozen, batch, rng)
            return rollout, parts.score(frozen, rollout)

    def judge(state: RLState, frozen: Params, rollout: Rollout):
        with partition.activate(mesh, DEFAULT_RULES):
            policy_BR, _ = rollout_logprobs(setup, setup.policy, policy_params(state, frozen), rollout)
            reference_BR, _ = rollout_logprobs(setup, setup.reference, reference_params(frozen), rollout)
            kl_B = jnp.sum((policy_BR - reference_BR) * rollout.response_mask_BR, axis=1)
            return kl_B, reward_scores(parts.gold, frozen, rollout, "gold")

    answer, judge = (jax.jit(f, out_shardings=whole) for f in (answer, judge))
    host = combine(config.rewards) if config.rewards else None
    gold = combine(config.gold) if config.gold else None
    chosen = np.repeat(np.arange(min(config.num_eval_prompts, len(prompts))), config.num_eval_samples)
    calls = itertools.count()

    def evaluate(state: RLState, frozen: Params, step: int) -> dict[str, float]:
        columns: dict[str, list[np.ndarray]] = {}
        seconds: list[float] = []
        texts: list[str] = []
        for begin in range(0, len(chosen), rows):
            index_B = chosen[begin : begin + rows]
            filled = np.resize(index_B, rows)  # rows that are left over repeat prompts, and do not count
            batch = global_prompts(prompts, filled, mesh)
            rng = jax.random.fold_in(jax.random.key(config.seed), begin)
            started = time.perf_counter()
            rollout, scores_B = jax.block_until_ready(answer(state, frozen, batch, rng))
            if next(calls):  # the first one compiles
                seconds.append(time.perf_counter() - started)
            kl_B, gold_B = (np.asarray(values_B) for values_B in judge(state, frozen, rollout))
            found = {"scores": np.asarray(scores_B), "kl": kl_B}
            if host is not None:
                result = host_rewards(host, parts.start.tokenizer, prompts, filled, rollout)
                found["scores"] = found["scores"] + result.total_B
                found |= {f"rewards/{label}": value_B for label, value_B in result.by_source.items()}
            if gold is not None:
                gold_B = gold_B + host_rewards(gold, parts.start.tokenizer, prompts, filled, rollout).total_B
            if gold is not None or parts.gold is not None:
                found["gold"] = gold_B
            found["mean_length"] = np.asarray(rollout.response_mask_BR).sum(axis=1)
            found["eos_fraction"] = np.asarray(rollout.has_eos_B)
            texts += response_texts(parts.start.tokenizer, rollout)[: len(index_B)]
            for name, values_B in found.items():
                columns.setdefault(name, []).append(values_B[: len(index_B)].astype(np.float64))
        means = {name: np.concatenate(values) for name, values in columns.items()}
        log_samples(step, _samples(config, prompts, chosen, texts, means))
        row = {f"eval/{name}": float(values.mean()) for name, values in means.items()}
        for name in [name for name in ("scores", "gold") if name in means]:
            by_prompt = means[name].reshape(-1, config.num_eval_samples).mean(axis=1)
            if len(by_prompt) > 1:
                row[f"eval/{name}_stderr"] = float(by_prompt.std(ddof=1) / np.sqrt(len(by_prompt)))
        row |= {"eval/loss": -row.get("eval/gold", row["eval/scores"])}
        return row | ({"time/rollout_seconds": float(np.mean(seconds))} if seconds else {})

    return evaluate


def _samples(
    config: RLConfig, prompts: PromptSet, chosen, texts: list[str], values: dict[str, np.ndarray]
) -> list[dict]:
    rows = range(0, len(chosen), config.num_eval_samples)[: config.samples.num_heldout]
    return [
        {"prompt": prompts.texts[chosen[row]], "response": texts[row]}
        | {name: round(float(values[name][row]), 4) for name in ("scores", "gold", "kl") if name in values}
        for row in rows
    ]
