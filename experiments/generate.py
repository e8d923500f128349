"""Generation: prompts in, continuations out, from any training run's workdir.

    python -m experiments.generate --config.init_from=runs/gpt --config.prompt="Once upon a time"
    python -m experiments.generate --config.init_from=runs/gpt --config.prompts_file=prompts.txt \
        --config.output=responses.jsonl

See configs/generate.py for presets.
"""

import dataclasses
import json
import os

import jax

from experiments import cli
from jaxgpt import partition
from jaxgpt.generate.samplers import SamplerConfig
from jaxgpt.generate.text import generate_texts, next_token_table, stop_ids
from jaxgpt.partition import MeshConfig
from jaxgpt.train.load import LoadedModel, load_model


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """What is generated, and how.

    init_from: the workdir of a training run. prompt: one text; empty continues BOS alone. prompts_file: one prompt per
      line, or .jsonl with a field "prompt". output: a .jsonl file for the results, instead of printing them.
    stop: pieces that end a response, besides EOS. show_probabilities: so many of the most probable next tokens are
      printed for each prompt. batch_size: the most prompts generated for at once.
    """

    init_from: str = ""
    prompt: str | None = None
    prompts_file: str = ""
    output: str = ""
    sampler: SamplerConfig = SamplerConfig()
    max_new_tokens: int = 128
    batch_size: int = 16
    seed: int = 0
    stop: tuple[str, ...] = ()
    show_probabilities: int = 0
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self):
        for name, least in (("max_new_tokens", 1), ("batch_size", 1), ("seed", 0), ("show_probabilities", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, not {getattr(self, name)}.")


def main(config: GenerateConfig, workdir: str) -> None:
    """Generate for each prompt; print the texts, or write them to config.output."""
    del workdir
    if not config.init_from:
        raise ValueError("init_from is required: --config.init_from=DIR, the workdir of a training run.")
    prompts = read_prompts(config)
    mesh = partition.make_mesh(config.mesh)
    model = load_model(config.init_from, mesh)
    if config.show_probabilities:
        for prompt in prompts:
            print_probabilities(config, model, prompt, mesh)
    records = generate_texts(
        model.config, model.params, model.tokenizer, prompts, sampler=config.sampler, max_new=config.max_new_tokens,
        seed=config.seed, batch_size=config.batch_size, eos_ids=stop_ids(model.tokenizer, config.stop), mesh=mesh,
    )  # fmt: skip
    if jax.process_index() != 0:
        return
    if config.output:
        os.makedirs(os.path.dirname(os.path.abspath(config.output)), exist_ok=True)
        with open(config.output, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        print(f"{len(records)} responses in {config.output}.")
        return
    for record in records:
        print(f"{record['prompt']}{record['response']}\n[{record['num_tokens']} tokens, {record['stop_reason']}]\n")


def read_prompts(config: GenerateConfig) -> list[str]:
    """The prompts of the config; ValueError naming the file and line where one cannot be read."""
    prompts = [] if config.prompt is None else [config.prompt]
    if config.prompts_file:
        if not os.path.isfile(config.prompts_file):
            raise ValueError(f"prompts_file: there is no file {config.prompts_file!r}.")
        with open(config.prompts_file, encoding="utf-8") as file:
            lines = [(number, line.rstrip("\r\n")) for number, line in enumerate(file, 1) if line.strip()]
        is_json = config.prompts_file.endswith(".jsonl")
        prompts += [_prompt_of(config.prompts_file, *line) if is_json else line[1] for line in lines]
    if not prompts:
        raise ValueError("There is no prompt: set prompt to a text, or prompts_file to a file that holds some.")
    return prompts


def _prompt_of(path: str, number: int, line: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"prompts_file: {path}, line {number} is not JSON: {error}.") from error
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
        raise ValueError(f'prompts_file: {path}, line {number} has no text field "prompt".')
    return record["prompt"]


def print_probabilities(config: GenerateConfig, model: LoadedModel, prompt: str, mesh) -> None:
    """The most probable next tokens of a prompt, as a table."""
    top = config.show_probabilities
    table = next_token_table(model.config, model.params, model.tokenizer, prompt, top=top, mesh=mesh)
    if jax.process_index() == 0:
        print(f"After {prompt!r}:", *(f"  {prob:7.4f}  {piece}" for piece, prob in table), "", sep="\n")


if __name__ == "__main__":
    cli.run(main, GenerateConfig, default_config="configs/generate.py")
