"""Evaluation: what a trained model knows and can do, in numbers with intervals.

    python -m experiments.evaluate --config=configs/evaluate.py --workdir=runs/eval --config.init_from=runs/sft \
        --config.tasks="{'text': {'kind': 'perplexity', 'path': 'heldout.txt'},
                         'quiz': {'kind': 'multiple_choice', 'path': 'quiz.jsonl', 'num_shots': 3, 'shots': 'train.jsonl'}}"

WORKDIR gets results.json, samples.jsonl (what became of every record), manifest.json and report.html. See
configs/evaluate.py for presets, docs/evaluate.md for kinds of tasks, their records and metrics.
"""

import os

import jax

from experiments.shared import cli
from experiments.shared.training import renew_report, try_report
from jaxgpt import partition
from jaxgpt.config import to_dict
from jaxgpt.evaluation import results
from jaxgpt.evaluation.config import EvaluateConfig
from jaxgpt.evaluation.run import Evaluation, read_digests, read_parents
from jaxgpt.json_object import to_json
from jaxgpt.runs import manifest as manifests
from jaxgpt.runs import workdir as workdirs

FREE_FIELDS = ("mesh", "batch_size")  # they change no result
Config = EvaluateConfig


def main(config: EvaluateConfig, workdir: str) -> None:
    """Evaluate into `workdir`, or go on with the tasks that are left there."""
    config.check_complete()
    with workdirs.lock(workdir):
        workdirs.check_same(workdir, to_dict(config), ignore=FREE_FIELDS)
        done = manifests.read_manifest(workdir)
        if done is not None:
            print(f"{workdir} is finished: {_summary(done['final_metrics'])}.")
            renew_report(workdir)
            return
        inputs = {"parents": read_parents(config), "data": read_digests(config)}
        mesh = partition.make_mesh(config.mesh)
        partition.local_rows(mesh, config.batch_size)
        is_main = jax.process_index() == 0
        cache_dir = os.path.join(os.path.dirname(os.path.abspath(workdir)), "token_cache")
        evaluation = Evaluation(config, mesh, cache_dir)
        found = run_tasks(config, workdir, evaluation, inputs, is_main)
        if is_main:
            finish(config, workdir, evaluation, inputs, found)


def run_tasks(config: EvaluateConfig, workdir: str, evaluation: Evaluation, inputs: dict, is_main: bool) -> dict:
    """The entries of results.json, which is written after every task; those it already holds are kept."""
    results_file, samples_file = (os.path.join(workdir, name) for name in ("results.json", "samples.jsonl"))
    found = read_results(results_file, inputs)
    samples = [row for row in workdirs.read_rows(samples_file) if row["task"] in found]
    for label, task in config.tasks.items():
        if label in found:
            continue
        result = evaluation.run(label, task)
        found[label] = results.to_json(str(task.kind), result)
        samples += [{"task": label, **row} for row in result.samples]
        if is_main:
            workdirs.write_config(workdir, to_dict(config))  # not before: a task that cannot be done leaves nothing
            lines = (to_json(row, ensure_ascii=False) + "\n" for row in samples)
            workdirs.write_atomic(samples_file, "".join(lines))
            workdirs.write_atomic(results_file, to_json(inputs | {"tasks": found}, indent=2) + "\n")
            metrics = results.final_metrics({label: found[label]})
            print(f"{_summary(metrics)} ({', '.join(f'{k} {v:,.6g}' for k, v in result.counts.items())})", flush=True)
    return found


def read_results(path: str, inputs: dict) -> dict:
    """The tasks of an earlier run that was interrupted; ValueError where models or data have changed since."""
    stored = workdirs.read_json(path)
    if stored is None:
        return {}
    for part in (*inputs, "tasks"):
        if not isinstance(stored.get(part), dict):
            raise ValueError(f"{path} is damaged: it has no {part}; remove it, and the tasks are done again.")
    for part, now in inputs.items():
        for name in now:
            if stored[part].get(name) != now[name]:
                what = name if part == "parents" else f"tasks.{name}.path"
                raise ValueError(f"{what}: its content has changed since {path} was begun; use another --workdir.")
    return stored["tasks"]


def finish(config: EvaluateConfig, workdir: str, evaluation: Evaluation, inputs: dict, found: dict) -> None:
    """The manifest, the report and the table."""
    model = evaluation.model
    manifest = manifests.base_manifest(
        stage="evaluate", config=to_dict(config), parents=inputs["parents"], data=inputs["data"],
        tokenizer_digest=model.tokenizer.digest,
        chat_template_digest=model.template.digest if model.template is not None else None,
        final_metrics=results.final_metrics(found), intervals=results.intervals(found),
    )  # fmt: skip
    manifests.write_manifest(workdir, manifest)
    print(f"\n{results.table(found)}\n")
    try_report(workdir)


def _summary(metrics: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in metrics.items() if value is not None)


if __name__ == "__main__":
    cli.run(main, EvaluateConfig, default_config="configs/evaluate.py")
