"""Texts through a tokenizer of single letters, against the reference's greedy continuation."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxgpt import partition
from jaxgpt.generate.samplers import SamplerConfig
from jaxgpt.generate.text import generate_texts, next_token_table, pad_prompts, stop_ids
from tests.generate.reference import CFG, greedy_reference, logits_after, params

BOS, EOS, PAD = 1, 2, 0
GREEDY = SamplerConfig(temperature=0)
PROMPTS = ["cabac", "d", "", "dac"]


class Letters:
    """Ids 3, 4, ... are the letters a, b, ...; the model's vocabulary of 17 is larger than this one."""

    special_ids = {"<|user|>": 9, "<|end|>": 10}
    eos_id, pad_id, vocab_size = EOS, PAD, 11

    def encode(self, text, add_bos=False):
        return np.array([BOS] * add_bos + [ord(letter) - ord("a") + 3 for letter in text], np.int32)

    def decode(self, ids):
        return "".join(self.piece(i) for i in ids if i > 2)

    def piece(self, i):
        return "._$abcdefgh"[i]


def write(prompts, *, batch_size, seed=0, sampler=GREEDY, eos_ids=(), cfg=CFG, mesh=None):
    return generate_texts(
        cfg, params(cfg), Letters(), prompts,
        sampler=sampler, max_new=6, seed=seed, batch_size=batch_size, eos_ids=eos_ids, mesh=mesh,
    )  # fmt: skip


def reference_ids(prompt, eos=(), cfg=CFG):
    return greedy_reference(Letters().encode(prompt, add_bos=True).tolist(), 6, eos, cfg)


def letters(ids):
    return "".join(chr(ord("a") + i - 3) for i in ids if 2 < i < 11)


def test_prompts_are_padded_left_to_a_multiple_within_the_limit():
    prompt_BP, mask_BP = pad_prompts([[5, 6, 7], np.array([8]), []], 9, multiple=4)
    assert prompt_BP.tolist() == [[9, 5, 6, 7], [9, 9, 9, 8], [9, 9, 9, 9]]
    assert mask_BP.tolist() == [[0, 1, 1, 1], [0, 0, 0, 1], [0, 0, 0, 0]]
    assert (prompt_BP.dtype, mask_BP.dtype) == (np.int32, np.float32)
    assert pad_prompts([[1] * 5], 0, multiple=4)[0].shape == (1, 8)
    assert pad_prompts([[1] * 5], 0, multiple=4, max_length=6)[0].shape == (1, 6)
    with pytest.raises(ValueError, match="7 tokens is longer than the 6"):
        pad_prompts([[1] * 7], 0, max_length=6)


def test_texts_are_the_greedy_continuations_in_the_order_of_the_prompts():
    records = write(PROMPTS, batch_size=3)  # the second batch holds one prompt and two rows without
    for prompt, record in zip(PROMPTS, records, strict=True):
        response = letters(reference_ids(prompt))
        assert record == {"prompt": prompt, "response": response, "num_tokens": 6, "stop_reason": "length"}


def test_an_eos_ends_the_text_and_is_counted_but_not_shown():
    eos = (reference_ids("d")[3], reference_ids("cabac")[2])
    for prompt, record in zip(PROMPTS, write(PROMPTS, batch_size=3, eos_ids=eos), strict=True):
        ids = reference_ids(prompt, eos)
        ended = ids[-1] in eos
        assert record["num_tokens"] == len(ids)
        assert record["stop_reason"] == ("eos" if ended else "length")
        assert record["response"] == letters(ids[:-1] if ended else ids)
    assert len(reference_ids("d", eos)) < 6


def test_the_batch_size_does_not_change_what_is_sampled_and_the_seed_does():
    in_threes = write(PROMPTS, batch_size=3, sampler=SamplerConfig(), seed=4)
    assert in_threes == write(PROMPTS, batch_size=2, sampler=SamplerConfig(), seed=4)
    assert in_threes != write(PROMPTS, batch_size=3, sampler=SamplerConfig(), seed=5)


def test_on_a_mesh_the_same_texts_come_out():
    mesh = partition.make_mesh(partition.MeshConfig(data=2, fsdp=2, tensor=2))
    on_mesh = jax.device_put(params(), partition.replicated(mesh))
    sampler = SamplerConfig()
    records = generate_texts(
        CFG, on_mesh, Letters(), PROMPTS, sampler=sampler, max_new=6, seed=4, batch_size=3, eos_ids=(), mesh=mesh
    )
    assert records == write(PROMPTS, batch_size=3, sampler=sampler, seed=4)


def test_the_next_tokens_of_a_prompt_are_shown_as_pieces_with_their_probability():
    z = logits_after(Letters().encode("cabac", add_bos=True).tolist())
    probs = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
    table = next_token_table(CFG, params(), Letters(), "cabac", top=17)
    best = [i for i in np.argsort(-probs) if i < 11]
    assert [piece for piece, _ in table] == ["._$abcdefgh"[i] for i in best]
    np.testing.assert_allclose([prob for _, prob in table], probs[best], rtol=1e-4)


def test_prompts_may_fill_a_learned_position_table_but_not_more():
    cfg = dataclasses.replace(CFG, position="learned", max_seq_length=16)
    fits = "abcdabcda"  # ten tokens with BOS, and six new ones
    assert write([fits], batch_size=1, cfg=cfg)[0]["response"] == letters(reference_ids(fits, cfg=cfg))
    with pytest.raises(
        ValueError, match=r"'abcdabcdaa' has 11 tokens; with 6 new .* model\.max_seq_length=16, .* room for 5\."
    ):
        write([fits + "a"], batch_size=1, cfg=cfg)


def test_a_prompt_without_tokens_is_an_error_and_no_prompts_are_no_texts():
    class WithoutBos(Letters):
        def encode(self, text, add_bos=False):
            return super().encode(text)

    arguments = {"sampler": GREEDY, "max_new": 6, "seed": 0, "batch_size": 2, "eos_ids": ()}
    with pytest.raises(ValueError, match="The prompt '' has no tokens"):
        generate_texts(CFG, params(), WithoutBos(), [""], **arguments)
    assert generate_texts(CFG, params(), Letters(), [], **arguments) == []


def test_stop_takes_reserved_and_single_pieces_and_names_the_nearest_for_others():
    assert stop_ids(Letters(), ("<|end|>", "b")) == (EOS, 10, 4)
    with pytest.raises(ValueError, match=r"stop: 'ab' is 2 pieces, not one; the nearest reserved one is '<\|"):
        stop_ids(Letters(), ("ab",))
