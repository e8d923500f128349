"""Continuous batching: a fixed number of slots with one KV cache, which requests join and leave between steps."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxgpt.generate.batching import Draw, Drawn, decode_step, init_state, prefill
from jaxgpt.generate.samplers import RowSamplers, SamplerConfig
from jaxgpt.models.config import ModelConfig
from jaxgpt.models.memory import cache_bytes, check_fits
from jaxgpt.types import Params

_CHUNKS = (16, 64, 256)  # tokens that a prefill takes; a longer prompt takes several


@dataclasses.dataclass(frozen=True)
class Request:
    """What one row generates: up to max_new tokens after the prompt's ids, or until one of stop_ids is drawn.

    seed, choice: token t is drawn with fold_in(fold_in(key(seed), choice), t), so that choices of one seed differ; they
    are the rows of `loop.generate` with the key of the seed. has_alternatives: whether each token comes with the most
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
