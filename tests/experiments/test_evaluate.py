"""Evaluation from the command line: every kind of task, on finished runs; resuming; mistakes."""

import json
import pathlib

import numpy as np
import pytest

from jaxgpt.runs.manifest import manifest_digest, read_manifest
from tests.experiments.conftest import command, here

PROMPTS = [f"first of {a} {verb} {b}?" for a, b in (("Ann", "Bob"), ("Cid", "Dora")) for verb in ("sees", "likes")]


def flags(workdir, parent, tasks: dict, **fields) -> list[str]:
    fields = {"init_from": parent, "tasks": tasks} | fields
    return ["--config=configs/evaluate.py", f"--workdir={workdir}", *(f"--config.{k}={v}" for k, v in fields.items())]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("evaluate")
    contents = {
        "quiz": [{"prompt": p, "choices": ["Ann.", "Bob and 6.", "Cid."], "answer": p.split()[2] + "."} for p in PROMPTS],
        "open": [{"prompt": p, "answer": p.split()[2] + "."} for p in PROMPTS],
    }  # fmt: skip
    for name, rows in contents.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "text.txt").write_text("Ann sees Bob and 6.\n\nCid likes Dora and 2.\n\n" * 9)
    (folder / "broken.jsonl").write_text(json.dumps(contents["quiz"][0]) + '\n{"prompt": "a", "choices": ["b", "c"]}\n')
    (folder / "empty.jsonl").write_text("")
    return {path.stem: str(path) for path in folder.iterdir()}


def tasks_of(data) -> dict:
    return {
        "wiki": {"kind": "perplexity", "path": data["text"]},
        "mc": {"kind": "multiple_choice", "path": data["quiz"], "num_shots": 1, "shots": data["quiz"]},
        "open": {"kind": "generation", "path": data["open"], "max_new_tokens": 8},
        "duel": {"kind": "win_rate", "path": data["open"], "max_new_tokens": 8},
    }


@pytest.fixture(scope="module")
def evaluated(runs, data, tmp_path_factory):
    """A language model on every kind of task, judged against its adapted child by the reward model."""
    workdir = tmp_path_factory.mktemp("evaluated") / "run"
    arguments = flags(
        workdir, runs["sft"].workdir, tasks_of(data), baseline=runs["lora"].workdir, judge=runs["reward"].workdir
    )
    done = command("evaluate", *arguments)
    assert done.returncode == 0, done.stderr
    return workdir, arguments, done


def load(path) -> dict:
    return json.loads(pathlib.Path(path).read_text())


def test_a_run_leaves_numbers_samples_provenance_and_a_report(evaluated, runs):
    workdir, _, done = evaluated
    results, manifest = load(workdir / "results.json")["tasks"], load(workdir / "manifest.json")
    assert {label: task["kind"] for label, task in results.items()} == {
        "wiki": "perplexity", "mc": "multiple_choice", "open": "generation", "duel": "win_rate",
    }  # fmt: skip
    for task in results.values():
        for metric in task["metrics"].values():
            assert metric["n"] == (1 if task["kind"] == "perplexity" else len(PROMPTS))
            assert metric["low"] is None or metric["low"] <= metric["value"] <= metric["high"]
    assert results["wiki"]["counts"]["bytes"] == len("Ann sees Bob and 6.\n\nCid likes Dora and 2.\n\n") * 9
    samples = [json.loads(line) for line in (workdir / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 1 + 3 * len(PROMPTS)
    scores = [s["accuracy"] for s in samples if s["task"] == "mc"]
    assert results["mc"]["metrics"]["accuracy"]["value"] == np.mean(scores)
    assert manifest["stage"] == "evaluate"
    for field, stage in (("init_from", "sft"), ("baseline", "lora"), ("judge", "reward")):
        assert manifest["parents"][field]["digest"] == manifest_digest(read_manifest(str(runs[stage].workdir)))
    assert manifest["final_metrics"]["mc/accuracy"] == results["mc"]["metrics"]["accuracy"]["value"]
    page = (workdir / "report.html").read_text()
    assert all(
        word in page for word in ("length_controlled_win_rate", "bits_per_byte", "first of Ann sees Bob?", "finished")
    )
    assert "95 % interval" in done.stdout


def test_a_finished_run_says_so_and_an_interrupted_one_goes_on(evaluated, runs, data, tmp_path):
    workdir, arguments, _ = evaluated
    before = load(workdir / "results.json")
    again = command("evaluate", *arguments)
    assert again.returncode == 0
    assert f"{workdir} is finished: duel/length_controlled_win_rate 0.5" in again.stdout
    # As if it had been killed after the second task, with the samples of the third already written.
    for name in ("config.json", "samples.jsonl"):
        (tmp_path / name).write_bytes((workdir / name).read_bytes())
    left = dict(list(before["tasks"].items())[:2])
    (tmp_path / "results.json").write_text(json.dumps(before | {"tasks": left}))
    here("evaluate", *[a if not a.startswith("--workdir") else f"--workdir={tmp_path}" for a in arguments],
         "--config.batch_size=8")  # fmt: skip
    after = load(tmp_path / "results.json")
    assert list(after["tasks"]) == list(before["tasks"])
    assert after["tasks"]["open"]["metrics"] == before["tasks"]["open"]["metrics"]
    assert len((tmp_path / "samples.jsonl").read_text().splitlines()) == 1 + 3 * len(PROMPTS)
    with pytest.raises(ValueError, match=r"seed=1 differs from 0"):
        here("evaluate", *[a if not a.startswith("--workdir") else f"--workdir={tmp_path}" for a in arguments],
             "--config.seed=1")  # fmt: skip
    (tmp_path / "manifest.json").unlink()
    before["data"]["mc"] = "other"
    (tmp_path / "results.json").write_text(json.dumps(before))
    with pytest.raises(ValueError, match=r"tasks\.mc\.path: its content has changed since"):
        here("evaluate", *[a if not a.startswith("--workdir") else f"--workdir={tmp_path}" for a in arguments])


def test_a_report_card_is_the_one_of_training(runs, records, tmp_path):
    tasks = {"card": {"kind": "report_card", "path": records["preferences_eval"], "report_card": {"max_ece": None}}}
    here("evaluate", *flags(tmp_path / "card", runs["reward"].workdir, tasks))
    found = load(tmp_path / "card" / "results.json")["tasks"]["card"]
    trained = load(runs["reward"].workdir / "report_card.json")
    assert found["report_card"]["accuracy"] == trained["accuracy"]
    assert found["report_card"]["rewards"]["chosen_mean"] == pytest.approx(trained["rewards"]["chosen_mean"], abs=1e-4)
    assert found["metrics"]["accuracy"]["value"] == trained["accuracy"]["accuracy"]
    assert "Report card" in (tmp_path / "card" / "report.html").read_text()


@pytest.mark.parametrize(
    ("tasks", "fields", "message"),
    [
        ({}, {}, "^tasks is empty"),
        ({"x": {"kind": "perplexity"}}, {}, r"^tasks\.x\.path is empty"),
        ({"x": {"path": "TEXT"}}, {}, r"^tasks\.x\.kind is required; it is one of perplexity"),
        ({"x": {"kind": "perplexty", "path": "TEXT"}}, {}, "'perplexty' is not one of .*the nearest is 'perplexity'"),
        ({"x": {"kind": "perplexity", "path": "TEXT", "num_shots": 2}}, {},
         r"^tasks\.x\.num_shots has no meaning for tasks\.x\.kind='perplexity'; it is for multiple_choice or"),
        ({"x": {"kind": "generation", "path": "OPEN", "num_shot": 2}}, {}, r"the nearest field is tasks\.x\.num_shots"),
        ({"x": {"kind": "generation", "path": "OPEN", "num_shots": 2}}, {}, r"needs tasks\.x\.shots"),
        ({"x": {"kind": "generation", "path": "OPEN", "metrics": {"a": {"name": "exact_mach"}}}}, {},
         "no reward 'exact_mach'; the nearest is 'exact_match'"),
        ({"x": {"kind": "multiple_choice", "path": "BROKEN"}}, {}, r"broken\.jsonl, line 2: no field 'answer'"),
        ({"x": {"kind": "multiple_choice", "path": "EMPTY"}}, {}, r"empty\.jsonl is empty: it has no records"),
        ({"x": {"kind": "report_card", "path": "OPEN"}}, {}, "init_from=.* is not a reward model"),
        ({"x": {"kind": "win_rate", "path": "OPEN"}}, {}, r"^baseline is required by tasks\.x"),
        ({"x": {"kind": "win_rate", "path": "OPEN"}}, {"baseline": "SFT", "judge": "nowhere"}, "^judge: there is no folder"),
        ({"x": {"kind": "win_rate", "path": "OPEN"}}, {"baseline": "SFT", "judge": "SFT"}, "judge=.* is not a reward model"),
        ({"x": {"kind": "perplexity", "path": "TEXT"}}, {"judge": "a.py:b"}, "^judge='a.py:b' is for tasks of the kind"),
        ({"x": {"kind": "perplexity", "path": "TEXT"}}, {"init_from": "nowhere"}, "^init_from: there is no folder 'nowhere'"),
        ({"x": {"kind": "perplexity", "path": "TEXT"}}, {"init_from": "REWARD"}, "needs a language model, but init_from="),
    ],
    ids=lambda value: "",
)  # fmt: skip
def test_mistakes_name_the_field(runs, data, tmp_path, tasks, fields, message):
    words = {name.upper(): path for name, path in data.items()}
    words |= {"SFT": runs["sft"].workdir, "REWARD": runs["reward"].workdir}
    tasks = {label: task | {k: words.get(str(v), v) for k, v in task.items()} for label, task in tasks.items()}
    fields = {name: words.get(value, value) for name, value in fields.items()}
    with pytest.raises(ValueError, match=message):
        here("evaluate", *flags(tmp_path / "run", runs["sft"].workdir, tasks, **fields))


def test_a_mistake_is_one_sentence_and_exit_code_2(runs, data, tmp_path):
    done = command(
        "evaluate", *flags(tmp_path, runs["sft"].workdir, {"x": {"kind": "perplexity", "path": "nowhere.txt"}})
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "tasks.x.path: no file matches 'nowhere.txt'" in errors[0]
