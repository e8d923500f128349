"""Supervised fine-tuning: a pretrained model becomes one that answers, by full training or by LoRA adapters.

    python -m experiments.sft --config=configs/sft.py --workdir=runs/sft --config.init_from=runs/gpt \
        --config.data.train=tasks.jsonl [--config.lora.rank=8]

Records are {"prompt", "response"} or {"messages"}; data.fields maps other names. See configs/sft.py for presets.
"""

import dataclasses
import functools

import numpy as np
from jax.sharding import Mesh

from experiments.shared import cli
from experiments.shared.training import Job, sample_writer, train_in
from jaxgpt import partition
from jaxgpt.data import batches
from jaxgpt.data.chat import FIELDS, Message
from jaxgpt.data.conversations import SFTConfig, tokenize_conversations
from jaxgpt.data.packing import RowPlan, make_plan
from jaxgpt.data.sources import check_fields
from jaxgpt.objectives.next_token import LossConfig, make_next_token
from jaxgpt.train.config import SamplesConfig, check_lengths
from jaxgpt.train.finetune import FinetuneConfig, Start, start_from
from jaxgpt.train.run import Stage
from jaxgpt.train.throughput import training_flops_per_token


@dataclasses.dataclass(frozen=True)
class Config(FinetuneConfig):
    """One SFT run. samples.prompts are users' messages; samples.num_heldout prompts come from the held-out records."""

    sft: SFTConfig = SFTConfig()
    loss: LossConfig = LossConfig()
    samples: SamplesConfig = SamplesConfig()

    def __post_init__(self):
        super().__post_init__()
        check_fields(self.data.fields, FIELDS)
        if self.data.packing == "concat":
            raise ValueError("data.packing='concat' would cut conversations apart; use 'best_fit' or 'none'.")


def main(config: Config, workdir: str) -> None:
    """Train the run in `workdir`, or go on with it."""
    start = start_from(config)
    check_lengths(config.data, start.model)
    train_in(workdir, "sft", config, start.model, functools.partial(prepare, config, workdir, start))


def prepare(config: Config, workdir: str, start: Start, mesh: Mesh, cache_dir: str) -> Job:
    """The next-token objective over packed conversations, with weight on the responses."""
    tokenizer, length = start.tokenizer, config.data.sequence_length

    def make_rows(paths, split) -> RowPlan:
        source = tokenize_conversations(paths, tokenizer, start.template, config.data, config.sft, split, cache_dir)
        return make_plan(source, config.data.packing, length, tokenizer.pad_id)

    data = batches.build_data(config.data, tokenizer, cache_dir=cache_dir, make_rows=make_rows)
    on_eval, on_start = sample_writer(
        config.samples, start.model, tokenizer, workdir, mesh, sample_prompts(config, start, data),
        start.template.stop_ids(tokenizer), config.seed,
    )  # fmt: skip
    rows = partition.local_rows(mesh, config.batch_size)
    stage = Stage(
        init_fn=start.init_fn(),
        objective=make_next_token(start.model, config.loss, tokenizer.token_bytes_V),
        **batches.batch_streams(config.data, data, config.batch_size, rows, config.seed),
        tokens_per_step=config.batch_size * length,
        flops_per_token=training_flops_per_token(start.model, length),
        trainable=start.trainable(),
        load=functools.partial(start.load, mesh=mesh),
        on_eval=on_eval,
        on_start=on_start,
    )
    return Job(stage, data, tokenizer, start.template, start.parents)


def sample_prompts(config: Config, start: Start, data: batches.Data) -> list[tuple[str, np.ndarray, dict]]:
    """The config's prompts, then the first ones of every held-out set, with the response that was held out."""
    tokenizer = start.tokenizer
    prompts: list[tuple[str, np.ndarray, dict]] = [
        (text, start.template.encode_prompt(tokenizer, [Message("user", text)]), {}) for text in config.samples.prompts
    ]
    for name, plan in data.eval.items():
        tokens, offsets, trained = plan.source.tokens, plan.source.offsets, plan.source.trained
        for begin, end in zip(offsets[: config.samples.num_heldout], offsets[1:], strict=False):
            ids, response = tokens[begin:end].astype(np.int32), np.flatnonzero(trained[begin:end])
            prompt, reference = ids[: response[0]], ids[response]
            more = {"reference": tokenizer.decode(reference), "source": name}
            prompts.append((tokenizer.decode(prompt), prompt, more))
    room = start.model.max_seq_length - config.samples.max_new_tokens
    fits = lambda ids: start.model.position != "learned" or len(ids) <= room
    for text, ids, _ in prompts[: len(config.samples.prompts)]:
        if not fits(ids):
            raise ValueError(
                f"samples.prompts: {text!r} with samples.max_new_tokens={config.samples.max_new_tokens} is longer than "
                f"model.max_seq_length={start.model.max_seq_length}."
            )
    return [prompt for prompt in prompts if fits(prompt[1])]


if __name__ == "__main__":
    cli.run(main, Config, default_config="configs/sft.py")
