"""The HTTP application in this process, over a tiny random model."""

import asyncio
import json
import re
from typing import NamedTuple

import httpx
import jax

from jaxgpt import partition
from jaxgpt.data.chat import CHAT_TEMPLATES, ChatTemplate
from jaxgpt.data.sentencepiece_tokenizer import TokenizerConfig, train_tokenizer
from jaxgpt.generate.dialogue import ChatFormat
from jaxgpt.generate.engine import Engine
from jaxgpt.generate.stream import TextEngine
from jaxgpt.models.config import ModelConfig
from jaxgpt.serving.app import make_app
from jaxgpt.serving.protocol import Limits
from jaxgpt.serving.worker import Worker

SLOTS, QUEUE, CONTEXT = 2, 3, 64
TOKENIZER = train_tokenizer(
    ["Ann sees Bob and Cid likes Dora."] * 3, TokenizerConfig(model_type="char", vocab_size=400)
)
TEMPLATE = ChatTemplate(CHAT_TEMPLATES["roles"], "roles")
CFG = ModelConfig(
    vocab_size=TOKENIZER.vocab_size, num_layers=1, embed_dim=16, num_heads=2, max_seq_length=CONTEXT, init="fan_in",
    dtype="float32", tie_embeddings=False,
)  # fmt: skip
HELLO = [{"role": "user", "content": "Ann sees"}]
COMPLETION, CHAT = {"model": "tiny", "prompt": "ab"}, {"model": "tiny", "messages": HELLO}
JSON = {"content-type": "application/json"}


class Served(NamedTuple):
    worker: Worker
    app: object
    engine: TextEngine


def make(params, template=TEMPLATE, tokenizer=TOKENIZER, **options) -> Served:
    mesh = partition.make_mesh(partition.MeshConfig(), devices=jax.devices()[:1])
    params = jax.device_put(params, partition.replicated(mesh))
    engine = TextEngine(Engine(CFG, params, mesh, num_slots=SLOTS), tokenizer)
    worker = Worker(engine, num_slots=SLOTS, max_queue=QUEUE)
    form = ChatFormat.of(tokenizer, template)
    return Served(worker, make_app(worker, form, Limits("tiny", CONTEXT, 5), max_body_bytes=4000, **options), engine)


def client(app):
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60, headers=JSON)


def call(served, path, body=None, method="POST", headers=None):
    """The response to one request; a body that is not bytes goes as JSON."""

    async def send():
        content = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        async with client(served.app) as http:
            return await http.request(method, path, content=content, headers=headers)

    return asyncio.run(send())


def complete(served, **fields):
    response = call(served, "/v1/completions", {"model": "tiny", "prompt": "Ann", "temperature": 0, **fields})
    assert response.status_code == 200, response.text
    return response.json()


def events(response) -> list[dict]:
    assert response.headers["content-type"].startswith("text/event-stream")
    parts = response.text.split("\n\n")
    assert parts[-2:] == ["data: [DONE]", ""]
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]


def check_error(response, status, param, code, words):
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (status, code), error
    assert (error["param"] or "").partition("[")[0] == (param or "")
    assert re.search(words, error["message"]), error
