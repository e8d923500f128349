"""Continuous batching: a fixed number of slots with one KV cache, which requests join and leave between steps.

The host keeps the requests (`Engine`) and calls two compiled programs: `prefill` writes some tokens of one row,
`decode_step` draws one token for every live row. Sampling parameters are arrays, so that no request compiles anything. The
token at position p of a row lies in its cache slot p; what an earlier request left in later slots is overwritten before any
query is late enough to see it.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jax.sharding import Mesh

from jaxgpt import partition
from jaxgpt.generate.samplers import RowSamplers, SamplerConfig, sample_by_row
from jaxgpt.models import decoder
from jaxgpt.models.config import ModelConfig
from jaxgpt.models.memory import cache_bytes, check_fits
from jaxgpt.numerics import token_logprobs
from jaxgpt.types import Array, Params

MAX_ALTERNATIVES = 20  # most probable tokens that a row may want at each step
_CHUNKS = (16, 64, 256)  # tokens that a prefill takes; a longer prompt takes several


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


@dataclasses.dataclass(frozen=True)
class Request:
    """What one row generates: up to max_new tokens after the prompt's ids, or until one of stop_ids is drawn.

    seed, choice: token t is drawn with fold_in(fold_in(key(seed), choice), t), so that choices of one seed differ; they
    are the rows of `decode.generate` with the key of the seed. has_alternatives: whether each token comes with the most
    probable ones.
    """

    prompt: Sequence[int]
    max_new: int
    stop_ids: tuple[int, ...]
    sampler: SamplerConfig = SamplerConfig()
    seed: int = 0
    choice: int = 0
    has_alternatives: bool = False


@dataclasses.dataclass(frozen=True)
class Token:
    """A token drawn for a slot. logprob, alternatives (id, log-prob): nats, under the model itself, best first.

    finish: why it is the slot's last one, "stop" (it is one of stop_ids) or "length"; None if more follow.
    """

    slot: int
    id: int
    logprob: float
    alternatives: tuple[tuple[int, float], ...]
    finish: str | None


@dataclasses.dataclass
class _Slot:
    """ids: tokens in the cache. pending: of the prompt, still to be written. drawn: ids drawn for the request.

    seen_V: bool, tokens of the request's prompt. draw: how it draws, B = 1.
    """

    ids: list[int] = dataclasses.field(default_factory=list)
    request: Request | None = None
    pending: list[int] = dataclasses.field(default_factory=list)
    drawn: list[int] = dataclasses.field(default_factory=list)
    used: int = 0
    seen_V: np.ndarray | None = None
    draw: Draw | None = None


class Engine:
    """Requests in, tokens out, a step at a time; one thread may use it.

    A request takes the free slot whose cache begins with most of its prompt, and only the rest is computed: the next turn of
    a conversation costs its new tokens alone.

    max_length: tokens of prompt and response together; 0 is the model's max_seq_length. reused, computed: prompt tokens so
    far that were found in a cache, and that were not.

    Raises ValueError where the model has no head for tokens, or max_length exceeds a learned position table.
    """

    def __init__(self, cfg: ModelConfig, params: Params, mesh: Mesh, *, num_slots: int, max_length: int = 0):
        if cfg.head != "lm":
            raise ValueError(f"model.head={cfg.head!r} has no logits to sample from; generation needs model.head='lm'.")
        if num_slots < 1:
            raise ValueError(f"num_slots must be at least 1, not {num_slots}.")
        self.max_length = max_length or cfg.max_seq_length
        if self.max_length < 2 or (cfg.position == "learned" and self.max_length > cfg.max_seq_length):
            raise ValueError(
                f"max_length must be at least 2 and at most model.max_seq_length={cfg.max_seq_length}, not {max_length}."
            )
        what = f"The keys and values of num_slots={num_slots} with max_length={self.max_length} tokens"
        check_fits({what: cache_bytes(cfg, num_slots, self.max_length)}, mesh.size)
        self.vocab_size = cfg.vocab_size
        self.reused = self.computed = 0
        self._slots = [_Slot() for _ in range(num_slots)]
        self._clock = 0
        self._chunks = [c for c in _CHUNKS if c <= self.max_length] or [_CHUNKS[0]]
        # Padding after a prompt's last token needs slots, too.
        length = self.max_length + self._chunks[-1]
        self._init_state = functools.partial(init_state, cfg, num_slots=num_slots, length=length, mesh=mesh)
        self._state = self._init_state()
        self._prefill = functools.partial(prefill, cfg, params, mesh=mesh)
        self._decode_step = functools.partial(decode_step, cfg, params, mesh=mesh)

    def reset(self) -> None:
        """Give up all requests and forget all caches: a step that failed may have taken the state with it."""
        self._slots = [_Slot() for _ in self._slots]
        self._state = self._init_state()

    @property
    def num_free(self) -> int:
        """Slots without a request."""
        return sum(slot.request is None for slot in self._slots)

    def check(self, num_prompt: int, max_new: int) -> None:
        """ValueError where a request of these sizes cannot be served."""
        if num_prompt < 1:
            raise ValueError("The prompt has no tokens, so there is nothing to continue.")
        if max_new < 1:
            raise ValueError(f"max_new must be at least 1, not {max_new}.")
        if num_prompt + max_new > self.max_length:
            raise ValueError(
                f"The prompt has {num_prompt} tokens; with {max_new} new ones that is more than the {self.max_length} "
                f"there is room for, so at most {max(0, self.max_length - num_prompt)} can be generated."
            )

    def start(self, request: Request) -> int:
        """The slot that serves a request from the next step on; ValueError as `check`, RuntimeError if none is free.

        Whatever is wrong with a request is raised here, where it takes no slot: a step serves all of them.
        """
        self.check(len(request.prompt), request.max_new)
        prompt = [int(i) for i in request.prompt]
        if not 0 <= min(prompt) <= max(prompt) < self.vocab_size:
            raise ValueError(f"The prompt has ids outside of the model's vocabulary of {self.vocab_size}.")
        seen_V = np.zeros(self.vocab_size, bool)
        seen_V[prompt] = True
        draw = _draw_of(request)
        free = [i for i, slot in enumerate(self._slots) if slot.request is None]
        if not free:
            raise RuntimeError("There is no free slot.")
        # The last token is computed in any case: the first new one is drawn from its hidden state.
        common = {i: min(_num_common(self._slots[i].ids, prompt), len(prompt) - 1) for i in free}
        chosen = min(free, key=lambda i: (-common[i], self._slots[i].used))
        kept = common[chosen]
        self._clock += 1
        self._slots[chosen] = _Slot(prompt[:kept], request, prompt[kept:], [], self._clock, seen_V, draw)
        self.reused += kept
        self.computed += len(prompt) - kept
        return chosen

    def cancel(self, slot: int) -> None:
        """Free a slot; what its cache holds may serve later requests."""
        self._slots[slot].request = None
        self._slots[slot].pending = []

    def step(self) -> list[Token]:
        """Write a part of one waiting prompt, then draw a token for every row that has its prompt: those drawn, in order."""
        tokens = []
        waiting = [i for i, slot in enumerate(self._slots) if slot.pending]
        if waiting:
            tokens += self._write_prompt(min(waiting, key=lambda i: self._slots[i].used))
        live = [i for i, slot in enumerate(self._slots) if slot.request is not None and not slot.pending]
        if live:
            is_live_B = np.isin(np.arange(len(self._slots)), live)
            self._state, drawn = self._decode_step(self._state, is_live_B)
            for i in live:
                self._slots[i].ids.append(self._slots[i].drawn[-1])
            drawn = jax.device_get(drawn)
            tokens += [self._token(i, drawn, i) for i in live]
        return tokens

    def compile(self) -> None:
        """Compile all programs now instead of at the first requests; only while no request is served."""
        for chunk in self._chunks:
            self.start(Request([0] * min(chunk, self.max_length - 1), 1, ()))
            self.step()
            self._slots = [_Slot() for _ in self._slots]
        self._state, _ = self._decode_step(self._state, np.zeros(len(self._slots), bool))
        self.reused = self.computed = 0

    def _write_prompt(self, row: int) -> list[Token]:
        """Write the next part of a prompt; the first token drawn, if it was the last part."""
        slot = self._slots[row]
        chunk = next((c for c in self._chunks if c >= len(slot.pending)), self._chunks[-1])
        part, slot.pending = slot.pending[:chunk], slot.pending[chunk:]
        tokens_T = np.zeros(chunk, np.int32)
        tokens_T[: len(part)] = part
        place = np.array([row, len(slot.ids), len(part)], np.int32)
        self._state, drawn = self._prefill(self._state, tokens_T, place, slot.seen_V, slot.draw)
        slot.ids += part
        return [] if slot.pending else [self._token(row, jax.device_get(drawn), 0)]

    def _token(self, row: int, drawn: Drawn, at: int) -> Token:
        slot, token = self._slots[row], int(drawn.token_B[at])
        request = slot.request
        if request is None:
            raise RuntimeError("A slot without a request draws nothing.")
        slot.drawn.append(token)
        finish = "stop" if token in request.stop_ids else "length" if len(slot.drawn) == request.max_new else None
        if finish:
            self.cancel(row)
        pairs = zip(drawn.ids_BK[at].tolist(), drawn.logprobs_BK[at].tolist(), strict=True)
        alternatives = tuple(pairs) if request.has_alternatives else ()
        return Token(row, token, float(drawn.logprob_B[at]), alternatives, finish)


def _draw_of(request: Request) -> Draw:
    """A new request's Draw, B = 1, on the host."""
    arrays: dict[str, Any] = {
        "seed_B": np.array([request.seed % 2**32], np.uint32),
        "choice_B": np.array([request.choice], np.int32),
        "step_B": np.zeros(1, np.int32),
        "has_alternatives_B": np.array([request.has_alternatives]),
    }
    return Draw(samplers=RowSamplers.stack([request.sampler]), **arrays)


def _num_common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common prefix."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
