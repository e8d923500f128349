r"""Evaluation of a trained model: perplexity, multiple choice, generation, win-rates, report cards.

    python -m experiments.evaluate --config=configs/evaluate.py:PRESET --workdir=runs/eval --config.init_from=runs/sft \
        --config.tasks="{'text': {'kind': 'perplexity', 'path': 'heldout.txt'}}"

Presets, of which all but the first have their task already, so that only its files are left to name:

  tasks        none; --config.tasks gives them all. The default.
  perplexity   of texts: --config.tasks.text.path=heldout.txt
  choice       multiple choice: --config.tasks.choice.path=quiz.jsonl
  gsm8k        grade-school arithmetic (Cobbe et al. 2021, arXiv:2110.14168), five shots, the number after "####":
               --config.tasks.gsm8k.path=test.jsonl --config.tasks.gsm8k.shots=train.jsonl
  win_rate     --config.tasks.win_rate.path=prompts.jsonl --config.baseline=runs/sft --config.judge=runs/reward
  report_card  of a reward model: --config.tasks.report_card.path=preferences.jsonl

Perplexity costs one forward pass over the text, max_seq_length / stride of them where documents are longer than that (two
by default); multiple choice one per choice, generation what experiments.generate costs: seconds to minutes on a CPU for
the tiny models and some hundred records.
"""

from ml_collections import ConfigDict

_TASKS = {
    "tasks": {},
    "perplexity": {"text": {"kind": "perplexity"}},
    "choice": {"choice": {"kind": "multiple_choice"}},
    "gsm8k": {
        "gsm8k": {
            "kind": "generation",
            "fields": {"prompt": "question"},
            "metrics": {"numeric_answer": {"name": "numeric_answer"}},
            "num_shots": 5,
            "max_new_tokens": 256,
        }
    },
    "win_rate": {"win_rate": {"kind": "win_rate"}},
    "report_card": {"report_card": {"kind": "report_card"}},
}


def get_config(preset: str = "tasks") -> ConfigDict:
    """The fields that differ from experiments.evaluate.Config's defaults."""
    if preset not in _TASKS:
        raise ValueError(f"configs/evaluate.py has no preset {preset!r}; there are {', '.join(_TASKS)}.")
    return ConfigDict({"tasks": _TASKS[preset]})
