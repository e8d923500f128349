"""Texts in, texts out: the host side of generation, which encodes, pads, batches and decodes."""

import contextlib
import difflib
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxgpt import partition
from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.generate import decode
from jaxgpt.generate.samplers import SamplerConfig
from jaxgpt.models.config import ModelConfig
from jaxgpt.types import Array, Params

_PROMPT_MULTIPLE = 32  # prompt lengths are rounded up to it, because every length is compiled for


def pad_prompts(
    prompts: Sequence[Sequence[int] | np.ndarray], pad_id: int, *, multiple: int = 1, max_length: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Left-pad token ids to one length P, the longest rounded up to a multiple (but not beyond max_length).

    Returns:
      prompt_BP: i32. mask_BP: f32, 1 on real tokens.

    Raises:
      ValueError: if a prompt is longer than max_length.
    """
    longest = max([1, *(len(prompt) for prompt in prompts)])
    if max_length is not None and longest > max_length:
        raise ValueError(f"A prompt of {longest} tokens is longer than the {max_length} there is room for.")
    length = -(-longest // multiple) * multiple
    length = length if max_length is None else min(length, max_length)
    prompt_BP = np.full((len(prompts), length), pad_id, np.int32)
    mask_BP = np.zeros((len(prompts), length), np.float32)
    for row, prompt in enumerate(prompts):
        if len(prompt):
            prompt_BP[row, -len(prompt) :] = prompt
            mask_BP[row, -len(prompt) :] = 1
    return prompt_BP, mask_BP


def generate_texts(
    cfg: ModelConfig,
    params: Params,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    sampler: SamplerConfig,
    max_new: int,
    seed: int,
    batch_size: int,
    eos_ids: tuple[int, ...],
    mesh: Mesh | None = None,
    encoded: Sequence[np.ndarray] | None = None,
) -> list[dict[str, Any]]:
    """Continue each prompt; the same seed gives the same texts whatever the batch size.

    Prompts of similar length share a batch; rows that are left over in the last one hold no prompt. All processes of a
    multi-host run must call it, with the same prompts.

    Args:
      cfg: the model.
      params: plain arrays.
      tokenizer: prompts are encoded by it, with BOS, unless they come encoded.
      prompts: in any order.
      sampler: how tokens are drawn.
      max_new: the most tokens per response.
      seed: token t of prompt i is drawn with fold_in(fold_in(key(seed), i), t).
      batch_size: the most prompts generated for at once; with a mesh rounded up to what it divides.
      eos_ids: each of them ends a response.
      mesh: where params live, if they are sharded.
      encoded: the ids of each prompt, for instance by a chat template.

    Returns:
      One record per prompt, in their order: {"prompt", "response": its text without the EOS, "num_tokens": generated,
      the EOS included, "stop_reason": "eos" or "length"}.

    Raises:
      ValueError: if a prompt has no tokens, or if one is too long for a learned position table.
    """
    if encoded is None:
        encoded = [tokenizer.encode(prompt, add_bos=True) for prompt in prompts]
    max_length = cfg.max_seq_length - max_new if cfg.position == "learned" else None
    for prompt, ids in zip(prompts, encoded, strict=True):
        _check_prompt(cfg, prompt, len(ids), max_new, max_length)
    order = sorted(range(len(prompts)), key=lambda i: len(encoded[i]))
    rows = _rows_per_batch(len(prompts), batch_size, mesh)
    run = functools.partial(
        _generate, cfg, params, max_new=max_new, sampler=sampler, eos_ids=eos_ids, pad_id=tokenizer.pad_id, mesh=mesh
    )
    records: dict[int, dict[str, Any]] = {}
    for start in range(0, len(order), rows):
        chosen = order[start : start + rows]
        unused = rows - len(chosen)
        rows_of_ids = [*(encoded[i] for i in chosen), *[np.zeros(0, np.int32)] * unused]
        prompt_BP, mask_BP = pad_prompts(
            rows_of_ids, tokenizer.pad_id, multiple=_PROMPT_MULTIPLE, max_length=max_length
        )
        batch = prompt_BP, mask_BP, np.array(chosen + [0] * unused, np.int32)
        if mesh is not None:
            local = partition.local_rows(mesh, rows)
            batch = partition.to_global(tuple(x[local] for x in batch), mesh, rows)
        out = jax.device_get(run(*batch, np.uint32(seed % 2**32)))
        for row, i in enumerate(chosen):
            response = out.tokens_BR[row, : out.lengths_B[row]]
            records[i] = _record(tokenizer, prompts[i], response, bool(out.has_eos_B[row]))
    return [records[i] for i in range(len(prompts))]


def next_token_table(
    cfg: ModelConfig,
    params: Params,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    top: int,
    mesh: Mesh | None = None,
    ids: np.ndarray | None = None,
) -> list[tuple[str, float]]:
    """The `top` most probable next tokens after a prompt, best first: (the piece, its probability).

    The probabilities are the model's own, at temperature 1. Ids beyond the tokenizer's vocabulary are left out. ids: of
    the prompt, where they are known. Raises ValueError as `generate_texts` does.
    """
    if ids is None:
        ids = tokenizer.encode(prompt, add_bos=True)
    max_length = cfg.max_seq_length if cfg.position == "learned" else None
    _check_prompt(cfg, prompt, len(ids), 0, max_length)
    prompt_BP, mask_BP = pad_prompts([ids], tokenizer.pad_id, multiple=_PROMPT_MULTIPLE, max_length=max_length)
    ids_BK, probs_BK = jax.device_get(_probabilities(cfg, params, prompt_BP, mask_BP, top=top, mesh=mesh))
    pairs = zip(ids_BK[0], probs_BK[0], strict=True)
    return [(tokenizer.piece(int(i)), float(p)) for i, p in pairs if i < tokenizer.vocab_size]


def stop_ids(tokenizer: Tokenizer, stop: Sequence[str] = ()) -> tuple[int, ...]:
    """EOS and the ids of further pieces that end a response; ValueError for a text that is not one piece."""
    ids = [tokenizer.eos_id]
    for text in stop:
        found = [tokenizer.special_ids[text]] if text in tokenizer.special_ids else tokenizer.encode(text).tolist()
        if len(found) != 1:
            nearest = difflib.get_close_matches(text, tokenizer.special_ids, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"stop: {text!r} is {len(found)} pieces, not one; the nearest reserved one is {nearest!r}."
            )
        ids += found
    return tuple(ids)


@functools.partial(jax.jit, static_argnums=0, static_argnames=("max_new", "sampler", "eos_ids", "pad_id", "mesh"))
def _generate(cfg, params, prompt_BP, mask_BP, index_B, seed, *, max_new, sampler, eos_ids, pad_id, mesh):
    """`decode.generate` under the mesh, every row with the key of its prompt's index; the result is on every device."""
    key_B: Array = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(seed), index_B)
    with _on(mesh):
        out = decode.generate(
            cfg, params, prompt_BP, mask_BP, key_B, max_new=max_new, sampler=sampler, eos_ids=eos_ids, pad_id=pad_id
        )
    return _replicate(out, mesh)


@functools.partial(jax.jit, static_argnums=0, static_argnames=("top", "mesh"))
def _probabilities(cfg, params, prompt_BP, mask_BP, *, top, mesh):
    with _on(mesh):
        out = decode.next_token_probabilities(cfg, params, prompt_BP, mask_BP, top=top)
    return _replicate(out, mesh)


def _on(mesh: Mesh | None) -> contextlib.AbstractContextManager:
    return contextlib.nullcontext() if mesh is None else partition.activate(mesh, partition.DEFAULT_RULES)


def _replicate(out: Any, mesh: Mesh | None) -> Any:
    """Every host reads the whole result, so every device holds it."""
    return out if mesh is None else jax.lax.with_sharding_constraint(out, partition.replicated(mesh))


def _check_prompt(cfg: ModelConfig, prompt: str, length: int, max_new: int, max_length: int | None) -> None:
    if not length:
        raise ValueError(f"The prompt {prompt!r} has no tokens, so there is nothing to continue.")
    if max_length is not None and length > max_length:
        raise ValueError(
            f"The prompt {prompt[:40]!r} has {length} tokens; with {max_new} new ones that is more than "
            f"model.max_seq_length={cfg.max_seq_length}, which leaves room for {max(0, cfg.max_seq_length - length)}."
        )


def _rows_per_batch(num_prompts: int, batch_size: int, mesh: Mesh | None) -> int:
    shards = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
    return -(-max(1, min(num_prompts, batch_size)) // shards) * shards


def _record(tokenizer: Tokenizer, prompt: str, response_ids: np.ndarray, has_eos: bool) -> dict[str, Any]:
    text_ids = response_ids[:-1] if has_eos else response_ids
    return {
        "prompt": prompt,
        # A model's vocabulary may be padded beyond the tokenizer's; ids there stand for nothing.
        "response": tokenizer.decode(text_ids[text_ids < tokenizer.vocab_size]),
        "num_tokens": len(response_ids),
        "stop_reason": "eos" if has_eos else "length",
    }
