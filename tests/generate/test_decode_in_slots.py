"""Generation in fewer slots than prompts: the same responses as with a slot each, in fewer steps."""

import dataclasses
import functools
import heapq

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import partition
from jaxgpt.generate import decode
from jaxgpt.generate.samplers import SamplerConfig
from jaxgpt.models import decoder
from tests.generate.reference import CFG, greedy_reference, params
from tests.generate.test_decode import GREEDY, STATIC, generate, pad, responses

MAX_NEW = 8
EOS = (2, 11)  # 11 fills the padding of prompts, too
# Those without tokens stand first, in the middle and last.
PROMPTS = [[], [3, 9, 1, 4, 4], [7], [2, 16, 5], [], [12], [5, 5, 8, 13], [1, 6], [10, 3], [4, 15, 14, 9], [8], []]
slow = jax.jit(decode.generate, static_argnums=0, static_argnames=(*STATIC, "num_slots"))


def both(num_slots, cfg=CFG, left=True, rng=None, **change):
    """(with a slot per prompt, with num_slots)."""
    options = {"max_new": MAX_NEW, "sampler": SamplerConfig(), "eos_ids": EOS, "pad_id": 6} | change
    batch = *pad(PROMPTS, left), jax.random.key(1) if rng is None else rng
    return generate(cfg, params(cfg), *batch, **options), slow(cfg, params(cfg), *batch, num_slots=num_slots, **options)


def assert_same(plain, slots):
    for name in ("tokens_BR", "mask_BR", "lengths_B", "has_eos_B"):
        np.testing.assert_array_equal(getattr(slots, name), getattr(plain, name), err_msg=name)
    np.testing.assert_allclose(slots.logprobs_BR, plain.logprobs_BR, atol=2e-5)


def steps_of(lengths, num_slots):
    """Decode steps of slots that each take the next prompt at once; a response's first token is the prefill's."""
    free_at = [0] * num_slots
    for length in lengths:
        if length > 1:
            heapq.heappush(free_at, heapq.heappop(free_at) + length - 1)
    return max(free_at)


@pytest.mark.parametrize("num_slots", [1, 2, 3, len(PROMPTS)])
def test_the_same_responses_come_out_of_any_number_of_slots(num_slots):
    plain, slots = both(num_slots)
    assert_same(plain, slots)
    lengths, has_eos = np.asarray(plain.lengths_B), np.asarray(plain.has_eos_B)
    # What makes the case hard: empty rows, an EOS as the first token, one later, and a row that max_new ended.
    assert lengths[[0, 4, 11]].tolist() == [0, 0, 0]
    assert (has_eos & (lengths == 1)).any()
    assert (has_eos & (lengths > 1)).any()
    assert (~has_eos & (lengths == MAX_NEW)).any()


def test_greedy_responses_are_the_argmax_of_repeated_full_forwards():
    _, slots = both(3, sampler=GREEDY)
    assert responses(slots) == [greedy_reference(p, MAX_NEW, EOS) if p else [] for p in PROMPTS]


@pytest.mark.parametrize(
    "change",
    [
        {
            "left": False,
            "sampler": SamplerConfig(repetition_penalty=3.0),
            "rng": jax.random.split(jax.random.key(9), 12),
        },
        {"max_new": 1},
        # The last new token stands at the end of the table of positions.
        {"cfg": dataclasses.replace(CFG, position="learned", max_seq_length=13, sliding_window=3), "eos_ids": ()},
    ],
    ids=["right_padding_penalty_key_per_row", "one_token", "learned_positions_window_no_eos"],
)
def test_the_same_responses_come_out_with(change):
    plain, slots = both(2, **change)
    assert_same(plain, slots)
    assert np.asarray(plain.lengths_B).any()


def run_counted(monkeypatch, prompts, num_slots, **options):
    """(lengths, [tokens.shape, last position] of each pass of the decoder)."""
    calls, uncounted = [], decoder.decode

    def counted(cfg, params, tokens_BT, segments_BT, positions_BT, cache):
        jax.debug.callback(lambda last: calls.append((tokens_BT.shape, int(last))), jnp.max(positions_BT))
        return uncounted(cfg, params, tokens_BT, segments_BT, positions_BT, cache)

    monkeypatch.setattr(decoder, "decode", counted)
    run = jax.jit(functools.partial(decode.generate, CFG, num_slots=num_slots, **options))
    out = jax.block_until_ready(run(params(), *pad(prompts), jax.random.key(1)))
    jax.effects_barrier()
    return np.asarray(out.lengths_B).tolist(), calls


def test_no_slot_stands_idle_while_a_prompt_waits(monkeypatch):
    options = {"max_new": MAX_NEW, "sampler": SamplerConfig(), "eos_ids": EOS}
    lengths, calls = run_counted(monkeypatch, PROMPTS, 3, **options)
    steps = steps_of(lengths, 3)
    assert [shape for shape, _ in calls] == [(len(PROMPTS), 5)] + [(3, 1)] * steps
    assert steps < -(-sum(n > 0 for n in lengths) // 3) * (MAX_NEW - 1)


def test_slots_that_are_done_stay_within_the_positions_of_their_response(monkeypatch):
    """Beyond the end of a table of positions, jax would read NaN."""
    options = {"max_new": MAX_NEW, "sampler": SamplerConfig(), "eos_ids": ()}
    lengths, calls = run_counted(monkeypatch, [[3], [4], [5]], 2, **options)
    assert lengths == [MAX_NEW] * 3
    assert max(last for _, last in calls) <= MAX_NEW


def test_a_pool_of_empty_rows_is_never_decoded(monkeypatch):
    lengths, calls = run_counted(monkeypatch, [[]] * 4, 2, max_new=4, sampler=GREEDY, eos_ids=())
    assert lengths == [0] * 4
    assert [shape for shape, _ in calls] == [(4, 5)]


def test_sharded_over_devices_the_same_responses_come_out():
    mesh = partition.make_mesh(partition.MeshConfig(data=2, fsdp=2, tensor=2))
    batch = jax.device_put(pad(PROMPTS), partition.batch_sharding(mesh))
    rng = jax.device_put(jax.random.key(1), partition.replicated(mesh))
    options = {"max_new": MAX_NEW, "sampler": SamplerConfig(), "eos_ids": EOS, "pad_id": 6}

    def run(params, *batch):
        with partition.activate(mesh, partition.DEFAULT_RULES):
            return decode.generate(CFG, params, *batch, num_slots=4, **options)

    plain = generate(CFG, params(), *pad(PROMPTS), jax.random.key(1), **options)
    assert_same(plain, jax.jit(run)(params(), *batch, rng))


def test_a_negative_number_of_slots_is_an_error():
    with pytest.raises(ValueError, match="num_slots must be 0 .* not -1"):
        decode.generate(CFG, {}, *pad(PROMPTS), jax.random.key(0), max_new=1, sampler=GREEDY, eos_ids=(), num_slots=-1)
