"""Pretraining: raw text in, a GPT out.

    python -m experiments.pretrain --config=configs/pretrain.py:tiny --workdir=runs/gpt \
        --config.data.train=corpus.txt --config.data.tokenizer=runs/tokenizer

The same command again resumes, to the bit. See configs/pretrain.py for presets, jaxgpt/train/config.py for all fields.
"""

import dataclasses
import functools
import math

import jax
from jax.sharding import Mesh

from experiments.shared import cli
from experiments.shared.training import Job, sample_writer, train_in
from jaxgpt import partition
from jaxgpt.data import batches
from jaxgpt.data.tokenizer import Tokenizer, load_tokenizer
from jaxgpt.models import decoder
from jaxgpt.objectives.next_token import make_next_token
from jaxgpt.runs.load import load_trunk, parent_of, read_run
from jaxgpt.train.config import PretrainConfig
from jaxgpt.train.run import Stage
from jaxgpt.train.throughput import training_flops_per_token


def main(config: PretrainConfig, workdir: str) -> None:
    """Train the run in `workdir`, or go on with it."""
    tokenizer = load_tokenizer(config.data.tokenizer)
    config = with_vocabulary(config, tokenizer)
    train_in(workdir, "pretrain", config, config.model, functools.partial(prepare, config, workdir, tokenizer))


def with_vocabulary(config: PretrainConfig, tokenizer: Tokenizer) -> PretrainConfig:
    """The config with model.vocab_size taken from the tokenizer where it is 0; ValueError where it is too small."""
    if config.model.vocab_size == 0:
        return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=tokenizer.vocab_size))
    if config.model.vocab_size < tokenizer.vocab_size:
        raise ValueError(
            f"model.vocab_size={config.model.vocab_size} is smaller than the tokenizer's {tokenizer.vocab_size}; set it to "
            f"{tokenizer.vocab_size}, or to 0 to take the tokenizer's."
        )
    return config


def prepare(config: PretrainConfig, workdir: str, tokenizer: Tokenizer, mesh: Mesh, cache_dir: str) -> Job:
    """The next-token objective over the packed sources."""
    parent = read_run(config.init_from) if config.init_from else None
    parents = {"init_from": parent_of(parent, tokenizer)} if parent is not None else {}
    data = batches.build_data(config.data, tokenizer, cache_dir=cache_dir)
    lines = {"uniform": math.log(tokenizer.vocab_size), "unigram entropy": batches.unigram_entropy(data)}
    if jax.process_index() == 0:
        print(
            "Loss of guessing uniformly {uniform:.3f}, by frequency {unigram entropy:.3f} nats/token.".format(**lines)
        )
    on_eval, on_start = sample_writer(
        config.samples, config.model, tokenizer, workdir, mesh, sample_prompts(config, tokenizer), (tokenizer.eos_id,),
        config.seed,
    )  # fmt: skip
    rows, length = partition.local_rows(mesh, config.batch_size), config.data.sequence_length
    stage = Stage(
        init_fn=functools.partial(decoder.init_params, config.model),
        objective=make_next_token(config.model, config.loss, tokenizer.token_bytes_V),
        **batches.batch_streams(config.data, data, config.batch_size, rows, config.seed),
        tokens_per_step=config.batch_size * length,
        flops_per_token=training_flops_per_token(config.model, length),
        load=functools.partial(load_trunk, parent, mesh=mesh) if parent is not None else None,
        on_eval=on_eval,
        on_start=on_start,
    )  # fmt: skip
    return Job(stage, data, tokenizer, parents=parents, reference_lines=lines)


def sample_prompts(config: PretrainConfig, tokenizer: Tokenizer) -> list:
    """The config's prompts and their ids; ValueError for one that does not fit."""
    prompts = [(prompt, tokenizer.encode(prompt, add_bos=True), {}) for prompt in config.samples.prompts]
    room = config.model.max_seq_length - config.samples.max_new_tokens
    for prompt, ids, _ in prompts:
        if config.model.position == "learned" and len(ids) > room:
            raise ValueError(
                f"samples.prompts: {prompt!r} with samples.max_new_tokens={config.samples.max_new_tokens} is longer than "
                f"model.max_seq_length={config.model.max_seq_length}."
            )
    return prompts


if __name__ == "__main__":
    cli.run(main, PretrainConfig, default_config="configs/pretrain.py")
