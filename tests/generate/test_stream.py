"""Text as it comes, against the whole text cut at its first stop string."""

import dataclasses

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from jaxgpt.data.sentencepiece_tokenizer import TokenizerConfig, train_tokenizer
from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.generate.engine import Request, Token
from jaxgpt.generate.stream import TextEngine, TextStream
from tests.generate.reference import CFG
from tests.generate.test_engine import make_engine

TEXT = "ab ba aab ünï \u20ac\U0001f600 abab "


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Characters a, b, space and some others; the rest, and any wanted character, in bytes."""
    return train_tokenizer(["ab ba abab aab ünï"] * 3, TokenizerConfig(model_type="char", vocab_size=400))


def byte_ids(tokenizer, text):
    return [tokenizer._byte_ids[byte] for byte in text.encode()]


def cut(text, stops):
    """Up to the stop string that is complete first; of several that end there, the longest."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))], True
    return text, False


def push_all(stream, ids, finish="length"):
    pieces = []
    for n, i in enumerate(ids):
        pieces.append(stream.push(Token(0, int(i), -float(n), (), finish if n == len(ids) - 1 else None)))
        if pieces[-1].finish:
            break
    return pieces


STOPS = st.lists(st.text(alphabet="ab ü\u20ac", min_size=1, max_size=3), max_size=3)


@given(st.text(alphabet=TEXT, min_size=1, max_size=20), STOPS, st.booleans())
@example("aab", ["ab", "b"], False)
@example("\u20ac\u20ac", ["\u20ac"], True)
def test_pieces_join_to_the_text_up_to_the_first_stop_string(tokenizer, text, stops, in_bytes):
    ids = byte_ids(tokenizer, text) if in_bytes else tokenizer.encode(text)
    pieces = push_all(TextStream(tokenizer, stops), ids)
    expected, is_cut = cut(text, stops)
    assert "".join(piece.text for piece in pieces) == expected
    assert pieces[-1].finish == ("stop" if is_cut else "length")
    for n, piece in enumerate(pieces[:-1], 1):
        said = "".join(p.text for p in pieces[:n])
        assert "\ufffd" not in piece.text
        # as early as can be: what is held back is part of a character, or may begin a stop string
        held = tokenizer.decode_bytes(ids[:n]).decode(errors="ignore").removeprefix(said)
        assert held == "" or any(stop.startswith(held) for stop in stops)


def test_a_character_cut_off_at_the_end_is_what_the_tokenizer_makes_of_it(tokenizer):
    ids = byte_ids(tokenizer, "a\U0001f600")[:3]
    assert "".join(p.text for p in push_all(TextStream(tokenizer), ids)) == tokenizer.decode(ids) == "a\ufffd"


def test_tokens_come_with_their_text_and_their_place_in_it(tokenizer):
    ids = [*tokenizer.encode("ab"), *byte_ids(tokenizer, "\u20ac"), *tokenizer.encode("ba"), tokenizer.eos_id]
    pieces = push_all(TextStream(tokenizer, ["bab"]), ids, finish="stop")
    assert [piece.text for piece in pieces] == ["a", "", "", "", "b\u20ac", "", "", "ba"]
    places = [[at for at, _ in piece.tokens] for piece in pieces]
    assert places == [[0], [], [], [], [1, 2, 2, 2], [], [], [3, 4]]
    assert [token.id for piece in pieces for _, token in piece.tokens] == ids[:-1]
    assert [piece.num_tokens for piece in pieces] == list(range(1, 9))


def test_tokens_of_a_stop_string_are_left_out_and_ids_beyond_the_vocabulary_are_no_text(tokenizer):
    ids = [*tokenizer.encode("a"), tokenizer.vocab_size + 3, *tokenizer.encode("ab b")]
    pieces = push_all(TextStream(tokenizer, ["b b"]), ids)
    assert "".join(piece.text for piece in pieces) == "aa"
    assert [at for piece in pieces for at, _ in piece.tokens] == [0, 1]
    assert pieces[-1].num_tokens == len(ids)


@pytest.mark.parametrize(("text", "expected"), [(" ab", "ab"), ("ab", "ab"), ("  a", " a"), (" ", "")])
def test_a_prefix_is_left_out_where_the_text_begins_with_it(tokenizer, text, expected):
    pieces = push_all(TextStream(tokenizer, prefix=" "), tokenizer.encode(text))
    assert "".join(piece.text for piece in pieces) == expected


@pytest.mark.parametrize("kind", ["qwen", "llama3", "gemma", "llama2", "mistral"])
def test_a_tokenizer_of_another_model_streams_characters_that_several_tokens_make(kind):
    pytest.importorskip("tokenizers")
    from tests.data.foreign import foreign

    tokenizer, text = foreign(kind), "ab \u65e5\u672c\u8a9e \U0001f600\u00e9!"
    ids = tokenizer.encode(text).tolist()
    assert len(ids) >= len(text)
    pieces = push_all(TextStream(tokenizer, prefix=" " if kind in ("llama2", "mistral") else ""), ids)
    assert "".join(piece.text for piece in pieces) == text == tokenizer.decode(ids)
    assert all("\ufffd" not in piece.text for piece in pieces)


def test_an_engine_gives_the_text_of_the_tokens_it_draws_with_a_tokenizer_of_another_model():
    pytest.importorskip("tokenizers")
    from tests.data.foreign import foreign

    tokenizer = foreign("qwen")
    engine = TextEngine(make_engine(dataclasses.replace(CFG, vocab_size=tokenizer.vocab_size + 3)), tokenizer)
    request = Request(tokenizer.encode("the fox", add_bos=True).tolist(), 20, (tokenizer.eos_id,))
    pieces = list(engine.stream(request))
    ids = [token.id for piece in pieces for _, token in piece.tokens]
    assert len(ids) > 10
    text = "".join(piece.text for piece in pieces)
    assert text == tokenizer.decode_bytes(ids).decode(errors="replace")
    assert len({piece.text for piece in pieces}) > 5
