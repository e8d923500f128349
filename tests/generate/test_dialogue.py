"""What a conversation is asked as, by each template and by none."""

import pytest

from jaxgpt.data.chat import CHAT_TEMPLATES, ChatTemplate, Message
from jaxgpt.data.sentencepiece_tokenizer import TokenizerConfig, train_tokenizer
from jaxgpt.generate.dialogue import ChatFormat, Speech

TOKENIZER = train_tokenizer(["Ann sees Bob: Q A"] * 3, TokenizerConfig(model_type="char", vocab_size=400))
TALK = [Message("user", "Ann"), Message("assistant", "Bob"), Message("user", "sees")]


@pytest.mark.parametrize(
    ("name", "prefix", "ends"),
    [
        ("plain", " ", ["<eos>"]),
        ("roles", "", ["<eos>", "<|end|>"]),
        ("chatml", "", ["<eos>", "<|end|>"]),
        ("llama3", "", ["<eos>", "<|end|>"]),
        ("gemma", "", ["<eos>", "<|end|>"]),
    ],
)
def test_a_template_says_what_ends_a_response_and_what_stands_before_it(name, prefix, ends):
    form = ChatFormat.of(TOKENIZER, ChatTemplate(CHAT_TEMPLATES[name], name))
    assert form.prefix == prefix
    assert form.stop_ids == tuple(TOKENIZER.special_ids[end] for end in ends)


def test_a_response_without_the_prefix_makes_the_prompt_it_was_trained_to_follow():
    form = ChatFormat.of(TOKENIZER, ChatTemplate(CHAT_TEMPLATES["plain"], "plain"))
    first, second = form.encode(TALK[:1]), form.encode(TALK)
    assert TOKENIZER.decode(first) == "Q: Ann\nA:"
    assert TOKENIZER.decode(second) == "Q: Ann\nA: Bob\nQ: sees\nA:"
    assert second[: len(first)] == first


def test_without_a_template_it_is_one_text_with_a_line_for_each_of_the_users():
    form = ChatFormat.of(TOKENIZER, None)
    assert (form.prefix, form.stop_ids) == ("", (TOKENIZER.eos_id,))
    ids = form.encode(TALK)
    assert ids[0] == TOKENIZER.bos_id
    assert TOKENIZER.decode(ids) == "AnnBob\nsees"


@pytest.mark.parametrize("name", ["max_new_tokens", "seed"])
def test_a_negative_setting_is_an_error(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 0, not -1"):
        Speech(**{name: -1})
