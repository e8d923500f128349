"""A reward is read at the same token in training, in scoring and in RL: where the response ends."""

import jax
import numpy as np
import pytest

from jaxgpt import partition
from jaxgpt.data.batches import eval_batches
from jaxgpt.data.chat import CHAT_TEMPLATES, ChatTemplate, Message
from jaxgpt.data.config import DataConfig
from jaxgpt.data.preference import tokenize_preferences
from jaxgpt.evaluation import scoring
from jaxgpt.evaluation.reward_model import RewardScorer
from jaxgpt.models import decoder
from jaxgpt.models.config import ModelConfig
from jaxgpt.partition import MeshConfig
from jaxgpt.rl.models import RewardModel, reward_scores
from jaxgpt.rl.rollout import Rollout
from jaxgpt.runs.load import LoadedModel
from jaxgpt.types import PairBatch
from tests.data.test_conversations import tokenizer, write

# After what ends a turn, published templates write a line break (Qwen's, Gemma's), nothing (Llama's), a space, or a text.
TEMPLATES = CHAT_TEMPLATES | {
    "two line breaks": "{% for m in messages %}<|im_start|>{{ m.role + ' ' + m.content }}<|im_end|>{{ '\n\n' }}"
    "{% endfor %}{{ '<|im_start|>assistant ' if add_generation_prompt }}",
    "text after the end": "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token + ' over. ' }}{% endfor %}"
    "{{ 'assistant: ' if add_generation_prompt }}",
    "two ends": "{% for m in messages %}{{ m.role + ': ' + m.content + '<|im_end|>' + eos_token + '\n' }}{% endfor %}"
    "{{ 'assistant: ' if add_generation_prompt }}",
    "EOS first": "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token + '<|im_end|>' }}{% endfor %}"
    "{{ 'assistant: ' if add_generation_prompt }}",
    "no end": "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{{ 'assistant: ' if add_generation_prompt }}",
}
PAIRS = [
    {"prompt": "why?", "chosen": "so", "rejected": "no idea at all"},
    {"prompt": "why is the sky blue?", "chosen": "ask a", "rejected": "b"},
]
SIZE, PROMPT, RESPONSE = 64, 48, 24


def ends(name):
    """What ends a response."""
    by_eos = ("plain", "text after the end", "no end", "EOS first")
    return ["<|end|>", "<eos>"] if name == "two ends" else ["<eos>" if name in by_eos else "<|end|>"]


def said(name, response):
    """The ids that a model writes for a response: its text and what ends it."""
    text = {"plain": " " + response, "no end": response + "\n"}.get(name, response)
    return [*tokenizer().encode(text), *(tokenizer().special_ids[end] for end in ends(name))]


def rows(tmp_path, template, records=PAIRS, **options):
    path = write(tmp_path / "pairs.jsonl", records)
    config = DataConfig(sequence_length=SIZE, **options)
    return tokenize_preferences([path], tokenizer(), template, config, "drop", "all", str(tmp_path / "cache"))


def rollout_of(template, prompts, responses) -> Rollout:
    """What `roll_out` makes where the model says just these ids: prompts padded on the left, responses on the right."""
    tokens = np.zeros((len(prompts), PROMPT + RESPONSE), np.int32)
    segments = np.zeros_like(tokens)
    for row, (prompt, ids) in enumerate(zip(prompts, responses, strict=True)):
        before = template.encode_prompt(tokenizer(), [Message("user", prompt)])
        tokens[row, PROMPT - len(before) : PROMPT + len(ids)] = [*before, *ids]
        segments[row, PROMPT - len(before) : PROMPT + len(ids)] = 1
    positions = np.maximum(np.cumsum(segments, axis=1) - 1, 0)
    response_mask = segments[:, PROMPT:].astype(np.float32)
    return Rollout(tokens, segments, positions, response_mask, response_mask, np.ones(len(prompts), bool))


@pytest.fixture(scope="module")
def model():
    mesh = partition.make_mesh(MeshConfig(), devices=jax.devices()[:1])
    config = ModelConfig(
        vocab_size=tokenizer().vocab_size, num_layers=1, embed_dim=16, num_heads=2, mlp_dim=32, max_seq_length=128,
        remat="none", init="fan_in", head="scalar",
    )  # fmt: skip
    params = jax.jit(lambda: partition.unbox(decoder.init_params(config, jax.random.key(0))))()
    return LoadedModel(config, jax.device_put(params, partition.replicated(mesh)), tokenizer(), None), mesh


@pytest.mark.parametrize("name", TEMPLATES)
def test_training_scoring_and_rl_read_the_same_ids_and_so_the_same_reward(tmp_path, model, name):
    loaded, mesh = model
    template = ChatTemplate(TEMPLATES[name], name)
    prompts = [record["prompt"] for record in PAIRS for _ in range(2)]
    responses = [record[key] for record in PAIRS for key in ("chosen", "rejected")]
    rollout = rollout_of(template, prompts, [said(name, response) for response in responses])
    plan = rows(tmp_path, template)
    (batch,) = eval_batches(plan, batch_size=2, rows=slice(0, 2), batch_type=PairBatch)
    live = lambda tokens, segments: [t[s != 0].tolist() for t, s in zip(tokens, segments, strict=True)]
    flat = lambda a: a.reshape(-1, a.shape[-1])
    assert live(flat(batch.tokens_BCT), flat(batch.segments_BCT)) == live(rollout.tokens_BS, rollout.segments_BS)

    judge = RewardScorer(LoadedModel(loaded.config, loaded.params, loaded.tokenizer, template), mesh, "judge")
    in_training = scoring.score_pairs(judge.scorer, plan, 2)
    in_training = np.stack([in_training.chosen_N, in_training.rejected_N], axis=1).ravel()
    in_scoring = judge.score([[Message("user", p)] for p in prompts], responses, [""] * 4, 4, finished=[True] * 4)
    reward = RewardModel(None, {}, loaded.config, shift=0.5, shares_base=False)
    in_rl = np.asarray(reward_scores(reward, {"reward": loaded.params}, rollout)) + 0.5
    np.testing.assert_allclose(in_training, in_rl, atol=1e-5)
    np.testing.assert_allclose(in_scoring, in_rl, atol=1e-5)
    assert np.ptp(in_rl) > 0.05


def test_a_response_that_the_limit_cuts_off_is_read_at_its_last_token(tmp_path, model):
    """In a row that is cut at its end as in a rollout of so many tokens: there is no end marker to read."""
    loaded, mesh = model
    template = ChatTemplate.from_config("chatml")
    prompt = template.encode_prompt(tokenizer(), [Message("user", "why?")])
    path = write(
        tmp_path / "pairs.jsonl", [{"prompt": "why?", "chosen": "because of it", "rejected": "perhaps not so"}]
    )
    config = DataConfig(sequence_length=len(prompt) + 5)
    plan = tokenize_preferences([path], tokenizer(), template, config, "truncate_right", "all", str(tmp_path / "cache"))
    cut = [tokenizer().encode(text)[:5] for text in ("because of it", "perhaps not so")]
    rollout = rollout_of(template, ["why?"] * 2, cut)
    scored = scoring.score_pairs(scoring.make_scorer(loaded.config, loaded.params, mesh), plan, 1)
    reward = RewardModel(None, {}, loaded.config, shift=0.0, shares_base=False)
    in_rl = np.asarray(reward_scores(reward, {"reward": loaded.params}, rollout))
    np.testing.assert_allclose([*scored.chosen_N, *scored.rejected_N], in_rl, atol=1e-5)


@pytest.mark.parametrize("name", TEMPLATES)
def test_an_answer_that_a_limit_cut_off_is_judged_as_in_rl(model, name):
    """There is neither an end marker nor anything else after it that the template writes."""
    loaded, mesh = model
    template = ChatTemplate(TEMPLATES[name], name)
    responses = ["because of", "perhaps"]
    written = [tokenizer().encode(" " + text if name == "plain" else text) for text in responses]
    rollout = rollout_of(template, ["why?"] * 2, written)
    reward = RewardModel(None, {}, loaded.config, shift=0.0, shares_base=False)
    in_rl = np.asarray(reward_scores(reward, {"reward": loaded.params}, rollout))
    judge = RewardScorer(LoadedModel(loaded.config, loaded.params, loaded.tokenizer, template), mesh, "judge")
    prompts = [[Message("user", "why?")]] * 2
    found = judge.score(prompts, responses, [""] * 2, 2, finished=[False] * 2)
    np.testing.assert_allclose(found, in_rl, atol=1e-5)
    assert np.abs(found - judge.score(prompts, responses, [""] * 2, 2, finished=[True] * 2)).min() > 1e-4


def test_a_reward_is_read_at_a_turns_own_end_where_it_is_another_than_usual():
    source = (
        "{% for m in messages %}{{ m.role + ': ' + m.content }}"
        "{{ '<|im_start|>' if loop.last and m.role == 'assistant' and loop.index > 2 else '<|im_end|>' }}{% endfor %}"
        "{{ 'assistant: ' if add_generation_prompt }}"
    )
    talk = [Message(role, "a") for role in ("user", "assistant", "user", "assistant")]
    ids = ChatTemplate(source, "odd").encode_scored(tokenizer(), talk).ids
    assert ids[-1] not in ChatTemplate(source, "odd").stop_ids(tokenizer())
    assert tokenizer().decode(ids).endswith("assistant: a")
    assert ids[-1] == ChatTemplate(source, "odd").encode(tokenizer(), talk, loss_on="all").ids[-1]
