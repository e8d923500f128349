"""Which responses become demonstrations."""

import itertools

import numpy as np
import pytest

from jaxgpt.rl.best_of_n import choose, curve

SCORES, FINISHED = np.array([0.5, 3.0, 1.0, 1.0]), np.array([True, False, True, True])


def test_a_response_that_was_cut_off_is_never_the_best_one():
    assert choose(SCORES, FINISHED, keep_unfinished=False) == 2
    assert choose(SCORES, FINISHED, keep_unfinished=True) == 1
    assert choose(SCORES, np.zeros(4, bool), keep_unfinished=False) is None
    assert choose(-SCORES, np.array([False, False, False, True]), keep_unfinished=False) == 3
    assert choose(SCORES, np.zeros(4, bool), keep_unfinished=True) == 1


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("score", [float("nan"), float("inf"), float("-inf")])
def test_a_score_that_is_no_number_chooses_nothing(score, keep):
    with pytest.raises(ValueError, match=f"a response has the score {score}, so that it cannot be said which"):
        choose(np.array([score, 1.0]), np.array([True, True]), keep_unfinished=keep)


@pytest.mark.parametrize("keep", [False, True])
def test_the_curve_is_of_the_responses_that_would_be_kept(keep):
    """The mean over all choices of k, of which a finished one is taken where there is one."""
    rng = np.random.default_rng(0)
    rows = [
        {"scores": rng.normal(size=4).tolist(), "golds": rng.normal(size=4).tolist(), "finished_each": finished}
        for finished in ([True, False, True, True], [False, False, False, True], [True] * 4)
    ]
    best = lambda row, some: max(some, key=lambda i: (keep or row["finished_each"][i], row["scores"][i]))
    for point in curve(rows, keep_unfinished=keep):
        subsets = list(itertools.combinations(range(4), point["k"]))
        for name in ("score", "gold"):
            expected = np.mean([row[f"{name}s"][best(row, some)] for row in rows for some in subsets])
            assert point[name] == pytest.approx(expected), (point, name)
