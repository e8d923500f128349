"""Stages one after the other, from text to an aligned assistant, in one folder that remembers what is done.

    python -m experiments.pipeline --config=configs/pipeline.py:quickstart --workdir=runs/quickstart
    python -m experiments.pipeline --config=configs/arithmetic.py --workdir=runs/arithmetic --config.only=sft

A config names the stages and what each is built on; see jaxgpt/pipeline/graph.py. Every stage is its ordinary command,
printed before it runs, so that it can be copied. Run again, it resumes what was interrupted, keeps what is finished, and
runs again what has changed with everything built on it; what is replaced is moved to WORKDIR/replaced. It ends with
WORKDIR/report.html, which is there after the first stage already, and with exit code 1 at the first stage that has not done
what its config expects: the report and the last lines say what, and how such a stage is run anew.
"""

import itertools
import json
import os
from typing import NoReturn

import jax

from experiments.shared import cli
from experiments.shared.stage_configs import check_stages
from experiments.shared.stages import fail, start, start_stage, wait
from jaxgpt.data.sources import read_records
from jaxgpt.json_object import to_json
from jaxgpt.pipeline import expectations
from jaxgpt.pipeline.graph import PipelineConfig, StageConfig, key, substitute
from jaxgpt.reporting.pipeline_report import Lineage, Verdict, held, write_pipeline_report
from jaxgpt.runs import manifest as manifests
from jaxgpt.runs import workdir as workdirs


def main(config: PipelineConfig, workdir: str) -> None:
    """Run the stages of `workdir` that are not finished, then write its manifest and report."""
    jax.config.update("jax_platforms", "cpu")  # here alone: the devices are the stages'
    folders = {name: os.path.join(workdir, name) for name in config.order()}
    check_stages(config, folders)
    with workdirs.lock(workdir):
        path = os.path.join(workdir, "pipeline.json")
        record = workdirs.read_json(path) or {}
        order = config.order()
        digests: dict[str, str] = {}
        lineage: dict[str, Lineage] = {}
        for name in order:
            stage = config.stages[name]
            parents = {parent: digests[parent] for parent in sorted(stage.parents())}
            wanted = key(cli.plain_config(stage.spec), stage, parents)
            manifest = manifests.read_manifest(folders[name])
            is_new = manifest is None or record.get(name) != wanted
            if manifest is None or is_new:
                put_aside(workdir, name, is_other=record.get(name) != wanted)
                workdirs.write_atomic(path, json.dumps(record | {name: wanted}, indent=2) + "\n")
                record[name] = wanted
                manifest = run_stage(name, stage, folders)
            digests[name] = manifests.manifest_digest(manifest)
            verdicts = judge(stage, folders[name], manifest)
            lineage[name] = Lineage(stage.title, digests[name], stage.parents(), verdicts)
            result = workdirs.summary(manifest.get("final_metrics", {}))
            print(f"{name} is finished{result and f': {result}'} [{digests[name][:12]}]", flush=True)
            failed = [verdict for verdict in verdicts if not verdict.holds]
            if is_new or failed:
                write_pipeline_report(workdir, lineage, {})
            if failed:
                end(workdir, name, lineage, failed)
        samples = compare(config, folders, digests)
        parents = {name: {"path": os.path.abspath(folders[name]), "digest": digests[name]} for name in order}
        manifests.write_manifest(workdir, manifests.base_manifest(stage="pipeline", parents=parents))
        report = write_pipeline_report(workdir, lineage, samples)
        print(f"{held(lineage)} Report: {report}")


def put_aside(root: str, name: str, *, is_other: bool) -> None:
    """Move a stage's folder out of the way where it is that of another config or other parents."""
    folder = os.path.join(root, name)
    if not is_other or not os.path.exists(folder):
        return
    replaced = os.path.join(root, "replaced")
    os.makedirs(replaced, exist_ok=True)
    target = os.path.join(replaced, f"{name}-{len(os.listdir(replaced))}")
    os.rename(folder, target)
    print(f"{name} has changed, or what it is built on: the old one is now in {target}.")


def run_stage(name: str, stage: StageConfig, folders: dict[str, str]) -> dict:
    """Run a stage's command and return its manifest; its failure ends the pipeline with its exit code."""
    code = wait(start_stage(stage, stage.title or name, folders[name], folders))
    manifest = manifests.read_manifest(folders[name])
    if code or manifest is None:
        fail(f"the stage {name} ended with exit code {code}{'' if manifest else ', unfinished'}.", code or 1)
    return manifest


def judge(stage: StageConfig, folder: str, manifest: dict) -> list[Verdict]:
    """What became of the stage's expectations."""
    rows = workdirs.read_metrics(os.path.join(folder, "metrics.jsonl"))
    return expectations.judge(stage.expect, manifest, {k: v for row in reversed(rows) for k, v in row.items()})


def end(workdir: str, name: str, lineage: dict[str, Lineage], failed: list[Verdict]) -> NoReturn:
    """Exit 1: the stage has not done what its config expects, and what is built on it does not run."""
    print(f"{held(lineage)} Report: {os.path.join(workdir, 'report.html')}", flush=True)
    fail(
        f"the stage {name} has not done what is expected of it: {'; '.join(map(str, failed))}. The same command will say so "
        f"again; to run the stage anew, change a field (--config.stages.{name}.fields.FIELD=VALUE) or move "
        f"{os.path.join(workdir, name)} away.",
        1,
    )


def compare(config: PipelineConfig, folders: dict[str, str], digests: dict[str, str]) -> dict[str, list[dict]]:
    """What the models of config.compare answer to the same prompts: stage -> records of experiments.generate."""
    stages = [name for name in config.compare.stages if name in digests]
    if not stages:
        return {}
    root = os.path.join(os.path.dirname(folders[stages[0]]), "compare")
    os.makedirs(root, exist_ok=True)
    prompts, samples = os.path.join(root, "prompts.jsonl"), {}
    source = substitute(config.compare.prompts_file, folders)
    records = itertools.islice(read_records(source), config.compare.num_prompts)
    workdirs.write_atomic(prompts, "".join(to_json(record.fields) + "\n" for record in records))
    for name in stages:
        output = os.path.join(root, f"{name}-{digests[name][:12]}.jsonl")
        code = 0 if os.path.exists(output) else wait(start(
            "generate", "--config=configs/generate.py:greedy", f"--config.init_from={folders[name]}",
            f"--config.prompts_file={prompts}", f"--config.output={output}",
            f"--config.max_new_tokens={config.compare.max_new_tokens}",
        ))  # fmt: skip
        if code:
            fail(f"the model of {name} could not answer {prompts}.", code)
        with open(output, encoding="utf-8") as file:
            samples[name] = [json.loads(line) for line in file]
    return samples


if __name__ == "__main__":
    cli.run(main, PipelineConfig, default_config="configs/pipeline.py")
