"""Serving: an OpenAI-compatible HTTP endpoint for the model of a training run.

    python -m experiments.serve --config.init_from=runs/sft --config.port=8000

See configs/serve.py for an example of a call, docs/serving.md for what is supported.
"""

import asyncio
import dataclasses
import os
import sys
from typing import Literal

import jax

from experiments.shared import cli
from jaxgpt import partition
from jaxgpt.generate.dialogue import ChatFormat
from jaxgpt.generate.engine import Engine
from jaxgpt.generate.stream import TextEngine
from jaxgpt.partition import MeshConfig, check_decoding
from jaxgpt.runs.load import load_model


@dataclasses.dataclass(frozen=True)
class ServeConfig:
    """What is served, where, and how much of it.

    init_from: the workdir of a training run. host: 0.0.0.0 is all of this machine's addresses. port: 0 takes a free one.
    api_key_file: a file with the key that clients must send; empty lets everybody in who can connect. allowed_hosts: names
    that clients may call the server by (the Host header); empty is this machine's own where host is 127.0.0.1, else any.
    allowed_origins: web pages that may call it, as https://example.org; * is any. max_connections: at the same time; 0 is
    what the limit of open files has room for, up to 1000. request_seconds: how long the head of a request may take to come,
    and the body, and how long a client may read nothing. keep_alive_seconds: how long a connection may wait for its next
    request. model_name: what clients call it; empty is the name of the folder.
    num_slots: responses written at the same time. max_length: tokens of prompt and response; 0 is model.max_seq_length.
    max_queue: responses that may wait for a slot; more are refused. max_choices: n x prompts of one call. max_body_bytes: of
    one call. grace_seconds: how long running responses may take after SIGTERM. chat_template: `auto` is the template the
    model was trained with, if there is one; `none` offers completions alone.
    """

    init_from: str = ""
    host: str = "127.0.0.1"
    port: int = 8000
    api_key_file: str = ""
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    max_connections: int = 0
    request_seconds: float = 30.0
    keep_alive_seconds: float = 30.0
    model_name: str = ""
    num_slots: int = 8
    max_length: int = 0
    max_queue: int = 64
    max_choices: int = 16
    max_body_bytes: int = 1 << 20
    grace_seconds: float = 30.0
    chat_template: Literal["auto", "none"] = "auto"
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self):
        least = {"port": 0, "num_slots": 1, "max_length": 0, "max_queue": 0, "max_choices": 1, "max_body_bytes": 1,
                 "grace_seconds": 0, "max_connections": 0, "request_seconds": 0.1, "keep_alive_seconds": 0}  # fmt: skip
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ValueError(f"{name} must be at least {value}, not {getattr(self, name)}.")
        check_decoding(self.mesh)
        if self.max_choices > self.num_slots + self.max_queue:
            raise ValueError(
                f"max_choices={self.max_choices} would never fit num_slots={self.num_slots} and max_queue={self.max_queue}; "
                f"it can be at most {self.num_slots + self.max_queue}."
            )


def main(config: ServeConfig, workdir: str) -> None:
    """Serve until SIGTERM or Ctrl-C."""
    del workdir
    try:
        from jaxgpt.serving import app as apps
        from jaxgpt.serving import server
        from jaxgpt.serving.connection import max_connections
        from jaxgpt.serving.gate import Access, default_hosts, read_api_key
        from jaxgpt.serving.protocol import Limits
        from jaxgpt.serving.worker import Worker
    except ImportError as error:
        raise ValueError(
            f"Serving needs {error.name}, which is not installed: pip install -e '.[serve]' in the project's folder."
        ) from error
    if not config.init_from:
        raise ValueError("init_from is required: --config.init_from=DIR, the workdir of a training run.")
    if jax.process_count() > 1:
        raise ValueError("A server is one process; this job has several.")
    access = Access(
        config.allowed_hosts or default_hosts(config.host),
        config.allowed_origins,
        read_api_key(config.api_key_file) if config.api_key_file else "",
    )
    mesh = partition.make_mesh(config.mesh)
    model = load_model(config.init_from, mesh)
    template = model.template if config.chat_template == "auto" else None
    engine = Engine(model.config, model.params, mesh, num_slots=config.num_slots, max_length=config.max_length)
    listener = server.listen(config.host, config.port, max_connections(config.max_connections))
    engine.compile()
    worker = Worker(TextEngine(engine, model.tokenizer), num_slots=config.num_slots, max_queue=config.max_queue)
    name = config.model_name or os.path.basename(os.path.abspath(config.init_from))
    form = ChatFormat.of(model.tokenizer, template)
    limits = Limits(name, engine.max_length, config.max_choices)
    app = apps.make_app(
        worker,
        form,
        limits,
        max_body_bytes=config.max_body_bytes,
        request_seconds=config.request_seconds,
        access=access,
    )
    host, port = listener.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    chat = "" if template is None else " and /v1/chat/completions"
    ready = lambda: print(f"Serving {name} at {url}/v1/completions{chat}.", flush=True)
    seconds = {name: getattr(config, name) for name in ("grace_seconds", "request_seconds", "keep_alive_seconds")}
    asyncio.run(server.serve(app, worker, listener, on_ready=ready, **seconds))
    if worker.failure is not None:
        print(f"error: {worker.failure} All clients were told; start the server again.", file=sys.stderr, flush=True)
        sys.exit(1)
    print("Stopped.", flush=True)


if __name__ == "__main__":
    cli.run(main, ServeConfig, default_config="configs/serve.py", needs_workdir=False)
