"""Tokenizer training.

    python -m experiments.tokenizer --config=configs/tokenizer.py --workdir=runs/tokenizer --config.data.train=PATH

Presets: the default is byte-pair encoding with 8192 pieces; `char` has one piece per character (for nanoGPT's
character-level Shakespeare: 65 characters, 1.000 bytes per token); `quickstart` is what `make quickstart` uses (2048
pieces, 3.1 bytes per token on held-out standard-library text, five seconds on two CPU cores).
"""

from ml_collections import ConfigDict


def get_config(preset: str = "") -> ConfigDict:
    """The fields that differ from experiments.tokenizer.Config's defaults."""
    presets = {
        "": {},
        "char": {
            "tokenizer": {"model_type": "char"},
            "data": {"holdout": {"by": "position", "fraction": 0.1}},
        },
        "quickstart": {"tokenizer": {"vocab_size": 2048, "max_sentences": 20_000}},
    }
    if preset not in presets:
        raise ValueError(f"configs/tokenizer.py has no preset {preset!r}; there are char and quickstart.")
    return ConfigDict(presets[preset])
