"""The real server in a process of its own, with the official client and with curl, to its graceful end."""

import json
import re
import shutil
import signal
import subprocess
import sys
import threading

import pytest

from tests.experiments.conftest import ROOT, command, environment, with_template

openai = pytest.importorskip("openai")
pytest.importorskip("uvicorn")

HELLO = [{"role": "user", "content": "Ann likes"}]


@pytest.fixture(scope="module")
def assistant(finished, tmp_path_factory):
    return with_template(finished[0], tmp_path_factory.mktemp("serve") / "assistant")


@pytest.fixture
def server(assistant):
    """The process and its address."""
    process = subprocess.Popen(
        [sys.executable, "-m", "experiments.serve", f"--config.init_from={assistant}", "--config.port=0"],
        cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    watchdog = threading.Timer(120, process.kill)
    watchdog.start()
    line = process.stdout.readline()
    found = re.fullmatch(
        r"Serving assistant at (http://127\.0\.0\.1:\d+)/v1/completions and /v1/chat/completions\.\n", line
    )
    assert found, line + (process.stderr.read() if not line else "")
    yield process, found[1]
    watchdog.cancel()
    process.kill()
    process.communicate()


def test_the_official_client_and_curl_are_served_until_a_graceful_stop(server):
    process, address = server
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=60)
    assert [model.id for model in client.models.list()] == ["assistant"]
    asked = {"model": "assistant", "messages": HELLO, "temperature": 0, "max_tokens": 12}
    whole = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    content = whole.choices[0].message.content
    assert whole.choices[0].finish_reason in ("stop", "length")
    assert len(whole.choices[0].logprobs.content[0].top_logprobs) == 2
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == content
    assert chunks[-1].usage == whole.usage
    written = client.completions.create(model="assistant", prompt="Ann", max_tokens=4, n=2, seed=1, logprobs=1)
    assert len(written.choices) == 2
    assert len(written.choices[0].logprobs.token_logprobs) <= 4
    with pytest.raises(openai.NotFoundError, match="There is no model 'gpt'"):
        client.completions.create(model="gpt", prompt="Ann")
    with pytest.raises(openai.BadRequestError, match="64") as caught:
        client.completions.create(model="assistant", prompt="Ann", max_tokens=100)
    assert caught.value.code == "context_length_exceeded"

    if shutil.which("curl"):
        body = json.dumps({"model": "assistant", "prompt": "Ann", "max_tokens": 3})
        done = subprocess.run(
            ["curl", "-sS", "-m", "60", f"{address}/v1/completions", "-H", "Content-Type: application/json", "-d", body],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert json.loads(done.stdout)["object"] == "text_completion"

    # A response that has begun when the signal comes is finished.
    stream = client.completions.create(model="assistant", prompt="Ann", max_tokens=55, temperature=0, stream=True)
    first = next(stream)
    process.send_signal(signal.SIGTERM)
    rest = list(stream)
    assert rest[-1].choices[0].finish_reason in ("stop", "length")
    assert first.choices[0].finish_reason is None
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "Stopped.\n"), err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--config.init_from="], "init_from is required"),
        (["--config.port=-1"], "port must be at least 0, not -1"),
        (["--config.max_choices=9", "--config.num_slots=1", "--config.max_queue=2"], "it can be at most 3"),
        (["--config.host=256.0.0.1"], "host='256.0.0.1', port=8000 cannot be listened on"),
    ],
    ids=str,
)
def test_a_mistake_is_one_sentence_and_exit_code_2(assistant, flags, words):
    done = command("serve", f"--config.init_from={assistant}", *flags)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert [words in line for line in done.stderr.splitlines() if line.startswith("error: ")] == [True]
