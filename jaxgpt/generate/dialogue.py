"""A conversation with a model: what has been said, as the prompt of what comes next, within the room there is."""

import contextlib
import dataclasses
import math
from collections.abc import Generator, Sequence

from jaxgpt.data.chat import ChatTemplate, Message
from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.generate.engine import Request
from jaxgpt.generate.samplers import SamplerConfig
from jaxgpt.generate.stream import TextEngine
from jaxgpt.generate.text import stop_ids


@dataclasses.dataclass(frozen=True)
class ChatFormat:
    """How messages become a prompt: by the chat template, or, where template is None, as one plain text that goes on.

    stop_ids: what ends a response. prefix: white space that the template writes between prompt and response; a model
    writes it, too, but it is not part of what is said.
    """

    tokenizer: Tokenizer
    template: ChatTemplate | None
    stop_ids: tuple[int, ...]
    prefix: str

    @classmethod
    def of(cls, tokenizer: Tokenizer, template: ChatTemplate | None) -> "ChatFormat":
        """The format of a model that knows this template, or none."""
        if template is None:
            return cls(tokenizer, None, stop_ids(tokenizer), "")
        ends = dict.fromkeys((*stop_ids(tokenizer), *template.stop_ids(tokenizer)))
        return cls(tokenizer, template, tuple(ends), template.answer_prefix(tokenizer))

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a conversation that awaits a response; ValueError where the template refuses it."""
        if self.template is not None:
            return self.template.encode_prompt(self.tokenizer, messages).tolist()
        parts = [("\n" if i and m.role == "user" else "") + m.content for i, m in enumerate(messages)]
        return self.tokenizer.encode("".join(parts), add_bos=True).tolist()


@dataclasses.dataclass(frozen=True)
class Speech:
    """How responses are drawn. max_new_tokens: 0 is half of the model's context. Token t of response i: key (seed, i).

    seed: below 2**32.
    """

    sampler: SamplerConfig = SamplerConfig()
    max_new_tokens: int = 0
    seed: int = 0

    def __post_init__(self):
        for name in ("max_new_tokens", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, not {getattr(self, name)}.")
        if self.seed >= 2**32:
            raise ValueError(f"seed must be below 2**32, not {self.seed}.")


class Dialogue:
    """Turns of a user and a model. The engine has one slot, whose cache keeps what was said from turn to turn.

    speech: may be replaced at any time. messages: what was said, without the system's message. finish: how the last
    response ended: "stop", "length", or None where it was broken off.
    """

    def __init__(self, engine: TextEngine, form: ChatFormat, speech: Speech, system: str = ""):
        self.speech = speech
        self.messages: list[Message] = []
        self.finish: str | None = None
        self._engine, self._form = engine, form
        self._num_responses = 0
        self.set_system(system)

    def set_system(self, text: str) -> None:
        """What stands before the first turn, from the next response on; ValueError for a model without a template."""
        if text and self._form.template is None:
            raise ValueError("The model has no chat template, so it knows no system message.")
        self._system = text

    def transcript(self) -> list[Message]:
        """All messages, the system's included."""
        return [*self._system_message(), *self.messages]

    def ask(self, text: str) -> int:
        """Add what the user says; the number of oldest turns that were dropped because they no longer fit.

        Raises ValueError, and leaves the conversation as it was, where the text does not fit even alone.
        """
        messages, dropped = [*self.messages, Message("user", text)], 0
        room = self._engine.engine.max_length - self._max_new()
        while (length := len(self._prompt(messages))) > room:
            later = [i for i, message in enumerate(messages) if i and message.role == "user"]
            if not later:
                raise ValueError(
                    f"The message has {length} tokens with what surrounds it; max_new_tokens={self._max_new()} leaves room "
                    f"for {room}."
                )
            messages, dropped = messages[later[0] :], dropped + 1
        self.messages = messages
        return dropped

    def respond(self) -> Generator[str, None, None]:
        """The response to what was said last, as it is written; broken off where the iterator is closed.

        Raises ValueError where there is no room for it: settings or the system's message have grown since `ask`. Whatever
        is raised, what was said stays, the next turn finds the engine free, and there is a response, perhaps empty, so
        that turns alternate.
        """
        speech, engine = self.speech, self._engine.engine
        said: list[str] = []
        self.finish = None
        try:
            prompt = self._prompt(self.messages)
            max_new = max(1, min(self._max_new(), engine.max_length - len(prompt)))
            engine.check(len(prompt), max_new)
            request = Request(prompt, max_new, self._form.stop_ids, speech.sampler, speech.seed, self._num_responses)
            with contextlib.closing(self._engine.stream(request, prefix=self._form.prefix)) as pieces:
                for piece in pieces:
                    said.append(piece.text)
                    self.finish = piece.finish
                    yield piece.text
        except Exception as error:
            if not isinstance(error, ValueError):
                engine.reset()  # a step that failed may have left no state behind
            raise
        finally:
            self._num_responses += 1
            self.messages.append(Message("assistant", "".join(said)))

    def take_back(self) -> None:
        """Forget the last response, if one was made, so that another can be drawn; ValueError where nothing was said."""
        if not self.messages:
            raise ValueError("There is no response to draw again.")
        if self.messages[-1].role == "assistant":
            self.messages.pop()

    def probabilities(self, count: int) -> list[tuple[str, float]]:
        """The most probable first tokens of the response to what the user said last, best first: (piece, probability).

        They are the model's own, at temperature 1. Without a template: of what comes next in the text. ValueError where
        nothing was said.
        """
        messages = self.messages
        if self._form.template is not None and messages and messages[-1].role == "assistant":
            messages = messages[:-1]
        request = Request(self._prompt(messages), 1, (), has_alternatives=True)
        engine = self._engine.engine
        slot = engine.start(request)
        try:
            while not (drawn := [token for token in engine.step() if token.slot == slot]):
                pass
        except Exception:
            engine.reset()
            raise
        finally:
            engine.cancel(slot)
        tokenizer = self._form.tokenizer
        pairs = [(tokenizer.piece(i), math.exp(x)) for i, x in drawn[0].alternatives if i < tokenizer.vocab_size]
        return pairs[:count]

    def _prompt(self, messages: Sequence[Message]) -> list[int]:
        return self._form.encode([*self._system_message(), *messages])

    def _system_message(self) -> list[Message]:
        return [Message("system", self._system)] if self._system else []

    def _max_new(self) -> int:
        most = self._engine.engine.max_length - 1
        if self.speech.max_new_tokens > most:
            raise ValueError(
                f"max_new_tokens={self.speech.max_new_tokens} leaves no room for a message; at most {most} fit this model."
            )
        return self.speech.max_new_tokens or max(1, (most + 1) // 2)
