"""Benchmarks: what a training step or an RL iteration costs here, beside what the device can do, in the same run.

    python -m experiments.benchmark --config=configs/benchmark.py:cpu_14m [--config.train.batch_size=8]
    python -m experiments.benchmark --config=configs/benchmark.py:rl

Prints tokens/s, achieved FLOP/s over a measured matmul peak (and over the published peak where the chip is known),
memory, and compile time; of RL, the split between rollout, scoring and updates, and decode against memory bandwidth.
"""

import dataclasses
import resource
import statistics
import time
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from experiments.shared import benchmark_rl, cli
from jaxgpt import partition, tree
from jaxgpt.config import check_bounds
from jaxgpt.models import decoder
from jaxgpt.objectives.next_token import make_next_token
from jaxgpt.objectives.ppo import PPOConfig
from jaxgpt.partition import DEFAULT_RULES
from jaxgpt.rl.rollout import RolloutConfig
from jaxgpt.train.config import PretrainConfig, check_mesh
from jaxgpt.train.optimizer import make_optimizer
from jaxgpt.train.step import init_state, make_train_step
from jaxgpt.train.throughput import peak_flops, training_flops_per_token
from jaxgpt.types import LMBatch


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig:
    """what: a step of `train`, or an iteration of `rl` with models of train.model. num_steps: timed repetitions, of which
    medians are printed. rollout, ppo: of `rl`. mean_length: of its responses, roughly, by as many EOS ids as that takes of
      a model that was not trained; 0: all have rollout.max_new_tokens.
    """

    what: Literal["train", "rl"] = "train"
    num_steps: int = 8
    train: PretrainConfig = PretrainConfig()
    rollout: RolloutConfig = RolloutConfig()
    ppo: PPOConfig = PPOConfig(num_minibatches=4)
    mean_length: int = 0

    def __post_init__(self):
        check_bounds(self, "", num_steps=1, mean_length=0)


def main(config: BenchmarkConfig, workdir: str) -> None:
    """Print the table."""
    del workdir
    if config.what == "rl":
        table = benchmark_rl.rows(config.train, config.rollout, config.ppo, config.num_steps, config.mean_length)
    else:
        table = training_rows(config)
    for name, value in [
        ("device", f"{jax.device_count()} x {jax.devices()[0].device_kind}, jax {jax.__version__}"),
        *table,
    ]:
        print(f"{name:<28} {value}")


def training_rows(config: BenchmarkConfig) -> list[tuple[str, str]]:
    """The table of one training step."""
    train = config.train
    mesh = partition.make_mesh(train.mesh, train.dcn_mesh)
    check_mesh(train, train.model, mesh)
    optimizer = make_optimizer(train.optimizer, train.num_train_steps)
    state, frozen, shardings = init_state(
        lambda rng: decoder.init_params(train.model, rng), optimizer, jax.random.key(0), mesh, DEFAULT_RULES
    )
    parameters = tree.count(state.params)
    step = make_train_step(
        make_next_token(train.model, train.loss), optimizer, mesh, DEFAULT_RULES,
        shardings=shardings, accum=train.gradient_accumulation_steps,
    )  # fmt: skip
    rows = partition.local_rows(mesh, train.batch_size)
    batch = partition.to_global(jax.tree.map(lambda x: x[rows], random_batch(train)), mesh, train.batch_size)

    started = time.perf_counter()
    compiled = step.lower(state, frozen, batch).compile()
    compile_seconds = time.perf_counter() - started

    state, metrics = compiled(state, frozen, batch)
    jax.block_until_ready(metrics)
    seconds = []
    for _ in range(config.num_steps):
        started = time.perf_counter()
        state, metrics = compiled(state, frozen, batch)
        jax.block_until_ready(metrics)
        seconds.append(time.perf_counter() - started)

    tokens = train.batch_size * train.data.sequence_length
    rate = tokens / statistics.median(seconds)
    per_token = training_flops_per_token(train.model, train.data.sequence_length)
    flops, full = rate * per_token.causal / jax.device_count(), rate * per_token.full / jax.device_count()
    dtype = decoder.compute_dtype(train.model)
    measured = matmul_flops(dtype)
    published = peak_flops(jax.devices()[0])
    return [
        ("model", f"{parameters:,} parameters, {jnp.dtype(dtype).name}, {tokens:,} tokens per step"),
        ("step time", f"{statistics.median(seconds):.4f} s (min {min(seconds):.4f}, max {max(seconds):.4f})"),
        ("throughput", f"{rate:,.0f} tokens/s"),
        ("model FLOP/s per device", f"{flops / 1e9:,.1f} GFLOP/s"),
        ("matmul peak, measured", f"{measured / 1e9:,.1f} GFLOP/s"),
        ("share of the measured peak", f"{flops / measured:.1%}"),
        ("MFU, published peak", f"{flops / published:.1%}" if published else "unknown chip"),
        ("  attention unmasked", f"{full / published:.1%}" if published else "unknown chip"),
        ("compile time", f"{compile_seconds:.1f} s"),
        *memory_rows(compiled),
    ]


def random_batch(config: PretrainConfig) -> LMBatch:
    """A global batch of random tokens, one full segment per row."""
    rows, length = config.batch_size, config.data.sequence_length
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, (rows, length + 1)).astype(np.int32)
    return LMBatch(
        tokens_BT=tokens[:, :-1],
        targets_BT=tokens[:, 1:],
        weights_BT=np.ones((rows, length), np.float32),
        segments_BT=np.ones((rows, length), np.int32),
        positions_BT=np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
    )


def matmul_flops(dtype: jnp.dtype) -> float:
    """The best FLOP/s of one device over some square products of this dtype."""
    best = 0.0
    for size in (1024, 2048) if jax.default_backend() == "cpu" else (4096, 8192):
        a = jax.random.normal(jax.random.key(0), (size, size), dtype)
        product = jax.jit(jnp.matmul)
        product(a, a).block_until_ready()
        for _ in range(5):
            started = time.perf_counter()
            product(a, a).block_until_ready()
            best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best


def memory_rows(compiled) -> list[tuple[str, str]]:
    """What the compiled step needs, and the most that was in use."""
    analysis = compiled.memory_analysis()
    rows = [("temporaries of the step", f"{analysis.temp_size_in_bytes / 2**30:.2f} GiB")] if analysis else []
    stats = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        rows.append(("peak device memory", f"{stats['peak_bytes_in_use'] / 2**30:.2f} GiB"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return [*rows, ("peak host memory", f"{peak / 2**30:.2f} GiB")]


if __name__ == "__main__":
    cli.run(main, BenchmarkConfig, default_config="configs/benchmark.py", needs_workdir=False)
