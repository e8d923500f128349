"""Pretraining: raw text in, a GPT out.

    python -m experiments.pretrain --config=configs/pretrain.py:tiny --workdir=runs/gpt \
        --config.data.train=corpus.txt --config.data.tokenizer=runs/tokenizer

The same command again resumes, to the bit. See configs/pretrain.py for presets, jaxgpt/train/config.py for all fields.
"""

import dataclasses
import functools
import math
import os
import shutil

import jax
from absl import logging

from experiments import cli
from jaxgpt import partition, tree
from jaxgpt.config import to_dict
from jaxgpt.data import pipeline
from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.models import decoder
from jaxgpt.objectives.next_token import make_next_token
from jaxgpt.partition import DEFAULT_RULES
from jaxgpt.reporting.report import write_report
from jaxgpt.train import callbacks, step, workdir as workdirs
from jaxgpt.train.checkpoint import Checkpointer
from jaxgpt.train.config import TrainConfig, check_mesh
from jaxgpt.train.evaluation import evaluate
from jaxgpt.train.loop import LoopConfig, train
from jaxgpt.train.optimizer import ema_params, make_optimizer, make_schedule
from jaxgpt.train.throughput import peak_flops, training_flops_per_token


def main(config: TrainConfig, workdir: str) -> None:
    """Train (or resume) the run in `workdir`."""
    tokenizer = Tokenizer.from_dir(config.data.tokenizer)
    config = with_vocabulary(config, tokenizer)
    mesh = partition.make_mesh(config.mesh, config.dcn_mesh)
    check_mesh(config, mesh)
    with workdirs.lock(workdir):
        print(config, to_dict, tree, evaluate)


if __name__ == "__main__":
    cli.run(main, TrainConfig, default_config="configs/pretrain.py")
