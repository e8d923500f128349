"""Sweeps as data: what is tried, and which stages the trials share."""

import collections
import math

import numpy as np
import pytest

from jaxgpt import config as config_lib
from jaxgpt.pipeline.graph import PipelineConfig
from jaxgpt.pipeline.sweep import RangeConfig, SweepConfig, assignments, plan, varied

STAGES = {
    "data": {"command": "make_data"},
    "pretrain": {"command": "pretrain", "fields": {"data": {"train": "@data/x.txt"}, "optimizer": {"b1": 0.9}}},
    "sft": {"command": "sft", "fields": {"init_from": "@pretrain", "data": {"train": "@data/y.jsonl"}}},
    "dpo": {"command": "dpo", "fields": {"init_from": "@sft"}},
}
LOSS = "sft.final_metrics.eval/loss"


def sweep(search: dict, **fields) -> SweepConfig:
    return config_lib.build(SweepConfig, {"pipeline": "p.py", "metric": LOSS, "search": search, **fields})


def planned(search: dict, **fields):
    pipeline = config_lib.build(PipelineConfig, {"stages": STAGES})
    return plan(sweep(search, **fields), pipeline, lambda spec: {"default": spec})


def test_a_grid_is_all_combinations_and_the_last_field_changes_fastest():
    nested = {"sft": {"optimizer": {"learning_rate": [1, 2]}}, "pretrain.seed": (0, 1, 2)}
    found = assignments(sweep(nested))
    assert [tuple(values.values()) for values in found] == [(1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2)]
    assert list(found[0]) == ["sft.optimizer.learning_rate", "pretrain.seed"]


def test_random_trials_stay_when_more_are_asked_for_and_change_with_the_seed():
    search = {
        "sft.lr": {"low": 1e-5, "high": 1e-1, "scale": "log"},
        "sft.seed": [0, 1],
        "sft.rank": {"low": 1, "high": 4},
    }
    ten = assignments(sweep(search, num_trials=10, seed=3))
    assert ten == assignments(sweep(search, num_trials=10, seed=3))
    assert ten == assignments(sweep(search, num_trials=20, seed=3))[:10]
    assert not any(values in ten for values in assignments(sweep(search, num_trials=10, seed=4)))
    assert len({values["sft.lr"] for values in ten}) == 10


def moments(values) -> tuple[float, float]:
    return float(np.mean(values)), float(np.std(values))


def test_draws_have_the_moments_of_their_distribution():
    rng = np.random.default_rng(0)
    linear = [RangeConfig(2.0, 6.0).draw(rng) for _ in range(4000)]
    logs = [math.log10(RangeConfig(1e-4, 1.0, "log").draw(rng)) for _ in range(4000)]
    for values, low, high in ((linear, 2, 6), (logs, -4, 0)):
        mean, std = moments(values)
        assert mean == pytest.approx((low + high) / 2, abs=0.1)
        assert std == pytest.approx((high - low) / math.sqrt(12), abs=0.05)
        assert low <= min(values) < low + 0.1
        assert high - 0.1 < max(values) <= high


def test_every_integer_is_as_likely_as_its_scale_says():
    rng = np.random.default_rng(0)
    counts = collections.Counter(RangeConfig(1, 4, integer=True).draw(rng) for _ in range(4000))
    assert set(counts) == {1, 2, 3, 4}
    assert all(isinstance(value, int) for value in counts)
    assert all(count == pytest.approx(1000, abs=120) for count in counts.values())
    logs = collections.Counter(RangeConfig(1, 4, "log", integer=True).draw(rng) for _ in range(9000))
    for k in range(1, 5):
        assert logs[k] == pytest.approx(9000 * math.log((k + 0.5) / (k - 0.5)) / math.log(9), abs=200)


def test_trials_share_the_stages_they_agree_in():
    trials = planned({"pretrain.optimizer.b2": [0.9, 0.99], "sft.optimizer.learning_rate": [1e-3, 1e-2]})
    assert [list(trial.runs) for trial in trials] == [["data", "pretrain", "sft"]] * 4
    folders = {name: [trial.runs[name].folder for trial in trials] for name in STAGES if name != "dpo"}
    assert len(set(folders["data"])) == 1
    first, second, third, fourth = folders["pretrain"]
    assert (first, third) == (second, fourth)
    assert first != third
    assert len(set(folders["sft"])) == 4
    assert all(name.startswith("sft-") for name in folders["sft"])
    assert [trial.last.folder for trial in trials] == folders["sft"]
    assert planned({"sft.optimizer.learning_rate": [1e-2], "pretrain.optimizer.b2": [0.99]})[0].runs == trials[3].runs


def test_a_value_is_put_into_the_fields_of_its_stage_and_nowhere_else():
    (trial,) = planned({"pretrain": {"optimizer": {"b2": [0.5]}, "model": {"rope": {"theta": [7]}}}})
    expected = {"data": {"train": "@data/x.txt"}, "optimizer": {"b1": 0.9, "b2": 0.5}, "model": {"rope": {"theta": 7}}}
    assert trial.runs["pretrain"].stage.fields == expected
    assert STAGES["pretrain"]["fields"]["optimizer"] == {"b1": 0.9}
    run = trial.runs["sft"]
    paths = {name: f"root/{folder}" for name, folder in run.folders.items()}
    assert f"--config.init_from=root/{trial.runs['pretrain'].folder}" in run.stage.flags(paths)


def test_what_a_stage_is_built_on_may_be_searched():
    trials = planned({"dpo.init_from": ["@sft", "@pretrain"]}, metric="dpo.final_metrics.eval/loss")
    assert [list(trial.runs) for trial in trials] == [["data", "pretrain", "sft", "dpo"], ["data", "pretrain", "dpo"]]


def test_one_value_for_all_is_not_varied_and_factors_of_ten_are_logarithmic():
    search = {
        "sft.a": [1e-4, 1e-3], "sft.b": [1, 2], "sft.c": ["x", "y"], "sft.d": [0.0, 1.0], "sft.e": [5], 
        "sft.f": [True, False], "sft.g": {"low": 1, "high": 2, "scale": "log"}, "sft.h": {"low": 1, "high": 100},
    }  # fmt: skip
    spans = varied(sweep(search, num_trials=1))
    assert spans == {f"sft.{name}": name in "ag" for name in "abcdfgh"}


LR = {"sft.lr": [1]}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"search": {}}, "search is empty"),
        ({"search": LR, "metric": "final"}, r"metric='final' is not STAGE\.PATH"),
        ({"search": LR, "pipeline": ""}, "pipeline is missing"),
        ({"search": {"sft.lr": []}}, r"search\.sft\.lr is an empty list"),
        ({"search": {"sft": {"lr": 3}}}, r"search\.sft\.lr must be a list .* not 3"),
        ({"search": {"sft": [3]}}, r"search\.sft is not STAGE\.FIELD"),
        ({"search": {"sft.lr": {"low": 2, "high": 1}}, "num_trials": 1}, r"search\.sft\.lr: .* low=2.0 and high=1.0"),
        (
            {"search": {"sft.lr": {"low": 0, "high": 1, "scale": "log"}}, "num_trials": 1},
            r"search\.sft\.lr: .* low > 0",
        ),
        ({"search": {"sft.lr": {"low": 0, "high": 1, "scale": "lg"}}, "num_trials": 1}, r"search\.sft\.lr\.scale='lg'"),
        ({"search": {"sft.lr": {"low": 0, "hihg": 1}}, "num_trials": 1}, r"search\.sft\.lr\.high is missing"),
        (
            {"search": {"sft.lr": {"low": 0, "high": 1.5, "integer": True}}, "num_trials": 1},
            r"search\.sft\.lr: .* whole",
        ),
        ({"search": {"sft.lr": {"low": 0, "high": 1}}}, r"search\.sft\.lr is a range, which num_trials > 0"),
        ({"search": LR, "num_processes": 0}, "num_processes=0"),
        ({"search": {"sfft.lr": [1]}}, r"search\.sfft\.lr: .* nearest is 'sft'"),
        ({"search": LR, "metric": "stf.loss"}, "metric: .* nearest is 'sft'"),
        ({"search": {**LR, "dpo.lr": [1]}}, r"search\.dpo\.lr changes nothing"),
        ({"search": {"sft.lr": [1, 2]}, "trial": 2}, r"trial=2 is not among the 2 trials, 0 to 1"),
        ({"search": {"sft.init_from": ["@pretrian"]}}, "nearest is 'pretrain'"),
    ],
)
def test_mistakes_are_one_sentence(fields, words):
    with pytest.raises(ValueError, match=words) as error:
        planned(**fields)
    assert "\n" not in str(error.value)


def test_steps_that_are_searched_take_the_place_of_a_stages_epochs():
    stages = STAGES | {"sft": STAGES["sft"] | {"fields": {"init_from": "@pretrain", "num_epochs": 3.0, "seed": 1}}}
    pipeline = config_lib.build(PipelineConfig, {"stages": stages})
    trials = plan(sweep({"sft.num_train_steps": [5, 6]}), pipeline, lambda spec: {})
    assert [trial.last.stage.fields for trial in trials] == [
        {"init_from": "@pretrain", "seed": 1, "num_train_steps": 5},
        {"init_from": "@pretrain", "seed": 1, "num_train_steps": 6},
    ]
