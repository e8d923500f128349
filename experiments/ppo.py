"""Reinforcement learning from a reward: PPO with a critic, or group advantages (GRPO, RLOO, REINFORCE) without one.

    python -m experiments.ppo --config=configs/ppo.py --workdir=runs/ppo --config.init_from=runs/sft \
        --config.reward_model=runs/reward --config.data.train=prompts.jsonl

Records are {"prompt", ...}; their other fields reach reward functions. experiments.grpo is the same command with other
defaults. See configs/ppo.py and configs/grpo.py for presets, jaxgpt/rl/config.py for all fields.
"""

import dataclasses
import functools
import hashlib
import os

import jax
from jax.sharding import Mesh

from experiments.shared import cli
from experiments.shared.training import Job, train_in
from jaxgpt.data.prompts import PromptSet, read_prompts
from jaxgpt.data.sources import resolve_paths
from jaxgpt.rewards.functions import check_records, function_digests
from jaxgpt.rl.config import RLConfig
from jaxgpt.rl.models import Builder, RewardModel, read_gold_model, read_reward_model
from jaxgpt.rl.program import make_program
from jaxgpt.runs.workdir import JsonLog
from jaxgpt.train.finetune import Start, start_from


@dataclasses.dataclass(frozen=True)
class PromptData:
    """The prompts of a run as `training.DataSummary`."""

    stats: dict[str, dict[str, int]]
    fingerprint: str
    fingerprints: dict[str, str]
    train_rows: int


def main(config: RLConfig, workdir: str, name: str = "ppo") -> None:
    """Train the run in `workdir`, or go on with it."""
    start = start_from(config)
    check_room(config, start)
    reward, gold = read_reward_model(config, start), read_gold_model(config, start)
    train_in(workdir, name, config, start.model, functools.partial(prepare, config, workdir, start, reward, gold))


def check_room(config: RLConfig, start: Start) -> None:
    """ValueError where prompt and response do not fit the model."""
    rollout, longest = config.rollout, start.model.max_seq_length
    if rollout.max_prompt_length + rollout.max_new_tokens > longest:
        raise ValueError(
            f"rollout.max_prompt_length={rollout.max_prompt_length} and rollout.max_new_tokens={rollout.max_new_tokens} "
            f"together are more than model.max_seq_length={longest}."
        )


def prepare(
    config: RLConfig, workdir: str, start: Start, reward: RewardModel | None, gold: RewardModel | None, mesh: Mesh,
    cache_dir: str,
) -> Job:  # fmt: skip
    """The prompts and the program over them."""
    del cache_dir
    train, held_out = read_sides(config, start)
    check_records(config.rewards, train.records, train.where)
    if held_out is not None:
        check_records({**config.rewards, **config.gold}, held_out.records, held_out.where)
    rows = len(train) * config.rollout.num_samples_per_prompt
    config = dataclasses.replace(config, num_train_steps=config.num_steps(rows))
    is_main = jax.process_index() == 0
    log = JsonLog(os.path.join(workdir, "samples.jsonl")) if is_main else None
    parts = Builder(config, start, reward, mesh, gold)
    if is_main:
        print(parts.memory())
    program = make_program(
        parts, train, held_out,
        log_samples=lambda step, samples: log.append(step, *samples) if log is not None else None,
        on_start=log.truncate_after if log is not None else lambda step: None,
    )  # fmt: skip
    sides = {"train/prompts": train} | ({"eval/prompts": held_out} if held_out is not None else {})
    data = PromptData(
        stats={label: {"rows": len(prompts), **prompts.notes} for label, prompts in sides.items()},
        fingerprint=train.fingerprint,
        fingerprints=fingerprints(config, train, held_out),
        train_rows=rows,
    )
    functions = function_digests(config.rewards, "rewards") | function_digests(config.gold, "gold")
    return Job(program, data, start.tokenizer, start.template, parts.parents, sources=functions)


def fingerprints(config: RLConfig, train: PromptSet, held_out: PromptSet | None) -> dict[str, str]:
    """The content of the prompts by the field that names their files."""
    if held_out is None:
        return {"data.train": train.fingerprint}
    if config.data.eval:
        return {"data.train": train.fingerprint, "data.eval": held_out.fingerprint}
    both = train.fingerprint + held_out.fingerprint
    return {"data.train": hashlib.sha256(both.encode()).hexdigest()}


def read_sides(config: RLConfig, start: Start) -> tuple[PromptSet, PromptSet | None]:
    """(prompts to train on, held-out prompts or None), from data.eval or split off by data.holdout."""
    for field in ("train", "eval"):
        if isinstance(getattr(config.data, field), dict):
            raise ValueError(f"data.{field}: the prompts of RL are one path, glob or list of them, not a mixture.")
    read = functools.partial(
        read_prompts, tokenizer=start.tokenizer, template=start.template, config=config.data,
        max_prompt_length=config.rollout.max_prompt_length,
    )  # fmt: skip
    train: tuple = config.data.train  # type: ignore[assignment]
    if config.data.eval:
        held_out: tuple = config.data.eval  # type: ignore[assignment]
        return read(resolve_paths(train, "data.train")), read(resolve_paths(held_out, "data.eval"))
    files = resolve_paths(train, "data.train")
    if not config.data.holdout.fraction or not config.num_eval_prompts:
        return read(files), None
    return read(files, split="train"), read(files, split="held_out")


if __name__ == "__main__":
    cli.run(main, RLConfig, default_config="configs/ppo.py")
