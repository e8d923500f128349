"""Pretraining: raw text in, a GPT out.

    python -m experiments.pretrain --config=configs/pretrain.py:tiny --workdir=runs/gpt \
        --config.data.train=corpus.txt --config.data.tokenizer=runs/tokenizer

The same command again resumes, to the bit. See configs/pretrain.py for presets, jaxgpt/train/config.py for all fields.
"""

import dataclasses
import functools
import math
import os

import jax

from experiments import cli
from jaxgpt import partition
from jaxgpt.config import to_dict
from jaxgpt.data import pipeline
from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.generate.text import generate_texts
from jaxgpt.models import decoder
from jaxgpt.objectives.next_token import make_next_token
from jaxgpt.reporting.report import write_report
from jaxgpt.train import workdir as workdirs
from jaxgpt.train.config import TrainConfig, check_mesh
from jaxgpt.train.load import load_params, parent_of
from jaxgpt.train.run import Stage, run

# Fields that may change between the runs of one workdir without changing what it computes, but for its length.
FREE_FIELDS = (
    "num_train_steps", "log_interval_steps", "mesh", "dcn_mesh", "checkpoint", "profile", "samples", "wandb", "nonfinite",
    "data.num_workers", "data.prefetch", "data.cache_dir",
)  # fmt: skip


def main(config: TrainConfig, workdir: str) -> None:
    """Train the run in `workdir`, or go on with it; then write its manifest and report."""
    tokenizer = Tokenizer.from_dir(config.data.tokenizer)
    config = with_vocabulary(config, tokenizer)
    mesh = partition.make_mesh(config.mesh, config.dcn_mesh)
    check_mesh(config, mesh)
    with workdirs.lock(workdir):
        workdirs.check_same(workdir, to_dict(config), ignore=FREE_FIELDS)
        done = workdirs.read_manifest(workdir)
        if done and done["step"] >= config.num_train_steps:
            print(f"{workdir} is finished: step {done['step']}, {_summary(done['final_metrics'])}.")
            return
        parents = {}
        if config.init_from:
            parents["init_from"] = parent_of(config.init_from, tokenizer)
        cache_dir = config.data.cache_dir or os.path.join(os.path.dirname(os.path.abspath(workdir)), "token_cache")
        data = pipeline.build_data(config.data, tokenizer, cache_dir=cache_dir)
        lines = {"uniform": math.log(tokenizer.vocab_size), "unigram entropy": pipeline.unigram_entropy(data)}
        is_main = jax.process_index() == 0
        if is_main:
            for name, stats in data.stats.items():
                print(f"{name}: " + ", ".join(f"{count:,} {what}" for what, count in stats.items()))
            print(
                "Loss of guessing uniformly {uniform:.3f}, by frequency {unigram entropy:.3f} nats/token.".format(
                    **lines
                )
            )
            workdirs.write_config(workdir, to_dict(config))
            tokenizer.save(workdir)
        state, step = run(config, workdir, mesh, make_stage(config, workdir, mesh, tokenizer, data))
        if step < config.num_train_steps:
            print(f"Preempted at step {step} of {config.num_train_steps}; the same command resumes.", flush=True)
        elif is_main:
            final = workdirs.read_rows(os.path.join(workdir, "metrics.jsonl"))[-1]
            manifest = workdirs.base_manifest(
                stage="pretrain", config=to_dict(config), tokenizer_digest=tokenizer.digest,
                special_ids=tokenizer.special_ids, vocab_size=tokenizer.vocab_size, data_fingerprint=data.fingerprint,
                parents=parents, final_metrics=final,
            )  # fmt: skip
            workdirs.write_manifest(workdir, manifest | {"step": step, "reference_lines": lines})
            print(f"Finished at step {step}: {_summary(final)}. Report: {write_report(workdir)}")


def with_vocabulary(config: TrainConfig, tokenizer: Tokenizer) -> TrainConfig:
    """The config with model.vocab_size taken from the tokenizer where it is 0; ValueError where it is too small."""
    if config.model.vocab_size == 0:
        return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=tokenizer.vocab_size))
    if config.model.vocab_size < tokenizer.vocab_size:
        raise ValueError(
            f"model.vocab_size={config.model.vocab_size} is smaller than the tokenizer's {tokenizer.vocab_size}; set it to "
            f"{tokenizer.vocab_size}, or to 0 to take the tokenizer's."
        )
    return config


def make_stage(config: TrainConfig, workdir: str, mesh, tokenizer: Tokenizer, data: pipeline.Data) -> Stage:
    """The next-token objective over the packed sources."""
    rows = partition.local_rows(mesh, config.batch_size)
    is_main = jax.process_index() == 0
    samples = workdirs.JsonLog(os.path.join(workdir, "samples.jsonl")) if is_main else None

    room = config.model.max_seq_length - config.samples.max_new_tokens
    for prompt in config.samples.prompts:
        if config.model.position == "learned" and len(tokenizer.encode(prompt, add_bos=True)) > room:
            raise ValueError(
                f"samples.prompts: {prompt!r} with samples.max_new_tokens={config.samples.max_new_tokens} is longer than "
                f"model.max_seq_length={config.model.max_seq_length}."
            )

    def on_eval(step, params):
        if not config.samples.prompts:
            return
        texts = generate_texts(
            config.model, params, tokenizer, list(config.samples.prompts), sampler=config.samples.sampler,
            max_new=config.samples.max_new_tokens, seed=config.seed, batch_size=len(config.samples.prompts),
            eos_ids=(tokenizer.eos_id,), mesh=mesh,
        )  # fmt: skip
        if samples is not None:
            samples.append(step, *texts)

    return Stage(
        init_fn=functools.partial(decoder.init_params, config.model),
        objective=make_next_token(config.model, config.loss, tokenizer.token_bytes_V),
        train_batches=lambda start: pipeline.train_batches(
            data.train, batch_size=config.batch_size, seed=config.seed, rows=rows, start_batch=start,
            shuffle=config.data.shuffle, num_workers=config.data.num_workers, prefetch=config.data.prefetch,
        ),
        eval_batches={
            name: functools.partial(
                pipeline.eval_batches, plan, batch_size=config.batch_size, rows=rows, max_batches=config.data.eval_batches
            )
            for name, plan in data.eval.items()
        },
        on_eval=on_eval,
        on_start=samples.truncate_after if samples is not None else lambda step: None,
        initial_params=(lambda abstract: load_params(config.init_from, abstract)) if config.init_from else None,
    )  # fmt: skip


def _summary(metrics: dict) -> str:
    shown = ("eval/loss", "eval/perplexity", "eval/bits_per_byte", "train/loss")
    return ", ".join(f"{name} {metrics[name]:.4f}" for name in shown if name in metrics)


if __name__ == "__main__":
    cli.run(main, TrainConfig, default_config="configs/pretrain.py")
