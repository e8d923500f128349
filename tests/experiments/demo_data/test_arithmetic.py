"""Sums for a verifier: right answers where they count, careless ones where they are shown."""

import json
import random

import pytest

from experiments.demo_data.arithmetic import careless_sum, write_arithmetic


def read(folder, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def test_files_hold_every_sum_once_and_right_answers_where_a_verifier_looks(tmp_path):
    sizes = write_arithmetic(str(tmp_path), largest=19, forget_carry=0.5, heldout_fraction=0.1, seed=0)
    assert sizes == {"corpus": 360, "sft_train": 360, "rl_train": 360, "eval": 40}
    train, shown, held_out = (read(tmp_path, name) for name in ("rl_train", "sft_train", "eval"))
    assert len({row["prompt"] for row in train + held_out}) == 400
    for row in train + held_out:
        assert str(eval(row["prompt"].rstrip("="))) == row["answer"]
    assert [row["prompt"] for row in shown] == [row["prompt"] for row in train]
    assert [row["text"] for row in read(tmp_path, "corpus")] == [row["prompt"] + row["answer"] for row in train]
    wrong = [row for row, right in zip(shown, train, strict=True) if row["response"] != right["answer"]]
    carries = [row for row in shown if sum(int(n) % 10 for n in row["prompt"][:-1].split("+")) >= 10]
    assert 0.35 < len(wrong) / len(carries) < 0.65
    assert write_arithmetic(str(tmp_path), largest=19, forget_carry=0.5, heldout_fraction=0.1, seed=0) == sizes
    assert read(tmp_path, "sft_train") == shown


@pytest.mark.parametrize(
    ("a", "b", "forgotten"), [(27, 58, 75), (60, 70, 30), (99, 99, 88), (12, 34, 46), (0, 0, 0), (5, 95, 90), (8, 3, 1)]
)
def test_a_forgotten_carry_is_missing_and_a_remembered_one_is_not(a, b, forgotten):
    assert careless_sum(a, b, 1.0, random.Random(0)) == forgotten
    assert careless_sum(a, b, 0.0, random.Random(0)) == a + b


@pytest.mark.parametrize(
    ("fields", "word"), [({"heldout_fraction": 0.0}, "heldout_fraction"), ({"forget_carry": 2.0}, "forget")]
)
def test_numbers_out_of_range_are_refused(tmp_path, fields, word):
    with pytest.raises(ValueError, match=word):
        write_arithmetic(
            str(tmp_path), **{"largest": 9, "forget_carry": 0.5, "heldout_fraction": 0.1, "seed": 0, **fields}
        )
