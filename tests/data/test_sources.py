"""Files in, records out; and the one sentence for each way in which a file can be wrong."""

import gzip
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from array_record.python import array_record_module

from jaxgpt.data import sources

ROWS = [{"text": "one"}, {"text": "zwei\n", "n": 2}, {"text": "três"}]


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def texts(path, separator=None, fields=None):
    return [(d.text, d.line) for d in sources.read_texts(str(path), fields=fields or {}, text_separator=separator)]


@pytest.fixture
def files(tmp_path):
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    write(tmp_path / "a.jsonl", lines)
    write(tmp_path / "a.jsonl.gz", gzip.compress(lines.encode()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    writer = array_record_module.ArrayRecordWriter(str(tmp_path / "a.array_record"), "group_size:1")
    for row in ROWS:
        writer.write(json.dumps(row).encode())
    writer.close()
    return tmp_path


def test_a_separator_of_lines_is_found_whatever_the_line_ends_are(tmp_path):
    for end in ("\n", "\r\n"):
        write(tmp_path / "a.txt", end.join(["one", "two", "", "three", ""]))
        assert texts(tmp_path / "a.txt", "\n\n") == [(f"one{end}two", 1), (f"three{end}", 4)]
        assert texts(tmp_path / "a.txt", "\n") == [("one", 1), ("two", 2), ("three", 4)]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".parquet", ".array_record"])
def test_every_format_gives_the_same_texts_and_lines(files, suffix):
    assert texts(files / f"a{suffix}") == [("one", 1), ("zwei\n", 2), ("três", 3)]


def test_a_text_file_is_one_document_or_its_separated_parts(tmp_path):
    path = write(tmp_path / "a.txt", "a\nb\n\n\n\nc\n\n \n\nd")
    assert texts(path) == [("a\nb\n\n\n\nc\n\n \n\nd", 1)]
    assert texts(path, "\n\n") == [("a\nb", 1), ("c", 6), ("d", 10)]


def test_fields_map_standard_names_to_those_of_the_file(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"body": "x"}\n')
    assert texts(path, fields={"text": "body"}) == [("x", 1)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "x"}\n{"text": \n', r"a\.jsonl, line 2: not valid JSON"),
        ("a.jsonl", '{"text": "x"}\n\n["y"]\n', r"a\.jsonl, line 3: expected a JSON object, found list"),
        ("a.jsonl", b'{"text": "\xff"}\n', r"a\.jsonl, line 1: not valid UTF-8"),
        ("a.jsonl", '{"txt": "x"}\n', r"line 1: no field 'text' \(there are: txt\); the nearest is 'txt'"),
        ("a.jsonl", '{"text": 3}\n', r"line 1: the field 'text' must be str, not int"),
        ("a.jsonl", "", r"a\.jsonl is empty"),
        ("a.jsonl", '{"text": "  "}\n', r"a\.jsonl is empty: it has no text"),
        ("a.txt", "", r"a\.txt is empty"),
        ("a.txt", b"ok\nbad \xff\n", r"a\.txt, line 2: not valid UTF-8"),
        pytest.param(
            "a.jsonl.gz",
            gzip.compress(b'{"text": "x"}\n' * 50)[:-12],
            r"a\.jsonl\.gz: damaged gzip",
            id="a.jsonl.gz, cut",
        ),
        ("a.jsonl.gz", b"plain", r"a\.jsonl\.gz: damaged gzip"),
        ("a.parquet", b"PAR1 not really", r"a\.parquet is not a readable parquet"),
        ("a.array_record", b"", r"a\.array_record is empty"),
        ("a.array_record", b"garbage", r"a\.array_record is not a readable array_record"),
        ("a.array_record", b"garbage" * 20_000, r"a\.array_record is not a readable array_record"),
        ("a.jsonl", '{"text": ' + "[" * 100_000, r"a\.jsonl, line 1: not readable JSON \(it is nested too deeply\)"),
        ("a.jsonl", '{"text": "x"}\n{"n": ' + "9" * 5000 + "}\n", r"a\.jsonl, line 2: .*integer with too many digits"),
        pytest.param(
            "a.jsonl.gz",
            gzip.compress(b'{"text": "x"}\n' * 50)[:12] + b"\0" * 40,
            r"a\.jsonl\.gz: damaged gzip",
            id="a.jsonl.gz, overwritten",
        ),
    ],
)
def test_what_is_wrong_with_a_file_is_one_sentence_with_its_place(tmp_path, name, content, message):
    path = write(tmp_path / name, content)
    with pytest.raises(ValueError, match=message) as error:
        texts(path)
    assert str(tmp_path) in str(error.value)


def test_paths_globs_lists_and_folders_name_files_once(files):
    (files / "notes.md").write_text("not data")
    names = lambda path: [p.rsplit("/", 1)[1] for p in sources.resolve_paths(path, "data.train")]
    every = ["a.array_record", "a.jsonl", "a.jsonl.gz", "a.parquet"]
    assert names(str(files)) == every
    assert names(str(files / "*.jsonl*")) == ["a.jsonl", "a.jsonl.gz"]
    assert names([str(files / "a.jsonl"), str(files / "*.jsonl")]) == ["a.jsonl"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [("b.jsonl", "data.train: no file matches.*nearest is.*a.jsonl"), ("no/b.jsonl", "no folder"),
     ("notes.md", "notes.md is not of a supported kind")],
)  # fmt: skip
def test_a_path_that_does_not_fit_is_named(files, pattern, message):
    (files / "notes.md").write_text("not data")
    with pytest.raises(ValueError, match=message):
        sources.resolve_paths(str(files / pattern), "data.train")


def test_a_path_may_have_the_signs_of_patterns_in_its_name(tmp_path):
    folder = tmp_path / "run[1]"
    folder.mkdir()
    for name in ("a[1].jsonl", "a1.jsonl", "b*.jsonl"):
        write(folder / name, '{"text": "x"}\n')
    assert sources.resolve_paths(str(folder / "a[1].jsonl"), "data.train") == [str(folder / "a[1].jsonl")]
    assert sources.resolve_paths(str(folder / "b*.jsonl"), "data.train") == [str(folder / "b*.jsonl")]
    assert len(sources.resolve_paths(str(folder), "data.train")) == 3


def test_the_content_digest_sees_bytes_not_names(tmp_path):
    a, b, c = (write(tmp_path / f"{i}.txt", t) for i, t in enumerate(("same", "same", "samf")))
    assert sources.content_digest([a]) == sources.content_digest([b]) != sources.content_digest([c])


def test_held_out_documents_are_the_stated_share_and_the_same_in_any_order():
    documents = [f"document {i}" for i in range(4000)]
    held_out = {d for d in documents if sources.is_held_out(d, 0.1)}
    assert abs(len(held_out) - 400) < 5 * np.sqrt(4000 * 0.1 * 0.9)
    assert {d for d in reversed(documents) if sources.is_held_out(d, 0.1)} == held_out
    assert {d for d in documents if sources.is_held_out(d, 0.05)} < held_out


@pytest.mark.parametrize(
    ("half", "is_wrong"), [("\\ud83d", True), ("\\uDE00 \\uD83D", True), ("\\ud83d\\ude00", False)]
)
@pytest.mark.parametrize("where", ['"text": "a{}"', '"text": "a", "of": [{{"more{}": 1}}]'])
def test_half_a_surrogate_pair_is_named_with_file_and_line(tmp_path, half, is_wrong, where):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n{' + where.format(half) + "}\n")
    read = lambda: list(sources.read_texts(str(path), fields={}, text_separator=None))
    if is_wrong:
        with pytest.raises(
            ValueError, match=r"a.jsonl, line 2: the field '(text|of)' has half a surrogate pair \('.u.{4}'\)"
        ):
            read()
    else:
        assert len(read()) == 2
