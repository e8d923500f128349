"""Fewer rows than prompts: a slot whose response has ended takes the next prompt, all within one jitted loop.

Axes: B prompts, W slots (the rows that are decoded), P prompt, S = P + R.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from jaxgpt.generate.rows import Responses, Rows
from jaxgpt.models import decoder
from jaxgpt.models.config import ModelConfig
from jaxgpt.types import Array


class _Loop(struct.PyTreeNode):
    """slots: W rows. prompt_W: i32, the prompt each slot answers or answered last; B where it had none."""

    slots: Rows
    prompt_W: Array
    is_waiting_B: Array
    responses: Responses


def answer_in_slots(cfg: ModelConfig, pool: Rows, extend: Callable[[Rows], Rows], num_slots: int) -> Responses:
    """The responses to all prompts of a pool, of which num_slots at a time are decoded.

    A prompt that has ended with its first token never takes a slot. A prompt is copied once, into its slot, so the cache
    of the pool needs no room for responses.

    Args:
      cfg: static.
      pool: the prompts after their first token, with P cache slots each.
      extend: from `rows.make_draw_and_extend`.
      num_slots: static; less than B.
    """
    batch, max_new = pool.responses.tokens_BR.shape
    pool = pool.replace(step=jnp.broadcast_to(pool.step, batch))

    def has_turn(state: _Loop) -> Array:
        return jnp.any(state.is_waiting_B) & ~jnp.all(state.slots.is_live_B)

    def refill(state: _Loop) -> _Loop:
        slot, prompt = jnp.argmin(state.slots.is_live_B), jnp.argmax(state.is_waiting_B)
        return _Loop(
            slots=_load(state.slots, slot, pool, prompt),
            prompt_W=state.prompt_W.at[slot].set(prompt),
            is_waiting_B=state.is_waiting_B.at[prompt].set(False),
            responses=_put(state.responses, state.prompt_W[slot], _take(state.slots.responses, slot)),
        )

    def step(state: _Loop) -> _Loop:
        state = lax.while_loop(has_turn, refill, state)
        old, new = state.slots, extend(state.slots)
        new = new.replace(
            # A slot that has nothing left to do stands still, so that it never leaves a table of positions.
            step=jnp.where(old.is_live_B, new.step, old.step),
            position_B=jnp.where(old.is_live_B, new.position_B, old.position_B),
            is_live_B=new.is_live_B & (new.step < max_new),
        )
        return state.replace(slots=new)

    end = lax.while_loop(
        lambda state: jnp.any(state.is_waiting_B) | jnp.any(state.slots.is_live_B),
        step,
        _Loop(
            slots=_empty_slots(cfg, pool, num_slots),
            prompt_W=jnp.full(num_slots, batch, jnp.int32),
            is_waiting_B=pool.is_live_B & (pool.step < max_new),
            responses=pool.responses,
        ),
    )
    return _put(end.responses, end.prompt_W, end.slots.responses)


def _empty_slots(cfg: ModelConfig, pool: Rows, num_slots: int) -> Rows:
    """Slots that wait for a prompt. What they hold means nothing yet."""
    max_new = pool.responses.tokens_BR.shape[1]
    cache = decoder.init_cache(cfg, num_slots, pool.cache.segments_BS.shape[1] + max_new)
    rows = jax.tree.map(lambda x: x[:num_slots], pool.replace(cache=None))
    return rows.replace(cache=cache, is_live_B=jnp.zeros(num_slots, bool))


def _load(slots: Rows, slot: Array, pool: Rows, prompt: Array) -> Rows:
    """The slots with a prompt's row of the pool in one of them."""
    old, new = slots.cache, pool.cache
    room = old.segments_BS.shape[1] - new.segments_BS.shape[1]
    longer = lambda x_BP: jnp.pad(_take(x_BP, prompt), ((0, room)))  # segment 0 hides what the slot held before
    start = (0, slot, 0, 0, 0)
    cache = decoder.KVCache(
        k_LBKSH=lax.dynamic_update_slice(old.k_LBKSH, jnp.take(new.k_LBKSH, prompt[None], axis=1), start),
        v_LBKSH=lax.dynamic_update_slice(old.v_LBKSH, jnp.take(new.v_LBKSH, prompt[None], axis=1), start),
        positions_BS=_put(old.positions_BS, slot, longer(new.positions_BS)),
        segments_BS=_put(old.segments_BS, slot, longer(new.segments_BS)),
        index_B=_put(old.index_B, slot, _take(new.index_B, prompt)),
    )
    rows = _put(slots.replace(cache=None), slot, _take(pool.replace(cache=None), prompt))
    return rows.replace(cache=cache)


def _take(rows, index: Array):
    """One row of every leaf."""
    return jax.tree.map(lambda x: jnp.take(x, index, axis=0), rows)


def _put(rows, index: Array, new):
    """`rows` with rows replaced; an index beyond them drops its row."""
    return jax.tree.map(lambda x, new: x.at[index].set(new, mode="drop"), rows, new)
