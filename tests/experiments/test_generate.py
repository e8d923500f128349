"""Generation from the command line: texts, files, probabilities, and mistakes."""

import json
import re

import pytest

from tests.experiments.conftest import command

GREEDY = ("--config=configs/generate.py:greedy", "--config.max_new_tokens=12")


def test_prompts_of_a_file_become_lines_of_a_file(finished, tmp_path):
    prompts, output = tmp_path / "prompts.txt", tmp_path / "out.jsonl"
    prompts.write_text("Ann likes\nBob\n")
    done = command("generate", *GREEDY, f"--config.init_from={finished[0]}", f"--config.prompts_file={prompts}",
                   f"--config.output={output}")  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["Ann likes", "Bob"]
    assert all(0 < row["num_tokens"] <= 12 for row in rows)
    alone = command("generate", *GREEDY, f"--config.init_from={finished[0]}", "--config.prompt=Bob")
    assert "Bob" + rows[1]["response"] in alone.stdout


def test_probabilities_of_the_next_token_are_shown_in_order(finished):
    done = command(
        "generate", f"--config.init_from={finished[0]}", "--config.prompt=Ann", "--config.show_probabilities=5"
    )
    assert done.returncode == 0, done.stderr
    shown = [float(p) for p in re.findall(r"(\d\.\d+)", done.stdout)][:5]
    assert len(shown) == 5
    assert shown == sorted(shown, reverse=True)
    assert 0 < sum(shown) <= 1.001


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], ["init_from"]),
        (["--config.init_from=nowhere", "--config.prompt=x"], ["init_from", "nowhere"]),
        (["--config.sampler.top_p=2", "--config.prompt=x"], ["sampler.top_p", "2"]),
        (["--config.init_from=RUN", "--config.prompts_file=nowhere.txt"], ["nowhere.txt"]),
    ],
    ids=str,
)
def test_a_mistake_is_one_sentence_and_exit_code_2(finished, flags, words):
    done = command("generate", *[flag.replace("RUN", str(finished[0])) for flag in flags])
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    for word in words:
        assert word in errors[0]
