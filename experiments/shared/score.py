"""Scoring texts that a user brings with a finished reward model: `experiments.reward --config.score=FILE`."""

import os

import jax

from jaxgpt import partition
from jaxgpt.data import chat, sources
from jaxgpt.evaluation import scoring
from jaxgpt.json_object import to_json
from jaxgpt.runs.load import load_model
from jaxgpt.runs.manifest import read_manifest
from jaxgpt.runs.workdir import write_atomic
from jaxgpt.train.config import RunConfig


def score_file(workdir: str, path: str, output: str, config: RunConfig) -> None:
    """Write the reward of each prompt and response of a file, shifted as the manifest says; see experiments.reward."""
    manifest = read_manifest(workdir)
    if manifest is None or "reward_shift" not in manifest:
        raise ValueError(f"--workdir={workdir} is not a finished reward model, which score needs.")
    mesh = partition.make_mesh(config.mesh)
    model = load_model(workdir, mesh)
    if model.template is None:
        raise ValueError(f"--workdir={workdir} has no chat template, by which score would read prompts and responses.")
    sequences, records = [], []
    for file in sources.resolve_paths(path, "score"):
        for record in sources.read_records(file):
            messages = chat.conversation(record, config.data.fields)
            with chat.located(f"{file}, line {record.line}"):
                is_finished = record.fields.get("finished") is not False  # as experiments.best_of_n writes it
                ids = model.template.encode_scored(model.tokenizer, messages, is_finished=is_finished).ids
            if len(ids) > model.config.max_seq_length:
                raise ValueError(
                    f"{file}, line {record.line}: {len(ids)} tokens are more than model.max_seq_length="
                    f"{model.config.max_seq_length}."
                )
            sequences.append(ids)
            records.append(record.fields)
    scorer = scoring.make_scorer(model.config, model.params, mesh)
    rewards = (
        scoring.score_sequences(scorer, sequences, config.batch_size, model.tokenizer.pad_id) - manifest["reward_shift"]
    )
    output = output or os.path.join(workdir, "scores.jsonl")
    if jax.process_index() == 0:
        lines = (to_json(r | {"reward": float(x)}, ensure_ascii=False) for r, x in zip(records, rewards, strict=True))
        write_atomic(output, "".join(line + "\n" for line in lines))
        print(f"{len(rewards)} rewards, mean {rewards.mean():.4f}, in {output}.")
