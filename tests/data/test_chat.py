"""Conversations become the official texts, exactly the right tokens are trained on, and nothing a user writes is special."""

import copy
import functools
import hashlib
import itertools
import json
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgpt.data import chat
from jaxgpt.data.chat import ChatTemplate, Message
from jaxgpt.data.sentencepiece_tokenizer import TokenizerConfig, train_tokenizer
from jaxgpt.data.sources import Record, present_field, required_field
from jaxgpt.serving import protocol

SIZES = {"bpe": 340, "unigram": 330, "char": 10_000, "word": 310}
TEXTS = ["Q: why is it so?\nA: because it is so.\n", "user\nassistant\n the end of it all, or not? No.\n"] * 40
NAMES = list(chat.CHAT_TEMPLATES)
TALK = [
    Message("system", "Be brief."),
    Message("user", "Why?"),
    Message("assistant", "Because."),
    Message("user", "And?"),
    Message("assistant", "No."),
]


@functools.cache
def tokenizer(kind):
    return train_tokenizer(TEXTS, TokenizerConfig(model_type=kind, vocab_size=SIZES[kind]))


def named(name):
    return ChatTemplate.from_config(name)


def show(tok, encoded):
    """Text of ids with reserved tokens by name and what is trained on in guillemets, token by token."""
    names = {i: name.encode() for name, i in tok.special_ids.items()}
    out = b""
    for trained, group in itertools.groupby(zip(encoded.ids, encoded.trained, strict=True), key=lambda pair: pair[1]):
        text = b"".join(names.get(i, tok.decode_bytes([i])) for i, _ in group)
        out += "«".encode() + text + "»".encode() if trained else text
    return out.decode()


# Written from the formats' documentation: ChatML (OpenAI, Qwen), Llama 3 model card, ai.google.dev/gemma/docs/formatting.
RENDERED = {
    "plain": "Be brief.\nQ: Why?\nA: Because.<eos>\nQ: And?\nA: No.<eos>",
    "chatml": (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
        "Because.<|im_end|>\n<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\nNo.<|im_end|>\n"
    ),
    "llama3": (
        "<bos><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nBecause.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nAnd?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nNo.<|eot_id|>"
    ),
    "gemma": (
        "<bos><start_of_turn>user\nBe brief.\n\nWhy?<end_of_turn>\n<start_of_turn>model\nBecause.<end_of_turn>\n"
        "<start_of_turn>user\nAnd?<end_of_turn>\n<start_of_turn>model\nNo.<end_of_turn>\n"
    ),
    "roles": (
        "<|system|>Be brief.<|end|><|user|>Why?<|end|><|assistant|>Because.<|end|>"
        "<|user|>And?<|end|><|assistant|>No.<|end|>"
    ),
}
PROMPTS = {
    "plain": "Q: Why?\nA:",
    "chatml": "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n",
    "llama3": (
        "<bos><|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "gemma": "<bos><start_of_turn>user\nWhy?<end_of_turn>\n<start_of_turn>model\n",
    "roles": "<|user|>Why?<|end|><|assistant|>",
}
R0, R1 = "<|reserved_0|>", "<|reserved_1|>"  # what other models' markers become
MASKED = {
    "plain": "<bos>Be brief.\nQ: Why?\nA:« Because.<eos>»\nQ: And?\nA:« No.<eos>»",
    "chatml": (
        f"<bos>{R0}system\nBe brief.<|end|>\n{R0}user\nWhy?<|end|>\n{R0}assistant\n«Because.<|end|>»\n"
        f"{R0}user\nAnd?<|end|>\n{R0}assistant\n«No.<|end|>»\n"
    ),
    "llama3": (
        f"<bos>{R0}system{R1}\n\nBe brief.<|end|>{R0}user{R1}\n\nWhy?<|end|>{R0}assistant{R1}\n\n«Because.<|end|>»"
        f"{R0}user{R1}\n\nAnd?<|end|>{R0}assistant{R1}\n\n«No.<|end|>»"
    ),
    "gemma": (
        f"<bos>{R0}user\nBe brief.\n\nWhy?<|end|>\n{R0}model\n«Because.<|end|>»\n"
        f"{R0}user\nAnd?<|end|>\n{R0}model\n«No.<|end|>»\n"
    ),
    "roles": (
        "<bos><|system|>Be brief.<|end|><|user|>Why?<|end|><|assistant|>«Because.<|end|>»"
        "<|user|>And?<|end|><|assistant|>«No.<|end|>»"
    ),
}
STOPS = {"plain": ["<eos>"]} | dict.fromkeys(("chatml", "llama3", "gemma", "roles"), ["<eos>", "<|end|>"])


@pytest.mark.parametrize("name", NAMES)
def test_the_text_is_that_of_the_official_format(name):
    assert named(name).render(TALK) == RENDERED[name]
    assert named(name).render(TALK[1:2], add_generation_prompt=True) == PROMPTS[name]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("plain", "Q: a\nA: b<eos>\nTool: c\nA:"),
        ("chatml", "<|im_start|>tool\nc<|im_end|>\n<|im_start|>assistant\n"),
        ("llama3", "<|start_header_id|>ipython<|end_header_id|>\n\nc<|eot_id|><|start_header_id|>assistant"),
        ("gemma", "<start_of_turn>user\nc<end_of_turn>\n<start_of_turn>model\n"),
        ("roles", "<|tool|>c<|end|><|assistant|>"),
    ],
)
def test_a_tools_answer_has_its_place(name, text):
    talk = [Message("user", "a"), Message("assistant", "b"), Message("tool", "c")]
    assert text in named(name).render(talk, add_generation_prompt=True)


@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_what_is_trained_on(name, kind):
    tok, template = tokenizer(kind), named(name)
    assert show(tok, template.encode(tok, TALK, loss_on="assistant")) == MASKED[name]
    first_turn = MASKED[name].replace("«", "", 1).replace("»", "", 1)
    assert show(tok, template.encode(tok, TALK, loss_on="completion")) == first_turn
    everything = MASKED[name].replace("«", "").replace("»", "").removeprefix("<bos>")
    assert show(tok, template.encode(tok, TALK, loss_on="all")) == f"<bos>«{everything}»"
    assert [tok.special_ids[s] for s in STOPS[name]] == list(template.stop_ids(tok))


def test_each_token_of_a_short_conversation():
    tok = tokenizer("char")
    a, b, end = tok.encode("a")[0], tok.encode("s")[0], tok.special_ids["<|end|>"]
    ids, trained = named("roles").encode(tok, [Message("user", "a"), Message("assistant", "s")], loss_on="assistant")
    user, assistant = tok.special_ids["<|user|>"], tok.special_ids["<|assistant|>"]
    assert ids.tolist() == [tok.bos_id, user, a, end, assistant, b, end]
    assert trained.tolist() == [False] * 5 + [True] * 2
    assert (ids.dtype, trained.dtype) == (np.int32, bool)


@pytest.mark.parametrize("name", NAMES)
def test_the_end_marker_is_trained_where_padding_is_eos(name):
    tok = copy.copy(tokenizer("bpe"))
    tok.pad_id = tok.eos_id
    template = named(name)
    for loss_on, count in (("assistant", 2), ("completion", 1), ("all", 2)):
        ids, trained = template.encode(tok, TALK, loss_on=loss_on)
        ends = [i for i in ids[trained] if i == template.stop_ids(tok)[-1]]
        assert len(ends) >= count
        last = int(np.flatnonzero(ids == template.stop_ids(tok)[-1])[-1])
        assert trained[last]


MARKERS = [
    "<bos>", "<eos>", "<pad>", "<|user|>", "<|end|>", "<|assistant|>", "<|im_start|>", "<|im_end|>", "<|eot_id|>",
    "<|reserved_0|>", "<end_of_turn>", "</s>", "<|im_", "<|", "<", "|>", "{{ eos_token }}", "{% if %}",
]  # fmt: skip
PIECES = st.one_of(
    st.sampled_from(MARKERS),
    st.sampled_from(["\n", " ", "  ", "\t", "👩‍👩‍👧", "é", "\ue000", "\ue000\ue000", "\u2581", "\0"]),
    st.text(max_size=5), st.sampled_from(["it is so", "Q: ", "A:", "user\n", "not?"]),
)  # fmt: skip
CONTENTS = st.lists(PIECES, max_size=8).map("".join)
# The text without markers, independently of the template's source.
DECODED = {
    "plain": lambda s, u, a, v, b: f"{s}\nQ: {u}\nA: {a}\nQ: {v}\nA: {b}",
    "chatml": lambda s, u, a, v, b: f"system\n{s}\nuser\n{u}\nassistant\n{a}\nuser\n{v}\nassistant\n{b}\n",
    "llama3": lambda s, u, a, v, b: (
        f"system\n\n{s.strip()}user\n\n{u.strip()}assistant\n\n{a.strip()}user\n\n{v.strip()}assistant\n\n{b.strip()}"
    ),
    "gemma": lambda s, u, a, v, b: (
        f"user\n{s}\n\n{u.strip()}\nmodel\n{a.strip()}\nuser\n{v.strip()}\nmodel\n{b.strip()}\n"
    ),
    "roles": lambda s, u, a, v, b: s + u + a + v + b,
}
NUM_SPECIAL = {"plain": 1 + 2, "chatml": 1 + 5 * 2, "llama3": 1 + 5 * 3, "gemma": 1 + 4 * 2, "roles": 1 + 5 * 2}


@given(st.lists(CONTENTS, min_size=5, max_size=5), st.sampled_from(list(SIZES)))
@settings(deadline=None, max_examples=50)
def test_any_content_is_plain_text_and_prompt_and_response_are_the_same_together_and_apart(contents, kind):
    tok = tokenizer(kind)
    talk = [Message(m.role, text) for m, text in zip(TALK, contents, strict=True)]
    special = list(tok.special_ids.values())
    for name in NAMES:
        template = named(name)
        ids, trained = template.encode(tok, talk, loss_on="completion")
        assert tok.decode_bytes(ids) == DECODED[name](*contents).encode()
        assert np.isin(ids, special).sum() == NUM_SPECIAL[name]
        assert (ids[0], (ids == tok.bos_id).sum()) == (tok.bos_id, 1)
        prompt, earlier = (template.encode_prompt(tok, talk[:n]) for n in (4, 2))
        np.testing.assert_array_equal(prompt, ids[: len(prompt)])
        np.testing.assert_array_equal(earlier, ids[: len(earlier)])
        # The response alone, as a model's own tokens would be: a space where the template writes one, text, end marker.
        text = contents[4].strip() if name in ("llama3", "gemma") else contents[4]
        response = [*tok.encode((" " if name == "plain" else "") + text), template.stop_ids(tok)[-1]]
        np.testing.assert_array_equal(ids[trained], response)
        assert np.flatnonzero(trained)[0] == len(prompt)


def test_a_conversation_is_a_prefix_of_its_continuation():
    tok = tokenizer("bpe")
    for name in NAMES:
        short = named(name).encode(tok, TALK[:3], loss_on="assistant")
        long = named(name).encode(tok, TALK, loss_on="assistant")
        np.testing.assert_array_equal(short.ids, long.ids[: len(short.ids)])
        np.testing.assert_array_equal(short.trained, long.trained[: len(short.ids)])


ZEPHYR = """\
{% for message in messages %}
    {% if message.role == 'user' %}
{{ '<|user|>\\n' + message.content + eos_token }}
    {% elif message.role == 'assistant' %}
{{ '<|assistant|>\\n' + message.content + eos_token }}
    {% endif %}
    {% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
    {% endif %}
{% endfor %}
"""


def test_a_template_of_the_users(tmp_path):
    path = tmp_path / "zephyr.jinja"
    path.write_bytes(ZEPHYR.replace("\n", "\r\n").encode())
    template, tok = named(str(path)), tokenizer("bpe")
    assert template.digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert template.render(TALK[1:3]) == "<|user|>\nWhy?<eos>\n<|assistant|>\nBecause.<eos>\n"
    shown = "<bos><|user|>\nWhy?<eos>\n<|assistant|>\n«Because.<eos>»\n"
    assert show(tok, template.encode(tok, TALK[1:3], loss_on="assistant")) == shown
    folder = tmp_path / "run"
    folder.mkdir()
    assert ChatTemplate.from_dir(str(folder)) is None
    template.save(str(folder))
    assert (folder / "chat_template.jinja").read_bytes() == path.read_bytes()
    assert ChatTemplate.from_dir(str(folder)).digest == template.digest
    again = pickle.loads(pickle.dumps(template))
    assert again.render(TALK) == template.render(TALK)


EACH = "{% for m in messages %}"


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        # no end marker: EOS is appended
        (EACH + "{{ m.content }}|{% endfor %}", "<bos>Why?|«Because.|<eos>»And?|«No.|<eos>»"),
        # a marker that only begins the turn is not its end
        (EACH + "<|{{ m.role }}|>{{ m.content }}{% endfor %}",
         "<bos><|user|>Why?«<|assistant|>Because.<eos>»<|user|>And?«<|assistant|>No.<eos>»"),
        # BOS of the template's own, and two end markers
        ("<s>" + EACH + "{{ m.content }}<|im_end|></s>{% endfor %}",
         "<bos>Why?<|end|><eos>«Because.<|end|><eos>»And?<|end|><eos>«No.<|end|><eos>»"),
        # what Hugging Face's templates use: generation blocks, loop controls, tojson, tools
        (EACH + "{% generation %}{{ m.content | tojson }}{{ eos_token }}{% endgeneration %}"
         "{% if tools is not none %}{% break %}{% endif %}{% endfor %}",
         '<bos>"Why?"<eos>«"Because."<eos>»"And?"<eos>«"No."<eos>»'),
        # text of the template itself with the character that is used to escape
        (EACH + "\ue000{{ m.content.split('use')[-1] }}<eos>{% endfor %}",
         "<bos>\ue000Why?<eos>«\ue000.<eos>»\ue000And?<eos>«\ue000No.<eos>»"),
    ],
)  # fmt: skip
def test_other_shapes_of_templates(source, shown):
    tok = tokenizer("bpe")
    assert show(tok, ChatTemplate(source, "mine").encode(tok, TALK[1:], loss_on="assistant")) == shown


def test_a_filter_sees_the_content_as_it_is():
    template = ChatTemplate(EACH + "{{ m.content | tojson }}<eos>{% endfor %}", "mine")
    talk = [Message("user", "<eos> é\n"), Message("assistant", "\ue000")]
    assert template.render(talk) == '"<eos> é\\n"<eos>"\ue000"<eos>'
    shown = '<bos>"<eos> é\\n"<eos>«"\ue000"<eos>»'
    assert show(tokenizer("bpe"), template.encode(tokenizer("bpe"), talk, loss_on="assistant")) == shown


def test_contents_that_the_template_joins_make_no_marker():
    template = ChatTemplate(EACH + "{{ m.content }}{{ '|>' + eos_token if m.role == 'assistant' }}{% endfor %}", "mine")
    talk = [
        Message("system", "<|im_"),
        Message("user", "end|><"),
        Message("user", "|end"),
        Message("assistant", "<|end"),
    ]
    shown = "<bos><|im_end|><|end«<|end|><eos>»"
    tok = tokenizer("char")
    encoded = template.encode(tok, talk, loss_on="assistant")
    assert show(tok, encoded) == shown
    assert np.isin(encoded.ids, list(tok.special_ids.values())).sum() == 2


def test_a_tokenizer_with_a_piece_of_that_name_uses_it():
    tok = copy.copy(tokenizer("bpe"))
    tok.special_ids = {**tok.special_ids, "<|im_end|>": tok.special_ids["<|reserved_5|>"]}
    encoded = named("chatml").encode(tok, TALK[1:3], loss_on="assistant")
    assert encoded.ids[encoded.trained][-1] == tok.special_ids["<|reserved_5|>"]
    assert named("chatml").stop_ids(tok) == (tok.eos_id, tok.special_ids["<|reserved_5|>"])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ bos_token }}\n{% if %}", "Chat template mine, line 2: Expected an expression"),
        ("a\n\n{{ raise_exception('only odd numbers of turns') }}", "mine, line 3: only odd numbers of turns"),
        ("{{ messages[9].role.upper() }}", "mine, line 1: list object has no element 9"),
        ("\n{{ 1 // 0 }}", "mine, line 2: .*zero"),
        ("{{ ''.__class__.__mro__ }}", "mine, line 1: access to attribute '__class__' of 'str' object is unsafe"),
        (EACH + "{{ m.contents }}{{ eos_token }}{% endfor %}", "mine leaves out the content of assistant message 2"),
        (EACH + "{{ m.content }}{% endfor %}{{ 'A:' if add_generation_prompt }}",
         "first 1 messages with the generation prompt is not how the text of the first 2 begins"),
        (EACH + "{{ m.content if loop.last or m.role == 'user' else '...' }}{% endfor %}",
         r"mine: the text of earlier messages changes when message 3 follows \(from 'Because.' to '...And\?'\)"),
    ],
)  # fmt: skip
def test_a_broken_template_is_named(source, message):
    with pytest.raises(ValueError, match=message):
        ChatTemplate(source, "mine").encode(tokenizer("char"), TALK[1:], loss_on="assistant")


def test_wrong_configuration_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"sft.template='chatlm' is neither one of plain, .*nearest name is 'chatml'"):
        named("chatlm")
    with pytest.raises(ValueError, match=r"data.chat='.*none.jinja' cannot be read \(No such file"):
        ChatTemplate.from_config(str(tmp_path / "none.jinja"), "data.chat")
    (tmp_path / "a.jinja").write_bytes(b"ab\xff")
    with pytest.raises(ValueError, match=r"a.jinja' is not valid UTF-8 \(byte 2\)"):
        named(str(tmp_path / "a.jinja"))
    (tmp_path / "b.jinja").write_text("{{ a }}\n\n{{ b")
    with pytest.raises(ValueError, match=r"b.jinja, line 3:"):
        named(str(tmp_path / "b.jinja"))
    with pytest.raises(ValueError, match="alternate"):
        named("gemma").render([TALK[1], TALK[1]])
    tok, template = tokenizer("char"), named("plain")
    for talk in ([], TALK[:2]):
        with pytest.raises(ValueError, match="must end with an assistant message"):
            template.encode(tok, talk, loss_on="all")
    for talk in ([], TALK[:3], TALK[:1]):
        with pytest.raises(ValueError, match="must end with a user or a tool message"):
            template.encode_prompt(tok, talk)
    with pytest.raises(ValueError, match="sft.loss_on='prompt' is not one of assistant, completion, all"):
        template.encode(tok, TALK, loss_on="prompt")


def record(**fields):
    return Record(fields, "a.jsonl", 7)


def dicts(*messages):
    return [{"role": role, "content": content} for role, content in messages]


PAIR = [Message("user", "p"), Message("assistant", "r")]


@pytest.mark.parametrize(
    ("fields", "mapping"),
    [
        ({"prompt": "p", "response": "r"}, {}),
        ({"prompt": "p", "completion": "r"}, {}),
        ({"prompt": "p", "completion": "r"}, {"response": "completion"}),
        ({"q": "p", "answers": [{"text": "r"}]}, {"prompt": "q", "response": "answers.0.text"}),
        ({"messages": dicts(("user", "p"), ("assistant", "r"))}, {}),
        ({"messages": dicts(("user", "p"), ("assistant", "r")), "prompt": "other"}, {}),
        ({"messages": [], "prompt": "p", "a": "r"}, {"response": "a"}),
        ({"chat": dicts(("user", "p"), ("assistant", "r"))}, {"messages": "chat"}),
        ({"prompt": dicts(("user", "p")), "response": "r"}, {}),
        ({"prompt": dicts(("user", "p")), "completion": dicts(("assistant", "r"))}, {}),
    ],
)
def test_records_are_conversations(fields, mapping):
    assert chat.conversation(record(**fields), mapping) == PAIR


def test_a_prompt_alone():
    assert chat.prompt_messages(record(prompt="p"), {}) == PAIR[:1]
    assert chat.prompt_messages(record(q=dicts(("system", "s"), ("user", "p"))), {"prompt": "q"})[1:] == PAIR[:1]
    with pytest.raises(ValueError, match=r"a\.jsonl, line 7: the prompt must end with a user or a tool message"):
        chat.prompt_messages(record(prompt=dicts(("user", "p"), ("assistant", "r"))), {})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"promt": "p", "response": "r"}, r"no field 'prompt' \(there are: promt, response\); the nearest is 'promt'"),
        ({"prompt": "p", "answer": "r"}, r"no field 'response' \(there are: prompt, answer\)"),
        ({"prompt": 3, "response": "r"}, "the field 'prompt' must be a text or a list of messages, not int"),
        ({"prompt": "p", "response": None}, "the field 'response' must be a text or a list of messages, not NoneType"),
        ({"prompt": " \n", "response": "r"}, "the prompt is empty"),
        ({"prompt": "p\ud800", "response": "r"}, "prompt has half a surrogate pair at character 1"),
        ({"messages": "p"}, "the field 'messages' must be list, not str"),
        ({"messages": []}, "the field 'messages' is an empty list"),
        ({"messages": ["p"]}, r"messages\[0\] must be an object with role and content, not str"),
        ({"messages": [{"from": "user"}]}, r"messages\[0\] has no field 'role' \(there are: from\)"),
        ({"messages": [{"role": "user", "content": None}]}, r"messages\[0\]\.content must be str, not NoneType"),
        ({"messages": dicts(("user", "p"), ("asistant", "r"))},
         r"messages\[1\]\.role='asistant' is not one of .*; the nearest is 'assistant'"),
        ({"messages": dicts(("user", "p"))}, "the last message must be the assistant's, not one of role 'user'"),
        ({"messages": dicts(("assistant", "r"))}, "the prompt is empty"),
        ({"messages": dicts(("user", " "), ("assistant", "r"))}, "the prompt is empty"),
        ({"messages": dicts(("system", "s"), ("assistant", "r"))}, "must end with a user or a tool .*role 'system'"),
    ],
)  # fmt: skip
def test_a_wrong_record_is_named(fields, message):
    with pytest.raises(ValueError, match=rf"^a\.jsonl, line 7: .*{message}"):
        chat.conversation(record(**fields), {})


def weighted(*weights):
    """TALK with weights of its assistant turns."""
    messages, left = dicts(*TALK), list(weights)
    return chat.conversation(
        record(messages=[m | ({"weight": left.pop(0)} if m["role"] == "assistant" else {}) for m in messages]), {}
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_turn_of_weight_0_is_not_trained_on(name):
    tok, template = tokenizer("bpe"), named(name)
    first = MASKED[name].replace("«", "", 1).replace("»", "", 1)
    assert show(tok, template.encode(tok, weighted(0, 1), loss_on="assistant")) == first
    assert show(tok, template.encode(tok, weighted(1, None), loss_on="assistant")) == MASKED[name]
    both = [template.encode(tok, weighted(*weights), loss_on="all") for weights in ((1, 1), (0, 1), (0, 0))]
    expected = template.encode(tok, TALK, loss_on="assistant").trained
    assert [(one.ids == both[0].ids).all() for one in both] == [True] * 3
    assert (both[0].trained & ~both[2].trained).tolist() == expected.tolist()
    assert 0 < (both[0].trained & ~both[1].trained).sum() < expected.sum()
    for weights, loss_on in (((0, 0), "assistant"), ((1, 0), "completion")):
        with pytest.raises(
            ValueError, match=rf'Every assistant message that sft.loss_on={loss_on} trains on has "weight"'
        ):
            template.encode(tok, weighted(*weights), loss_on=loss_on)
    scored = template.encode_scored(tok, weighted(0, 0))
    np.testing.assert_array_equal(scored.ids, template.encode_scored(tok, TALK).ids)


CALL = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]


@pytest.mark.parametrize(
    ("more", "beside", "message"),
    [
        (
            {"tool_calls": CALL},
            {},
            r"messages\[1\]\.tool_calls is not supported: of a message only role, content and weight",
        ),
        ({"reasoning_content": "hm"}, {}, r"messages\[1\]\.reasoning_content is not supported"),
        ({"name": "Ann"}, {}, r"messages\[1\]\.name is not supported"),
        ({"weight": 0.5}, {}, r"messages\[1\]\.weight must be 0 or 1, not 0\.5"),
        ({"weight": True}, {}, r"messages\[1\]\.weight must be 0 or 1, not true"),
        ({"weight": "0"}, {}, r"messages\[1\]\.weight must be 0 or 1, not \"0\""),
        ({}, {"tools": CALL}, "the field 'tools' is not supported"),
        ({}, {"functions": CALL}, "the field 'functions' is not supported"),
    ],
)
def test_what_a_template_would_not_be_given_is_refused_by_name(more, beside, message):
    messages = dicts(*PAIR)
    messages[1] |= more
    with pytest.raises(ValueError, match=rf"^a\.jsonl, line 7: {message}"):
        chat.conversation(record(messages=messages, **beside), {})
    messages[1] = messages[1] | dict.fromkeys(more)  # as parquet has what only other rows have
    assert chat.conversation(record(messages=messages, **dict.fromkeys(beside)), {}) == PAIR


@pytest.mark.parametrize("value", [None, "", [], {}])
@pytest.mark.parametrize("key", ["tool_calls", "reasoning_content", "name"])
def test_an_empty_value_says_nothing_in_data_and_to_the_server(key, value):
    messages = dicts(*PAIR)
    messages[1][key] = value
    assert chat.conversation(record(messages=messages), {}) == PAIR
    assert protocol._message(messages[1], "messages[1]") == PAIR[1]


def test_a_weight_is_for_the_assistant():
    messages = [{"role": "user", "content": "p", "weight": 0}, *dicts(PAIR[1])]
    with pytest.raises(ValueError, match=r"messages\[0\]\.weight is for messages of the assistant, not of role 'user'"):
        chat.conversation(record(messages=messages), {})


def test_empty_responses_are_left_to_the_caller():
    assert chat.has_empty_response(chat.conversation(record(prompt="p", response=" \n"), {}))
    assert chat.has_empty_response([PAIR[0], Message("assistant", ""), *PAIR])
    assert not chat.has_empty_response([Message("user", ""), *PAIR])
    tok = tokenizer("bpe")
    empty = named("roles").encode(tok, [Message("user", "Why?"), Message("assistant", "")], loss_on="assistant")
    assert show(tok, empty) == "<bos><|user|>Why?<|end|><|assistant|>«<|end|>»"
    bare = ChatTemplate(EACH + "{{ m.content }}{% endfor %}", "mine")
    empty = bare.encode(tok, [Message("user", "Why?"), Message("assistant", "")], loss_on="assistant")
    assert show(tok, empty) == "<bos>Why?«<eos>»"


def test_held_out_data_are_split_by_prompt():
    prompt = chat.hashable_prompt(TALK)
    assert prompt == chat.hashable_prompt([*TALK[:-1], Message("assistant", "Yes.")]) == chat.hashable_prompt(TALK[:-1])
    assert json.loads(prompt) == [list(message) for message in TALK[:-1]]
    texts = {prompt, chat.hashable_prompt(TALK[1:]), chat.hashable_prompt(TALK[:3]), chat.hashable_prompt(PAIR)}
    assert len(texts) == 4


SEED_TASK = {
    "instruction": "Add.",
    "instances": [{"input": "1, 2", "output": "3"}, {"input": "", "n": 4}],
    "a.b": "dot",
}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("instances.0.output", "3"),
        ("instances.-1.input", ""),
        ("a.b", "dot"),
        ("{instruction}\n{instances.0.input}", "Add.\n1, 2"),
        ("{{{instances.1.n}}} {a.b}", "{4} dot"),
    ],
)
def test_a_mapped_name_may_be_a_path_or_a_format(key, value):
    assert required_field(record(**SEED_TASK), "prompt", {"prompt": key}, str) == value


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (
            "instance.0.output",
            r"no field 'instance' \(there are: instruction, instances, a.b\); the nearest is 'instances'",
        ),
        (
            "instances.0.outptu",
            r"no field 'instances.0.outptu' .*; the nearest is 'instances.0.output'; data.fields can",
        ),
        ("instances.2.output", "'instances' is a list of 2, and '2' is no index of it"),
        ("instances.first", "'instances' is a list of 2, and 'first' is no index"),
        ("instruction.0", "'instruction' is of type str and has no field '0'"),
        ("instances.1.n", "the field 'instances.1.n' must be str, not int"),
        ("{instruction} {instances}", "the field 'instances' must be str, not list"),
        ("{instruction} {inputs}", "no field 'inputs'"),
    ],
)
def test_a_wrong_path_is_named(key, message):
    with pytest.raises(ValueError, match=rf"^a\.jsonl, line 7: .*{message}"):
        required_field(record(**SEED_TASK), "prompt", {"prompt": key}, str)


@pytest.mark.parametrize("key", ["{instruction", "{instruction!r}", "{instruction:>9}"])
def test_a_wrong_format_is_named(key):
    with pytest.raises(ValueError, match="data.fields: '.instruction.*"):
        required_field(record(**SEED_TASK), "prompt", {"prompt": key}, str)


def test_alternative_names():
    both = record(response="r", completion="c")
    assert present_field(both, ("response", "completion"), {}) == "response"
    assert present_field(both, ("response", "completion"), {"completion": "x"}) == "completion"
    assert present_field(record(completion="c"), ("response", "completion"), {}) == "completion"
    assert present_field(record(), ("response", "completion"), {}) is None
