"""Conversations in rows: weight on exactly the responses, the same loss packed or not, nothing cut or lost in silence."""

import collections
import dataclasses
import functools
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import numerics, partition, tree
from jaxgpt.data import batches, chat, conversations
from jaxgpt.data.chat import ChatTemplate
from jaxgpt.data.config import DataConfig, HoldoutConfig
from jaxgpt.data.conversations import SFTConfig, tokenize_conversations
from jaxgpt.data.packing import make_plan
from jaxgpt.data.sentencepiece_tokenizer import TokenizerConfig, train_tokenizer
from jaxgpt.models import decoder
from jaxgpt.models.config import ModelConfig
from jaxgpt.objectives.next_token import LossConfig, make_next_token

PAD = 0
LONG = DataConfig(sequence_length=64, packing="best_fit")
SHORT = dataclasses.replace(LONG, sequence_length=8)


@functools.cache
def tokenizer():
    """One token per character."""
    return train_tokenizer(["abcdefghijklmnopqrstuvwxyz 0123456789?.:QAHT\n"], TokenizerConfig("char", 1000))


def spelled(text):
    """Ids and mask of a text in which reserved tokens go by name and what is trained on stands in guillemets."""
    tok = tokenizer()
    known = {tok.piece(i).replace("\u2581", " "): i for i in range(tok.vocab_size)}
    ids, trained, inside = [], [], False
    for part in re.findall(r"<[^<>]+>|.", text, re.DOTALL):
        if part in "«»":
            inside = part == "«"
        else:
            ids.append(known[part] if part in known else known[f"<0x{ord(part):02X}>"])
            trained.append(inside)
    return ids, trained


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def pair(prompt, response):
    return {"prompt": prompt, "response": response}


DEFAULT = SFTConfig()


def tokenize(folder, records, config=LONG, sft=DEFAULT, split="all", template="roles"):
    path = write(folder / "talks.jsonl", records)
    template = ChatTemplate.from_config(template)
    return tokenize_conversations([path], tokenizer(), template, config, sft, split, str(folder / "cache"))


def examples(source):
    """(ids, mask) of every example on disk."""
    bounds = list(zip(source.offsets, source.offsets[1:], strict=False))
    return [(source.tokens[a:b].tolist(), source.trained[a:b].tolist()) for a, b in bounds]


TALK = {
    "messages": [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": "cd"},
        {"role": "user", "content": "e"},
        {"role": "assistant", "content": "f"},
    ]
}
R0, R1 = "<|reserved_0|>", "<|reserved_1|>"  # what other models' markers become
MASKS = {  # of TALK, with sft.loss_on=assistant
    "plain": "<bos>s\nQ: ab\nA:« cd<eos>»\nQ: e\nA:« f<eos>»",
    "chatml": (
        f"<bos>{R0}system\ns<|end|>\n{R0}user\nab<|end|>\n{R0}assistant\n«cd<|end|>»\n{R0}user\ne<|end|>\n"
        f"{R0}assistant\n«f<|end|>»\n"
    ),
    "llama3": (
        f"<bos>{R0}system{R1}\n\ns<|end|>{R0}user{R1}\n\nab<|end|>{R0}assistant{R1}\n\n«cd<|end|>»"
        f"{R0}user{R1}\n\ne<|end|>{R0}assistant{R1}\n\n«f<|end|>»"
    ),
    "gemma": (f"<bos>{R0}user\ns\n\nab<|end|>\n{R0}model\n«cd<|end|>»\n{R0}user\ne<|end|>\n{R0}model\n«f<|end|>»\n"),
    "roles": (
        "<bos><|system|>s<|end|><|user|>ab<|end|><|assistant|>«cd<|end|>»<|user|>e<|end|><|assistant|>«f<|end|>»"
    ),
}


@pytest.mark.parametrize("name", MASKS)
def test_weights_are_on_responses_and_their_end_in_every_template(tmp_path, name):
    config = dataclasses.replace(LONG, sequence_length=128)
    source = tokenize(tmp_path, [TALK], config, template=name)
    row = make_plan(source, "best_fit", 128, PAD)[0]
    ids, trained = spelled(MASKS[name])
    # The target of place i is the token at i + 1, and its weight says whether that one is trained on.
    assert row["tokens_BT"][: len(ids)].tolist() == ids
    assert row["targets_BT"][: len(ids) - 1].tolist() == ids[1:]
    assert row["weights_BT"].tolist() == trained[1:] + [0] * (129 - len(ids))


@pytest.mark.parametrize(
    ("loss_on", "text"),
    [
        ("assistant", MASKS["roles"]),
        (
            "completion",
            "<bos><|system|>s<|end|><|user|>ab<|end|><|assistant|>cd<|end|><|user|>e<|end|><|assistant|>«f<|end|>»",
        ),
        (
            "all",
            "<bos>«<|system|>s<|end|><|user|>ab<|end|><|assistant|>cd<|end|><|user|>e<|end|><|assistant|>f<|end|>»",
        ),
    ],
)
def test_loss_on_says_which_tokens_are_targets(tmp_path, loss_on, text):
    source = tokenize(tmp_path, [TALK], sft=SFTConfig(loss_on=loss_on))
    assert examples(source) == [spelled(text)]
    assert source.num_bytes == len("sabcdef")


def test_rows_of_packed_conversations_by_hand(tmp_path):
    source = tokenize(tmp_path, [pair("ab", "cd"), pair("e", "f")])
    bos, user, answer, end = (tokenizer().special_ids[n] for n in ("<bos>", "<|user|>", "<|assistant|>", "<|end|>"))
    a, b, c, d, e, f = spelled("abcdef")[0]
    row = make_plan(source, "best_fit", 18, PAD)[0]
    expected = {
        "tokens_BT": [bos, user, a, b, end, answer, c, d, end, bos, user, e, end, answer, f, end, PAD, PAD],
        "targets_BT": [user, a, b, end, answer, c, d, end, PAD, user, e, end, answer, f, end, PAD, PAD, PAD],
        "weights_BT": [0, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0],
        "segments_BT": [1] * 9 + [2] * 7 + [0, 0],
        "positions_BT": [*range(9), *range(7), 0, 0],
    }
    assert {name: values.tolist() for name, values in row.items()} == expected


def test_weights_do_not_depend_on_the_padding_id(tmp_path):
    source = tokenize(tmp_path, [pair("ab", "cd")], template="plain")
    eos = tokenizer().eos_id
    row = make_plan(source, "none", 64, eos)[0]
    ids, trained = spelled("<bos>Q: ab\nA:« cd<eos>»")
    assert row["targets_BT"][len(ids) - 2] == eos
    assert row["weights_BT"].tolist() == trained[1:] + [0] * (65 - len(ids))


RECORDS = [
    pair("why", "so"),
    pair("a", "b c d e f"),
    TALK,
    pair("long question?", "no."),
    pair("x", "y"),
    pair("z z", "z"),
]
TEXTS = [
    "<bos><|user|>why<|end|><|assistant|>«so<|end|>»",
    "<bos><|user|>a<|end|><|assistant|>«b c d e f<|end|>»",
    MASKS["roles"],
    "<bos><|user|>long question?<|end|><|assistant|>«no.<|end|>»",
    "<bos><|user|>x<|end|><|assistant|>«y<|end|>»",
    "<bos><|user|>z z<|end|><|assistant|>«z<|end|>»",
]
LENGTH = 32


@pytest.fixture(scope="module")
def model():
    return ModelConfig(
        vocab_size=tokenizer().vocab_size, num_layers=2, embed_dim=16, num_heads=2, mlp_dim=32, max_seq_length=LENGTH,
        remat="none", init="fan_in",
    )  # fmt: skip


@pytest.fixture(scope="module")
def params(model):
    return partition.unbox(decoder.init_params(model, jax.random.key(0)))


@pytest.fixture(scope="module")
def packed_and_not(tmp_path_factory, model, params):
    """{packing: (rows, loss sum, sums, gradient)} of the same conversations."""
    config = dataclasses.replace(LONG, sequence_length=LENGTH)
    source = tokenize(tmp_path_factory.mktemp("talks"), RECORDS, config)
    objective = jax.jit(jax.value_and_grad(make_next_token(model, LossConfig(chunk_tokens=64)), has_aux=True))
    results = {}
    for packing in ("none", "best_fit"):
        plan = make_plan(source, packing, LENGTH, PAD)
        (batch,) = batches.eval_batches(plan, batch_size=len(RECORDS), rows=slice(None))
        (loss, sums), gradient = objective(params, batch, None)
        results[packing] = len(plan), float(loss), sums, gradient
    return results


@pytest.mark.parametrize("packing", ["none", "best_fit"])
def test_the_loss_is_the_sum_over_response_tokens_in_float64(packed_and_not, model, params, packing):
    nll_sum, count = 0.0, 0
    tokens_BT, masks_BT = np.zeros((len(TEXTS), LENGTH), np.int32), np.zeros((len(TEXTS), LENGTH))
    for row, text in enumerate(TEXTS):
        ids, trained = spelled(text)
        tokens_BT[row, : len(ids)], masks_BT[row, : len(ids)] = ids, trained

    @jax.jit
    def logits(params, tokens_BT):
        return decoder.logits(
            model, decoder.head_params(model, params), decoder.hidden_states(model, params, tokens_BT)
        )

    logits_BTV = np.asarray(logits(params, tokens_BT), np.float64)
    for logits_TV, tokens_T, mask_T in zip(logits_BTV, tokens_BT, masks_BT, strict=True):
        for t in range(1, LENGTH):  # the logits before a token predict it
            log_z = np.log(np.exp(logits_TV[t - 1]).sum())
            nll_sum += mask_T[t] * (log_z - logits_TV[t - 1, tokens_T[t]])
            count += int(mask_T[t])
    assert count == 26  # 3 + 10 + (3 + 2) + 4 + 2 + 2: responses with their ends
    _, loss, sums, _ = packed_and_not[packing]
    np.testing.assert_allclose(loss, nll_sum, rtol=1e-6)
    np.testing.assert_allclose(sums["loss"], nll_sum, rtol=1e-6)
    assert float(sums["weight"]) == count


def test_packing_changes_neither_loss_nor_weight_nor_gradient(packed_and_not):
    (rows, loss, sums, gradient), (packed_rows, packed_loss, packed_sums, packed_gradient) = (
        packed_and_not[packing] for packing in ("none", "best_fit")
    )
    assert (rows, packed_rows) == (6, 3)
    np.testing.assert_allclose(packed_loss, loss, rtol=1e-6)
    assert float(packed_sums["weight"]) == float(sums["weight"])
    packed_leaves = tree.named_leaves(packed_gradient)
    for name, leaf in tree.named_leaves(gradient).items():
        scale = float(jnp.abs(leaf).max())
        assert scale > 1e-3, name
        np.testing.assert_allclose(packed_leaves[name], leaf, atol=1e-5 * scale, err_msg=name)


# Logits, tokens and mask (whether a token is a target) of four rows, with the sums of what OpenRLHF and TRL compute.
LOGITS = np.array([
    [[0.126, -0.132, 0.64, 0.105, -0.536], [0.362, 1.304, 0.947, -0.704, -1.265], [-0.623, 0.041, -2.325, -0.219, -1.246],
     [-0.732, -0.544, -0.316, 0.412, 1.043], [-0.129, 1.366, -0.665, 0.352, 0.903], [0.094, -0.743, -0.922, -0.458, 0.22]],
    [[-1.01, -0.209, -0.159, 0.541, 0.215], [0.355, -0.654, -0.13, 0.784, 1.493], [-1.259, 1.514, 1.346, 0.781, 0.264],
     [-0.314, 1.458, 1.96, 1.802, 1.315], [0.357, -1.208, -0.004, 0.656, -1.288], [0.395, 0.43, 0.696, -1.184, -0.662]],
    [[-0.436, -1.17, 1.739, -0.496, 0.329], [-0.259, 1.583, 1.32, 0.633, -2.204], [0.052, 0.684, 1.004, -0.618, 1.822],
     [-1.32, -0.662, 0.935, 0.049, 2.002], [0.189, -0.633, -0.378, -1.091, -1.278], [0.63, 0.581, 1.295, -0.755, 1.689]],
    [[-0.287, 1.574, -0.433, -0.735, 0.25], [1.031, 0.161, -0.586, -1.341, -1.402], [0.503, 0.99, -0.164, -1.074, 0.873],
     [-1.28, -0.713, 0.621, -2.25, 0.386], [-0.582, 0.109, -0.076, 0.202, 0.694], [-0.758, 1.421, 0.726, 0.844, 1.165]],
], np.float32)  # fmt: skip
TOKENS = np.array([[4, 4, 0, 2, 3, 1], [1, 1, 1, 4, 1, 1], [0, 0, 3, 1, 4, 2], [4, 2, 3, 4, 0, 2]])
IS_TARGET = np.array([[0, 0, 0, 0, 0, 1], [0, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 0], [0, 0, 1, 1, 1, 1]], np.float32)
NLL_SUMS = [0.8533980032121729, 11.382923238356454, 2.305497118036624, 8.71130644798414]
COUNTS = [1, 5, 2, 4]
LOSS = 1.937760400632449  # the mean of the four rows' means would be 1.6151394554744527


def test_the_loss_of_known_logits_is_that_of_other_implementations():
    token_loss, _ = numerics.cross_entropy(LOGITS[:, :-1], TOKENS[:, 1:])
    sums = [numerics.masked_sum(*row) for row in zip(token_loss, jnp.asarray(IS_TARGET[:, 1:]), strict=True)]
    np.testing.assert_allclose(sums, NLL_SUMS, rtol=1e-6)

    @jax.jit
    def sums_of(*shifted):
        return numerics.chunked_cross_entropy(lambda head, x: x @ head, np.eye(5, dtype="f4"), *shifted, chunk_tokens=4)

    def chunked(rows):
        return sums_of(LOGITS[rows, :-1], TOKENS[rows, 1:], IS_TARGET[rows, 1:])

    loss, parts = chunked(slice(None))
    np.testing.assert_allclose(loss, sum(NLL_SUMS), rtol=1e-6)
    np.testing.assert_allclose(loss / parts["weight"], LOSS, rtol=1e-6)
    # Row by row, as micro-batches are: sums are added, and divided once.
    micro = [chunked(slice(row, row + 1)) for row in range(4)]
    assert [float(parts["weight"]) for _, parts in micro] == COUNTS
    np.testing.assert_allclose(sum(s for s, _ in micro) / sum(p["weight"] for _, p in micro), LOSS, rtol=1e-6)


FITS = pair("ab", "cd")  # 9 tokens
LONGER = pair("ab", "cdef")  # 11 tokens
LONG_PROMPT = pair("abcdefgh", "x")  # 13 tokens
FITTED = spelled("<bos><|user|>ab<|end|><|assistant|>«cd<|end|>»")


@pytest.mark.parametrize(
    ("too_long", "kept", "notes"),
    [
        ("drop", [], {"dropped, too long": 2}),
        (
            "truncate_left",
            ["<bos>b<|end|><|assistant|>«cdef<|end|>»", "<bos>efgh<|end|><|assistant|>«x<|end|>»"],
            {"truncated": 2},
        ),
        (
            "truncate_right",
            ["<bos><|user|>ab<|end|><|assistant|>«cde»"],
            {"truncated": 1, "dropped, no response left": 1},
        ),
    ],
)
def test_a_row_takes_one_token_more_than_its_length_and_what_is_longer_is_cut_or_dropped(
    tmp_path, too_long, kept, notes
):
    source = tokenize(tmp_path, [FITS, LONGER, LONG_PROMPT], SHORT, SFTConfig(too_long=too_long))
    assert examples(source) == [FITTED, *map(spelled, kept)]
    assert source.notes == notes
    for row in range(len(plan := make_plan(source, "best_fit", 8, PAD))):
        assert plan[row]["weights_BT"].sum() == sum(examples(source)[row][1])


def test_what_is_cut_at_its_start_keeps_no_first_token_but_bos():
    pytest.importorskip("tokenizers")
    from tests.data.foreign import foreign

    tok, notes = foreign("qwen"), collections.Counter()
    messages = [chat.Message("user", "the quick brown fox"), chat.Message("assistant", "the lazy dog")]
    encoded = ChatTemplate.from_config("chatml").encode(tok, messages, loss_on="completion")
    cut = conversations.fit(encoded, 9, "truncate_left", notes, encoded.trained, tok.bos_id)
    assert cut.ids.tolist() == encoded.ids[-9:].tolist()
    assert cut.trained.tolist() == encoded.trained[-9:].tolist()
    assert notes == {"truncated": 1}


@pytest.mark.parametrize("loss_on", ["assistant", "completion", "all"])
def test_a_conversation_cut_before_its_response_is_dropped_even_where_its_prompt_is_trained_on(tmp_path, loss_on):
    sft = SFTConfig(loss_on=loss_on, too_long="truncate_right")
    with pytest.raises(ValueError, match=r"No record of .*talks.jsonl is left \(1 dropped, no response left\); .*=8\."):
        tokenize(tmp_path, [LONG_PROMPT], SHORT, sft)


def test_all_that_is_left_of_a_cut_conversation_is_trained_on_under_all_but_bos(tmp_path):
    source = tokenize(tmp_path, [LONGER], SHORT, SFTConfig(loss_on="all", too_long="truncate_left"))
    assert examples(source) == [spelled("<bos>«b<|end|><|assistant|>cdef<|end|>»")]


def test_of_several_turns_those_that_are_left_are_trained_on(tmp_path):
    config = dataclasses.replace(SHORT, sequence_length=10)  # 11 of 18 tokens
    left, right = (
        tokenize(tmp_path, [TALK], config, SFTConfig(too_long=side)) for side in ("truncate_left", "truncate_right")
    )
    assert examples(left) == [
        spelled("<bos><|assistant|>«cd<|end|>»<|user|>e<|end|><|assistant|>«f<|end|>»"),
    ]
    assert examples(right) == [spelled("<bos><|system|>s<|end|><|user|>ab<|end|><|assistant|>«cd»")]
    assert left.notes == right.notes == {"truncated": 1}
    with pytest.raises(ValueError, match="1 dropped, no response left"):  # the first response is none of them
        tokenize(tmp_path, [TALK], config, SFTConfig(loss_on="completion", too_long="truncate_right"))


def test_an_empty_response_is_an_error_or_counted(tmp_path):
    records = [FITS, pair("ab", " \n"), FITS]
    with pytest.raises(ValueError, match=r"talks.jsonl, line 2: the response is empty; sft.empty_response=drop leaves"):
        tokenize(tmp_path, records)
    source = tokenize(tmp_path, records, sft=SFTConfig(empty_response="drop"))
    assert examples(source) == [FITTED] * 2
    assert source.notes == {"dropped, empty response": 1}


def test_where_everything_is_dropped_the_error_counts_what_and_names_the_length(tmp_path):
    records = [pair("a", ""), LONGER, LONG_PROMPT]
    message = r"No record of .*talks.jsonl is left \(1 dropped, empty response, 2 dropped, too long\); "
    with pytest.raises(ValueError, match=message + r"data.sequence_length=8\."):
        tokenize(tmp_path, records, SHORT, SFTConfig(empty_response="drop"))


def test_a_side_without_records_is_an_error_that_names_the_fraction(tmp_path):
    config = dataclasses.replace(LONG, holdout=HoldoutConfig(fraction=1e-9))
    with pytest.raises(
        ValueError, match=r"is left on the held-out side; data.holdout.fraction=1e-09 leaves none there"
    ):
        tokenize(tmp_path, [FITS], config, split="held_out")


def test_records_are_not_split_by_position(tmp_path):
    config = dataclasses.replace(LONG, holdout=HoldoutConfig(by="position"))
    with pytest.raises(ValueError, match=r"data.holdout.by='position' is for plain text"):
        tokenize(tmp_path, [FITS], config, split="train")
    assert tokenize(tmp_path, [FITS], config).num_documents == 1


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "a"}, "no field 'response'"),
        ({"prompt": "a", "response": 3}, "the field 'response' must be a text or a list of messages, not int"),
        (
            {"messages": [{"role": "usr", "content": "a"}]},
            r"messages\[0\].role='usr' is not one of .*nearest is 'user'",
        ),
        ({"messages": [{"role": "user", "content": "a"}]}, "the last message must be the assistant's"),
    ],
)
@pytest.mark.parametrize("split", ["train", "held_out"])
def test_a_bad_record_is_an_error_with_file_and_line_on_both_sides(tmp_path, record, message, split):
    with pytest.raises(ValueError, match=rf"^{tmp_path}/talks.jsonl, line 3: {message}"):
        tokenize(tmp_path, [FITS, FITS, record], split=split)


def test_what_a_template_refuses_is_an_error_with_file_and_line(tmp_path):
    twice = {"messages": [{"role": role, "content": "a"} for role in ("user", "user", "assistant")]}
    with pytest.raises(ValueError, match=rf"^{tmp_path}/talks.jsonl, line 2: Chat template gemma.*must alternate"):
        tokenize(tmp_path, [FITS, twice], template="gemma")


def test_no_prompt_is_on_both_sides(tmp_path):
    prompts = [f"q {i}" for i in range(60)]
    records = [pair(prompt, answer) for answer in "xy" for prompt in prompts]
    config = dataclasses.replace(LONG, holdout=HoldoutConfig(fraction=0.3))
    sides = {}
    for split in ("train", "held_out"):
        texts = [tokenizer().decode(ids) for ids, _ in examples(tokenize(tmp_path, records, config, split=split))]
        sides[split] = collections.Counter(text[:-1] for text in texts)
        assert set(sides[split].values()) == {2}  # both answers
    assert not set(sides["train"]) & set(sides["held_out"])
    assert sorted([*sides["train"], *sides["held_out"]]) == sorted(prompts)


@pytest.fixture
def reads(monkeypatch):
    """The paths that were read, as they are read."""
    paths, read = [], conversations.sources.read_records
    monkeypatch.setattr(conversations.sources, "read_records", lambda path: paths.append(path) or read(path))
    return paths


def test_a_second_run_reads_no_record_again(tmp_path, reads):
    first, second = (tokenize(tmp_path, [FITS, LONGER], SHORT) for _ in range(2))
    assert len(reads) == 1
    assert first == second
    assert second.notes == {"dropped, too long": 1}  # known without reading


@pytest.mark.parametrize(
    "change",
    [
        {"template": "chatml"},
        {"sft": SFTConfig(loss_on="all")},
        {"sft": SFTConfig(too_long="truncate_left")},
        {"sft": SFTConfig(empty_response="drop")},
        {"config": SHORT},
        {"config": dataclasses.replace(LONG, fields={"text": "other"})},
        {"split": "train"},
        {"records": [LONGER]},
    ],
    ids=str,
)
def test_whatever_decides_the_tokens_makes_another_entry(tmp_path, reads, change):
    def key(records=(FITS,), **kwargs):
        return tokenize(tmp_path, records, **kwargs).key

    assert key(**change) != key()
    assert len(reads) == 2


def test_fields_that_do_not_decide_the_tokens_share_an_entry(tmp_path, reads):
    other = dataclasses.replace(LONG, packing="none", num_workers=3, holdout=HoldoutConfig(fraction=0.4))
    assert tokenize(tmp_path, [FITS]) == tokenize(tmp_path, [FITS], other)
    assert len(reads) == 1


@pytest.mark.parametrize("killed", [False, True])
def test_an_interrupted_run_leaves_no_entry_behind(tmp_path, monkeypatch, killed):
    encode, seen = ChatTemplate.encode, []

    def interrupted(self, *args, **kwargs):
        if seen:
            raise KeyboardInterrupt
        seen.append(1)
        return encode(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(ChatTemplate, "encode", interrupted)
        if killed:  # nothing is tidied up
            patch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)
        with pytest.raises(KeyboardInterrupt):
            tokenize(tmp_path, [FITS, FITS])
    left = [entry for entry in (tmp_path / "cache").iterdir() if entry.is_dir()]
    assert [entry.suffix for entry in left] == ([".tmp"] if killed else [])
    assert examples(tokenize(tmp_path, [FITS, FITS])) == [FITTED] * 2
