"""Best of n: several responses to each prompt, of which the one with the highest reward is kept (rejection sampling).

Without any training it is a policy of its own, at a KL of at most log n - (n - 1) / n nats from the one sampled from; what it
keeps is data for supervised fine-tuning (Nakano et al. 2021, arXiv:2112.09332; Dong et al. 2023, arXiv:2304.06767).
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxgpt import partition
from jaxgpt.data.chat import located
from jaxgpt.data.prompts import PromptSet
from jaxgpt.partition import DEFAULT_RULES
from jaxgpt.rewards.functions import combine
from jaxgpt.rl.advantages import apply_missing_eos
from jaxgpt.rl.config import RLConfig
from jaxgpt.rl.evaluate import global_prompts, host_rewards, response_texts
from jaxgpt.rl.models import RewardModel, reward_scores
from jaxgpt.rl.rollout import roll_out
from jaxgpt.runs.load import load_plain
from jaxgpt.train.finetune import Start


@dataclasses.dataclass(frozen=True)
class BestOfNConfig(RLConfig):
    """An RL config of which the rollouts and the rewards count.

    ppo.missing_eos_penalty takes the place of the score of a response that rollout.max_new_tokens cut off, as in training.

    keep_unfinished: let a response that was cut off be the best one, too. Fine-tuning on it teaches to end in the middle of
      a sentence, which is why it never is otherwise, and a prompt none of whose responses has ended is left out.
    """

    keep_unfinished: bool = False


def best_of_n(
    config: BestOfNConfig, start: Start, reward: RewardModel | None, prompts: PromptSet, mesh: Mesh, first: int = 0
) -> Iterator[list[dict[str, Any]]]:
    """The prompts in their order, a batch of rollout.batch_size responses at a time, from batch `first` on.

    Yields one record for each prompt with a response to keep: {"prompt", "response"} with the best response, or
    {"messages"} where the prompt is messages; "score" of the best, "scores" of all rollout.num_samples_per_prompt; "gold"
    and "golds" where the config has gold rewards; "finished", whether it ended by itself, and "finished_each", whether each
    did. The draws depend on config.seed and the batch alone.
    """
    size = config.rollout.num_samples_per_prompt
    model, params = load_plain(start.parent, mesh)
    frozen = {"reward": load_plain(reward.run, mesh)[1]} if reward is not None else {}
    host = combine(config.rewards) if config.rewards else None
    gold = combine(config.gold) if config.gold else None

    @functools.partial(jax.jit, out_shardings=partition.replicated(mesh))
    def answer(params, frozen, batch, rng):
        with partition.activate(mesh, DEFAULT_RULES):
            rollout = roll_out(
                model, params, batch, rng, max_new=config.rollout.max_new_tokens, sampler=config.rollout.sampler,
                eos_ids=start.template.stop_ids(start.tokenizer), pad_id=start.tokenizer.pad_id,
            )  # fmt: skip
            return rollout, reward_scores(reward, frozen, rollout)

    per_batch = config.rollout.batch_size // size
    for begin in range(first * per_batch, len(prompts), per_batch):
        chosen = np.arange(begin, min(begin + per_batch, len(prompts)))
        index_B = np.repeat(np.resize(chosen, per_batch), size)  # a last batch that is not full repeats prompts
        rng = jax.random.fold_in(jax.random.key(config.seed), begin)
        rollout, scores_B = answer(params, frozen, global_prompts(prompts, index_B, mesh), rng)
        scores_B = np.asarray(scores_B)
        if host is not None:
            scores_B = scores_B + host_rewards(host, start.tokenizer, prompts, index_B, rollout).total_B
        scores_B = np.asarray(apply_missing_eos(scores_B, rollout.has_eos_B, config.ppo.missing_eos_penalty))
        finished = np.asarray(rollout.has_eos_B).reshape(per_batch, size)
        values = {"score": scores_B.reshape(per_batch, size)}
        if gold is not None:
            golds_B = host_rewards(gold, start.tokenizer, prompts, index_B, rollout).total_B
            values["gold"] = golds_B.reshape(per_batch, size)
        texts = response_texts(start.tokenizer, rollout)
        kept = []
        for row, i in enumerate(chosen):
            with located(prompts.where[i]):
                best = choose(values["score"][row], finished[row], keep_unfinished=config.keep_unfinished)
            if best is not None:
                kept.append(_record(
                    prompts.records[i], prompts.texts[i], texts[row * size :][:size],
                    {name: values_BN[row] for name, values_BN in values.items()}, finished[row], best,
                ))  # fmt: skip
        yield kept


def choose(scores_N: np.ndarray, finished_N: np.ndarray, *, keep_unfinished: bool) -> int | None:
    """Which response to keep: the first of the highest score among those that have ended; None where none has.

    keep_unfinished: among all of them. Raises ValueError for a score that is not finite, of which nothing can be said.
    """
    for score in np.asarray(scores_N)[~np.isfinite(scores_N)][:1]:
        raise ValueError(f"a response has the score {score}, so that it cannot be said which one is the best.")
    if keep_unfinished:
        return int(np.argmax(scores_N))
    return int(np.argmax(np.where(finished_N, scores_N, -np.inf))) if finished_N.any() else None


def _record(
    record: dict,
    prompt: str,
    responses: Sequence[str],
    values: dict[str, np.ndarray],
    finished_N: np.ndarray,
    best: int,
) -> dict[str, Any]:
    messages = record.get("prompt")
    if isinstance(messages, list):
        row: dict[str, Any] = {"messages": [*messages, {"role": "assistant", "content": responses[best]}]}
    else:
        row = {"prompt": prompt, "response": responses[best]}
    for name, values_N in values.items():
        row |= {name: round(float(values_N[best]), 6), f"{name}s": [round(float(value), 6) for value in values_N]}
    return row | {"finished": bool(finished_N[best]), "finished_each": finished_N.tolist()}


def expected_best(values: Sequence[float], scores: Sequence[float] | np.ndarray, k: int) -> float:
    """The mean, over all choices of k of the responses, of the value of the one among them with the highest score.

    Source: Nakano et al. 2021 (arXiv:2112.09332), appendix I: the unbiased estimate for best of k from n >= k samples.
    """
    ordered = np.asarray(values, float)[np.argsort(scores, kind="stable")]
    count = len(ordered)
    weights = [math.comb(i, k - 1) / math.comb(count, k) for i in range(count)]
    return float(np.dot(weights, ordered))


def curve(rows: Sequence[dict[str, Any]], *, keep_unfinished: bool) -> list[dict[str, float]]:
    """For k = 1, 2, 4, ... n: {"k", "kl" (its bound, nats), "score", "gold" where there is one}, means over the records.

    They are of the prompts that were kept: one whose responses were all cut off has no record, and counts for no k. Of k
    responses the best is as of `choose`; where all of them were cut off, one of those counts.
    """
    size = len(rows[0]["scores"])
    # Places in the order of choice, in which what must not be kept comes before all others.
    wanted = [np.ones(size, bool) if keep_unfinished else row["finished_each"] for row in rows]
    places = [np.argsort(np.lexsort((row["scores"], is_kept))) for row, is_kept in zip(rows, wanted, strict=True)]
    ks = [2**i for i in range(size.bit_length()) if 2**i < size] + [size]
    return [
        {"k": k, "kl": math.log(k) - (k - 1) / k}
        | {
            name: float(
                np.mean([expected_best(row[f"{name}s"], place, k) for row, place in zip(rows, places, strict=True)])
            )
            for name in ("score", "gold")
            if f"{name}s" in rows[0]
        }
        for k in ks
    ]
