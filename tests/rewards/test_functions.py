"""Rewards: right answers are told from wrong ones, and a bad function or record ends in a sentence that says where."""

import dataclasses
import json
import re
import sys
from decimal import Decimal
from fractions import Fraction

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgpt import config
from jaxgpt.rewards import functions
from jaxgpt.rewards.final_number import final_number
from jaxgpt.rewards.functions import RewardSource, combine
from jaxgpt.rewards.verifiers import token_f1


def score(name, response, record, **options):
    """What one shipped reward gives one response."""
    out = combine([RewardSource(name, options=options)])(["q"], [response], [record], ["p.jsonl, line 1"])
    assert out.total_B.dtype == np.float32
    assert out.total_B.tolist() == out.by_source[name].tolist()
    return out.total_B.item()


WORKED = "She eats 3 a day, so 7 * 3 = <<7*3=21>>21 in a week.\n#### 21"
ANSWERS = [  # response, the record's answer, reward
    (WORKED, WORKED, 1),
    ("#### 21", "21", 1),
    ("The answer is 21.", WORKED, 1),
    ("21 apples, which is not 22", WORKED, 0),
    ("#### 22\nbecause 3 * 7 = 21", WORKED, 0),
    ("#### 20\nno:\n#### 21", WORKED, 1),
    ("####21", WORKED, 1),
    ("#### **$21.00**, not 22", WORKED, 1),
    ("#### Step 1\nwe multiply.\n#### Step 2\nso it is 21", WORKED, 1),
    ("so 21\n####", WORKED, 1),
    ("#### $1,234,567", "1234567", 1),
    ("1,234.50 dollars", 1234.5, 1),
    ("1234.5000", "#### 1,234.50", 1),
    ("1.2345", "#### 12,345", 0),
    ("the sum of 1,2,3", 3, 0),
    ("the sum of 1, 2, 3", 3, 1),
    ("-5", "#### -5", 1),
    ("\u22125", -5, 1),
    ("-$5", -5, 1),
    ("5", "#### -5", 0),
    ("2-5", 5, 0),
    ("2 - 5 = -3", -3, 1),
    ("x2", 2, 0),
    ("it takes 18 m2", 18, 1),
    ("1,2345", 1234, 0),
    ("3/4.5", 4.5, 0),
    (r"\frac{1}{2}", 2, 0),
    ("2^{10}", 10, 0),
    ("1 000", 0, 0),
    ("1/0", 0, 0),
    ("0.75", "3/4", 1),
    ("6/8 of it", 0.75, 1),
    ("1/3", "0.33", 0),
    ("2 1/2 hours", 2.5, 1),
    ("-1/2", -0.5, 1),
    (".5", 0.5, 1),
    ("5e-7", 5e-7, 1),
    ("0.1", "0.10", 1),
    ("0.1000000000000000055511151231257827", 0.1, 0),
    ("", 0, 0),
    ("nothing", 0, 0),
    ("9" * 100_000, 9, 0),
]


@pytest.mark.parametrize(("response", "answer", "wanted"), ANSWERS)
def test_a_final_number_is_read_as_a_person_would(response, answer, wanted):
    assert score("numeric_answer", response, {"answer": answer}) == wanted


def test_numbers_may_be_held_to_the_mark_or_to_a_tolerance():
    assert score("numeric_answer", "It is 21", {"answer": 21}, marked_only=True) == 0
    assert score("numeric_answer", "It is #### 21", {"answer": 21}, marked_only=True) == 1
    assert score("numeric_answer", "0.33", {"answer": "1/3"}, tolerance=0.01) == 1
    assert score("numeric_answer", "0.32", {"answer": "1/3"}, tolerance=0.01) == 0


@given(st.decimals(allow_nan=False, allow_infinity=False, min_value=-(10**12), max_value=10**12, places=4))
@settings(deadline=None)
def test_every_decimal_comes_back_exactly(number):
    assert isinstance(number, Decimal)
    for text in (f"{number:f}", f"{number:,f}"):
        assert final_number(f"7 and then {text}.") == Fraction(number)
        assert final_number(f"#### {text} and 7") == Fraction(number)


MATH = [  # response, the record's answer, reward
    (r"so \boxed{\frac12}", r"\frac{1}{2}", 1),
    (r"so \boxed{\frac12}", r"$\frac{3}{4}$", 0),
    ("the answer is 0.5", r"\frac{1}{2}", 1),
    ("4", r"\frac{3}{4}", 0),
    (r"\boxed{1024}", "2^{10}", 1),
    (r"\boxed{10}", "2^{10}", 0),
    (r"It is $(x+1)^2$.", "x^2 + 2x + 1", 1),
    (r"It is $(x-1)^2$.", "x^2 + 2x + 1", 0),
    (r"\boxed{\{2, 1\}}", r"\{1, 2\}", 1),
    (r"\boxed{[0, 1]}", "[0,1)", 0),
    (r"\boxed{3\sqrt{2}}", r"\sqrt{18}", 1),
    ("21 apples", WORKED, 1),
    ("no idea", "42", 0),
    ("", "42", 0),
]


@pytest.mark.parametrize(("response", "answer", "wanted"), MATH)
def test_a_math_answer_is_compared_as_mathematics(response, answer, wanted):
    pytest.importorskip("math_verify")
    assert score("math_answer", response, {"answer": answer}) == wanted


def test_a_math_answer_needs_a_reference_and_its_package(monkeypatch):
    pytest.importorskip("math_verify")
    with pytest.raises(
        ValueError, match=r"p\.jsonl, line 1.*finds no mathematics in the record's answer 'none at all'"
    ):
        score("math_answer", "4", {"answer": "none at all"})
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ValueError, match=r"pip install -e '\.\[math\]'"):
        score("math_answer", "4", {"answer": "4"})


def test_exact_match_normalizes_what_it_is_told_to():
    assert score("exact_match", "  New \n York ", {"answer": "New York"}) == 1
    assert score("exact_match", "NewYork", {"answer": "New York"}) == 0
    assert score("exact_match", "new york", {"answer": "New York"}) == 0
    assert score("exact_match", "new york", {"answer": "New York"}, ignore_case=True) == 1
    assert score("exact_match", "New York!", {"answer": "New York"}) == 0
    assert score("exact_match", "New York!", {"answer": "New York"}, ignore_punctuation=True) == 1


def test_the_reference_is_the_named_field_or_answer_or_reference():
    record = {"answer": "a", "reference": "r", "label": 7, "all": ["x", "y"]}
    assert [score("exact_match", text, record) for text in ("a", "r")] == [1, 0]
    assert score("exact_match", "r", {"reference": "r"}) == 1
    assert score("exact_match", "7", record, field="label") == 1
    assert [score("exact_match", text, record, field="all") for text in ("x", "y", "z")] == [1, 1, 0]
    assert score("token_f1", "y", record, field="all") == 1
    assert score("numeric_answer", "4", {"answer": ["3", "4"]}) == 1


def test_regex_matches_the_whole_or_a_part():
    pattern = r"(?s)<think>.*</think>\s*\d+"
    assert score("regex", " <think>a\nb</think> 12\n", {}, pattern=pattern) == 1
    assert score("regex", "so <think>a</think> 12", {}, pattern=pattern) == 0
    assert score("regex", "so <think>a</think> 12", {}, pattern=pattern, method="search") == 1


def test_length_is_a_distance_in_words_or_a_bonus_within_bounds():
    texts = ["", "one", "one\ttwo\n three", "1 2 3 4 5 6"]
    assert [score("length", text, {}, target=3) for text in texts] == [-3, -2, 0, -3]
    assert [score("length", text, {}, minimum=1, maximum=3) for text in texts] == [0, 1, 1, 0]
    assert [score("length", text, {}, minimum=2) for text in texts] == [0, 0, 1, 1]
    assert [score("length", text, {}, maximum=0) for text in texts] == [1, 0, 0, 0]


F1 = [  # by hand: twice the common words over all words, without articles, case and punctuation
    ("The cat sat.", "a cat sat down", 2 * 2 / 5),
    ("cat cat", "cat", 2 * 1 / 3),
    ("cat cat dog", "dog cat cat cat", 2 * 3 / 7),
    ("Return the length.", "return length", 1),
    ("other words", "return length", 0),
    ("", "", 1),
    ("the", "!", 1),
    ("", "word", 0),
    ("don't", "dont", 1),
]


@pytest.mark.parametrize(("response", "reference", "wanted"), F1)
def test_token_f1_of_pairs_done_by_hand(response, reference, wanted):
    assert token_f1(response, reference) == pytest.approx(wanted, abs=1e-12)
    assert score("token_f1", response, {"reference": reference}) == pytest.approx(wanted, abs=1e-6)


WORDS = st.lists(st.sampled_from(["one", "two", "two", "three", "four"]), max_size=8)


@given(WORDS, WORDS)
def test_token_f1_is_the_harmonic_mean_of_precision_and_recall(left, right):
    rest, common = list(right), 0
    for word in left:
        if word in rest:
            rest.remove(word)
            common += 1
    wanted = float(left == right)
    if common:
        precision, recall = common / len(left), common / len(right)
        wanted = 2 / (1 / precision + 1 / recall)
    assert token_f1(" ".join(left), " ".join(right)) == pytest.approx(wanted)


@given(st.text(), st.text())
def test_token_f1_of_any_texts_is_symmetric_and_between_0_and_1(left, right):
    assert 0 <= token_f1(left, right) <= 1
    assert token_f1(left, right) == token_f1(right, left)
    assert token_f1(left, left) == 1
    assert token_f1(left.split("\n")[0], left) <= 1


def user_file(folder, code, name="mine.py"):
    (folder / name).write_text(code)
    return str(folder / name)


RECORDS = [{"prompt": p, "answer": a} for p, a in (("p0", "x y"), ("p1", "y"), ("p2", "z"), ("p3", "x"))]
PROMPTS = [record["prompt"] for record in RECORDS]
WHERE = [f"data/a.jsonl, line {n}" for n in (2, 3, 5, 8)]
RESPONSES = ["x y", "x y", "z z", ""]


def test_sources_add_up_by_weight_and_are_reported_without_it(tmp_path):
    code = """
def bonus(prompts, responses, records, scale=1.0):
    assert all(record["prompt"] == prompt for prompt, record in zip(prompts, records))
    return [scale * len(response) for response in responses]
"""
    sources = [
        RewardSource("exact_match"),
        RewardSource("length", weight=-0.5, options={"target": 1}),
        RewardSource("token_f1", weight=0.0),
        RewardSource(f"{user_file(tmp_path, code)}:bonus", weight=2.0, options={"scale": 10.0}),
        RewardSource("length", options={"minimum": 1}),
    ]
    wanted = {
        "exact_match": [1, 0, 0, 0],
        "length": [-1, -1, -1, -1],
        "token_f1": [1, 2 / 3, 2 / 3, 0],
        "bonus": [30, 30, 30, 0],
        "length_2": [1, 1, 1, 0],
    }
    out = combine(sources)(PROMPTS, RESPONSES, RECORDS, WHERE)
    assert list(out.by_source) == list(wanted)
    for name, values in wanted.items():
        np.testing.assert_allclose(out.by_source[name], values, rtol=1e-6)
        assert out.by_source[name].dtype == np.float32
    np.testing.assert_allclose(out.total_B, [62.5, 61.5, 61.5, 0.5])
    named = combine({"a": sources[0], "b": sources[1]})(PROMPTS, RESPONSES, RECORDS, WHERE)
    assert {name: values.tolist() for name, values in named.by_source.items()} == {
        "a": [1, 0, 0, 0],
        "b": [-1, -1, -1, -1],
    }
    np.testing.assert_allclose(named.total_B, [1.5, 0.5, 0.5, 0.5])


def test_a_users_function_cannot_change_the_records(tmp_path):
    code = "def f(p, r, records):\n    return [len(record.pop('answer')) for record in records]\n"
    before = json.dumps(RECORDS)
    reward = combine([RewardSource(f"{user_file(tmp_path, code)}:f")])
    for _ in range(2):
        assert reward(PROMPTS, RESPONSES, RECORDS, WHERE).total_B.tolist() == [3, 1, 1, 1]
    assert json.dumps(RECORDS) == before


def test_a_users_file_may_hold_dataclasses_and_change_between_runs(tmp_path):
    head = "from __future__ import annotations\nimport dataclasses\n@dataclasses.dataclass\nclass A:\n    x: int = 0\n"
    for value in (1, 2):
        path = user_file(tmp_path, f"{head}def f(p, r, records):\n    return [{value}] * len(p)\n")
        reward = combine([RewardSource(f"{path}:f")])
        assert reward(PROMPTS, RESPONSES, RECORDS, WHERE).total_B.tolist() == [value] * 4
    assert [p.name for p in tmp_path.iterdir()] == ["mine.py"]


VALUES = [
    [True, False, np.True_, 2],
    (np.float32(1), np.int64(0), Fraction(1), Decimal("2")),
    np.array([1, 0, 1, 2]),
    jnp.array([1, 0, 1, 2], jnp.bfloat16),
]


@pytest.mark.parametrize("values", VALUES, ids=["bool", "mixed", "numpy", "jax"])
def test_every_kind_of_number_will_do(monkeypatch, values):
    monkeypatch.setattr(functions, "load", lambda source: lambda p, r, records: values)
    out = combine([RewardSource("mine.py:f")])(PROMPTS, RESPONSES, RECORDS, WHERE)
    assert out.total_B.tolist() == [1, 0, 1, 2]


BAD_VALUES = [
    ("[1.0, float('nan'), 0.0, 0.0]", "returned nan for the prompt of data/a.jsonl, line 3;", "'x y'"),
    ("[1.0, 0.0, 0.0, float('-inf')]", "returned -inf for the prompt of data/a.jsonl, line 8;", "''"),
    ("[1.0, '2', 0.0, 0.0]", "returned '2' for the prompt of data/a.jsonl, line 3;", "finite number"),
    ("[1.0, 0.0, None, 0.0]", "returned None for the prompt of data/a.jsonl, line 5;", "'z z'"),
    ("[1.0, 0.0, [0.5], 0.0]", "returned [0.5] for the prompt of data/a.jsonl, line 5;", "finite number"),
    ("[1.0, 1j, 0.0, 0.0]", "returned 1j for the prompt of data/a.jsonl, line 3;", "finite number"),
    ("[10 ** 400, 1.0, 0.0, 0.0]", "for the prompt of data/a.jsonl, line 2;", "finite number"),
    ("[1e39, 1.0, 0.0, 0.0]", "returned 1e+39 for the prompt of data/a.jsonl, line 2;", "finite number"),
    ("[1.0, 2.0, 3.0]", "returned 3 values for 4 responses", "data/a.jsonl, line 2 to data/a.jsonl, line 8"),
    ("[]", "returned 0 values for 4 responses", "data/a.jsonl, line 8"),
    ("None", "returned NoneType for the prompts of data/a.jsonl, line 2", "4 numbers"),
    ("1.0", "returned float for", "4 numbers"),
    ("'1234'", "returned str for", "4 numbers"),
    ("dict.fromkeys([1, 2, 3, 4])", "returned dict for", "4 numbers"),
    ("(x for x in [1, 2, 3, 4])", "returned generator for", "4 numbers"),
]


@pytest.mark.parametrize(("expression", "message", "detail"), BAD_VALUES)
def test_a_bad_result_names_the_function_and_the_prompt(tmp_path, expression, message, detail):
    name = f"{user_file(tmp_path, f'def f(p, r, records):{chr(10)}    return {expression}{chr(10)}')}:f"
    with pytest.raises(ValueError, match="The reward function") as caught:
        combine([RewardSource(name)])(PROMPTS, RESPONSES, RECORDS, WHERE)
    for part in (f"The reward function {name} ", message, detail):
        assert part in str(caught.value)


@pytest.mark.parametrize("bad", range(4))
def test_a_function_that_raises_names_the_prompt_and_its_own_line(tmp_path, bad):
    code = f"""
def helper(record):
    return 1 / (record["prompt"] != "p{bad}")

def f(prompts, responses, records):
    return [helper(record) for record in records]
"""
    path = user_file(tmp_path, code)
    with pytest.raises(ValueError, match="The reward function") as caught:
        combine([RewardSource(f"{path}:f")])(PROMPTS, RESPONSES, RECORDS, WHERE)
    assert str(caught.value) == (
        f"The reward function {path}:f failed for the prompt of {WHERE[bad]}: ZeroDivisionError: division by zero "
        f"({path}, line 3)."
    )
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_a_function_that_raises_for_a_batch_alone_names_the_batch(tmp_path):
    path = user_file(tmp_path, "def f(p, r, records):\n    return [] if len(p) == 1 else p[99]\n")
    message = (
        "failed for the prompts of data/a.jsonl, line 2 to data/a.jsonl, line 8, but for none of them alone: Index"
    )
    with pytest.raises(ValueError, match=message):
        combine([RewardSource(f"{path}:f")])(PROMPTS, RESPONSES, RECORDS, WHERE)


def test_a_sum_too_large_for_f32_is_refused():
    sources = [RewardSource("length", weight=w, options={"maximum": 9}) for w in (3e38, 3e38)]
    with pytest.raises(
        ValueError, match="weighted sum of the rewards is 6e\\+38 for the prompt of data/a.jsonl, line 2"
    ):
        combine(sources)(PROMPTS, RESPONSES, RECORDS, WHERE)


BAD_RECORDS = [
    ("exact_match", {}, {"anser": "x"}, "no field 'answer' or 'reference' (there are: anser); the nearest is 'anser'"),
    ("token_f1", {"field": "gold"}, {"answer": "x"}, "no field 'gold' (there are: answer)"),
    ("exact_match", {}, {"answer": None}, "field 'answer' must be a text, a number or a list of them, not None"),
    ("exact_match", {}, {"answer": True}, "not True"),
    ("exact_match", {}, {"answer": []}, "not []"),
    ("numeric_answer", {}, {"answer": "none"}, "the record's answer 'none' does not end in a plain number"),
    ("numeric_answer", {}, {"answer": float("nan")}, "the record's answer 'nan' does not end in a plain number"),
    ("numeric_answer", {}, {"answer": r"\frac{3}{4}"}, "does not end in a plain number"),
]


@pytest.mark.parametrize(("name", "options", "record", "message"), BAD_RECORDS)
def test_a_record_without_what_a_reward_needs_is_named(name, options, record, message):
    good = {"answer": "1", "gold": "1"}
    sources = [RewardSource(name, options=options)]
    for check in (
        lambda records, where: combine(sources)(["q"] * 3, ["r"] * 3, records, where),
        lambda records, where: functions.check_records(sources, records, where),
    ):
        with pytest.raises(
            ValueError, match=f"The reward function {name} failed for the prompt of b, line 2: "
        ) as caught:
            check([good, record, good], ["a, line 1", "b, line 2", "c, line 3"])
        assert message in str(caught.value)
    functions.check_records(sources, [good, good], ["a, line 1", "a, line 2"])


BAD_SOURCES = [
    ((), "There is no reward ''; the nearest is"),
    (("exct_match",), "no reward 'exct_match'; the nearest is 'exact_match'"),
    (("mine.py",), "path/to/file.py:function"),
    (("regex", float("nan")), "weight of the reward 'regex' must be a finite number, not nan"),
    (("exact_match", 1.0, {"feild": "a"}), "exact_match.options.feild; the nearest field is exact_match.options.field"),
    (("regex",), "regex.options.pattern is empty"),
    (("regex", 1.0, {"pattern": "a("}), "regex.options.pattern='a(' is not a regular expression: missing )"),
    (
        ("regex", 1.0, {"pattern": "a", "method": "match"}),
        "regex.options.method='match' is not one of fullmatch, search",
    ),
    (("length",), "either a target or a minimum and maximum"),
    (("length", 1.0, {"target": 1, "minimum": 1}), "either a target or a minimum and maximum"),
    (("length", 1.0, {"target": -1}), "length.options.target must not be negative, not -1"),
    (("length", 1.0, {"minimum": 3, "maximum": 2}), "length.options.minimum=3 is above length.options.maximum=2"),
    (("length", 1.0, {"target": 1.5}), "length.options.target must be an integer, not 1.5"),
    (("numeric_answer", 1.0, {"tolerance": -1}), "numeric_answer.options.tolerance must be a number >= 0, not -1"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_SOURCES)
def test_a_bad_source_is_refused_at_construction(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        RewardSource(*arguments)


BAD_FILES = [
    ("def helpful(p, r, x):\n    return []\n", "helpfull", {}, "has no function 'helpfull'; the nearest is 'helpful'."),
    ("x = 1\n", "f", {}, "has no function 'f', nor any other."),
    ("f = 1\n", "f", {}, "has no function 'f', nor any other."),
    ("\ndef f(:\n", "f", {}, "mine.py, line 2: "),
    ("import json\n\njson.nothing\n", "f", {}, "AttributeError: module 'json' has no attribute 'nothing'"),
    ("def f(p, r):\n    return []\n", "f", {}, "function(prompts, responses, records): too many positional arguments."),
    (
        "def f(p, r, x):\n    return []\n", "f", {"scale": 2},
        "function(prompts, responses, records, scale=...): got an unexpected keyword argument 'scale'.",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("code", "function", "options", "message"), BAD_FILES)
def test_a_file_without_a_function_that_will_do_is_refused(tmp_path, code, function, options, message):
    path = user_file(tmp_path, code)
    with pytest.raises(ValueError, match="The reward") as caught:
        combine([RewardSource(f"{path}:{function}", options=options)])
    assert message in str(caught.value)
    assert path in str(caught.value)
    if "json" in code:
        assert f"({path}, line 3)" in str(caught.value)


def test_missing_files_and_missing_sources_are_named(tmp_path):
    with pytest.raises(ValueError, match="none.py cannot be read \\(No such file"):
        combine([RewardSource(f"{tmp_path}/none.py:f")])
    with pytest.raises(ValueError, match="There is no reward; at least one source"):
        combine([])


@dataclasses.dataclass(frozen=True)
class Outer:
    rewards: dict[str, RewardSource] | tuple[RewardSource, ...] = ()


def test_sources_come_from_a_config_and_its_flags():
    hint = dict[str, RewardSource]
    values = {"rewards": {"short": {"name": "length", "options": {"target": 9}}}}
    config.override(values, Outer, "rewards.short.options.target", "50")
    config.override(values, Outer, "rewards.short.weight", "0.5")
    assert config.build(Outer, values).rewards == {"short": RewardSource("length", 0.5, {"target": 50})}
    made = config.convert({"format": {"name": "regex", "weight": 2, "options": {"pattern": r"\d+"}}}, hint, "rewards")
    assert made == {"format": RewardSource("regex", 2.0, {"pattern": r"\d+"})}
    assert config.to_dict(made) == {"format": {"name": "regex", "weight": 2.0, "options": {"pattern": r"\d+"}}}
    with pytest.raises(ValueError, match="rewards.format.wait; the nearest field is rewards.format.weight"):
        config.convert({"format": {"name": "regex", "wait": 2}}, hint, "rewards")


@pytest.mark.parametrize("body", ["sys.exit(3)", "raise SystemExit", "exit()"])
def test_a_function_that_exits_is_a_function_that_fails(tmp_path, body):
    path = tmp_path / "mine.py"
    path.write_text(f"import sys\n\ndef score(prompts, responses, records):\n    {body}\n")
    rewards = combine([RewardSource(f"{path}:score")])
    with pytest.raises(
        ValueError, match=r"mine\.py:score failed for the prompt of a\.jsonl, line 1: SystemExit.*line 4"
    ):
        rewards(["p"], ["r"], [{}], ["a.jsonl, line 1"])
    path.write_text("import sys\nsys.exit(3)\n")
    with pytest.raises(ValueError, match=r"cannot be loaded: SystemExit: 3 .*line 2"):
        combine([RewardSource(f"{path}:score")])
