"""Group advantages in place of a critic.

    python -m experiments.grpo --config=configs/grpo.py:PRESET --workdir=runs/grpo --config.init_from=runs/sft \
        --config.data.train=PROMPTS --config.rewards="{'right': {'name': 'numeric_answer'}}"

Presets:

  grpo        (score - mean) / std of 8 responses to a prompt, k3 KL in the loss (Shao et al. 2024). The default.
  dr_grpo     no division by the std, constant denominator (Liu et al. 2025).
  dapo        token mean, clip-higher 0.28, no KL, groups of equal reward do not count (Yu et al. 2025).
  rloo        leave-one-out baseline, KL in the reward (Ahmadian et al. 2024).
  reinforce   one response per prompt, the batch's mean as baseline, KL in the reward (Williams 1992).
  best_of_n   imitation of the best of 8 responses to a prompt (Dong et al. 2023); experiments.best_of_n keeps them.
"""

from ml_collections import ConfigDict


def get_config(preset: str = "grpo") -> ConfigDict:
    """The fields that differ from jaxgpt.rl.config.RLConfig's defaults."""
    presets = {
        "grpo": {"ppo": {"kl_in": "loss", "kl_estimator": "k3", "kl_coef": 0.04, "aggregation": "sequence"}},
        "dr_grpo": {"group": {"scale": "none"}, "ppo": {"kl_coef": 0.0, "aggregation": "constant"}},
        "dapo": {"group": {"drop_equal": True}, "ppo": {"kl_coef": 0.0, "clip_epsilon_high": 0.28}},
        "rloo": {"group": {"scale": "none", "baseline": "leave_one_out"}},
        "best_of_n": {"group": {"scale": "none", "baseline": "best", "drop_equal": True}, "ppo": {"kl_coef": 0.0}},
        "reinforce": {
            "group": {"scale": "none", "baseline": "batch_mean"}, "rollout": {"num_samples_per_prompt": 1},
        },
    }  # fmt: skip
    if preset not in presets:
        raise ValueError(f"configs/grpo.py has no preset {preset!r}; there are {', '.join(presets)}.")
    config = ConfigDict({
        "advantage": "group",
        "rollout": {"batch_size": 64, "max_prompt_length": 64, "max_new_tokens": 48, "num_samples_per_prompt": 8},
        "ppo": {"num_epochs": 1, "num_minibatches": 4},
        "group": {"scale": "group", "baseline": "mean"},
        "num_train_steps": 100,
        "log_interval_steps": 1,
        "eval_interval_steps": 10,
        "eval_at_start": True,
        "checkpoint": {"save_interval_steps": 10, "keep_best": 1},
        "optimizer": {"learning_rate": 1e-4, "warmup_steps": 0, "weight_decay": 0.0, "schedule": "linear"},
    })  # fmt: skip
    config.update(presets[preset])
    return config
