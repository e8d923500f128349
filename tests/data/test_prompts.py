"""Prompts for RL: what is read and how it is padded, what is dropped and said, and an order that any step can resume."""

import functools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgpt.data import chat
from jaxgpt.data.chat import ChatTemplate, Message
from jaxgpt.data.config import DataConfig, HoldoutConfig
from jaxgpt.data.prompts import prompt_indices, read_prompts
from jaxgpt.data.sentencepiece_tokenizer import TokenizerConfig, train_tokenizer
from jaxgpt.data.sources import is_held_out


@functools.cache
def tokenizer():
    """One token per character."""
    return train_tokenizer(["abcdefghijklmnopqrstuvwxyz 0123456789?.:QAHT\n"], TokenizerConfig("char", 1000))


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


DEFAULT = DataConfig()
ROLES = ChatTemplate.from_config("roles")
TALK = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "ab"},
    {"role": "assistant", "content": "cd"},
    {"role": "user", "content": "e"},
]


def spelled(ids):
    """The pieces of ids, in one text."""
    return "".join(tokenizer().piece(i) for i in ids).replace("\u2581", " ")


def test_texts_without_a_template_are_bos_and_text(tmp_path):
    rows = [{"prompt": "abc", "answer": 1}, {"prompt": "de f"}]
    path = write(tmp_path / "a.jsonl", rows)
    prompts = read_prompts([path], tokenizer(), None, DEFAULT, 5)
    assert [spelled(ids) for ids in prompts.ids] == ["<bos>abc", "<bos>de f"]
    assert prompts.texts == ("abc", "de f")
    assert prompts.records == tuple(rows)
    assert prompts.where == (f"{path}, line 1", f"{path}, line 2")
    assert prompts.notes == {}
    assert (prompts.tokenizer_digest, prompts.template_digest) == (tokenizer().digest, None)


def test_texts_and_messages_with_a_template_await_the_assistant(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"question": "ab"}, {"question": TALK}])
    config = DataConfig(fields={"prompt": "question"})
    prompts = read_prompts([path], tokenizer(), ROLES, config, 30)
    talk = "<|system|>s<|end|><|user|>ab<|end|><|assistant|>cd<|end|><|user|>e<|end|><|assistant|>"
    assert [spelled(ids) for ids in prompts.ids] == ["<bos><|user|>ab<|end|><|assistant|>", f"<bos>{talk}"]
    assert prompts.texts == ("ab", talk)
    assert prompts.template_digest == ROLES.digest


def test_a_prompt_put_together_from_fields_is_a_text_too(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"a": "x", "b": ["y"]}])
    prompts = read_prompts([path], tokenizer(), None, DataConfig(fields={"prompt": "{a} {b.0}"}), 9)
    assert (prompts.texts, spelled(prompts.ids[0])) == (("x y",), "<bos>x y")


def test_batches_are_padded_on_the_left_to_one_length(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "abc"}, {"prompt": "d"}, {"prompt": "abcde"}])
    prompts = read_prompts([path], tokenizer(), None, DEFAULT, 5)
    assert prompts.notes == {"dropped, too long": 1}
    assert len(prompts) == 2
    prompt_BP, mask_BP = prompts.batch(np.array([1, 0, 1]))
    assert [spelled(row) for row in prompt_BP] == ["<pad><pad><pad><bos>d", "<pad><bos>abc", "<pad><pad><pad><bos>d"]
    assert mask_BP.tolist() == [[0, 0, 0, 1, 1], [0, 1, 1, 1, 1], [0, 0, 0, 1, 1]]
    assert (prompt_BP.dtype, mask_BP.dtype) == (np.int32, np.float32)


def test_none_that_fits_is_said_with_both_numbers(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "abcdef"}, {"prompt": "abcd"}])
    with pytest.raises(ValueError, match=r"a.jsonl fits rollout.max_prompt_length=4: the shortest has 5 tokens\."):
        read_prompts([path], tokenizer(), None, DEFAULT, 4)
    with pytest.raises(ValueError, match="rollout.max_prompt_length must be at least 1, not 0"):
        read_prompts([path], tokenizer(), None, DEFAULT, 0)


BAD = [
    ({"prompt": TALK}, None, "line 2: a prompt that is a list of messages needs a chat template"),
    ({"prompt": " "}, ROLES, "line 2: the prompt is empty"),
    ({"prompt": TALK[:3]}, ROLES, "line 2: the prompt must end with a user or a tool message, not one of role 'assist"),
    ({"promt": "a"}, ROLES, "line 2: no field 'prompt' .there are: promt.; the nearest is 'promt'"),
    ({"prompt": [{"role": "tool", "content": "a"}]}, ChatTemplate("{{ raise_exception('no') }}", "t"), "line 2: .* no"),
]


@pytest.mark.parametrize(("record", "template", "message"), BAD)
def test_a_bad_record_names_file_and_line(tmp_path, record, template, message):
    path = str(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").write_text("\n" + json.dumps(record) + "\n")
    with pytest.raises(ValueError, match=f"a.jsonl, {message}"):
        read_prompts([path], tokenizer(), template, DEFAULT, 99)


def test_the_fingerprint_is_of_what_is_asked_not_of_where_it_lies(tmp_path):
    def fingerprint(name, rows, template=None):
        return read_prompts([write(tmp_path / name, rows)], tokenizer(), template, DEFAULT, 20).fingerprint

    rows = [{"prompt": "ab", "answer": 1}, {"prompt": "cd", "answer": 2}]
    assert fingerprint("a.jsonl", rows) == fingerprint("b.jsonl", rows)
    others = [
        fingerprint("c.jsonl", rows[::-1]),
        fingerprint("d.jsonl", rows[:1]),
        fingerprint("e.jsonl", [rows[0], rows[1] | {"answer": 3}]),
        fingerprint("f.jsonl", rows, ROLES),
    ]
    assert len({fingerprint("a.jsonl", rows), *others}) == 5


def test_the_held_out_side_is_that_of_other_stages(tmp_path):
    config = DataConfig(holdout=HoldoutConfig("hash", 0.5))
    texts = [f"q{i}" for i in range(40)]
    path = write(tmp_path / "a.jsonl", [{"prompt": text} for text in texts])
    held = [text for text in texts if is_held_out(chat.hashable_prompt([Message("user", text)]), 0.5)]
    assert 5 < len(held) < 35
    assert list(read_prompts([path], tokenizer(), None, config, 9, "held_out").texts) == held
    others = [text for text in texts if text not in held]
    assert list(read_prompts([path], tokenizer(), None, config, 9, "train").texts) == others
    only_train = write(tmp_path / "b.jsonl", [{"prompt": "q"}])
    with pytest.raises(ValueError, match=r"b.jsonl is on the held-out side; data.holdout.fraction=0\.01"):
        read_prompts([only_train], tokenizer(), None, DEFAULT, 9, "held_out")


@given(st.integers(1, 13), st.integers(1, 17), st.integers(-3, 3))
@settings(deadline=None, max_examples=60)
def test_every_epoch_visits_every_prompt_once_across_batches(num_prompts, batch_size, seed):
    epochs = 4
    steps = -(-epochs * num_prompts // batch_size)
    batches = [prompt_indices(step, batch_size, num_prompts, seed) for step in range(steps)]
    assert {len(batch) for batch in batches} == {batch_size}
    order = np.concatenate(batches)[: epochs * num_prompts].reshape(epochs, num_prompts)
    assert np.array_equal(np.sort(order), np.tile(np.arange(num_prompts), (epochs, 1)))


def test_the_order_depends_on_the_step_and_the_seed_alone():
    later = prompt_indices(1000, 32, 500, 7)
    ahead = [prompt_indices(step, 32, 500, 7) for step in range(1001)]
    assert np.array_equal(ahead[-1], later)
    assert not np.array_equal(prompt_indices(1000, 32, 500, 8), later)
    # The same places in the order, whatever the batch size; and no epoch is another's order.
    assert np.array_equal(prompt_indices(500, 64, 500, 7)[:32], later)
    epochs = np.concatenate(ahead)[:2000].reshape(4, 500)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert not any(np.array_equal(epoch, np.arange(500)) for epoch in epochs)


def test_a_change_made_to_indices_does_not_reach_the_next_call():
    first = prompt_indices(0, 4, 4, 0)
    wanted = first.tolist()
    first[:] = 0
    assert prompt_indices(0, 4, 4, 0).tolist() == wanted


@pytest.mark.parametrize("arguments", [(-1, 4, 4), (0, 0, 4), (0, 4, 0)])
def test_impossible_orders_are_refused(arguments):
    with pytest.raises(ValueError, match="rollout.batch_size >= 1 and at least one prompt"):
        prompt_indices(*arguments, seed=0)
