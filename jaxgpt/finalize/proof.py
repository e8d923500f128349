"""What a model says to fixed tokens, so that two sets of parameters can be told to be the same."""

import functools
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jaxgpt import partition
from jaxgpt.generate.decode import generate
from jaxgpt.generate.samplers import SamplerConfig
from jaxgpt.models import decoder
from jaxgpt.models.config import ModelConfig
from jaxgpt.partition import DEFAULT_RULES
from jaxgpt.types import Params

ROWS, LENGTH = 4, 32


class Outputs(NamedTuple):
    """logits: f32 [B, T, V], of a reward model its values [B, T]. greedy: i32 [B, R], None for a reward model."""

    logits: np.ndarray
    greedy: np.ndarray | None


def outputs(model: ModelConfig, params: Params, mesh: Mesh) -> Outputs:
    """Logits of fixed random tokens, and what greedy generation writes after the first half of them."""
    length = min(LENGTH, model.max_seq_length)
    tokens_BT = np.random.default_rng(0).integers(0, model.vocab_size, (ROWS, length), np.int32)
    logits = _outputs(model, params, tokens_BT, mesh)
    if model.head != "lm" or length < 2:
        return Outputs(np.asarray(logits), None)
    greedy = _greedy(model, params, tokens_BT[:, : length // 2], length - length // 2, mesh)
    return Outputs(np.asarray(logits), np.asarray(greedy))


def check_reload(meant: Outputs, loaded: Outputs, source: Outputs, *, is_exact: bool) -> dict[str, Any]:
    """The numbers of a proof, for the manifest.

    meant: of the parameters in memory as they were to be stored. loaded: of those read back from the files. source: of the
    model that was finalized, which is_exact says must be the same.

    Raises ValueError where loaded differs from meant at all, or from the source where it must not.
    """
    for what, other in (("the parameters that were written", meant), *([("the source", source)] if is_exact else [])):
        gap = float(np.abs(loaded.logits - other.logits).max())
        if not gap == 0:  # nan is a difference, too
            raise ValueError(f"The artifact, read back, does not give the logits of {what}: they differ by {gap:.3g}.")
        if loaded.greedy is not None and other.greedy is not None and not np.array_equal(loaded.greedy, other.greedy):
            raise ValueError(f"The artifact, read back, does not generate the tokens of {what}.")
    proof = {
        "logits_equal_reloaded": True,
        "max_logit_difference_from_source": float(np.abs(loaded.logits - source.logits).max()),
    }
    if loaded.greedy is not None:
        same = np.mean(loaded.greedy == source.greedy)
        proof |= {"greedy_tokens_equal_reloaded": True, "greedy_tokens_equal_to_source": float(same)}
    return proof


@functools.partial(jax.jit, static_argnums=(0, 3))
def _outputs(model: ModelConfig, params: Params, tokens_BT, mesh: Mesh):
    with partition.activate(mesh, DEFAULT_RULES):
        if model.head == "lm":
            out = decoder.forward(model, params, tokens_BT)
        else:
            out = decoder.values(model, params, decoder.hidden_states(model, params, tokens_BT))
    return jax.lax.with_sharding_constraint(out, partition.replicated(mesh))


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def _greedy(model: ModelConfig, params: Params, prompt_BP, max_new: int, mesh: Mesh):
    sampler = SamplerConfig(temperature=0.0)
    with partition.activate(mesh, DEFAULT_RULES):
        mask_BP = jax.numpy.ones_like(prompt_BP)
        out = generate(
            model, params, prompt_BP, mask_BP, jax.random.key(0), max_new=max_new, sampler=sampler, eos_ids=()
        )
    return jax.lax.with_sharding_constraint(out.tokens_BR, partition.replicated(mesh))
