"""Names of special tokens: those of our tokenizers, and those that chat templates of other models write."""

META = ("<pad>", "<bos>", "<eos>", "<unk>")
ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|end|>")
RESERVED = tuple(f"<|reserved_{i}|>" for i in range(7))

# Markers of other models' templates, on the reserved tokens that stand for them where a tokenizer has no such piece.
_BOS, _EOS, _END = META[1], META[2], ROLES[-1]
ALIASES = {
    "<|im_start|>": RESERVED[0], "<|im_end|>": _END,
    "<|start_header_id|>": RESERVED[0], "<|end_header_id|>": RESERVED[1], "<|eot_id|>": _END,
    "<start_of_turn>": RESERVED[0], "<end_of_turn>": _END,
    "<|begin_of_text|>": _BOS, "<|end_of_text|>": _EOS, "<|endoftext|>": _EOS, "<s>": _BOS, "</s>": _EOS,
}  # fmt: skip
KNOWN_MARKERS = {*ALIASES, _BOS, _EOS, *ROLES}
