"""PPO against a reward model, held to the SFT model by a KL penalty in the reward.

    python -m experiments.ppo --config=configs/ppo.py:PRESET --workdir=runs/ppo --config.init_from=runs/sft \
        --config.reward_model=runs/reward --config.data.train=PROMPTS

Presets:

  full   policy and critic train every parameter; the critic starts as the reward model. The default.
  lora   adapters of rank 8 for both; the policy's base is also the reference.
  quickstart  what `make quickstart` uses.
"""

from ml_collections import ConfigDict


def get_config(preset: str = "full") -> ConfigDict:
    """The fields that differ from jaxgpt.rl.config.RLConfig's defaults."""
    presets = {
        "full": {"optimizer": {"learning_rate": 1e-4}, "critic_optimizer": {"learning_rate": 3e-4}},
        "lora": {
            "optimizer": {"learning_rate": 1e-3}, "critic_optimizer": {"learning_rate": 1e-3}, "lora": {"rank": 8},
        },
        "quickstart": {
            "optimizer": {"learning_rate": 2e-4}, "critic_optimizer": {"learning_rate": 5e-4},
            "rollout": {"max_new_tokens": 40, "temperature": 0.7},
            "ppo": {"num_epochs": 2, "num_minibatches": 2, "kl_coef": 0.1},
            "num_train_steps": 20, "eval_interval_steps": 20, "num_eval_samples": 8,
        },
    }  # fmt: skip
    if preset not in presets:
        raise ValueError(f"configs/ppo.py has no preset {preset!r}; there are {', '.join(presets)}.")
    config = ConfigDict({
        "rollout": {"batch_size": 64, "max_prompt_length": 64, "max_new_tokens": 48},
        "ppo": {"num_epochs": 4, "num_minibatches": 4, "kl_coef": 0.05},
        "num_train_steps": 100,
        "log_interval_steps": 1,
        "eval_interval_steps": 10,
        "eval_at_start": True,
        "checkpoint": {"save_interval_steps": 10, "keep_best": 1},
    })  # fmt: skip
    config.update(presets[preset])
    for optimizer in (config.optimizer, config.critic_optimizer):
        optimizer.update({"warmup_steps": 0, "weight_decay": 0.0, "schedule": "linear", "eps": 1e-5})
    return config
