"""Pipelines: stages, what each is built on, and what is expected of it.

    python -m experiments.pipeline --config=configs/pipeline.py:PRESET --workdir=runs/quickstart

Presets:

  quickstart   from this Python's own library to an aligned assistant; `make quickstart`. The default, and one to copy:
               a field of a stage is overridden as --config.stages.sft.fields.optimizer.learning_rate=1e-3.

Expectations are for what is broken, not for bad luck: the quickstart's held-out sets are small (61 prompts, 182 rankings), so
bounds of intervals are compared, with room (tests/pipeline/test_expectations.py has the chances).

Other pipelines: configs/arithmetic.py.
"""

from ml_collections import ConfigDict


def get_config(preset: str = "quickstart") -> ConfigDict:
    """The fields that differ from jaxgpt.pipeline.graph.PipelineConfig's defaults."""
    if preset != "quickstart":
        raise ValueError(f"configs/pipeline.py has no preset {preset!r}; there is quickstart.")
    compare = {"stages": ("pretrain", "sft", "ppo"), "prompts_file": "@data/rl_eval.jsonl", "num_prompts": 8}
    return ConfigDict({"stages": _quickstart(), "compare": compare})


def _quickstart() -> dict:
    return {
        "data": {
            "command": "make_data",
            "config": "configs/make_data.py:stdlib",
            "title": "Data: the standard library of this Python; a tenth of its packages is held out from all stages",
        },
        "tokenizer": {
            "command": "tokenizer",
            "config": "configs/tokenizer.py:quickstart",
            "title": "Tokenizer: byte-pair encoding, 2048 pieces",
            "fields": {"data": {"train": "@data/corpus.jsonl"}},
        },
        "pretrain": {
            "command": "pretrain",
            "config": "configs/pretrain.py:quickstart",
            "title": "Pretraining: next-token prediction",
            "fields": {"data": {"train": "@data/corpus.jsonl", "tokenizer": "@tokenizer"}},
            "expect": ("final_metrics.eval/loss < 0.9 * reference_lines.unigram entropy",),
        },
        "sft": {
            "command": "sft",
            "config": "configs/sft.py:quickstart",
            "title": "Supervised fine-tuning: questions about functions and classes, answered from their docstrings",
            "fields": {
                "init_from": "@pretrain",
                "data": {"train": "@data/sft_train.jsonl", "eval": "@data/sft_eval.jsonl"},
            },
            "expect": ("final_metrics.eval/loss < 0.9 * first.eval/loss",),
        },
        "reward": {
            "command": "reward",
            "config": "configs/reward.py:quickstart",
            "title": "Reward model: which of three answers is right",
            "fields": {
                "init_from": "@sft",
                "data": {"train": "@data/preferences_train.jsonl", "eval": "@data/preferences_eval.jsonl"},
            },
            "expect": ("report_card.accuracy.low > 0.4",),
        },
        "ppo": {
            "command": "ppo",
            "config": "configs/ppo.py:quickstart",
            "title": "Reinforcement learning: PPO on questions about unseen modules, scored by the reward model",
            "fields": {
                "init_from": "@sft",
                "reward_model": "@reward",
                "data": {"train": "@data/rl_train.jsonl", "eval": "@data/rl_eval.jsonl"},
                "gold": {"f1": {"name": "token_f1"}},
            },
            "expect": (
                "final_metrics.eval/scores.high > first.eval/scores.low",
                "final_metrics.eval/gold.high > 0.9 * first.eval/gold.low",
            ),
        },
        "final": {
            "command": "finalize",
            "config": "configs/finalize.py:int8",
            "title": "Finalization: the policy's weights in int8, read back from the files and compared",
            "fields": {"init_from": "@ppo", "data": {"eval": "@data/sft_eval.jsonl"}},
        },
        "evaluate": {
            "command": "evaluate",
            "config": "configs/evaluate.py:win_rate",
            "title": "Evaluation: how often the reward model prefers the final model to the fine-tuned one",
            "fields": {
                "init_from": "@final",
                "baseline": "@sft",
                "judge": "@reward",
                "tasks": {"win_rate": {"path": "@data/rl_eval.jsonl", "max_new_tokens": 40}},
            },
            "expect": ("final_metrics.win_rate/win_rate.high > 0.4",),
        },
    }
