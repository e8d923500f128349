"""Golden checkpoints (see make_golden.py), and a tokenizer and a template for what is exported."""

import pathlib

import pytest

from jaxgpt import partition
from jaxgpt.data.chat import ChatTemplate
from jaxgpt.data.sentencepiece_tokenizer import TokenizerConfig, train_tokenizer
from jaxgpt.partition import MeshConfig
from tests.data.test_tokenizer import TEXTS

GOLDEN = pathlib.Path(__file__).parent / "golden"
NAMES = sorted(path.name for path in GOLDEN.iterdir())


@pytest.fixture(scope="session")
def trained():
    """One tokenizer of each kind."""
    sizes = {"bpe": 400, "unigram": 350, "char": 10_000, "word": 320}
    return {kind: train_tokenizer(TEXTS, TokenizerConfig(model_type=kind, vocab_size=n)) for kind, n in sizes.items()}


@pytest.fixture(scope="session")
def template():
    return ChatTemplate.from_config("roles")


@pytest.fixture(scope="session")
def mesh():
    """Eight devices, four of them for rows of kernels and two for heads."""
    return partition.make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
