"""From logits to a token: temperature, truncation (top-k, top-p, min-p), repetition penalty, and one draw per row."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from jaxgpt.numerics import token_logprobs
from jaxgpt.types import Array


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    """How the next token is drawn; the defaults are the model's own distribution.

    temperature: logits are divided by it; 0 is greedy, else 1e-6 to 1e6.
    top_k: keep the k most probable tokens, and all that tie with the last of them (Fan et al. 2018,
      arXiv:1805.04833); 0 is off.
    top_p: keep the fewest tokens that hold this probability, most probable first (Holtzman et al. 2020,
      arXiv:1904.09751); 1e-6 to 1, where 1 is off.
    min_p: keep tokens of at least this share of the largest probability (Nguyen et al. 2024, arXiv:2407.01082);
      0 is off.
    repetition_penalty: logits of tokens that occur in the prompt or in what was generated are divided by it where
      positive, multiplied where negative (Keskar et al. 2019, arXiv:1909.05858); 1e-6 to 1e6, where 1 is off.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self):
        # Between 0 and 1e-6 a division could overflow float32, and the distribution is greedy's anyway.
        if self.temperature != 0 and not 1e-6 <= self.temperature <= 1e6:
            raise ValueError(
                f"sampler.temperature must be 0 (greedy) or at least 1e-6, and at most 1e6, not {self.temperature}."
            )
        if not 0 <= self.top_k < 2**31:
            raise ValueError(f"sampler.top_k must be 0 (off) or positive, and below 2**31, not {self.top_k}.")
        # In float32 a smaller number may be 0, which would keep no token at all.
        if not 1e-6 <= self.top_p <= 1:
            raise ValueError(f"sampler.top_p must be between 1e-6 and 1, where 1 is off, not {self.top_p}.")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"sampler.min_p must be in [0, 1], where 0 is off, not {self.min_p}.")
        if not 1e-6 <= self.repetition_penalty <= 1e6:
            raise ValueError(f"sampler.repetition_penalty must be between 1e-6 and 1e6, not {self.repetition_penalty}.")


class RowSamplers(struct.PyTreeNode):
    """A `SamplerConfig` per row, as arrays [B]: rows of one compiled program may be sampled differently."""

    temperature_B: Array
    top_k_B: Array
    top_p_B: Array
    min_p_B: Array
    repetition_penalty_B: Array

    @classmethod
    def stack(cls, configs: Sequence[SamplerConfig]) -> "RowSamplers":
        """The arrays of these samplers: top_k i32, the rest f32."""
        names = [field.name for field in dataclasses.fields(SamplerConfig)]
        dtype = lambda name: np.int32 if name == "top_k" else np.float32
        columns: dict[str, Any] = {
            f"{name}_B": np.array([getattr(config, name) for config in configs], dtype(name)) for name in names
        }
        return cls(**columns)


def warp_logits(logits_BV: Array, seen_BV: Array | None, config: SamplerConfig) -> Array:
    """The logits of the distribution that is sampled from, f32 [B, V]; -inf where a token cannot be drawn.

    Applied in the order of Hugging Face transformers: repetition penalty, temperature, top-k, top-p, min-p, each on
    what the one before left. At least one token is always kept. At temperature 0 only the most probable one is.

    Args:
      logits_BV: any float dtype.
      seen_BV: bool, tokens that the repetition penalty applies to; may be None where the penalty is off.
      config: static.

    Raises:
      ValueError: if seen_BV is None although the repetition penalty is on.
    """
    logits_BV = logits_BV.astype(jnp.float32)
    if config.repetition_penalty != 1:
        if seen_BV is None:
            raise ValueError("sampler.repetition_penalty needs to know the tokens seen so far.")
        penalty = config.repetition_penalty
        penalized_BV = jnp.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty)
        logits_BV = jnp.where(seen_BV, penalized_BV, logits_BV)
    vocab_size = logits_BV.shape[-1]
    if config.temperature == 0:
        is_best_BV = jnp.argmax(logits_BV, axis=-1)[:, None] == jnp.arange(vocab_size)
        return _keep(logits_BV, is_best_BV)
    logits_BV = logits_BV / config.temperature
    if 0 < config.top_k < vocab_size:
        # The minimum, not [:, -1:]: XLA would turn a slice of top_k into a sort of the whole vocabulary.
        least_B1 = jnp.min(lax.top_k(logits_BV, config.top_k)[0], axis=-1, keepdims=True)
        logits_BV = _keep(logits_BV, logits_BV >= least_B1)
    if config.top_p < 1:
        logits_BV = _keep(
            logits_BV,
            _is_in_nucleus(jax.nn.softmax(logits_BV, axis=-1), jnp.full(len(logits_BV), config.top_p, jnp.float32)),
        )
    if config.min_p > 0:
        floor_B1 = jnp.max(logits_BV, axis=-1, keepdims=True) + jnp.log(jnp.float32(config.min_p))
        logits_BV = _keep(logits_BV, logits_BV >= floor_B1)
    return logits_BV


def sample(rng: Array, logits_BV: Array, seen_BV: Array | None, config: SamplerConfig) -> tuple[Array, Array]:
    """One token per row from the distribution of `warp_logits`, and its log-probability under that distribution.

    Args:
      rng: one typed key, folded with the row index, or one key per row [B]. A row's draw depends on its own key and
        logits alone, not on the other rows.
      logits_BV: any float dtype.
      seen_BV: see `warp_logits`.
      config: static.

    Returns:
      token_B: i32. logprob_B: f32; after truncation the truncated distribution's, and 0 at temperature 0.
    """
    warped_BV = warp_logits(logits_BV, seen_BV, config)
    if config.temperature == 0:
        token_B = jnp.argmax(warped_BV, axis=-1)
    else:
        token_B = jax.vmap(jax.random.categorical)(row_keys(rng, len(logits_BV)), warped_BV)
    token_B = token_B.astype(jnp.int32)
    return token_B, token_logprobs(warped_BV, token_B)


def warp_logits_by_row(logits_BV: Array, seen_BV: Array, samplers: RowSamplers) -> Array:
    """`warp_logits` with a sampler per row, f32 [B, V]; truncation that no row asks for is skipped at run time.

    seen_BV: bool, tokens that the repetition penalty applies to.
    """
    penalty_B1, temperature_B1 = samplers.repetition_penalty_B[:, None], samplers.temperature_B[:, None]
    logits_BV = logits_BV.astype(jnp.float32)
    penalized_BV = jnp.where(logits_BV < 0, logits_BV * penalty_B1, logits_BV / penalty_B1)
    logits_BV = jnp.where(seen_BV & (penalty_B1 != 1), penalized_BV, logits_BV)
    vocab_size = logits_BV.shape[-1]
    is_best_BV = jnp.argmax(logits_BV, axis=-1)[:, None] == jnp.arange(vocab_size)
    greedy_BV = _keep(logits_BV, is_best_BV)
    logits_BV = logits_BV / jnp.where(temperature_B1 == 0, 1.0, temperature_B1)

    def where_asked(is_on_B: Array, logits_BV: Array, keep) -> Array:
        truncate = lambda x_BV: _keep(x_BV, keep(x_BV) | ~is_on_B[:, None])
        return lax.cond(jnp.any(is_on_B), truncate, lambda x_BV: x_BV, logits_BV)

    k_B, p_B, min_p_B = samplers.top_k_B, samplers.top_p_B, samplers.min_p_B
    logits_BV = where_asked(
        (k_B > 0) & (k_B < vocab_size), logits_BV, lambda x_BV: x_BV >= _kth_largest(x_BV, k_B)[:, None]
    )
    logits_BV = where_asked(p_B < 1, logits_BV, lambda x_BV: _is_in_nucleus(jax.nn.softmax(x_BV, axis=-1), p_B))
    floor_B1 = jnp.max(logits_BV, axis=-1, keepdims=True) + jnp.log(min_p_B[:, None])  # -inf where min_p is off
    logits_BV = _keep(logits_BV, logits_BV >= floor_B1)
    return jnp.where(temperature_B1 == 0, greedy_BV, logits_BV)


def sample_by_row(key_B: Array, logits_BV: Array, seen_BV: Array, samplers: RowSamplers) -> Array:
    """One token per row from the distribution of `warp_logits_by_row`, i32 [B]: with the same key `sample`'s."""
    warped_BV = warp_logits_by_row(logits_BV, seen_BV, samplers)
    drawn_B = jax.vmap(jax.random.categorical)(key_B, warped_BV)
    return jnp.where(samplers.temperature_B == 0, jnp.argmax(warped_BV, axis=-1), drawn_B).astype(jnp.int32)


def row_keys(rng: Array, batch: int) -> Array:
    """One typed key per row, [B]: `rng` itself where it is that already, else `rng` folded with the row index."""
    return rng if rng.ndim else jax.vmap(jax.random.fold_in, in_axes=(None, 0))(rng, jnp.arange(batch))


def _keep(logits_BV: Array, keep_BV: Array) -> Array:
    return jnp.where(keep_BV, logits_BV, -jnp.inf)


def _is_in_nucleus(probs_BV: Array, top_p_B: Array) -> Array:
    """Tokens with less than top_p of the probability before them, most probable first and then by id: bool [B, V].

    The smallest kept probability is found by bisection over the bits of a float, whose order is that of non-negative
    numbers: 31 masked sums. Sorting the vocabulary takes 20 times as long on a CPU.
    """
    bits_BV = lax.bitcast_convert_type(probs_BV, jnp.int32)

    def decide_bit(i, floor_B):
        higher_B = floor_B | (1 << (30 - i))
        mass_B = jnp.sum(jnp.where(bits_BV >= higher_B[:, None], probs_BV, 0.0), axis=-1)
        return jnp.where(mass_B >= top_p_B, higher_B, floor_B)

    floor_B = lax.fori_loop(0, 31, decide_bit, jnp.zeros(len(probs_BV), jnp.int32))
    is_above_BV = bits_BV > floor_B[:, None]
    is_tie_BV = bits_BV == floor_B[:, None]
    mass_above_B1 = jnp.sum(jnp.where(is_above_BV, probs_BV, 0.0), axis=-1, keepdims=True)
    ties_before_BV = jnp.cumsum(is_tie_BV, axis=-1) - is_tie_BV
    return is_above_BV | (is_tie_BV & (mass_above_B1 + ties_before_BV * probs_BV < top_p_B[:, None]))


def _kth_largest(logits_BV: Array, k_B: Array) -> Array:
    """The k-th largest of each row, f32 [B], for a k that is known at run time only: bisection as in `_is_in_nucleus`.

    Unsigned numbers have the order of floats once the sign bit of the positive ones and all bits of the negative ones
    are flipped.
    """
    sign = jnp.uint32(1 << 31)
    bits_BV = lax.bitcast_convert_type(logits_BV, jnp.uint32)
    bits_BV = jnp.where(bits_BV >= sign, ~bits_BV, bits_BV | sign)

    def decide_bit(i, floor_B):
        higher_B = floor_B | (sign >> i.astype(jnp.uint32))
        count_B = jnp.sum(bits_BV >= higher_B[:, None], axis=-1)
        return jnp.where(count_B >= k_B, higher_B, floor_B)

    floor_B = lax.fori_loop(0, 32, decide_bit, jnp.zeros(len(logits_BV), jnp.uint32))
    return lax.bitcast_convert_type(jnp.where(floor_B >= sign, floor_B ^ sign, ~floor_B), jnp.float32)
