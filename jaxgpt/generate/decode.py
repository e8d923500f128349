"""Generation within one jitted program: a pass over the prompts, then one token at a time until every row has ended.

Axes: B prompts, W slots (the rows that are decoded, where they are fewer), P prompt, R response, S = P + R.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from jaxgpt.generate.samplers import SamplerConfig, row_keys, sample
from jaxgpt.models import decoder
from jaxgpt.models.config import ModelConfig
from jaxgpt.types import Array, Params


class Generation(struct.PyTreeNode):
    """What was generated; R = max_new.

    tokens_BR: i32; the response with the EOS that ended it, then the pad id.
    mask_BR: f32; 1 up to and including the EOS, 0 after it. It comes from lengths, so pad == eos is no problem.
    logprobs_BR: f32; log-probabilities of the tokens under the distribution sampled from, 0 where the mask is 0.
    lengths_B: i32; tokens generated, the EOS included.
    has_eos_B: bool; whether the row ended by itself, not by max_new.
    """

    tokens_BR: Array
    mask_BR: Array
    logprobs_BR: Array
    lengths_B: Array
    has_eos_B: Array


def generate(
    cfg: ModelConfig,
    params: Params,
    prompt_BP: Array,
    prompt_mask_BP: Array,
    rng: Array,
    *,
    max_new: int,
    sampler: SamplerConfig,
    eos_ids: tuple[int, ...],
    pad_id: int = 0,
    num_slots: int = 0,
) -> Generation:
    """Sample up to max_new tokens after each prompt.

    Token t of row b is drawn with the key fold_in(fold_in(rng, b), t), so it depends on the row's prompt, its index and
    the seed, but not on the batch size, the padding or the other rows.

    Args:
      cfg: static.
      params: plain arrays.
      prompt_BP: i32.
      prompt_mask_BP: non-zero on real tokens; padding may be left, right or both. Positions count real tokens. A row
        without any real token generates nothing (length 0): it can fill up a batch.
      rng: one typed key, or one key per row [B], which takes the place of fold_in(rng, b).
      max_new: R, static; generation stops early when all rows have ended.
      sampler: static.
      eos_ids: static; each of them ends a row when it is sampled. In the prompt they mean nothing.
      pad_id: static; what fills tokens_BR after the end.
      num_slots: static; rows that are decoded at once, where there are more prompts: a row that has ended makes room for the
        next prompt, so that one long response does not hold up the others. 0 is one slot per prompt. The same tokens are
        drawn, whatever it is.

    Raises:
      ValueError: at trace time, if max_new < 1 or num_slots < 0, if P + max_new exceeds a learned position table, or if
        the model has no head for tokens.
    """
    batch, prompt_length = prompt_BP.shape
    _check(cfg, prompt_length, max_new, num_slots)
    has_pool = 0 < num_slots < batch
    is_real_BP = prompt_mask_BP != 0
    draw, extend = make_draw_and_extend(cfg, params, sampler, eos_ids=eos_ids, pad_id=pad_id)
    with jax.named_scope("prefill"):
        cache = decoder.init_cache(cfg, batch, prompt_length + (0 if has_pool else max_new))
        x_BPD, cache = decoder.decode(cfg, params, *_prompt_arrays(prompt_BP, is_real_BP), cache)
    start = Rows(
        step=jnp.zeros((), jnp.int32),
        key_B=row_keys(rng, batch),
        cache=cache,
        is_live_B=jnp.any(is_real_BP, axis=1),
        position_B=jnp.sum(is_real_BP, axis=1, dtype=jnp.int32) - 1,
        seen_BV=_tokens_seen(cfg, prompt_BP, is_real_BP) if sampler.repetition_penalty != 1 else None,
        responses=Responses(
            tokens_BR=jnp.full((batch, max_new), pad_id, jnp.int32),
            mask_BR=jnp.zeros((batch, max_new), jnp.float32),
            logprobs_BR=jnp.zeros((batch, max_new), jnp.float32),
            has_eos_B=jnp.zeros(batch, bool),
        ),
    )
    first = draw(start, _at_last_real(x_BPD, is_real_BP))
    with jax.named_scope("decode"):
        if has_pool:
            out = answer_in_slots(cfg, first, extend, num_slots)
        else:
            is_going = lambda rows: (rows.step < max_new) & jnp.any(rows.is_live_B)
            out = lax.while_loop(is_going, extend, first).responses
    return Generation(
        tokens_BR=out.tokens_BR,
        mask_BR=out.mask_BR,
        logprobs_BR=out.logprobs_BR,
        lengths_B=jnp.sum(out.mask_BR, axis=1).astype(jnp.int32),
        has_eos_B=out.has_eos_B,
    )


def next_token_probabilities(
    cfg: ModelConfig, params: Params, prompt_BP: Array, prompt_mask_BP: Array, *, top: int
) -> tuple[Array, Array]:
    """The most probable next tokens of each prompt under the model itself (temperature 1, nothing truncated).

    Args:
      cfg: static.
      params: plain arrays.
      prompt_BP: i32.
      prompt_mask_BP: non-zero on real tokens, of which each row has at least one.
      top: K, static; at most the vocabulary size is returned.

    Returns:
      ids_BK: i32, most probable first. probs_BK: f32.
    """
    is_real_BP = prompt_mask_BP != 0
    x_BPD = decoder.hidden_states(cfg, params, *_prompt_arrays(prompt_BP, is_real_BP))
    logits_BV = decoder.logits(cfg, decoder.head_params(cfg, params), _at_last_real(x_BPD, is_real_BP))
    probs_BK, ids_BK = lax.top_k(jax.nn.softmax(logits_BV, axis=-1), min(top, logits_BV.shape[-1]))
    return ids_BK, probs_BK


def _prompt_arrays(prompt_BP: Array, is_real_BP: Array) -> tuple[Array, Array, Array]:
    """Tokens, segments and positions of the prompts; one segment per row, 0 on padding."""
    positions_BP = jnp.maximum(jnp.cumsum(is_real_BP, axis=1, dtype=jnp.int32) - 1, 0)
    return prompt_BP.astype(jnp.int32), is_real_BP.astype(jnp.int32), positions_BP


def _at_last_real(x_BPD: Array, is_real_BP: Array) -> Array:
    """The hidden state of each row's last real token, [B, D]: only there are logits needed, never [B, P, V]."""
    index_B = x_BPD.shape[1] - 1 - jnp.argmax(is_real_BP[:, ::-1], axis=1)
    return jnp.take_along_axis(x_BPD, index_B[:, None, None], axis=1)[:, 0]


def _tokens_seen(cfg: ModelConfig, prompt_BP: Array, is_real_BP: Array) -> Array:
    """Which tokens occur in each prompt, bool [B, V]."""
    batch = len(prompt_BP)
    return jnp.zeros((batch, cfg.vocab_size), bool).at[jnp.arange(batch)[:, None], prompt_BP].max(is_real_BP)


def _check(cfg: ModelConfig, prompt_length: int, max_new: int, num_slots: int) -> None:
    if cfg.head != "lm":
        raise ValueError(f"model.head={cfg.head!r} has no logits to sample from; generation needs model.head='lm'.")
    if max_new < 1:
        raise ValueError(f"max_new must be at least 1, not {max_new}.")
    if num_slots < 0:
        raise ValueError(f"num_slots must be 0 (one per prompt) or positive, not {num_slots}.")
    if cfg.position == "learned" and prompt_length + max_new > cfg.max_seq_length:
        raise ValueError(
            f"A prompt of {prompt_length} tokens (padding included) and {max_new} new ones are "
            f"{prompt_length + max_new}, more than the learned position table of "
            f"model.max_seq_length={cfg.max_seq_length} holds."
        )


class Responses(struct.PyTreeNode):
    """What has been drawn so far; see `Generation`."""

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
      extend: from `make_draw_and_extend`.
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
