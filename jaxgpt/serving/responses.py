"""What a call's pieces look like to a client: OpenAI's objects for whole responses and for chunks of a stream."""

import dataclasses
import json
import time
import uuid
from collections.abc import Sequence
from typing import Any

from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.generate.engine import Token
from jaxgpt.generate.stream import Piece, token_bytes
from jaxgpt.serving.protocol import Call


@dataclasses.dataclass
class Choice:
    """One choice, put together from its pieces."""

    text: str = ""
    tokens: list[tuple[int, Token]] = dataclasses.field(default_factory=list)
    num_tokens: int = 0
    finish: str | None = None

    def add(self, piece: Piece) -> None:
        """Append a piece."""
        self.text += piece.text
        self.tokens += piece.tokens
        self.num_tokens, self.finish = piece.num_tokens, piece.finish


class Writer:
    """Writes the objects of one response. is_chat: of which endpoint."""

    def __init__(self, call: Call, tokenizer: Tokenizer, model: str, *, is_chat: bool):
        self._call, self._tokenizer, self._is_chat = call, tokenizer, is_chat
        kind = "chat.completion" if is_chat else "text_completion"
        name = f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._whole = {"id": name, "object": kind, "created": int(time.time()), "model": model}
        self._chunk = {**self._whole, "object": "chat.completion.chunk" if is_chat else kind}

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """The response of a call that does not stream."""
        items = []
        for index, choice in enumerate(choices):
            message = {"role": "assistant", "content": choice.text, "refusal": None}
            content: dict[str, Any] = {"message": message} if self._is_chat else {"text": choice.text}
            items.append(self._item(index, content, choice.tokens, choice.finish))
        return {**self._whole, "choices": items, "usage": self.usage(choices)}

    def opening(self, index: int) -> str:
        """The event that opens a choice of a chat; other completions have none."""
        if not self._is_chat:
            return ""
        return self._event([self._item(index, {"delta": {"role": "assistant", "content": ""}}, [], None)])

    def chunk(self, index: int, piece: Piece) -> str:
        """The event of a piece; none where it has nothing to say yet."""
        if not piece.text and not piece.finish and not (piece.tokens and self._call.num_logprobs is not None):
            return ""
        if self._is_chat:
            content: dict[str, Any] = {"delta": {"content": piece.text} if piece.text else {}}
        else:
            content = {"text": piece.text}
        return self._event([self._item(index, content, piece.tokens, piece.finish)])

    def closing(self, choices: Sequence[Choice]) -> str:
        """The last events of a stream."""
        usage = self._event([], self.usage(choices)) if self._call.include_usage else ""
        return usage + "data: [DONE]\n\n"

    def usage(self, choices: Sequence[Choice]) -> dict[str, int]:
        """Tokens of the prompts, each counted once, and tokens drawn, EOS included."""
        drawn = sum(choice.num_tokens for choice in choices)
        return {
            "prompt_tokens": self._call.num_prompt, "completion_tokens": drawn,
            "total_tokens": self._call.num_prompt + drawn,
        }  # fmt: skip

    def _event(self, items: list[dict], usage: dict | None = None) -> str:
        return event({**self._chunk, "choices": items, **({"usage": usage} if self._call.include_usage else {})})

    def _item(self, index: int, content: dict, tokens: Sequence[tuple[int, Token]], finish: str | None) -> dict:
        logprobs = None if self._call.num_logprobs is None else self._logprobs(tokens)
        return {"index": index, **content, "logprobs": logprobs, "finish_reason": finish}

    def _logprobs(self, tokens: Sequence[tuple[int, Token]]) -> dict[str, Any]:
        if self._is_chat:
            listed = [
                {**self._entry(t.id, t.logprob), "top_logprobs": [self._entry(*pair) for pair in self._best(t)]}
                for _, t in tokens
            ]
            return {"content": listed, "refusal": None}
        # Worst first: of tokens with the same text (a letter and its byte) the most probable one stays.
        best = [{self._text(i): x for i, x in reversed(self._best(token))} for _, token in tokens]
        return {
            "tokens": [self._text(token.id) for _, token in tokens],
            "token_logprobs": [token.logprob for _, token in tokens],
            "top_logprobs": best if self._call.num_logprobs else None,
            "text_offset": [at for at, _ in tokens],
        }

    def _best(self, token: Token) -> Sequence[tuple[int, float]]:
        return token.alternatives[: self._call.num_logprobs]

    def _entry(self, i: int, logprob: float) -> dict[str, Any]:
        return {"token": self._text(i), "logprob": logprob, "bytes": list(token_bytes(self._tokenizer, i))}

    def _text(self, i: int) -> str:
        """A token's own text: a reserved one by its name, a part of a character as its bytes."""
        data = token_bytes(self._tokenizer, i)
        try:
            return data.decode() or (self._tokenizer.piece(i) if i < self._tokenizer.vocab_size else f"<{i}>")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def event(body: dict) -> str:
    """A server-sent event, in plain ASCII."""
    return f"data: {json.dumps(body)}\n\n"
