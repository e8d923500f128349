"""Generation: what a trained model writes after a prompt, or after each prompt of a file.

    python -m experiments.generate --config=configs/generate.py:PRESET --config.init_from=runs/gpt \
        --config.prompt="Once upon a time" [--config.show_probabilities=10]

    python -m experiments.generate --config.init_from=runs/gpt --config.prompts_file=prompts.jsonl \
        --config.output=responses.jsonl

Presets:

  sample     temperature 0.8 among the 50 most probable tokens. The default.
  greedy     always the most probable token.
  nucleus    temperature 1 within the nucleus of probability 0.95 (Holtzman et al. 2020).

Costs one pass over the prompts and one small step per new token: seconds on a CPU for the tiny models. The same seed
gives the same texts, whatever the batch size.
"""

from ml_collections import ConfigDict

_SAMPLERS = {
    "sample": {"temperature": 0.8, "top_k": 50},
    "greedy": {"temperature": 0.0},
    "nucleus": {"top_p": 0.95},
}


def get_config(preset: str = "sample") -> ConfigDict:
    """The fields that differ from experiments.generate.GenerateConfig's defaults."""
    if preset not in _SAMPLERS:
        raise ValueError(f"configs/generate.py has no preset {preset!r}; there are {', '.join(_SAMPLERS)}.")
    return ConfigDict({"sampler": _SAMPLERS[preset]})
