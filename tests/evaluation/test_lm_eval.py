"""The harness on a task of our own: the same log-likelihoods, perplexities and answers as without it."""

import json
import math

import jax
import numpy as np
import pytest

pytest.importorskip("lm_eval")

from jaxgpt.data.chat import Message
from jaxgpt.evaluation import lm_eval as adapter
from jaxgpt.evaluation.config import TaskConfig
from jaxgpt.evaluation.generation import evaluate_generation
from jaxgpt.evaluation.multiple_choice import evaluate_multiple_choice
from jaxgpt.evaluation.perplexity import evaluate_perplexity
from jaxgpt.rewards.functions import RewardSource
from tests.evaluation.conftest import TEXT, logprobs64
from tests.models import reference

QUIZ = [
    {"prompt": "Ann sees", "choices": ["the red house", "Bob"], "answer": 0},
    {"prompt": "Bob likes", "choices": ["x", "Cid and Dora"], "answer": 1},
    {"prompt": "Where is", "choices": ["here", "the blue house"], "answer": 1},
]


class Request:
    def __init__(self, *args):
        self.args = args


@pytest.fixture
def lm(monkeypatch, mesh, model, chat_model):
    """(template or not) -> the adapter around a model in memory."""

    def make(with_template: bool = False):
        monkeypatch.setattr(adapter.partition, "make_mesh", lambda config: mesh)
        monkeypatch.setattr(adapter, "load_model", lambda workdir, mesh: chat_model if with_template else model)
        return adapter.JaxgptLM("runs/gpt", batch_size="auto", device="cuda:0", max_batch_size=None)

    return make


def test_requests_are_answered_as_the_interface_says(lm, model):
    encode = model.tokenizer.encode
    context, continuation = encode("Ann sees", add_bos=True), encode(" the house")
    expected = logprobs64(model, np.concatenate([context, continuation]))[-len(continuation) :].sum()
    whole = logprobs64(model, encode(" the house", add_bos=True)).sum()
    long = "Where is the house? " * 10 + "Ann sees"
    pairs = (("Ann sees", " the house"), ("Ann sees ", "the house"), ("", " the house"), (long, " x"))
    found = lm().loglikelihood([Request(*pair) for pair in pairs])
    np.testing.assert_allclose([logprob for logprob, _ in found[:3]], [expected, expected, whole], atol=2e-5)
    assert all(math.isfinite(logprob) and isinstance(greedy, bool) for logprob, greedy in found)
    options = {"until": ["\n\n"], "max_gen_toks": 6, "do_sample": False}
    (text,) = lm().generate_until([Request("Ann sees", options)])
    # A context after which the most probable token is one that a text can be of.
    for words in (TEXT[:stop] for stop in range(3, 40)):
        best = int(
            reference.forward(jax.device_get(model.params), encode(words, add_bos=True), model.config)[-1].argmax()
        )
        piece = model.tokenizer.decode([best])
        if not words.endswith(" ") and encode(piece).tolist() == [best]:
            break
    else:
        pytest.fail("there is none")
    one_token = lm().loglikelihood([Request(words, piece), Request(words, "?" if piece != "?" else "B")])
    assert [is_greedy for _, is_greedy in one_token] == [True, False]
    sampled = {"until": "a", "max_gen_toks": 6, "temperature": 0.7, "top_p": 0.9}
    texts = lm().generate_until([Request("Bob", sampled), Request("Ann sees", options), Request("Cid", sampled)])
    assert texts[1] == text
    assert "a" not in texts[0] + texts[2]


def test_without_bos_every_token_is_scored_after_eos(monkeypatch, mesh, model_without_bos):
    model = model_without_bos
    monkeypatch.setattr(adapter.partition, "make_mesh", lambda config: mesh)
    monkeypatch.setattr(adapter, "load_model", lambda workdir, mesh: model)
    lm = adapter.JaxgptLM("runs/gpt", batch_size=2)
    text = "Bob and Ann"
    expected = logprobs64(model, [model.tokenizer.eos_id, *model.tokenizer.encode(text)]).sum()
    assert lm.loglikelihood_rolling([Request(text)])[0] == pytest.approx(expected, abs=2e-5)
    assert lm.loglikelihood([Request("", text)])[0][0] == pytest.approx(expected, abs=2e-5)


def test_a_chat_goes_through_the_template(lm, chat_model):
    lm = lm(with_template=True)
    history = [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "?"},
    ]
    context = lm.apply_chat_template(history)
    prompt = chat_model.template.encode_prompt(chat_model.tokenizer, [Message(**turn) for turn in history])
    answer = chat_model.tokenizer.encode("4")
    ids = np.concatenate([prompt, answer])
    assert len(ids) > 25
    ids = np.concatenate([ids[:1], ids[-24:]])
    assert lm.loglikelihood([Request(context, "4")])[0][0] == pytest.approx(logprobs64(chat_model, ids)[-1], abs=2e-5)
    assert lm.chat_template() == chat_model.template.source
    with pytest.raises(ValueError, match="gen_prefix"):
        lm.apply_chat_template(history, add_generation_prompt=False)


def test_the_harness_finds_the_numbers_that_we_do(lm, model, mesh, write):
    import lm_eval
    from lm_eval.tasks import TaskManager

    quiz, texts = write("quiz", *QUIZ), write("texts", {"text": TEXT}, {"text": "Bob."})
    local = lambda path: {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": path}},
        "test_split": "test",
    }
    metric = lambda name: {"metric": name, "aggregation": "mean", "higher_is_better": True}
    answer = lm().generate_until([Request("Ann sees", {"until": ["\n"], "max_gen_toks": 6})])[0]
    words = write("words", {"prompt": "Ann sees", "answer": answer}, {"prompt": "Bob", "answer": "nothing at all"})
    tasks = [
        {"task": "quiz", **local(quiz), "output_type": "multiple_choice", "doc_to_text": "{{prompt}}",
         "doc_to_choice": "{{choices}}", "doc_to_target": "answer", "metric_list": [metric("acc"), metric("acc_bytes")]},
        {"task": "texts", **local(texts), "output_type": "loglikelihood_rolling", "doc_to_text": "",
         "doc_to_target": "{{text}}", "metric_list": [{"metric": "bits_per_byte"}]},
        {"task": "words", **local(words), "output_type": "generate_until", "doc_to_text": "{{prompt}}",
         "doc_to_target": "{{answer}}", "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6, "do_sample": False},
         "metric_list": [metric("exact_match")]},
    ]  # fmt: skip
    found = lm_eval.simple_evaluate(model=lm(), tasks=tasks, task_manager=TaskManager(include_defaults=False))[
        "results"
    ]
    ours = evaluate_multiple_choice(
        TaskConfig(kind="multiple_choice", path=quiz), "tasks.x", model, mesh=mesh, batch_size=4, seed=0
    ).metrics
    assert found["quiz"]["acc,none"] == pytest.approx(ours["accuracy"]["value"])
    assert found["quiz"]["acc_bytes,none"] == pytest.approx(ours["accuracy_per_byte"]["value"])
    assert found["quiz"]["acc_stderr,none"] == pytest.approx(ours["accuracy"]["stderr"])
    ours = evaluate_perplexity(
        TaskConfig(kind="perplexity", path=texts, stride=24), "tasks.x", model, mesh=mesh, batch_size=4
    ).metrics
    assert found["texts"]["bits_per_byte,none"] == pytest.approx(ours["bits_per_byte"]["value"], rel=1e-6)
    task = TaskConfig(
        kind="generation", path=words, stop=("\n",), max_new_tokens=6, metrics={"em": RewardSource("exact_match")}
    )
    ours = evaluate_generation(task, "tasks.x", model, mesh=mesh, batch_size=4, seed=0).metrics
    assert found["words"]["exact_match,none"] == pytest.approx(ours["em"]["value"]) == 0.5
    json.dumps(found, default=str)
