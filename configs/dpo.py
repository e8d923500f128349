"""Direct preference optimization on rankings of responses.

    python -m experiments.dpo --config=configs/dpo.py:PRESET --workdir=runs/dpo --config.init_from=runs/sft \
        --config.data.train=PATH

Presets:

  full   every parameter; the reference is a frozen copy. The default.
  lora   adapters of rank 8 on every linear map; the reference is the base, without a copy.
"""

from ml_collections import ConfigDict


def get_config(preset: str = "full") -> ConfigDict:
    """The fields that differ from experiments.dpo.Config's defaults."""
    presets = {
        "full": {"optimizer": {"learning_rate": 3e-5}},
        "lora": {"optimizer": {"learning_rate": 3e-4}, "lora": {"rank": 8}},
    }
    if preset not in presets:
        raise ValueError(f"configs/dpo.py has no preset {preset!r}; there are {', '.join(presets)}.")
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
