"""Text as it is generated: whole characters only, nothing that might yet be a stop string, and each token's log-prob."""

import codecs
import dataclasses
from collections.abc import Generator, Sequence

from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.generate.engine import Engine, Request, Token


@dataclasses.dataclass(frozen=True)
class Piece:
    """What one more token adds to a text.

    text: final, may be empty while characters are incomplete or might begin a stop string. tokens: (the character each
    begins at, token) of those whose text has begun to be final, without EOS and what a stop string cut off. num_tokens:
    drawn so far, EOS included. finish: "stop" or "length" at the end, else None.
    """

    text: str
    tokens: tuple[tuple[int, Token], ...]
    num_tokens: int
    finish: str | None


class TextStream:
    """Tokens in, pieces of text out; joined they are the tokenizer's text of all ids, up to the first stop string.

    The first stop string is the one that is complete first, whatever the tokens it comes in. prefix: left out where the
    text begins with it.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), prefix: str = ""):
        self._tokenizer, self._stop, self._prefix = tokenizer, tuple(stop), prefix
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""  # whole characters that might begin a stop string
        self._waiting: list[tuple[int, Token]] = []  # tokens not yet given out, by the character they begin at
        self._num_decoded = self._num_given = self._num_tokens = 0
        self._is_cut = False

    def push(self, token: Token) -> Piece:
        """The piece that a token completes; at token.finish all that was held back."""
        self._num_tokens += 1
        is_end = token.finish == "stop"
        data = b"" if is_end else token_bytes(self._tokenizer, token.id)
        if data:
            self._waiting.append((self._num_decoded, token))
        decoded = self._decoder.decode(data, final=token.finish is not None)
        self._num_decoded += len(decoded)
        self._held += decoded
        text = self._release(token.finish is not None)
        finish = "stop" if self._is_cut else token.finish
        is_all = finish is not None and not self._is_cut
        given = [(at, t) for at, t in self._waiting if at < self._num_given or is_all]
        self._waiting = self._waiting[len(given) :]
        return Piece(text, tuple(given), self._num_tokens, finish)

    def _release(self, is_final: bool) -> str:
        """Take from the held text what is final."""
        if len(self._held) < len(self._prefix) and self._prefix.startswith(self._held) and not is_final:
            return ""
        if self._held.startswith(self._prefix):
            self._held = self._held[len(self._prefix) :]
            self._num_given += len(self._prefix)
        self._prefix = ""
        found = [(self._held.find(stop) + len(stop), -len(stop)) for stop in self._stop if stop in self._held]
        if found:
            end, minus_length = min(found)
            text, self._held, self._is_cut = self._held[: end + minus_length], "", True
        else:
            kept = 0 if is_final else max((_overlap(self._held, stop) for stop in self._stop), default=0)
            text, self._held = self._held[: len(self._held) - kept], self._held[len(self._held) - kept :]
        self._num_given += len(text)
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)


def token_bytes(tokenizer: Tokenizer, token: int) -> bytes:
    """The UTF-8 bytes of an id; none beyond the tokenizer's vocabulary, which a model's may exceed."""
    return tokenizer.decode_bytes([token]) if token < tokenizer.vocab_size else b""


class TextEngine:
    """An engine that gives text: a request comes with stop strings, a slot's tokens become pieces."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer):
        self.engine, self.tokenizer = engine, tokenizer
        self._streams: dict[int, TextStream] = {}

    def start(self, request: Request, stop: Sequence[str] = (), prefix: str = "") -> int:
        """`Engine.start`; stop: texts that end the response and are left out of it; prefix: as in `TextStream`."""
        stream = TextStream(self.tokenizer, stop, prefix)
        slot = self.engine.start(request)
        self._streams[slot] = stream
        return slot

    def cancel(self, slot: int) -> None:
        """Free a slot."""
        self.engine.cancel(slot)
        self._streams.pop(slot, None)

    def step(self) -> list[tuple[int, Piece | Exception]]:
        """`Engine.step`, as pieces: (slot, piece). A slot whose piece has a finish is free again.

        What goes wrong with the text of one slot stands in its piece's place, and frees that slot alone. What the engine
        raises concerns all slots, and is raised.
        """
        pieces: list[tuple[int, Piece | Exception]] = []
        for token in self.engine.step():
            if token.slot not in self._streams:  # a stop string has ended it in this very step
                continue
            try:
                piece: Piece | Exception = self._streams[token.slot].push(token)
            except Exception as error:
                piece = error
            if isinstance(piece, Exception) or piece.finish:
                self.cancel(token.slot)
            pieces.append((token.slot, piece))
        return pieces

    def stream(self, request: Request, stop: Sequence[str] = (), prefix: str = "") -> Generator[Piece, None, None]:
        """The pieces of one request, for an engine that serves no other; closing the iterator ends it."""
        slot = self.start(request, stop, prefix)
        try:
            while slot in self._streams:
                for _, piece in self.step():
                    if isinstance(piece, Exception):
                        raise piece
                    yield piece
        finally:
            self.cancel(slot)
