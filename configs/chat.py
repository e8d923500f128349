"""Chat: a conversation in the terminal with what a run has made, in the chat template it was trained with.

    python -m experiments.chat --config=configs/chat.py:PRESET --config.init_from=runs/sft \
        [--config.system="Answer in one word."]

Presets:

  sample     temperature 0.8 among the 50 most probable tokens. The default.
  greedy     always the most probable token.

Each turn costs its new tokens alone: what was said before stays in the KV cache. /help lists the commands.
"""

from ml_collections import ConfigDict

_SAMPLERS = {"sample": {"temperature": 0.8, "top_k": 50}, "greedy": {"temperature": 0.0}}


def get_config(preset: str = "sample") -> ConfigDict:
    """The fields that differ from experiments.chat.ChatConfig's defaults."""
    if preset not in _SAMPLERS:
        raise ValueError(f"configs/chat.py has no preset {preset!r}; there are {', '.join(_SAMPLERS)}.")
    return ConfigDict({"sampler": _SAMPLERS[preset]})
