"""Preferences: every form of a record, errors that say where, and rows with all responses to a prompt side by side."""

import dataclasses
import itertools
import json
import pickle

import numpy as np
import pytest

from jaxgpt.data import batches, conversations
from jaxgpt.data.chat import ChatTemplate, Message
from jaxgpt.data.config import DataConfig, HoldoutConfig, SourceConfig
from jaxgpt.data.conversations import SFTConfig, tokenize_conversations
from jaxgpt.data.preference import build_preferences, preference, tokenize_preferences
from jaxgpt.data.sources import Record
from jaxgpt.types import PairBatch
from tests.data.test_conversations import PAD, examples, spelled, tokenizer, write

LONG = DataConfig(sequence_length=32)
SHORT = dataclasses.replace(LONG, sequence_length=9)
ROLES = ChatTemplate.from_config("roles")


def read(fields, mapping=None):
    return preference(Record(fields, "pairs.jsonl", 7), mapping or {})


def tokenize(folder, records, config=LONG, too_long="drop", split="all", name="pairs.jsonl"):
    path = write(folder / name, records)
    return tokenize_preferences([path], tokenizer(), ROLES, config, too_long, split, str(folder / "cache"))


def pair(prompt, chosen, rejected, **more):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected} | more


def ranked(prompt, *responses):
    return {"prompt": prompt, "responses": list(responses)}


def turns(text):
    """Messages of a short form: "u:hi a:yo"."""
    roles = {"u": "user", "a": "assistant", "s": "system"}
    return [Message(roles[turn[0]], turn[2:]) for turn in text.split()]


def hashable(text):
    return json.dumps([list(message) for message in turns(text)])


def hh(chosen, rejected):
    """Anthropic HH's two transcripts, from the short form."""
    names = {"user": "Human", "assistant": "Assistant"}
    return {
        name: "".join(f"\n\n{names[m.role]}: {m.content}" for m in turns(text))
        for name, text in (("chosen", chosen), ("rejected", rejected))
    }


@pytest.mark.parametrize(
    ("fields", "mapping", "talks", "ranks", "prompt"),
    [
        (pair("q", "x", "y"), {}, ["u:q a:x", "u:q a:y"], [0, 1], "u:q"),
        (
            {"prompt": "q", "winning_response": "x", "losing_response": "y"},
            {},
            ["u:q a:x", "u:q a:y"],
            [0, 1],
            "u:q",
        ),
        (
            {"question": "q", "better": "x", "worse": "y"},
            {"prompt": "question", "chosen": "better", "rejected": "worse"},
            ["u:q a:x", "u:q a:y"],
            [0, 1],
            "u:q",
        ),
        (
            {"question": "q", "better": "x", "worse": "y"},
            {"prompt": "question", "winning_response": "better", "losing_response": "worse"},
            ["u:q a:x", "u:q a:y"],
            [0, 1],
            "u:q",
        ),
        (
            {"meta": {"q": "q"}, "answers": [{"text": "x"}, {"text": "y"}]},
            {"prompt": "{meta.q}", "chosen": "answers.0.text", "rejected": "answers.1.text"},
            ["u:q a:x", "u:q a:y"],
            [0, 1],
            "u:q",
        ),
        (ranked("q", "x", "y", "z"), {}, ["u:q a:x", "u:q a:y", "u:q a:z"], [0, 1, 2], "u:q"),
        (
            ranked("q", ["x", "y"], "z", ["v", "w"]),
            {},
            ["u:q a:x", "u:q a:y", "u:q a:z", "u:q a:v", "u:q a:w"],
            [0, 0, 1, 2, 2],
            "u:q",
        ),
        ({"q": {"all": ["x", ["y"]]}, "prompt": "q"}, {"responses": "q.all"}, ["u:q a:x", "u:q a:y"], [0, 1], "u:q"),
        (
            pair([{"role": "system", "content": "s"}, {"role": "user", "content": "q"}], "x", "y"),
            {},
            ["s:s u:q a:x", "s:s u:q a:y"],
            [0, 1],
            "s:s u:q",
        ),
        (hh("u:q a:x", "u:q a:y"), {}, ["u:q a:x", "u:q a:y"], [0, 1], "u:q"),
        (hh("u:q a:r u:s a:x", "u:q a:r u:s a:y"), {}, ["u:q a:r u:s a:x", "u:q a:r u:s a:y"], [0, 1], "u:q a:r u:s"),
        # They part before the last turn.
        (hh("u:q a:r u:s a:x", "u:q a:t u:s a:x"), {}, ["u:q a:r u:s a:x", "u:q a:t u:s a:x"], [0, 1], "u:q"),
        (hh("u:q a:r u:s a:x", "u:q a:r"), {}, ["u:q a:r u:s a:x", "u:q a:r"], [0, 1], "u:q"),
        (hh("u:q a:r u:s a:x", "u:q a:r u:t a:y"), {}, ["u:q a:r u:s a:x", "u:q a:r u:t a:y"], [0, 1], "u:q a:r"),
    ],
)
def test_every_form_of_a_record(fields, mapping, talks, ranks, prompt):
    found = read(fields, mapping)
    assert found.conversations == [turns(talk) for talk in talks]
    assert (found.ranks, found.margin, found.prompt) == (ranks, 0.0, hashable(prompt))


def test_text_that_looks_like_a_turn_within_a_transcript_line_is_text():
    found = read(
        {"chosen": "\n\nHuman: Human: a\nb\n\nAssistant: x\n\n y ", "rejected": "\n\nHuman: Human: a\nb\n\nAssistant:"}
    )
    assert found.conversations[0] == [Message("user", "Human: a\nb"), Message("assistant", "x\n\n y")]
    assert found.conversations[1][-1] == Message("assistant", "")


@pytest.mark.parametrize(
    ("fields", "mapping", "margin"),
    [({"margin": 2}, {}, 2.0), ({"margin": -0.5}, {}, -0.5), ({"gap": {"by": 1.5}}, {"margin": "gap.by"}, 1.5)],
)
def test_the_margin_is_read(fields, mapping, margin):
    assert read(pair("q", "x", "y") | fields, mapping).margin == margin


@pytest.mark.parametrize(
    ("fields", "mapping", "message"),
    [
        ({"prompt": "q", "chosen": "x"}, {}, r"no field 'rejected' \(there are: prompt, chosen\)"),
        ({"prompt": "q", "winning_response": "x"}, {}, "no field 'rejected'"),
        ({"prompt": "q"}, {}, "no field 'chosen'"),
        (pair("q", "x", "y"), {"prompt": "question"}, "no field 'question'"),
        (pair("q", "x", "y"), {"responses": "answers"}, "no field 'answers'"),
        (pair("q", "x", "y"), {"margin": "gap"}, "no field 'gap'"),
        (pair("q", "x", 3), {}, "the field 'rejected' must be str, not int"),
        (pair(3, "x", "y"), {}, "the field 'prompt' must be a text or a list of messages, not int"),
        (pair(" ", "x", "y"), {}, "the prompt is empty"),
        ({"prompt": "q", "responses": "xy"}, {}, "the field 'responses' must be list, not str"),
        (ranked("q", "x", 3), {}, "every response must be a string, not int"),
        (ranked("q", "x", ["y", ["z"]]), {}, "every response must be a string, not list"),
        (ranked("q", "x", []), {}, "a list of responses that tie is empty"),
        (ranked("q", "x"), {}, "a preference needs at least two responses, not 1"),
        (ranked("q"), {}, "a preference needs at least two responses, not 0"),
        (pair("q", "x", "x"), {}, "two responses are equal, so that neither can be better"),
        (pair("q", "x", " x\n"), {}, "two responses are equal"),  # templates may trim
        (ranked("q", "x", ["y", "z"], "y"), {}, "two responses are equal"),
        (hh("u:q a:x", "u:q a:x"), {}, "two responses are equal"),
        (
            {"chosen": "\n\nHuman: q\n\nAssistant: x", "rejected": "\n\nHuman:  q\n\nAssistant: x"},
            {},
            "two .* are equal",
        ),
        (pair("q", "x", "\ud83d"), {}, "a response has half a surrogate pair at character 0"),
        (pair("q", "x", "y", margin="1"), {}, "the field 'margin' must be a number, not str"),
        (pair("q", "x", "y", margin=True), {}, "the field 'margin' must be a number, not bool"),
        (pair("q", "x", "y", margin=float("nan")), {}, "the field 'margin' must be a finite number, not nan"),
        (pair("q", "x", "y", margin=1e39), {}, r"the field 'margin' must be a finite number, not 1e\+39"),
        (pair("q", "x", "y", margin=10**400), {}, "the field 'margin' must be a finite number, not 1000"),
        ({"chosen": "x", "rejected": "y"}, {}, r"without a field 'prompt' a response must be a transcript that begins"),
        (hh("a:q a:x", "a:q a:y"), {}, r"a transcript that begins with '\\n\\nHuman:'"),
        (hh("u:q a:x u:s", "u:q a:y"), {}, "a transcript must end with a turn of the Assistant"),
        (hh("u:q a:x", "u:p a:y"), {}, "the transcripts have no turn in common"),
        (hh("u:q a:x u:s a:y", "u:p a:x u:s a:y"), {}, "the transcripts have no turn in common"),
    ],
)
def test_a_bad_record_is_an_error_with_file_and_line(fields, mapping, message):
    with pytest.raises(ValueError, match=rf"^pairs\.jsonl, line 7: .*{message}"):
        read(fields, mapping)


def test_errors_of_a_file_name_its_path_and_line(tmp_path):
    records = [pair("q", "x", "y"), pair("q", "x", "x")]
    with pytest.raises(ValueError, match=rf"^{tmp_path}/pairs.jsonl, line 2: two responses are equal"):
        tokenize(tmp_path, records)
    last = {"prompt": [{"role": "user", "content": "q"}] * 2, "chosen": "x", "rejected": "y"}
    path = write(tmp_path / "talks.jsonl", [records[0], last])
    gemma = ChatTemplate.from_config("gemma")
    with pytest.raises(ValueError, match=rf"^{path}, line 2: Chat template gemma.*must alternate"):
        tokenize_preferences([path], tokenizer(), gemma, LONG, "drop", "all", str(tmp_path / "cache"))


def test_rows_by_hand(tmp_path):
    rows = tokenize(tmp_path, [pair("q", "x", "yz", margin=0.25), ranked("p", ["a", "b"], "c")], SHORT)
    bos, user, answer, end = (tokenizer().special_ids[n] for n in ("<bos>", "<|user|>", "<|assistant|>", "<|end|>"))
    q, x, y, z, p, a, b, c = spelled("qxyzpabc")[0]
    assert (len(rows), rows.num_candidates, rows.max_candidates) == (2, 3, 3)
    first = rows[0]
    assert first["tokens_BCT"].tolist() == [
        [bos, user, q, end, answer, x, end, PAD, PAD],
        [bos, user, q, end, answer, y, z, end, PAD],
        [PAD] * 9,
    ]
    assert first["targets_BCT"].tolist() == [
        [user, q, end, answer, x, end, PAD, PAD, PAD],
        [user, q, end, answer, y, z, end, PAD, PAD],
        [PAD] * 9,
    ]
    assert first["weights_BCT"].tolist() == [[0, 0, 0, 0, 1, 1, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1, 0, 0], [0] * 9]
    assert first["segments_BCT"].tolist() == [[1] * 7 + [0] * 2, [1] * 8 + [0], [0] * 9]
    assert (first["ranks_BC"].tolist(), float(first["margins_B"])) == ([0, 1, -1], 0.25)
    second = rows[1]
    assert second["tokens_BCT"][:, :7].tolist() == [[bos, user, p, end, answer, r, end] for r in (a, b, c)]
    assert (second["ranks_BC"].tolist(), float(second["margins_B"])) == ([0, 0, 1], 0.0)


def test_rows_and_the_empty_row_have_the_types_of_a_batch(tmp_path):
    rows = tokenize(tmp_path, [pair("q", "x", "y")])
    expected = dict.fromkeys(("tokens_BCT", "targets_BCT", "segments_BCT"), ((2, 32), np.int32))
    expected |= {"weights_BCT": ((2, 32), np.float32), "ranks_BC": ((2,), np.int32), "margins_B": ((), np.float32)}
    empty = rows.empty_row()
    for row in (rows[0], empty):
        assert {name: (value.shape, value.dtype) for name, value in row.items()} == expected
    assert empty["ranks_BC"].tolist() == [-1, -1]
    assert not any(empty[name].any() for name in ("segments_BCT", "weights_BCT", "margins_B"))
    logprobs = np.array([[-1.5, -2.5]], np.float32)
    rows = dataclasses.replace(rows, reference_logprobs_GC=logprobs)
    assert rows[0]["reference_logprobs_BC"].tolist() == [-1.5, -2.5]
    assert rows.empty_row()["reference_logprobs_BC"].tolist() == [0, 0]
    (batch,) = batches.eval_batches(rows, batch_size=2, rows=slice(None), batch_type=PairBatch)
    assert batch.ranks_BC.tolist() == [[0, 1], [-1, -1]]
    assert batch.reference_logprobs_BC.tolist() == [[-1.5, -2.5], [0, 0]]


def test_trained_on_is_the_last_turn_of_a_transcript(tmp_path):
    rows = tokenize(tmp_path, [hh("u:q a:r u:s a:x", "u:q a:t")])
    assert examples(rows.source) == [
        spelled("<bos><|user|>q<|end|><|assistant|>r<|end|><|user|>s<|end|><|assistant|>«x<|end|>»"),
        spelled("<bos><|user|>q<|end|><|assistant|>«t<|end|>»"),
    ]
    assert rows.source.num_bytes == len("qrsx" + "qt")


FITS = pair("q", "abc", "d")  # 9 tokens and 7
LONGER = pair("q", "abcd", "e")  # 10 tokens and 7
LONG_PROMPT = pair("abcdefgh", "x", "y")  # 14 tokens each
FITTED = ["<bos><|user|>q<|end|><|assistant|>«abc<|end|>»", "<bos><|user|>q<|end|><|assistant|>«d<|end|>»"]


@pytest.mark.parametrize(
    ("too_long", "kept", "notes"),
    [
        ("drop", [], {"dropped, too long": 2}),
        (
            "truncate_left",
            [
                "<bos>q<|end|><|assistant|>«abcd<|end|>»",
                "<bos><|user|>q<|end|><|assistant|>«e<|end|>»",
                "<bos>efgh<|end|><|assistant|>«x<|end|>»",
                "<bos>efgh<|end|><|assistant|>«y<|end|>»",
            ],
            {"truncated": 2},
        ),
        (
            "truncate_right",
            ["<bos><|user|>q<|end|><|assistant|>«abcd»", "<bos><|user|>q<|end|><|assistant|>«e<|end|>»"],
            {"truncated": 1, "dropped, no response left": 1},
        ),
    ],
)
def test_a_row_takes_as_many_tokens_as_its_length_and_prompts_are_cut_or_dropped_whole(tmp_path, too_long, kept, notes):
    rows = tokenize(tmp_path, [FITS, LONGER, LONG_PROMPT], SHORT, too_long)
    assert examples(rows.source) == [spelled(text) for text in FITTED + kept]
    assert rows.source.notes == notes | {"prompts": 1 + len(kept) // 2}
    assert len(rows) == 1 + len(kept) // 2
    assert all(rows[i]["ranks_BC"].tolist() == [0, 1] for i in range(len(rows)))


def test_a_prompt_that_is_dropped_counts_once_and_for_nothing_else(tmp_path):
    # The first response is cut, the prompt of the others too long for them: the prompt is dropped.
    records = [FITS, ranked("abc", "x", "yz"), ranked("abcde", "x", "yz")]
    rows = tokenize(tmp_path, records, SHORT, "drop")
    assert rows.source.notes == {"prompts": 1, "dropped, too long": 2}


def test_responses_that_truncation_makes_equal_are_a_counted_drop(tmp_path):
    records = [FITS, pair("q", "abcdx", "abcdy"), pair("q", "xabcdefgh", "yabcdefgh")]
    for too_long, dropped in (("truncate_right", 1), ("truncate_left", 1)):
        rows = tokenize(tmp_path, records, SHORT, too_long)
        assert rows.source.notes == {"prompts": 2, "truncated": 1, "dropped, equal once truncated": dropped}


def test_an_empty_response_is_a_counted_drop(tmp_path):
    rows = tokenize(tmp_path, [FITS, pair("q", "x", " "), ranked("q", "", "x", "y")], SHORT)
    assert examples(rows.source) == [spelled(text) for text in FITTED]
    assert rows.source.notes == {"prompts": 1, "dropped, empty response": 2}


def test_where_everything_is_dropped_the_error_counts_what_and_names_the_length(tmp_path):
    with pytest.raises(ValueError, match=r"pairs.jsonl is left \(1 dropped, too long\); data.sequence_length=9\."):
        tokenize(tmp_path, [LONG_PROMPT], SHORT)
    config = dataclasses.replace(LONG, holdout=HoldoutConfig(fraction=1e-9))
    with pytest.raises(ValueError, match=r"left on the held-out side; data.holdout.fraction=1e-09 leaves none there"):
        tokenize(tmp_path, [FITS], config, split="held_out")


def test_a_prompt_is_on_one_side_in_every_kind_of_file(tmp_path):
    prompts = [f"q{i}" for i in range(60)]
    config = dataclasses.replace(LONG, holdout=HoldoutConfig(fraction=0.3))
    kinds = {
        "sft": [{"prompt": p, "response": r} for p in prompts for r in "xy"],
        "messages": [{"messages": [m._asdict() for m in turns(f"u:{p} a:x")]} for p in prompts],
        "pairs": [pair(p, "x", "y") for p in prompts] + [pair(p, "y", "z") for p in prompts],
        "ranked": [ranked(p, ["x", "y"], "z") for p in prompts],
        "hh": [hh(f"u:{p} a:x", f"u:{p} a:y") for p in prompts],
    }
    sides = {}
    for (kind, records), split in itertools.product(kinds.items(), ("train", "held_out")):
        path, cache = write(tmp_path / f"{kind}.jsonl", records), str(tmp_path / "cache")
        if kind in ("sft", "messages"):
            source = tokenize_conversations([path], tokenizer(), ROLES, config, SFTConfig(), split, cache)
        else:
            source = tokenize_preferences([path], tokenizer(), ROLES, config, "drop", split, cache).source
        sides[kind, split] = {tokenizer().decode(ids)[:-1] for ids, _ in examples(source)}
    assert sides["sft", "train"] | sides["sft", "held_out"] == set(prompts)
    assert not sides["sft", "train"] & sides["sft", "held_out"]
    for kind, split in sides:
        assert sides[kind, split] == sides["sft", split], kind


def test_a_second_run_reads_no_record_again_unless_something_that_matters_changed(tmp_path, monkeypatch):
    paths, read_records = [], conversations.sources.read_records
    monkeypatch.setattr(conversations.sources, "read_records", lambda path: paths.append(path) or read_records(path))
    first, second = (tokenize(tmp_path, [FITS, LONGER], SHORT) for _ in range(2))
    assert len(paths) == 1
    assert first.source == second.source
    assert [row.tolist() for row in (second[0]["tokens_BCT"], second[0]["ranks_BC"])] == [
        first[0]["tokens_BCT"].tolist(),
        [0, 1],
    ]
    changes = [{"too_long": "truncate_left"}, {"config": LONG}, {"split": "train"}, {"records": [FITS]}]
    sources = [
        tokenize(tmp_path, **({"records": [FITS, LONGER], "config": SHORT} | change)).source for change in changes
    ]
    assert len(paths) == 5
    assert len({source.key for source in [first.source, *sources]}) == 5


def test_an_interrupted_run_leaves_no_entry_behind(tmp_path, monkeypatch):
    seen = []

    def interrupted(self, *args, **kwargs):
        seen.append(1)
        if len(seen) == 3:  # the first prompt is written
            raise KeyboardInterrupt
        return encode(self, *args, **kwargs)

    encode = ChatTemplate.encode
    with monkeypatch.context() as patch:
        patch.setattr(ChatTemplate, "encode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tokenize(tmp_path, [FITS, FITS])
    assert not [entry for entry in (tmp_path / "cache").iterdir() if entry.is_dir()]
    assert len(tokenize(tmp_path, [FITS, FITS])) == 2


def mixture(folder, **kwargs):
    """Pairs and rankings of four, with a held-out share of each."""
    few = write(folder / "few.jsonl", [pair(f"p{i}", "x", "y") for i in range(20)])
    many = write(folder / "many.jsonl", [ranked(f"r{i}", "w", ["x", "y"], "z") for i in range(20)])
    train = {"few": SourceConfig(few, 1.0), "many": SourceConfig(many, 2.0)}
    config = dataclasses.replace(LONG, train=train, holdout=HoldoutConfig(fraction=0.3), **kwargs)
    return build_preferences(config, tokenizer(), ROLES, "drop", str(folder / "cache"))


def test_sources_of_one_run_share_the_number_of_candidates(tmp_path):
    data = mixture(tmp_path)
    plans = {"few": data.train["few"][0], "many": data.train["many"][0]}
    assert [weight for _, weight in data.train.values()] == [1.0, 2.0]
    for side in (plans, data.eval):
        assert [side[name].num_candidates for name in ("few", "many")] == [4, 4]
        assert side["few"][0]["ranks_BC"].tolist() == [0, 1, -1, -1]
        assert side["many"][0]["ranks_BC"].tolist() == [0, 1, 1, 2]
        assert side["few"].empty_row()["tokens_BCT"].shape == (4, 32)
    for name, plan in plans.items():
        assert data.stats[f"train/{name}"]["rows"] == data.stats[f"train/{name}"]["prompts"] == len(plan)
        assert len(plan) + len(data.eval[name]) == 20


def test_worker_processes_read_the_same_batches(tmp_path):
    data = mixture(tmp_path)
    some = {"batch_size": 4, "seed": 0, "rows": slice(None), "batch_type": PairBatch}
    here = list(itertools.islice(batches.train_batches(data.train, **some), 3))
    workers = batches.train_batches(data.train, **some, num_workers=1)
    there = list(itertools.islice(workers, 3))
    workers.close()
    for ours, theirs in zip(here, there, strict=True):
        for field in ("tokens_BCT", "targets_BCT", "weights_BCT", "segments_BCT", "ranks_BC", "margins_B"):
            np.testing.assert_array_equal(getattr(theirs, field), getattr(ours, field))


def test_pickled_rows_map_the_files_instead_of_carrying_them(tmp_path):
    rows = tokenize(tmp_path, [pair(f"p{i}", "x", "y", margin=i) for i in range(300)])
    first = rows[7]  # everything is mapped now
    pickled = pickle.dumps(rows)
    assert len(pickled) < 1200
    again = pickle.loads(pickled)
    for name, value in again[7].items():
        np.testing.assert_array_equal(value, first[name])
    assert float(again[7]["margins_B"]) == 7
