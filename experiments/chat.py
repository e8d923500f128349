"""Chat: a conversation in the terminal with the model of a training run.

    python -m experiments.chat --config.init_from=runs/sft

Lines are messages, and those that begin with / are commands (experiments/shared/terminal.py). For presets see
configs/chat.py.
"""

import dataclasses
import sys
from collections.abc import Iterator
from typing import Literal

import jax

from experiments.shared import cli
from experiments.shared.terminal import Terminal
from jaxgpt import partition
from jaxgpt.config import check_bounds
from jaxgpt.generate.dialogue import ChatFormat, Dialogue, Speech
from jaxgpt.generate.engine import Engine
from jaxgpt.generate.samplers import SamplerConfig
from jaxgpt.generate.stream import TextEngine
from jaxgpt.partition import MeshConfig, check_decoding
from jaxgpt.runs.load import load_model


@dataclasses.dataclass(frozen=True)
class ChatConfig:
    """Which model, and how its responses are drawn.

    init_from: the workdir of a training run. system: the system message. max_new_tokens: the most tokens of a response; 0
    is half of the context. max_length: tokens of the context; 0 is model.max_seq_length. chat_template: `auto` is the
    template the model was trained with, if there is one; `none` continues plain text.
    """

    init_from: str = ""
    system: str = ""
    sampler: SamplerConfig = SamplerConfig()
    max_new_tokens: int = 0
    max_length: int = 0
    seed: int = 0
    chat_template: Literal["auto", "none"] = "auto"
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self):
        check_bounds(self, "", max_new_tokens=0, max_length=0)
        check_decoding(self.mesh)


def main(config: ChatConfig, workdir: str) -> None:
    """Talk until the user leaves."""
    del workdir
    if not config.init_from:
        raise ValueError("init_from is required: --config.init_from=DIR, the workdir of a training run.")
    if jax.process_count() > 1:
        raise ValueError("A chat is led by one process; this job has several.")
    speech = Speech(config.sampler, config.max_new_tokens, config.seed)
    mesh = partition.make_mesh(config.mesh)
    model = load_model(config.init_from, mesh)
    template = model.template if config.chat_template == "auto" else None
    engine = Engine(model.config, model.params, mesh, num_slots=1, max_length=config.max_length)
    form = ChatFormat.of(model.tokenizer, template)
    terminal = Terminal(Dialogue(TextEngine(engine, model.tokenizer), form, speech, config.system))
    if template is None:
        print(f"[{config.init_from} has no chat template: it continues the text, each of your lines a new one in it.]")
    print("[/help lists the commands.]", flush=True)
    for line in lines():
        if line == "/quit":
            break
        if line:
            terminal.handle(line)


def lines() -> Iterator[str]:
    """What the user types, or what a file or pipe brings, until it ends."""
    for stream in (sys.stdin, sys.stdout):
        stream.reconfigure(errors="replace")  # a terminal may send, or lack, any character
    if sys.stdin.isatty():
        import readline  # noqa: F401  (arrow keys and history for input)
    while True:
        try:
            yield input("> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            return


if __name__ == "__main__":
    cli.run(main, ChatConfig, default_config="configs/chat.py", needs_workdir=False)
