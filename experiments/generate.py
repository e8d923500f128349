"""Generation: prompts in, continuations out, from any training run's workdir.

    python -m experiments.generate --config.init_from=runs/gpt --config.prompt="Once upon a time"
    python -m experiments.generate --config.init_from=runs/gpt --config.prompts_file=prompts.txt \
        --config.output=responses.jsonl

See configs/generate.py for presets.
"""

import dataclasses
import os
from collections.abc import Sequence
from typing import Literal

import jax
import numpy as np
from jax.sharding import Mesh

from experiments.shared import cli
from jaxgpt import partition
from jaxgpt.config import check_bounds
from jaxgpt.data import sources
from jaxgpt.data.chat import Message
from jaxgpt.generate.samplers import SamplerConfig
from jaxgpt.generate.text import generate_texts, next_token_table, stop_ids
from jaxgpt.json_object import to_json
from jaxgpt.models.config import ModelConfig
from jaxgpt.models.memory import cache_bytes, check_fits
from jaxgpt.partition import MeshConfig, check_decoding
from jaxgpt.runs.load import LoadedModel, load_model
from jaxgpt.runs.workdir import write_atomic


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """What is generated, and how.

    init_from: the workdir of a training run. prompt: one text; empty continues BOS alone. prompts_file: a .txt with one
      prompt per line, or records (.jsonl[.gz], .parquet, .array_record) with a field "prompt". output: a .jsonl file for
      the results, instead of printing them.
    chat_template: `auto` makes each prompt a user's message in the template that the model was trained with, if there is
      one; `none` continues the bare text.
    stop: pieces that end a response, besides EOS and the template's end. show_probabilities: so many of the most
    probable next tokens are printed for each prompt. batch_size: the most prompts generated for at once.
    """

    init_from: str = ""
    prompt: str | None = None
    prompts_file: str = ""
    output: str = ""
    sampler: SamplerConfig = SamplerConfig()
    max_new_tokens: int = 128
    batch_size: int = 16
    seed: int = 0
    chat_template: Literal["auto", "none"] = "auto"
    stop: tuple[str, ...] = ()
    show_probabilities: int = 0
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self):
        check_bounds(self, "", max_new_tokens=1, batch_size=1, show_probabilities=0)
        check_decoding(self.mesh)


def main(config: GenerateConfig, workdir: str) -> None:
    """Generate for each prompt; print the texts, or write them to config.output."""
    del workdir
    if not config.init_from:
        raise ValueError("init_from is required: --config.init_from=DIR, the workdir of a training run.")
    check_output(config.output)
    prompts = read_prompts(config)
    mesh = partition.make_mesh(config.mesh)
    model = load_model(config.init_from, mesh)
    template = model.template if config.chat_template == "auto" else None
    stop = stop_ids(model.tokenizer, config.stop)
    if template is None:
        encoded = [model.tokenizer.encode(prompt, add_bos=True) for prompt in prompts]
    else:
        encoded = [template.encode_prompt(model.tokenizer, [Message("user", prompt)]) for prompt in prompts]
        stop = tuple(dict.fromkeys((*stop, *template.stop_ids(model.tokenizer))))
    check_room(config, model.config, encoded, mesh)
    if config.show_probabilities:
        for prompt, ids in zip(prompts, encoded, strict=True):
            print_probabilities(config, model, prompt, ids, mesh)
    records = generate_texts(
        model.config, model.params, model.tokenizer, prompts, sampler=config.sampler, max_new=config.max_new_tokens,
        seed=config.seed, batch_size=config.batch_size, eos_ids=stop, mesh=mesh, encoded=encoded,
    )  # fmt: skip
    if jax.process_index() != 0:
        return
    if config.output:
        try:
            os.makedirs(os.path.dirname(os.path.abspath(config.output)), exist_ok=True)
            write_atomic(config.output, "".join(to_json(record, ensure_ascii=False) + "\n" for record in records))
        except OSError as error:
            raise OSError(error.errno, error.strerror, config.output) from error
        print(f"{len(records)} responses in {config.output}.")
        return
    for record in records:
        between = "" if template is None else "\n-> "
        print(
            f"{record['prompt']}{between}{record['response']}\n[{record['num_tokens']} tokens, {record['stop_reason']}]\n"
        )


def check_output(output: str) -> None:
    """ValueError where no file of that name can be written, before a model is loaded for it."""
    folder = os.path.dirname(os.path.abspath(output))
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    if output and (os.path.isdir(output) or not os.path.isdir(folder)):
        what = f"{folder} is a file" if not os.path.isdir(folder) else "it is a folder"
        raise ValueError(f"output={output!r} cannot be written: {what}.")


def check_room(config: GenerateConfig, model: ModelConfig, encoded: Sequence[np.ndarray], mesh: Mesh) -> None:
    """ValueError where a prompt is longer than what the model reads, or the responses can never fit the devices."""
    longest = max(len(ids) for ids in encoded)
    if longest > model.max_seq_length:
        raise ValueError(f"A prompt has {longest} tokens, more than model.max_seq_length={model.max_seq_length}.")
    rows = min(config.batch_size, len(encoded))
    what = f"The keys and values of max_new_tokens={config.max_new_tokens} for {rows} prompt(s)"
    check_fits({what: cache_bytes(model, rows, longest + config.max_new_tokens)}, mesh.size)


def read_prompts(config: GenerateConfig) -> list[str]:
    """The prompts of the config; ValueError naming the file and line where one cannot be read."""
    prompts = [] if config.prompt is None else [config.prompt]
    for path in sources.resolve_paths(config.prompts_file, "prompts_file") if config.prompts_file else ():
        if path.endswith(".txt"):
            lines = sources.read_texts(path, fields={}, text_separator="\n")
            prompts += [line.text.rstrip("\r") for line in lines]
        else:
            prompts += [sources.required_field(record, "prompt", {}, str) for record in sources.read_records(path)]
    if not prompts:
        raise ValueError("There is no prompt: set prompt to a text, or prompts_file to a file that holds some.")
    return prompts


def print_probabilities(config: GenerateConfig, model: LoadedModel, prompt: str, ids: np.ndarray, mesh) -> None:
    """The most probable next tokens of a prompt, as a table."""
    top = config.show_probabilities
    table = next_token_table(model.config, model.params, model.tokenizer, prompt, top=top, mesh=mesh, ids=ids)
    if jax.process_index() == 0:
        print(f"After {prompt!r}:", *(f"  {prob:7.4f}  {piece}" for piece, prob in table), "", sep="\n")


if __name__ == "__main__":
    cli.run(main, GenerateConfig, default_config="configs/generate.py", needs_workdir=False)
