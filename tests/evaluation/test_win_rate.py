"""Win-rates: what each judge says, and that the two models are treated alike."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxgpt.data.chat import Message
from jaxgpt.evaluation.config import TaskConfig
from jaxgpt.evaluation.generation import Answers
from jaxgpt.evaluation.prompts import read_examples, read_prompt
from jaxgpt.evaluation.reward_model import RewardScorer
from jaxgpt.evaluation.win_rate import evaluate_win_rate, function_judge, reward_judge
from jaxgpt.generate.samplers import SamplerConfig
from tests.evaluation.conftest import MAX_SEQ_LENGTH
from tests.models import reference

JUDGES = """
def longer(prompts, responses_a, responses_b, records):
    return [0.5 + 0.5 * ((len(a) > len(b)) - (len(a) < len(b))) for a, b in zip(responses_a, responses_b)]

def from_record(prompts, responses_a, responses_b, records):
    return [record["verdict"] for record in records]

def short(prompts, responses_a, responses_b, records):
    return [1.0]

def three(a, b, c):
    return []
"""
RECORDS = [{"prompt": f"{name} sees the house", "verdict": v} for name, v in (("Ann", 1), ("Bob", 0), ("Cid", 1.0))]


@pytest.fixture
def judges(tmp_path) -> str:
    path = tmp_path / "judges.py"
    path.write_text(JUDGES)
    return str(path)


@pytest.fixture(scope="module")
def other(model):
    """Another model of the same kind."""
    return dataclasses.replace(model, params=jax.tree.map(lambda p: p * 1.5 + 0.01, model.params))


def run(model, baseline, judge, mesh, path, **fields):
    task = TaskConfig(kind="win_rate", path=path, max_new_tokens=8, sampler=SamplerConfig(), **fields)
    return evaluate_win_rate(task, "tasks.x", model, baseline, judge, mesh=mesh, batch_size=2, seed=0)


def test_a_model_ties_with_itself(model, reward_model, mesh, write):
    judge = reward_judge(RewardScorer(reward_model, mesh, "judge"), 2)
    found = run(model, model, judge, mesh, write("prompts", *RECORDS))
    assert found.metrics["win_rate"]["value"] == found.metrics["length_controlled_win_rate"]["value"] == 0.5
    assert (found.counts["wins"], found.counts["ties"], found.counts["losses"]) == (0, 3, 0)
    assert all(sample["response"] == sample["baseline_response"] for sample in found.samples)


def test_changing_places_mirrors_the_verdict(model, other, reward_model, mesh, write):
    judge = reward_judge(RewardScorer(reward_model, mesh, "judge"), 2)
    path = write("prompts", *({"prompt": f"{a} {b}"} for a in ("Ann", "Bob", "Cid") for b in ("sees", "likes")))
    one, two = run(model, other, judge, mesh, path), run(other, model, judge, mesh, path)
    for a, b in zip(one.samples, two.samples, strict=True):
        assert (a["response"], a["reward"], a["win"]) == (b["baseline_response"], b["baseline_reward"], 1 - b["win"])
        assert a["win"] == 0.5 + 0.5 * np.sign(a["reward"] - a["baseline_reward"])
    for name in ("win_rate", "length_controlled_win_rate"):
        assert one.metrics[name]["value"] == pytest.approx(1 - two.metrics[name]["value"])
    assert one.counts["mean_length"] == np.mean([len(sample["response"]) for sample in one.samples])
    assert one.counts["mean_length"] == two.counts["baseline_mean_length"]


def test_rewards_are_those_of_float64(reward_model, mesh):
    prompts, responses = [[Message("user", "?")]] * 2, ["the red house", "x"]
    found = RewardScorer(reward_model, mesh, "judge").score(prompts, responses, ["a", "b"], 1, finished=[True] * 2)
    params = jax.device_get(reward_model.params)
    for prompt, response, reward in zip(prompts, responses, found, strict=True):
        ids = reward_model.template.encode(
            reward_model.tokenizer, [*prompt, Message("assistant", response)], loss_on="completion"
        ).ids[:-1]  # without the line break that the template writes after the end marker, where a rollout ends
        assert (len(ids) > MAX_SEQ_LENGTH) == (response != "x")
        ids = ids if len(ids) <= MAX_SEQ_LENGTH else np.concatenate([ids[:1], ids[-MAX_SEQ_LENGTH + 1 :]])
        values = reference.forward(params, ids, reward_model.config)[:, 0] + params["head"]["bias"]
        assert reward == pytest.approx(values[-1], abs=1e-5)


def test_a_function_judges(model, other, mesh, write, judges):
    path = write("prompts", *RECORDS)
    found = run(model, other, function_judge(f"{judges}:from_record"), mesh, path)
    assert found.metrics["win_rate"]["value"] == pytest.approx(2 / 3)
    assert [sample["win"] for sample in found.samples] == [1, 0, 1]
    longer = run(model, other, function_judge(f"{judges}:longer"), mesh, path)
    for s in longer.samples:
        difference = len(s["response"]) - len(s["baseline_response"])
        assert s["win"] == 0.5 + 0.5 * np.sign(difference)


def test_mistakes_of_a_judge_are_one_sentence(model, mesh, write, judges):
    path = write("prompts", {"prompt": "a", "verdict": 1}, {"prompt": "b", "verdict": 1.5})
    examples = read_examples(path, "tasks.x.path", read_prompt, {})
    texts = Answers(["x", "y"], [1, 1], [True, True], 0)
    with pytest.raises(
        ValueError, match=r"returned 1\.5 for the prompt of .*prompts\.jsonl, line 2; a verdict must be in"
    ):
        function_judge(f"{judges}:from_record")(examples, texts, texts)
    with pytest.raises(ValueError, match="The judge function .*short returned 1 values for 2 responses"):
        function_judge(f"{judges}:short")(examples, texts, texts)
    with pytest.raises(ValueError, match="The judge .*three cannot be called as function"):
        function_judge(f"{judges}:three")
    with pytest.raises(ValueError, match="The judge .* has no function 'longest'; the nearest is 'longer'"):
        function_judge(f"{judges}:longest")
    with pytest.raises(ValueError, match="judge='runs/gpt' is not a reward model"):
        RewardScorer(model, mesh, "judge='runs/gpt'")
