"""sentencepiece models as tokenizer.json: ours for transformers, and those of other projects for us.

Pieces are written with plain spaces, so that no text needs to be normalized, and a character without a piece (U+2581 among
them) falls back to bytes.
"""

from typing import Any, NamedTuple

from sentencepiece import sentencepiece_model_pb2

from jaxgpt.data.hf_tokenizer import SPACE
from jaxgpt.data.marker_names import KNOWN_MARKERS, RESERVED
from jaxgpt.data.sentencepiece_tokenizer import BYTES

_PROTO: Any = sentencepiece_model_pb2  # its classes are made as it is imported
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
_KINDS = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}
# Unigram looks every piece up in the text, bytes and reserved tokens too. A cut inside of what looks like one keeps it
# from being found; none of the other pieces goes across, because sentencepiece's training splits at digits and scripts.
_CUT = r"<(?=(?:0x[0-9A-F]{2}|pad|bos|eos|unk)>)|<\|(?=(?:system|user|assistant|tool|end|reserved_[0-6])\|>)"


class _Piece(NamedTuple):
    text: str
    score: float
    type: int


def token_names(model: bytes) -> dict[str, str | None]:
    """The bos_token, eos_token, pad_token and unk_token of a model; None for what it has not."""
    proto, pieces = _read(model)
    roles = ("bos", "eos", "pad", "unk")
    ids = {role: getattr(proto.trainer_spec, f"{role}_id") for role in roles}
    return {f"{role}_token": pieces[i].text if i >= 0 else None for role, i in ids.items()}


def tokenizer_json(model: bytes) -> dict[str, Any]:
    """A sentencepiece model as tokenizer.json, with the same ids for any text.

    Raises:
      ValueError: for a `word` model, which the format cannot express; for a model of another project that is no BPE,
        normalizes texts, or has no bytes.
    """
    proto, pieces = _read(model)
    kind, names = _KINDS[proto.trainer_spec.model_type], token_names(model)
    prefix = proto.normalizer_spec.add_dummy_prefix
    _check(proto, kind, {piece.text for piece in pieces})
    unknown, bos = names["unk_token"], names["bos_token"]
    if kind == "unigram":
        content: dict[str, Any] = {
            "type": "Unigram", "unk_id": proto.trainer_spec.unk_id, "vocab": [list(piece[:2]) for piece in pieces],
            "byte_fallback": True,
        }  # fmt: skip
    else:
        content = {
            "type": "BPE", "dropout": None, "unk_token": unknown, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": True, "ignore_merges": False,
            "vocab": {piece.text: i for i, piece in enumerate(pieces)},
            "merges": _merges(pieces) if kind == "bpe" else [],
        }  # fmt: skip
    cut = {"type": "Split", "pattern": {"Regex": _CUT}, "behavior": "MergedWithPrevious", "invert": False}
    decoders: list[dict[str, Any]] = [{"type": "ByteFallback"}, {"type": "Fuse"}]
    if prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added(pieces),
        "normalizer": {"type": "Prepend", "prepend": " "} if prefix else None,
        "pre_tokenizer": cut if kind == "unigram" else None,
        "post_processor": None if bos is None else _begin_with(bos, proto.trainer_spec.bos_id),
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": content,
    }


def _read(model: bytes) -> tuple[Any, list[_Piece]]:
    proto = _PROTO.ModelProto.FromString(model)
    return proto, [_Piece(piece.piece.replace(SPACE, " "), piece.score, piece.type) for piece in proto.pieces]


def _check(proto: Any, kind: str, texts: set[str]) -> None:
    """ValueError for what the format, or what is above, cannot express."""
    if kind == "word":
        raise ValueError(
            "tokenizer.model_type='word' cannot be exported: no tokenizer of transformers writes unknown words as bytes; "
            "the nearest that can is 'unigram'."
        )
    if RESERVED[0] in texts:  # ours
        return
    spec = proto.normalizer_spec
    obstacles = {
        f"it is a {kind} model": kind != "bpe",
        "it normalizes texts": bool(spec.precompiled_charsmap) or spec.remove_extra_whitespaces,
        "it has no pieces for bytes": not texts.issuperset(BYTES),
        "it has both a dummy prefix and user-defined pieces": spec.add_dummy_prefix
        and any(piece.type == _USER_DEFINED for piece in proto.pieces),
    }
    for obstacle, holds in obstacles.items():
        if holds:
            raise ValueError(
                f"The tokenizer.model of another project cannot be read: {obstacle}; make a tokenizer.json with "
                "transformers: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)."
            )


def _added(pieces: list[_Piece]) -> list[dict[str, Any]]:
    """What is looked for in texts before anything else: special tokens where asked, and user-defined pieces."""
    kinds = (_UNKNOWN, _CONTROL, _USER_DEFINED)
    return [
        {
            "id": i, "content": piece.text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
            "special": piece.type != _USER_DEFINED or piece.text in KNOWN_MARKERS,
        }
        for i, piece in enumerate(pieces)
        if piece.type in kinds and piece.text not in BYTES
    ]  # fmt: skip


def _begin_with(bos: str, bos_id: int) -> dict[str, Any]:
    first = {"SpecialToken": {"id": bos, "type_id": 0}}
    text = [{"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB")]
    return {
        "type": "TemplateProcessing", "single": [first, text[0]], "pair": [first, text[0], text[1]],
        "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
    }  # fmt: skip


def _merges(pieces: list[_Piece]) -> list[tuple[str, str]]:
    """The merges of a BPE model, best first: of every piece all pairs that make it.

    sentencepiece joins the pair that makes the best piece, the leftmost first; a list of merges orders pairs of the same
    piece too. That makes no difference: they could only meet in overlapping pairs, and runs are joined from the left.
    """
    score = {piece.text: piece.score for piece in pieces if piece.type == _NORMAL}
    pairs = (
        (-score[piece], len(piece) - cut, piece[:cut], piece[cut:])
        for piece in score
        for cut in range(1, len(piece))
        if piece[:cut] in score and piece[cut:] in score
    )
    return [(left, right) for _, _, left, right in sorted(pairs)]
