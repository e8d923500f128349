"""A tokenizer.json as other models have it, made of the texts of the tests."""

import json

import pytest

from tests.data.test_tokenizer import TEXTS

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def byte_level(*, bos: str | None = None) -> str:
    """A byte-level BPE tokenizer like GPT-2's and Qwen's."""
    library = pytest.importorskip("tokenizers")
    made = library.Tokenizer(library.models.BPE())
    made.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = library.decoders.ByteLevel()
    alphabet = library.pre_tokenizers.ByteLevel.alphabet()
    trainer = library.trainers.BpeTrainer(vocab_size=330, initial_alphabet=sorted(alphabet), show_progress=False)
    made.train_from_iterator(TEXTS[:50], trainer)
    made.add_special_tokens(SPECIAL)
    made.add_tokens(["<think>"])
    if bos is not None:
        made.post_processor = library.processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, made.token_to_id(bos))]
        )
    return made.to_str()


def folder_of(tmp_path, source: str, **config) -> str:
    """The folder, with a tokenizer.json and what goes with it."""
    (tmp_path / "tokenizer.json").write_text(source)
    values = {"eos_token": "<|im_end|>", "pad_token": {"content": "<|endoftext|>"}} | config
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(values))
    return str(tmp_path)
