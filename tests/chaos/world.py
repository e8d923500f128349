"""A small world: the least data and models that every command can run on, made by the commands themselves, undisturbed."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from tests.chaos import forks

NAMES, VERBS = ("Ann", "Bob", "Cid", "Dora"), ("sees", "likes", "calls")
MODEL = {"num_layers": 1, "embed_dim": 16, "num_heads": 2, "mlp_dim": 32, "max_seq_length": 64}
STEPS = {"num_train_steps": 6, "log_interval_steps": 2, "eval_interval_steps": 3, "checkpoint.save_interval_steps": 2}
PIPELINE = """
from ml_collections import ConfigDict

def get_config():
    model = {model}
    text = {{"train": "@data/corpus.jsonl", "holdout": {{"fraction": 0.1}}}}
    stages = {{
        "data": {{"command": "make_data", "config": "configs/make_data.py:arithmetic",
                 "fields": {{"largest": 19, "heldout_fraction": 0.5}}}},
        "tokenizer": {{"command": "tokenizer", "config": "configs/tokenizer.py:char", "fields": {{"data": text}}}},
        "pretrain": {{"command": "pretrain", "fields": {{
            "data": {{**text, "tokenizer": "@tokenizer", "sequence_length": 32}}, "model": model, "batch_size": 8,
            "num_train_steps": 4, "eval_interval_steps": 2, "log_interval_steps": 2,
            "checkpoint": {{"save_interval_steps": 2}}}}}},
        "final": {{"command": "finalize", "fields": {{"init_from": "@pretrain"}}}},
    }}
    return ConfigDict({{"stages": stages, "compare": {{
        "stages": ("pretrain",), "prompts_file": "@data/eval.jsonl", "num_prompts": 2, "max_new_tokens": 4}}}})
"""


class Command(NamedTuple):
    """One command line: name in the world, its stage, and a function from the folder of inputs to its arguments."""

    name: str
    stage: str
    arguments: Callable[[str], list[str]]


def _flags(config: str, fields: dict[str, Any]) -> list[str]:
    return [f"--config=configs/{config}", *(f"--config.{name}={value}" for name, value in fields.items())]


def _training(stage: str, preset: str, inputs: str, parent: str, data: str, **fields: Any) -> list[str]:
    common = {
        "init_from": f"{inputs}/{parent}", "data.train": f"{inputs}/{data}.jsonl", "data.holdout.fraction": 0.2,
        "data.sequence_length": 48, "batch_size": 8, "num_epochs": 0, **STEPS, "optimizer.warmup_steps": 2,
    }  # fmt: skip
    return _flags(f"{stage}.py:{preset}", common | {name.replace("__", "."): v for name, v in fields.items()})


def _rl(stage: str, preset: str, inputs: str, **fields: Any) -> list[str]:
    common = {
        "init_from": f"{inputs}/sft", "data.train": f"{inputs}/tasks.jsonl", "data.holdout.fraction": 0.2,
        "rollout.batch_size": 8, "rollout.max_prompt_length": 32, "rollout.max_new_tokens": 4, "ppo.num_minibatches": 2,
        "ppo.num_epochs": 1, "num_train_steps": 4, "eval_interval_steps": 2, "checkpoint.save_interval_steps": 2,
        "num_eval_prompts": 4, "samples.num_heldout": 2,
    }  # fmt: skip
    return _flags(f"{stage}.py:{preset}", common | {name.replace("__", "."): v for name, v in fields.items()})


def _pretrain(inputs: str) -> list[str]:
    fields = {
        "data.train": f"{inputs}/corpus.txt", "data.text_separator": "\n\n", "data.tokenizer": f"{inputs}/tokenizer",
        "data.sequence_length": 32, "data.holdout.fraction": 0.1, "data.eval_batches": 2, "batch_size": 8,
        "optimizer.warmup_steps": 2, "checkpoint.max_to_keep": 2, "samples.prompts": "Ann,Bob likes",
        "samples.max_new_tokens": 4,
    } | STEPS | {f"model.{name}": value for name, value in MODEL.items()}  # fmt: skip
    return _flags("pretrain.py:tiny", fields)


def _evaluate(inputs: str) -> list[str]:
    tasks = {
        "text": {"kind": "perplexity", "path": f"{inputs}/tasks.jsonl", "fields": {"text": "prompt"}},
        "words": {
            "kind": "generation", "path": f"{inputs}/tasks.jsonl", "fields": {"answer": "response"}, "max_new_tokens": 4
        },
    }  # fmt: skip
    return _flags("evaluate.py", {"init_from": f"{inputs}/sft", "tasks": tasks})


_ADAPTERS = {"lora__rank": 2, "lora__alpha": 2}
_REWARDS = "{'letters': {'name': 'INPUTS/rewards.py:count'}}"

# In an order in which each finds what it is built on.
COMMANDS = (
    Command(
        "tokenizer",
        "tokenizer",
        lambda i: _flags("tokenizer.py:char", {"data.train": f"{i}/corpus.txt", "data.text_separator": "\n\n"}),
    ),
    Command("pretrain", "pretrain", _pretrain),
    Command("sft", "sft", lambda i: _training("sft", "full", i, "pretrain", "tasks", samples__max_new_tokens=4)),
    Command(
        "lora", "sft", lambda i: _training("sft", "lora", i, "sft", "tasks", **_ADAPTERS, samples__max_new_tokens=4)
    ),
    Command("reward", "reward", lambda i: _training("reward", "full", i, "sft", "preferences")),
    Command("dpo", "dpo", lambda i: _training("dpo", "full", i, "sft", "preferences")),
    Command(
        "ppo",
        "ppo",
        lambda i: _rl("ppo", "full", i, reward_model=f"{i}/reward", require_report_card=False),
    ),
    Command(
        "grpo",
        "grpo",
        lambda i: _rl("grpo", "grpo", i, rewards=_REWARDS.replace("INPUTS", i), rollout__num_samples_per_prompt=4),
    ),
    Command(
        "best_of_n",
        "best_of_n",
        lambda i: _rl("grpo", "best_of_n", i, rewards=_REWARDS.replace("INPUTS", i), rollout__num_samples_per_prompt=4),
    ),
    Command("finalize", "finalize", lambda i: _flags("finalize.py:int8", {"init_from": f"{i}/lora"})),
    Command("evaluate", "evaluate", _evaluate),
    Command("export_hf", "export_hf", lambda i: _flags("export_hf.py", {"init_from": f"{i}/pretrain"})),
    Command("import_hf", "import_hf", lambda i: _flags("import_hf.py", {"source": f"{i}/export_hf"})),
    Command("pipeline", "pipeline", lambda i: [f"--config={i}/pipeline.py"]),
)
NAMES_OF_COMMANDS = [command.name for command in COMMANDS]
PARENTS = {
    "pretrain": ["tokenizer"], "sft": ["pretrain"], "lora": ["sft"], "reward": ["sft"], "dpo": ["sft"],
    "ppo": ["sft", "reward"], "grpo": ["sft"], "best_of_n": ["sft"], "finalize": ["lora"], "evaluate": ["sft"],
    "export_hf": ["pretrain"], "import_hf": ["export_hf"],
}  # fmt: skip


def with_parents(names: list[str]) -> list[str]:
    """The commands of these names and all that they are built on, in order."""
    wanted: set[str] = set()

    def visit(name: str) -> None:
        wanted.add(name)
        for parent in PARENTS.get(name, []):
            visit(parent)

    for name in names:
        visit(name)
    return [name for name in NAMES_OF_COMMANDS if name in wanted]


def write_data(inputs: str) -> None:
    """The text, tasks, preferences, reward function and pipeline config that the commands read."""
    os.makedirs(inputs)
    pairs = [(a, verb, b) for a in NAMES for b in NAMES for verb in VERBS if a != b]
    files = {
        "corpus.txt": "\n\n".join(f"{a} {verb} {b} and {k}." for k in range(7) for a, verb, b in pairs),
        "tasks.jsonl": _lines({"prompt": f"first of {a} {verb} {b}?", "response": f"{a}."} for a, verb, b in pairs),
        "preferences.jsonl": _lines(
            {"prompt": f"{a} {verb} {b}?", "chosen": f"{b} and {k}.", "rejected": f"{b}{' sees' * k}."}
            for a, verb, b in pairs
            for k in (1, 2)
        ),
        "rewards.py": 'def count(prompts, responses, records):\n    return [text.count("e") for text in responses]\n',
        "pipeline.py": PIPELINE.format(model=MODEL),
    }
    for name, content in files.items():
        with open(os.path.join(inputs, name), "w") as file:
            file.write(content)


def _lines(rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


class World:
    """Inputs and cases below a folder; a command's case is always the same path, so that no path tells runs apart."""

    def __init__(self, root: str):
        self.inputs, self._cases = os.path.join(root, "inputs"), os.path.join(root, "cases")
        self.facts: dict[str, dict[str, str]] = {}
        self.operations: dict[str, int] = {}
        write_data(self.inputs)

    def case(self, name: str) -> str:
        """The folder of a command's runs: its workdir and what is written beside it."""
        return os.path.join(self._cases, name)

    def clear(self, name: str) -> None:
        """Remove what a command's last run has left."""
        shutil.rmtree(self.case(name), ignore_errors=True)
        os.makedirs(self.case(name))

    def run(self, name: str, fault: Any = None, *more: str) -> forks.Outcome:
        """Run a command in its case, on what is there."""
        arguments = [f"--workdir={self.case(name)}/run", *self.arguments(name), *more]
        return forks.run(self.stage(name), arguments, root=self.case(name), fault=fault)

    def arguments(self, name: str) -> list[str]:
        """The flags of a command, but for its workdir."""
        return COMMANDS[NAMES_OF_COMMANDS.index(name)].arguments(self.inputs)

    def stage(self, name: str) -> str:
        """The experiments.STAGE of a command."""
        return COMMANDS[NAMES_OF_COMMANDS.index(name)].stage

    def make(self, names: list[str]) -> None:
        """Run the commands and what they are built on undisturbed: the inputs of others, and what theirs must equal."""
        for name in with_parents(names):
            self.clear(name)
            done = self.run(name)
            if done.code:
                raise RuntimeError(f"{name} ended with {done.code}, undisturbed: {done.err}")
            self.facts[name], self.operations[name] = facts(self.case(name)), done.operations
            shutil.move(os.path.join(self.case(name), "run"), os.path.join(self.inputs, name))
            shutil.rmtree(self.case(name))


_CLOCK = ("train/tokens_per_second", "train/mfu", "time/rollout_seconds", "time/update_seconds")
_PRESENT = re.compile(r"report\.html|.*\.png")  # drawn from the clock, too
_FREE = re.compile(r"\.lock|pipeline\.json|.*events\.out\.tfevents.*|file_digests\.json")
TEMPORARY = re.compile(r"\.tmp\b|\.partial\b|orbax-checkpoint-tmp|\.tmp-|^tmp")


def facts(case: str) -> dict[str, str]:
    """What a case is, whatever the time and however often it was begun: name -> sha256, or what else must be the same."""
    path = f"{case}.facts"

    def write() -> None:
        found = dict(_facts(case))
        with open(path, "w") as file:
            json.dump(found, file)

    done = forks.call(write)
    if done.code:
        return {"it": f"cannot be read: {done.error}"}
    with open(path) as file:
        return json.load(file)


def _facts(case: str) -> Iterator[tuple[str, str]]:
    for folder, folders, names in os.walk(case):
        folders.sort()
        relative = os.path.relpath(folder, case)
        if os.path.basename(folder) == "checkpoints":
            yield relative, checkpoint_digest(folder)
        for name in sorted([*names, *folders]):
            if TEMPORARY.search(name):
                yield os.path.join(relative, name), "temporary"
        if "checkpoints" in relative.split(os.sep):
            continue
        for name in sorted(names):
            path = os.path.join(folder, name)
            if _FREE.fullmatch(name):
                continue
            yield os.path.join(relative, name), "present" if _PRESENT.fullmatch(name) else digest(path)


def digest(path: str) -> str:
    """sha256 of a file, without what the clock has written."""
    with open(path, "rb") as file:
        content = file.read()
    if os.path.basename(path) == "metrics.jsonl":
        rows = [json.loads(line) for line in content.splitlines()]
        content = json.dumps([{k: v for k, v in row.items() if k not in _CLOCK} for row in rows]).encode()
    elif os.path.basename(path) == "manifest.json":
        manifest = json.loads(content)
        manifest.pop("checkpoint", None)  # the sha256 of files that orbax writes names and times of its own into
        content = json.dumps(manifest, sort_keys=True).encode()
    return hashlib.sha256(content).hexdigest()


def checkpoint_digest(folder: str) -> str:
    """The newest step, whether it has digests, and sha256 of the state's arrays: parameters, optimizer, random keys."""
    import tensorstore

    steps = [int(name) for name in os.listdir(folder) if name.isdecimal()]
    if not steps:
        return "no checkpoint"
    path = os.path.join(folder, str(max(steps)), "state")
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": f"file://{path}/"}).result()
    hashed = hashlib.sha256()
    for key in sorted(store.list().result()):
        hashed.update(key + b"\0" + store.read(key).result().value)
    trusted = os.path.isfile(os.path.join(folder, "digests", f"{max(steps)}.json"))
    return f"step {max(steps)}, {'with' if trusted else 'without'} digests: {hashed.hexdigest()}"


def difference(expected: dict[str, str], found: dict[str, str]) -> list[str]:
    """What is not the same, in words."""
    if "it" in found:
        return [f"it {found['it']}"]
    lines = []
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            what = "is missing" if name not in found else "is left behind" if name not in expected else "differs"
            lines.append(f"{name} {what}")
    return lines
