"""The sweep command: shared stages run once, what failed does not stop the rest, and what is missing is done."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from experiments import sweep
from experiments.shared import cli, stages
from jaxgpt import config as config_lib
from jaxgpt.pipeline.graph import PipelineConfig
from jaxgpt.pipeline.sweep import SweepConfig, plan
from jaxgpt.runs import manifest as manifests
from jaxgpt.runs import workdir as workdirs
from jaxgpt.runs.workdir import Stopped
from tests.experiments.conftest import ROOT, command

# Stands for a stage: its loss is its learning rate (1 without one), 7 takes forever,
# more than 10 fails, and each run leaves a line.
FAKE = """
import json, os, sys, time
flags = dict(a.split("=", 1) for a in sys.argv[1:])
folder, rate = flags["--workdir"], float(flags.get("--config.optimizer.learning_rate", 1))
os.makedirs(folder, exist_ok=True)
with open(os.path.join(os.path.dirname(folder), "ran"), "a") as file:
    file.write(os.path.basename(folder).split("-")[0] + " " + os.environ.get("DEVICE", "") + "\\n")
for name, value in flags.items():
    if "train_from" in name: assert os.path.exists(value + "/manifest.json"), value
if rate == 7: time.sleep(600)
if rate > 10: sys.exit("the rate is absurd")
with open(os.path.join(folder, "manifest.json"), "w") as file:
    json.dump({"final_metrics": {"eval/loss": rate}}, file)
"""
PIPELINE = """
from ml_collections import ConfigDict
def get_config():
    return ConfigDict({"stages": {
        "base": {"command": "pretrain", "config": __file__},
        "tuned": {"command": "sft", "config": __file__, "fields": {"train_from": "@base"}}}})
"""
RATES = {"tuned.optimizer.learning_rate": [0.3, 0.1, 0.2]}


@pytest.fixture
def do(tmp_path, monkeypatch):
    """Runs a sweep of quick stages in this process; returns the stages that ran, and the exit code."""
    start = lambda _, *arguments, **options: subprocess.Popen([sys.executable, "-S", "-c", FAKE, *arguments], **options)
    monkeypatch.setattr(stages, "start", start)
    monkeypatch.setattr(sweep, "check_stage", lambda *_: None)  # the stages' fields are none of a real command's
    (tmp_path / "pipeline.py").write_text(PIPELINE)
    ran = tmp_path / "run/stages/ran"

    def run(search, **fields):
        values = {
            "pipeline": str(tmp_path / "pipeline.py"),
            "metric": "tuned.final_metrics.eval/loss",
            "search": search,
        }
        before = len(ran.read_text().splitlines()) if ran.exists() else 0
        code = 0
        try:
            sweep.main(config_lib.build(SweepConfig, values | fields), str(tmp_path / "run"))
        except SystemExit as error:
            code = error.code
        return sorted(line.split()[0] for line in ran.read_text().splitlines()[before:]), code

    run.root = tmp_path / "run"
    return run


def rows(root) -> list[dict]:
    return [json.loads(line) for line in (root / "results.jsonl").read_text().splitlines()]


def test_a_shared_stage_runs_once_and_the_best_comes_first(do, capsys):
    assert do(RATES, num_processes=3) == (["base", "tuned", "tuned", "tuned"], 0)
    assert [(row["trial"], row["metric"]) for row in rows(do.root)] == [(0, 0.3), (1, 0.1), (2, 0.2)]
    assert len({row["workdirs"]["base"] for row in rows(do.root)}) == 1
    for row in rows(do.root):
        found = json.loads((do.root / row["workdirs"]["tuned"] / "manifest.json").read_text())
        assert found["final_metrics"]["eval/loss"] == row["values"]["tuned.optimizer.learning_rate"]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[-4:-1]] == [["1", "0.1", "0.1"], ["2", "0.2", "0.2"], ["0", "0.3", "0.3"]]
    manifest = json.loads((do.root / "manifest.json").read_text())
    assert manifest["best"]["trial"] == 1
    assert manifest["final_metrics"] == {"eval/loss": 0.1}
    assert len(manifest["parents"]) == 3
    assert (do.root / "plots/sweep.png").exists()
    assert rows(do.root)[1]["workdirs"]["tuned"] in (do.root / "report.html").read_text()
    assert do(RATES, mode="max") == ([], 0)
    assert "3 of 3 trials: finished." in capsys.readouterr().out
    assert json.loads((do.root / "manifest.json").read_text())["best"]["trial"] == 0


def test_a_failed_trial_is_noted_stops_no_other_and_is_tried_again(do, capsys):
    search = {"tuned.optimizer.learning_rate": [11, 0.1]}
    assert do(search) == (["base", "tuned", "tuned"], 1)
    failed, finished = rows(do.root)
    assert (failed["failed"], failed["exit_code"]) == ("tuned", 1)
    assert "metric" not in failed
    assert finished["metric"] == 0.1
    assert not (do.root / "manifest.json").exists()
    printed = capsys.readouterr()
    assert "failed with exit code 1: the rate is absurd" in printed.out
    assert "error: 1 of 2 trials failed: 0" in printed.err
    assert do(search) == (["tuned"], 1)
    assert do(search, trial=1) == ([], 0)
    assert do({"tuned.optimizer.learning_rate": [0.1]}) == ([], 0)
    assert (do.root / "manifest.json").exists()


def test_what_is_built_on_a_failed_stage_does_not_run(do):
    search = {"base.optimizer.learning_rate": [11, 1], "tuned.optimizer.learning_rate": [0.1, 0.2]}
    assert do(search, num_processes=2) == (["base", "base", "tuned", "tuned"], 1)
    found = [(row.get("failed"), row.get("exit_code"), row.get("metric")) for row in rows(do.root)]
    assert found == [("base", 1, None)] * 2 + [(None, None, 0.1), (None, None, 0.2)]


def test_one_trial_at_a_time_and_a_wider_search_go_on_from_what_is_there(do):
    assert do(RATES, trial=1) == (["base", "tuned"], 0)
    assert [row["trial"] for row in rows(do.root)] == [1]
    assert do(RATES) == (["tuned", "tuned"], 0)
    wider = {"tuned.optimizer.learning_rate": [0.3, 0.1, 0.2, 0.4]}
    assert do(wider, trial=0) == ([], 0)
    assert not (do.root / "manifest.json").exists(), "the manifest of the smaller search"
    assert do(wider) == (["tuned"], 0)
    os.remove(do.root / rows(do.root)[0]["workdirs"]["base"] / "manifest.json")
    assert do(wider) == ([], 0), "a parent whose children are finished is not needed"


def test_a_metric_that_is_not_there_names_the_nearest(do):
    with pytest.raises(
        ValueError, match="metric='tuned.final_metrics.eval/los': there is no such metric; the nearest is 'eval/loss'"
    ):
        do(RATES, metric="tuned.final_metrics.eval/los")
    assert not do.root.exists()
    with pytest.raises(ValueError, match="metric: the manifest has no final_metrics.a/b; the nearest is 'eval/loss'"):
        do(RATES, metric="tuned.final_metrics.a/b")


def test_each_process_has_its_number(do):
    do(RATES, num_processes=3, environment={"DEVICE": "gpu{worker}"})
    lines = [line.split() for line in (do.root / "stages/ran").read_text().splitlines()]
    assert lines[0] == ["base", "gpu0"]
    assert {device for _, device in lines} <= {"gpu0", "gpu1", "gpu2"}
    assert len({device for name, device in lines if name == "tuned"}) > 1


def test_a_stage_that_another_process_does_is_waited_for(do):
    do({"tuned.optimizer.learning_rate": [0.3]})
    (base,) = (path.name for path in (do.root / "stages").iterdir() if path.name.startswith("base"))
    manifest = do.root / "stages" / base / "manifest.json"
    content = manifest.read_text()
    manifest.unlink()
    held = workdirs.lock(str(do.root / "logs" / base))
    held.__enter__()

    def finish():
        manifest.write_text(content)
        held.__exit__(None, None, None)

    timer = threading.Timer(0.5, finish)
    timer.start()
    assert do({"tuned.optimizer.learning_rate": [0.3, 0.1]}, num_processes=2) == (["tuned"], 0)
    timer.join()


def test_sigterm_ends_the_stages_and_is_no_failure_of_theirs(do):
    def end():
        while not (do.root / "stages/ran").exists() or "tuned" not in (do.root / "stages/ran").read_text():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=end)
    thread.start()
    with pytest.raises(Stopped, match="Preempted before all trials were finished") as stopped:
        do({"tuned.optimizer.learning_rate": [7, 0.1]})
    assert stopped.value.number == signal.SIGTERM
    thread.join()
    assert rows(do.root) == []
    assert not list(do.root.rglob("exit_code"))


@pytest.mark.parametrize(("preset", "num_trials", "num_runs"), [("grpo", 9, 4 + 9), ("pretrain", 16, 2 + 16)])
def test_the_presets_share_what_they_do_not_search(preset, num_trials, num_runs, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = cli.load_config(f"configs/sweep.py:{preset}", [], SweepConfig)
    trials = plan(config, cli.load_config(config.pipeline, [], PipelineConfig), cli.plain_config)
    assert len(trials) == num_trials
    assert len({run.folder for trial in trials for run in trial.runs.values()}) == num_runs


def test_a_sweep_of_real_stages(pipeline_config, tmp_path):
    root = tmp_path / "run"
    flags = [
        f"--workdir={root}", f"--config.pipeline={pipeline_config}", "--config.search={'sft.seed': [0, 1]}",
        "--config.metric=sft.final_metrics.eval/loss", "--config.mode=min", "--config.num_processes=2",
    ]  # fmt: skip
    done = command("sweep", *flags, "--config.trial=1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("$ python -m experiments.") == 4
    assert [row["trial"] for row in rows(root)] == [1]
    done = command("sweep", *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("$ python -m experiments.") == 1
    assert "os.fork" not in done.stderr
    both, manifest = rows(root), (root / "manifest.json").read_text()
    assert [row["values"] for row in both] == [{"sft.seed": 0}, {"sft.seed": 1}]
    assert both[0]["metric"] != both[1]["metric"]
    for row in both:
        found = json.loads((root / row["workdirs"]["sft"] / "manifest.json").read_text())
        assert row["metric"] == found["final_metrics"]["eval/loss"]
        parent = manifests.read_manifest(str(root / row["workdirs"]["pretrain"]))
        assert parent is not None
        assert manifests.manifest_digest(parent) in json.dumps(found["parents"])
    os.remove(root / both[0]["workdirs"]["sft"] / "manifest.json")
    done = command("sweep", *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("$ python -m experiments.") == 1
    assert rows(root) == both
    assert (root / "manifest.json").read_text() == manifest
