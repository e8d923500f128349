"""How long a run is, said before it starts."""

import pytest

from jaxgpt.train.config import RunConfig


@pytest.mark.parametrize(
    ("fields", "rows", "steps", "words"),
    [
        ({"num_epochs": 1.0}, 1344, 84, "84 steps (1 epoch of 1,344 rows)"),
        ({"num_epochs": 1.0}, 20, 1, "1 step (1 epoch of 20 rows, of which whole batches of 16 make 16: 4 are left out)"),
        (
            {"num_epochs": 1.0}, 24, 2,
            "2 steps (1 epoch of 24 rows, of which whole batches of 16 make 32: 8 are seen once more)",
        ),
        ({"num_epochs": 2.0}, 24, 3, "3 steps (2 epochs of 24 rows)"),
        ({"num_train_steps": 6}, 64, 6, "6 steps (1.5 epochs of 64 rows)"),
    ],
)  # fmt: skip
def test_the_length_of_a_run_says_what_whole_batches_leave_out(fields, rows, steps, words):
    config = RunConfig(batch_size=16, **fields)
    assert config.num_steps(rows) == steps
    assert config.length(rows) == words
