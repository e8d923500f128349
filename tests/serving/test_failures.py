"""Whatever a request is, it ends that request alone: every client gets an answer, and the server goes on."""

import asyncio
import json

import pytest
from hypothesis import HealthCheck, example, given, settings

from jaxgpt.data.sentencepiece_tokenizer import SentencePieceTokenizer
from jaxgpt.generate import stream
from tests.serving.bodies import bodies
from tests.serving.tiny import (
    CHAT,
    COMPLETION,
    HELLO,
    TOKENIZER,
    call,
    check_error,
    client,
    complete,
    make,
)


class WithoutBos(SentencePieceTokenizer):
    """A tokenizer as GPT-2's: nothing stands before a text."""

    def __init__(self, model):
        super().__init__(model)
        self.bos_id = None

    def encode(self, text, *, add_bos=False, add_eos=False):
        return super().encode(text, add_eos=add_eos)


NUMBERS = [
    ("top_k", 2**31), ("top_k", 10**30), ("top_k", -1), ("top_p", 1e-300), ("top_p", float("nan")), ("min_p", 1.5),
    ("temperature", 1e300), ("temperature", float("inf")), ("repetition_penalty", 1e300), ("repetition_penalty", 1e-45),
    ("seed", 2**63), ("seed", -(2**63) - 1), ("n", 2**64), ("n", -1), ("max_tokens", 10**3000), ("logprobs", 2**31),
    ("stop", ["a" * 1001]), ("stop", ["a"] * 17), ("stop", "\ud800"),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), NUMBERS, ids=lambda value: str(value)[:20])
def test_a_number_beyond_its_bounds_is_400_and_nobody_else_notices(served, field, value):
    response = call(served, "/v1/completions", COMPLETION | {field: value})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, field), error
    assert len(error["message"]) < 600
    assert call(served, "/health", method="GET").json() == {"status": "ok", "running": 0, "waiting": 0}


def test_the_largest_numbers_that_are_allowed_are_served(served):
    edges = {"top_k": 2**31 - 1, "top_p": 1e-6, "min_p": 1, "repetition_penalty": 1e-6, "seed": -(2**63)}
    for temperature in (0, 1e-6, 1e6):
        assert complete(served, **edges, temperature=temperature)["usage"]["completion_tokens"] > 0


@pytest.mark.parametrize("prompt", ["", [""], ["Ann", ""]])
def test_an_empty_prompt_is_400_where_the_tokenizer_has_no_bos(params, prompt):
    made = make(params, tokenizer=WithoutBos(TOKENIZER.model), template=None)
    made.worker.start()
    try:
        response = call(made, "/v1/completions", {"model": "tiny", "prompt": prompt})
        check_error(response, 400, "prompt", "invalid_value", "has no tokens")
        assert call(made, "/health", method="GET").status_code == 200
    finally:
        made.worker.stop()


def two_at_once(served, second):
    """The responses to a greedy completion and to another request, sent together."""

    async def send():
        async with client(served.app) as http:
            first = COMPLETION | {"max_tokens": 20, "temperature": 0}
            return await asyncio.gather(
                http.post("/v1/completions", json=first), http.post("/v1/completions", json=second)
            )

    return asyncio.run(send())


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("place", ["start", "text"])
def test_an_unexpected_exception_ends_its_own_request(served, monkeypatch, caplog, place, streams):
    """One that starting the request raises, and one that its text raises after a few tokens."""
    alone = complete(served, prompt="ab", max_tokens=20)["choices"][0]["text"]
    start, push = served.engine.engine.start, stream.TextStream.push

    def broken_start(request):
        if request.max_new == 7:
            raise ArithmeticError("secret")
        return start(request)

    def broken_push(self, token):
        if self._stop == ("never",) and self._num_tokens == 3:
            raise ArithmeticError("secret")
        return push(self, token)

    if place == "start":
        monkeypatch.setattr(served.engine.engine, "start", broken_start)
    else:
        monkeypatch.setattr(stream.TextStream, "push", broken_push)
    fields = {"max_tokens": 7, "stop": "never", "temperature": 0, "n": 2, "stream": streams}
    good, bad = two_at_once(served, COMPLETION | fields)
    assert good.json()["choices"][0]["text"] == alone
    error = json.loads(bad.text.split("data: ")[-1])["error"]
    assert bad.status_code == (200 if streams else 500)
    assert (error["type"], error["message"]) == ("server_error", "Internal error: ArithmeticError.")
    assert "ArithmeticError: secret" in caplog.text
    monkeypatch.undo()
    assert complete(served, prompt="ab", max_tokens=20)["choices"][0]["text"] == alone
    assert call(served, "/health", method="GET").json() == {"status": "ok", "running": 0, "waiting": 0}


def test_a_client_whose_loop_has_gone_stops_nobody(served):
    """The loop that a response is written in may be closed before its last piece comes."""

    def emit(index, piece):
        raise RuntimeError("Event loop is closed")

    async def call_of():
        from jaxgpt.serving import protocol

        body = protocol.parse_body(protocol.CompletionBody, json.dumps(COMPLETION).encode())
        form = stream_form(served)
        return protocol.completion_call(body, form, protocol.Limits("tiny", 64, 5), 0)

    served.worker.submit(asyncio.run(call_of()), emit)
    assert complete(served, max_tokens=2)
    assert call(served, "/health", method="GET").json() == {"status": "ok", "running": 0, "waiting": 0}


def stream_form(served):
    from jaxgpt.generate.dialogue import ChatFormat

    return ChatFormat.of(served.engine.tokenizer, None)


def test_a_failed_step_answers_all_and_is_reported(idle, monkeypatch):
    """A step serves all slots: its failure is nobody's own, and the worker ends."""
    failed = []

    def broken():
        raise RuntimeError("device lost")

    monkeypatch.setattr(idle.engine.engine, "step", broken)
    idle.worker.start(on_failure=lambda: failed.append(idle.worker.failure))
    for response in two_at_once(idle, COMPLETION | {"n": 4}):
        check_error(response, 500, None, None, "The engine failed: RuntimeError")
    assert failed == ["The engine failed: RuntimeError."]
    health = call(idle, "/health", method="GET")
    assert (health.status_code, health.json()["status"]) == (500, "The engine failed: RuntimeError.")


@pytest.mark.parametrize(
    ("path", "body", "code"),
    [
        ("completions", COMPLETION | {"\ud800": 1}, "unknown_parameter"),
        ("completions", COMPLETION | {"metadata": {"\ud800": 1}}, "invalid_value"),
        ("chat/completions", CHAT | {"messages": [HELLO[0] | {"\udfff": 1}]}, "unsupported_parameter"),
        ("chat/completions", CHAT | {"messages": [HELLO[0] | {"role": "\udfff"}]}, "invalid_value"),
    ],
)
def test_a_lone_surrogate_as_a_key_is_400_in_valid_json(served, path, body, code):
    response = call(served, f"/v1/{path}", body)
    assert (response.status_code, response.json()["error"]["code"]) == (400, code)
    assert response.content.isascii()


@pytest.mark.parametrize("depth", range(880, 1000, 7))
def test_nesting_up_to_what_can_be_parsed_is_400(served, depth):
    body = b'{"model": "tiny", "messages": [{"role": ' + b"[" * depth + b"]" * depth + b"}]}"
    assert call(served, "/v1/chat/completions", body).status_code == 400


@settings(max_examples=80, deadline=None, derandomize=True, database=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])  # fmt: skip
@given(request=bodies("tiny"))
@example(request=("completions", json.dumps(COMPLETION | {"top_k": 2**31}).encode()))
def test_no_body_makes_health_anything_but_ok(served, request):
    path, body = request
    response = call(served, f"/v1/{path}", body)
    assert response.status_code in (200, 400, 404, 413)
    if response.status_code != 200:
        assert response.json()["error"]["type"] == "invalid_request_error"
    assert call(served, "/health", method="GET").json() == {"status": "ok", "running": 0, "waiting": 0}
