"""Conversations: records in, token ids and the mask of what is trained on out, by way of a Jinja chat template.

Prompt and response give the same tokens together and apart, because the text is cut before it is tokenized: at special
tokens, and before and after every assistant turn.
"""

import contextlib
import difflib
import functools
import hashlib
import json
import os
import re
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jinja2
import jinja2.ext
import jinja2.sandbox
import numpy as np

from jaxgpt.data import sources
from jaxgpt.data.sources import Record
from jaxgpt.data.tokenizer import META, RESERVED, Tokenizer
from jaxgpt.data.tokenizer import ROLES as ROLE_TOKENS

ROLES = ("system", "user", "assistant", "tool")
LossOn = Literal["assistant", "completion", "all"]
FILE_NAME = "chat_template.jinja"

# The formats of OpenAI's ChatML (which Qwen uses), Llama 3 and 3.1 (a tool's role is ipython), and Gemma (no system role:
# its text opens the first user turn). bos_token and eos_token are "<bos>" and "<eos>".
CHAT_TEMPLATES = {
    "plain": r"""
{%- set labels = {"system": "", "user": "Q: ", "assistant": "A: ", "tool": "Tool: "} -%}
{%- for message in messages -%}
    {{ "" if loop.first else "\n" }}
    {{- labels[message["role"]] + message["content"] }}
    {{- eos_token if message["role"] == "assistant" else "" }}
{%- endfor -%}
{{ ("\nA:" if messages else "A:") if add_generation_prompt else "" }}""",
    "chatml": r"""
{%- for message in messages -%}
    {{ "<|im_start|>" + message["role"] + "\n" + message["content"] + "<|im_end|>\n" }}
{%- endfor -%}
{{ "<|im_start|>assistant\n" if add_generation_prompt else "" }}""",
    "llama3": r"""
{{- bos_token }}
{%- for message in messages -%}
    {%- set role = "ipython" if message["role"] == "tool" else message["role"] -%}
    {{ "<|start_header_id|>" + role + "<|end_header_id|>\n\n" + message["content"] | trim + "<|eot_id|>" }}
{%- endfor -%}
{{ "<|start_header_id|>assistant<|end_header_id|>\n\n" if add_generation_prompt else "" }}""",
    "gemma": r"""
{{- bos_token }}
{%- set has_system = messages and messages[0]["role"] == "system" -%}
{%- for message in (messages[1:] if has_system else messages) -%}
    {%- if (message["role"] == "assistant") != (loop.index0 % 2 == 1) -%}
        {{ raise_exception("user (or tool) and assistant messages must alternate, after at most one system message") }}
    {%- endif -%}
    {{ "<start_of_turn>" + ("model" if message["role"] == "assistant" else "user") + "\n" }}
    {{- messages[0]["content"] + "\n\n" if loop.first and has_system else "" }}
    {{- message["content"] | trim + "<end_of_turn>\n" }}
{%- endfor -%}
{{ "<start_of_turn>model\n" if add_generation_prompt else "" }}""",
    "roles": r"""
{%- for message in messages -%}
    {{ "<|" + message["role"] + "|>" + message["content"] + "<|end|>" }}
{%- endfor -%}
{{ "<|assistant|>" if add_generation_prompt else "" }}""",
}

# Markers of other models' templates, on the reserved tokens that stand for them where a tokenizer has no such piece.
_BOS, _EOS, _END = META[1], META[2], ROLE_TOKENS[-1]
_ALIASES = {
    "<|im_start|>": RESERVED[0], "<|im_end|>": _END,
    "<|start_header_id|>": RESERVED[0], "<|end_header_id|>": RESERVED[1], "<|eot_id|>": _END,
    "<start_of_turn>": RESERVED[0], "<end_of_turn>": _END,
    "<|begin_of_text|>": _BOS, "<|end_of_text|>": _EOS, "<|endoftext|>": _EOS, "<s>": _BOS, "</s>": _EOS,
}  # fmt: skip
KNOWN_MARKERS = {*_ALIASES, _BOS, _EOS, *ROLE_TOKENS}
_ESCAPE = "\ue000"  # follows the first character of what must not be taken for a marker; a text's own is doubled


class Message(NamedTuple):
    """One turn of a conversation; role is one of ROLES."""

    role: str
    content: str


class Encoded(NamedTuple):
    """ids: i32 [n], the first is BOS. trained: bool [n], whether the token at i is a target to learn (not shifted)."""

    ids: np.ndarray
    trained: np.ndarray


class ChatTemplate:
    """A Jinja chat template in the Hugging Face convention, rendered in a sandbox.

    It sees `messages` (role, content), `add_generation_prompt`, `bos_token`, `eos_token`, `raise_exception()`, and None
    for `tools` and `documents`; no clock, so that the same conversation is the same text tomorrow.

    name: the template's name or file, for messages. digest: sha256 (hex) of the source. Raises ValueError with the line
    of a syntax error.
    """

    def __init__(self, source: str, name: str):
        self.source, self.name = source, name
        self.digest = hashlib.sha256(source.encode()).hexdigest()
        try:
            self._template = _environment().from_string(source.replace(_ESCAPE, _ESCAPE * 2))
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"Chat template {name}, line {error.lineno}: {error.message}") from error

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

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """The text of a conversation; ValueError with the line where the template fails or refuses."""
        doubled = [Message(m.role, m.content.replace(_ESCAPE, _ESCAPE * 2)) for m in messages]
        return _unescape(self._render(doubled, add_generation_prompt))

    def encode(self, tokenizer: Tokenizer, messages: Sequence[Message], *, loss_on: LossOn) -> Encoded:
        """Token ids of a conversation that ends with an assistant turn, and which of them are trained on.

        An assistant turn is trained up to the last special token that the template ends it with; where it has none, EOS
        is appended.

        Args:
          tokenizer: its special_ids (and aliases for other models' markers) become single tokens; texts never do.
          messages: the last one is the assistant's.
          loss_on: "assistant": every assistant turn with its end marker. "completion": the last one. "all": every token
            but BOS.

        Raises:
          ValueError: if the last message is not the assistant's, the template fails, leaves out a response, or does not
            write a prompt and its response one after the other.
        """
        if loss_on not in get_args(LossOn):
            raise ValueError(f"sft.loss_on={loss_on!r} is not one of {', '.join(get_args(LossOn))}.")
        if not messages or messages[-1].role != "assistant":
            raise ValueError("A conversation to train on must end with an assistant message.")
        ids, turns = self._tokenize(tokenizer, messages)
        if loss_on == "all":
            return Encoded(ids, ids != tokenizer.bos_id)
        return Encoded(ids, turns == turns.max() if loss_on == "completion" else turns > 0)

    def encode_scored(self, tokenizer: Tokenizer, messages: Sequence[Message]) -> Encoded:
        """`encode` with loss_on="completion", up to the first of `stop_ids` in the last turn, at which a reward is read.

        A response that a model writes ends there, too, whatever the template writes after it. One that is cut off before
        (by a limit of its length) has no such token: its reward is read at its last token.
        """
        ids, trained = self.encode(tokenizer, messages, loss_on="completion")
        end = np.flatnonzero(trained & np.isin(ids, self.stop_ids(tokenizer)))[0] + 1
        return Encoded(ids[:end], trained[:end])

    def encode_prompt(self, tokenizer: Tokenizer, messages: Sequence[Message]) -> np.ndarray:
        """Token ids (i32) of a conversation that awaits the assistant: a prefix of what `encode` gives with its answer.

        Raises ValueError as `encode` does, and if the last message is not a user's or a tool's.
        """
        if not messages or messages[-1].role not in ("user", "tool"):
            raise ValueError("A conversation to answer must end with a user or a tool message.")
        return self._tokenize(tokenizer, messages)[0]

    def stop_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """The ids that end an assistant turn: EOS, and the template's own end marker."""
        return _stop_ids(self, tokenizer)

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        try:
            return self._template.render(
                messages=[message._asdict() for message in messages], add_generation_prompt=add_generation_prompt,
                bos_token=_BOS, eos_token=_EOS, tools=None, documents=None,
            )  # fmt: skip
        except Exception as error:  # the template is a program of the user's: whatever it raises is a message to them
            lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == "<template>"]
            where = f", line {lines[-1]}" if lines else ""
            raise ValueError(f"Chat template {self.name}{where}: {_unescape(str(error))}") from error

    def _tokenize(self, tokenizer: Tokenizer, messages: Sequence[Message]) -> tuple[np.ndarray, np.ndarray]:
        """ids: i32 [n]. turns: i32 [n], k on the trained tokens of the k-th assistant turn, 0 elsewhere."""
        markers = _markers(tokenizer)
        parts: list[np.ndarray] = []
        texts: dict[int, str] = {}  # place among the parts -> the text there
        turn_of: list[int] = []
        turn = 0
        for span, is_response in self._spans(markers, messages):
            found = markers.either.split(span)  # text, marker, text, ..., marker, text
            if is_response and (len(found) == 1 or found[-1].strip()):
                found += [_EOS, ""]
            turn += is_response
            for place, text in enumerate(found):
                if text:
                    if place % 2 and text not in markers.ids:
                        raise ValueError(
                            f"Chat template {self.name} writes {text}, which is no special token of the tokenizer; of the "
                            f"templates by name, {_fitting_template(markers)!r} fits it."
                        )
                    if place % 2 == 0:
                        texts[len(parts)] = _unescape(text)
                    parts.append(np.array([markers.ids[text] if place % 2 else 0], np.int32))
                    turn_of.append(turn if is_response and place < len(found) - 1 else 0)
        for place, ids in zip(texts, tokenizer.encode_batch(list(texts.values())), strict=True):
            parts[place] = ids
        starts = bool(parts) and len(parts[0]) > 0 and parts[0][0] == tokenizer.bos_id
        if not starts and tokenizer.bos_id is not None:
            parts, turn_of = [np.array([tokenizer.bos_id], np.int32), *parts], [0, *turn_of]
        return np.concatenate(parts), np.repeat(np.array(turn_of, np.int32), [len(part) for part in parts])

    def _spans(self, markers: "_Markers", messages: Sequence[Message]) -> list[tuple[str, bool]]:
        """The escaped text of a conversation, cut before and after every assistant turn: (text, is a response)."""
        escaped = [Message(m.role, _escape(m.content, markers)) for m in messages]
        cuts = [cut for i, m in enumerate(messages) if m.role == "assistant" for cut in ((i, False), (i + 1, True))]
        if messages[-1].role != "assistant":
            cuts.append((len(messages), False))
        spans, text = [], ""
        for stop, is_response in cuts:
            longer = self._render(escaped[:stop], add_generation_prompt=not is_response)
            if not longer.startswith(text):
                raise ValueError(
                    f"Chat template {self.name}: {_divergence(text, longer, stop, is_response)}, so prompt and response "
                    "cannot be told apart; a template must not change what it wrote for earlier messages."
                )
            span, text = longer[len(text) :], longer
            if is_response and messages[stop - 1].content.strip() and not markers.either.sub("", span).strip():
                raise ValueError(f"Chat template {self.name} leaves out the content of assistant message {stop}.")
            spans.append((span, is_response))
        return spans


@functools.lru_cache(maxsize=4)
def _stop_ids(template: ChatTemplate, tokenizer: Tokenizer) -> tuple[int, ...]:
    ids, trained = template.encode(tokenizer, [Message("user", "a"), Message("assistant", "b")], loss_on="completion")
    end = int(ids[trained][-1])
    return (tokenizer.eos_id,) if end == tokenizer.eos_id else (tokenizer.eos_id, end)


@contextlib.contextmanager
def located(where: str) -> Iterator[None]:
    """A ValueError of what is done within begins with `where`: "path, line n"."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


class _Markers(NamedTuple):
    """ids: of every marker. either: matches (and captures) one of them, or a known marker that the tokenizer lacks. start:
    matches the first character of one, or of the beginning of one at the end of the text, where the template's text may
    complete it.
    """

    ids: dict[str, int]
    either: re.Pattern[str]
    start: re.Pattern[str]


@functools.lru_cache(maxsize=4)
def _markers(tokenizer: Tokenizer) -> _Markers:
    special = tokenizer.special_ids
    ids = {name: special[target] for name, target in marker_aliases(tokenizer).items()}
    ids |= {_EOS: tokenizer.eos_id} | ({} if tokenizer.bos_id is None else {_BOS: tokenizer.bos_id}) | special
    names = sorted({*ids, *KNOWN_MARKERS}, key=len, reverse=True)
    starts = []
    for name in names:
        beginnings = "|".join(re.escape(name[1:stop]) for stop in range(1, len(name)))
        starts.append(rf"{re.escape(name[0])}(?={re.escape(name[1:])}|(?:{beginnings})\Z)")
    return _Markers(ids, re.compile(f"({'|'.join(map(re.escape, names))})"), re.compile("|".join(starts)))


def marker_aliases(tokenizer: Tokenizer) -> dict[str, str]:
    """Markers of other models' templates and the reserved tokens that stand for them; none where the tokenizer is theirs."""
    special = tokenizer.special_ids
    return {name: target for name, target in _ALIASES.items() if name not in special} if RESERVED[0] in special else {}


def begins_with_bos(tokenizer: Tokenizer, text: str) -> bool:
    """Whether what a template wrote begins with a marker of BOS."""
    markers = _markers(tokenizer)
    match = markers.either.match(text)
    return match is not None and markers.ids.get(match.group()) == tokenizer.bos_id


def _fitting_template(markers: _Markers) -> str:
    """The name of a template that writes no marker that the tokenizer lacks."""
    lacking = KNOWN_MARKERS - markers.ids.keys()
    return [name for name, source in CHAT_TEMPLATES.items() if not any(marker in source for marker in lacking)][-1]


def _escape(content: str, markers: _Markers) -> str:
    """A message's content with nothing in it that is a marker, so that only the template's own are."""
    return markers.start.sub(lambda match: match.group() + _ESCAPE, content.replace(_ESCAPE, _ESCAPE * 2))


def _unescape(text: str) -> str:
    return re.sub(f"{_ESCAPE}({_ESCAPE}?)", r"\1", text)


def _divergence(text: str, longer: str, stop: int, is_response: bool) -> str:
    """Which two texts differ, and where."""
    place = len(os.path.commonprefix([text, longer]))
    found = repr(_unescape(text[place : place + 20])), repr(_unescape(longer[place : place + 20]))
    if is_response:
        return (
            f"the text of the first {stop - 1} messages with the generation prompt is not how the text of the first "
            f"{stop} begins ({found[0]} there, {found[1]} here)"
        )
    return f"the text of earlier messages changes when message {stop} follows (from {found[0]} to {found[1]})"


class _Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}, with which some templates enclose what the assistant says: no effect."""

    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = _raise_exception
    # Jinja's own would write <, > and everything beyond ASCII as \u escapes.
    environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    return environment


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def conversation(record: Record, fields: Mapping[str, str]) -> list[Message]:
    """The conversation of a record: its "messages", or its "prompt" and "response" (or "completion").

    A prompt, or a response, is a text or itself a list of messages. `fields` maps these names to those of the file.

    Raises:
      ValueError: naming file and line, for a missing field, a wrong type, an unknown role, an empty prompt, or a
        conversation that does not end with an assistant's answer to a user or a tool.
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
    return [_message(record, f"{key}[{i}]", item) for i, item in enumerate(value)]


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
    return Message(item["role"], item["content"])
