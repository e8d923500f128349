"""Continuous batching against full forward passes in float64, and against `generate` with the same keys."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from jaxgpt import partition
from jaxgpt.generate import decode
from jaxgpt.generate.engine import Engine, Request, decode_step, prefill
from jaxgpt.generate.samplers import SamplerConfig
from jaxgpt.generate.text import pad_prompts
from jaxgpt.models import decoder
from tests.generate.reference import CFG, full_forward, greedy_reference, logits_after, params

GREEDY = SamplerConfig(temperature=0)
PROMPTS = [[3, 9, 1, 4, 4], [7], [2, 16, 5]]
MAX_NEW = 6
SAMPLERS = (
    SamplerConfig(temperature=0.7, top_k=5, repetition_penalty=3.0),
    SamplerConfig(top_p=0.8, min_p=0.02),
    GREEDY,
    SamplerConfig(),
)
LONG = dataclasses.replace(CFG, max_seq_length=100)
generate = jax.jit(decode.generate, static_argnums=0, static_argnames=("max_new", "sampler", "eos_ids", "pad_id"))


def make_engine(cfg=CFG, num_slots=3, max_length=0, devices=1, **mesh):
    mesh = partition.make_mesh(partition.MeshConfig(**mesh), devices=jax.devices()[:devices])
    return Engine(cfg, jax.device_put(params(cfg), partition.replicated(mesh)), mesh, num_slots=num_slots,
                  max_length=max_length)  # fmt: skip


def greedy(prompt, max_new=MAX_NEW, stop_ids=()):
    return Request(prompt, max_new, stop_ids, GREEDY)


def run(engine, requests, steps_between=0):
    """Tokens of each request, one started after the other as slots are free, with steps in between."""
    waiting, slot_of, out = list(enumerate(requests)), {}, [[] for _ in requests]
    while waiting or slot_of:
        if waiting and engine.num_free:
            index, request = waiting.pop(0)
            slot_of[engine.start(request)] = index
            steps = steps_between if waiting else 1
        else:
            steps = 1
        for _ in range(steps):
            for token in engine.step():
                out[slot_of[token.slot]].append(token)
                if token.finish:
                    del slot_of[token.slot]
    return out


def ids(tokens):
    return [token.id for token in tokens]


def log_softmax(z):
    return z - z.max() - np.log(np.sum(np.exp(z - z.max())))


def alone(request):
    """What `generate` draws with the key of the request's seed, in the row of its choice."""
    prompt_BP, mask_BP = (np.tile(x, (2, 1)) for x in pad_prompts([request.prompt], 0, multiple=5))
    out = generate(CFG, params(), prompt_BP, mask_BP, jax.random.key(request.seed), max_new=13, sampler=request.sampler,
                   eos_ids=request.stop_ids)  # fmt: skip
    return np.asarray(out.tokens_BR)[request.choice, : request.max_new].tolist()


def test_greedy_is_the_argmax_of_repeated_full_forwards():
    out = run(make_engine(), [greedy(p) for p in PROMPTS])
    assert [ids(tokens) for tokens in out] == [greedy_reference(p, MAX_NEW) for p in PROMPTS]
    assert [token.finish for token in out[0]] == [None] * (MAX_NEW - 1) + ["length"]


def test_windows_and_learned_positions_hold_to_the_very_end_of_the_context():
    cfg = dataclasses.replace(
        CFG, position="learned", sliding_window=3, window_pattern=("local", "global"), max_seq_length=16
    )
    engine = make_engine(cfg)
    out = run(engine, [greedy(p, 16 - len(p)) for p in PROMPTS])
    # the slots are full now, and take other requests
    again = run(engine, [greedy(p, 16 - len(p)) for p in PROMPTS[::-1]])
    expected = [greedy_reference(p, 16 - len(p), cfg=cfg) for p in PROMPTS]
    assert [ids(tokens) for tokens in out] == expected
    assert [ids(tokens) for tokens in again] == expected[::-1]


def test_requests_that_join_and_leave_at_any_time_draw_what_generate_draws_for_them_alone():
    requests = [
        Request(prompt, 4 + 3 * i, (), sampler, seed=10 * i + 3, choice=i % 2)
        for i, (prompt, sampler) in enumerate(zip([*PROMPTS, [1, 2]], SAMPLERS, strict=True))
    ]
    expected = [alone(request) for request in requests]
    for steps_between in (0, 2):
        out = run(make_engine(), requests, steps_between)
        assert [ids(tokens) for tokens in out] == expected


def test_a_stop_id_ends_a_request_and_is_its_last_token():
    expected = greedy_reference(PROMPTS[0], MAX_NEW)
    stop = next(i for i in expected if i != expected[0])
    tokens = run(make_engine(), [greedy(PROMPTS[0], MAX_NEW, (stop,))])[0]
    assert ids(tokens) == expected[: expected.index(stop) + 1]
    assert tokens[-1].finish == "stop"


def test_log_probs_are_the_models_own_and_alternatives_come_best_first_to_those_who_want_them():
    wanting = Request(PROMPTS[0], 4, (), SAMPLERS[0], seed=1, has_alternatives=True)
    tokens, others = run(make_engine(), [wanting, greedy(PROMPTS[1], 4)])
    assert all(token.alternatives == () for token in others)
    sequence = list(PROMPTS[0])
    for token in tokens:
        expected = log_softmax(logits_after(sequence))
        best = np.argsort(-expected)
        assert [i for i, _ in token.alternatives] == best.tolist()
        np.testing.assert_allclose([x for _, x in token.alternatives], expected[best], atol=3e-5)
        np.testing.assert_allclose(token.logprob, expected[token.id], atol=3e-5)
        sequence.append(token.id)


@pytest.mark.parametrize("kept", [8, 3], ids=["the conversation goes on", "it diverges"])
def test_a_later_turn_computes_what_is_new_alone_and_gets_the_logits_of_a_whole_pass(kept):
    engine = make_engine()
    first = ids(run(engine, [greedy(PROMPTS[0], 4)])[0])
    said = [*PROMPTS[0], *first][:kept]
    later = [*said, ([*PROMPTS[0], *first, 0][kept] + 1) % 17, 11]
    run(engine, [greedy([5, 5, 5], 3)])  # another conversation, in another slot
    computed, reused = engine.computed, engine.reused
    token = run(engine, [Request(later, 1, (), GREEDY, has_alternatives=True)])[0][0]
    assert (engine.reused - reused, engine.computed - computed) == (kept, 2)
    expected = log_softmax(logits_after(later))
    found = dict(token.alternatives)
    np.testing.assert_allclose([found[i] for i in range(17)], expected, atol=3e-5)


def test_the_same_prompt_again_computes_its_last_token_alone():
    engine = make_engine()
    first, again = (ids(run(engine, [greedy(PROMPTS[0])])[0]) for _ in range(2))
    assert first == again == greedy_reference(PROMPTS[0], MAX_NEW)
    assert (engine.reused, engine.computed) == (4, 6)


def test_a_row_without_a_request_stays_as_it_is_while_others_go_on():
    engine = make_engine()
    run(engine, [greedy(PROMPTS[0])])
    before = int(engine._state.cache.index_B[0])
    run(engine, [greedy(PROMPTS[1])])
    assert int(engine._state.cache.index_B[0]) == before == len(PROMPTS[0]) + MAX_NEW - 1


def test_a_cancelled_request_frees_its_slot_even_before_its_prompt_is_written():
    engine = make_engine()
    slots = [engine.start(greedy(p, 20)) for p in PROMPTS]
    with pytest.raises(RuntimeError, match="no free slot"):
        engine.start(greedy([1]))
    engine.step()  # writes the first prompt
    for slot in slots:
        engine.cancel(slot)
    assert engine.num_free == 3
    assert engine.step() == []
    assert [ids(t) for t in run(engine, [greedy(p) for p in PROMPTS])] == [
        greedy_reference(p, MAX_NEW) for p in PROMPTS
    ]


def test_long_prompts_come_in_parts_between_which_others_go_on():
    prompt = np.random.default_rng(0).integers(0, 17, 90).tolist()
    engine = make_engine(LONG)
    engine.start(greedy(PROMPTS[1], 20))
    engine.step()
    engine.start(greedy(prompt, 3))
    tokens = [engine.step() for _ in range(4)]
    # one for the first request while the second has half of its prompt; with the other half two for the second
    assert [[token.slot for token in step] for step in tokens] == [[0], [1, 0, 1], [0, 1], [0]]
    drawn = [token.id for step in tokens for token in step if token.slot == 1]
    whole = full_forward(LONG)(params(LONG), np.array([prompt + drawn], np.int32))
    assert np.argmax(whole[0, 89:92], axis=-1).tolist() == drawn


def test_nothing_is_compiled_after_the_few_shapes_of_the_start(monkeypatch):
    traced, uncounted = [], decoder.decode

    def counted(cfg, params, tokens_BT, *rest):
        traced.append(tokens_BT.shape)
        return uncounted(cfg, params, tokens_BT, *rest)

    monkeypatch.setattr(decoder, "decode", counted)
    for program in (prefill, decode_step):
        program.clear_cache()
    engine = make_engine(LONG)
    engine.compile()
    assert sorted(traced) == [(1, 16), (1, 64), (3, 1)]
    for prompt_length in (1, 2, 16, 17, 63, 64, 90):
        run(engine, [Request([1] * prompt_length, 2, (3,), sampler, seed=prompt_length) for sampler in SAMPLERS])
    assert len(traced) == 3


def test_on_a_mesh_the_same_tokens_come_out():
    requests = [Request(p, MAX_NEW, (), s, seed=4) for p, s in zip(PROMPTS, SAMPLERS[:3], strict=True)]
    engine = make_engine(num_slots=4, devices=8, data=2, fsdp=2, tensor=2)
    assert [ids(t) for t in run(engine, requests, 1)] == [alone(request) for request in requests]


@pytest.mark.parametrize(
    ("prompt", "max_new", "message"),
    [
        ([1] * 30, 3, "30 tokens; with 3 new ones that is more than the 32 there is room for, so at most 2"),
        ([1] * 40, 1, "at most 0 can be generated"),
        ([], 1, "no tokens"),
        ([1], 0, "max_new must be at least 1, not 0"),
    ],
)
def test_what_does_not_fit_is_refused_with_numbers(prompt, max_new, message):
    with pytest.raises(ValueError, match=message):
        make_engine().start(greedy(prompt, max_new))


def test_an_engine_that_cannot_be_is_refused():
    learned = dataclasses.replace(CFG, position="learned")
    make = functools.partial(Engine, params={}, mesh=None, num_slots=1)
    with pytest.raises(ValueError, match="model.head='scalar'"):
        make(dataclasses.replace(CFG, head="scalar"))
    with pytest.raises(ValueError, match="max_length must be .* at most model.max_seq_length=32, not 33"):
        make(learned, max_length=33)
    with pytest.raises(ValueError, match="num_slots must be at least 1, not 0"):
        make(learned, num_slots=0)
