"""Answers and their scores: the verifiers see what the model wrote, up to where it was to stop."""

import pytest

from jaxgpt.evaluation.config import TaskConfig
from jaxgpt.evaluation.generation import evaluate_generation
from jaxgpt.generate.samplers import SamplerConfig
from jaxgpt.generate.text import generate_texts, stop_ids
from jaxgpt.rewards.functions import RewardSource

PROMPTS = ["Ann sees", "Where", "Bob and Cid"]
NEW = 8


def run(model, mesh, path, **fields):
    task = TaskConfig(kind="generation", path=path, **{"max_new_tokens": NEW} | fields)
    return evaluate_generation(task, "tasks.x", model, mesh=mesh, batch_size=2, seed=0)


@pytest.fixture(scope="module")
def written(model, mesh) -> list[str]:
    """What the model greedily writes after each prompt."""
    rows = generate_texts(
        model.config, model.params, model.tokenizer, PROMPTS, sampler=SamplerConfig(temperature=0.0), max_new=NEW, seed=0,
        batch_size=3, eos_ids=stop_ids(model.tokenizer), mesh=mesh,
    )  # fmt: skip
    return [row["response"] for row in rows]


def test_scores_are_the_verifiers_of_the_greedy_answers(model, mesh, write, written):
    answers = [written[0], "nothing of the kind", ["no", written[2]]]
    path = write("gen", *({"prompt": p, "answer": a} for p, a in zip(PROMPTS, answers, strict=True)))
    metrics = {"em": RewardSource("exact_match"), "f1": RewardSource("token_f1")}
    found = run(model, mesh, path, metrics=metrics)
    assert [s["response"] for s in found.samples] == written
    assert [s["em"] for s in found.samples] == [1, 0, 1]
    assert found.metrics["em"]["value"] == pytest.approx(2 / 3)
    assert found.metrics["em"]["n"] == found.metrics["f1"]["n"] == 3
    assert found.counts["truncated"] == 0


def test_an_answer_ends_before_the_first_stop(model, mesh, write, written):
    text = max(written, key=len)
    piece, longer = text[3], text[2:5]
    path = write("gen", {"prompt": PROMPTS[written.index(text)], "answer": "x"})
    for stop in (piece, longer):
        assert run(model, mesh, path, stop=(stop,)).samples[0]["response"] == text[: text.index(stop)]
    both = run(model, mesh, path, stop=(longer, piece)).samples[0]["response"]
    assert both == text[: min(text.index(piece), text.index(longer))]


def test_mapped_answers_reach_the_verifiers(model, mesh, write):
    path = write("gen", {"question": "1+1", "solution": "so it is #### 2"})
    metrics = {"number": RewardSource("numeric_answer")}
    fields = {"prompt": "question", "answer": "solution"}
    found = run(model, mesh, path, metrics=metrics, fields=fields)
    assert found.samples[0]["answer"] == "so it is #### 2"
    wrong = write("wrong", {"question": "1+1", "solution": "two"})
    with pytest.raises(ValueError, match=r"wrong\.jsonl, line 1: .*'two' does not end in a plain number"):
        run(model, mesh, wrong, metrics=metrics, fields=fields)


def test_shots_and_long_prompts(model, mesh, write):
    path = write("gen", *({"prompt": f"{i}?", "answer": i} for i in range(4)))
    found = run(model, mesh, path, shots=path, num_shots=3)
    assert found.counts["truncated"] == 4  # 24 - 8 tokens have no room for them
    assert all("\n\n" not in sample["response"] for sample in found.samples)
    with pytest.raises(ValueError, match=r"tasks\.x\.max_new_tokens=24 leaves no room .* model\.max_seq_length=24"):
        run(model, mesh, path, max_new_tokens=24)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "x"}, "no field 'answer'"),
        ({"answer": "x"}, "no field 'prompt'"),
        ({"prompt": "x", "answer": []}, "the field 'answer' is an empty list"),
        ({"prompt": "x", "answer": {"a": 1}}, "must be a text, a number or a list of them"),
    ],
)
def test_a_bad_record_is_named_by_file_and_line(model, mesh, write, record, message):
    with pytest.raises(ValueError, match=r"gen\.jsonl, line 2") as error:
        run(model, mesh, write("gen", {"prompt": "a", "answer": "b"}, record))
    assert message in str(error.value)
