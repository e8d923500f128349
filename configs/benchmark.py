"""Benchmarks, measured in one run on whatever device there is.

    python -m experiments.benchmark --config=configs/benchmark.py:cpu_14m

Presets name a pretraining preset of configs/pretrain.py whose step is timed on random tokens: `cpu_14m` (the default;
two minutes on two CPU cores), `gpt2_124m`, `llama3_1b` (an accelerator with 80 GB). `rl` times an iteration of PPO with
the models of the quickstart; --config.what=rl does it with those of any preset.
"""

from ml_collections import ConfigDict

from configs import pretrain


def get_config(preset: str = "cpu_14m") -> ConfigDict:
    """The preset's training configuration under `train`, and how long to measure."""
    if preset == "rl":
        train = pretrain.get_config("quickstart").to_dict()
        train["model"]["vocab_size"] = 2048
        return ConfigDict({"what": "rl", "num_steps": 3, "train": ConfigDict(train)})
    train = pretrain.get_config(preset)
    small = {} if preset == "cpu_14m" else {"batch_size": 8, "gradient_accumulation_steps": 1}
    return ConfigDict({"what": "train", "num_steps": 8, "train": ConfigDict(train.to_dict() | small)})
