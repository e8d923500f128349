r"""Supervised fine-tuning on conversations, with the loss on the responses.

    python -m experiments.sft --config=configs/sft.py:PRESET --workdir=runs/sft --config.init_from=runs/gpt \
        --config.data.train=PATH

Presets:

  full   every parameter, three epochs. The default.
  lora   adapters of rank 8 on every linear map; ten times the learning rate (Schulman et al. 2025, LoRA Without Regret).
  quickstart  what `make quickstart` uses.

Other names in the records are mapped by data.fields, also with paths and texts between:

    GSM8K          --config.data.fields="{'prompt': 'question', 'response': 'answer'}"
    Alpaca seeds   --config.data.fields="{'prompt': '{instruction}\n{instances.0.input}', 'response': 'instances.0.output'}"
"""

from ml_collections import ConfigDict


def get_config(preset: str = "full") -> ConfigDict:
    """The fields that differ from experiments.sft.Config's defaults."""
    presets = {
        "full": {"optimizer": {"learning_rate": 3e-4}},
        "lora": {"optimizer": {"learning_rate": 3e-3}, "lora": {"rank": 8}},
        "quickstart": {"optimizer": {"learning_rate": 1e-3}, "data": {"sequence_length": 128, "eval_batches": 0}},
    }
    if preset not in presets:
        raise ValueError(f"configs/sft.py has no preset {preset!r}; there are {', '.join(presets)}.")
    common = {
        "data": {"sequence_length": 256, "packing": "best_fit", "holdout": {"fraction": 0.05}},
        "batch_size": 16,
        "num_epochs": 3.0,
        "log_interval_steps": 10,
        "eval_interval_steps": 100,
        "eval_at_start": True,
        "checkpoint": {"save_interval_steps": 100},
        "samples": {"num_heldout": 4, "max_new_tokens": 64, "sampler": {"temperature": 0.0}},
    }
    config = ConfigDict(common)
    config.update(presets[preset])
    config.optimizer.warmup_steps = 20
    return config
