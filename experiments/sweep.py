"""Search over fields of a pipeline's stages: a grid or random trials, which share the stages in which they agree.

    python -m experiments.sweep --config=configs/sweep.py --workdir=runs/sweep --config.num_processes=2

jaxgpt/pipeline/sweep.py says what a sweep is. Each stage that trials have in common is run once, in
WORKDIR/stages/NAME-KEY, and its output is in WORKDIR/logs. Run again, it does what is missing or has failed; with another
search in the same WORKDIR, what the two have in common is kept. Several of these commands with one WORKDIR share the work,
on any number of hosts, and --config.trial=K does one trial, so that an array job is

    sbatch --array=0-8 --wrap='python -m experiments.sweep --config=CONFIG --workdir=DIR --config.trial=$SLURM_ARRAY_TASK_ID'

Results are in WORKDIR/results.jsonl (paths in it begin at WORKDIR), plots/ and report.html, written anew after each trial;
WORKDIR/manifest.json appears when all are finished. The exit code is 1 where a trial failed.
"""

import dataclasses
import functools
import os

import jax

from experiments.shared import cli
from experiments.shared.scheduler import failure, log_path, missing, run_all, stage_path
from experiments.shared.stage_configs import check_stage
from experiments.shared.stages import fail
from jaxgpt.config import to_dict
from jaxgpt.json_object import to_json
from jaxgpt.pipeline.expectations import number
from jaxgpt.pipeline.graph import PipelineConfig
from jaxgpt.pipeline.sweep import SweepConfig, Trial, plan, varied
from jaxgpt.reporting.sweep_report import print_table, ranked, show, table, write_sweep_report
from jaxgpt.runs import manifest as manifests
from jaxgpt.runs import workdir as workdirs


def main(config: SweepConfig, workdir: str) -> None:
    """Do the trials that are not finished, or the one of config.trial, and compare all that are."""
    jax.config.update("jax_platforms", "cpu")  # here alone: the devices are the stages'
    pipeline = cli.load_config(config.pipeline, [], PipelineConfig)
    trials = plan(config, pipeline, functools.cache(cli.plain_config))
    chosen = trials if config.trial is None else [trials[config.trial]]
    check_trials(trials, workdir)
    config = dataclasses.replace(config, trial=None)
    write_results(config, trials, workdir)
    runs = missing(workdir, [trial.runs for trial in chosen])
    todo = f"{len(runs)} stages to run" if runs else "finished"
    print(f"{len(chosen)} of {len(trials)} trials: {todo}.", flush=True)

    def on_finish(folder: str) -> None:
        ended = [trial for trial in trials if trial.last.folder == folder]
        if ended:
            write_results(config, trials, workdir)
        for trial in ended:
            values = ", ".join(f"{name}={show(value)}" for name, value in trial.values.items())
            print(
                f"trial {trial.number} is finished: {values}: {result(config, trial, workdir)['metric']:.5g}",
                flush=True,
            )

    run_all(workdir, runs, config.num_processes, config.environment, on_finish)
    rows = write_results(config, trials, workdir)
    print()
    print_table(table(rows, list(varied(config)), config.metric))
    print(f"Report: {os.path.join(workdir, 'report.html')}")
    failed = [row["trial"] for row in rows if "failed" in row and row["trial"] in {trial.number for trial in chosen}]
    if failed:
        logs = log_path(workdir, "STAGE")
        fail(f"{len(failed)} of {len(chosen)} trials failed: {', '.join(map(str, sorted(failed)))}; see {logs}.", 1)


def check_trials(trials: list[Trial], workdir: str) -> None:
    """ValueError naming the first trial and stage whose config would be refused; nothing has run or been written yet."""
    seen: set[str] = set()
    for trial in trials:
        for name, run in trial.runs.items():
            if run.folder not in seen:
                seen.add(run.folder)
                folders = {parent: stage_path(workdir, folder) for parent, folder in run.folders.items()}
                check_stage(f"The stage {name} of trial {trial.number}", run.stage, folders)


def result(config: SweepConfig, trial: Trial, root: str) -> dict | None:
    """A trial's row of results.jsonl, from what its runs have left; None where it has neither finished nor failed."""
    row = {"trial": trial.number, "values": trial.values}
    paths = {name: os.path.relpath(stage_path(root, run.folder), root) for name, run in trial.runs.items()}
    manifest = manifests.read_manifest(stage_path(root, trial.last.folder))
    if manifest:
        value = number(manifest, config.metric.partition(".")[2], "metric")
        return {**row, "metric": value, "workdirs": paths}
    for name, run in trial.runs.items():
        code = failure(root, run.folder)
        if code is not None:
            return {**row, "failed": name, "exit_code": code, "workdirs": paths}
    return None


def write_results(config: SweepConfig, trials: list[Trial], workdir: str) -> list[dict]:
    """Write all that is known of the trials by now, and return their rows, best first."""
    with workdirs.lock(workdir, wait=True):
        workdirs.write_config(workdir, to_dict(config))
        rows = [row for trial in trials if (row := result(config, trial, workdir))]
        workdirs.write_atomic(os.path.join(workdir, "results.jsonl"), "".join(to_json(row) + "\n" for row in rows))
        rows = ranked(rows, config.mode)
        write_sweep_report(workdir, rows, varied(config), config.metric, config.mode, to_dict(config))
        if len([row for row in rows if "metric" in row]) == len(trials):
            manifests.write_manifest(workdir, manifest(config, trials, rows[0], workdir))
        elif os.path.exists(os.path.join(workdir, "manifest.json")):  # of a search that was smaller
            os.remove(os.path.join(workdir, "manifest.json"))
    return rows


def manifest(config: SweepConfig, trials: list[Trial], best: dict, workdir: str) -> dict:
    """What a finished sweep is: the runs that were compared, and the best trial."""
    paths = {trial.last.folder: stage_path(workdir, trial.last.folder) for trial in trials}
    parents = {
        folder: {
            "path": os.path.abspath(path),
            "digest": manifests.manifest_digest(manifests.read_manifest(path) or {}),
        }
        for folder, path in paths.items()
    }
    metrics = {config.metric.rpartition(".")[2]: best["metric"]}
    return manifests.base_manifest(stage="sweep", parents=parents, best=best, final_metrics=metrics)


if __name__ == "__main__":
    cli.run(main, SweepConfig, default_config="configs/sweep.py")
