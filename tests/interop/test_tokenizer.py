"""Exported tokenizers give the same ids for any text; tokenizers of other models serve as ours do."""

import io
import json

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgpt.data.chat import ChatTemplate, Message
from jaxgpt.data.sentencepiece_tokenizer import RAW, TokenizerConfig, train_tokenizer
from jaxgpt.data.tokenizer import load_tokenizer
from jaxgpt.interop.sentencepieces import tokenizer_json
from jaxgpt.interop.tokenizer import read_template, read_tokenizer, write_tokenizer
from tests.data.test_tokenizer import HARD, TEXTS
from tests.interop.hf_tokenizers import SPECIAL, byte_level, folder_of

tokenizers = pytest.importorskip("tokenizers")
ODD = [
    "<eos>", "<|user|>", "<|user", "|>", "<0x41>", "<0xE2>", "<|reserved_3|>", "<pad>", "<unk>", "▁", "\0", "\t", "\n", " ",
    "  ", "    ", "the", " quick", "q", "==", "10", "é", "👩‍👩‍👧", "e\u0301", "日本", "\u2028", "\ufeff", "<", "0x",
]  # fmt: skip


@pytest.fixture(scope="module")
def exported(trained):
    """The tokenizer.json of each kind, special tokens off in text."""
    return {kind: (trained[kind], opened(trained[kind])) for kind in ("bpe", "char", "unigram")}


def opened(tokenizer):
    theirs = tokenizers.Tokenizer.from_str(json.dumps(tokenizer_json(tokenizer.model)))
    theirs.encode_special_tokens = True
    return theirs


@pytest.mark.parametrize("kind", ["bpe", "char", "unigram"])
def test_hard_texts_have_the_same_ids_and_come_back(exported, kind):
    ours, theirs = exported[kind]
    for text in [*HARD, *TEXTS[:20], "".join(ODD), "<0x41><eos><|user|> <0x4G> <|useR|>"]:
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert ids == ours.encode(text).tolist(), text
        assert theirs.decode(ids) == text


PARTS = st.one_of(st.sampled_from(ODD), st.text(max_size=5), st.text("the quick\n ", max_size=9))


@given(parts=st.lists(PARTS, max_size=12))
@settings(deadline=None, max_examples=200)
def test_any_text_has_the_same_ids_and_comes_back(exported, parts):
    text = "".join(parts)
    for kind in ("bpe", "char"):
        ours, theirs = exported[kind]
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert ids == ours.encode(text).tolist()
        assert theirs.decode(ids) == text == ours.decode(ids)


@pytest.fixture(scope="module")
def crowded():
    """Pieces of few letters, of which many compete for every text."""
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("aab "), rng.integers(5, 100))) for _ in range(400)]
    tokenizer = train_tokenizer(texts, TokenizerConfig(model_type="bpe", vocab_size=400))
    return tokenizer, opened(tokenizer)


@given(text=st.text("ab ", max_size=60))
@settings(deadline=None, max_examples=200)
def test_competing_merges_are_joined_in_the_same_order(crowded, text):
    ours, theirs = crowded
    assert theirs.encode(text, add_special_tokens=False).ids == ours.encode(text).tolist()


@given(parts=st.lists(PARTS, max_size=12))
@settings(deadline=None, max_examples=100)
def test_a_unigram_text_has_a_segmentation_of_the_same_probability(exported, parts):
    text = "".join(parts)
    ours, theirs = exported["unigram"]
    ids = theirs.encode(text, add_special_tokens=False).ids
    scores = np.array([score for _, score in tokenizer_json(ours.model)["model"]["vocab"]])
    np.testing.assert_allclose(scores[ids].sum(), scores[ours.encode(text)].sum(), rtol=1e-5)
    assert theirs.decode(ids) == text
    assert not set(ids) & set(ours.special_ids.values())


def test_reserved_tokens_are_found_in_text_only_where_asked_and_bos_comes_first(trained):
    theirs = tokenizers.Tokenizer.from_str(json.dumps(tokenizer_json(trained["bpe"].model)))
    special = trained["bpe"].special_ids
    assert theirs.encode("<|user|>").ids == [special["<bos>"], special["<|user|>"]]
    np.testing.assert_array_equal(theirs.encode("the fox").ids, trained["bpe"].encode("the fox", add_bos=True))
    assert theirs.decode([1, 5, 2], skip_special_tokens=True) == ""


def test_a_word_tokenizer_is_refused(trained):
    with pytest.raises(ValueError, match="tokenizer.model_type='word'.*'unigram'"):
        tokenizer_json(trained["word"].model)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return folder_of(tmp_path_factory.mktemp("qwen"), byte_level(), chat_template="{{ messages[0].content }}")


def test_a_foreign_tokenizer_has_the_interface_of_ours(qwen, tmp_path):
    ours = load_tokenizer(qwen)
    theirs = tokenizers.Tokenizer.from_file(f"{qwen}/tokenizer.json")
    ids = {name: theirs.token_to_id(name) for name in SPECIAL}
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (None, ids["<|im_end|>"], ids["<|endoftext|>"])
    assert ours.special_ids == ids
    assert ours.vocab_size == theirs.get_vocab_size(with_added_tokens=True)
    for text, batch in zip(HARD, ours.encode_batch(HARD), strict=True):
        np.testing.assert_array_equal(batch, theirs.encode(text, add_special_tokens=False).ids)
        assert batch.dtype == np.int32
        assert ours.decode(batch) == text
        assert ours.token_bytes_V[batch].sum() == len(text.encode())
    assert ours.encode("x", add_bos=True, add_eos=True)[-1] == ours.eos_id
    assert len(ours.encode("x", add_bos=True)) == 1
    text = "<|im_start|><think>"
    assert ours.decode(ours.encode(text)) == text
    assert not set(ours.encode(text)) & set(ids.values())
    assert theirs.token_to_id("<think>") in ours.encode(text)
    assert ours.decode([ids["<|im_end|>"], *ours.encode("x")]) == "x"
    ours.save(str(tmp_path))
    again = load_tokenizer(str(tmp_path))
    assert (again.digest, again.special_ids) == (ours.digest, ours.special_ids)


def test_bos_is_what_the_tokenizer_puts_before_a_text(tmp_path):
    ours = load_tokenizer(folder_of(tmp_path, byte_level(bos="<|endoftext|>")))
    assert ours.bos_id == ours.special_ids["<|endoftext|>"]
    assert ours.encode("x", add_bos=True)[0] == ours.bos_id


def test_pieces_of_sentencepiece_are_counted_in_bytes(trained, tmp_path):
    write_tokenizer(trained["bpe"], None, str(tmp_path), 64)
    again = load_tokenizer(str(tmp_path))
    np.testing.assert_array_equal(again.token_bytes_V, trained["bpe"].token_bytes_V)
    assert again.special_ids == trained["bpe"].special_ids
    for text in HARD:
        np.testing.assert_array_equal(again.encode(text), trained["bpe"].encode(text))


def foreign(**options) -> bytes:
    """A sentencepiece model as other projects make them: the first two options are Llama's and Mistral's."""
    model = io.BytesIO()
    options = {
        "model_type": "bpe", "add_dummy_prefix": True, "byte_fallback": True, "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False, "vocab_size": 360,
    } | options  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=model, minloglevel=2, hard_vocab_limit=False, **options
    )
    return model.getvalue()


FOREIGN_REFUSED = [
    ({"model_type": "unigram"}, "it is a unigram model"),
    ({"normalization_rule_name": "nmt_nfkc"}, "it normalizes texts"),
    ({"remove_extra_whitespaces": True}, "it normalizes texts"),
    ({"byte_fallback": False, "vocab_size": 100}, "it has no pieces for bytes"),
    ({"user_defined_symbols": ["<b>"]}, "it has both a dummy prefix and user-defined pieces"),
]
GEMMA = {"add_dummy_prefix": False, "user_defined_symbols": ["<start_of_turn>", "<end_of_turn>", "<h1>", "\n\n"]}


@pytest.mark.parametrize("options", [{}, GEMMA], ids=["llama", "gemma"])
def test_a_sentencepiece_model_of_another_project_gives_its_ids(tmp_path, options):
    model = foreign(**options)
    (tmp_path / "tokenizer.model").write_bytes(model)
    ours, theirs = read_tokenizer(str(tmp_path)), sentencepiece.SentencePieceProcessor(model_proto=model)
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (theirs.bos_id(), theirs.eos_id(), theirs.eos_id())
    texts = [t for t in [*HARD, *TEXTS[:9], "<h1>the<h1> fox\n\n\n", "<s> </s> <unk>"] if not RAW.search(t)]
    for text in texts:
        ids = ours.encode(text)
        assert ids.tolist() == theirs.encode(text), text
        assert ours.decode(ids) == text
    assert ("<start_of_turn>" in ours.special_ids) == bool(options)
    assert ours.token_bytes_V[ours.encode("the fox")].sum() == len("the fox") + (not options)


def test_templates_use_the_special_tokens_that_there_are(qwen):
    ours = load_tokenizer(qwen)
    start, end = ours.special_ids["<|im_start|>"], ours.special_ids["<|im_end|>"]
    messages = [Message("user", "the <|im_end|> fox"), Message("assistant", "a dog")]
    chatml = ChatTemplate.from_config("chatml")
    ids, trained_on = chatml.encode(ours, messages, loss_on="assistant")
    assert (ids == start).sum() == 2
    assert (ids == end).sum() == 2
    assert ids[0] == start  # there is no BOS
    assert ours.decode(ids[trained_on]) == "a dog"
    assert chatml.stop_ids(ours) == (end,)
    plain = ChatTemplate.from_config("plain").encode(ours, messages, loss_on="assistant").ids
    assert plain[-1] == ours.eos_id
    with pytest.raises(ValueError, match=r"roles writes <\|user\|>, which is no special token.*'chatml' fits"):
        ChatTemplate.from_config("roles").encode(ours, messages, loss_on="assistant")


def test_the_template_of_a_checkpoint_is_found(qwen, tmp_path):
    assert read_template(qwen).source == "{{ messages[0].content }}"
    several = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    assert read_template(folder_of(tmp_path, "{}", chat_template=several)).source == "d"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert read_template(str(tmp_path)).source == "file"


def test_what_is_wrong_with_a_tokenizer_is_said_in_a_sentence(tmp_path):
    with pytest.raises(ValueError, match="no tokenizer"):
        read_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.model").write_bytes(b"no model")
    with pytest.raises(ValueError, match="not a sentencepiece model"):
        read_tokenizer(str(tmp_path))
    for options, words in FOREIGN_REFUSED:
        (tmp_path / "tokenizer.model").write_bytes(foreign(**options))
        with pytest.raises(ValueError, match=rf"{words}; make a tokenizer.json.*save_pretrained"):
            read_tokenizer(str(tmp_path))
    with pytest.raises(ValueError, match="names no eos_token"):
        read_tokenizer(folder_of(tmp_path, byte_level(), eos_token=None))
    with pytest.raises(ValueError, match="eos_token='<end>' is no token"):
        read_tokenizer(folder_of(tmp_path, byte_level(), eos_token="<end>"))
    with pytest.raises(ValueError, match="tokenizer.json cannot be read"):
        read_tokenizer(folder_of(tmp_path, "{}"))
