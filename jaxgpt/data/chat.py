"""Conversations: records in, token ids and the mask of what is trained on out, by way of a Jinja chat template.

With a tokenizer of this project, prompt and response give the same tokens together and apart, because the text is cut before
it is tokenized: at special tokens, and before every assistant turn. With that of another model the ids are those which its
library makes of the whole text, as its model was trained.
"""

import contextlib
import difflib
import functools
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from jaxgpt.data import markers, sources, template_sandbox, template_worker
from jaxgpt.data.chat_templates import CHAT_TEMPLATES
from jaxgpt.data.markers import Markers
from jaxgpt.data.sentencepiece_tokenizer import OUR_NAMES
from jaxgpt.data.sources import Record
from jaxgpt.data.template_sandbox import TemplateError
from jaxgpt.data.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant", "tool")
LossOn = Literal["assistant", "completion", "all"]
FILE_NAME = "chat_template.jinja"
_MARK = "70317"  # stands for an answer: digits, which no filter of a template changes
ENCODING = 2  # goes into what cached tokens are known by; one more wherever a conversation gets other ids than before


class Message(NamedTuple):
    """One turn of a conversation; role is one of ROLES."""

    role: str
    content: str


class UntrainedMessage(Message):
    """An assistant's turn that is there to be read, not to be learnt: OpenAI's "weight": 0."""


class Encoded(NamedTuple):
    """ids: i32 [n], the first is BOS where there is one. trained: bool [n], whether the token at i is a target to learn (not
    shifted).
    """

    ids: np.ndarray
    trained: np.ndarray


class ChatTemplate:
    """A Jinja chat template in the Hugging Face convention, rendered in a sandbox; in a process of its own, with limits of
    time and memory, where it is none of CHAT_TEMPLATES.

    It sees `messages` (role, content), `add_generation_prompt`, `raise_exception()`, `bos_token`, `eos_token` and
    `pad_token` (the tokenizer's own names of them, undefined where it has none), and None for `tools` and `documents`; no
    clock, so that the same conversation is the same text tomorrow.

    name: the template's name or file, for messages. digest: sha256 (hex) of the source. Raises ValueError with the line
    of a syntax error.
    """

    def __init__(self, source: str, name: str):
        self.source, self.name = source, name
        self.digest = hashlib.sha256(source.encode()).hexdigest()
        self._escaped = markers.double(source)
        self._compute(None)

    def __reduce__(self):
        return ChatTemplate, (self.source, self.name)

    @classmethod
    def from_config(cls, value: str, field: str = "sft.template") -> "ChatTemplate":
        """The template of a name in CHAT_TEMPLATES or of a .jinja file; ValueError naming `field` for anything else."""
        if value in CHAT_TEMPLATES:
            return cls(CHAT_TEMPLATES[value], value)
        if not value.endswith(".jinja"):
            close = difflib.get_close_matches(value, CHAT_TEMPLATES, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"{field}={value!r} is neither one of {', '.join(CHAT_TEMPLATES)} nor a path that ends in .jinja; the "
                f"nearest name is {close!r}."
            )
        try:
            with open(value, "rb") as file:
                return cls(file.read().decode(), value)
        except OSError as error:
            raise ValueError(f"{field}={value!r} cannot be read ({error.strerror}).") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"{field}={value!r} is not valid UTF-8 (byte {error.start}).") from error

    @classmethod
    def from_dir(cls, folder: str) -> "ChatTemplate | None":
        """The template that `save` wrote to a folder, None where there is none."""
        path = os.path.join(folder, FILE_NAME)
        return cls.from_config(path) if os.path.isfile(path) else None

    def save(self, folder: str) -> None:
        """Write FOLDER/chat_template.jinja."""
        path = os.path.join(folder, FILE_NAME)
        with open(f"{path}.tmp", "wb") as file:
            file.write(self.source.encode())
        os.replace(f"{path}.tmp", path)

    def render(
        self, messages: Sequence[Message], add_generation_prompt: bool = False, tokenizer: Tokenizer | None = None
    ) -> str:
        """The text of a conversation; ValueError with the line where the template fails or refuses.

        tokenizer: whose names of special tokens it has; None: ours, "<bos>" and "<eos>".
        """
        doubled = [Message(m.role, markers.double(m.content)) for m in messages]
        names = OUR_NAMES if tokenizer is None else tokenizer.names
        return markers.unescape(self._render(doubled, add_generation_prompt, names))

    def encode(
        self, tokenizer: Tokenizer, messages: Sequence[Message], *, loss_on: LossOn, is_finished: bool = True
    ) -> Encoded:
        """Token ids of a conversation that ends with an assistant turn, and which of them are trained on.

        An assistant turn is trained up to the last special token that the template ends it with; where it has none, EOS
        is appended. BOS comes first where the tokenizer or the template is one of this project, else where the template
        writes it.

        Args:
          tokenizer: its special_ids (and aliases for other models' markers) become single tokens; texts never do.
          messages: the last one is the assistant's.
          loss_on: "assistant": every assistant turn with its end marker. "completion": the last one, whatever the template
            makes of those before it. "all": every token but BOS. Nothing of an UntrainedMessage is.
          is_finished: False where a limit of its length cut the last turn off, so that nothing ends it.

        Raises:
          ValueError: if the last message is not the assistant's, the template fails, leaves out a response, or does not
            write a prompt and its response one after the other.
        """
        if loss_on not in get_args(LossOn):
            raise ValueError(f"sft.loss_on={loss_on!r} is not one of {', '.join(get_args(LossOn))}.")
        if not messages or messages[-1].role != "assistant":
            raise ValueError("A conversation to train on must end with an assistant message.")
        is_each = loss_on == "assistant" or not _turn_end(self, tokenizer).is_written
        is_each |= loss_on == "all" and any(isinstance(message, UntrainedMessage) for message in messages)
        spans = self._spans(tokenizer, messages, is_each)
        if not is_finished:
            text = spans[-1].text.removesuffix(_turn_end(self, tokenizer).after)
            spans[-1] = spans[-1]._replace(text=text, is_finished=False)
        ids, turns = self._tokenize(tokenizer, spans)
        if loss_on == "all":
            return Encoded(ids, (ids != tokenizer.bos_id) & (turns >= 0))
        trained = turns == np.abs(turns).max() if loss_on == "completion" else turns > 0
        if not trained.any():
            raise ValueError(f'Every assistant message that sft.loss_on={loss_on} trains on has "weight": 0.')
        return Encoded(ids, trained)

    def encode_scored(self, tokenizer: Tokenizer, messages: Sequence[Message], *, is_finished: bool = True) -> Encoded:
        """`encode` with loss_on="completion", up to the first of `stop_ids` in the last turn, at which a reward is read.

        A response that a model writes ends there, too, whatever the template writes after it. One that is cut off before
        (is_finished=False: by a limit of its length) has no such token, as where the template ends this turn otherwise than
        others: its reward is read at its last token.
        """
        last = [Message(*message) for message in messages[-1:]]  # a reward has it, whatever its weight
        talk = [*messages[:-1], *last]
        ids, trained = self.encode(tokenizer, talk, loss_on="completion", is_finished=is_finished)
        ends = np.flatnonzero(trained & np.isin(ids, self.stop_ids(tokenizer)))[:1] + is_finished
        end = ends[0] if len(ends) else np.flatnonzero(trained)[-1] + 1
        return Encoded(ids[:end], trained[:end])

    def encode_prompt(self, tokenizer: Tokenizer, messages: Sequence[Message]) -> np.ndarray:
        """Token ids (i32) of a conversation that awaits the assistant; with a tokenizer of this project a prefix of what
        `encode` gives with its answer.

        Raises ValueError as `encode` does, and if the last message is not a user's or a tool's.
        """
        if not messages or messages[-1].role not in ("user", "tool"):
            raise ValueError("A conversation to answer must end with a user or a tool message.")
        is_each = not _turn_end(self, tokenizer).is_written
        return self._tokenize(tokenizer, self._spans(tokenizer, messages, is_each))[0]

    def stop_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """The ids that end an assistant turn: EOS, and the template's own end marker."""
        return _turn_end(self, tokenizer).stop_ids

    def answer_prefix(self, tokenizer: Tokenizer) -> str:
        """White space that the template writes between prompt and response: a model writes it, too, but does not say it."""
        return _turn_end(self, tokenizer).prefix

    def adds_bos(self, tokenizer: Tokenizer) -> bool:
        """Whether `encode` puts BOS before what the template writes."""
        prompt = _probe(self, tokenizer)[:-1]
        ids = self._tokenize(tokenizer, self._spans(tokenizer, prompt, False), has_bos=False)[0]
        return self._begins_with_bos(tokenizer) and (not len(ids) or ids[0] != tokenizer.bos_id)

    @property
    def is_ours(self) -> bool:
        """Whether it is one of CHAT_TEMPLATES."""
        return self.source in CHAT_TEMPLATES.values()

    def _begins_with_bos(self, tokenizer: Tokenizer) -> bool:
        return tokenizer.bos_id is not None and (self.is_ours or markers.is_ours(tokenizer))

    def _markers(self, tokenizer: Tokenizer) -> Markers:
        return markers.markers_of(tokenizer, has_known=self.is_ours or markers.is_ours(tokenizer))

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool, names: Mapping[str, str | None]) -> str:
        return self._compute({
            "messages": [message._asdict() for message in messages], "add_generation_prompt": add_generation_prompt,
            "tools": None, "documents": None, **{name: token for name, token in names.items() if token is not None},
        })  # fmt: skip

    def _compute(self, values: dict[str, Any] | None) -> str:
        """The text for these values; of none the template is only compiled."""
        try:
            if not self.is_ours:
                return template_worker.render(self._escaped, values)
            return "" if values is None else template_sandbox.render(self._escaped, values)
        except TemplateError as error:
            where = f", line {error.line}" if error.line else ""
            raise ValueError(f"Chat template {self.name}{where}: {markers.unescape(str(error))}") from error

    def _tokenize(
        self, tokenizer: Tokenizer, spans: Sequence["_Span"], has_bos: bool = True
    ) -> tuple[np.ndarray, np.ndarray]:
        """ids: i32 [n]. turns: i32 [n], k on what is to be learnt of the k-th span that is a response, -k where it is not to
        be, 0 elsewhere.
        """
        known = self._markers(tokenizer)
        parts: list[str | int] = []
        turn_of: list[int] = []
        turn = 0
        for span in spans:
            turn += span.is_response
            found = known.either.split(span.text)  # text, marker, text, ..., marker, text
            has_end = span.is_finished and len(found) > 1 and not found[-1].strip()
            for place, text in enumerate(found):
                if not text:
                    continue
                if place % 2 and text not in known.ids:
                    raise ValueError(
                        f"Chat template {self.name} writes {text}, which is no special token of the tokenizer; of the "
                        f"templates by name, {_fitting_template(known)!r} fits it."
                    )
                is_trained = span.is_response and (place < len(found) - 1 or not has_end)
                parts.append(known.ids[text] if place % 2 else markers.unescape(text))
                turn_of.append(turn * span.sign if is_trained else 0)
            if span.is_response and span.is_finished and not has_end:
                parts.append(tokenizer.eos_id)
                turn_of.append(turn * span.sign)
        if has_bos and self._begins_with_bos(tokenizer) and parts[:1] != [tokenizer.bos_id]:
            parts, turn_of = [tokenizer.bos_id or 0, *parts], [0, *turn_of]
        ids = tokenizer.encode_parts(parts)
        turns = np.repeat(np.array(turn_of, np.int32), [len(part) for part in ids])
        return np.concatenate([np.zeros(0, np.int32), *ids]), turns

    def _spans(self, tokenizer: Tokenizer, messages: Sequence[Message], is_each: bool) -> list["_Span"]:
        """The escaped text of a conversation, cut before and after its last assistant turn, or before and after each."""
        known = self._markers(tokenizer)
        escaped = [Message(m.role, markers.escape(m.content, known)) for m in messages]
        responses = [i for i, m in enumerate(messages) if m.role == "assistant"]
        if not is_each:
            responses = [i for i in responses if i == len(messages) - 1]
        cuts = [cut for i in responses for cut in ((i, False), (i + 1, True))]
        if messages[-1].role != "assistant":
            cuts.append((len(messages), False))
        spans, text = [], ""
        for stop, is_response in cuts:
            longer = self._render(escaped[:stop], not is_response, tokenizer.names)
            if not longer.startswith(text):
                raise ValueError(f"Chat template {self.name}: {_divergence(text, longer, stop, is_response)}")
            span, text = longer[len(text) :], longer
            if is_response and messages[stop - 1].content.strip() and not known.either.sub("", span).strip():
                raise ValueError(f"Chat template {self.name} leaves out the content of assistant message {stop}.")
            sign = -1 if isinstance(messages[stop - 1], UntrainedMessage) else 1
            spans += [_Span(span, True, sign)] if is_response else self._cut(span, tokenizer)
        return spans

    def _cut(self, text: str, tokenizer: Tokenizer) -> list["_Span"]:
        """A text without responses that are trained on, cut before those in it where the tokenizer is of this project."""
        before = _turn_end(self, tokenizer).before if markers.is_ours(tokenizer) else ""
        if not before:
            return [_Span(text, False)]
        *first, last = text.split(before)
        return [_Span(part + before, False) for part in first] + [_Span(last, False)]


class _Span(NamedTuple):
    """A part of a rendered conversation. sign: -1 for a response that is not to be learnt. is_finished: EOS ends a response
    that has no end.
    """

    text: str
    is_response: bool
    sign: int = 1
    is_finished: bool = True


class _TurnEnd(NamedTuple):
    """What a template writes around a response: what is before and after it, and the ids that end it, the first is EOS.

    is_written: the template itself ends a turn with a special token. prefix: white space between prompt and response.
    """

    before: str
    after: str
    stop_ids: tuple[int, ...]
    is_written: bool
    prefix: str


@functools.lru_cache(maxsize=8)
def _turn_end(template: ChatTemplate, tokenizer: Tokenizer) -> _TurnEnd:
    talk = _probe(template, tokenizer)
    prompt, without = (template._render(talk[:-1], is_prompt, tokenizer.names) for is_prompt in (True, False))
    whole = template._render(talk, False, tokenizer.names)
    head, mark, after = whole.rpartition(_MARK)
    if not mark:
        raise ValueError(f"Chat template {template.name} leaves out the content of assistant message {len(talk)}.")
    ids, turns = template._tokenize(tokenizer, [_Span(head + mark, False), _Span(after, True)])
    end = int(ids[turns > 0][-1])
    stop_ids = (tokenizer.eos_id,) if end == tokenizer.eos_id else (tokenizer.eos_id, end)
    *found, rest = template._markers(tokenizer).either.split(after)
    before = prompt[len(without) :] if prompt.startswith(without) else ""
    prefix = head[len(prompt) :] if head.startswith(prompt) else ""
    is_written = bool(found) and not rest.strip()
    return _TurnEnd(before, after, stop_ids, is_written, "" if prefix.strip() else prefix)


def _probe(template: ChatTemplate, tokenizer: Tokenizer) -> list[Message]:
    """A conversation that the template takes and that ends with the answer _MARK; it has a system message where one must be.

    Raises the template's ValueError where it takes neither.
    """
    talk = [Message("user", "a"), Message("assistant", _MARK)]
    try:
        template._render(talk, False, tokenizer.names)
    except ValueError as error:
        talk = [Message("system", "s"), *talk]
        try:
            template._render(talk, False, tokenizer.names)
        except ValueError:
            raise error from None
    return talk


@contextlib.contextmanager
def located(where: str) -> Iterator[None]:
    """A ValueError of what is done within begins with `where`: "path, line n"."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _fitting_template(known: Markers) -> str:
    """The name of a template that writes no marker that the tokenizer lacks."""
    lacking = markers.KNOWN_MARKERS - known.ids.keys()
    return [name for name, source in CHAT_TEMPLATES.items() if not any(marker in source for marker in lacking)][-1]


def _divergence(text: str, longer: str, stop: int, is_response: bool) -> str:
    """Which two texts differ, where, and what is to be done."""
    place = len(os.path.commonprefix([text, longer]))
    found = repr(markers.unescape(text[place : place + 20])), repr(markers.unescape(longer[place : place + 20]))
    if is_response:
        return (
            f"the text of the first {stop - 1} messages with the generation prompt is not how the text of the first "
            f"{stop} begins ({found[0]} there, {found[1]} here), so prompt and response cannot be told apart."
        )
    return (
        f"the text of earlier messages changes when message {stop} follows (from {found[0]} to {found[1]}), so a turn "
        "that is trained on would not be what the model is to write; sft.loss_on=completion trains on the last turn alone."
    )


FIELDS = ("prompt", "response", "completion", "messages")  # the standard names of the records below


def conversation(record: Record, fields: Mapping[str, str]) -> list[Message]:
    """The conversation of a record: its "messages", or its "prompt" and "response" (or "completion").

    A prompt, or a response, is a text or itself a list of messages: {"role", "content"}, an assistant's also with OpenAI's
    "weight", 0 or 1. `fields` maps these names to those of the file.

    Raises:
      ValueError: naming file and line, for a missing field, a wrong type, an unknown role, an empty prompt, a
        conversation that does not end with an assistant's answer to a user or a tool, or anything else that a message
        has (calls of tools, a name, reasoning) or that stands beside a list of messages ("tools"): templates are not
        given it here, so that the model would be trained on another conversation than this one.
    """
    if sources.present_field(record, ("messages", "prompt", "response", "completion"), fields) == "messages":
        messages = _messages(record, "messages", fields)
    else:
        name = sources.present_field(record, ("response", "completion"), fields) or "response"
        messages = [*_messages(record, "prompt", fields, "user"), *_messages(record, name, fields, "assistant")]
    if messages[-1].role != "assistant":
        raise _error(record, f"the last message must be the assistant's, not one of role {messages[-1].role!r}")
    _check_prompt(record, messages[:-1])
    return messages


def prompt_messages(record: Record, fields: Mapping[str, str]) -> list[Message]:
    """The messages of a record's "prompt", a text or a list of messages that awaits an answer; ValueError as above."""
    messages = _messages(record, "prompt", fields, "user")
    _check_prompt(record, messages)
    return messages


def has_empty_response(messages: Iterable[Message]) -> bool:
    """Whether an assistant turn is empty or white space, so that nothing but its end would be learnt."""
    return any(message.role == "assistant" and not message.content.strip() for message in messages)


def hashable_prompt(messages: Sequence[Message]) -> str:
    """A canonical text of all but the last assistant turn: what is held out is decided by it (`is_held_out`)."""
    return json.dumps([[m.role, m.content] for m in messages[: -1 if messages[-1].role == "assistant" else None]])


def _error(record: Record, text: str) -> ValueError:
    return ValueError(f"{record.path}, line {record.line}: {text}.")


def _check_prompt(record: Record, prompt: list[Message]) -> None:
    if not any(message.content.strip() for message in prompt):
        raise _error(record, "the prompt is empty")
    if prompt[-1].role not in ("user", "tool"):
        raise _error(record, f"the prompt must end with a user or a tool message, not one of role {prompt[-1].role!r}")


def _messages(record: Record, name: str, fields: Mapping[str, str], role: str | None = None) -> list[Message]:
    """A field's list of messages, or its text as one message of `role` (None: only a list will do)."""
    value = sources.required_field(record, name, fields, object if role else list)
    key = fields.get(name, name)
    if role and isinstance(value, str):
        return [_message(record, key, {"role": role, "content": value})]
    if not isinstance(value, list):
        raise _error(record, f"the field {key!r} must be a text or a list of messages, not {type(value).__name__}")
    if not value:
        raise _error(record, f"the field {key!r} is an empty list")
    for name in ("tools", "functions"):
        if record.fields.get(name):
            raise _error(record, f"the field {name!r} is not supported: chat templates are given no tools here")
    return [_message(record, f"{key}[{i}]", item) for i, item in enumerate(value)]


SAYS_NOTHING: tuple[Any, ...] = (None, "", [], {})  # values of a message's other keys that are as good as no key


def _message(record: Record, where: str, item: Any) -> Message:
    if not isinstance(item, dict):
        raise _error(record, f"{where} must be an object with role and content, not {type(item).__name__}")
    for key in Message._fields:
        if key not in item:
            raise _error(record, f"{where} has no field {key!r} (there are: {', '.join(item) or 'none'})")
        if not isinstance(item[key], str):
            raise _error(record, f"{where}.{key} must be str, not {type(item[key]).__name__}")
    if item["role"] not in ROLES:
        close = difflib.get_close_matches(item["role"], ROLES, n=1, cutoff=0.0)[0]
        raise _error(
            record, f"{where}.role={item['role']!r} is not one of {', '.join(ROLES)}; the nearest is {close!r}"
        )
    try:
        item["content"].encode()
    except UnicodeEncodeError as error:
        raise _error(record, f"{where} has half a surrogate pair at character {error.start}") from error
    others = [
        key for key, value in item.items() if key not in (*Message._fields, "weight") and value not in SAYS_NOTHING
    ]
    if others:
        raise _error(
            record, f"{where}.{others[0]} is not supported: of a message only role, content and weight are used"
        )
    weight = item.get("weight")
    if weight is not None and item["role"] != "assistant":
        raise _error(record, f"{where}.weight is for messages of the assistant, not of role {item['role']!r}")
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        raise _error(record, f"{where}.weight must be 0 or 1, not {json.dumps(weight)}")
    return (UntrainedMessage if weight == 0 else Message)(item["role"], item["content"])
