"""Tokenizers of other models: a tokenizer.json (byte-level BPE, or sentencepiece's pieces) in place of ours."""

import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from jaxgpt.data.marker_names import KNOWN_MARKERS
from jaxgpt.json_object import parse_object

FILE, CONFIG = "tokenizer.json", "tokenizer_config.json"
_NAMES = ("bos_token", "eos_token", "pad_token")
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
SPACE = "\u2581"  # what sentencepiece writes for a space, so that a text's own is taken for one


class HFTokenizer:
    """A tokenizer.json as a jaxgpt.data.tokenizer.Tokenizer.

    It gives the ids that transformers gives, but for special tokens, which never come out of text here. bos_id: the
    special token that it puts before a text, None where it puts none. pad_id: EOS where it has no padding token.
    special_ids: name -> id of all special tokens, and of KNOWN_MARKERS that the file says are none. vocab_size: the largest
    id and one. digest: sha256 (hex) of the file and of the names of the three tokens.

    names: what tokenizer_config.json says of bos_token, eos_token and pad_token.
    """

    def __init__(self, source: str, names: dict[str, str | None]):
        self.source = source
        self.names = {name: names.get(name) for name in _NAMES}
        library = _library()
        try:
            spec = _with_markers(json.loads(source))
            self._tokenizer: Any = library.Tokenizer.from_str(json.dumps(spec))
        except Exception as error:  # the library raises nothing more special
            raise ValueError(f"The file {FILE} cannot be read: {error}.") from error
        self.special_ids = {t.content: i for i, t in self._tokenizer.get_added_tokens_decoder().items() if t.special}
        self.special_ids |= {name: self._id(role, name) for role, name in self.names.items() if name is not None}
        self.vocab_size: int = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        first = self._tokenizer.encode("a").ids[:1]
        self.bos_id: int | None = first[0] if first and first[0] in self.special_ids.values() else None
        if self.names["eos_token"] is None:
            raise ValueError(f"{CONFIG} names no eos_token, so that nothing would end a text; write its name there.")
        self.eos_id = self.special_ids[self.names["eos_token"]]
        pad = self.names["pad_token"]
        self.pad_id = self.eos_id if pad is None else self.special_ids[pad]
        added = self._tokenizer.get_added_tokens_decoder()
        self._takes_left = {i for i, token in added.items() if token.lstrip}
        self._takes_right = {i for i, token in added.items() if token.rstrip}
        self._within: Any = library.Tokenizer.from_str(json.dumps(_without_first_prefix(spec)))
        for each in (self._tokenizer, self._within):
            each.no_padding()
            each.no_truncation()
            each.encode_special_tokens = True  # as text, that is
        known = dict(_token_bytes(spec, self._tokenizer)) | dict.fromkeys(self.special_ids.values(), b"")
        self._bytes = [known.get(i, b"") for i in range(self.vocab_size)]
        self._has_dummy_prefix = _strips_a_space(spec)
        self.token_bytes_V = np.array([len(b) for b in self._bytes], np.int32)
        self.digest = hashlib.sha256((source + json.dumps(self.names, sort_keys=True)).encode()).hexdigest()

    @classmethod
    def from_dir(cls, folder: str) -> "HFTokenizer":
        """The tokenizer of a folder with tokenizer.json and tokenizer_config.json."""
        raw: list[bytes] = []
        for name in (FILE, CONFIG):
            path = os.path.join(folder, name)
            if not os.path.isfile(path):
                raise ValueError(f"{path} is missing.")
            with open(path, "rb") as file:
                raw.append(file.read())
        values = parse_object(raw[1], os.path.join(folder, CONFIG))
        parse_object(raw[0], os.path.join(folder, FILE))
        content = lambda token: token["content"] if isinstance(token, dict) else token
        return cls(raw[0].decode(), {name: content(values.get(name)) for name in _NAMES})

    def save(self, folder: str) -> None:
        """Write FOLDER/tokenizer.json and FOLDER/tokenizer_config.json."""
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False} | self.names
        for name, text in ((FILE, self.source), (CONFIG, json.dumps(config, indent=2) + "\n")):
            path = os.path.join(folder, name)
            with open(f"{path}.tmp", "w", encoding="utf-8") as file:
                file.write(text)
            os.replace(f"{path}.tmp", path)

    def encode(self, text: str, *, add_bos: bool = False, add_eos: bool = False) -> np.ndarray:
        """Ids of a text, i32 [n]; add_bos has no effect where there is none."""
        before = [self.bos_id] if add_bos and self.bos_id is not None else []
        return np.concatenate([before, self.encode_batch([text])[0], [self.eos_id] * add_eos]).astype(np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, i32 [n], on all cores."""
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(one.ids, np.int32) for one in encoded]

    def encode_parts(self, parts: Sequence[str | int]) -> list[np.ndarray]:
        """Ids of each part of one text, i32; joined they are the library's of the whole, special tokens where ids are.

        A token across two texts belongs to the later one.
        """
        out = [np.zeros(0, np.int32) if isinstance(part, str) else np.array([part], np.int32) for part in parts]
        for is_text, group in itertools.groupby(enumerate(parts), lambda pair: isinstance(pair[1], str)):
            places, texts = zip(*group, strict=True)
            if is_text:
                before, after = parts[: places[0]][-1:], parts[places[-1] + 1 :][:1]
                text, cut = "".join(texts), 0
                if self._takes_left.intersection(after):
                    text = text.rstrip()
                if self._takes_right.intersection(before):
                    text, cut = text.lstrip(), len(text) - len(text.lstrip())
                encoded = (self._within if before else self._tokenizer).encode(text, add_special_tokens=False)
                ends = np.cumsum([len(part) for part in texts])
                part_of = np.searchsorted(ends, [max(end + cut, 1) for _, end in encoded.offsets])
                for k, place in enumerate(places):
                    out[place] = np.array(encoded.ids, np.int32)[part_of == k]
        return out

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; special tokens stand for nothing, a cut UTF-8 sequence for U+FFFD.

        The space is left out that some tokenizers put before every text.
        """
        data = self.decode_bytes(ids)
        return (data.removeprefix(b" ") if self._has_dummy_prefix else data).decode(errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The UTF-8 bytes that ids stand for, each by itself."""
        return b"".join(self._bytes[i] for i in ids)

    def piece(self, i: int) -> str:
        """What an id looks like, for tables."""
        return self._tokenizer.id_to_token(i) or ""

    def _id(self, role: str, name: str) -> int:
        found = self._tokenizer.token_to_id(name)
        if found is None:
            raise ValueError(f"{CONFIG}: {role}={name!r} is no token of {FILE}.")
        return found


def _with_markers(spec: dict) -> dict:
    """A tokenizer.json in which the known markers are special tokens, as many fine-tuned models' files do not say."""
    is_other = lambda token: token["content"] in KNOWN_MARKERS and not token.get("special")
    changed = lambda token: token | {"special": True, "normalized": False} if is_other(token) else token
    return spec | {"added_tokens": [changed(token) for token in spec.get("added_tokens", ())]}


def _token_bytes(spec: dict, tokenizer: Any) -> Iterator[tuple[int, bytes]]:
    """(id, the UTF-8 bytes it stands for) of every token; ValueError for a kind of pieces that is not known."""
    kinds = {part.get("type") for part in _decoders(spec)}
    added = {token["content"] for token in spec.get("added_tokens", ())}
    of_character = _byte_of_character()
    if not kinds & {"ByteLevel", "ByteFallback", "Metaspace"}:
        decoder = (spec.get("decoder") or {}).get("type")
        raise ValueError(f"{FILE}: pieces with the decoder {decoder} are neither bytes nor sentencepiece's.")
    for piece, i in tokenizer.get_vocab(with_added_tokens=True).items():
        if "ByteLevel" in kinds:
            is_bytes = piece not in added and of_character.keys() >= set(piece)
            yield i, bytes(of_character[character] for character in piece) if is_bytes else piece.encode()
        elif "ByteFallback" in kinds and (match := _BYTE.fullmatch(piece)):
            yield i, bytes([int(match[1], 16)])
        else:
            yield i, piece.replace(SPACE, " ").encode()


def _decoders(spec: dict) -> list[dict]:
    """The steps by which a tokenizer.json makes text of pieces."""
    decoder = spec.get("decoder") or {}
    return [decoder, *decoder.get("decoders", ())]


def _strips_a_space(spec: dict) -> bool:
    """Whether its texts begin with a space that is not theirs, which decoding takes away."""
    return any(
        (step.get("type") == "Strip" and step.get("content") == " " and step.get("start", 0) > 0)
        or (step.get("type") == "Metaspace" and step.get("prepend_scheme", "always") != "never")
        for step in _decoders(spec)
    )


def _without_first_prefix(spec: dict) -> dict:
    """A tokenizer.json for texts that do not come first: what is put before the first one alone is left out."""

    def changed(part: Any) -> Any:
        if isinstance(part, list):
            return [changed(one) for one in part]
        if not isinstance(part, dict):
            return part
        is_first = part.get("type") == "Metaspace" and part.get("prepend_scheme") == "first"
        return {key: "never" if is_first and key == "prepend_scheme" else changed(value) for key, value in part.items()}

    return spec | {"pre_tokenizer": changed(spec.get("pre_tokenizer"))}


def _byte_of_character() -> dict[str, int]:
    """The characters by which GPT-2 writes bytes: those that can be printed stand for themselves, others follow U+0100."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [value for value in range(256) if value not in printed]
    return {chr(b): b for b in printed} | {chr(256 + i): b for i, b in enumerate(others)}


def _library() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ValueError(
            "A tokenizer.json needs the package tokenizers: pip install -e '.[hf]' in the project's folder."
        ) from error
    return tokenizers
