"""Reward models: from people's rankings of responses to one number per response, with a report card.

    python -m experiments.reward --config=configs/reward.py --workdir=runs/reward --config.init_from=runs/sft \
        --config.data.train=preferences.jsonl
    python -m experiments.reward --workdir=runs/reward --config.score=responses.jsonl

Records are {"prompt", "chosen", "rejected"}, {"prompt", "responses": [best, ..., worst]} or Anthropic HH's pairs of
transcripts. See configs/reward.py for presets.
"""

import dataclasses
import functools
import json
import os

import jax
import numpy as np
from jax.sharding import Mesh

from experiments import cli
from experiments.training import Job, train_in
from jaxgpt import partition
from jaxgpt.data import chat, conversations, pipeline, preference, sources
from jaxgpt.objectives.reward import RewardConfig, make_reward
from jaxgpt.reporting.report_card import PairScores, Thresholds, report_card
from jaxgpt.train import scoring
from jaxgpt.train.finetune import FinetuneConfig, Start, start_from
from jaxgpt.train.load import load_model
from jaxgpt.train.run import Stage
from jaxgpt.train.throughput import training_flops_per_token
from jaxgpt.train.workdir import read_manifest, write_atomic
from jaxgpt.types import PairBatch, Params


@dataclasses.dataclass(frozen=True)
class Config(FinetuneConfig):
    """One reward model. batch_size counts prompts.

    too_long: prompts with a response beyond data.sequence_length are dropped, or their conversations cut. report_card:
      what the model must reach on held-out pairs to be trusted by later stages. score: a file of prompts and responses to
      score with the finished model in --workdir; output: where to (empty: scores.jsonl in the workdir).
    """

    reward: RewardConfig = RewardConfig()
    report_card: Thresholds = Thresholds()
    too_long: conversations.TooLong = "truncate_left"
    score: str = ""
    output: str = ""


def main(config: Config, workdir: str) -> None:
    """Train the run in `workdir`, or go on with it; or score a file with it."""
    if config.score:
        score_file(config, workdir)
        return
    start = start_from(config, head="scalar")
    train_in(workdir, "reward", config, start.model, functools.partial(prepare, config, workdir, start))


def prepare(config: Config, workdir: str, start: Start, mesh: Mesh, cache_dir: str) -> Job:
    """The ranking objective over prompts with their responses."""
    data = preference.build_preferences(config.data, start.tokenizer, start.template, config.too_long, cache_dir)
    rows, length = partition.local_rows(mesh, config.batch_size), config.data.sequence_length
    candidates = next(iter(data.train.values()))[0].num_candidates
    stage = Stage(
        init_fn=start.init_fn(),
        objective=make_reward(start.model, config.reward),
        **pipeline.batch_streams(config.data, data, config.batch_size, rows, config.seed, PairBatch),
        tokens_per_step=config.batch_size * candidates * length,
        flops_per_token=training_flops_per_token(start.model, length),
        trainable=start.trainable(),
        load=functools.partial(start.load, mesh=mesh),
        sources=start.sources,
        metric_group="reward",
    )
    finish = functools.partial(judge, config, workdir, start, data)
    return Job(stage, data, start.tokenizer, start.template, start.parents, finish=finish)


def judge(config: Config, workdir: str, start: Start, data: pipeline.Data, params: Params, mesh: Mesh) -> dict:
    """The shift that brings the best responses' mean reward to 0, and the report card on the held-out pairs."""
    score = scoring.make_scorer(start.model, params, mesh)
    plans = data.eval or {name: plan for name, (plan, _) in data.train.items()}
    best = [
        scoring.best_response_rewards(score, plan, config.batch_size, config.data.eval_batches)
        for plan in plans.values()
    ]
    result = {"reward_shift": float(np.mean(np.concatenate(best)))}
    if not data.eval:
        return result
    scored = {name: scoring.score_pairs(score, plan, config.batch_size) for name, plan in data.eval.items()}
    gaps = [scoring.symmetry_gaps(score, plan, config.batch_size) for plan in data.eval.values()]
    offsets = np.cumsum([0, *(part.prompts_N.max() + 1 for part in scored.values())])
    fields = {
        name: np.concatenate([getattr(part, name) for part in scored.values()]) for name in scoring.ScoredPairs._fields
    }
    fields["prompts_N"] = np.concatenate(
        [part.prompts_N + o for part, o in zip(scored.values(), offsets, strict=False)]
    )
    names = np.concatenate([np.full(len(part.chosen_N), name) for name, part in scored.items()])
    swap_gap, pad_gap = np.max(gaps, axis=0)
    card = report_card(PairScores(**fields, sources_N=names), config.report_card, swap_gap=swap_gap, pad_gap=pad_gap)
    if jax.process_index() == 0:
        write_atomic(os.path.join(workdir, "report_card.json"), json.dumps(card, indent=2) + "\n")
        rate = card["accuracy"]
        print(
            f"Held-out accuracy {rate['accuracy']:.3f} [{rate['low']:.3f}, {rate['high']:.3f}] on {rate['pairs']} pairs."
        )
        print("Report card passed." if card["passed"] else "Report card failed: " + " ".join(card["failures"]))
    summary = ("accuracy", "calibration", "length", "swap_gap", "pad_gap", "thresholds", "passed", "failures")
    return result | {"report_card": {name: card[name] for name in summary}}


def score_file(config: Config, workdir: str) -> None:
    """Write the reward of each prompt and response of a file, shifted as the manifest says."""
    manifest = read_manifest(workdir)
    if manifest is None or manifest["stage"] != "reward":
        raise ValueError(f"--workdir={workdir} is not a finished reward model, which score needs.")
    mesh = partition.make_mesh(config.mesh)
    model = load_model(workdir, mesh)
    sequences, records = [], []
    for path in sources.resolve_paths(config.score, "score"):
        for record in sources.read_records(path):
            messages = chat.conversation(record, config.data.fields)
            ids = model.template.encode(model.tokenizer, messages, loss_on="completion").ids
            if len(ids) > model.config.max_seq_length:
                raise ValueError(
                    f"{path}, line {record.line}: {len(ids)} tokens are more than model.max_seq_length="
                    f"{model.config.max_seq_length}."
                )
            sequences.append(ids)
            records.append(record.fields)
    scorer = scoring.make_scorer(model.config, model.params, mesh)
    rewards = (
        scoring.score_sequences(scorer, sequences, config.batch_size, model.tokenizer.pad_id) - manifest["reward_shift"]
    )
    output = config.output or os.path.join(workdir, "scores.jsonl")
    if jax.process_index() == 0:
        lines = (
            json.dumps(r | {"reward": float(x)}, ensure_ascii=False) for r, x in zip(records, rewards, strict=True)
        )
        write_atomic(output, "".join(line + "\n" for line in lines))
        print(f"{len(rewards)} rewards, mean {rewards.mean():.4f}, in {output}.")


if __name__ == "__main__":
    cli.run(main, Config, default_config="configs/reward.py")
