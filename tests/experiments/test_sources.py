"""A run goes on with the content it was started with, or not at all: data, tokenizer, template, rewards, parents."""

import json
import re

import pytest

from experiments import best_of_n, ppo
from experiments.shared import training
from jaxgpt.data.chat import CHAT_TEMPLATES
from jaxgpt.data.sentencepiece_tokenizer import TokenizerConfig, train_tokenizer
from jaxgpt.rl.config import RLConfig
from tests.experiments.conftest import files, here
from tests.finalize.conftest import TEXT, Maker, random_params

REWARDS = "def score(prompts, responses, records):\n    return [{} for _ in responses]\n"
LETTERS = "".join(sorted(set(TEXT + "?abcdefghijklmnopqrstuvwxyz\n")))


class Inputs:
    """Everything that runs of all kinds read, in one folder."""

    def __init__(self, root):
        self.root = root
        make = Maker(root, train_tokenizer([TEXT, LETTERS], TokenizerConfig("char", vocab_size=400)))
        self.parent = make("parent", [random_params(make.model, 0)])  # it knows no template
        (root / "text.txt").write_text("\n\n".join(f"Ann sees Bob and {i}." for i in range(90)))
        (root / "template.jinja").write_text(CHAT_TEMPLATES["roles"])
        (root / "rewards.py").write_text(REWARDS.format(1.0))
        (root / "gold.py").write_text(REWARDS.format(2.0))
        (root / "tokenizer").mkdir()
        make.tokenizer.save(str(root / "tokenizer"))
        self.records("sft", [{"prompt": f"who is {i}?", "response": "Ann."} for i in range(9)])
        self.records("pairs", [{"prompt": f"who is {i}?", "chosen": "Ann.", "rejected": "Bob."} for i in range(9)])

    def records(self, name: str, rows: list[dict]) -> None:
        """Write a file of records, and one of others beside it, for evaluation."""
        for part, some in ((name, rows), (f"{name}_eval", rows[:4])):
            (self.root / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))

    def arguments(self, stage: str) -> list[str]:
        """The flags of a small run."""
        data = {"pretrain": "text.txt", "sft": "sft.jsonl", "ppo": "sft.jsonl", "best_of_n": "sft.jsonl"}
        train = data.get(stage, "pairs.jsonl")
        fields = {"data.train": self.root / train, "batch_size": 8, "num_train_steps": 5, "data.sequence_length": 48}
        preset = {"pretrain": "pretrain.py:tiny", "best_of_n": "grpo.py:best_of_n", "ppo": "grpo.py:grpo"}
        if stage == "pretrain":
            fields |= {
                "data.tokenizer": self.root / "tokenizer", "data.text_separator": "\n\n", "model.max_seq_length": 64,
                "model.num_layers": 1, "model.embed_dim": 16, "model.num_heads": 2, "model.mlp_dim": 32,
            }  # fmt: skip
        else:
            fields |= {"init_from": self.parent, "chat_template": self.root / "template.jinja"}
        if stage in ("ppo", "best_of_n"):
            sources = (
                {"mine": {"name": f"{self.root}/rewards.py:score"}},
                {"own": {"name": f"{self.root}/gold.py:score"}},
            )
            fields |= {"rewards": sources[0], "gold": sources[1], "rollout.max_prompt_length": 32,
                       "rollout.max_new_tokens": 8, "rollout.batch_size": 8}  # fmt: skip
            del fields["batch_size"]
        if stage == "best_of_n":
            fields["data.holdout.fraction"] = 0.0
        else:
            fields["data.eval"] = self.root / train.replace(".jsonl", "_eval.jsonl")
        return [
            f"--config=configs/{preset.get(stage, stage + '.py:full')}",
            *(f"--config.{k}={v}" for k, v in fields.items()),
        ]


@pytest.fixture
def inputs(tmp_path) -> Inputs:
    return Inputs(tmp_path)


def append(path) -> None:
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines, lines[0].replace("0", "7")]) + "\n")


def other_tokenizer(root) -> None:
    """One of as many pieces, with another normalisation."""
    config = TokenizerConfig("char", vocab_size=400)
    train_tokenizer([TEXT.replace("A", "Z"), LETTERS.replace("A", "Z")], config).save(str(root / "tokenizer"))


def other_parent(root) -> None:
    path = root / "parent/manifest.json"
    path.write_text(path.read_text().replace('"eval/loss": 5.5', '"eval/loss": 5.6'))


def other_template(root) -> None:
    path = root / "template.jinja"
    path.write_text(path.read_text() + "{# another #}")


CHANGES = {
    "data.train": {"pretrain": lambda root: append(root / "text.txt"), "sft": lambda root: append(root / "sft.jsonl"),
                   "ppo": lambda root: append(root / "sft.jsonl"), "best_of_n": lambda root: append(root / "sft.jsonl"),
                   "reward": lambda root: append(root / "pairs.jsonl"), "dpo": lambda root: append(root / "pairs.jsonl")},
    "data.eval": {"sft": lambda root: append(root / "sft_eval.jsonl"), "ppo": lambda root: append(root / "sft_eval.jsonl"),
                  "dpo": lambda root: append(root / "pairs_eval.jsonl")},
    "data.tokenizer": {"pretrain": other_tokenizer},
    "chat_template": dict.fromkeys(("sft", "reward", "dpo", "ppo", "best_of_n"), other_template),
    "init_from": dict.fromkeys(("sft", "reward", "dpo", "ppo", "best_of_n"), other_parent),
    "rewards.mine": dict.fromkeys(("ppo", "best_of_n"), lambda root: (root / "rewards.py").write_text(REWARDS.format(3.0))),
    "gold.own": dict.fromkeys(("ppo", "best_of_n"), lambda root: (root / "gold.py").write_text(REWARDS.format(3.0))),
}  # fmt: skip


class Started(Exception):
    """The run would begin to train now."""


def begin(stage: str, workdir, arguments: list[str], monkeypatch) -> dict[str, str]:
    """Everything that a command does before its first step; returns the sources that its checkpoints would hold."""
    seen = []

    def train(config, folder, mesh, program, *_, **__):
        seen.append(program.sources)
        raise Started

    def sample(*_, **__):
        raise Started

    monkeypatch.setattr(training, "run", train)
    monkeypatch.setattr(training, "run_program", train)
    monkeypatch.setattr(best_of_n, "best_of_n", sample)
    for module in (ppo, best_of_n):
        monkeypatch.setattr(module, "Config", RLConfig, raising=False)  # as which `here` builds what the flags say
    with pytest.raises(Started):
        here(stage, f"--workdir={workdir}", *arguments)
    return seen[0] if seen else json.loads((workdir / "sources.json").read_text())


@pytest.mark.parametrize(("field", "stage"), [(field, stage) for field, stages in CHANGES.items() for stage in stages])
def test_a_run_does_not_go_on_with_other_content(inputs, tmp_path, monkeypatch, field, stage):
    workdir, arguments = tmp_path / "runs" / "run", inputs.arguments(stage)
    sources = begin(stage, workdir, arguments, monkeypatch)
    if stage == "best_of_n":
        (workdir / "best.jsonl").write_text('{"step": 0}\n{"step": 1}\n')
    else:  # what a run that was killed in its third step leaves
        (workdir / "checkpoints/2/meta").mkdir(parents=True)
        (workdir / "checkpoints/2/meta/metadata").write_text(json.dumps({"sources": sources}))
    assert begin(stage, workdir, arguments, monkeypatch) == sources
    CHANGES[field][stage](inputs.root)
    before = files(workdir)
    with pytest.raises(ValueError, match=rf"^{re.escape(field)} has other content than when the run in {workdir}"):
        here(stage, f"--workdir={workdir}", *arguments)
    assert files(workdir) == before, "what the run was started with is still there"
