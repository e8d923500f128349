"""Tokenizers: nothing is lost, nothing reserved leaks, and the vocabulary is as asked."""

import functools
import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgpt.data import sentencepiece_tokenizer as tokenizers
from jaxgpt.data.sentencepiece_tokenizer import TokenizerConfig, train_tokenizer
from jaxgpt.data.tokenizer import bytes_per_token, load_tokenizer

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "while",
    "seven",
    "green",
    "birds",
    "sing",
    "of",
    "rain",
    "and",
    "light",
]
RNG = np.random.default_rng(0)
TEXTS = [" ".join(RNG.choice(WORDS, 30)) + "\n    indented = True\n\tx" for _ in range(300)]
SIZES = {"bpe": 400, "unigram": 360, "char": 10_000, "word": 320}


@pytest.fixture(scope="module")
def trained():
    return {kind: train_tokenizer(TEXTS, TokenizerConfig(model_type=kind, vocab_size=n)) for kind, n in SIZES.items()}


HARD = [
    "", " ", "  two  spaces  ", "\n\n\ttabs\tand\r\nlines\r", "emoji 👩‍👩‍👧 e\u0301 ｆｕｌｌ ﬁ", "▁literal▁ ▁▁", "\0nul\0",
    "def f(x):\n    return x  # ok\n", "<eos> <|user|> <0x41> <pad>", "שלום مرحبا", "\u2047 ⁇ \ufeff\u200b\u2028", "x" * 5000,
]  # fmt: skip


@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("text", HARD, ids=range(len(HARD)))
def test_hard_texts_come_back_exactly(trained, kind, text):
    tokenizer = trained[kind]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert ids.dtype == np.int32
    assert not set(ids) & set(tokenizer.special_ids.values())


@given(st.text(max_size=40))
@settings(deadline=None, max_examples=150)
def test_any_text_comes_back_exactly(text):
    for tokenizer in _cached():
        assert tokenizer.decode_bytes(tokenizer.encode(text)) == text.encode()
        assert tokenizer.token_bytes_V[tokenizer.encode(text)].sum() == len(text.encode())


@functools.cache  # hypothesis does not mix with fixtures
def _cached():
    return [train_tokenizer(TEXTS, TokenizerConfig(model_type=k, vocab_size=n)) for k, n in SIZES.items()]


def test_reserved_ids_come_first_and_stand_for_no_bytes(trained):
    for tokenizer in trained.values():
        names = [*tokenizers.META, *tokenizers.ROLES, *tokenizers.RESERVED]
        assert [tokenizer.special_ids[name] for name in names] == list(range(len(names)))
        assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)
        assert tokenizer.decode(range(len(names))) == ""
        assert list(tokenizer.encode("the fox", add_bos=True, add_eos=True)[[0, -1]]) == [1, 2]


def test_the_vocabulary_has_the_size_asked_for(trained):
    assert trained["bpe"].vocab_size == SIZES["bpe"]
    assert trained["unigram"].vocab_size <= SIZES["unigram"]
    characters = {c for text in TEXTS for c in text.replace("\t", "")}
    assert trained["char"].vocab_size == len(characters) + 16 + 256


def test_learned_pieces_are_longer_than_characters(trained):
    held_out = [" ".join(np.random.default_rng(1).choice(WORDS, 50))]
    per_token = {kind: bytes_per_token(t, held_out) for kind, t in trained.items()}
    assert per_token["char"] == 1.0
    assert per_token["bpe"] > 2.5
    assert per_token["word"] > 3.5


def test_training_is_deterministic_and_the_digest_is_that_of_the_file(trained, tmp_path):
    again = train_tokenizer(TEXTS, TokenizerConfig(model_type="bpe", vocab_size=400))
    assert again.digest == trained["bpe"].digest
    again.save(str(tmp_path))
    assert hashlib.sha256((tmp_path / "tokenizer.model").read_bytes()).hexdigest() == again.digest
    assert load_tokenizer(str(tmp_path)).digest == again.digest


def test_batches_equal_single_texts(trained):
    for tokenizer in trained.values():
        for one, many in zip(HARD, tokenizer.encode_batch(HARD), strict=True):
            np.testing.assert_array_equal(tokenizer.encode(one), many)


@pytest.mark.parametrize(
    ("kind", "size", "words"), [("bpe", 50_000, "too large.*at most"), ("bpe", 280, "too small"), ("char", 100, "273")]
)
def test_an_impossible_vocabulary_names_one_that_fits(kind, size, words):
    with pytest.raises(ValueError, match=rf"tokenizer\.vocab_size={size}.*{words}|{words}"):
        train_tokenizer(TEXTS, TokenizerConfig(model_type=kind, vocab_size=size))


def test_a_missing_or_foreign_model_is_named(tmp_path):
    with pytest.raises(ValueError, match="data.tokenizer='nowhere'"):
        load_tokenizer("nowhere")
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(ValueError, match="not a sentencepiece model"):
        load_tokenizer(str(tmp_path))


def test_the_reservoir_is_uniform():
    counts = np.zeros(20)
    for seed in range(2000):
        counts[tokenizers.reservoir_sample(range(20), 5, seed)] += 1
    expected = 2000 * 5 / 20
    assert np.all(np.abs(counts - expected) < 5 * np.sqrt(expected * 0.75))
