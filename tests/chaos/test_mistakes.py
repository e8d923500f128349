"""Every tenth mistake of the table; `python -m tests.chaos.mistakes` makes all of them."""

import os
import subprocess
import sys

from tests.chaos.mistakes import ROOT, Outcome, judge


def test_a_tenth_of_all_mistakes_are_one_sentence_each():
    # In a process of its own: forks are safe as long as jax has not started.
    done = subprocess.run(
        [sys.executable, "-m", "tests.chaos.mistakes", "--every=10", "--untimed"],
        cwd=ROOT, env=os.environ, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_is_no_sentence_is_seen():
    good = Outcome(2, "", "error: seed is wrong.\n", 0.1)
    assert judge(good, ("seed",), {}, {}) == ""
    assert judge(good, ("sed",), {}, {}) == "does not name sed"
    assert judge(good, (), {}, {"run": (0, 0)}) == "left run behind"
    assert judge(good._replace(code=1), (), {}, {}) == "exit code 1"
    assert judge(good._replace(code=0, err=""), (), {}, {}) == "exit code 0"
    assert judge(good._replace(code=None), (), {}, {}) == "hang"
    assert judge(good._replace(err="error: a.\nerror: b.\n"), (), {}, {}) == "not one sentence"
    assert judge(good._replace(code=1, err="Traceback (most recent call last):\n"), (), {}, {}) == "traceback"
