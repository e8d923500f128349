"""The project's own tokenizer: sentencepiece for what it learns, and a byte table that makes every text come back exactly."""

import dataclasses
import hashlib
import io
import os
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import sentencepiece

from jaxgpt.data.hf_tokenizer import SPACE
from jaxgpt.data.marker_names import META, RESERVED, ROLES

# Reserved from the start, so that no later stage resizes a vocabulary: ids 0, 1, 2, ... in this order.
OUR_NAMES = {"bos_token": META[1], "eos_token": META[2], "pad_token": META[0]}
BYTES = tuple(f"<0x{i:02X}>" for i in range(256))

RAW = re.compile("[\u2581\0]")  # characters that sentencepiece does not keep apart; they become byte pieces here
CHUNK_BYTES = 2000  # sentencepiece silently drops longer training sentences (over 4192 bytes)


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """vocab_size: of all pieces, reserved ones and 256 bytes included; an upper bound for `char` and `word`.
    max_sentences: chunks of text sampled from the corpus for training, so that it may be larger than memory.
    """

    model_type: Literal["bpe", "unigram", "char", "word"] = "bpe"
    vocab_size: int = 8192
    character_coverage: float = 0.9999
    max_sentences: int = 200_000
    seed: int = 0

    def __post_init__(self):
        least = len(META + ROLES + RESERVED) + 256 + 1
        if self.vocab_size < least:
            raise ValueError(
                f"tokenizer.vocab_size={self.vocab_size} is too small; reserved tokens and bytes alone need {least}."
            )
        if not 0 < self.character_coverage <= 1:
            raise ValueError(f"tokenizer.character_coverage must be in (0, 1], not {self.character_coverage}.")
        if self.max_sentences < 1:
            raise ValueError(f"tokenizer.max_sentences must be at least 1, not {self.max_sentences}.")


class SentencePieceTokenizer:
    """The project's own Tokenizer, without loss for any text: what is outside of the vocabulary becomes byte pieces.

    pad_id, bos_id, eos_id: 0, 1, 2. special_ids: the reserved tokens. model: the model file, of which digest is.
    """

    def __init__(self, model: bytes):
        self.model = model
        self._processor: Any = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.vocab_size: int = self._processor.get_piece_size()
        pieces = [self._processor.id_to_piece(i) for i in range(self.vocab_size)]
        ids = {piece: i for i, piece in enumerate(pieces)}
        reserved = META + ROLES + RESERVED
        missing = [name for name in reserved + BYTES if name not in ids]
        if missing:
            raise ValueError(
                f"The tokenizer model has no piece {missing[0]!r}; it was not made by experiments.tokenizer."
            )
        self.special_ids = {name: ids[name] for name in reserved}
        self.names: dict[str, str | None] = dict(OUR_NAMES)
        self.pad_id: int = ids[META[0]]
        self.bos_id: int | None = ids[META[1]]
        self.eos_id: int = ids[META[2]]
        self._unk_id: int = ids[META[3]]
        self._byte_ids = np.array([ids[name] for name in BYTES], np.int32)
        self._pieces = pieces
        self._bytes = [piece.replace(SPACE, " ").encode() for piece in pieces]
        for name in reserved:
            self._bytes[ids[name]] = b""
        for value, name in enumerate(BYTES):
            self._bytes[ids[name]] = bytes([value])
        self.token_bytes_V = np.array([len(b) for b in self._bytes], np.int32)
        self.digest = hashlib.sha256(model).hexdigest()

    def save(self, folder: str) -> None:
        """Write FOLDER/tokenizer.model."""
        path = os.path.join(folder, "tokenizer.model")
        with open(f"{path}.tmp", "wb") as file:
            file.write(self.model)
        os.replace(f"{path}.tmp", path)

    def encode(self, text: str, *, add_bos: bool = False, add_eos: bool = False) -> np.ndarray:
        """Ids of a text, i32 [n]."""
        ids = self.encode_batch([text])[0]
        return np.concatenate([[self.bos_id] * add_bos, ids, [self.eos_id] * add_eos]).astype(np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, i32 [n], on all cores."""
        plain = [i for i, text in enumerate(texts) if not RAW.search(text)]
        encoded = dict(zip(plain, self._encode_plain([texts[i] for i in plain]), strict=True))
        return [encoded[i] if i in encoded else self._encode_raw(text) for i, text in enumerate(texts)]

    def encode_parts(self, parts: Sequence[str | int]) -> list[np.ndarray]:
        """Ids of each part, i32: of a text by itself, or the id that it is."""
        texts = iter(self.encode_batch([part for part in parts if isinstance(part, str)]))
        return [next(texts) if isinstance(part, str) else np.array([part], np.int32) for part in parts]

    def _encode_plain(self, texts: list[str]) -> list[np.ndarray]:
        out = []
        threads = -1 if sum(map(len, texts)) > 1 << 16 else 1  # starting them costs more than a short text
        for text, ids in zip(texts, self._processor.encode(texts, num_threads=threads), strict=True):
            ids = np.asarray(ids, np.int32)
            out.append(self._with_bytes(text, ids) if np.any(ids == self._unk_id) else ids)
        return out

    def _with_bytes(self, text: str, ids: np.ndarray) -> np.ndarray:
        """Ids with unknown parts as byte pieces (`char` and `word` models have no fallback of their own)."""
        out: list[int] = []
        for i, piece in zip(ids, self._processor.encode(text, out_type=str), strict=True):
            out.extend(self._bytes_to_ids(piece.replace(SPACE, " ")) if i == self._unk_id else [i])
        return np.array(out, np.int32)

    def _encode_raw(self, text: str) -> np.ndarray:
        """Ids of a text with characters that sentencepiece does not keep apart."""
        parts, start = [], 0
        for match in RAW.finditer(text):
            parts += [*self._encode_plain([text[start : match.start()]]), self._bytes_to_ids(match.group())]
            start = match.end()
        return np.concatenate([*parts, *self._encode_plain([text[start:]])]).astype(np.int32)

    def _bytes_to_ids(self, text: str) -> np.ndarray:
        return self._byte_ids[list(text.encode())]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; reserved tokens stand for nothing, a cut UTF-8 sequence for U+FFFD."""
        return self.decode_bytes(ids).decode(errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The UTF-8 bytes that ids stand for."""
        return b"".join(self._bytes[i] for i in ids)

    def piece(self, i: int) -> str:
        """What an id looks like, for tables."""
        return self._pieces[i]


def train_tokenizer(texts: Iterable[str], config: TokenizerConfig) -> SentencePieceTokenizer:
    """Train on a stream of texts; the same texts and config give the same tokenizer.

    Raises ValueError naming tokenizer.vocab_size and a size that fits, where the texts do not fill (or exceed) it.
    """
    chunks = reservoir_sample((c for text in texts for c in _chunks(text)), config.max_sentences, config.seed)
    if not chunks:
        raise ValueError("data.train has no text to train a tokenizer on.")
    vocab_size, control = config.vocab_size, ROLES + RESERVED
    has_bytes = config.model_type in ("bpe", "unigram")
    if not has_bytes:
        control += BYTES
    if config.model_type == "char":
        vocab_size = min(vocab_size, len(META + control) + len({c for chunk in chunks for c in chunk}))
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(chunks),
            model_writer=model,
            model_type=config.model_type,
            vocab_size=vocab_size,
            hard_vocab_limit=config.model_type == "bpe",
            character_coverage=1.0 if config.model_type == "char" else config.character_coverage,
            byte_fallback=has_bytes,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=4 * CHUNK_BYTES,
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            pad_piece=META[0],
            bos_piece=META[1],
            eos_piece=META[2],
            unk_piece=META[3],
            control_symbols=list(control),
            num_threads=os.cpu_count() or 1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(_size_message(str(error), config)) from error
    return SentencePieceTokenizer(model.getvalue())


def _size_message(error: str, config: TokenizerConfig) -> str:
    high = re.search(r"value <= (\d+)", error)
    low = re.search(r"required_chars\. \d+ vs (\d+)", error)
    if high:
        return f"tokenizer.vocab_size={config.vocab_size} is too large for this text; at most {high[1]} fits."
    if low:
        return (
            f"tokenizer.vocab_size={config.vocab_size} is too small for the characters of this text; it needs {low[1]}."
        )
    return f"sentencepiece could not train tokenizer.model_type={config.model_type!r}: {error}"


def _chunks(text: str) -> Iterator[str]:
    """Parts of at most about CHUNK_BYTES, cut at line ends where possible; tabs, which the trainer skips, are left out."""
    part, size = [], 0
    for line in text.replace("\t", "\n").replace("\0", "\n").splitlines(keepends=True):
        for start in range(0, len(line), CHUNK_BYTES // 4):  # a character has at most four bytes
            piece = line[start : start + CHUNK_BYTES // 4]
            part.append(piece)
            size += len(piece.encode())
            if size >= CHUNK_BYTES:
                yield "".join(part)
                part, size = [], 0
    if part:
        yield "".join(part)


def reservoir_sample(items: Iterable[Any], size: int, seed: int) -> list[Any]:
    """A uniform sample of at most `size` items of a stream, in one pass (Vitter 1985, algorithm R)."""
    rng, sample = random.Random(seed), []
    for i, item in enumerate(items):
        if i < size:
            sample.append(item)
        elif (j := rng.randrange(i + 1)) < size:
            sample[j] = item
    return sample
