"""Tiny untrained models with a tokenizer of their own, and what float64 numpy says of them."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from jaxgpt import partition
from jaxgpt.data.chat import ChatTemplate
from jaxgpt.data.sentencepiece_tokenizer import TokenizerConfig, train_tokenizer
from jaxgpt.data.tokenizer import load_tokenizer
from jaxgpt.models import decoder
from jaxgpt.models.config import ModelConfig
from jaxgpt.partition import MeshConfig
from jaxgpt.runs.load import LoadedModel
from tests.interop.hf_tokenizers import byte_level, folder_of
from tests.models import reference

TEXT = "Ann sees the red house. Bob likes the blue house and calls Cid. Where is the house? It is here, and Dora too."
MAX_SEQ_LENGTH = 24


@pytest.fixture(scope="session")
def mesh():
    return partition.make_mesh(MeshConfig(), devices=jax.devices()[:1])


def load(tokenizer, mesh, **fields) -> LoadedModel:
    cfg = ModelConfig(
        vocab_size=tokenizer.vocab_size, num_layers=2, embed_dim=16, num_heads=2, max_seq_length=MAX_SEQ_LENGTH,
        init="fan_in", dtype="float32", tie_embeddings=False, **fields,
    )  # fmt: skip
    params = jax.jit(lambda: partition.unbox(decoder.init_params(cfg, jax.random.key(0))))()
    return LoadedModel(cfg, jax.device_put(params, partition.replicated(mesh)), tokenizer, None)


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer([TEXT * 20], TokenizerConfig(vocab_size=320))


@pytest.fixture(scope="session")
def model(tokenizer, mesh) -> LoadedModel:
    """Without a chat template, and with positions that end at max_seq_length."""
    return load(tokenizer, mesh, position="learned")


@pytest.fixture(scope="session")
def chat_model(model) -> LoadedModel:
    return dataclasses.replace(model, template=ChatTemplate.from_config("chatml"))


@pytest.fixture(scope="session")
def model_without_bos(mesh, tmp_path_factory) -> LoadedModel:
    """With a byte-level BPE tokenizer as of GPT-2 and Qwen, which puts nothing before a text."""
    pytest.importorskip("tokenizers")
    tokenizer = load_tokenizer(folder_of(tmp_path_factory.mktemp("gpt2"), byte_level()))
    assert tokenizer.bos_id is None
    return load(tokenizer, mesh, position="learned")


@pytest.fixture(scope="session")
def reward_model(tokenizer, mesh) -> LoadedModel:
    return dataclasses.replace(
        load(tokenizer, mesh, position="rope", head="scalar"), template=ChatTemplate.from_config("chatml")
    )


def logprobs64(model: LoadedModel, ids) -> np.ndarray:
    """Float64 log-probs of ids[1:], each given all ids before it."""
    z = reference.forward(jax.device_get(model.params), np.asarray(ids[:-1]), model.config)
    z = z - z.max(-1, keepdims=True)
    log_p = z - np.log(np.exp(z).sum(-1, keepdims=True))
    return log_p[np.arange(len(ids) - 1), ids[1:]]


@pytest.fixture
def write(tmp_path):
    """(name, records) -> the path of a jsonl file."""

    def write(name: str, *records: dict) -> str:
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return str(path)

    return write
