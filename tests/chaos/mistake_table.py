"""The mistakes: a name, a command line, and the words that its sentence must have."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from tests.chaos.mistakes import run

NAMES, VERBS = ("Ann", "Bob", "Cid", "Dora"), ("sees", "likes", "calls")
STEPS = {
    "num_train_steps": 2,
    "eval_interval_steps": 0,
    "checkpoint.save_interval_steps": 2,
    "optimizer.warmup_steps": 1,
}
MODEL = {"num_layers": 1, "embed_dim": 16, "num_heads": 2, "mlp_dim": 32, "max_seq_length": 64}
TRAINING = ("pretrain", "sft", "reward", "dpo", "ppo", "grpo")


class Mistake(NamedTuple):
    """name: stage/kind/what. arguments: the folder it runs in -> its command line, after writing what that needs."""

    name: str
    stage: str
    arguments: Callable[[str], list[str]]
    words: tuple[str, ...]
    is_late: bool = False  # it cannot be known before the work is done, and may take longer


class World:
    """The least models that commands build on, made by the commands, and folders to make mistakes in."""

    def __init__(self, root: str):
        self.inputs, self._cases, self._count = os.path.join(root, "inputs"), os.path.join(root, "cases"), 0
        os.makedirs(self.inputs)
        os.makedirs(self._cases)
        pairs = [(a, verb, b) for a in NAMES for b in NAMES for verb in VERBS if a != b]
        corpus = "\n\n".join(f"{a} {verb} {b} and {k}." for k in range(4) for a, verb, b in pairs)
        self.write(self.inputs, "corpus.txt", corpus)
        tasks = [{"prompt": f"first of {a} {verb} {b}?", "response": f"{a}."} for a, verb, b in pairs]
        self.write(self.inputs, "tasks.jsonl", lines(tasks))
        preferences = [{"prompt": f"{a} {verb} {b}?", "chosen": f"{b}.", "rejected": f"{a}."} for a, verb, b in pairs]
        self.write(self.inputs, "preferences.jsonl", lines(preferences))
        self.write(
            self.inputs, "rewards.py", "def count(prompts, responses, records):\n    return [1.0 for _ in responses]\n"
        )
        for name in ("tokenizer", "pretrain", "sft", "reward", "finalize", "export_hf"):
            outcome = run(name, [f"--workdir={self.inputs}/{name}", *self.flags(name)])
            assert outcome.code == 0, f"{name}: {outcome.err}"

    def write(self, folder: str, name: str, content: str | bytes) -> str:
        """Write a file, and return its path."""
        path = os.path.join(folder, name)
        with open(path, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
        return path

    def fresh(self) -> str:
        """An empty folder."""
        self._count += 1
        folder = os.path.join(self._cases, str(self._count))
        os.makedirs(folder)
        return folder

    def flags(self, stage: str, /, **changes: Any) -> list[str]:
        """A right command line of a stage but for the workdir; fields are written a__b for a.b, None leaves one out."""
        config, fields = self._right(stage)
        fields = fields | {name.replace("__", "."): value for name, value in changes.items()}
        return [f"--config=configs/{config}", *(f"--config.{k}={v}" for k, v in fields.items() if v is not None)]

    def _right(self, stage: str) -> tuple[str, dict[str, Any]]:
        i = self.inputs
        tuned = {
            "init_from": f"{i}/pretrain" if stage == "sft" else f"{i}/sft", "data.holdout.fraction": 0.2, **STEPS,
            "data.cache_dir": f"{i}/cache",
        }  # fmt: skip
        training = tuned | {"data.sequence_length": 48, "batch_size": 8}
        pairs = training | {"data.train": f"{i}/preferences.jsonl"}
        rl = tuned | {
            "data.train": f"{i}/tasks.jsonl", "rollout.batch_size": 8, "rollout.max_prompt_length": 32,
            "rollout.max_new_tokens": 4, "ppo.num_minibatches": 2, "rewards": f"{{'r': {{'name': '{i}/rewards.py:count'}}}}",
        }  # fmt: skip
        corpus = {"data.train": f"{i}/corpus.txt", "data.text_separator": "\n\n"}
        pretrain = corpus | STEPS | {f"model.{name}": value for name, value in MODEL.items()} | {
            "data.tokenizer": f"{i}/tokenizer", "data.sequence_length": 32, "data.holdout.fraction": 0.1, "batch_size": 8,
            "data.cache_dir": f"{i}/cache",
        }  # fmt: skip
        task = f"{{'t': {{'kind': 'perplexity', 'path': '{i}/corpus.txt'}}}}"
        return {
            "tokenizer": ("tokenizer.py:char", corpus),
            "pretrain": ("pretrain.py:tiny", pretrain),
            "sft": ("sft.py", training | {"data.train": f"{i}/tasks.jsonl", "samples.num_heldout": 0}),
            "reward": ("reward.py", pairs),
            "dpo": ("dpo.py", pairs),
            "ppo": ("ppo.py", rl | {"reward_model": f"{i}/reward", "require_report_card": False}),
            "grpo": ("grpo.py", rl | {"rollout.num_samples_per_prompt": 4}),
            "best_of_n": ("grpo.py:best_of_n", rl | {"rollout.num_samples_per_prompt": 4}),
            "finalize": ("finalize.py", {"init_from": f"{i}/sft"}),
            "export_hf": ("export_hf.py", {"init_from": f"{i}/sft"}),
            "import_hf": ("import_hf.py", {"source": f"{i}/export_hf"}),
            "generate": ("generate.py", {"init_from": f"{i}/sft", "prompt": "Ann", "max_new_tokens": 4}),
            "chat": ("chat.py", {"init_from": f"{i}/sft"}),
            "serve": ("serve.py", {"init_from": f"{i}/sft", "port": 0}),
            "evaluate": ("evaluate.py", {"init_from": f"{i}/sft", "tasks": task}),
            "pipeline": ("pipeline.py", {}),
            "sweep": ("sweep.py", {}),
            "benchmark": ("benchmark.py", {}),
            "make_data": ("make_data.py:arithmetic", {}),
        }[stage]  # fmt: skip


def lines(rows: list) -> str:
    """Rows as jsonl."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def mistakes(world: World) -> list[Mistake]:
    """All of them, by kind."""
    found = [
        mistake
        for kind in (
            unknown_fields,
            values,
            numbers,
            flags,
            paths,
            records,
            damage,
            config_files,
            weights,
            stages,
            tasks,
        )
        for mistake in kind(world)
    ]
    names = [mistake.name for mistake in found]
    assert len(set(names)) == len(names), [name for name in names if names.count(name) > 1]
    return found


def changed(world: World, stage: str, kind: str, field: str, value: Any, *words: str) -> Mistake:
    """A right command line with one field changed; the sentence names the field, unless words say what else it names."""

    def arguments(folder: str) -> list[str]:
        text = value(folder) if callable(value) else value
        return [f"--workdir={folder}/run", *world.flags(stage, **{field.replace(".", "__"): text})]

    shown = "" if callable(value) else f"={value}"[:40]
    return Mistake(f"{stage}/{kind}/{field}{shown}", stage, arguments, words or (field,))


def unknown_fields(world: World) -> Iterator[Mistake]:
    """Fields that do not exist, with the nearest."""
    for stage in TRAINING:
        for given, nearest in (
            ("learning_rate", "optimizer.learning_rate"), ("lr", "optimizer.learning_rate"), ("dtype", "model.dtype"),
            ("warmup", "optimizer.warmup_steps"), ("steps", "num_train_steps"), ("train_data", "data.train"),
            ("optimizer.learnig_rate", "optimizer.learning_rate"), ("mesh.fdsp", "mesh.fsdp"),
            ("checkpoint.keep", "checkpoint."), ("sed", "seed"), ("data.trian", "data.train"),
        ):  # fmt: skip
            yield changed(world, stage, "unknown", given, "1", given, nearest)
    for stage, given, nearest in (
        ("tokenizer", "vocab", "tokenizer.vocab_size"), ("tokenizer", "data.trian", "data.train"),
        ("generate", "temperature", "sampler.temperature"), ("generate", "max_tokens", "max_new_tokens"),
        ("generate", "initfrom", "init_from"), ("chat", "temperature", "sampler.temperature"),
        ("serve", "slots", "num_slots"), ("serve", "prot", "port"), ("evaluate", "task", "tasks"),
        ("evaluate", "tasks.t.knd", "kind"), ("finalize", "dtyp", "dtype"), ("export_hf", "init", "init_from"),
        ("import_hf", "sorce", "source"), ("pipeline", "stage", "stages"), ("sweep", "serch", "search"),
        ("benchmark", "steps", "num_steps"), ("make_data", "sed", "seed"), ("best_of_n", "kl_coef", "ppo.kl_coef"),
    ):  # fmt: skip
        yield changed(world, stage, "unknown", given, "1", given, nearest)


def values(world: World) -> Iterator[Mistake]:
    """Texts that are not of the field's type, or not among its choices."""
    for stage in TRAINING:
        for field, text in (
            ("num_train_steps", "many"), ("num_train_steps", "2.5"), ("seed", "x"), ("optimizer.learning_rate", "fast"),
            ("optimizer.name", "adm"), ("eval_at_start", "perhaps"), ("mesh.data", "two"), ("data.fields", "[1]"),
            ("nonfinite.action", "ignore"), ("optimizer", "3"), ("optimizer.schedule", "cosin"),
        ):  # fmt: skip
            yield changed(world, stage, "value", field, text)
    for stage, field, text in (
        ("tokenizer", "tokenizer.model_type", "bep"), ("tokenizer", "tokenizer.vocab_size", "12"),
        ("generate", "sampler.temperature", "hot"), ("generate", "chat_template", "on"), ("chat", "seed", "x"),
        ("serve", "port", "http"), ("finalize", "dtype", "int3"), ("export_hf", "dtype", "int8"),
        ("import_hf", "dtype", "int8"), ("make_data", "kind", "sums"), ("benchmark", "what", "all"),
        ("evaluate", "batch_size", "x"), ("pretrain", "model.norm", "layer"), ("pretrain", "data.packing", "best"),
        ("sft", "sft.loss_on", "user"), ("sft", "chat_template", "chatm"), ("reward", "reward.loss", "bt"),
        ("dpo", "dpo.loss", "kto"), ("ppo", "ppo.kl_in", "both"), ("grpo", "advantage", "none"),
    ):  # fmt: skip
        yield changed(world, stage, "value", field, text)


def numbers(world: World) -> Iterator[Mistake]:
    """Numbers that are no numbers, out of bounds, or far too large for the machine."""
    for stage in TRAINING:
        for field, text in (
            ("optimizer.learning_rate", "1e999"), ("optimizer.learning_rate", "-1"), ("optimizer.weight_decay", "1e40"),
            ("optimizer.b1", "1"), ("seed", str(2**64)), ("seed", "-1"), ("num_epochs", "-1"),
            ("log_interval_steps", "0"), ("nonfinite.max_skipped", "-1"), ("samples.num_heldout", "-1"),
            ("mesh.expert", "2"), ("mesh.data", "0"), ("mesh.fsdp", "3"), ("checkpoint.max_to_keep", "0"),
            ("data.num_workers", "-1"), ("gradient_accumulation_steps", "3"),
        ):  # fmt: skip
            if field.startswith("samples.") and stage in ("reward", "dpo"):
                continue
            yield changed(world, stage, "number", field, text)
    for stage, field, text in (
        ("pretrain", "batch_size", str(10**9)), ("sft", "batch_size", str(10**9)), ("reward", "batch_size", str(10**9)),
        ("dpo", "batch_size", str(10**9)), ("grpo", "rollout.batch_size", str(4 * 10**9)),
        ("pretrain", "model.num_layers", str(10**6)), ("pretrain", "model.embed_dim", str(2 * 10**7)),
        ("pretrain", "model.norm_eps", "-1"), ("pretrain", "model.final_softcap", "0"), ("pretrain", "model.head_dim", "-8"),
        ("pretrain", "model.mlp_dim", "-5"), ("pretrain", "model.num_heads", "3"), ("pretrain", "model.dropout", "1"),
        ("pretrain", "model.vocab_size", "5"), ("pretrain", "model.max_seq_length", "8"),
        ("pretrain", "data.sequence_length", "1"), ("pretrain", "loss.chunk_tokens", "0"), ("sft", "lora.rank", "-1"),
        ("sft", "lora.dropout", "1"), ("dpo", "dpo.beta", "0"), ("dpo", "dpo.beta", "1e999"),
        ("reward", "reward.margin", "-1"),
        ("ppo", "ppo.kl_coef", "1e999"), ("ppo", "ppo.clip_epsilon", "0"), ("ppo", "rollout.temperature", "0"),
        ("ppo", "rollout.max_new_tokens", str(10**9)), ("ppo", "ppo.num_minibatches", "3"),
        ("grpo", "rollout.num_samples_per_prompt", "3"), ("grpo", "rollout.num_slots", "9"),
        ("generate", "max_new_tokens", "0"), ("generate", "max_new_tokens", str(10**12)), ("generate", "batch_size", "0"),
        ("generate", "sampler.top_p", "0"), ("generate", "sampler.temperature", "-1"), ("generate", "seed", str(2**64)),
        ("generate", "mesh.context", "2"), ("chat", "max_length", str(10**12)), ("chat", "max_new_tokens", "-1"),
        ("serve", "num_slots", str(10**9)), ("serve", "num_slots", "0"), ("serve", "max_choices", "999"),
        ("serve", "max_length", str(10**12)), ("serve", "mesh.context", "2"), ("benchmark", "num_steps", "0"),
        ("make_data", "heldout_fraction", "2"),
        ("make_data", "forget_carry", "-1"), ("make_data", "largest", "0"), ("tokenizer", "tokenizer.vocab_size", "-1"),
        ("tokenizer", "tokenizer.character_coverage", "0"), ("finalize", "group_size", "3"),
        ("evaluate", "batch_size", "0"), ("evaluate", "seed", "-1"), ("sweep", "num_trials", "-1"),
        ("sweep", "num_processes", "0"), ("sweep", "trial", "99"), ("export_hf", "mesh.data", "5"),
    ):  # fmt: skip
        yield changed(world, stage, "number", field, text)


def flags(world: World) -> Iterator[Mistake]:
    """Command lines that are wrong as such."""
    for stage in (
        "tokenizer",
        *TRAINING,
        "best_of_n",
        "finalize",
        "export_hf",
        "import_hf",
        "evaluate",
        "make_data",
        "pipeline",
    ):
        yield Mistake(f"{stage}/flag/no workdir", stage, lambda _, s=stage: world.flags(s), ("--workdir",))
    for stage in ("pretrain", "sft", "ppo", "generate", "serve", "sweep"):
        right = lambda folder, s=stage: [f"--workdir={folder}/run", *world.flags(s)]
        for name, more, words in (
            ("positional", ["extra"], ("extra",)), ("unknown flag", ["--confg=x"], ("confg",)),
            ("no value", ["--config.seed"], ("config.seed",)), ("no field", ["--config.=3"], ("config",)),
            ("no config", ["--config=configs/none.py"], ("configs/none.py",)),
            ("no preset", ["--config=configs/sft.py:none"], ("none", "full")),
            ("config a folder", ["--config=configs"], ("configs",)),
        ):  # fmt: skip
            yield Mistake(f"{stage}/flag/{name}", stage, lambda folder, m=more, r=right: [*r(folder), *m], words)
    yield changed(world, "benchmark", "number", "train.batch_size", str(10**9), "batch_size")
    for stage in ("sft", "reward", "dpo"):
        both = lambda folder, s=stage: [f"--workdir={folder}/run", *world.flags(s, num_epochs=2.0)]
        yield Mistake(f"{stage}/flag/steps and epochs", stage, both, ("num_train_steps", "num_epochs"))


def paths(world: World) -> Iterator[Mistake]:
    """Paths that lead nowhere, to the wrong thing, or where nothing can be written."""
    i = world.inputs
    for stage in (*TRAINING, "best_of_n"):
        data = "data.train"
        for name, value, words in (
            ("missing", f"{i}/task.jsonl", ("data.train", "task.jsonl")),
            ("no folder", f"{i}/none/a.jsonl", ("data.train", "none")),
            ("wrong kind", f"{i}/rewards.py", ("rewards.py",)),
            ("empty", "()", ("data.train",)),
            ("empty folder", lambda folder: folder, ("data.train",)),
            ("too long a name", "x" * 5000 + ".jsonl", ("data.train",)),
            ("below a file", f"{i}/tasks.jsonl/a.jsonl", ("data.train",)),
            ("a NUL", "a\0b.jsonl", ("data.train",)),
        ):
            made = changed(world, stage, f"path {name}", data, value, *words)
            yield made._replace(name=f"{stage}/path/data.train {name}")
    for stage in (*TRAINING[1:], "best_of_n", "finalize", "generate", "chat", "serve", "evaluate", "export_hf"):
        for name, value in (
            ("missing", f"{i}/none"), ("a file", f"{i}/tasks.jsonl"), ("no run", i), ("a tokenizer", f"{i}/tokenizer"),
        ):  # fmt: skip
            yield changed(world, stage, f"path {name}", "init_from", value, "init_from")._replace(
                name=f"{stage}/path/init_from {name}"
            )
    for stage in ("tokenizer", *TRAINING, "finalize", "export_hf", "import_hf", "evaluate", "make_data"):
        for name, workdir in (
            ("a file", lambda folder: world.inputs + "/tasks.jsonl"),
            ("below a file", lambda folder: world.inputs + "/tasks.jsonl/run"),
            ("unwritable", lambda folder: "/proc/run"),
            ("too long", lambda folder: folder + "/" + "x" * 300),
            ("a circle of links", _circle),
        ):

            def arguments(folder: str, s: str = stage, w: Callable = workdir) -> list[str]:
                return [f"--workdir={w(folder)}", *world.flags(s)]

            yield Mistake(f"{stage}/path/workdir {name}", stage, arguments, ())
    for name, output in (("a folder", lambda folder: folder), ("a full disk", lambda _: "/dev/full"),
                         ("below a file", lambda _: f"{i}/tasks.jsonl/out.jsonl")):  # fmt: skip
        yield changed(world, "generate", "path", "output", output, "/")._replace(
            name=f"generate/path/output {name}", is_late=name == "a full disk"
        )
    yield changed(world, "generate", "path", "prompts_file", f"{i}/none.txt")
    yield changed(world, "pretrain", "path", "data.tokenizer", f"{i}/none")
    yield changed(world, "pretrain", "path", "data.tokenizer", f"{i}/tasks.jsonl")
    yield changed(world, "sft", "path", "chat_template", f"{i}/none.jinja")
    yield changed(world, "ppo", "path", "reward_model", f"{i}/none")
    yield changed(world, "ppo", "path", "reward_model", f"{i}/sft", "reward_model")
    yield changed(world, "import_hf", "path", "source", f"{i}/none", "none")
    yield changed(world, "import_hf", "path", "source", f"{i}/sft", "sft")
    yield changed(world, "sft", "path", "data.cache_dir", f"{i}/tasks.jsonl", "tasks.jsonl")
    yield changed(world, "pretrain", "path", "data.cache_dir", "/proc/cache", "/proc/cache")


def _circle(folder: str) -> str:
    os.symlink("b", os.path.join(folder, "a"))
    os.symlink("a", os.path.join(folder, "b"))
    return os.path.join(folder, "a")


def records(world: World) -> Iterator[Mistake]:
    """Records that are damaged, or not those of the stage."""
    broken: dict[str, tuple[str, bytes]] = {
        "no JSON": (".jsonl", b'{"prompt": '),
        "a list": (".jsonl", b"[1]\n"),
        "not UTF-8": (".jsonl", b'{"prompt": "\xff"}\n'),
        "empty": (".jsonl", b""),
        "another field": (".jsonl", b'{"promt": "a"}\n'),
        "a number": (".jsonl", b'{"prompt": 3}\n'),
        "deep": (".jsonl", b'{"prompt": ' + b"[" * 100_000 + b"\n"),
        "digits": (".jsonl", b'{"prompt": ' + b"9" * 5000 + b"}\n"),
        "no gzip": (".jsonl.gz", b"plain"),
        "no parquet": (".parquet", b"PAR1"),
        "no array_record": (".array_record", b"junk"),
        "an empty prompt": (".jsonl", b'{"prompt": " ", "response": "a", "chosen": "a", "rejected": "b"}\n'),
    }
    for stage in ("sft", "reward", "dpo", "grpo"):
        for name, (suffix, content) in broken.items():
            value = lambda folder, s=suffix, c=content: world.write(folder, f"mine{s}", c)
            made = changed(world, stage, "record", "data.train", value, "mine")
            yield made._replace(name=f"{stage}/record/{name}")
        mapping = {"sft": "promt", "reward": "choosen", "dpo": "rejectd", "grpo": "promtp"}[stage]
        yield changed(world, stage, "record", "data.fields", f"{{'{mapping}': 'x'}}", "data.fields", mapping)
    for name, content in (("empty", b""), ("not UTF-8", b"ok\n\xff"), ("white", b" \n ")):
        value = lambda folder, c=content: world.write(folder, "mine.txt", c)
        for stage in ("tokenizer", "pretrain"):
            yield changed(world, stage, "record", "data.train", value, "mine.txt")._replace(
                name=f"{stage}/record/txt {name}"
            )
    for name, rewards, words in (
        ("exits", "import sys\ndef f(*a):\n    sys.exit(3)\n", ("mine.py", "SystemExit")),
        ("raises", "def f(*a):\n    return 1 / 0\n", ("mine.py", "line 2")),
        ("not a number", "def f(p, r, d):\n    return ['x' for _ in r]\n", ("mine.py",)),
        ("not loaded", "import nothing_like_this\n", ("mine.py", "nothing_like_this")),
        ("no function", "def g(*a):\n    pass\n", ("mine.py", "'g'")),
        ("exits when loaded", "import sys\nsys.exit(3)\n", ("mine.py",)),
        ("no Python", "def f(:\n", ("mine.py", "line 1")),
    ):
        value = lambda folder, c=rewards: "{'r': {'name': '" + world.write(folder, "mine.py", c) + ":f'}}"
        if name not in ("exits", "raises", "not a number"):  # those are known once something has been generated
            yield changed(world, "grpo", "record", "rewards", value, *words)._replace(name=f"grpo/record/reward {name}")


def damage(world: World) -> Iterator[Mistake]:
    """JSON files of a parent that a disk has damaged."""
    kinds = {
        "empty": lambda old: b"", "cut": lambda old: old[: len(old) // 2], "not UTF-8": lambda old: b"\xff\xfe" + old,
        "a list": lambda old: b"[1, 2]", "a number": lambda old: b"3", "deep": lambda old: b'{"a": ' + b"[" * 100_000,
    }  # fmt: skip
    for file in ("config.json", "manifest.json"):
        for stage in ("reward", "generate", "finalize", "export_hf"):
            for kind, change in kinds.items():
                yield _damaged(world, stage, "init_from", "sft", file, kind, change)
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        for kind, change in kinds.items():
            yield _damaged(world, "import_hf", "source", "export_hf", file, kind, change)
    yield _damaged(world, "generate", "init_from", "sft", "tokenizer.model", "flipped", _flipped, "tokenizer")
    yield _damaged(world, "generate", "init_from", "sft", "tokenizer.model", "empty", kinds["empty"], "tokenizer")
    sections = {
        "model a text": {"model": "large"}, "model a list": {"model": [1]}, "an unknown field": {"model": {"num_layer": 1}},
        "no model": {}, "a negative size": {"model": {"embed_dim": -1}},
    }  # fmt: skip
    for kind, content in sections.items():
        change = lambda old, c=content: json.dumps(c).encode()
        yield _damaged(world, "generate", "init_from", "sft", "config.json", kind, change, "")


def _flipped(old: bytes) -> bytes:
    return bytes(byte ^ 0xFF for byte in old)


def _damaged(
    world: World, stage: str, field: str, parent: str, file: str, kind: str, change, word: str | None = None
) -> Mistake:
    def copy(folder: str) -> str:
        target = os.path.join(folder, "parent")
        shutil.copytree(os.path.join(world.inputs, parent), target)
        path = os.path.join(target, file)
        with open(path, "rb") as old:
            content = change(old.read())
        world.write(target, file, content)
        return target

    made = changed(world, stage, "damage", field, copy, file if word is None else word)
    return made._replace(name=f"{stage}/damage/{file} {kind}")


def config_files(world: World) -> Iterator[Mistake]:
    """Config files that fail, or give what is no config."""
    get, dots = "def get_config():\n    ", "from ml_collections import ConfigDict\n"
    for stage in ("pretrain", "sft"):
        for name, text, words in (
            ("returns nothing", f"{get}pass\n", ("mine.py", "None")), ("a text", f"{get}return 'x'\n", ("mine.py", "str")),
            ("an undefined name", f"{get}return undefined\n", ("mine.py, line 2", "undefined")),
            ("no function", "x = 1\n", ("mine.py", "get_config")), ("no Python", "def get_config(:\n", ("mine.py, line 1",)),
            ("a missing module", "import nothing_here\n", ("mine.py, line 1", "nothing_here")),
            ("exits", "raise SystemExit(3)\n", ("mine.py, line 1",)),
            ("nan", f"{get}return {{'optimizer': {{'learning_rate': float('nan')}}}}\n", ("optimizer.learning_rate", "nan")),
            ("a huge seed", f"{get}return {{'seed': 10**5000}}\n", ("seed",)),
            ("steps and epochs", f"{get}return {{'num_train_steps': 2, 'num_epochs': 1.0}}\n", ("num_epochs", "mine.py")),
            ("a list for a section", f"{get}return {{'data': [1]}}\n", ("data",)),
            ("an unknown field", f"{get}return {{'optimizer': {{'lr': 1.0}}}}\n", ("optimizer.learning_rate",)),
            ("dots", dots + get + "return ConfigDict({'a.b': 1})\n", ("mine.py, line 3", "dots")),
        ):  # fmt: skip

            def arguments(folder: str, t: str = text, s: str = stage) -> list[str]:
                path = world.write(folder, "mine.py", t)
                right = [
                    flag for flag in world.flags(s) if flag.split("=")[0].removeprefix("--config.") not in _SET_BY_FILES
                ]
                return [f"--workdir={folder}/run", *right, f"--config={path}"]

            yield Mistake(f"{stage}/config file/{name}", stage, arguments, words)


_SET_BY_FILES = ("num_train_steps", "num_epochs", "seed", "optimizer.warmup_steps", "data.train", "data.tokenizer")


def weights(world: World) -> Iterator[Mistake]:
    """Weights of an artifact or a checkpoint that are damaged."""
    for stage, field, parent in (("generate", "init_from", "finalize"), ("import_hf", "source", "export_hf")):
        for kind, change in (
            ("empty", lambda old: b""), ("cut", lambda old: old[:-9]), ("short", lambda old: old[:5]),
            ("a long header", lambda old: b"\xff" * 8 + old[8:]), ("no JSON", lambda old: old[:8] + b"\xff" * 40 + old[48:]),
        ):  # fmt: skip
            yield _damaged(world, stage, field, parent, "model.safetensors", kind, change)
    yield _damaged(world, "generate", "init_from", "finalize", "model.safetensors", "flipped",
                   lambda old: old[:-4] + b"\0\1\2\3")  # fmt: skip


def stages(world: World) -> Iterator[Mistake]:
    """Pipelines and sweeps with a mistake in a late stage, which must not run the early ones."""
    for name, field, text, words in (
        ("field", "stages.ppo.fields.lr", "1", ("stages.ppo", "optimizer.learning_rate")),
        ("value", "stages.evaluate.fields.batch_size", "x", ("stages.evaluate", "batch_size")),
        ("bounds", "stages.final.fields.group_size", "3", ("stages.final", "group_size")),
        ("command", "stages.ppo.command", "pppo", ("stages.ppo", "'ppo'")),
        ("config", "stages.sft.config", "configs/none.py", ("stages.sft", "none.py")),
        ("preset", "stages.sft.config", "configs/sft.py:none", ("stages.sft", "full")),
        ("data", "stages.reward.fields.data.train", "none.jsonl", ("stages.reward", "none.jsonl")),
        ("reference", "stages.ppo.fields.init_from", "@sfd", ("sfd", "sft")),
        ("only", "only", "sfd", ("sfd", "sft")), ("compare", "compare.stages", "sfd", ("sfd", "sft")),
        ("expect", "stages.sft.expect", "('eval/loss is low',)", ("expect",)),
        ("no command", "stages.new.title", "x", ("stages.new.command",)),
    ):  # fmt: skip
        yield changed(world, "pipeline", "late", field, text, *words)._replace(name=f"pipeline/late/{name}")
    for name, field, text, words in (
        ("field", "search", "{'grpo': {'optimizer': {'lr': [1.0, 2.0]}}}", ("grpo", "optimizer.learning_rate")),
        ("early field", "search", "{'tokenizer': {'tokenizer': {'vocab_sise': [300, 400]}}}", ("tokenizer.vocab_size",)),
        ("value", "search", "{'grpo': {'ppo': {'kl_coef': ['x']}}}", ("ppo.kl_coef",)),
        ("stage", "search", "{'grop': {'seed': [1, 2]}}", ("grop", "grpo")),
        ("nothing", "search", "{}", ("search",)), ("empty", "search.grpo.seed", "[]", ("search.grpo.seed",)),
        ("a range in a grid", "search.grpo.seed", "{'low': 1, 'high': 2}", ("num_trials",)),
        ("half a range", "search.grpo.seed", "{'low': 1}", ("search.grpo.seed.high",)),
        ("metric", "metric", "grpo.final_metrics.eval/score", ("eval/scores",)),
        ("metric part", "metric", "grpo.final_metric.eval/scores", ("final_metrics",)),
        ("metric stage", "metric", "grop.final_metrics.eval/scores", ("grpo",)),
        ("metric alone", "metric", "loss", ("metric",)), ("no pipeline", "pipeline", "configs/none.py", ("none.py",)),
        ("mode", "mode", "least", ("mode",)),
    ):  # fmt: skip
        yield changed(world, "sweep", "late", field, text, *words)._replace(name=f"sweep/late/{name}")


def tasks(world: World) -> Iterator[Mistake]:
    """Evaluations that cannot be made."""
    i = world.inputs
    for name, task, words in (
        ("no kind", {"path": f"{i}/corpus.txt"}, ("tasks.t.kind",)), ("a kind", {"kind": "perplex"}, ("tasks.t.kind",)),
        ("no path", {"kind": "perplexity"}, ("tasks.t.path",)),
        ("a path", {"kind": "perplexity", "path": f"{i}/none.txt"}, ("tasks.t.path",)),
        ("a field of another kind", {"kind": "perplexity", "path": "x", "num_shots": 2}, ("tasks.t.num_shots",)),
        ("shots", {"kind": "generation", "path": f"{i}/tasks.jsonl", "num_shots": 2}, ("tasks.t.shots",)),
        ("a negative stride", {"kind": "perplexity", "path": "x", "stride": -1}, ("tasks.t.stride",)),
        ("a mapping", {"kind": "generation", "path": "x", "fields": {"promt": "q"}}, ("tasks.t.fields", "prompt")),
        ("a metric", {"kind": "generation", "path": "x", "metrics": {"m": {"name": "exact"}}}, ("exact_match",)),
        ("no answer", {"kind": "generation", "path": f"{i}/corpus.txt"}, ("corpus.txt",)),
    ):  # fmt: skip
        yield changed(world, "evaluate", "task", "tasks", f"{{'t': {task}}}", *words)._replace(
            name=f"evaluate/task/{name}"
        )
    yield changed(world, "evaluate", "task", "baseline", f"{i}/sft")
    long = "Ann sees Bob and 1. " * 20
    yield changed(world, "generate", "task", "prompt", long, "model.max_seq_length")
    yield changed(world, "generate", "task", "prompt", None, "prompt")._replace(name="generate/task/no prompt")
