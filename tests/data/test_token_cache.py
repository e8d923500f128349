"""The token cache: what is in an entry, when it is made again, and that no kill or race leaves a broken one."""

import dataclasses
import hashlib
import os
import pathlib
import pickle
import subprocess
import sys
import threading

import numpy as np
import pytest

from jaxgpt.data import token_cache
from jaxgpt.data.config import DataConfig, HoldoutConfig
from jaxgpt.data.token_cache import tokenize_source

BOS, EOS = 1, 2


class CharTokenizer:
    """One token per character, its code point; counts the texts that it encodes."""

    pad_id, bos_id, eos_id = 0, BOS, EOS

    def __init__(self, vocab_size=256):
        self.vocab_size = vocab_size
        self.digest = hashlib.sha256(str(vocab_size).encode()).hexdigest()
        self.encoded = 0

    def encode_batch(self, texts):
        self.encoded += len(texts)
        return [np.array([ord(c) for c in text], np.int32) for text in texts]


LINES = DataConfig(text_separator="\n")
POSITION = DataConfig(holdout=HoldoutConfig(by="position", fraction=0.1))


def write(path, text):
    path.write_text(text)
    return str(path)


def documents(source):
    return [source.tokens[a:b].tolist() for a, b in zip(source.offsets, source.offsets[1:], strict=False)]


def codes(text):
    return [ord(c) for c in text]


def test_documents_lie_one_after_another_between_bos_and_eos(tmp_path):
    paths = [write(tmp_path / "b.txt", "one\ntwo"), write(tmp_path / "a.txt", "three")]
    source = tokenize_source(paths, CharTokenizer(), LINES, "all", tmp_path / "cache")
    assert documents(source) == [[BOS, *codes(text), EOS] for text in ("one", "two", "three")]
    assert source.offsets.dtype == np.int64
    assert (source.num_documents, source.num_tokens, source.num_bytes) == (3, 17, 11)


def test_without_add_bos_documents_still_end_with_eos(tmp_path):
    config = dataclasses.replace(LINES, add_bos=False)
    source = tokenize_source([write(tmp_path / "a.txt", "one\ntwo")], CharTokenizer(), config, "all", tmp_path / "c")
    assert documents(source) == [[*codes("one"), EOS], [*codes("two"), EOS]]


def test_documents_without_text_are_left_out(tmp_path):
    source = tokenize_source([write(tmp_path / "a.txt", "x\n\n\ny\n")], CharTokenizer(), LINES, "all", tmp_path / "c")
    assert documents(source) == [[BOS, ord("x"), EOS], [BOS, ord("y"), EOS]]


def test_bytes_are_those_of_utf8(tmp_path):
    source = tokenize_source([write(tmp_path / "a.txt", "né")], CharTokenizer(), LINES, "all", tmp_path / "c")
    assert source.num_bytes == 3


@pytest.mark.parametrize(("vocab_size", "dtype"), [(256, np.uint16), (65536, np.uint16), (65537, np.uint32)])
def test_tokens_take_two_bytes_where_the_vocabulary_fits(tmp_path, vocab_size, dtype):
    path = write(tmp_path / "a.txt", chr(vocab_size - 1))
    source = tokenize_source([path], CharTokenizer(vocab_size), LINES, "all", tmp_path / "c")
    assert source.tokens.dtype == dtype
    assert source.tokens.tolist() == [BOS, vocab_size - 1, EOS]


def test_by_position_a_long_document_is_cut_at_the_character_and_gets_no_special_tokens(tmp_path):
    text = "".join(chr(97 + i % 26) for i in range(1237))
    paths = [write(tmp_path / "a.txt", text)]
    train, held_out = (
        tokenize_source(paths, CharTokenizer(), POSITION, s, tmp_path / "c") for s in ("train", "held_out")
    )
    assert documents(train) == [codes(text[:1113])]  # int(1237 * 0.9)
    assert documents(held_out) == [codes(text[1113:])]


def test_by_position_every_file_is_cut_across_its_documents(tmp_path):
    paths = [write(tmp_path / "a.txt", "abcd\nefgh\nij"), write(tmp_path / "b.txt", "k\nl")]
    config = dataclasses.replace(LINES, holdout=HoldoutConfig(by="position", fraction=0.5))
    train, held_out = (
        tokenize_source(paths, CharTokenizer(), config, s, tmp_path / "c") for s in ("train", "held_out")
    )
    assert documents(train) == [codes(text) for text in ("abcd", "e", "k")]
    assert documents(held_out) == [codes(text) for text in ("fgh", "ij", "l")]


def test_by_hash_the_sides_share_no_document_and_lose_none(tmp_path):
    texts = [f"document {i}" for i in range(300)]
    config = dataclasses.replace(LINES, holdout=HoldoutConfig(fraction=0.2))
    paths = [write(tmp_path / "a.txt", "\n".join(texts))]
    train, held_out = (
        tokenize_source(paths, CharTokenizer(), config, s, tmp_path / "c") for s in ("train", "held_out")
    )
    assert sorted(documents(train) + documents(held_out)) == sorted([BOS, *codes(text), EOS] for text in texts)
    assert abs(held_out.num_documents / 300 - 0.2) < 4 * (0.2 * 0.8 / 300) ** 0.5


def test_a_second_run_does_not_tokenize_again(tmp_path):
    path = write(tmp_path / "a.txt", "one\ntwo")
    tokenizer = CharTokenizer()
    first = tokenize_source([path], tokenizer, LINES, "all", tmp_path / "cache")
    assert tokenizer.encoded == 2
    # Neither another name of the file nor another time of change makes it other data.
    moved = tmp_path / "moved.txt"
    os.rename(path, moved)
    os.utime(moved, (1, 1))
    second = tokenize_source([str(moved)], tokenizer, LINES, "all", tmp_path / "cache")
    assert tokenizer.encoded == 2
    assert second == first


@pytest.mark.parametrize(
    "change",
    [
        {"tokenizer": CharTokenizer(300)},
        {"config": dataclasses.replace(LINES, add_bos=False)},
        {"config": dataclasses.replace(LINES, text_separator="w")},
        {"config": dataclasses.replace(LINES, fields={"text": "content"})},
        {"config": dataclasses.replace(LINES, holdout=HoldoutConfig(by="position"))},
        {"split": "train"},
        {"text": "one\ntwa"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_whatever_decides_the_tokens_makes_another_entry(tmp_path, change):
    def key(text="one\ntwo", tokenizer=None, config=LINES, split="all"):
        path = write(tmp_path / "a.txt", text)
        return tokenize_source([path], tokenizer or CharTokenizer(), config, split, tmp_path / "cache").key

    assert key(**change) != key()


def test_fields_that_do_not_decide_the_tokens_share_an_entry(tmp_path):
    path = write(tmp_path / "a.txt", "one\ntwo")
    other = dataclasses.replace(LINES, sequence_length=7, packing="none", holdout=HoldoutConfig(fraction=0.4))
    keys = {tokenize_source([path], CharTokenizer(), c, "all", tmp_path / "cache").key for c in (LINES, other)}
    assert len(keys) == 1


def test_a_file_that_changed_under_its_name_is_tokenized_again(tmp_path):
    path = write(tmp_path / "a.txt", "one")
    tokenize_source([path], CharTokenizer(), LINES, "all", tmp_path / "cache")
    write(tmp_path / "a.txt", "two")
    os.utime(path, (5, 5))
    source = tokenize_source([path], CharTokenizer(), LINES, "all", tmp_path / "cache")
    assert documents(source) == [[BOS, *codes("two"), EOS]]


class Interrupted(CharTokenizer):
    """Is interrupted at the second batch of texts, when the first is on disk."""

    def encode_batch(self, texts):
        if self.encoded:
            raise KeyboardInterrupt
        return super().encode_batch(texts)


@pytest.mark.parametrize("killed", [False, True])
def test_an_interrupted_run_leaves_no_entry_behind(tmp_path, monkeypatch, killed):
    path = write(tmp_path / "a.txt", "one\ntwo")
    monkeypatch.setattr(token_cache, "ENCODE_CHARACTERS", 1)
    if killed:  # nothing is tidied up
        monkeypatch.setattr(token_cache.shutil, "rmtree", lambda *args, **kwargs: None)
    with pytest.raises(KeyboardInterrupt):
        tokenize_source([path], Interrupted(), LINES, "all", tmp_path / "cache")
    left = [entry for entry in (tmp_path / "cache").iterdir() if entry.is_dir()]
    assert [entry.suffix for entry in left] == ([".tmp"] if killed else [])
    source = tokenize_source([path], CharTokenizer(), LINES, "all", tmp_path / "cache")
    assert documents(source) == [[BOS, *codes(text), EOS] for text in ("one", "two")]


def test_texts_are_encoded_a_few_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(token_cache, "ENCODE_CHARACTERS", 4)
    sizes = []

    class Watched(CharTokenizer):
        def encode_batch(self, texts):
            sizes.append(len(texts))
            return super().encode_batch(texts)

    path = write(tmp_path / "a.txt", "aa\nbb\nccccc\nd\ne")
    source = tokenize_source([path], Watched(), LINES, "all", tmp_path / "cache")
    assert sizes == [2, 1, 2]
    assert documents(source) == [[BOS, *codes(text), EOS] for text in ("aa", "bb", "ccccc", "d", "e")]


def test_of_writers_that_race_all_finish_with_the_same_tokens(tmp_path):
    path = write(tmp_path / "a.txt", "one\ntwo")
    everyone_writes = threading.Barrier(3)  # passed only once all three found no entry and began to tokenize

    class Racing(CharTokenizer):
        def encode_batch(self, texts):
            everyone_writes.wait(timeout=600)
            return super().encode_batch(texts)

    results = []

    def run():
        results.append(tokenize_source([path], Racing(), LINES, "all", tmp_path / "cache"))

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [documents(source) for source in results] == [[[BOS, *codes(t), EOS] for t in ("one", "two")]] * 3
    assert len([p for p in (tmp_path / "cache").iterdir() if p.is_dir()]) == 1


DAMAGED_ENTRIES = {
    "tokens cut": lambda entry: os.truncate(entry / "tokens.bin", 6),
    "no tokens": lambda entry: (entry / "tokens.bin").unlink(),
    "offsets cut": lambda entry: os.truncate(entry / "offsets.bin", 3),
    "no meta": lambda entry: (entry / "meta.json").unlink(),
    "meta empty": lambda entry: (entry / "meta.json").write_bytes(b""),
    "meta cut": lambda entry: os.truncate(entry / "meta.json", 9),
    "meta a list": lambda entry: (entry / "meta.json").write_text("[1]"),
    "meta not UTF-8": lambda entry: (entry / "meta.json").write_bytes(b"\xff"),
    "meta of another type": lambda entry: (entry / "meta.json").write_text('{"dtype": 3}'),
    "meta with other fields": lambda entry: (entry / "meta.json").write_text('{"dtypes": "uint16"}'),
}


@pytest.mark.parametrize("kind", DAMAGED_ENTRIES)
def test_a_damaged_entry_is_made_anew_and_said(tmp_path, capsys, kind):
    path = write(tmp_path / "a.txt", "one\ntwo")
    tokenize = lambda: tokenize_source([path], CharTokenizer(), LINES, "all", tmp_path / "cache")
    entry = pathlib.Path(tokenize().path)
    DAMAGED_ENTRIES[kind](entry)
    assert documents(tokenize()) == [[BOS, *codes(t), EOS] for t in ("one", "two")]
    said = capsys.readouterr().out
    assert str(entry) in said
    assert "damaged and is made anew" in said
    assert documents(tokenize()) == [[BOS, *codes(t), EOS] for t in ("one", "two")]
    assert not capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b'{"a": ', b"\xff", b"[]", b'{"x": 3}'])
def test_damaged_digests_of_files_do_not_stop_who_shares_the_cache(tmp_path, content):
    path = write(tmp_path / "a.txt", "one\ntwo")
    first = tokenize_source([path], CharTokenizer(), LINES, "all", tmp_path / "cache")
    (tmp_path / "cache" / "file_digests.json").write_bytes(content)
    assert tokenize_source([path], CharTokenizer(), LINES, "all", tmp_path / "cache") == first


def test_a_pickled_source_maps_the_files_instead_of_carrying_them(tmp_path):
    path = write(tmp_path / "a.txt", "x" * 100_000)
    source = tokenize_source([path], CharTokenizer(), LINES, "all", tmp_path / "cache")
    assert len(source.tokens) == 100_002
    pickled = pickle.dumps(source)
    assert len(pickled) < 1000
    np.testing.assert_array_equal(pickle.loads(pickled).tokens, source.tokens)


def test_a_side_without_documents_is_an_error_that_names_the_fields(tmp_path):
    path = write(tmp_path / "a.txt", "one long document")
    config = DataConfig(holdout=HoldoutConfig(fraction=1e-9))
    message = r"data\.holdout\.fraction=1e-09 with data\.holdout\.by='hash' leaves no document on the held-out side"
    with pytest.raises(ValueError, match=message):
        tokenize_source([path], CharTokenizer(), config, "held_out", tmp_path / "cache")
    config = DataConfig(holdout=HoldoutConfig(by="position", fraction=0.99))
    message = r"data\.holdout\.fraction=0.99 with data\.holdout\.by='position' leaves no document on the train side"
    with pytest.raises(ValueError, match=message):
        tokenize_source([path], CharTokenizer(), config, "train", tmp_path / "cache")


def test_what_killed_runs_left_is_removed_and_nothing_of_those_that_live(tmp_path):
    cache = tmp_path / "cache"
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    here = token_cache._place()
    left = [f"aaa.{here}.{dead.pid}.1.tmp", f"file_digests.json.{here}.{dead.pid}.2.tmp", "aaa.another-host.7.3.tmp"]
    living = [
        f"bbb.{here}.{os.getpid()}.4.tmp",
        f"file_digests.json.{here}.{os.getppid()}.5.tmp",
        "bbb.another-host.7.6.tmp",
    ]
    for name in [*left, *living]:
        if "json" in name:
            write(cache / name, "{}")
        else:
            (cache / name).mkdir(parents=True)
    os.utime(cache / left[2], (0, 0))
    tokenize_source([write(tmp_path / "a.txt", "one")], CharTokenizer(), LINES, "all", cache)
    assert sorted(path.name for path in cache.glob("*.tmp")) == sorted(living)
