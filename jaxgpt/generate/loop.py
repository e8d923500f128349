"""Generation: one pass over the prompts, then one token at a time until every row has ended. Pure and jittable."""

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from jaxgpt.generate.rows import Responses, Rows, make_draw_and_extend
from jaxgpt.generate.samplers import SamplerConfig, row_keys
from jaxgpt.generate.slots import answer_in_slots
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
