"""The HTTP application in this process, over a tiny random model: what it answers, and what it refuses."""

import asyncio
import functools
import json
import threading

import jax
import numpy as np
import pytest

from jaxgpt.data.chat import Message
from jaxgpt.generate.samplers import SamplerConfig
from jaxgpt.generate.text import generate_texts
from jaxgpt.models import decoder
from tests.serving.tiny import (
    CFG,
    CHAT,
    COMPLETION,
    HELLO,
    QUEUE,
    SLOTS,
    TEMPLATE,
    TOKENIZER,
    call,
    check_error,
    client,
    complete,
    events,
    make,
)  # fmt: skip

GREEDY = SamplerConfig(temperature=0)


def chat(served, **fields):
    body = {"model": "tiny", "messages": HELLO, "temperature": 0, "max_tokens": 8, **fields}
    response = call(served, "/v1/chat/completions", body)
    assert response.status_code == 200, response.text
    return response.json()


def expected(params, ids, max_new, stop, seed=0, sampler=GREEDY, rows=1):
    return generate_texts(
        CFG, params, TOKENIZER, [""] * rows, encoded=[np.array(ids, np.int32)] * rows, sampler=sampler, max_new=max_new,
        seed=seed, batch_size=rows, eos_ids=stop,
    )  # fmt: skip


def test_health_and_models(served):
    assert call(served, "/health", method="GET").json() == {"status": "ok", "running": 0, "waiting": 0}
    listed = call(served, "/v1/models", method="GET").json()
    assert [card["id"] for card in listed["data"]] == ["tiny"]
    assert call(served, "/v1/models/tiny", method="GET").json() == listed["data"][0]


def test_completions_are_what_generation_writes(served, params):
    ids = TOKENIZER.encode("Ann", add_bos=True)
    made = complete(served, max_tokens=8)
    record = expected(params, ids, 8, (TOKENIZER.eos_id,))[0]
    choice = made["choices"][0]
    assert (choice["text"], choice["index"], choice["logprobs"]) == (record["response"], 0, None)
    assert choice["finish_reason"] == {"eos": "stop", "length": "length"}[record["stop_reason"]]
    usage = {"prompt_tokens": 4, "completion_tokens": record["num_tokens"], "total_tokens": 4 + record["num_tokens"]}
    assert made["usage"] == usage
    assert (made["object"], made["model"]) == ("text_completion", "tiny")
    assert complete(served, max_tokens=8, prompt=ids.tolist())["choices"] == made["choices"]


def test_n_choices_are_sampled_with_the_seed_as_generation_samples_rows(served, params):
    sampler = SamplerConfig(temperature=0.9, top_k=50)
    made = complete(served, max_tokens=8, n=3, seed=5, temperature=0.9, top_k=50)
    records = expected(params, TOKENIZER.encode("Ann", add_bos=True), 8, (TOKENIZER.eos_id,), 5, sampler, 3)
    assert [choice["text"] for choice in made["choices"]] == [record["response"] for record in records]
    assert len({choice["text"] for choice in made["choices"]}) > 1
    several = complete(served, max_tokens=2, prompt=["Ann", "Bob"], n=2)["choices"]
    assert [choice["index"] for choice in several] == [0, 1, 2, 3]
    assert several[0]["text"] == several[1]["text"]


def test_chat_completions_answer_in_the_template_and_stop_at_its_end(served, params):
    ids = TEMPLATE.encode_prompt(TOKENIZER, [Message("system", "Bob"), Message("user", "Ann sees")])
    stop = (TOKENIZER.eos_id, TOKENIZER.special_ids["<|end|>"])
    record = expected(params, ids, 8, stop)[0]
    parts = [{"type": "text", "text": "Ann "}, {"type": "text", "text": "sees"}]
    made = chat(served, messages=[{"role": "developer", "content": "Bob"}, {"role": "user", "content": parts}])
    assert made["choices"][0]["message"] == {"role": "assistant", "content": record["response"], "refusal": None}
    assert made["usage"]["prompt_tokens"] == len(ids)


def test_a_stream_holds_the_text_the_log_probs_and_the_usage_of_the_whole(served):
    fields = {"logprobs": True, "top_logprobs": 3, "n": 2, "seed": 1, "temperature": 1, "max_completion_tokens": 9}
    whole = chat(served, **fields)
    body = {"model": "tiny", "messages": HELLO, "stream": True, "stream_options": {"include_usage": True}, **fields}
    chunks = events(call(served, "/v1/chat/completions", body))
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == whole["usage"]
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    for index, choice in enumerate(whole["choices"]):
        mine = [c["choices"][0] for c in chunks[:-1] if c["choices"][0]["index"] == index]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(c["delta"].get("content", "") for c in mine) == choice["message"]["content"]
        assert [c["finish_reason"] for c in mine] == [None] * (len(mine) - 1) + [choice["finish_reason"]]
        streamed = [entry for c in mine for entry in c["logprobs"]["content"]]
        assert [entry["token"] for entry in streamed] == [e["token"] for e in choice["logprobs"]["content"]]
        np.testing.assert_allclose(
            [e["logprob"] for e in streamed], [e["logprob"] for e in choice["logprobs"]["content"]], atol=1e-5
        )
        assert all(len(entry["top_logprobs"]) == 3 for entry in streamed)
    text = events(call(served, "/v1/completions", {"model": "tiny", "prompt": "Ann", "temperature": 0, "stream": True}))
    assert "".join(c["choices"][0]["text"] for c in text) == complete(served)["choices"][0]["text"]


def test_log_probs_of_completions_are_those_of_the_full_forward(served, params):
    made = complete(served, max_tokens=6, logprobs=2)["choices"][0]
    ids = TOKENIZER.encode("Ann", add_bos=True).tolist()
    assert made["finish_reason"] == "length"
    forward = jax.jit(functools.partial(decoder.forward, CFG))
    for logprob, top in zip(made["logprobs"]["token_logprobs"], made["logprobs"]["top_logprobs"], strict=True):
        z = np.asarray(forward(params, np.array([ids + [0] * (12 - len(ids))])), np.float64)[0, len(ids) - 1]
        best = z - z.max() - np.log(np.sum(np.exp(z - z.max())))
        np.testing.assert_allclose([logprob, max(top.values())], best.max(), atol=2e-5)
        if len(top) == 2:  # a letter and its byte have the same text
            np.testing.assert_allclose(sorted(top.values()), np.sort(best)[-2:], atol=2e-5)
        ids.append(int(np.argmax(z)))
    assert any(len(top) == 2 for top in made["logprobs"]["top_logprobs"])
    assert made["logprobs"]["text_offset"][0] == 0
    assert len(made["logprobs"]["tokens"]) == 6


def test_a_stop_string_ends_the_text_and_is_left_out(served):
    free = complete(served, max_tokens=12)
    text = free["choices"][0]["text"]
    stop = text[4:6]
    made = complete(served, max_tokens=12, stop=[stop, "never"], logprobs=0)
    assert made["choices"][0]["text"] == text[: text.index(stop)]
    assert made["choices"][0]["finish_reason"] == "stop"
    listed = len(made["choices"][0]["logprobs"]["tokens"])
    assert listed < made["usage"]["completion_tokens"] < free["usage"]["completion_tokens"]


def test_calls_at_the_same_time_share_steps_and_get_what_they_get_alone(served, monkeypatch):
    prompts = ["Ann", "Bob and", "Dora.", "C"]
    alone = [complete(served, prompt=prompt, max_tokens=20)["choices"][0]["text"] for prompt in prompts]
    steps, step = [], served.engine.step
    monkeypatch.setattr(served.engine, "step", lambda: steps.append(1) or step())

    async def together():
        async with client(served.app) as http:
            body = {"model": "tiny", "temperature": 0, "max_tokens": 20}
            return await asyncio.gather(*(http.post("/v1/completions", json=body | {"prompt": p}) for p in prompts))

    assert [r.json()["choices"][0]["text"] for r in asyncio.run(together())] == alone
    assert len(steps) < 60  # two slots; one after the other they would take 80


WHOLE_BODIES = [
    ("completions", b"{", 400, None, None, "not valid JSON"),
    ("completions", b"[1]", 400, None, None, "must be a JSON object"),
    ("completions", b"[" * 3900, 400, None, None, "not valid JSON"),
    ("completions", {"prompt": "a"}, 400, "model", "missing_required_parameter", "model is required"),
    ("completions", {"model": "tiny"}, 400, "prompt", "missing_required_parameter", "prompt is required"),
    ("chat/completions", {"model": "tiny"}, 400, "messages", "missing_required_parameter", "messages is required"),
]
FIELDS = [
    (COMPLETION, "model", "big", 404, "model_not_found", "'big'; this server has 'tiny'"),
    (COMPLETION, "max_tokens", "5", 400, "invalid_value", "must be an integer, not '5'"),
    (COMPLETION, "max_tokens", 0, 400, "invalid_value", "at least 1, not 0"),
    (COMPLETION, "max_tokens", 62, 400, "context_length_exceeded", "3 tokens; with 62 .* of 64"),
    (COMPLETION, "temperature", -1, 400, "invalid_value", "not -1"),
    (COMPLETION, "temperature", 10**400, 400, "invalid_value", "finite number of at most"),
    (COMPLETION, "top_p", 2, 400, "invalid_value", "not 2"),
    (COMPLETION, "tempratur", 1, 400, "unknown_parameter", "the nearest is 'temperature'"),
    (COMPLETION, "frequency_penalty", 0.5, 400, "unsupported_parameter", "not supported"),
    (COMPLETION, "echo", True, 400, "unsupported_parameter", "not supported"),
    (COMPLETION, "n", 6, 400, "invalid_value", "between 1 and 5, not 6 x 1"),
    (COMPLETION, "stop", [""], 400, "invalid_value", "none empty"),
    (COMPLETION, "logprobs", 21, 400, "invalid_value", "between 0 and 20, not 21"),
    (COMPLETION, "prompt", [5, 1 << 40], 400, "invalid_value", "token ids below"),
    (COMPLETION, "prompt", [], 400, "invalid_value", "must be a text"),
    (COMPLETION, "prompt", "\ud800", 400, "invalid_value", "half a surrogate"),
    (COMPLETION, "stream_options", {"include_usge": True}, 400, "invalid_value", "include_usage"),
    (CHAT, "messages", [], 400, "invalid_value", "at least one message"),
    (CHAT, "messages", HELLO * 65, 400, "context_length_exceeded", "65 messages .* of 64"),
    (CHAT, "messages", [{"role": "usr", "content": "a"}], 400, "invalid_value", "nearest is 'user'"),
    (CHAT, "messages", [{"role": "user"}], 400, "invalid_value", "must be a text"),
    (CHAT, "messages", [{**HELLO[0], "tool_calls": [1]}], 400, "unsupported_parameter", "not supported"),
    (CHAT, "messages", [{**HELLO[0], "name": "Ann"}], 400, "unsupported_parameter", "not supported"),
    (CHAT, "messages", [*HELLO, {"role": "assistant", "content": "b"}], 400, "invalid_value", "must end with a user"),
    (CHAT, "top_logprobs", 2, 400, "invalid_value", "needs logprobs"),
    (CHAT, "tools", [{}], 400, "unsupported_parameter", "not supported"),
]


@pytest.mark.parametrize(("path", "body", "status", "param", "code", "words"), WHOLE_BODIES)
def test_a_body_that_cannot_be_read_is_an_error_in_openais_format(served, path, body, status, param, code, words):
    response = call(served, f"/v1/{path}", body)
    check_error(response, status, param, code, words)
    assert response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(("base", "field", "value", "status", "code", "words"), FIELDS)
def test_a_mistake_names_its_field(served, base, field, value, status, code, words):
    path = "/v1/completions" if base is COMPLETION else "/v1/chat/completions"
    check_error(call(served, path, base | {field: value}), status, field, code, words)


def test_a_conversation_beyond_the_context_a_long_body_and_unknown_places(served):
    response = call(served, "/v1/chat/completions", CHAT | {"messages": HELLO * 20})
    check_error(response, 400, "max_tokens", "context_length_exceeded", "tokens; with 1 new ones .* of 64")
    check_error(call(served, "/v1/completions", b" " * 4001), 413, None, "body_too_large", "longer than 4000 bytes")
    check_error(call(served, "/v1/engines", method="GET"), 404, None, None, "GET /v1/engines: Not Found")
    check_error(call(served, "/v1/completions", method="GET"), 405, None, None, "Method Not Allowed")
    check_error(call(served, "/v1/models/big", method="GET"), 404, "model", "model_not_found", "'big'")


def test_fields_that_say_off_are_taken(served):
    off = {"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "best_of": 1, "echo": False, "user": "me",
           "stop": None, "seed": None, "response_format": {"type": "text"}}  # fmt: skip
    assert complete(served, **off)["choices"] == complete(served)["choices"]


def test_a_model_without_a_template_has_completions_alone(params):
    made = make(params, template=None)
    check_error(call(made, "/v1/chat/completions", CHAT), 400, "model", "no_chat_template", "use /v1/completions")


def test_a_full_queue_is_429_and_what_waits_is_served(idle):
    body = {"model": "tiny", "prompt": "Ann", "max_tokens": 3}

    async def send():
        async with client(idle.app) as http:
            first = asyncio.gather(*(http.post("/v1/completions", json=body | {"n": n}) for n in (2, 2, 1)))
            while idle.worker.load() != (0, SLOTS + QUEUE):
                await asyncio.sleep(0.01)
            refused = await http.post("/v1/completions", json=body)
            idle.worker.start()
            return refused, await first

    refused, first = asyncio.run(send())
    check_error(refused, 429, None, "queue_full", "5 are waiting")
    assert refused.headers["Retry-After"] == "1"
    assert [response.status_code for response in first] == [200] * 3


def test_while_draining_new_calls_get_503_and_running_ones_end(idle):
    body = {"model": "tiny", "prompt": "Ann", "max_tokens": 40, "temperature": 0}

    async def send():
        async with client(idle.app) as http:
            first = asyncio.create_task(http.post("/v1/completions", json=body))
            while idle.worker.load() != (0, 1):
                await asyncio.sleep(0.01)
            idle.worker.drain()
            refused = await http.post("/v1/completions", json=body)
            idle.worker.start()
            return refused, await first

    refused, first = asyncio.run(send())
    check_error(refused, 503, None, "shutting_down", "shutting down")
    assert refused.json()["error"]["type"] == "service_unavailable_error"
    assert first.status_code == 200


def test_what_is_not_done_when_the_worker_stops_ends_with_an_error(idle):
    body = {"model": "tiny", "prompt": "Ann", "max_tokens": 3}

    async def send():
        async with client(idle.app) as http:
            bodies = (body, body | {"stream": True})
            waiting = asyncio.gather(*(http.post("/v1/completions", json=b) for b in bodies))
            while idle.worker.load() != (0, 2):
                await asyncio.sleep(0.01)
            idle.worker._is_stopped = True
            idle.worker.start()
            return await waiting

    whole, stream = asyncio.run(send())
    check_error(whole, 503, None, "shutting_down", "before the response was complete")
    assert stream.status_code == 200
    assert json.loads(stream.text.removeprefix("data: "))["error"]["code"] == "shutting_down"


def test_an_engine_that_breaks_is_500_for_all_and_seen_in_health(idle, monkeypatch, caplog):
    def broken():
        raise RuntimeError("out of memory")

    monkeypatch.setattr(idle.engine.engine, "step", broken)
    idle.worker.start()
    for _ in range(2):
        check_error(call(idle, "/v1/completions", COMPLETION), 500, None, None, "The engine failed: RuntimeError")
    assert call(idle, "/health", method="GET").status_code == 500
    assert "out of memory" in caplog.text


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_slot(served, monkeypatch, stream):
    """The engine waits before each step until the client has gone, so it cannot be done before."""
    step, gone = served.engine.step, threading.Event()
    monkeypatch.setattr(served.engine, "step", lambda: gone.wait(60) and step())
    body = json.dumps(COMPLETION | {"max_tokens": 60, "temperature": 0, "stream": stream, "stop": []}).encode()
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/completions",
        "headers": [(b"content-type", b"application/json")],
        "query_string": b"",
        "asgi": {},
    }

    async def talk():
        messages = [{"type": "http.request", "body": body}]

        async def receive():
            if messages:
                return messages.pop()
            while served.worker.load() != (1, 0):
                await asyncio.sleep(0.01)
            return {"type": "http.disconnect"}

        sent = []

        async def send(message):
            sent.append(message)

        await served.app(scope, receive, send)
        return sent

    sent = asyncio.run(talk())
    steps = []
    monkeypatch.setattr(served.engine, "step", lambda: steps.append(1) or step())
    gone.set()
    complete(served, max_tokens=2)
    assert served.worker.load() == (0, 0)
    assert len(steps) < 10
    assert not any(message.get("body") for message in sent)


def test_the_next_turn_finds_the_conversation_in_the_cache(served):
    messages = [{"role": "user", "content": "Bob likes Cid and Dora"}]
    answer = chat(served, messages=messages, max_tokens=4)
    counted = served.engine.engine.computed
    messages = [*messages, {**answer["choices"][0]["message"]}, {"role": "user", "content": "C"}]
    usage = chat(served, messages=messages, max_tokens=4)["usage"]
    assert served.engine.engine.computed - counted < usage["prompt_tokens"] // 2
