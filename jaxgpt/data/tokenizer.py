"""Tokenizers: what each of them can do, and the one that a folder holds."""

import os
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np

from jaxgpt.data.hf_tokenizer import FILE as HF_FILE
from jaxgpt.data.hf_tokenizer import HFTokenizer
from jaxgpt.data.sentencepiece_tokenizer import SentencePieceTokenizer


class Tokenizer(Protocol):
    """Text to ids and back. Special tokens never come out of text, even of text that looks like them.

    bos_id: what begins a text, None where nothing does. special_ids: name -> id of all special tokens. names: those of
    bos_token, eos_token and pad_token, None for what it has not. vocab_size: one more than the largest id. token_bytes_V:
    i32, UTF-8 bytes each id stands for, 0 for special ones. digest: sha256 (hex) of what it is made from.
    """

    vocab_size: int
    pad_id: int
    bos_id: int | None
    eos_id: int
    special_ids: dict[str, int]
    names: dict[str, str | None]
    token_bytes_V: np.ndarray
    digest: str

    def __hash__(self) -> int: ...

    def save(self, folder: str) -> None:
        """Write its files to a folder, from which `load_tokenizer` reads them."""

    def encode(self, text: str, *, add_bos: bool = False, add_eos: bool = False) -> np.ndarray:
        """Ids of a text, i32 [n]; add_bos has no effect where there is none."""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, i32 [n], on all cores."""

    def encode_parts(self, parts: Sequence[str | int]) -> list[np.ndarray]:
        """Ids of each part of one text, i32: what a text there becomes, and special tokens, which are given by their ids."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; special tokens stand for nothing, a cut UTF-8 sequence for U+FFFD."""

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The UTF-8 bytes that ids stand for, each by itself: those of two sequences joined are the bytes of both."""

    def piece(self, i: int) -> str:
        """What an id looks like, for tables."""


def load_tokenizer(path: str) -> Tokenizer:
    """The tokenizer of a folder (its tokenizer.model, or the tokenizer.json of an imported model), or of a model file.

    Raises ValueError where there is none.
    """
    file = os.path.join(path, "tokenizer.model") if os.path.isdir(path) else path
    if os.path.isfile(os.path.join(path, HF_FILE)) and not os.path.isfile(file):
        return HFTokenizer.from_dir(path)
    if not path or not os.path.isfile(file):
        raise ValueError(
            f"data.tokenizer={path!r} is neither a folder with a tokenizer.model (or a {HF_FILE}) nor a model file; "
            "make one with python -m experiments.tokenizer."
        )
    with open(file, "rb") as handle:
        model = handle.read()
    if not model:
        raise ValueError(f"data.tokenizer: {file} is empty.")
    try:
        return SentencePieceTokenizer(model)
    except (RuntimeError, UnicodeDecodeError) as error:
        raise ValueError(f"data.tokenizer: {file} is not a sentencepiece model, or it is damaged.") from error


def bytes_per_token(tokenizer: Tokenizer, texts: Iterable[str]) -> float:
    """UTF-8 bytes of the texts over their number of tokens."""
    num_bytes = num_tokens = 0
    for text in texts:
        num_bytes += len(text.encode())
        num_tokens += len(tokenizer.encode(text))
    return num_bytes / max(num_tokens, 1)
