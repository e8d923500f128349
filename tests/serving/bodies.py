"""What clients may send: bodies that are right, nearly right, and wrong in every field and in every way JSON allows."""

import json

from hypothesis import strategies as st

NUMBERS = st.one_of(
    st.integers(-3, 70), st.floats(-2, 2), st.floats(),
    st.sampled_from([2**31 - 1, 2**31, 2**32, 2**63, 2**64, -(2**31), -(2**63), 10**30, 10**400, 1e-300, 1e-45, 1e300, -0.0]),
)  # fmt: skip
TEXTS = st.one_of(
    st.sampled_from(["", " ", "Ann sees", "Bob and Cid", "\x00", "<eos>", "<|end|>", "\ud800", "\U0001f600", "a" * 300]),
    st.text(st.characters(codec=None), max_size=12),
)  # fmt: skip
JSON_VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=6,
)

_IDS = st.lists(st.integers(-1, 310), max_size=6)
_MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system", "tool", "developer", "usr"]), "content": TEXTS},
        optional={"name": TEXTS, "tool_calls": JSON_VALUES},
    ),
    max_size=3,
)
# Of each field: what a client means by it, near its bounds. Log-probs of either endpoint, prompts as well as messages.
_RIGHT = {
    "max_tokens": st.integers(1, 8),
    "temperature": st.floats(0, 2),
    "top_p": st.floats(0.1, 1),
    "min_p": st.floats(0, 1),
    "top_k": st.integers(0, 50),
    "repetition_penalty": st.floats(0.5, 2),
    "seed": st.integers(0, 2**32),
    "n": st.integers(1, 2),
    "stop": st.one_of(TEXTS, st.lists(TEXTS, max_size=3)),
    "stream": st.booleans(),
    "stream_options": st.fixed_dictionaries({"include_usage": st.booleans()}),
    "logprobs": st.one_of(st.integers(0, 3), st.booleans()),
    "top_logprobs": st.integers(0, 3),
    "frequency_penalty": st.just(0),
    "best_of": st.just(1),
    "user": TEXTS,
}
_PROMPTS = {
    "completions": {"prompt": st.one_of(TEXTS, st.just("Ann sees"), _IDS, st.lists(TEXTS, max_size=2))},
    "chat/completions": {"messages": st.one_of(_MESSAGES, st.just([{"role": "user", "content": "Ann"}]))},
}
ENDPOINTS = tuple(_PROMPTS)


@st.composite
def bodies(draw, model: str) -> tuple[str, bytes]:
    """(endpoint, body) of a request: most are valid but for a field or two, some are no JSON at all."""
    endpoint = draw(st.sampled_from(ENDPOINTS))
    fields = {"model": st.just(model), "max_tokens": st.integers(1, 8), **_PROMPTS[endpoint]}
    for name in draw(st.lists(st.sampled_from(sorted(_RIGHT)), max_size=3, unique=True)):
        fields[name] = _RIGHT[name]
    kind = draw(st.sampled_from(["right", "right", "wrong value", "wrong value", "wrong key", "missing", "text"]))
    body = {name: draw(values) for name, values in fields.items()}
    if kind == "wrong value":
        name = draw(st.sampled_from(sorted({*_RIGHT, *_PROMPTS[endpoint], "model"})))
        body[name] = draw(st.one_of(NUMBERS, JSON_VALUES))
    elif kind == "wrong key":
        body[draw(TEXTS)] = draw(JSON_VALUES)
    elif kind == "missing":
        body.pop(draw(st.sampled_from(sorted(body))))
    data = json.dumps(body).encode()
    if kind == "text":
        data = draw(st.one_of(st.binary(max_size=40), st.just(b"[" * 900), st.just(data[:-1]), st.just(b"\xff" + data)))
    return endpoint, data
