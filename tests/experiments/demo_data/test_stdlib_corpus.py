"""The corpus that is on every machine."""

import ast
import json
import sys
import textwrap

import pytest

from experiments.demo_data import stdlib_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    before = set(sys.modules)
    stats = stdlib_corpus.write_stdlib_corpus(str(path), max_bytes=8_000_000)
    assert not {m for m in set(sys.modules) - before if m in ("antigravity", "this", "turtle", "tkinter")}
    return path, stats, [json.loads(line) for line in path.read_text().splitlines()]


def test_it_holds_reference_docstrings_and_source_within_the_bound(corpus):
    path, stats, rows = corpus
    assert sum(len(r["text"].encode()) for r in rows) == sum(stats.num_bytes.values()) <= 8_000_000
    assert len(rows) == sum(stats.documents.values()) == len({r["text"] for r in rows})
    assert stats.num_bytes["reference"] > 300_000
    assert stats.num_bytes["docstrings"] > 1_000_000
    assert stats.num_bytes["source"] > 3_000_000
    assert path.stat().st_size > 8_000_000 * 0.95


def test_known_texts_are_in_it(corpus):
    _, _, rows = corpus
    by_source = {}
    for row in rows:
        by_source.setdefault(row["source"], []).append(row["text"])
    assert '"with" statement' in by_source["topic with"][0]
    heading = "def textwrap.dedent(text)\n\nRemove any common leading whitespace from every line in `text`."
    assert any(heading in text for text in by_source["textwrap"])
    assert textwrap.dedent.__doc__.strip().splitlines()[0] in heading


def test_it_is_the_same_every_time(corpus, tmp_path):
    path, _, _ = corpus
    stdlib_corpus.write_stdlib_corpus(str(tmp_path / "again.jsonl"), max_bytes=8_000_000)
    assert (tmp_path / "again.jsonl").read_bytes() == path.read_bytes()


def test_skipped_modules_give_neither_docstrings_nor_source_but_the_reference_stays(monkeypatch, tmp_path):
    texts = {
        "a": '"""Of a."""\nx = 1\n',
        "b.c": '"""Of c."""\ny = 2\n',
        "pydoc_data.topics": 'topics = {"if": "The if statement."}\n',
    }
    found = [stdlib_corpus.Module(name, text, ast.parse(text)) for name, text in texts.items()]
    monkeypatch.setattr(stdlib_corpus, "modules", lambda root: found)

    def sources(skip):
        stdlib_corpus.write_stdlib_corpus(str(tmp_path / "c.jsonl"), max_bytes=1000, skip=skip)
        return [json.loads(line)["source"] for line in (tmp_path / "c.jsonl").read_text().splitlines()]

    assert sources(lambda module: False) == ["topic if", "a", "b.c", "a", "b.c"]
    assert sources(lambda module: module.startswith("b.")) == ["topic if", "a", "a"]
    assert sources(lambda module: True) == ["topic if"]


def test_source_pieces_join_to_the_file_without_its_docstrings():
    text = '"""Module."""\nimport os\n\n\n# why\n@cached\ndef f(x):\n    """Doc\n    string."""\n    return x\n' * 300
    module = stdlib_corpus.Module("m", text, ast.parse(text))
    pieces = [piece for _, piece in stdlib_corpus._sources([module])]
    first, rest = "import os\n\n\n# why\n@cached\ndef f(x):\n    return x\n", text[text.index("return x") + 9 :]
    assert len(pieces) > 1
    assert "".join(pieces) == first + rest.replace('    """Doc\n    string."""\n', "")
    assert all(piece.startswith(("import", '"""Module', "# why", "@cached")) for piece in pieces)
