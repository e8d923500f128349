"""Reinforcement learning without a critic: each response is compared with others to the same prompt.

    python -m experiments.grpo --config=configs/grpo.py --workdir=runs/grpo --config.init_from=runs/sft \
        --config.data.train=prompts.jsonl --config.rewards="{'right': {'name': 'numeric_answer'}}"

The same command as experiments.ppo, with the presets of configs/grpo.py.
"""

import functools

from experiments import ppo
from experiments.shared import cli
from jaxgpt.rl.config import RLConfig

main = functools.partial(ppo.main, name="grpo")

if __name__ == "__main__":
    cli.run(main, RLConfig, default_config="configs/grpo.py")
