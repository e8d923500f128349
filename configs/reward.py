"""Reward models from rankings of responses.

    python -m experiments.reward --config=configs/reward.py:PRESET --workdir=runs/reward --config.init_from=runs/sft \
        --config.data.train=PATH

Presets:

  full   every parameter, one epoch: reward models overfit soon (Stiennon et al. 2020). The default.
  lora   adapters of rank 8 on every linear map, and the new head.
  quickstart  what `make quickstart` uses.

Anthropic's HH files are read as they are: --config.data.train=hh_harmless.jsonl.gz.
"""

from ml_collections import ConfigDict


def get_config(preset: str = "full") -> ConfigDict:
    """The fields that differ from experiments.reward.Config's defaults."""
    presets = {
        "full": {"optimizer": {"learning_rate": 1e-4}},
        "lora": {"optimizer": {"learning_rate": 1e-3}, "lora": {"rank": 8}},
        "quickstart": {"optimizer": {"learning_rate": 5e-4}, "data": {"sequence_length": 96, "eval_batches": 0}},
    }
    if preset not in presets:
        raise ValueError(f"configs/reward.py has no preset {preset!r}; there are {', '.join(presets)}.")
    common = {
        "data": {"sequence_length": 256, "packing": "none", "holdout": {"fraction": 0.1}},
        "batch_size": 16,
        "num_epochs": 1.0,
        "log_interval_steps": 5,
        "eval_interval_steps": 50,
        "eval_at_start": True,
        "checkpoint": {"save_interval_steps": 50},
    }
    config = ConfigDict(common)
    config.update(presets[preset])
    config.optimizer.warmup_steps = 10
    return config
