"""Held-out metrics from summed evaluation steps."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax

from jaxgpt.types import Metrics, Params


def evaluate(
    eval_step: Callable[[Params, Params, Any], Metrics],
    params: Params,
    frozen: Params,
    batches: Iterable[Any],
    group: str,
) -> dict[str, float]:
    """Metrics over all batches: every sum divided by the total weight, so that ragged batches count by their tokens.

    Returns {group/loss in nats per token, group/perplexity, group/accuracy, group/bits_per_byte, ...}; bits per byte
    are those of the text's UTF-8 bytes, comparable between tokenizers.
    """
    sums: dict[str, float] = {}
    for batch in batches:
        for name, value in jax.device_get(dict(eval_step(params, frozen, batch))).items():
            sums[name] = sums.get(name, 0.0) + float(value)
    weight = sums["weight"]
    if not weight:
        raise ValueError(f"{group}: nothing in the held-out data counts (preferences that are all ties, for instance).")
    metrics = {f"{group}/{name}": sums[name] / weight for name in sums if name not in ("weight", "bytes", "objective")}
    if "log_z" in sums:  # a loss over a vocabulary
        metrics[f"{group}/perplexity"] = math.exp(min(sums["loss"] / weight, 700.0))
    if sums.get("bytes"):
        metrics[f"{group}/bits_per_byte"] = sums["loss"] / math.log(2) / sums["bytes"]
    return metrics
