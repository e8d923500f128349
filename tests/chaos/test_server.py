"""A small part of the campaign against a server; the whole is python -m tests.chaos.server."""

import pytest

pytest.importorskip("uvicorn")

from tests.chaos import server


def test_a_few_hundred_requests_of_every_kind_leave_the_server_as_it_was(capsys):
    assert server.main(300, 40) == 0, capsys.readouterr().out
