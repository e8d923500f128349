"""Sums with exact answers: texts to learn from, demonstrations, and prompts for a verifier."""

import json
import os
import random


def write_arithmetic(
    folder: str, *, largest: int, num_demonstrations: int, heldout_fraction: float, seed: int
) -> dict[str, int]:
    """Write all sums of two numbers from 0 to `largest`, in a random order, as four files; returns their sizes in records.

    corpus.jsonl: {"text"} of demonstrated sums, "27+58=85". sft_train.jsonl: the same as {"prompt": "27+58=", "response":
    "85"}. rl_train.jsonl: {"prompt", "answer"} of every sum that is not held out. eval.jsonl: {"prompt", "response",
    "answer", "text"} of held-out ones, which no other file has.
    """
    pairs = [(a, b) for a in range(largest + 1) for b in range(largest + 1)]
    random.Random(seed).shuffle(pairs)
    held_out = round(heldout_fraction * len(pairs))
    if not 0 < held_out < len(pairs) or not 0 < num_demonstrations <= len(pairs) - held_out:
        raise ValueError(
            f"Of {len(pairs)} sums up to {largest}+{largest}, {held_out} are held out; num_demonstrations="
            f"{num_demonstrations} must be between 1 and the {len(pairs) - held_out} that are left."
        )
    sums = [{"prompt": f"{a}+{b}=", "response": str(a + b)} for a, b in pairs]
    train = sums[held_out:]
    demonstrations = train[:num_demonstrations]
    files = {
        "corpus": [{"text": row["prompt"] + row["response"]} for row in demonstrations],
        "sft_train": demonstrations,
        "rl_train": [{"prompt": row["prompt"], "answer": row["response"]} for row in train],
        "eval": [
            {**row, "answer": row["response"], "text": row["prompt"] + row["response"]} for row in sums[:held_out]
        ],
    }
    os.makedirs(folder, exist_ok=True)
    for name, rows in files.items():
        with open(os.path.join(folder, f"{name}.jsonl"), "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return {name: len(rows) for name, rows in files.items()}
