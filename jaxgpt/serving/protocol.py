"""OpenAI's completions and chat completions: a body becomes requests for the engine, or an error a client can act on."""

import dataclasses
import difflib
import functools
import json
import re
import typing
from collections.abc import Callable
from typing import Any

from jaxgpt import config as config_lib
from jaxgpt.data.chat import ROLES, SAYS_NOTHING, Message
from jaxgpt.generate.dialogue import ChatFormat
from jaxgpt.generate.engine import MAX_ALTERNATIVES, Request
from jaxgpt.generate.samplers import SamplerConfig
from jaxgpt.generate.text import stop_ids

MAX_STOP = 16  # stop strings of one request
MAX_STOP_LENGTH = 1000  # characters of a stop string: each token is compared with what all of them begin with
MAX_MESSAGE = 500  # characters of an error's message, which may quote what a client sent
_TYPES = {429: "rate_limit_error", 500: "server_error", 503: "service_unavailable_error"}
# What clients may send although it is not supported, as long as it says "off".
_OFF: dict[str, tuple] = {
    "frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},), "best_of": (1,), "echo": (False,),
    "suffix": ("",), "tools": ([],), "tool_choice": ("none", "auto"), "response_format": ({"type": "text"},),
    "modalities": (["text"],), "store": (False,), "functions": ([],),
}  # fmt: skip


class ApiError(Exception):
    """An HTTP status with a body in OpenAI's format."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None):
        message = _shortened(message, MAX_MESSAGE)
        super().__init__(message)
        kind = _TYPES.get(status, "invalid_request_error")
        self.status = status
        self.body = {
            "error": {"message": message, "type": kind, "param": param and _shortened(param, 100), "code": code}
        }


def _shortened(text: str, most: int) -> str:
    """A text with its middle left out where it is longer than that: its end says what to do."""
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[len(text) - most // 2 + 5 :]}"


def internal_error(error: Exception) -> ApiError:
    """The error for what is no client's mistake; what it says stays in the log."""
    return ApiError(500, f"Internal error: {type(error).__name__}.")


def invalid(param: str | None, message: str) -> ApiError:
    """The error for a parameter's value."""
    return ApiError(400, message, param=param, code="invalid_value")


@dataclasses.dataclass(frozen=True)
class StreamOptions:
    """include_usage: a last chunk with the number of tokens. include_obfuscation: accepted, without effect."""

    include_usage: bool = False
    include_obfuscation: bool = False


@dataclasses.dataclass(frozen=True)
class _Body:
    """The fields that both endpoints have. user and metadata are accepted, without effect."""

    model: str
    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    n: int = 1
    stop: str | tuple[str, ...] = ()
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    user: str = ""
    metadata: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class CompletionBody(_Body):
    """POST /v1/completions. prompt: a text, a list of token ids, or a list of such. logprobs: alternatives per token."""

    prompt: Any = None
    logprobs: int | None = None


@dataclasses.dataclass(frozen=True)
class ChatBody(_Body):
    """POST /v1/chat/completions. max_completion_tokens is the newer name of max_tokens."""

    messages: Any = None
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int = 0


@dataclasses.dataclass(frozen=True)
class Call:
    """What a body asks for. requests: one per choice, in the order of their index. num_prompt: tokens of its prompts.

    num_logprobs: alternatives that each token is listed with; None is no log-probs.
    """

    requests: tuple[Request, ...]
    stop: tuple[str, ...]
    prefix: str
    num_prompt: int
    num_logprobs: int | None
    stream: bool
    include_usage: bool


@dataclasses.dataclass(frozen=True)
class Limits:
    """model: the name clients ask for. max_length: tokens of prompt and response. max_choices: of one call."""

    model: str
    max_length: int
    max_choices: int


def parse_body(cls: type, data: bytes) -> Any:
    """The body of one of the classes above; ApiError 400 naming the parameter and, where it is unknown, the nearest."""
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"The body is not valid JSON: {error}.") from error
    if not isinstance(values, dict):
        raise ApiError(400, "The body must be a JSON object.")
    hints, fields = typing.get_type_hints(cls), {}
    for key, value in values.items():
        if value is None:
            continue
        if key in _OFF:
            if value not in _OFF[key]:
                raise ApiError(400, f"{key} is not supported; leave it out.", param=key, code="unsupported_parameter")
            continue
        if key not in hints:
            nearest = difflib.get_close_matches(key[:100], hints, n=1, cutoff=0.0)[0]
            message = f"There is no parameter {key!r}; the nearest is {nearest!r}."
            raise ApiError(400, message, param=key, code="unknown_parameter")
        fields[key] = _checked(key, functools.partial(config_lib.convert, value, hints[key], key))
    for key in ("model", "messages" if cls is ChatBody else "prompt"):
        if key not in fields:
            raise ApiError(400, f"{key} is required.", param=key, code="missing_required_parameter")
    return cls(**fields)


def _checked(param: str, make: Callable[[], Any]) -> Any:
    """make(), with its ValueError as the client's mistake."""
    try:
        return make()
    except (ValueError, OverflowError) as error:
        message = str(error).replace("config field", "field")
        raise invalid(param, message) from error


def completion_call(body: CompletionBody, form: ChatFormat, limits: Limits, seed: int) -> Call:
    """The call of a completions body; seed: where it names none. ApiError for what cannot be served."""
    prompt = body.prompt
    is_one = isinstance(prompt, str) or (isinstance(prompt, list) and prompt and type(prompt[0]) is int)
    prompts = [prompt] if is_one else prompt
    if not isinstance(prompts, list) or not prompts:
        raise invalid("prompt", "prompt must be a text, a list of token ids, or a list of such.")
    _check_choices(body, len(prompts), limits)
    encoded = [_encode(form, prompt) for prompt in prompts]
    max_tokens = 16 if body.max_tokens is None else body.max_tokens  # OpenAI's default
    ends = stop_ids(form.tokenizer)
    if not all(encoded):
        raise invalid("prompt", "prompt has no tokens, so there is nothing to continue.")
    return _call(body, encoded, ends, "", max_tokens, "max_tokens", body.logprobs, "logprobs", limits, seed)


def chat_call(body: ChatBody, form: ChatFormat, limits: Limits, seed: int) -> Call:
    """The call of a chat completions body; seed: where it names none. ApiError for what cannot be served."""
    if form.template is None:
        message = "This model has no chat template; use /v1/completions."
        raise ApiError(400, message, param="model", code="no_chat_template")
    _check_choices(body, 1, limits)
    messages = _messages(body.messages, limits)
    ids = _checked("messages", lambda: form.encode(messages))
    if not ids:
        raise invalid("messages", "messages have no tokens, so there is nothing to answer.")
    name = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    wanted = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    max_tokens = max(1, limits.max_length - len(ids)) if wanted is None else wanted
    if body.top_logprobs and not body.logprobs:
        raise invalid("top_logprobs", "top_logprobs needs logprobs=true.")
    num_logprobs = body.top_logprobs if body.logprobs else None
    return _call(body, [ids], form.stop_ids, form.prefix, max_tokens, name, num_logprobs, "top_logprobs", limits, seed)


def _call(
    body: _Body, prompts: list[list[int]], ends: tuple[int, ...], prefix: str, max_tokens: int, max_name: str,
    num_logprobs: int | None, logprobs_name: str, limits: Limits, seed: int,
) -> Call:  # fmt: skip
    """The call of prompts that are token ids already."""
    if max_tokens < 1:
        raise invalid(max_name, f"{max_name} must be at least 1, not {max_tokens}.")
    for ids in prompts:
        if len(ids) + max_tokens > limits.max_length:
            message = (
                f"The prompt has {len(ids)} tokens; with {max_tokens} new ones that is more than this model's context of "
                f"{limits.max_length}."
            )
            raise ApiError(400, message, param=max_name, code="context_length_exceeded")
    if not 0 <= (num_logprobs or 0) <= MAX_ALTERNATIVES:
        message = f"{logprobs_name} must be between 0 and {MAX_ALTERNATIVES}, not {num_logprobs}."
        raise invalid(logprobs_name, message)
    stop = (body.stop,) if isinstance(body.stop, str) else body.stop
    if len(stop) > MAX_STOP or not all(stop):
        raise invalid("stop", f"stop must be at most {MAX_STOP} texts, none empty.")
    if max(map(len, stop), default=0) > MAX_STOP_LENGTH:
        raise invalid("stop", f"A stop text can have at most {MAX_STOP_LENGTH} characters.")
    for text in stop:
        _check_text(text, "stop")
    sampler = _sampler(body)
    seed = seed if body.seed is None else body.seed
    if not -(2**63) <= seed < 2**63:
        raise invalid("seed", f"seed must be a 64-bit integer, not {seed}.")
    requests = [
        Request(ids, max_tokens, ends, sampler, seed, choice, bool(num_logprobs))
        for choice, ids in enumerate(ids for ids in prompts for _ in range(body.n))
    ]
    return Call(
        requests=tuple(requests),
        stop=tuple(stop),
        prefix=prefix,
        num_prompt=sum(map(len, prompts)),
        num_logprobs=num_logprobs,
        stream=body.stream,
        include_usage=body.stream_options.include_usage,
    )


def _sampler(body: _Body) -> SamplerConfig:
    names = [field.name for field in dataclasses.fields(SamplerConfig)]
    try:
        return SamplerConfig(**{name: getattr(body, name) for name in names})
    except ValueError as error:
        found = re.search(r"sampler\.(\w+)", str(error))
        message = str(error).replace("sampler.", "")
        raise invalid(found[1] if found else None, message) from error


def _check_choices(body: _Body, num_prompts: int, limits: Limits) -> None:
    if body.model != limits.model:
        message = f"There is no model {body.model!r}; this server has {limits.model!r}."
        raise ApiError(404, message, param="model", code="model_not_found")
    if not 1 <= body.n * num_prompts <= limits.max_choices:
        message = f"n x prompts must be between 1 and {limits.max_choices}, not {body.n} x {num_prompts}."
        raise invalid("n", message)


def _encode(form: ChatFormat, prompt: Any) -> list[int]:
    """Token ids of a text, with BOS, or of a list of ids, as they are."""
    if isinstance(prompt, str):
        _check_text(prompt, "prompt")
        return form.tokenizer.encode(prompt, add_bos=True).tolist()
    size = form.tokenizer.vocab_size
    if not isinstance(prompt, list) or not prompt or not all(type(i) is int and 0 <= i < size for i in prompt):
        message = f"prompt must be a text, a list of token ids below {size}, or a list of such."
        raise invalid("prompt", message)
    return prompt


def _messages(items: Any, limits: Limits) -> list[Message]:
    if not isinstance(items, list) or not items:
        raise invalid("messages", "messages must be a list with at least one message.")
    if len(items) > limits.max_length:  # each has a token at least, and a template takes long over many
        message = f"{len(items)} messages are more than this model's context of {limits.max_length} tokens."
        raise ApiError(400, message, param="messages", code="context_length_exceeded")
    return [_message(item, f"messages[{i}]") for i, item in enumerate(items)]


def _message(item: Any, where: str) -> Message:
    """A message of {"role", "content"}; content is a text or a list of {"type": "text", "text"}."""
    if not isinstance(item, dict):
        raise invalid(where, f"{where} must be an object with role and content.")
    role = "system" if item.get("role") == "developer" else item.get("role")
    if role not in ROLES:
        nearest = difflib.get_close_matches(str(role)[:100], ROLES, n=1, cutoff=0.0)[0]
        message = f"{where}.role={role!r} is not one of {', '.join(ROLES)}; the nearest is {nearest!r}."
        raise invalid(f"{where}.role", message)
    known = ("role", "content", "refusal")
    unknown = [str(key) for key, value in item.items() if key not in known and value not in SAYS_NOTHING]
    if unknown:
        message = f"{where}.{unknown[0]} is not supported; leave it out."
        raise ApiError(400, message, param=f"{where}.{unknown[0]}", code="unsupported_parameter")
    content = item.get("content")
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    if not all(isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in parts):
        message = f"{where}.content must be a text, or a list of parts of type 'text'."
        raise invalid(f"{where}.content", message)
    text = "".join(str(part["text"]) for part in parts)
    _check_text(text, f"{where}.content")
    return Message(role, text)


def _check_text(text: str, param: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        message = f"{param} has half a surrogate pair at character {error.start}."
        raise invalid(param, message) from error
