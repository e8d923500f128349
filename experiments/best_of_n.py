"""Best of n: sample several responses to each prompt and keep the one with the highest reward, as data for SFT.

    python -m experiments.best_of_n --config=configs/grpo.py:best_of_n --workdir=runs/best --config.init_from=runs/sft \
        --config.reward_model=runs/reward --config.data.train=prompts.jsonl
    python -m experiments.sft --workdir=runs/sft2 --config.init_from=runs/sft --config.data.train=runs/best/best.jsonl

The config is that of experiments.grpo; n is rollout.num_samples_per_prompt. Responses that the length limit cut off are not
kept, unless --config.keep_unfinished=True; how many they are is printed, and how many prompts have no other. It prints what
best of k gives for smaller k, too, with gold rewards beside it: where gold falls while the score rises, the reward is
over-optimised. A run that was interrupted goes on. configs/grpo.py:best_of_n trains on the best response at every iteration,
with experiments.grpo.
"""

import json
import os

import jax
from jax.sharding import Mesh
from tqdm import tqdm

from experiments.ppo import check_room, read_sides
from experiments.shared import cli
from experiments.shared.training import FREE_FIELDS
from jaxgpt import partition
from jaxgpt.config import to_dict
from jaxgpt.rewards.functions import check_records, function_digests
from jaxgpt.rl.best_of_n import BestOfNConfig, best_of_n, curve
from jaxgpt.rl.models import RewardModel, read_reward_model
from jaxgpt.runs import manifest as manifests
from jaxgpt.runs import workdir as workdirs
from jaxgpt.train.config import check_mesh
from jaxgpt.train.finetune import Start, start_from


def main(config: BestOfNConfig, workdir: str) -> None:
    """Sample into `workdir`, or go on with it."""
    if config.advantage != "group":
        raise ValueError(
            "experiments.best_of_n needs advantage='group': start from --config=configs/grpo.py:best_of_n."
        )
    start = start_from(config)
    check_room(config, start)
    reward = read_reward_model(config, start)
    mesh = partition.make_mesh(config.mesh, config.dcn_mesh)
    check_mesh(config, start.model, mesh, is_trained=False)
    resolved = to_dict(config) | {"init_from": os.path.abspath(config.init_from)}
    with workdirs.lock(workdir):
        workdirs.check_same(workdir, resolved, ignore=FREE_FIELDS)
        if manifests.read_manifest(workdir):
            print(f"{workdir} is finished.")
            return
        sample(config, workdir, start, reward, mesh, resolved)


def sample(
    config: BestOfNConfig, workdir: str, start: Start, reward: RewardModel | None, mesh: Mesh, resolved: dict
) -> None:
    """Write config.json (`resolved`) and best.jsonl batch by batch, then what it shows."""
    prompts, _ = read_sides(config, start)
    check_records({**config.rewards, **config.gold}, prompts.records, prompts.where)
    workdirs.write_config(workdir, resolved)
    path = os.path.join(workdir, "best.jsonl")
    done = workdirs.read_rows(path)
    parents = start.parents | ({"reward_model": reward.parent} if reward is not None else {})
    functions = function_digests(config.rewards, "rewards") | function_digests(config.gold, "gold")
    sources = {name: parent["digest"] for name, parent in parents.items()} | {
        "data.tokenizer": start.tokenizer.digest, "chat_template": start.template.digest, **functions,
        "data.train": prompts.fingerprint,
    }  # fmt: skip
    sources_file = os.path.join(workdir, "sources.json")
    if done:
        workdirs.check_sources(workdir, workdirs.read_json(sources_file) or {}, sources)
    if jax.process_index() == 0:
        workdirs.write_atomic(sources_file, json.dumps(sources, indent=2) + "\n")
    first = done[-1]["step"] if done else 0  # the last batch may be cut short
    is_main = jax.process_index() == 0
    log = workdirs.JsonLog(path) if is_main else None
    if log is not None:
        log.truncate_after(first - 1)
    batches = best_of_n(config, start, reward, prompts, mesh, first)
    with tqdm(desc="best of n", unit=" prompts", total=len(prompts), disable=not is_main) as progress:
        for i, rows in enumerate(batches, first):
            progress.update(len(rows))
            if log is not None:
                log.append(i, *rows)
    if not is_main:
        return
    rows = workdirs.read_rows(path)
    size = config.rollout.num_samples_per_prompt
    dropped = len(prompts) - len(rows)
    cut_off = dropped * size + sum(not finished for row in rows for finished in row["finished_each"])
    limit = f"rollout.max_new_tokens={config.rollout.max_new_tokens}"
    if not rows:
        raise ValueError(
            f"{limit}: it cut off all {cut_off} responses, so that there is none to keep; raise it, or keep them as they are "
            "with keep_unfinished=True, in another workdir."
        )
    points = curve(rows, keep_unfinished=config.keep_unfinished)
    for point in points:
        print(", ".join(f"{name} {value:.4g}" for name, value in point.items()))
    manifests.write_manifest(workdir, manifests.base_manifest(
        stage="best_of_n", config=to_dict(config), tokenizer_digest=start.tokenizer.digest,
        chat_template_digest=start.template.digest, special_ids=start.tokenizer.special_ids,
        vocab_size=start.tokenizer.vocab_size, data_fingerprint=prompts.fingerprint, parents=parents,
        sources=sources,
        final_metrics=points[-1], curve=points, prompts={"kept": len(rows), "dropped": dropped}, cut_off_responses=cut_off,
    ))  # fmt: skip
    if cut_off:
        print(
            f"{cut_off} of {len(prompts) * size} responses were cut off by {limit}; {dropped} of {len(prompts)} prompts have "
            "no other and are left out."
        )
    print(f"{len(rows)} responses in {path}.")


if __name__ == "__main__":
    cli.run(main, BestOfNConfig, default_config="configs/grpo.py:best_of_n")
