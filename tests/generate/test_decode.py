"""Cached generation against repeated full forward passes, and what ends a row."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import partition
from jaxgpt.generate import decode
from jaxgpt.generate.samplers import SamplerConfig
from jaxgpt.models import decoder
from tests.generate.reference import CFG, greedy_reference, logits_after, params

GREEDY = SamplerConfig(temperature=0)
STATIC = ("max_new", "sampler", "eos_ids", "pad_id")
generate = jax.jit(decode.generate, static_argnums=0, static_argnames=STATIC)
PROMPTS = [[3, 9, 1, 4, 4], [7], [2, 16, 5]]
MAX_NEW = 6


def pad(prompts, left=True, length=5):
    tokens, mask = np.full((len(prompts), length), 11, np.int32), np.zeros((len(prompts), length), np.float32)
    for row, prompt in enumerate(prompts):
        where = slice(length - len(prompt), None) if left else slice(len(prompt))
        tokens[row, where], mask[row, where] = prompt, 1
    return tokens, mask


def log_softmax(z):
    return z - z.max() - np.log(np.sum(np.exp(z - z.max())))


def sample(*batch):
    return generate(CFG, params(), *batch, max_new=MAX_NEW, sampler=SamplerConfig(), eos_ids=())


def responses(out):
    return [row[:n].tolist() for row, n in zip(np.asarray(out.tokens_BR), np.asarray(out.lengths_B), strict=True)]


@pytest.mark.parametrize("left", [True, False])
def test_greedy_is_the_argmax_of_repeated_full_forwards_for_ragged_prompts(left):
    out = generate(CFG, params(), *pad(PROMPTS, left), jax.random.key(0), max_new=MAX_NEW, sampler=GREEDY, eos_ids=())
    assert responses(out) == [greedy_reference(p, MAX_NEW) for p in PROMPTS]
    np.testing.assert_array_equal(out.logprobs_BR, np.zeros((3, MAX_NEW)))
    assert not np.asarray(out.has_eos_B).any()


def test_greedy_is_the_argmax_with_learned_positions_and_local_windows():
    cfg = dataclasses.replace(CFG, position="learned", sliding_window=3, window_pattern=("local", "global"))
    out = generate(cfg, params(cfg), *pad(PROMPTS), jax.random.key(0), max_new=MAX_NEW, sampler=GREEDY, eos_ids=())
    assert responses(out) == [greedy_reference(p, MAX_NEW, cfg=cfg) for p in PROMPTS]


def test_repetition_penalty_counts_the_prompt_and_what_was_generated():
    sampler = SamplerConfig(temperature=0, repetition_penalty=3.0)
    out = generate(CFG, params(), *pad(PROMPTS), jax.random.key(0), max_new=MAX_NEW, sampler=sampler, eos_ids=())
    expected = [greedy_reference(p, MAX_NEW, penalty=3.0) for p in PROMPTS]
    assert responses(out) == expected
    assert expected != [greedy_reference(p, MAX_NEW) for p in PROMPTS]


def test_log_probs_are_those_of_the_full_forward():
    out = sample(*pad(PROMPTS), jax.random.key(5))
    for row, response in enumerate(responses(out)):
        for t, token in enumerate(response):
            expected = log_softmax(logits_after(PROMPTS[row] + response[:t]))[token]
            np.testing.assert_allclose(out.logprobs_BR[row, t], expected, atol=2e-5)


def test_samples_repeat_with_the_seed_and_differ_without():
    first, again, other = (sample(*pad(PROMPTS), jax.random.key(seed)) for seed in (5, 5, 6))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert (np.asarray(first.tokens_BR) != np.asarray(other.tokens_BR)).mean() > 0.5


def test_a_row_samples_the_same_alone_in_a_batch_and_under_other_padding():
    batch = sample(*pad(PROMPTS), jax.random.key(5))
    key_B = jax.vmap(lambda row: jax.random.fold_in(jax.random.key(5), row))(jnp.arange(3))
    for row in (0, 2):
        alone = sample(*pad(PROMPTS[row : row + 1], length=9), key_B[row : row + 1])
        assert responses(alone)[0] == responses(batch)[row]
        np.testing.assert_allclose(alone.logprobs_BR[0], batch.logprobs_BR[row], atol=2e-5)


def test_equal_prompts_of_one_batch_are_sampled_apart_and_steps_too():
    uniform = jax.tree.map(jnp.zeros_like, params())
    out = generate(
        CFG, uniform, *pad([[1, 2]] * 3), jax.random.key(0), max_new=MAX_NEW, sampler=SamplerConfig(), eos_ids=()
    )
    rows = np.asarray(out.tokens_BR).tolist()
    assert len({tuple(row) for row in rows}) == 3
    assert all(len(set(row)) > 2 for row in rows)
    np.testing.assert_allclose(out.logprobs_BR, np.full((3, MAX_NEW), -np.log(17)), rtol=1e-6)


@functools.cache
def ended():
    """EOS ids and a greedy run with them: two end rows early, the third is in a prompt; the pad id is an EOS, too."""
    free = [greedy_reference(p, MAX_NEW) for p in PROMPTS]
    in_prompt = next(token for token in PROMPTS[2] if token not in free[2])
    eos = (free[0][1], free[1][2], in_prompt)
    run = functools.partial(generate, max_new=MAX_NEW, sampler=GREEDY, eos_ids=eos, pad_id=eos[0])
    return eos, run(CFG, params(), *pad(PROMPTS), jax.random.key(0))


def test_each_eos_id_ends_a_row_with_the_eos_in_the_mask_even_where_pad_is_eos():
    eos, out = ended()
    expected = [greedy_reference(p, MAX_NEW, eos) for p in PROMPTS]
    assert [response[-1] for response in expected[:2]] == list(eos[:2])
    assert max(map(len, expected[:2])) < MAX_NEW
    assert responses(out) == expected
    for row, response in enumerate(expected):
        n, rest = len(response), MAX_NEW - len(response)
        assert out.mask_BR[row].tolist() == [1.0] * n + [0.0] * rest
        assert out.tokens_BR[row, n:].tolist() == [eos[0]] * rest
        assert out.logprobs_BR[row, n:].tolist() == [0.0] * rest
        assert bool(out.has_eos_B[row]) == (response[-1] in eos)


def test_an_eos_in_the_prompt_does_not_stop():
    eos, out = ended()
    assert eos[2] in PROMPTS[2]
    assert out.lengths_B[2] == len(greedy_reference(PROMPTS[2], MAX_NEW, eos)) > 1


def test_the_loop_stops_when_all_rows_have_ended(monkeypatch):
    calls, uncounted = [], decoder.decode

    def counted(cfg, params, tokens_BT, *rest):
        jax.debug.callback(lambda: calls.append(tokens_BT.shape[1]))
        return uncounted(cfg, params, tokens_BT, *rest)

    monkeypatch.setattr(decoder, "decode", counted)
    ends = tuple(greedy_reference(p, 4)[t] for p, t in zip(PROMPTS, (3, 2, 2), strict=True))
    steps = max(len(greedy_reference(p, 20, ends)) for p in PROMPTS)
    run = functools.partial(decode.generate, CFG, max_new=20, sampler=GREEDY, eos_ids=ends)
    jax.block_until_ready(jax.jit(run)(params(), *pad(PROMPTS), jax.random.key(0)))
    jax.effects_barrier()
    assert 1 < steps < 5
    assert calls == [5] + [1] * (steps - 1)  # the prefill gives the first token, and the last needs no pass of its own


def test_one_new_token_is_the_prefills():
    out = generate(CFG, params(), *pad(PROMPTS), jax.random.key(0), max_new=1, sampler=GREEDY, eos_ids=())
    assert responses(out) == [greedy_reference(p, 1) for p in PROMPTS]


def test_a_row_without_a_prompt_generates_nothing_and_disturbs_nobody():
    batch = pad([PROMPTS[0], [], PROMPTS[2]])
    out = generate(CFG, params(), *batch, jax.random.key(0), max_new=MAX_NEW, sampler=GREEDY, eos_ids=())
    assert responses(out) == [greedy_reference(PROMPTS[0], MAX_NEW), [], greedy_reference(PROMPTS[2], MAX_NEW)]
    assert not np.asarray(out.has_eos_B).any()


def test_sharded_over_devices_the_same_tokens_come_out():
    mesh = partition.make_mesh(partition.MeshConfig(data=4, fsdp=2))
    batch = jax.device_put(pad([*PROMPTS, *PROMPTS, *PROMPTS[:2]]), partition.batch_sharding(mesh))
    sharded = sample(*batch, jax.device_put(jax.random.key(1), partition.replicated(mesh)))
    single = sample(*pad(PROMPTS), jax.random.key(1))
    assert responses(sharded)[:3] == responses(single)
    np.testing.assert_allclose(sharded.logprobs_BR[:3], single.logprobs_BR, atol=2e-5)


def test_next_token_probabilities_are_the_softmax_of_the_full_forward():
    view = jax.jit(functools.partial(decode.next_token_probabilities, CFG, top=4))
    ids_BK, probs_BK = view(params(), *pad(PROMPTS))
    for row, prompt in enumerate(PROMPTS):
        probs = np.exp(log_softmax(logits_after(prompt)))
        best = np.argsort(-probs)[:4]
        assert ids_BK[row].tolist() == best.tolist()
        np.testing.assert_allclose(probs_BK[row], probs[best], rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "max_new", "message"),
    [
        ({"position": "learned"}, 28, "5 tokens .* 28 new ones are 33, .*model.max_seq_length=32"),
        ({}, 0, "max_new must be at least 1, not 0"),
        ({"head": "scalar"}, 1, "model.head='scalar' has no logits"),
    ],
)
def test_what_cannot_be_generated_is_an_error_with_numbers(change, max_new, message):
    cfg = dataclasses.replace(CFG, **change)
    with pytest.raises(ValueError, match=message):
        decode.generate(cfg, {}, *pad(PROMPTS), jax.random.key(0), max_new=max_new, sampler=GREEDY, eos_ids=())
