"""The loop's own decisions, with steps that cost nothing."""

import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.models.config import ModelConfig
from jaxgpt.train import loop
from jaxgpt.train.config import NonfiniteConfig
from jaxgpt.train.loop import LoopConfig, train
from jaxgpt.train.throughput import TrainingFlops, peak_flops, training_flops_per_token


class Saves:
    """A checkpointer that only remembers."""

    def __init__(self):
        self.saved = []

    def save(self, step, state, meta, metrics):
        self.saved.append((step, state, dict(meta), metrics))

    def wait(self):
        pass


class Log:
    def __init__(self):
        self.rows = {}

    def append(self, step, row):
        assert step not in self.rows
        self.rows[step] = row


class Stop:
    def __init__(self, at=None):
        self.at = at

    def should_stop(self, step):
        return step == self.at


def run(bad=(), action="stop", max_skipped=10, stop_at=None, start=0, meta=None):
    saves, log = Saves(), Log()

    def step(state, frozen, batch):
        assert batch == state, "batch k goes to update k"
        finite = state not in bad
        return state + 1, {"loss": jnp.float32(batch), "finite": jnp.bool_(finite), "weight": jnp.float32(1)}

    config = LoopConfig(10, 2, 4, 3, NonfiniteConfig(action, max_skipped), tokens_per_step=5)
    result = train(
        config, state=start, frozen={}, train_step=step, batches=itertools.count(start),
        evaluate=lambda state, step: {"eval/loss": float(step)}, schedule=lambda step: step / 10, checkpointer=saves,
        metrics_log=log, callbacks=[], stop=Stop(stop_at), start_step=start, meta=meta,
    )  # fmt: skip
    return result, saves.saved, log.rows


def test_logs_evaluations_and_saves_come_at_their_steps():
    (state, step), saves, rows = run()
    assert (state, step) == (10, 10)
    assert list(rows) == [2, 4, 6, 8, 10]
    assert [s for s in rows if "eval/loss" in rows[s]] == [4, 8, 10]
    assert [(s[0], s[1]) for s in saves] == [(3, 3), (6, 6), (9, 9), (10, 10)]
    assert rows[4]["train/loss"] == 3, "the metrics of the fourth update, which read batch 3"
    assert rows[4]["train/learning_rate"] == pytest.approx(0.3)
    assert "train/finite" not in rows[4]


def test_a_save_carries_the_last_evaluation_over_a_restart():
    _, saves, _ = run()
    assert [(s[0], s[3]) for s in saves] == [
        (3, None),
        (6, {"eval/loss": 4}),
        (9, {"eval/loss": 8}),
        (10, {"eval/loss": 10}),
    ]
    _, resumed, rows = run(start=6, meta=saves[1][2])
    assert resumed == saves[2:]
    assert list(rows) == [8, 10]


def test_a_stop_saves_where_it_stops():
    (_, step), saves, _ = run(stop_at=5)
    assert step == 5
    assert [s[0] for s in saves] == [3, 5]


def test_a_stop_before_the_first_step_does_nothing():
    assert run(stop_at=0) == ((0, 0), [], {})
    assert run(stop_at=6, start=6) == ((6, 6), [], {})


def test_the_first_bad_batch_stops_the_run_before_its_checkpoint():
    with pytest.raises(FloatingPointError, match="not finite at step 6"):
        run(bad={5})


def test_bad_batches_are_skipped_up_to_a_bound_that_survives_restarts():
    _, saves, rows = run(bad={1, 6}, action="skip")
    assert rows[10]["train/skipped_batches"] == 2
    assert [s[2]["skipped"] for s in saves] == [1, 1, 2, 2]
    with pytest.raises(FloatingPointError, match=r"2 batches .* nonfinite\.max_skipped=1"):
        run(bad={6}, action="skip", max_skipped=1, start=6, meta=saves[1][2])


def test_flops_per_token_are_palms_for_a_plain_gpt():
    """6 N + 12 L H Q T (Chowdhery et al. 2022, appendix B), here GPT-2 small: N without embeddings but with the head."""
    from configs.models import model_config

    model = ModelConfig(**model_config("gpt2-124m"))
    n = 12 * (4 * 768**2 + 8 * 768**2) + 768 * 50257
    assert training_flops_per_token(model, 1024).full == 6 * n + 12 * 12 * 12 * 64 * 1024
    assert training_flops_per_token(model, 1024).causal == 6 * n + 12 * 12 * 12 * 64 * 1025 / 2
    local = ModelConfig(vocab_size=8, num_layers=2, sliding_window=10, window_pattern=("local", "global"))
    plain = ModelConfig(vocab_size=8, num_layers=2)
    difference = training_flops_per_token(plain, 100).full - training_flops_per_token(local, 100).full
    np.testing.assert_allclose(difference, 12 * 4 * 32 * 90)
    # The queries 1 to 10 of the local layer see 1 to 10 keys, the other 90 see 10: 955 over all; a global layer has 5050.
    difference = training_flops_per_token(plain, 100).causal - training_flops_per_token(local, 100).causal
    np.testing.assert_allclose(difference, 12 * 4 * 32 * (5050 - 955) / 100)


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU7x", 1153.5e12), ("TPU v6 lite", 918e12), ("TPU v5p", 459e12), ("TPU v5 lite", 197e12), ("TPU v4", 275e12),
        ("NVIDIA GB300", 2500e12), ("NVIDIA B300 SXM6 AC", 2250e12), ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H20", 148e12), ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12), ("AMD Instinct MI300X", 1307e12), ("AMD Instinct MI355X", 2516e12), ("cpu", None),
    ],
)  # fmt: skip
def test_the_peak_of_a_chip_is_of_the_chip_and_not_of_another_whose_name_begins_alike(kind, peak):
    assert peak_flops(SimpleNamespace(device_kind=kind)) == peak


def test_both_conventions_of_mfu_are_logged():
    config = LoopConfig(
        10,
        2,
        4,
        3,
        NonfiniteConfig("stop", 1),
        5,
        flops_per_token=TrainingFlops(causal=3.0, full=5.0),
        peak_flops=100.0,
    )
    row = loop._train_row({}, 0.1, 40.0, config)
    share = 40.0 / (100.0 * jax.device_count())
    assert (row["train/mfu"], row["train/mfu_full_attention"]) == pytest.approx((3 * share, 5 * share))
