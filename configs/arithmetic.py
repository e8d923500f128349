"""Reinforcement learning from an exact verifier, from nothing: careless demonstrations of sums, then rewards for right ones.

    python -m experiments.pipeline --config=configs/arithmetic.py --workdir=runs/arithmetic

A model of 0.5M parameters reads sums of two numbers below 100. It is then shown how to answer by someone who forgets six
carries of ten, and does so, too, until it is rewarded for right answers. A tenth of the sums is held out from all stages;
eval/scores of the stages grpo and ppo is the accuracy on them, sampled at temperature 1, and the stages accuracy_* have it
for greedy answers. With three seeds it went from 0.31, 0.47 and 0.52 to at least 0.955, in about nine minutes on two CPU
cores for all of it; docs/reinforcement_learning.md has the table.
"""

from ml_collections import ConfigDict

_MODEL = {"num_layers": 2, "embed_dim": 128, "num_heads": 4, "mlp_dim": 384, "max_seq_length": 64}
_RL = {
    "init_from": "@sft",
    "data": {"train": "@data/rl_train.jsonl", "eval": "@data/eval.jsonl"},
    "rewards": {"right": {"name": "exact_match"}},
    "rollout": {"batch_size": 256, "max_prompt_length": 12, "max_new_tokens": 5},
    "ppo": {"num_epochs": 2, "num_minibatches": 2, "kl_coef": 0.0},
    "num_eval_prompts": 512,
    "num_train_steps": 400,
    "log_interval_steps": 5,
    "eval_interval_steps": 100,
    "checkpoint": {"save_interval_steps": 100},
}
# Seeds ended at 0.31 to 0.52 before, and at 0.955 to 0.998 after; the rest is room for others.
_EXPECT = ("first.eval/scores.low < 0.7", "final_metrics.eval/scores.low > 0.8")
_GREEDY = {"sft": "low < 0.7", "grpo": "low > 0.8", "ppo": "low > 0.8"}


def _accuracy(stage: str, expected: str) -> dict:
    task = {"kind": "generation", "path": "@data/eval.jsonl", "max_new_tokens": 5}
    return {
        "command": "evaluate",
        "title": f"Accuracy of greedy answers on held-out sums, after {stage}",
        "fields": {"init_from": f"@{stage}", "batch_size": 256, "tasks": {"sums": task}},
        "expect": (f"final_metrics.sums/exact_match.{expected}",),
    }


def get_config() -> ConfigDict:
    """The fields that differ from jaxgpt.pipeline.graph.PipelineConfig's defaults."""
    stages = {
        "data": {"command": "make_data", "config": "configs/make_data.py:arithmetic", "title": "Data: sums"},
        "tokenizer": {
            "command": "tokenizer",
            "config": "configs/tokenizer.py:char",
            "fields": {"data": {"train": "@data/corpus.jsonl", "holdout": {"by": "hash", "fraction": 0.0}}},
        },
        "pretrain": {
            "command": "pretrain",
            "title": "Pretraining on sums as text",
            "fields": {
                "model": _MODEL,
                "data": {
                    "train": "@data/corpus.jsonl", "eval": "@data/eval.jsonl", "tokenizer": "@tokenizer",
                    "sequence_length": 64, "packing": "best_fit",
                },
                "optimizer": {"name": "muon", "learning_rate": 6e-3},
                "batch_size": 32,
                "num_train_steps": 1000,
            },
        },
        "sft": {
            "command": "sft",
            "title": "Supervised fine-tuning on demonstrations that forget carries",
            "fields": {
                "init_from": "@pretrain",
                "data": {"train": "@data/sft_train.jsonl", "eval": "@data/eval.jsonl", "sequence_length": 64},
                "batch_size": 32,
                "num_epochs": 0.0,
                "num_train_steps": 300,
                "optimizer": {"learning_rate": 1e-3},
                "samples": {"max_new_tokens": 5},
            },
        },
        "grpo": {
            "command": "grpo",
            "title": "GRPO: four answers to each sum, compared with each other",
            "fields": {
                **_RL,
                "rollout": {**_RL["rollout"], "num_samples_per_prompt": 4},
                "group": {"drop_equal": True},  # else the steps shrink as most groups come to be all right
                "optimizer": {"learning_rate": 2e-4, "warmup_steps": 20},
            },
            "expect": _EXPECT,
        },
        "ppo": {
            "command": "ppo",
            "title": "PPO: a critic that starts as the policy",
            "fields": {
                **_RL,
                "critic_init": "policy",
                "optimizer": {"learning_rate": 2e-4, "warmup_steps": 20},
                "critic_optimizer": {"learning_rate": 1e-3, "warmup_steps": 20},
            },
            "expect": _EXPECT,
        },
        **{f"accuracy_{name}": _accuracy(name, expected) for name, expected in _GREEDY.items()},
    }  # fmt: skip
    return ConfigDict({"stages": stages})
