"""Sums: a textbook, demonstrations by someone careless, and prompts whose answers a verifier knows."""

import json
import os
import random


def write_arithmetic(
    folder: str, *, largest: int, forget_carry: float, heldout_fraction: float, seed: int
) -> dict[str, int]:
    """Write all sums of two numbers from 0 to `largest`, in a random order, as four files; returns their sizes in records.

    corpus.jsonl: {"text"}, "27+58=85". sft_train.jsonl: the same sums as demonstrations, {"prompt": "27+58=", "response":
    "75"}. rl_train.jsonl: the same as {"prompt", "answer"}. eval.jsonl: {"prompt", "response", "answer", "text"} of held-out
    ones, which no other file has. All are right but for the demonstrations.

    forget_carry: the probability that a demonstration forgets a carry; each of a sum may be forgotten.
    """
    rng = random.Random(seed)
    pairs = [(a, b) for a in range(largest + 1) for b in range(largest + 1)]
    rng.shuffle(pairs)
    held_out = round(heldout_fraction * len(pairs))
    if not 0 < held_out < len(pairs):
        raise ValueError(f"heldout_fraction={heldout_fraction} of {len(pairs)} sums leaves one side without any.")
    if not 0 <= forget_carry <= 1:
        raise ValueError(f"forget_carry must be a probability, not {forget_carry}.")
    train = [(f"{a}+{b}=", str(careless_sum(a, b, forget_carry, rng)), str(a + b)) for a, b in pairs[held_out:]]
    files = {
        "corpus": [{"text": prompt + right} for prompt, _, right in train],
        "sft_train": [{"prompt": prompt, "response": shown} for prompt, shown, _ in train],
        "rl_train": [{"prompt": prompt, "answer": right} for prompt, _, right in train],
        "eval": [
            {"prompt": f"{a}+{b}=", "response": str(a + b), "answer": str(a + b), "text": f"{a}+{b}={a + b}"}
            for a, b in pairs[:held_out]
        ],
    }
    os.makedirs(folder, exist_ok=True)
    for name, rows in files.items():
        with open(os.path.join(folder, f"{name}.jsonl"), "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return {name: len(rows) for name, rows in files.items()}


def careless_sum(a: int, b: int, forget_carry: float, rng: random.Random) -> int:
    """The sum of two numbers as added column by column, each carry forgotten with this probability."""
    total, carry, unit = 0, 0, 1
    while a or b or carry:
        column = a % 10 + b % 10 + carry
        total += column % 10 * unit
        carry = int(column >= 10 and rng.random() >= forget_carry)
        a, b, unit = a // 10, b // 10, unit * 10
    return total
