"""The benchmarks run, and their shares and rates hang together."""

import re

import numpy as np
import pytest

from experiments import benchmark
from experiments.shared import benchmark_rl
from jaxgpt.data.config import DataConfig
from jaxgpt.models.config import ModelConfig
from jaxgpt.objectives.ppo import PPOConfig
from jaxgpt.rl.rollout import RolloutConfig
from jaxgpt.train.config import PretrainConfig

TRAIN = PretrainConfig(
    model=ModelConfig(vocab_size=64, num_layers=1, embed_dim=16, num_heads=2, mlp_dim=32, max_seq_length=32),
    data=DataConfig(sequence_length=16), batch_size=8,
)  # fmt: skip


def number(text: str) -> float:
    return float(re.search(r"[\d.,]+", text)[0].replace(",", ""))


def test_a_training_step(monkeypatch):
    monkeypatch.setattr(benchmark, "matmul_flops", lambda dtype: 1e9)
    table = dict(benchmark.training_rows(benchmark.BenchmarkConfig(num_steps=2, train=TRAIN)))
    step_time, rate = number(table["step time"]), number(table["throughput"])
    assert rate == pytest.approx(8 * 16 / step_time, rel=0.05)
    assert number(table["share of the measured peak"]) >= 0
    assert {"compile time", "peak host memory", "model"} < table.keys()


def test_an_iteration_of_rl(monkeypatch):
    monkeypatch.setattr(benchmark_rl, "copy_bandwidth", lambda: 1e9)
    rollout = RolloutConfig(batch_size=8, max_prompt_length=8, max_new_tokens=8, num_slots=4)
    table = benchmark_rl.rows(TRAIN, rollout, PPOConfig(num_epochs=1, num_minibatches=2), num_steps=1, mean_length=2)
    assert re.match("8 of [1-4][.][0-9] tokens", dict(table)["responses"])
    assert re.search(" ([1-9]|1[0-4]) steps of 4 rows", dict(table)["decode step"])
    shares = [
        float(re.search(r"\((\d+)%\)", text)[1]) for name, text in table if re.match(r"rollout|scor|log|upd", name)
    ]
    assert sum(shares) == pytest.approx(100, abs=3)


@pytest.mark.parametrize(("num_slots", "steps"), [(1, 15), (2, 11), (6, 8)])
def test_each_response_is_decoded_in_the_slot_that_is_free_first(num_slots, steps):
    assert benchmark_rl.decode_steps([5, 1, 3, 2, 0, 9], num_slots) == steps


def test_a_decode_step_reads_the_weights_and_the_keys_and_values_of_every_slot():
    weights = {"kernel": np.zeros((5, 7), np.float32)}
    assert benchmark_rl.decode_bytes(TRAIN.model, weights, batch=8, length=16) == 4 * (5 * 7 + 2 * 8 * 16 * 16)
