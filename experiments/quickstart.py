"""From this machine's own Python to a GPT that answers: corpus, tokenizer, pretraining, SFT, reward model, reports.

    python -m experiments.quickstart --workdir=runs/quickstart      (or: make quickstart)

The data are what every Python installation has: docstrings, the language reference and source of its standard library,
read by ast without importing anything. A tenth of its packages is held out from all stages. Each stage is the ordinary
command, printed before it runs, so that it can be copied. Exits with an error if a stage did not learn. Run again, it
resumes or says that it is finished.
"""

import argparse
import functools
import json
import os
import shlex
import subprocess
import sys

from jaxgpt.data.stdlib_corpus import write_stdlib_corpus
from jaxgpt.data.stdlib_tasks import is_held_out_module, write_stdlib_tasks
from jaxgpt.train.workdir import read_rows


def main(flags: argparse.Namespace) -> None:
    """Run the stages one after the other."""
    root = flags.workdir
    path = functools.partial(os.path.join, root)
    os.makedirs(root, exist_ok=True)
    if not os.path.exists(path("tasks", "sft_train.jsonl")):
        print(f"\n== Data: the standard library of Python {sys.version.split()[0]} -> {root}")
        unseen = functools.partial(is_held_out_module, seed=0, fraction=0.1)
        print(write_stdlib_corpus(path("corpus.jsonl"), max_bytes=flags.max_bytes, skip=unseen))
        print(write_stdlib_tasks(path("tasks"), seed=0, heldout_fraction=0.1, max_records=flags.max_records or None))
    stage(
        "Tokenizer: byte-pair encoding, 2048 pieces",
        "tokenizer", "--config=configs/tokenizer.py:quickstart", f"--workdir={path('tokenizer')}",
        f"--config.data.train={path('corpus.jsonl')}",
    )  # fmt: skip
    steps = [f"--config.num_train_steps={flags.num_train_steps}"] if flags.num_train_steps else []
    stage(
        "Pretraining: next-token prediction",
        "pretrain", "--config=configs/pretrain.py:quickstart", f"--workdir={path('pretrain')}",
        f"--config.data.train={path('corpus.jsonl')}", f"--config.data.tokenizer={path('tokenizer')}", *steps,
    )  # fmt: skip
    for name, title, parent in (
        (
            "sft",
            "Supervised fine-tuning: questions about functions and classes, answered from their docstrings",
            "pretrain",
        ),
        ("reward", "Reward model: which of three answers is right", "sft"),
    ):
        data = path("tasks", {"sft": "sft", "reward": "preferences"}[name])
        stage(
            title, name, f"--config=configs/{name}.py:quickstart", f"--workdir={path(name)}",
            f"--config.init_from={path(parent)}", f"--config.data.train={data}_train.jsonl",
            f"--config.data.eval={data}_eval.jsonl", *(steps and [*steps, "--config.num_epochs=0"]),
        )  # fmt: skip
    judge(root)


def stage(title: str, name: str, *arguments: str) -> None:
    """Print and run one stage's command; its failure ends the quickstart with its exit code."""
    print(f"\n== {title}\n$ python -m experiments.{name} {shlex.join(arguments)}", flush=True)
    code = subprocess.run([sys.executable, "-m", f"experiments.{name}", *arguments], check=False).returncode
    if code:
        print(f"error: the stage {name} ended with exit code {code}.", file=sys.stderr)
        sys.exit(code)


def judge(root: str) -> None:
    """Print each stage's result beside what it started from; exit 1 if one is not clearly better."""
    manifests, first_rows = {}, {}
    for name in ("pretrain", "sft", "reward"):
        with open(os.path.join(root, name, "manifest.json")) as file:
            manifests[name] = json.load(file)
        first_rows[name] = read_rows(os.path.join(root, name, "metrics.jsonl"))[0]
    pretrain, sft, reward = (manifests[name]["final_metrics"] for name in manifests)
    unigram = manifests["pretrain"]["reference_lines"]["unigram entropy"]
    before = first_rows["sft"]["eval/loss"]
    rate = manifests["reward"]["report_card"]["accuracy"]
    print("\n== Result, on held-out data")
    print(f"pretrain  {pretrain['eval/loss']:.3f} nats/token, {pretrain['eval/bits_per_byte']:.3f} bits/byte; ", end="")
    print(f"guessing by frequency gives {unigram:.3f}")
    print(f"sft       {sft['eval/loss']:.3f} nats/token of the answer; the pretrained model had {before:.3f}")
    print(
        f"reward    {rate['accuracy']:.1%} of pairs ordered right [{rate['low']:.1%}, {rate['high']:.1%}]; a coin gives 50 %"
    )
    for name in manifests:
        print(f"{name + ':':<10}{os.path.join(root, name, 'report.html')}")
    print(f"Try it:   python -m experiments.generate --config.init_from={os.path.join(root, 'sft')} "
          "--config.prompt='What does the function os.path.join do?'")  # fmt: skip
    learned = {
        "pretrain": pretrain["eval/loss"] < 0.9 * unigram,
        "sft": sft["eval/loss"] < 0.9 * before,
        "reward": rate["low"] > 0.5,
    }
    if not all(learned.values()):
        failed = ", ".join(name for name, good in learned.items() if not good)
        print(f"error: not better than where it started: {failed}.", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", default="runs/quickstart", help="where everything goes")
    parser.add_argument("--num_train_steps", type=int, default=0, help="of every stage; 0 keeps the configs' numbers")
    parser.add_argument("--max_bytes", type=int, default=6_000_000, help="size of the corpus, in bytes of text")
    parser.add_argument("--max_records", type=int, default=0, help="of each task file; 0 is all there are")
    main(parser.parse_args())
