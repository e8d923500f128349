"""From this machine's own Python to a trained GPT: corpus, tokenizer, pretraining, samples and a report.

    python -m experiments.quickstart --workdir=runs/quickstart      (or: make quickstart)

The corpus is what every Python installation has: docstrings, the language reference and source of its standard
library, read by ast without importing anything. Each stage is the ordinary command, printed before it runs, so that it
can be copied. Exits with an error if the model did not learn. Run again, it resumes or says that it is finished.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys

from jaxgpt.data.stdlib_corpus import write_stdlib_corpus


def main(flags: argparse.Namespace) -> None:
    """Run the stages one after the other."""
    root = flags.workdir
    corpus, tokenizer, model = (os.path.join(root, name) for name in ("corpus.jsonl", "tokenizer", "pretrain"))
    os.makedirs(root, exist_ok=True)
    if not os.path.exists(corpus):
        print(f"\n== Corpus: the standard library of Python {sys.version.split()[0]} -> {corpus}")
        print(write_stdlib_corpus(corpus, max_bytes=flags.max_bytes))
    stage(
        "Tokenizer: byte-pair encoding, 2048 pieces",
        "tokenizer", "--config=configs/tokenizer.py:quickstart", f"--workdir={tokenizer}",
        f"--config.data.train={corpus}",
    )  # fmt: skip
    steps = [f"--config.num_train_steps={flags.num_train_steps}"] if flags.num_train_steps else []
    stage(
        "Pretraining: next-token prediction",
        "pretrain", "--config=configs/pretrain.py:quickstart", f"--workdir={model}", f"--config.data.train={corpus}",
        f"--config.data.tokenizer={tokenizer}", *steps,
    )  # fmt: skip
    stage(
        "Generation: what the model writes after a prompt",
        "generate", f"--config.init_from={model}", "--config.prompt=Return the number of",
        "--config.max_new_tokens=40", "--config.sampler.temperature=0.8", "--config.sampler.top_k=50",
    )  # fmt: skip
    judge(model)


def stage(title: str, name: str, *arguments: str) -> None:
    """Print and run one stage's command; its failure ends the quickstart with its exit code."""
    print(f"\n== {title}\n$ python -m experiments.{name} {shlex.join(arguments)}", flush=True)
    code = subprocess.run([sys.executable, "-m", f"experiments.{name}", *arguments], check=False).returncode
    if code:
        print(f"error: the stage {name} ended with exit code {code}.", file=sys.stderr)
        sys.exit(code)


def judge(model: str) -> None:
    """Print the result beside what guessing gives; exit 1 if the model is not clearly better than the frequencies."""
    with open(os.path.join(model, "manifest.json")) as file:
        manifest = json.load(file)
    loss, lines = manifest["final_metrics"]["eval/loss"], manifest["reference_lines"]
    print(f"\n== Result\nheld-out loss      {loss:.3f} nats/token")
    print(f"unigram entropy    {lines['unigram entropy']:.3f}   (guessing by frequency)")
    print(f"uniform            {lines['uniform']:.3f}   (guessing blindly)")
    print(f"bits per byte      {manifest['final_metrics']['eval/bits_per_byte']:.3f}")
    print(f"\nCurves and samples: {os.path.join(model, 'report.html')}")
    print(f"TensorBoard:        tensorboard --logdir {model}/tensorboard")
    print(f"Try it:             python -m experiments.generate --config.init_from={model} --config.prompt='import '")
    if not loss < 0.9 * lines["unigram entropy"]:
        print("error: the model did not learn: its loss is not below 0.9 of the unigram entropy.", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", default="runs/quickstart", help="where everything goes")
    parser.add_argument("--num_train_steps", type=int, default=0, help="of pretraining; 0 keeps the config's number")
    parser.add_argument("--max_bytes", type=int, default=6_000_000, help="size of the corpus, in bytes of text")
    main(parser.parse_args())
