"""Logs that lost or changed rows which a checkpoint has counted on."""

import hashlib

import pytest

from jaxgpt.runs import logs
from jaxgpt.runs.workdir import JsonLog


@pytest.fixture
def marked(tmp_path):
    """(workdir, marks at step 4, the log's bytes then); rows of step 6 came later."""
    log = JsonLog(str(tmp_path / "metrics.jsonl"))
    for step in (2, 4):
        log.append(step, {"train/loss": 1 / 3 + step, "text": "é\ud800"})
    stored, then = logs.marks(str(tmp_path)), (tmp_path / "metrics.jsonl").read_bytes()
    log.append(6, {"train/loss": 0.5})
    return tmp_path, stored, then


def test_a_mark_is_the_length_and_the_sha256_of_the_log(marked):
    _, stored, then = marked
    assert stored == {"metrics.jsonl": {"bytes": len(then), "sha256": hashlib.sha256(then).hexdigest()}}


def test_rows_that_came_later_and_half_a_row_do_not_matter_and_a_truncated_log_has_the_same_bytes(marked):
    workdir, stored, then = marked
    with open(workdir / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "tr')
    logs.check(str(workdir), stored, 4)
    JsonLog(str(workdir / "metrics.jsonl")).truncate_after(4)
    assert (workdir / "metrics.jsonl").read_bytes() == then
    logs.check(str(workdir), stored, 4)


@pytest.mark.parametrize(
    "damage",
    [lambda b: b"", lambda b: b[:-40], lambda b: b.replace(b"4.33", b"4.34"), lambda b: b.split(b"\n", 1)[1]],
    ids=["emptied", "cut", "changed", "without its first row"],
)
def test_lost_and_changed_rows_are_refused_by_name(marked, damage):
    workdir, stored, then = marked
    (workdir / "metrics.jsonl").write_bytes(damage(then))
    with pytest.raises(
        ValueError, match=r"/metrics\.jsonl no longer holds the rows up to step 4 .* remove it to go on"
    ):
        logs.check(str(workdir), stored, 4)


def test_without_the_file_the_log_begins_anew_in_a_line(marked, capsys):
    workdir, stored, _ = marked
    (workdir / "metrics.jsonl").unlink()
    logs.check(str(workdir), stored, 4)
    assert "metrics.jsonl is missing; the run goes on without the rows up to step 4" in capsys.readouterr().err
    logs.check(str(workdir), {}, 4)  # a log that there was none of
    assert capsys.readouterr().err == ""
