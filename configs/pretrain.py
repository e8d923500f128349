"""Pretraining: next-token prediction on packed documents.

    python -m experiments.pretrain --config=configs/pretrain.py:PRESET --workdir=DIR \
        --config.data.train=PATH --config.data.tokenizer=TOKENIZER_WORKDIR

Presets:

  tiny               4 layers x 128 on any text; a minute on two CPU cores. The default, and a template to copy.
  shakespeare_char   nanoGPT's CPU setting (config/train_shakespeare_char.py with the README's CPU flags): character
                     vocabulary, 4 layers, 4 heads, 128 wide, 64 characters of context, batch 12, 2,000 steps, no
                     dropout, first 90 % of the text to train. nanoGPT reports a held-out loss of 1.88 nats/character;
                     this gives 1.825 over the whole held-out tenth (1.882 with nanoGPT's learning rate of 1e-3) in
                     four minutes on two CPU cores.
                       python -m experiments.tokenizer --config=configs/tokenizer.py:char --workdir=runs/char \
                           --config.data.train=tinyshakespeare.txt
                       python -m experiments.pretrain --config=configs/pretrain.py:shakespeare_char \
                           --workdir=runs/shakespeare --config.data.train=tinyshakespeare.txt \
                           --config.data.tokenizer=runs/char
  quickstart         what `make quickstart` trains on the standard library's text.
  cpu_14m            a 14M-parameter GPT for CPU measurements (`experiments.benchmark --config.what=train`).
  gpt2_124m          GPT-2 small, 0.5M tokens per update; for one node of GPUs or a TPU slice.
  llama3_1b          a 1B-class Llama 3 in bfloat16, fully sharded.
"""

from ml_collections import ConfigDict

from configs import models


def get_config(preset: str = "tiny") -> ConfigDict:
    """The fields that differ from jaxgpt.train.config.PretrainConfig's defaults, which documents them all."""
    if preset not in _PRESETS:
        raise ValueError(f"configs/pretrain.py has no preset {preset!r}; there are {', '.join(_PRESETS)}.")
    return ConfigDict(_PRESETS[preset]())


def _tiny():
    return {
        "model": models.model_config("tiny"),
        "data": {"sequence_length": 128},
        "batch_size": 16,
        "num_train_steps": 500,
        "log_interval_steps": 10,
        "eval_interval_steps": 100,
        "optimizer": {"learning_rate": 2e-3, "warmup_steps": 50},
        "checkpoint": {"save_interval_steps": 100, "max_to_keep": 2},
    }


def _shakespeare_char():
    return {
        "model": models.model_config("tiny-gpt2") | {"max_seq_length": 64},
        "data": {
            "sequence_length": 64,
            "holdout": {"by": "position", "fraction": 0.1},
            "eval_batches": 0,
        },
        "batch_size": 12,
        "num_train_steps": 2000,
        "log_interval_steps": 10,
        "eval_interval_steps": 250,
        "optimizer": {
            "learning_rate": 2e-3,
            "warmup_steps": 100,
            "final_lr_fraction": 0.1,
            "weight_decay": 0.1,
            "b2": 0.99,
            "max_grad_norm": 1.0,
        },
        "checkpoint": {"save_interval_steps": 500, "max_to_keep": 2},
        "samples": {"prompts": ("\n", "ROMEO:"), "max_new_tokens": 56},
    }


def _quickstart():
    return {
        "model": models.model_config("tiny"),
        "data": {"sequence_length": 128, "packing": "best_fit"},
        "batch_size": 8,
        "num_train_steps": 700,
        "log_interval_steps": 10,
        "eval_interval_steps": 100,
        "optimizer": {
            "name": "muon",
            "learning_rate": 6e-3,
            "schedule": "wsd",
            "decay_fraction": 0.4,
            "warmup_steps": 20,
        },
        "checkpoint": {"save_interval_steps": 100, "max_to_keep": 2},
        "samples": {
            "prompts": ("Return the", "The with statement", "def read(self", "import os\n"),
            "max_new_tokens": 48,
        },
    }


def _cpu_14m():
    return {
        "model": models.model_config("cpu-14m"),
        "data": {"sequence_length": 256},
        "batch_size": 16,
        "num_train_steps": 1000,
        "optimizer": {"learning_rate": 1e-3},
    }


def _gpt2_124m():
    return {
        "model": models.model_config("gpt2-124m"),
        "data": {"sequence_length": 1024, "num_workers": 4},
        "mesh": {"data": 1, "fsdp": -1},
        "batch_size": 512,
        "gradient_accumulation_steps": 4,
        "num_train_steps": 19_073,
        "eval_interval_steps": 500,
        "optimizer": {"learning_rate": 6e-4, "warmup_steps": 700},
        "loss": {"chunk_tokens": 16_384},
        "checkpoint": {"save_interval_steps": 1000, "max_to_keep": 2, "keep_best": 1},
    }


def _llama3_1b():
    return {
        "model": models.model_config("llama3-1b") | {"max_seq_length": 4096},
        "data": {"sequence_length": 4096, "packing": "best_fit", "num_workers": 8},
        "mesh": {"data": 1, "fsdp": -1},
        "batch_size": 256,
        "num_train_steps": 100_000,
        "eval_interval_steps": 1000,
        "optimizer": {"learning_rate": 3e-4, "warmup_steps": 2000, "schedule": "wsd"},
        "loss": {"z_loss": 1e-4, "chunk_tokens": 8192},
        "checkpoint": {"save_interval_steps": 1000, "max_to_keep": 3},
    }


_PRESETS = {
    "tiny": _tiny,
    "shakespeare_char": _shakespeare_char,
    "quickstart": _quickstart,
    "cpu_14m": _cpu_14m,
    "gpt2_124m": _gpt2_124m,
    "llama3_1b": _llama3_1b,
}
