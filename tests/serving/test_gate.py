"""Who is let in: content types, hosts, origins and keys; what is refused before it is read."""

import asyncio
import json

import pytest

from jaxgpt.serving.gate import Access, default_hosts, read_api_key
from tests.serving.tiny import COMPLETION, call, check_error, make

PAGE = {"origin": "https://page.example", "access-control-request-method": "POST"}


def gated(params, **fields):
    return make(params, access=Access(**fields))


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "", "application/jsonx"])
def test_a_content_type_that_a_web_page_may_send_unasked_is_415(params, kind):
    response = call(make(params), "/v1/completions", COMPLETION, headers={"content-type": kind})
    check_error(response, 415, None, "unsupported_content_type", "must be application/json")


@pytest.mark.parametrize(
    ("host", "is_known"),
    [("localhost", True), ("LOCALHOST:80", True), ("127.0.0.1:8000", True), ("[::1]:8000", True), ("evil.example", False),
     ("localhost.evil.example", False), ("", False)],
)  # fmt: skip
def test_a_name_that_is_not_the_servers_is_refused(params, host, is_known):
    made = gated(params, hosts=default_hosts("127.0.0.1"))
    response = call(made, "/v1/models", method="GET", headers={"host": host})
    if is_known:
        assert response.status_code == 200
    else:
        check_error(response, 403, None, "host_not_allowed", "allowed_hosts")
    assert call(made, "/health", method="GET", headers={"host": host}).status_code == 200


def test_a_server_for_other_machines_has_any_name():
    assert default_hosts("0.0.0.0") == default_hosts("::") == default_hosts("10.1.2.3") == ("*",)
    assert "::1" in default_hosts("::1")


def test_no_web_page_may_call_unless_it_is_named(params):
    for origin in ("https://page.example", "null", "http://localhost:3000"):
        response = call(make(params), "/v1/completions", COMPLETION, headers={"origin": origin})
        check_error(response, 403, None, "origin_not_allowed", "allowed_origins")
    assert call(make(params), "/v1/completions", method="OPTIONS", headers=PAGE).status_code == 403
    made = gated(params, origins=("https://page.example",), api_key="sesame")
    preflight = call(made, "/v1/completions", method="OPTIONS", headers=PAGE)
    assert (preflight.status_code, preflight.headers["access-control-allow-origin"]) == (200, "https://page.example")
    refused = call(made, "/v1/models", method="GET", headers={"origin": "https://page.example"})
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, "https://page.example")
    assert call(made, "/v1/models", method="GET", headers={"origin": "https://other.example"}).status_code == 403


@pytest.mark.parametrize(
    ("header", "status"),
    [("Bearer sesame", 200), ("bearer sesame", 200), ("Bearer sesam", 401), ("Bearer sesame2", 401), ("Basic sesame", 401),
     ("Bearer", 401), ("", 401), ("Bearer s\xe9same", 401)],
)  # fmt: skip
def test_a_key_is_asked_of_everything_but_health(params, header, status):
    made = gated(params, api_key="sesame")
    headers = {"authorization": header.encode("latin-1")}
    response = call(made, "/v1/models", method="GET", headers=headers)
    assert response.status_code == status
    if status == 401:
        check_error(response, 401, None, "invalid_api_key", "API key")
        assert "sesame" not in response.text
        assert call(made, "/v1/completions", COMPLETION, headers=headers).status_code == 401
    assert call(made, "/health", method="GET", headers=headers).status_code == 200


def test_a_key_comes_from_a_file_and_is_never_shown(tmp_path):
    file = tmp_path / "key"
    file.write_bytes(b"  sesame\n")
    file.chmod(0o640)
    assert read_api_key(str(file)) == "sesame"
    assert "sesame" not in repr(Access(api_key="sesame"))
    for content, mode, words in [
        (b"\n", 0o600, "is empty"),
        (b"two words", 0o600, "no spaces"),
        (b"a", 0o644, "chmod"),
    ]:
        file.write_bytes(content)
        file.chmod(mode)
        with pytest.raises(ValueError, match=f"api_key_file=.*{words}") as caught:
            read_api_key(str(file))
        assert "two words" not in str(caught.value)
    with pytest.raises(ValueError, match="api_key_file=.* cannot be read"):
        read_api_key(str(tmp_path))


def test_a_body_that_is_said_to_be_too_long_is_refused_unread_and_the_connection_is_closed(params):
    """Nothing is received, and the header asks for the end of the connection."""
    sent = []

    async def receive():
        raise AssertionError("the body was read")

    async def send(message):
        sent.append(message)

    headers = [(b"content-type", b"application/json"), (b"content-length", b"4001")]
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "headers": headers}
    asyncio.run(make(params).app(scope | {"asgi": {}}, receive, send))
    assert sent[0]["status"] == 413
    assert (b"connection", b"close") in sent[0]["headers"]
    assert json.loads(sent[1]["body"])["error"]["code"] == "body_too_large"
