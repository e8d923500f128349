"""Reward models: from people's rankings of responses to one number per response, with a report card.

    python -m experiments.reward --config=configs/reward.py --workdir=runs/reward --config.init_from=runs/sft \
        --config.data.train=preferences.jsonl
    python -m experiments.reward --workdir=runs/reward --config.score=responses.jsonl

Records are {"prompt", "chosen", "rejected"}, {"prompt", "responses": [best, ..., worst]} or Anthropic HH's pairs of
transcripts. See configs/reward.py for presets.
"""

import dataclasses
import functools
import os

import jax
import numpy as np
from jax.sharding import Mesh

from experiments.shared import cli
from experiments.shared.score import score_file
from experiments.shared.training import Job, train_in
from jaxgpt import partition
from jaxgpt.data import batches, conversations, preference
from jaxgpt.data.sources import check_fields
from jaxgpt.evaluation import scoring
from jaxgpt.evaluation.report_card import Thresholds, card_metrics, card_summary, pair_scores, report_card
from jaxgpt.json_object import read_object, to_json
from jaxgpt.objectives.reward import RewardConfig, make_reward
from jaxgpt.runs.workdir import write_atomic
from jaxgpt.train.config import check_lengths
from jaxgpt.train.finetune import FinetuneConfig, Start, start_from
from jaxgpt.train.run import Stage
from jaxgpt.train.throughput import training_flops_per_token
from jaxgpt.types import PairBatch, Params


@dataclasses.dataclass(frozen=True)
class Config(FinetuneConfig):
    """One reward model. batch_size counts prompts.

    too_long: prompts with a response beyond data.sequence_length are dropped, or their conversations cut. report_card:
      what the model must reach on held-out pairs to be trusted by later stages. score: a file of prompts and responses to
      score with the finished model in --workdir, of which one with "finished": false has no end (a limit cut it off); output:
      where to (empty: scores.jsonl in the workdir).
    """

    reward: RewardConfig = RewardConfig()
    report_card: Thresholds = Thresholds()
    too_long: conversations.TooLong = "truncate_left"
    score: str = ""
    output: str = ""

    def __post_init__(self):
        super().__post_init__()
        check_fields(self.data.fields, preference.FIELDS)

    def check_complete(self) -> None:
        """As of every run; what scores a file needs neither model nor data to start with."""
        if not self.score:
            super().check_complete()


def main(config: Config, workdir: str) -> None:
    """Train the run in `workdir`, or go on with it; or score a file with it."""
    if config.score:
        score_file(workdir, config.score, config.output, config)
        return
    start = start_from(config, head="scalar")
    check_lengths(config.data, start.model)
    train_in(workdir, "reward", config, start.model, functools.partial(prepare, config, workdir, start))


def prepare(config: Config, workdir: str, start: Start, mesh: Mesh, cache_dir: str) -> Job:
    """The ranking objective over prompts with their responses, and the report card after the last step."""
    data = preference.build_preferences(config.data, start.tokenizer, start.template, config.too_long, cache_dir)
    rows, length = partition.local_rows(mesh, config.batch_size), config.data.sequence_length
    last_step = config.num_steps(data.train_rows)
    card_file = os.path.join(workdir, "report_card.json")

    def on_eval(step: int, params: Params) -> dict[str, float]:
        if step < last_step:
            return {}
        card = judge(config, data, scoring.make_scorer(start.model, params, mesh))
        if jax.process_index() == 0:
            write_atomic(card_file, to_json(card, indent=2) + "\n")
        return {"eval/reward_shift": card["reward_shift"]} | (card_metrics(card) if "passed" in card else {})

    stage = Stage(
        init_fn=start.init_fn(),
        objective=make_reward(start.model, config.reward),
        **batches.batch_streams(config.data, data, config.batch_size, rows, config.seed, PairBatch),
        tokens_per_step=config.batch_size * preference.num_candidates(data) * length,
        flops_per_token=training_flops_per_token(start.model, length),
        trainable=start.trainable(),
        load=functools.partial(start.load, mesh=mesh),
        on_eval=on_eval,
        metric_group="reward",
    )
    return Job(stage, data, start.tokenizer, start.template, start.parents, finish=lambda: finish(card_file))


def judge(config: Config, data: batches.Data, score: scoring.Scorer) -> dict:
    """The report card on the held-out pairs, and the shift that brings the best responses' mean reward to 0."""
    size = config.batch_size
    plans = data.eval or {name: plan for name, (plan, _) in data.train.items()}
    best = [scoring.best_response_rewards(score, plan, size, config.data.eval_batches) for plan in plans.values()]
    shift = {"reward_shift": float(np.mean(np.concatenate(best)))}
    if not data.eval:
        return shift
    scored = {name: scoring.score_pairs(score, plan, size) for name, plan in data.eval.items()}
    swap_gap, pad_gap = np.max([scoring.symmetry_gaps(score, plan, size) for plan in data.eval.values()], axis=0)
    return shift | report_card(pair_scores(scored), config.report_card, swap_gap=swap_gap, pad_gap=pad_gap)


def finish(card_file: str) -> dict:
    """Print the verdict; returns what the manifest says of the card."""
    card = read_object(card_file)
    result = {"reward_shift": card["reward_shift"]}
    if "passed" not in card:
        return result
    rate = card["accuracy"]
    print(f"Held-out accuracy {rate['accuracy']:.3f} [{rate['low']:.3f}, {rate['high']:.3f}] on {rate['pairs']} pairs.")
    print("Report card passed." if card["passed"] else "Report card failed: " + " ".join(card["failures"]))
    return result | {"report_card": card_summary(card)}


if __name__ == "__main__":
    cli.run(main, Config, default_config="configs/reward.py")
