"""The course of every training command: lock, data, run, manifest, report."""

import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from jaxgpt import partition
from jaxgpt.config import to_dict
from jaxgpt.data.chat import ChatTemplate
from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.generate.text import generate_texts
from jaxgpt.models.config import ModelConfig
from jaxgpt.reporting.report import write_report
from jaxgpt.runs import manifest as manifests
from jaxgpt.runs import workdir as workdirs
from jaxgpt.runs.checkpoint import checkpoint_digest, stored_sources
from jaxgpt.train.callbacks import Callback
from jaxgpt.train.config import RunConfig, SamplesConfig, check_mesh
from jaxgpt.train.run import Program, Stage, run, run_program
from jaxgpt.types import Params

# Fields that may change between the runs of one workdir without changing what it computes, but for its length.
FREE_FIELDS = (
    "num_train_steps", "log_interval_steps", "mesh", "dcn_mesh", "checkpoint", "profile", "samples", "wandb", "nonfinite",
    "data.num_workers", "data.prefetch", "data.cache_dir", "rollout.num_slots",
)  # fmt: skip


class DataSummary(Protocol):
    """What is known of a run's data; `batches.Data` is one.

    stats: counts by "train/<name>" and "eval/<name>". fingerprint: of all content; fingerprints: of the files that a field of
    the config names, by field.
    """

    stats: dict[str, dict[str, int]]
    fingerprint: str
    fingerprints: dict[str, str]

    @property
    def train_rows(self) -> int:
        """Rows of one epoch."""
        ...


@dataclasses.dataclass(frozen=True)
class Job:
    """What a command brings to `train_in`.

    parents: {"init_from": {"path", "digest"}}. sources: digests of what else is read, by field. reference_lines: losses of
    guessing, for the plots. finish: called after the last step; what it returns goes into the manifest.
    """

    stage: Stage | Program
    data: DataSummary
    tokenizer: Tokenizer
    template: ChatTemplate | None = None
    parents: dict[str, dict[str, str]] = dataclasses.field(default_factory=dict)
    sources: dict[str, str] = dataclasses.field(default_factory=dict)
    reference_lines: dict[str, float] = dataclasses.field(default_factory=dict)
    finish: Callable[[], dict] = dict

    def all_sources(self) -> dict[str, str]:
        """The digest of everything that the run reads, by field; what others are made with comes before them."""
        template = {"chat_template": self.template.digest} if self.template is not None else {}
        parents = {field: parent["digest"] for field, parent in self.parents.items()}
        return parents | {"data.tokenizer": self.tokenizer.digest} | template | self.sources | self.data.fingerprints


def train_in(
    workdir: str, name: str, config: RunConfig, model: ModelConfig, prepare: Callable[[Mesh, str], Job]
) -> None:
    """Train the run in `workdir`, or go on with it; then write its manifest and report.

    prepare: (mesh, folder for tokens) -> the job; called once it is clear that there is something to do.
    """
    # Adapters find their base by it, from wherever they are loaded.
    parent = os.path.abspath(config.init_from) if config.init_from else ""
    resolved = to_dict(config) | {"model": to_dict(model), "init_from": parent}
    mesh = partition.make_mesh(config.mesh, config.dcn_mesh)
    check_mesh(config, model, mesh)
    with workdirs.lock(workdir):
        workdirs.check_same(workdir, resolved, ignore=FREE_FIELDS)
        done = manifests.read_manifest(workdir)
        if done and (config.num_epochs or done["step"] >= config.num_train_steps):
            print(f"{workdir} is finished: step {done['step']}, {workdirs.summary(done['final_metrics'])}.")
            renew_report(workdir)
            return
        cache_dir = config.data.cache_dir or os.path.join(os.path.dirname(os.path.abspath(workdir)), "token_cache")
        job = prepare(mesh, cache_dir)
        sources = job.all_sources()
        stored = stored_sources(os.path.join(workdir, "checkpoints"))
        if stored is not None:
            workdirs.check_sources(workdir, stored, sources)
        length = config.length(job.data.train_rows)
        config = dataclasses.replace(config, num_train_steps=config.num_steps(job.data.train_rows))
        resolved["num_train_steps"] = config.num_train_steps
        is_main = jax.process_index() == 0
        if is_main:
            for label, stats in job.data.stats.items():
                print(f"{label}: " + ", ".join(f"{count:,} {what}" for what, count in stats.items()))
            print(f"{length}.")
            if done:  # it goes on: what starts from it must not take its newest checkpoint for the finished one
                os.remove(os.path.join(workdir, "manifest.json"))
                print(
                    f"{workdir} was finished at step {done['step']} and goes on to step {config.num_train_steps}; schedules "
                    "are now those of the longer run, so that the learning rate may jump."
                )
            workdirs.write_config(workdir, resolved)
            job.tokenizer.save(workdir)
            if job.template is not None:
                job.template.save(workdir)
        go = run_program if isinstance(job.stage, Program) else run
        try:
            go(config, workdir, mesh, dataclasses.replace(job.stage, sources=sources), reports(workdir))
        except (FloatingPointError, workdirs.Stopped):
            if is_main:
                try_report(workdir)  # of how far it came
            raise
        if is_main:
            print(
                f"Finished at step {config.num_train_steps}: {finish(workdir, name, resolved, job, sources)}.",
                flush=True,
            )
            try_report(workdir)


def finish(workdir: str, name: str, resolved: dict, job: Job, sources: dict[str, str]) -> str:
    """Write the manifest of a run that has done its last step; returns its last metrics in a line.

    sources: as of `Job.all_sources`.

    Raises ValueError where they are lost: the run was killed just before, and somebody has removed metrics.jsonl.
    """
    step = resolved["num_train_steps"]
    log = os.path.join(workdir, "metrics.jsonl")
    rows = workdirs.read_steps(log)
    if not rows or rows[-1]["step"] != step:
        raise ValueError(
            f"{log} lacks the row of step {step}, the last one, which the manifest needs; restore it from a copy, or remove "
            f"{os.path.join(workdir, 'checkpoints', str(step))}, and the steps since the checkpoint before are done again."
        )
    final = workdirs.without_times(rows[-1])
    manifest = manifests.base_manifest(
        stage=name, config=resolved, tokenizer_digest=job.tokenizer.digest,
        chat_template_digest=job.template.digest if job.template is not None else None,
        special_ids=job.tokenizer.special_ids, vocab_size=job.tokenizer.vocab_size,
        data_fingerprint=job.data.fingerprint, data=job.data.stats, parents=job.parents, sources=sources, final_metrics=final,
        step=step, reference_lines=job.reference_lines,
        checkpoint={"step": step, "digest": checkpoint_digest(os.path.join(workdir, "checkpoints"), step)},
        **job.finish(),
    )  # fmt: skip
    manifests.write_manifest(workdir, manifest)
    return workdirs.summary(final)


def try_report(workdir: str) -> None:
    """Write the report and say where it is, or why it could not be written: what it is about is safe either way."""
    try:
        print(f"Report: {write_report(workdir)}", flush=True)
    except Exception as error:
        print(f"The report of {workdir} could not be written ({error}); the rest is complete.", file=sys.stderr)


def renew_report(workdir: str) -> None:
    """Write the report of a finished run where a kill has left none, or an older one."""
    report, manifest = (os.path.join(workdir, name) for name in ("report.html", "manifest.json"))
    if jax.process_index() == 0 and not (
        os.path.exists(report) and os.path.getmtime(report) >= os.path.getmtime(manifest)
    ):
        try_report(workdir)


def reports(workdir: str) -> tuple[Callback, ...]:
    """What writes the report anew after an evaluation, as long as that takes a twentieth of the time at most."""
    next_time = 0.0

    def on_log(step: int, row: dict[str, float]) -> None:
        nonlocal next_time
        began = time.monotonic()
        if began < next_time or not any(name.startswith("eval") for name in row):
            return
        with contextlib.suppress(Exception):  # the one at the end says what is wrong
            write_report(workdir)
        next_time = time.monotonic() + 19 * (time.monotonic() - began)

    return (Callback(on_log=on_log),)


def sample_writer(
    config: SamplesConfig,
    model: ModelConfig,
    tokenizer: Tokenizer,
    workdir: str,
    mesh: Mesh,
    prompts: Sequence[tuple[str, np.ndarray, dict]],
    stop_ids: tuple[int, ...],
    seed: int,
) -> tuple[Callable[[int, Params], None], Callable[[int], None]]:
    """(on_eval, on_start) of a stage that writes what it generates at each evaluation to samples.jsonl.

    prompts: (text, ids, further fields of the sample's record).
    """
    is_main = jax.process_index() == 0
    log = workdirs.JsonLog(os.path.join(workdir, "samples.jsonl")) if is_main else None

    def on_eval(step: int, params: Params) -> None:
        if not prompts:
            return
        texts = generate_texts(
            model, params, tokenizer, [text for text, _, _ in prompts], encoded=[ids for _, ids, _ in prompts],
            sampler=config.sampler, max_new=config.max_new_tokens, seed=seed, batch_size=len(prompts), eos_ids=stop_ids,
            mesh=mesh,
        )  # fmt: skip
        if log is not None:
            log.append(step, *(text | more for text, (_, _, more) in zip(texts, prompts, strict=True)))

    return on_eval, log.truncate_after if log is not None else lambda step: None
