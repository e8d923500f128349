"""Multiple choice against float64 numpy, one choice at a time."""

import numpy as np
import pytest

from jaxgpt.data.chat import Message
from jaxgpt.evaluation.config import TaskConfig
from jaxgpt.evaluation.multiple_choice import evaluate_multiple_choice
from tests.evaluation.conftest import MAX_SEQ_LENGTH, logprobs64

RECORDS = [
    {"prompt": "Ann sees", "choices": ["the red house", "Bob", "é"], "answer": 2},
    {"prompt": "Where is it? ", "choices": ["here", "the blue house"], "answer": "the blue house"},
    {"prompt": "Bob likes", "choices": ["Cid and Dora", "x"], "answer": 0},
    {"prompt": "Dora calls", "choices": ["漢", "x"], "answer": 0},
]


def run(model, mesh, path, **fields):
    task = TaskConfig(kind="multiple_choice", path=path, **fields)
    return evaluate_multiple_choice(task, "tasks.x", model, mesh=mesh, batch_size=4, seed=0)


def test_log_likelihoods_and_accuracies_are_those_of_float64(model, mesh, write):
    found = run(model, mesh, write("mc", *RECORDS))
    encode = model.tokenizer.encode
    right, right_per_byte = [], []
    for record, sample in zip(RECORDS, found.samples, strict=True):
        context = encode(record["prompt"].strip(), add_bos=True)
        answers = [encode(" " + choice) for choice in record["choices"]]
        expected = [logprobs64(model, np.concatenate([context, a]))[-len(a) :].sum() for a in answers]
        np.testing.assert_allclose(sample["logprobs"], expected, atol=2e-5)
        gold = record["choices"].index(record["answer"]) if isinstance(record["answer"], str) else record["answer"]
        right.append(int(np.argmax(expected)) == gold)
        per_byte = [e / len(c.encode()) for e, c in zip(expected, record["choices"], strict=True)]
        right_per_byte.append(int(np.argmax(per_byte)) == gold)
        assert sample["response"] == record["choices"][int(np.argmax(expected))]
    per_character = np.divide(expected, [len(choice) for choice in record["choices"]])
    assert np.argmax(per_character) != np.argmax(per_byte)
    assert right != right_per_byte  # the two differ here, so that neither can stand for the other
    assert [s["accuracy"] for s in found.samples] == right
    assert [s["accuracy_per_byte"] for s in found.samples] == right_per_byte
    assert found.metrics["accuracy"]["value"] == pytest.approx(np.mean(right))
    assert found.metrics["accuracy_per_byte"]["value"] == pytest.approx(np.mean(right_per_byte))
    assert found.metrics["accuracy"]["n"] == found.counts["records"] == 4
    assert found.counts["truncated"] == 0


def test_with_a_template_the_choice_is_the_assistants(chat_model, mesh, write):
    found = run(chat_model, mesh, write("mc", RECORDS[0]))
    tokenizer = chat_model.tokenizer
    prompt = chat_model.template.encode_prompt(tokenizer, [Message("user", "Ann sees")])
    answer = tokenizer.encode("Bob")
    expected = logprobs64(chat_model, np.concatenate([prompt, answer]))[-len(answer) :].sum()
    assert found.samples[0]["logprobs"][1] == pytest.approx(expected, abs=2e-5)


def test_a_long_prompt_loses_its_beginning_and_is_counted(model, mesh, write):
    record = {"prompt": "the house and " * 20 + "Bob likes", "choices": ["Cid", "Ann"], "answer": 0}
    found = run(model, mesh, write("mc", record))
    ids = model.tokenizer.encode(record["prompt"], add_bos=True)
    for choice, logprob in zip(record["choices"], found.samples[0]["logprobs"], strict=True):
        answer = model.tokenizer.encode(f" {choice}")
        kept = np.concatenate([ids[:1], ids[len(ids) + len(answer) - MAX_SEQ_LENGTH :], answer])
        assert len(kept) == MAX_SEQ_LENGTH + 1
        assert logprob == pytest.approx(logprobs64(model, kept)[-len(answer) :].sum(), abs=2e-5)
    assert found.counts["truncated"] == 1


def test_shots_change_what_is_scored(model, mesh, write):
    short = [{"prompt": f"{i}?", "choices": ["a", "b"], "answer": i % 2} for i in range(3)]
    path = write("mc", *short)
    plain = run(model, mesh, path)
    shown = run(model, mesh, path, num_shots=1, shots=path)
    other = {0: (1, 2), 1: (0, 2), 2: (0, 1)}
    for i, sample in enumerate(shown.samples):
        possible = []
        for j in other[i]:
            ids = model.tokenizer.encode(f"{j}? {'ab'[j % 2]}\n\n{i}?", add_bos=True)
            answer = model.tokenizer.encode(" a")
            possible.append(logprobs64(model, np.concatenate([ids, answer]))[-len(answer) :].sum())
        assert min(abs(sample["logprobs"][0] - p) for p in possible) < 2e-5
        assert abs(sample["logprobs"][0] - plain.samples[i]["logprobs"][0]) > 1e-4


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"choices": ["a", "b"], "answer": 0}, "no field 'prompt'"),
        ({"prompt": "x", "answer": 0}, "no field 'choices'"),
        ({"prompt": "x", "choice": ["a", "b"], "answer": 0}, "the nearest is 'choice'"),
        ({"prompt": "x", "choices": ["a", "b"]}, "no field 'answer'"),
        ({"prompt": "x", "choices": ["a"], "answer": 0}, r"choices must be at least two texts.*not \['a'\]"),
        ({"prompt": "x", "choices": ["a", ""], "answer": 0}, "none of them empty"),
        ({"prompt": "x", "choices": ["a", "b"], "answer": "c"}, r"'c' is neither one of the choices, \['a', 'b'\]"),
        ({"prompt": "x", "choices": ["a", "b"], "answer": 2}, "2 is neither.*nor the index of one, 0 to 1"),
        ({"prompt": "x", "choices": ["a", "b"], "answer": True}, "True is neither"),
        ({"prompt": "x", "choices": ["a", "the house " * 30], "answer": 0}, "leaves no room for a prompt"),
    ],
)
def test_a_bad_record_is_named_by_file_and_line(model, mesh, write, record, message):
    with pytest.raises(ValueError, match=rf"mc\.jsonl, line 2: .*{message}"):
        run(model, mesh, write("mc", RECORDS[0], record))
