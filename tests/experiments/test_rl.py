"""Reinforcement learning from the command line: it learns, it resumes to the bit, and it says what is wrong."""

import concurrent.futures
import itertools
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.shared import cli
from jaxgpt import partition
from jaxgpt.objectives.ppo import response_values
from jaxgpt.objectives.reward import last_token_rewards
from jaxgpt.partition import MeshConfig
from jaxgpt.rl.best_of_n import expected_best
from jaxgpt.rl.config import RLConfig
from jaxgpt.rl.models import Builder, read_reward_model
from jaxgpt.rl.rollout import Rollout
from jaxgpt.rl.step import critic_params
from jaxgpt.runs.load import load_plain, read_run
from jaxgpt.train.finetune import start_from
from tests.experiments.conftest import ROOT, command, finetuning, killed
from tests.experiments.test_pretrain import rows

REWARDS = """
def count(prompts, responses, records):
    return [response.count("e") + response.count("n") for response in responses]

def nan(prompts, responses, records):
    return [float("nan")] * len(responses)

def raises(prompts, responses, records):
    return [record["nothing"] for record in records]
"""


def flags(stage: str, preset: str, parent, data: str, **fields) -> list[str]:
    """Of a run of 6 iterations; fields are written a__b for a.b."""
    fields = {
        "init_from": parent, "data.train": data, "data.holdout.fraction": 0.2, "rollout.batch_size": 32,
        "rollout.max_prompt_length": 32, "rollout.max_new_tokens": 8, "ppo.num_minibatches": 2, "num_train_steps": 6,
        "eval_interval_steps": 3, "checkpoint.save_interval_steps": 2, "optimizer.learning_rate": 0.01,
        "num_eval_prompts": 8, "samples.num_heldout": 2,
    } | {name.replace("__", "."): value for name, value in fields.items()}  # fmt: skip
    return [f"--config=configs/{stage}.py:{preset}", *(f"--config.{k}={v}" for k, v in fields.items())]


def named(file: str, function: str) -> str:
    return repr({"letters": {"name": f"{file}:{function}"}})


@pytest.fixture(scope="module")
def rewards_file(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("rewards") / "rewards.py"
    path.write_text(REWARDS)
    return str(path)


@pytest.fixture(scope="module")
def reward_model(finished, records, tmp_path_factory) -> pathlib.Path:
    workdir = tmp_path_factory.mktemp("reward") / "run"
    done = command("reward", f"--workdir={workdir}", *finetuning("reward", "full", finished[0], records["preferences"]))
    assert done.returncode == 0, done.stderr
    return workdir


@pytest.fixture(scope="module")
def reward_adapters(finished, records, tmp_path_factory) -> pathlib.Path:
    workdir = tmp_path_factory.mktemp("adapters") / "run"
    plan = finetuning("reward", "lora", finished[0], records["preferences"], lora__dora=True)
    done = command("reward", f"--workdir={workdir}", *plan)
    assert done.returncode == 0, done.stderr
    return workdir


@pytest.fixture(scope="module")
def runs(finished, records, rewards_file, reward_model, reward_adapters, tmp_path_factory) -> dict[str, tuple]:
    """name -> (stage, flags, workdir, finished process)."""
    root = tmp_path_factory.mktemp("rl")
    made = {
        "grpo": ("grpo", flags("grpo", "grpo", finished[0], records["first"],
                               rewards=named(rewards_file, "count"),
                               gold="{'length': {'name': 'length', 'options': {'maximum': 3}}}",
                               rollout__num_samples_per_prompt=8)),
        "ppo": ("ppo", flags("ppo", "full", finished[0], records["first"], reward_model=reward_model,
                             ppo__num_epochs=2, ppo__kl_target=0.5, optimizer__schedule="constant",
                             critic_optimizer__schedule="constant", ppo__normalize_rewards=True)),
        "lora": ("ppo", flags("ppo", "lora", finished[0], records["first"], reward_model=reward_adapters,
                              ppo__num_epochs=1, lora__dora=True, ppo__missing_eos_penalty=-1,
                              require_report_card=False)),
        "shared": ("ppo", flags("ppo", "lora", finished[0], records["first"], ppo__value_coef=0.5,
                                rewards=named(rewards_file, "count"), ppo__num_epochs=1, critic_trunk="shared")),
    }  # fmt: skip

    def start(name: str):
        stage, arguments = made[name]
        return stage, arguments, root / name, command(stage, f"--workdir={root / name}", *arguments)

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return dict(zip(made, pool.map(start, made), strict=True))


@pytest.mark.parametrize("name", ["grpo", "ppo", "lora", "shared"])
def test_a_run_leaves_what_the_contract_says(runs, name):
    stage, _, workdir, done = runs[name]
    assert done.returncode == 0, done.stderr
    assert "policy" in done.stdout
    assert "MiB of optimizer state" in done.stdout
    logged = rows(workdir)
    assert [row["step"] for row in logged] == list(range(7))
    names = {
        "objective/kl", "objective/entropy", "objective/scores", "objective/rlhf_reward", "objective/non_score_reward",
        "policy/approxkl", "policy/clipfrac", "policy/ratio", "policy/ratio_var", "policy/loss", "rollout/mean_length",
        "rollout/eos_fraction", "rollout/logprob_gap",
    }  # fmt: skip
    if stage == "ppo":
        names |= {"value/loss", "value/clipfrac", "value/explained_variance"}
    assert names < logged[1].keys()
    assert logged[1]["objective/kl"] == pytest.approx(0, abs=1e-5)
    assert logged[1]["rollout/logprob_gap"] < 1e-4
    assert {"eval/scores", "eval/scores_stderr", "eval/kl", "eval/mean_length"} < logged[6].keys()
    timed = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
    assert timed["time/rollout_seconds"] > 0
    assert timed["time/update_seconds"] > 0
    manifest = json.loads((workdir / "manifest.json").read_text())
    assert manifest["stage"] == stage
    assert ("reward_model" in manifest["parents"]) == (name in ("ppo", "lora"))
    assert not {name for name in manifest["final_metrics"] if "seconds" in name or "per_second" in name}
    samples = [json.loads(line) for line in (workdir / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 3 * 2
    assert {"step", "prompt", "response", "scores", "kl"} <= samples[0].keys()


def test_models_that_stand_on_the_policys_base_keep_nothing_but_adapters(runs):
    kept = {
        name: dict(re.findall(r"^(\w+(?: \w+)?) +([0-9.]+) MiB of par", runs[name][3].stdout, re.M)) for name in runs
    }
    assert kept["lora"]["reference"] == kept["shared"]["critic"] == kept["grpo"]["reward model"] == "0.0"
    assert runs["lora"][3].stdout.count("on the policy's base") == 2
    assert "a head on the policy's trunk" in runs["shared"][3].stdout


def test_a_reward_adapter_on_the_policys_base_scores_as_the_merged_reward_model(runs, finished, reward_adapters):
    mesh = partition.make_mesh(MeshConfig(), devices=jax.devices()[:1])
    _, overrides = cli.split_overrides(["", *runs["lora"][1][1:]])
    config = cli.load_config(str(ROOT / "configs/ppo.py:lora"), overrides, RLConfig)
    start = start_from(config)
    parts = Builder(config, start, read_reward_model(config, start), mesh)
    state, frozen = parts.create()
    assert set(frozen) == {"policy", "reward"}
    tokens = np.random.default_rng(0).integers(3, 40, (4, 12)).astype(np.int32)
    lengths = np.array([12, 9, 5, 12])
    segments = (np.arange(12) < lengths[:, None]).astype(np.int32)
    rollout = Rollout(tokens, segments, np.cumsum(segments, 1) - 1, None, None, None)
    model, params = load_plain(read_run(str(reward_adapters)), mesh)
    shift = json.loads((reward_adapters / "manifest.json").read_text())["reward_shift"]
    wanted = last_token_rewards(model, params, tokens, segments) - shift
    assert float(jnp.std(wanted)) > 0.01
    np.testing.assert_allclose(parts.score(frozen, rollout), wanted, atol=1e-4)
    values = response_values(
        parts.critic, critic_params(state, frozen), tokens, segments, rollout.positions_BS, num_response=6
    )
    merged = response_values(model, params, tokens, segments, rollout.positions_BS, num_response=6)
    live = segments[:, -6:] == 1
    np.testing.assert_allclose(np.asarray(values)[live], np.asarray(merged)[live] - shift, atol=1e-4)


def test_the_best_of_n_is_data_for_fine_tuning_and_an_interrupted_run_goes_on(
    finished, records, rewards_file, tmp_path
):
    plan = flags("grpo", "best_of_n", finished[0], records["first"], rewards=named(rewards_file, "count"),
                 gold="{'length': {'name': 'length', 'options': {'maximum': 3}}}", data__holdout__fraction=0.0,
                 ppo__missing_eos_penalty=-1)  # fmt: skip
    done = command("best_of_n", f"--workdir={tmp_path / 'a'}", *plan)
    assert done.returncode == 0, done.stderr
    best = (tmp_path / "a/best.jsonl").read_bytes()
    rows = [json.loads(line) for line in best.splitlines()]
    for row in rows:
        assert len(row["scores"]) == len(row["golds"]) == len(row["finished_each"]) == 8
        finished_scores = [score for score, ended in zip(row["scores"], row["finished_each"], strict=True) if ended]
        assert row["score"] == max(finished_scores) == row["response"].count("e") + row["response"].count("n")
        assert row["finished"]
        assert all(ended or score == -1 for score, ended in zip(row["scores"], row["finished_each"], strict=True))
    manifest = json.loads((tmp_path / "a/manifest.json").read_text())
    assert manifest["prompts"] == {"kept": len(rows), "dropped": 36 - len(rows)}
    assert 0 < len(rows) < 36
    cut_off = manifest["cut_off_responses"]
    assert cut_off == 8 * (36 - len(rows)) + sum(row["finished_each"].count(False) for row in rows)
    assert f"{cut_off} of 288 responses were cut off by rollout.max_new_tokens=8" in done.stdout
    points = manifest["curve"]
    assert [point["k"] for point in points] == [1, 2, 4, 8]
    assert points[0]["score"] == pytest.approx(np.mean([row["scores"] for row in rows]), abs=1e-5)
    assert points[3]["score"] == pytest.approx(np.mean([row["score"] for row in rows]), abs=1e-5)
    assert points[0]["score"] < points[1]["score"] < points[3]["score"]
    dead = killed("best.jsonl", 3, "best_of_n", f"--workdir={tmp_path / 'b'}", *plan)
    assert dead.returncode == -9, dead.stderr
    assert command("best_of_n", f"--workdir={tmp_path / 'b'}", *plan).returncode == 0
    assert (tmp_path / "b/best.jsonl").read_bytes() == best
    best = tmp_path / "a/best.jsonl"
    plan = finetuning("sft", "full", finished[0], best, num_train_steps=2, sft__empty_response="drop")
    done = command("sft", f"--workdir={tmp_path / 'sft'}", *plan)
    assert done.returncode == 0, done.stderr


def test_expected_best_is_the_mean_over_all_choices():
    rng = np.random.default_rng(0)
    scores, values = rng.normal(size=6), rng.normal(size=6)
    for k in (1, 2, 5, 6):
        chosen = [max(c, key=lambda i: scores[i]) for c in itertools.combinations(range(6), k)]
        assert expected_best(values, scores, k) == pytest.approx(np.mean(values[chosen]))


def test_the_score_rises_and_gold_is_only_watched(runs):
    logged = rows(runs["grpo"][2])
    assert logged[6]["eval/scores"] > logged[0]["eval/scores"] + 0.1
    assert "eval/gold" in logged[6]


@pytest.mark.parametrize(("name", "file", "step"), [("grpo", "metrics.jsonl", 5), ("ppo", "samples.jsonl", 6)])
def test_killed_and_restarted_equals_undisturbed_bit_for_bit(runs, tmp_path, name, file, step):
    stage, arguments, undisturbed, _ = runs[name]
    dead = killed(file, step, stage, f"--workdir={tmp_path / 'run'}", *arguments)
    assert dead.returncode == -9, dead.stderr
    done = command(stage, f"--workdir={tmp_path / 'run'}", *arguments)
    assert done.returncode == 0, done.stderr
    assert re.search(r"training from step [24]\.", done.stdout)
    assert rows(tmp_path / "run") == rows(undisturbed)
    assert (tmp_path / "run/samples.jsonl").read_bytes() == (undisturbed / "samples.jsonl").read_bytes()


def test_generation_takes_the_policy_of_an_rl_run(runs):
    for name in ("ppo", "lora"):
        done = command("generate", "--config=configs/generate.py:greedy", f"--config.init_from={runs[name][2]}",
                       "--config.prompt=first of Ann?", "--config.max_new_tokens=4")  # fmt: skip
        assert done.returncode == 0, done.stderr


def test_eight_devices_and_as_many_slots_begin_as_one(runs, tmp_path):
    stage, arguments, workdir, _ = runs["ppo"]
    mesh = [*arguments, "--config.mesh.data=4", "--config.mesh.fsdp=2", "--config.num_train_steps=1",
            "--config.rollout.num_slots=8"]  # fmt: skip
    done = command(stage, f"--workdir={tmp_path / 'run'}", *mesh, devices=8)
    assert done.returncode == 0, done.stderr
    ours, theirs = rows(tmp_path / "run")[1], rows(workdir)[1]
    for name in ("objective/scores", "objective/entropy", "policy/approxkl", "value/loss", "policy/loss"):
        np.testing.assert_allclose(ours[name], theirs[name], rtol=2e-3, atol=2e-4, err_msg=name)


@pytest.fixture(scope="module")
def mistakes(finished, records, rewards_file, reward_model, tmp_path_factory) -> dict[str, tuple]:
    root = tmp_path_factory.mktemp("mistakes")
    cases = {
        "prompts": flags("grpo", "grpo", finished[0], records["first"], rollout__max_prompt_length=4,
                         rewards=named(rewards_file, "count")),
        "nan": flags("grpo", "grpo", finished[0], records["first"], rewards=named(rewards_file, "nan")),
        "raises": flags("grpo", "grpo", finished[0], records["first"], rewards=named(rewards_file, "raises")),
        "none": flags("grpo", "grpo", finished[0], records["first"]),
        "model": flags("ppo", "full", finished[0], records["first"], reward_model=finished[0]),
        "room": flags("ppo", "full", finished[0], records["first"], reward_model=reward_model,
                      rollout__max_new_tokens=60),
        "card": flags("ppo", "full", finished[0], records["first"], reward_model=root / "failed"),
    }  # fmt: skip
    (root / "failed").mkdir()
    for file in reward_model.iterdir():
        if file.is_file() and file.name != "manifest.json":
            (root / "failed" / file.name).write_bytes(file.read_bytes())
    manifest = json.loads((reward_model / "manifest.json").read_text())
    manifest["report_card"] |= {"passed": False, "failures": ["The accuracy is bad."]}
    (root / "failed/manifest.json").write_text(json.dumps(manifest))

    def start(name: str):
        return command("ppo", f"--workdir={root / name}", *cases[name])

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return dict(zip(cases, pool.map(start, cases), strict=True))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("prompts", ["rollout.max_prompt_length=4"]),
        ("nan", ["rewards.py:nan", "nan", "line "]),
        ("raises", ["rewards.py:raises", "nothing", "line "]),
        ("none", ["reward_model", "rewards"]),
        ("model", ["reward_model", "pretrain"]),
        ("room", ["rollout.max_new_tokens=60", "model.max_seq_length=64"]),
        ("card", ["report card", "The accuracy is bad.", "require_report_card"]),
    ],
)
def test_a_users_mistake_is_one_sentence_and_exit_code_2(mistakes, name, words):
    done = mistakes[name]
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.replace("\r", "\n").splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    for word in words:
        assert word in errors[0]
