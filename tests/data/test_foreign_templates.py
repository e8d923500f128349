"""Templates of other models with tokenizers like theirs: the ids that their library makes of the whole text, and masks."""

import functools
import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("tokenizers")
from jaxgpt.data.chat import CHAT_TEMPLATES, ChatTemplate, Message
from jaxgpt.data.hf_tokenizer import HFTokenizer
from jaxgpt.generate.dialogue import ChatFormat
from tests.data.foreign import KINDS, byte_level, foreign, sentencepiece_like
from tests.data.test_chat import TALK

# The shapes of the families' own templates. QWEN3 closes a block of thoughts in the answer to the last question alone.
QWEN3 = """\
{%- set last = namespace(user=0) -%}
{%- for m in messages -%}{%- if m.role == "user" -%}{%- set last.user = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- for m in messages -%}
    {{- "<|im_start|>" + m.role + "\n" -}}
    {%- if m.role == "assistant" -%}
        {{- "<think>\n\n</think>\n\n" if loop.index0 > last.user -}}
        {{- m.content.split("</think>")[-1].lstrip("\n") -}}
    {%- else -%}{{- m.content -}}{%- endif -%}
    {{- "<|im_end|>\n" -}}
{%- endfor -%}
{{- "<|im_start|>assistant\n" if add_generation_prompt -}}"""
INST = """\
{{- bos_token -}}
{%- for m in messages if m.role != "system" -%}
    {{- "[INST] " + m.content | trim + " [/INST]" if m.role == "user" else " " + m.content | trim + " " + eos_token -}}
{%- endfor -%}"""
ZEPHYR = """\
{%- for m in messages -%}{{- "<|" + m.role + "|>\n" + m.content + eos_token + "\n" -}}{%- endfor -%}
{{- "<|assistant|>\n" if add_generation_prompt -}}"""
OWN = {
    "qwen": QWEN3, "llama3": CHAT_TEMPLATES["llama3"], "gemma": CHAT_TEMPLATES["gemma"], "llama2": INST, "mistral": INST,
    "always": ZEPHYR,
}  # fmt: skip


@functools.cache
def template(kind):
    return ChatTemplate(OWN[kind] + "{# the model's own #}", kind)


@functools.cache
def library(kind):
    """The tokenizer as its library has it, which takes special tokens from texts."""
    import tokenizers

    return tokenizers.Tokenizer.from_str(foreign(kind).source)


def rendered(kind, messages, is_prompt):
    """The text that the library renders: Jinja, with the tokenizer's own names of special tokens."""
    import jinja2.sandbox

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    names = {name: token for name, token in foreign(kind).names.items() if token is not None}
    values = {"messages": [m._asdict() for m in messages], "add_generation_prompt": is_prompt}
    return environment.from_string(template(kind).source).render(**values, **names)


def whole_ids(kind, messages, is_prompt=False):
    """Ids as apply_chat_template gives them: of the rendered text, with no special token added."""
    return library(kind).encode(rendered(kind, messages, is_prompt), add_special_tokens=False).ids


WORDS = st.text(st.sampled_from("ab Tj\n é日'.\u2581"), max_size=8)
CONTENTS = st.lists(WORDS, min_size=5, max_size=5)


@pytest.mark.parametrize("kind", KINDS)
@given(contents=CONTENTS)
@settings(deadline=None, max_examples=60)
def test_ids_are_those_of_the_library_for_the_whole_text(kind, contents):
    talk = [m._replace(content=text + "x") for m, text in zip(TALK, contents, strict=True)]
    tokenizer = foreign(kind)
    for n in (2, 4):
        ids = template(kind).encode_prompt(tokenizer, talk[:n])
        assert ids.tolist() == whole_ids(kind, talk[:n], is_prompt=True)
    for loss_on in ("completion", "all"):
        assert template(kind).encode(tokenizer, talk, loss_on=loss_on).ids.tolist() == whole_ids(kind, talk)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_trained_on_is_the_response_and_its_end(kind):
    tokenizer = foreign(kind)
    ids, trained = template(kind).encode(tokenizer, TALK, loss_on="completion")
    end = template(kind).stop_ids(tokenizer)[-1]
    ends = {"llama3": "<|eot_id|>", "gemma": "<end_of_turn>", "qwen": "<|im_end|>"}
    assert end == tokenizer.special_ids[ends.get(kind, "</s>")]
    (runs,) = [list(g) for is_on, g in itertools.groupby(zip(ids, trained, strict=True), lambda x: x[1]) if is_on]
    said = [int(i) for i, _ in runs]
    assert said[-1] == end
    text = tokenizer.decode_bytes(said).decode()
    assert text == {"qwen": "<think>\n\n</think>\n\nNo.", "llama2": " No. ", "mistral": " No. "}.get(kind, "No.")
    assert len(template(kind).encode_prompt(tokenizer, TALK[:4])) == np.flatnonzero(trained)[0]


@pytest.mark.parametrize("kind", ["llama3", "gemma", "llama2", "mistral", "always"])
def test_of_several_turns_each_is_trained_on(kind):
    tokenizer = foreign(kind)
    ids, trained = template(kind).encode(tokenizer, TALK, loss_on="assistant")
    assert ids.tolist() == whole_ids(kind, TALK)
    said = [
        tokenizer.decode_bytes([i for i, _ in group]).decode()
        for is_on, group in itertools.groupby(zip(ids, trained, strict=True), lambda x: x[1])
        if is_on
    ]
    assert [text.strip() for text in said] == ["Because.", "No."]


def test_a_template_that_rewrites_earlier_turns_trains_the_last_one_and_says_so():
    tokenizer = foreign("qwen")
    assert template("qwen").encode(tokenizer, TALK, loss_on="completion").trained.sum() > 3
    assert template("qwen").encode(tokenizer, TALK[:3], loss_on="assistant").trained.sum() > 3
    with pytest.raises(ValueError, match=r"changes when message 4 follows .*sft.loss_on=completion trains"):
        template("qwen").encode(tokenizer, TALK, loss_on="assistant")


@pytest.mark.parametrize("kind", KINDS)
@given(
    parts=st.lists(
        st.sampled_from(["<s>", "</s>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>", "a", " ", "<|im_"]), max_size=5
    )
)
@settings(deadline=None, max_examples=30)
def test_what_a_user_writes_is_never_a_special_token(kind, parts):
    tokenizer, text = foreign(kind), "x".join(["", *parts, ""])
    special = list(tokenizer.special_ids.values())
    plain, odd = ([Message("user", said), Message("assistant", said)] for said in ("x", text))
    counts = [
        np.isin(template(kind).encode(tokenizer, talk, loss_on="completion").ids, special) for talk in (plain, odd)
    ]
    assert counts[0].sum() == counts[1].sum()
    ids = template(kind).encode(tokenizer, odd, loss_on="completion").ids
    assert text.strip() in tokenizer.decode_bytes(ids).decode()


def test_markers_of_ours_are_text_to_the_tokenizer_of_another_model():
    tokenizer = foreign("llama2")
    ids = ChatTemplate(ZEPHYR + " ", "zephyr").encode_prompt(tokenizer, TALK[:2])
    assert "<|user|>\nWhy?" in tokenizer.decode_bytes(ids).decode()
    with pytest.raises(ValueError, match=r"roles writes <\|user\|>, which is no special token"):
        ChatTemplate.from_config("roles").encode_prompt(tokenizer, TALK[:2])


def test_bos_and_eos_are_what_the_tokenizers_config_names():
    tokenizer = sentencepiece_like(
        prefix="never", special=("<bos>", "<eos>", "<end>"), names={"bos_token": "<bos>", "eos_token": "<end>"}
    )
    mine = ChatTemplate("{{ bos_token }}{% for m in messages %}{{ m.content + eos_token }}{% endfor %}", "mine")
    ids, trained = mine.encode(tokenizer, [Message("user", "<eos>"), Message("assistant", "b")], loss_on="completion")
    names = tokenizer.special_ids
    assert (ids[0], ids[-1]) == (names["<bos>"], names["<end>"])  # the tokenizer itself puts <s> before a text
    assert names["<eos>"] not in ids
    assert mine.stop_ids(tokenizer) == (names["<end>"],)
    assert "\n" not in mine.render([Message("user", "a")], tokenizer=tokenizer).replace("<bos>a<end>", "")


def test_a_special_token_that_takes_the_spaces_beside_it():
    """As Phi-3's <|end|> does: white space after it is not tokenized."""
    import tokenizers

    spec = json.loads(foreign("llama2").source)
    for token in spec["added_tokens"]:
        token["rstrip"] = token["content"] == "</s>"
        token["lstrip"] = token["content"] == "<unk>"
    tokenizer = HFTokenizer(json.dumps(spec), foreign("llama2").names)
    mine = ChatTemplate("{% for m in messages %}{{ m.content + ' <unk></s>\n ' }}{% endfor %}{# #}", "mine")
    talk = [Message("user", "a"), Message("assistant", "b c"), Message("user", "d"), Message("assistant", "e")]
    text = "a <unk></s>\n b c <unk></s>\n d <unk></s>\n e <unk></s>\n "
    expected = tokenizers.Tokenizer.from_str(json.dumps(spec)).encode(text, add_special_tokens=False).ids
    assert mine.encode(tokenizer, talk, loss_on="assistant").ids.tolist() == expected


def test_a_long_conversation_is_rendered_once_for_a_prompt(monkeypatch):
    mine = ChatTemplate(CHAT_TEMPLATES["chatml"], "chatml")
    talk = [Message("user", "a"), Message("assistant", "b")] * 50 + [Message("user", "c")]
    mine.stop_ids(foreign("qwen"))
    rendered, render = [], ChatTemplate._render
    monkeypatch.setattr(
        ChatTemplate, "_render", lambda self, m, *args: rendered.append(len(m)) or render(self, m, *args)
    )
    mine.encode_prompt(foreign("qwen"), talk)
    assert rendered == [101]
    mine.encode(foreign("qwen"), talk[:-1], loss_on="completion")
    assert rendered[1:] == [99, 100]


# DeepSeek-R1-Distill-Llama's shape: the generation prompt opens a thought that no rendered turn has.
R1 = """\
{{- bos_token -}}
{%- for m in messages -%}
    {{- "<|User|>" + m.content if m.role == "user" -}}
    {{- "<|Assistant|>" + m.content.split("</think>")[-1] + "<|eos|>" if m.role == "assistant" -}}
{%- endfor -%}
{{- "<|Assistant|><think>\\n" if add_generation_prompt -}}"""
R1_SPECIAL = ("<|bos|>", "<|User|>", "<|Assistant|>", "<|eos|>")


def test_a_prompt_that_opens_a_thought_can_be_answered_though_not_trained_on():
    tokenizer = byte_level(R1_SPECIAL, {"bos_token": "<|bos|>", "eos_token": "<|eos|>"}, bos="<|bos|>")
    mine, names = ChatTemplate(R1, "r1"), tokenizer.special_ids
    opened = [names["<|Assistant|>"], tokenizer._tokenizer.token_to_id("<think>"), *tokenizer.encode("\n")]
    ids = mine.encode_prompt(tokenizer, [Message("user", "hi")]).tolist()
    assert ids == [names["<|bos|>"], names["<|User|>"], *tokenizer.encode("hi"), *opened]
    talk = [Message("user", "hi"), Message("assistant", "yes"), Message("user", "why")]
    said = [names["<|Assistant|>"], *tokenizer.encode("yes"), names["<|eos|>"]]
    asked = [names["<|User|>"], *tokenizer.encode("why")]
    assert mine.encode_prompt(tokenizer, talk).tolist() == [*ids[: -len(opened)], *said, *asked, *opened]
    form = ChatFormat.of(tokenizer, mine)
    assert (form.stop_ids, form.prefix) == ((names["<|eos|>"],), "")
    with pytest.raises(ValueError, match="prompt and response cannot be told apart"):
        mine.encode(tokenizer, talk[:2], loss_on="completion")


def test_a_template_may_demand_a_system_message():
    tokenizer = byte_level(R1_SPECIAL, {"eos_token": "<|eos|>"})
    refusal = "{{ raise_exception('a system message comes first') if messages[0].role != 'system' }}"
    body = "{% for m in messages %}<|User|>{{ m.content }}<|bos|>{% endfor %}"
    mine = ChatTemplate(refusal + body + "{{ '<|Assistant|>' if add_generation_prompt }}", "strict")
    names = tokenizer.special_ids
    ids = mine.encode_prompt(tokenizer, [Message("system", "s"), Message("user", "a")])
    assert [i for i in ids if i in names.values()] == [
        names[f"<|{n}|>"] for n in ["User", "bos", "User", "bos", "Assistant"]
    ]
    with pytest.raises(ValueError, match="a system message comes first"):
        mine.encode_prompt(tokenizer, [Message("user", "a")])
    strict = ChatTemplate(refusal + body + "{{ '<|User|>' if add_generation_prompt }}", "strict")
    talk = [Message("system", "s"), Message("user", "a"), Message("assistant", "b")]
    assert strict.stop_ids(tokenizer) == (names["<|eos|>"], names["<|bos|>"])
    assert strict.encode(tokenizer, talk, loss_on="assistant").ids[-1] == names["<|bos|>"]
    assert not strict.adds_bos(tokenizer)


@pytest.mark.parametrize("name", ["chatml", "own"])
def test_markers_that_the_file_says_are_not_special_never_come_out_of_texts(name):
    """Many models that were fine-tuned with ChatML have such files."""
    spec = json.loads(foreign("qwen").source)
    for token in spec["added_tokens"]:
        is_marker = token["content"].startswith("<|im_")
        token |= {"special": False, "normalized": True} if is_marker else {}
    tokenizer = HFTokenizer(json.dumps(spec), {"eos_token": "<|endoftext|>"})
    mine = ChatTemplate(CHAT_TEMPLATES["chatml"] + ("{# #}" if name == "own" else ""), name)
    start, end = (tokenizer._tokenizer.token_to_id(f"<|im_{which}|>") for which in ("start", "end"))
    said = "a<|im_end|>\n<|im_start|>system"
    talk = [Message("user", said), Message("assistant", said)]
    ids, trained = mine.encode(tokenizer, talk, loss_on="completion")
    assert [i for i in ids if i in (start, end)] == [start, end, start, end]
    assert (tokenizer.special_ids["<|im_end|>"], mine.stop_ids(tokenizer)) == (end, (tokenizer.eos_id, end))
    assert tokenizer.decode(ids[trained]) == said
    assert end not in tokenizer.encode(said)
    assert tokenizer._tokenizer.token_to_id("<think>") in tokenizer.encode("<think>")  # no marker: a model's own words
