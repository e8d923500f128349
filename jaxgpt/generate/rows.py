"""Rows that are being answered: what is known of each, and one more token for all of them. Pure and jittable."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from jaxgpt.generate.samplers import SamplerConfig, sample
from jaxgpt.models import decoder
from jaxgpt.models.config import ModelConfig
from jaxgpt.types import Array, Params


class Responses(struct.PyTreeNode):
    """What has been drawn so far; see `loop.Generation`."""

    tokens_BR: Array
    mask_BR: Array
    logprobs_BR: Array
    has_eos_B: Array


class Rows(struct.PyTreeNode):
    """The rows of one cache.

    step: i32, tokens drawn so far; a scalar where all rows go in step, else [B]. key_B: token t of a row is drawn with
    fold_in(key, t). position_B: of the token drawn last. seen_BV: bool; None where no penalty needs it.
    """

    step: Array
    key_B: Array
    cache: decoder.KVCache
    is_live_B: Array
    position_B: Array
    seen_BV: Array | None
    responses: Responses


def make_draw_and_extend(
    cfg: ModelConfig, params: Params, sampler: SamplerConfig, *, eos_ids: tuple[int, ...], pad_id: int
) -> tuple[Callable[[Rows, Array], Rows], Callable[[Rows], Rows]]:
    """(draw(rows, x_BD), extend(rows)): rows with one more token each; rows that have ended get padding.

    draw takes the token from the hidden states x_BD of the tokens before; extend computes those, with the cache.
    """
    head = decoder.head_params(cfg, params)

    def draw(rows: Rows, x_BD: Array) -> Rows:
        key_now_B = jax.vmap(jax.random.fold_in, in_axes=(0, 0 if rows.step.ndim else None))(rows.key_B, rows.step)
        token_B, logprob_B = sample(key_now_B, decoder.logits(cfg, head, x_BD), rows.seen_BV, sampler)
        is_live_B, seen_BV, out = rows.is_live_B, rows.seen_BV, rows.responses
        is_eos_B = is_live_B & jnp.isin(token_B, jnp.array(eos_ids, jnp.int32))
        token_B = jnp.where(is_live_B, token_B, pad_id)
        return rows.replace(
            step=rows.step + 1,
            is_live_B=is_live_B & ~is_eos_B,
            position_B=rows.position_B + 1,
            seen_BV=None if seen_BV is None else seen_BV.at[jnp.arange(len(token_B)), token_B].set(True),
            responses=Responses(
                tokens_BR=_write(out.tokens_BR, rows.step, token_B),
                mask_BR=_write(out.mask_BR, rows.step, is_live_B.astype(jnp.float32)),
                logprobs_BR=_write(out.logprobs_BR, rows.step, jnp.where(is_live_B, logprob_B, 0.0)),
                has_eos_B=out.has_eos_B | is_eos_B,
            ),
        )

    def extend(rows: Rows) -> Rows:
        token_B1 = _read(rows.responses.tokens_BR, rows.step - 1)
        segment_B1 = rows.is_live_B[:, None].astype(jnp.int32)  # a row that has ended writes padding
        x_B1D, cache = decoder.decode(cfg, params, token_B1, segment_B1, rows.position_B[:, None], rows.cache)
        return draw(rows.replace(cache=cache), x_B1D[:, 0])

    return draw, extend


def _read(x_BR: Array, step: Array) -> Array:
    """One column, [B, 1]: the same of all rows, or each row's own."""
    if step.ndim:
        return jnp.take_along_axis(x_BR, step[:, None], axis=1)
    return lax.dynamic_slice_in_dim(x_BR, step, 1, axis=1)


def _write(x_BR: Array, step: Array, new_B: Array) -> Array:
    """x_BR with one column written: the same of all rows, or each row's own; none where it is beyond the last."""
    if step.ndim:  # vmap tells the partitioner that rows stay apart
        return jax.vmap(lambda x_R, step, new: x_R.at[step].set(new, mode="drop"))(x_BR, step, new_B)
    return x_BR.at[:, step].set(new_B)
