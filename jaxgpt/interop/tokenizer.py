"""Tokenizers and chat templates between this project and transformers.

An exported tokenizer.json gives the same ids as jaxgpt.data.tokenizer.Tokenizer for any text, with two exceptions:

* Texts that look like reserved tokens ("<eos>", "<|user|>") are those tokens in transformers, as with every model there,
  because its chat templates are texts. With `split_special_tokens=True` they are plain text there too, as they always are
  here.
* `unigram` models: where two segmentations are equally probable (runs of one character), sentencepiece's choice depends on
  the rounding of its float32 sums; transformers adds in float64.

BOS is put before a text by `tokenizer(text)`, as `encode(text, add_bos=True)` does; the exported chat template writes it
itself, since `apply_chat_template` adds none. There a prompt is tokenized as one text; here, by our own tokenizers, it is cut
before every earlier assistant turn. The two agree where the template has a special token at those places, as `roles` has.
Tokenizers of other models tokenize the whole text here, too.

`decode` gives back every text. Of bytes that are no text, which a model may generate, transformers makes U+FFFD of each
byte, and we of each invalid sequence.
"""

import json
import os
from typing import Any

import sentencepiece

from jaxgpt.data.chat import FILE_NAME, ChatTemplate
from jaxgpt.data.hf_tokenizer import CONFIG, FILE, HFTokenizer
from jaxgpt.data.marker_names import RESERVED
from jaxgpt.data.markers import marker_aliases
from jaxgpt.data.sentencepiece_tokenizer import SentencePieceTokenizer
from jaxgpt.data.tokenizer import Tokenizer, load_tokenizer
from jaxgpt.interop.sentencepieces import token_names, tokenizer_json
from jaxgpt.json_object import read_object


def read_tokenizer(folder: str) -> Tokenizer:
    """The tokenizer of a checkpoint: its tokenizer.json, or its sentencepiece tokenizer.model, ours or another project's."""
    if os.path.isfile(os.path.join(folder, FILE)):
        return HFTokenizer.from_dir(folder)
    path = os.path.join(folder, "tokenizer.model")
    if not os.path.isfile(path):
        raise ValueError(f"{folder} has no tokenizer: neither {FILE} nor tokenizer.model.")
    try:
        pieces = sentencepiece.SentencePieceProcessor(model_file=path)
    except RuntimeError as error:
        raise ValueError(f"{path} is not a sentencepiece model.") from error
    if pieces.id_to_piece(pieces.piece_to_id(RESERVED[0])) == RESERVED[0]:
        return load_tokenizer(folder)
    with open(path, "rb") as file:
        model = file.read()
    return HFTokenizer(json.dumps(tokenizer_json(model)), token_names(model))


def read_template(folder: str) -> ChatTemplate | None:
    """The chat template of a checkpoint: chat_template.jinja, or that of tokenizer_config.json; None without one."""
    template = ChatTemplate.from_dir(folder)
    path = os.path.join(folder, CONFIG)
    if template is not None or not os.path.isfile(path):
        return template
    source = read_object(path).get("chat_template")
    if isinstance(source, list):  # several, by name
        named = [entry for entry in source if isinstance(entry, dict)]
        source = {entry.get("name"): entry.get("template") for entry in named}.get("default")
    if source is not None and not isinstance(source, str):
        raise ValueError(
            f"{path}: chat_template must be a text, or a list of them by name, not {type(source).__name__}."
        )
    return ChatTemplate(source, FILE_NAME) if source else None


def write_tokenizer(
    tokenizer: Tokenizer, template: ChatTemplate | None, folder: str, max_length: int
) -> dict[str, Any]:
    """Write tokenizer.json, tokenizer_config.json, generation_config.json and the template; returns config.json's part.

    Raises ValueError for a `word` tokenizer, which transformers cannot express.
    """
    if isinstance(tokenizer, HFTokenizer):
        source, names = tokenizer.source, dict(tokenizer.names)
    else:
        assert isinstance(tokenizer, SentencePieceTokenizer)  # for the type checker
        source = json.dumps(tokenizer_json(tokenizer.model), ensure_ascii=False)
        names = token_names(tokenizer.model)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
        "model_max_length": max_length, "model_input_names": ["input_ids", "attention_mask"],
        **{name: token for name, token in names.items() if token is not None},
    }  # fmt: skip
    ends = [tokenizer.eos_id]
    if template is not None:
        ends = list(template.stop_ids(tokenizer))
        config["chat_template"] = chat_template(template, tokenizer)
        _write(folder, FILE_NAME, config["chat_template"])
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": ends, "pad_token_id": tokenizer.pad_id}
    _write(folder, FILE, source)
    _write(folder, CONFIG, json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    _write(folder, "generation_config.json", json.dumps(ids, indent=2) + "\n")
    return ids | {"eos_token_id": tokenizer.eos_id}


def chat_template(template: ChatTemplate, tokenizer: Tokenizer) -> str:
    """The source of a template for transformers: BOS first, and our reserved tokens for the markers they stand for."""
    source = template.source
    for marker, reserved in marker_aliases(tokenizer).items():
        source = source.replace(marker, reserved)
    return "{{- bos_token }}" + source if template.adds_bos(tokenizer) else source


def _write(folder: str, name: str, text: str) -> None:
    path = os.path.join(folder, name)
    with open(f"{path}.tmp", "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(f"{path}.tmp", path)
