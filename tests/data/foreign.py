"""Small tokenizers as other projects make them, by the library that reads them: no file of theirs is needed."""

import functools
import json
import re

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from jaxgpt.data.hf_tokenizer import SPACE, HFTokenizer

BYTES = [f"<0x{i:02X}>" for i in range(256)]
TEXTS = [
    "the quick brown fox jumps over the lazy dog\n\nhello world, why is the sky blue?\n",
    "[INST] user [/INST] assistant model system said: yes, no, yes. naïve cafés 日本語\n",
] * 20


def byte_level(special: tuple[str, ...], names: dict[str, str | None], *, bos: str | None = None) -> HFTokenizer:
    """Byte-level BPE like GPT-2's, Qwen's and Llama 3's. bos: what it puts before a text."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=340, initial_alphabet=alphabet, show_progress=False))
    made.add_special_tokens(list(special))
    made.add_tokens(["<think>", "</think>"])
    if bos is not None:
        made.post_processor = _begin_with(made, bos)
    return HFTokenizer(made.to_str(), names)


def sentencepiece_like(
    *, prefix: str, special: tuple[str, ...] = (), names: dict[str, str | None] | None = None
) -> HFTokenizer:
    """BPE with a fallback to bytes, as Llama 2, Mistral and Gemma have it.

    prefix: how a space comes before a text: "prepend" by a normalizer, before each part between special tokens (Llama 2 and
    Mistral as they were first published), "first" or "always" by the Metaspace pre-tokenizer (as they are written today),
    or "never" (Gemma).
    """
    made = tokenizers.Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    control = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=[*control, *BYTES], limit_alphabet=60, show_progress=False
    )
    words = [word.replace(" ", SPACE) for text in TEXTS for word in re.findall(r" ?[^ ]+", text)]
    made.train_from_iterator(words, trainer)  # no piece has a space but at its beginning
    if prefix in ("first", "always"):
        made.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme=prefix, split=False)
    else:
        begin = [normalizers.Prepend(SPACE)] if prefix == "prepend" else []
        made.normalizer = normalizers.Sequence([*begin, normalizers.Replace(" ", SPACE)])
    strip = [] if prefix == "never" else [decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    spec = json.loads(made.to_str())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] in control]
    made = tokenizers.Tokenizer.from_str(json.dumps(spec))
    made.add_special_tokens(list(special))
    made.post_processor = _begin_with(made, "<s>")
    return HFTokenizer(made.to_str(), names or {"bos_token": "<s>", "eos_token": "</s>"})


def _begin_with(made: tokenizers.Tokenizer, bos: str) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, made.token_to_id(bos))])


@functools.cache
def foreign(kind: str) -> HFTokenizer:
    """One of each kind, by the name of a model family that has such a tokenizer."""
    if kind == "qwen":
        names = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
        return byte_level(("<|endoftext|>", "<|im_start|>", "<|im_end|>"), names)
    if kind == "llama3":
        special = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
        return byte_level(special, {"bos_token": special[0], "eos_token": special[-1]}, bos=special[0])
    if kind == "gemma":
        return sentencepiece_like(prefix="never", special=("<start_of_turn>", "<end_of_turn>"))
    return sentencepiece_like(prefix={"llama2": "prepend", "mistral": "first", "always": "always"}[kind])


KINDS = ("qwen", "llama3", "gemma", "llama2", "mistral", "always")
