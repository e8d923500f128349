"""The config field that a user meant by one that does not exist."""

import difflib
import re
from collections.abc import Iterable

# Names of other libraries and habits -> ours; also for a word within a name (critic_lr).
_OTHER_NAMES = {
    "lr": "learning_rate", "wd": "weight_decay", "grad_clip": "max_grad_norm", "clip_grad_norm": "max_grad_norm",
    "n_layer": "num_layers", "n_layers": "num_layers", "depth": "num_layers", "n_head": "num_heads", "n_heads": "num_heads",
    "n_embd": "embed_dim", "d_model": "embed_dim", "hidden_size": "embed_dim", "hidden_dim": "embed_dim",
    "intermediate_size": "mlp_dim", "d_ff": "mlp_dim", "block_size": "sequence_length", "seq_len": "sequence_length",
    "context_length": "max_seq_length", "max_position_embeddings": "max_seq_length", "max_steps": "num_train_steps",
    "max_iters": "num_train_steps", "train_steps": "num_train_steps", "bsz": "batch_size", "grad_accum":
    "gradient_accumulation_steps", "eval_every": "eval_interval_steps", "log_every": "log_interval_steps",
    "save_every": "save_interval_steps", "beta1": "b1", "beta2": "b2", "temp": "temperature",
}  # fmt: skip


def nearest_field(given: str, fields: Iterable[str]) -> str | None:
    """The dotted field, of all there are, that is most like `given`; None where there is none.

    The last part counts most, wherever the field stands: its name itself, the same words in another order, its initials, its
    beginning or some of its words, its letters with some left out, and then how much the texts have in common.
    """
    return min(fields, key=lambda field: _distance(given, field), default=None)


def _distance(given: str, field: str) -> tuple:
    given_section, _, given_name = given.rpartition(".")
    section, _, name = field.rpartition(".")
    meant = _OTHER_NAMES.get(given_name, given_name)
    if name == meant:
        kind = 0
    elif _words(given) == _words(field):
        kind = 1
    elif len(meant) > 1 and meant == "".join(word[0] for word in name.split("_") if word):
        kind = 2
    elif name.startswith(meant) or _words(meant) <= _words(name):
        kind = 3
    elif _words(given) <= _words(field):
        kind = 4
    elif _is_abbreviation(meant, name):
        kind = 5
    else:
        kind = 6
    by_name = round(1 - _likeness(meant, name), 1) if kind == 6 else 0
    by_section = 1 - _likeness(given_section, section) if given_section else field.count(".")
    return kind, by_name, by_section, -_likeness(given, field), field


def _words(name: str) -> set[str]:
    words = re.split(r"[._]", name)
    return {part for word in words for part in _OTHER_NAMES.get(word, word).split("_") if part}


def _is_abbreviation(short: str, name: str) -> bool:
    """Whether the letters of `short` stand in `name` in their order, from its first letter on."""
    letters = iter(name)
    return len(short) > 1 and short[0] == name[0] and all(letter in letters for letter in short)


def _likeness(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other).ratio()
