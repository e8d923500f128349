"""Searches over fields of a pipeline's stages.

    python -m experiments.sweep --config=configs/sweep.py:PRESET --workdir=runs/sweep --config.num_processes=2

Presets:

  grpo         a grid over GRPO's learning rate and KL coefficient on sums (configs/arithmetic.py), by the accuracy on
               held-out sums; the data, tokenizer, pretraining and SFT of its nine trials are run once. The default.
  pretrain     sixteen random trials of pretraining's learning rate, weight decay and batch size there, by held-out loss.

A field is searched in, or set for all trials by a list of one value, as
--config.search.grpo.optimizer.learning_rate=[1e-4,1e-3] or --config.search.grpo.num_train_steps=[100]. In a config file it is
nested, as here; a ConfigDict takes no dots in its names, a plain dict does: {"grpo.num_train_steps": [100]}.
"""

from ml_collections import ConfigDict

_PRESETS = {
    "grpo": {
        "search": {"grpo": {"optimizer": {"learning_rate": [1e-4, 3e-4, 1e-3]}, "ppo": {"kl_coef": [0.0, 0.01, 0.05]}}},
        "metric": "grpo.final_metrics.eval/scores",
        "mode": "max",
    },
    "pretrain": {
        "search": {
            "pretrain": {
                "optimizer": {
                    "learning_rate": {"low": 1e-3, "high": 3e-2, "scale": "log"},
                    "weight_decay": {"low": 0.0, "high": 0.2},
                },
                "batch_size": [16, 32, 64],
            }
        },
        "num_trials": 16,
        "metric": "pretrain.final_metrics.eval/loss",
    },
}


def get_config(preset: str = "grpo") -> ConfigDict:
    """The fields that differ from jaxgpt.pipeline.sweep.SweepConfig's defaults."""
    if preset not in _PRESETS:
        raise ValueError(f"configs/sweep.py has no preset {preset!r}; there are {', '.join(_PRESETS)}.")
    return ConfigDict({"pipeline": "configs/arithmetic.py", **_PRESETS[preset]})
