"""The compiled programs of continuous batching: rows of one KV cache that are filled, extended and emptied separately.

`prefill` writes some tokens of one row, `decode_step` draws one token for every live row. Sampling parameters are arrays, so
that no request compiles anything. The token at position p of a row lies in its cache slot p; what an earlier request left
in later slots is overwritten before any query is late enough to see it.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jax.sharding import Mesh

from jaxgpt import partition
from jaxgpt.generate.samplers import RowSamplers, SamplerConfig, sample_by_row
from jaxgpt.models import decoder
from jaxgpt.models.config import ModelConfig
from jaxgpt.numerics import token_logprobs
from jaxgpt.types import Array, Params

MAX_ALTERNATIVES = 20  # most probable tokens that a row may want at each step


class Draw(struct.PyTreeNode):
    """How rows draw, and how far they are: token t is drawn with the key fold_in(fold_in(key(seed), choice), t).

    seed_B: u32. choice_B: i32. step_B: i32, t of the next token. has_alternatives_B: bool, whether they are wanted.
    """

    samplers: RowSamplers
    seed_B: Array
    choice_B: Array
    step_B: Array
    has_alternatives_B: Array


class EngineState(struct.PyTreeNode):
    """What stays on the devices. token_B: i32, drawn last and not yet in the cache. seen_BV: bool, for the penalty."""

    cache: decoder.KVCache
    draw: Draw
    token_B: Array
    seen_BV: Array


class Drawn(struct.PyTreeNode):
    """What one step gives to the host.

    token_B: i32. logprob_B: f32, under the model itself (temperature 1, nothing truncated). ids_BK, logprobs_BK: its most
    probable tokens, best first; zeros where no row wants them.
    """

    token_B: Array
    logprob_B: Array
    ids_BK: Array
    logprobs_BK: Array


@functools.partial(jax.jit, static_argnums=0, static_argnames=("num_slots", "length", "mesh"))
def init_state(cfg: ModelConfig, *, num_slots: int, length: int, mesh: Mesh) -> EngineState:
    """Empty slots with room for `length` tokens each."""
    with partition.activate(mesh, partition.DEFAULT_RULES):
        samplers = jax.tree.map(jnp.asarray, RowSamplers.stack([SamplerConfig()] * num_slots))
        zeros = lambda dtype: jnp.zeros(num_slots, dtype)  # buffers of their own, so that they may be donated
        draw = Draw(samplers, zeros(jnp.uint32), zeros(jnp.int32), zeros(jnp.int32), zeros(bool))
        cache = decoder.init_cache(cfg, num_slots, length)
        seen_BV = jnp.zeros((num_slots, cfg.vocab_size), bool)
        return _pinned(EngineState(cache, draw, zeros(jnp.int32), seen_BV), mesh)


@functools.partial(jax.jit, static_argnums=0, static_argnames="mesh", donate_argnames="state")
def prefill(
    cfg: ModelConfig, params: Params, state: EngineState, tokens_T: Array, place: Array, seen_V: Array, draw: Draw, *,
    mesh: Mesh,
) -> tuple[EngineState, Drawn]:  # fmt: skip
    """Write tokens of one row into its cache, and draw the token after them.

    Args:
      cfg: static.
      params: plain arrays.
      state: donated.
      tokens_T: i32, padded on the right.
      place: i32 [3]: the row; its tokens that stay in the cache, after which these go; how many of tokens_T are real.
      seen_V: bool, tokens of the whole prompt.
      draw: of this row, B = 1; it replaces the row's.
      mesh: static, where params live.
    """
    row, start, length = place
    with partition.activate(mesh, partition.DEFAULT_RULES):
        index_T = jnp.arange(len(tokens_T), dtype=jnp.int32)
        is_real_T = index_T < length
        # Padding keeps a valid position: one beyond a learned table would put nan into the cache.
        positions_T = jnp.where(is_real_T, start + index_T, 0)
        cache = _take_row(state.cache, row).replace(index_B=start[None])
        x_BTD, cache = decoder.decode(
            cfg, params, tokens_T[None], is_real_T[None].astype(jnp.int32), positions_T[None], cache
        )
        cache = cache.replace(index_B=(start + length)[None])
        drawn, draw, seen_BV = _draw(cfg, params, x_BTD[:, length - 1], draw, seen_V[None])
        put = lambda old, new: lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), row, axis=0)
        state = EngineState(
            cache=_put_row(state.cache, cache, row),
            draw=jax.tree.map(put, state.draw, draw),
            token_B=put(state.token_B, drawn.token_B),
            seen_BV=put(state.seen_BV, seen_BV),
        )
        return _pinned(state, mesh), _replicate(drawn, mesh)


@functools.partial(jax.jit, static_argnums=0, static_argnames="mesh", donate_argnames="state")
def decode_step(
    cfg: ModelConfig, params: Params, state: EngineState, is_live_B: Array, *, mesh: Mesh
) -> tuple[EngineState, Drawn]:
    """Put each live row's last token into the cache and draw its next; other rows stay as they are. state: donated."""
    with partition.activate(mesh, partition.DEFAULT_RULES):
        index_B = state.cache.index_B
        positions_B = jnp.where(is_live_B, index_B, 0)
        x_B1D, cache = decoder.decode(
            cfg, params, state.token_B[:, None], is_live_B[:, None].astype(jnp.int32), positions_B[:, None], state.cache
        )
        cache = cache.replace(index_B=jnp.where(is_live_B, cache.index_B, index_B))
        # A row that waits between two parts of its prompt has its draw set anew by the next.
        drawn, draw, seen_BV = _draw(cfg, params, x_B1D[:, 0], state.draw, state.seen_BV)
        return _pinned(EngineState(cache, draw, drawn.token_B, seen_BV), mesh), _replicate(drawn, mesh)


def _draw(cfg: ModelConfig, params: Params, x_BD: Array, draw: Draw, seen_BV: Array) -> tuple[Drawn, Draw, Array]:
    """One token per row from its hidden state; the rows' Draw and the tokens seen after it."""

    def key(seed, choice, step):
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), choice), step)

    logits_BV = decoder.logits(cfg, decoder.head_params(cfg, params), x_BD)
    key_B = jax.vmap(key)(draw.seed_B, draw.choice_B, draw.step_B)
    token_B = sample_by_row(key_B, logits_BV, seen_BV, draw.samplers)
    count = min(MAX_ALTERNATIVES, cfg.vocab_size)
    nothing = jnp.zeros((len(x_BD), count), jnp.float32), jnp.zeros((len(x_BD), count), jnp.int32)

    def best() -> tuple[Array, Array]:
        logits_BK, ids_BK = lax.top_k(logits_BV, count)
        return logits_BK - jax.nn.logsumexp(logits_BV, axis=-1, keepdims=True), ids_BK

    logprobs_BK, ids_BK = lax.cond(jnp.any(draw.has_alternatives_B), best, lambda: nothing)
    seen_BV = seen_BV.at[jnp.arange(len(x_BD)), token_B].set(True)
    drawn = Drawn(token_B, token_logprobs(logits_BV, token_B), ids_BK, logprobs_BK)
    return drawn, draw.replace(step_B=draw.step_B + 1), seen_BV


def _take_row(cache: decoder.KVCache, row: Array) -> decoder.KVCache:
    return _map_rows(lambda axis, leaf: lax.dynamic_slice_in_dim(leaf, row, 1, axis), cache)


def _put_row(cache: decoder.KVCache, new: decoder.KVCache, row: Array) -> decoder.KVCache:
    return _map_rows(lambda axis, old, new: lax.dynamic_update_slice_in_dim(old, new, row, axis), cache, new)


def _map_rows(fn: Callable, *caches: decoder.KVCache) -> decoder.KVCache:
    """fn(the axis of the rows, leaves) on every leaf."""
    return jax.tree.map(lambda *leaves: fn(1 if leaves[0].ndim == 5 else 0, *leaves), *caches)


def _pinned(state: EngineState, mesh: Mesh) -> EngineState:
    """The state in its one layout, so that what a step returns fits the next without another compilation."""
    shard_kv = lambda x: partition.shard(x, "layers", "batch", "act_kv_heads", None, None)
    cache = state.cache
    k_LBKSH, v_LBKSH = shard_kv(cache.k_LBKSH), shard_kv(cache.v_LBKSH)
    state = _replicate(state.replace(cache=cache.replace(k_LBKSH=None, v_LBKSH=None)), mesh)
    return state.replace(cache=state.cache.replace(k_LBKSH=k_LBKSH, v_LBKSH=v_LBKSH))


def _replicate(tree, mesh: Mesh):
    return lax.with_sharding_constraint(tree, partition.replicated(mesh))
