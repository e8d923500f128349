"""Packing: every prediction once, no document split that fits, bins as full as best-fit-decreasing makes them."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgpt.data.packing import best_fit_decreasing, make_plan

PAD = 1_000_000
FIELDS = {
    "tokens_BT": np.int32,
    "targets_BT": np.int32,
    "weights_BT": np.float32,
    "segments_BT": np.int32,
    "positions_BT": np.int32,
}


def documents(lengths):
    """Documents whose token at flat index i is i, so that every token tells where it came from."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return SimpleNamespace(trained=None, tokens=np.arange(offsets[-1], dtype=np.uint32), offsets=offsets)


def rows(lengths, packing, length):
    plan = make_plan(documents(lengths), packing, length, PAD)
    return [plan[i] for i in range(len(plan))]


def naive_best_fit_decreasing(lengths, capacity):
    """Bins by the definition: one item at a time, longest first, into the bin with the least space that takes it."""
    spaces = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, space in enumerate(spaces) if space >= length]
        if fitting:
            spaces[min(fitting, key=lambda i: spaces[i])] -= length
        else:
            spaces.append(capacity - length)
    return sorted(spaces)


lengths_and_row = st.tuples(st.lists(st.integers(1, 40), min_size=1, max_size=40), st.integers(2, 16))
packings = pytest.mark.parametrize("packing", ["concat", "best_fit", "none"])


@packings
@given(lengths_and_row)
@settings(deadline=None, max_examples=100)
def test_every_token_with_a_predecessor_is_a_target_exactly_once(packing, case):
    lengths, row_length = case
    source = documents(lengths)
    predictions = []
    for row in rows(lengths, packing, row_length):
        trained = row["weights_BT"] > 0
        assert set(row["weights_BT"]) <= {0.0, 1.0}
        np.testing.assert_array_equal(row["targets_BT"][trained], row["tokens_BT"][trained] + 1)
        assert (row["targets_BT"][~trained] == PAD).all()
        predictions += row["targets_BT"][trained].tolist()
    assert sorted(predictions) == sorted(set(source.tokens.tolist()) - set(source.offsets.tolist()))


@packings
@given(lengths_and_row)
@settings(deadline=None, max_examples=100)
def test_segments_are_documents_and_positions_count_from_zero(packing, case):
    lengths, row_length = case
    document_of = np.repeat(np.arange(len(lengths)), lengths)
    inputs = []
    for row in rows(lengths, packing, row_length):
        assert {name: values.dtype for name, values in row.items()} == FIELDS
        assert all(values.shape == (row_length,) for values in row.values())
        segments = row["segments_BT"]
        used = int((segments > 0).sum())
        assert (segments[used:] == 0).all()
        assert (row["tokens_BT"][used:] == PAD).all()
        assert (row["positions_BT"][used:] == 0).all()
        assert list(dict.fromkeys(segments[:used].tolist())) == list(range(1, segments.max() + 1))
        assert (np.diff(segments[:used]) >= 0).all()
        for segment in range(1, segments.max() + 1):
            tokens = row["tokens_BT"][segments == segment]
            assert len(set(document_of[tokens])) == 1
            np.testing.assert_array_equal(tokens, tokens[0] + np.arange(len(tokens)))
            np.testing.assert_array_equal(row["positions_BT"][segments == segment], np.arange(len(tokens)))
        inputs += row["tokens_BT"][:used].tolist()
    assert len(inputs) == len(set(inputs))
    last_tokens = set((np.cumsum(lengths) - 1).tolist())
    assert set(range(sum(lengths))) - set(inputs) <= last_tokens


@pytest.mark.parametrize("packing", ["best_fit", "none"])
@given(lengths_and_row)
@settings(deadline=None, max_examples=100)
def test_no_document_that_fits_is_split(packing, case):
    lengths, row_length = case
    whole = set()
    for row in rows(lengths, packing, row_length):
        for segment in range(1, row["segments_BT"].max() + 1):
            whole.add(tuple(row["tokens_BT"][row["segments_BT"] == segment].tolist()))
    starts = np.cumsum([0, *lengths])
    for start, length in zip(starts, lengths, strict=False):
        if 2 <= length <= row_length:
            assert tuple(range(start, start + length)) in whole


@given(st.lists(st.integers(1, 32), min_size=1, max_size=200), st.integers(32, 48))
@settings(deadline=None, max_examples=200)
def test_best_fit_makes_the_bins_of_the_definition(lengths, capacity):
    order, bounds = best_fit_decreasing(np.array(lengths), capacity)
    assert sorted(order.tolist()) == list(range(len(lengths)))
    sizes = [sum(lengths[i] for i in order[a:b]) for a, b in zip(bounds, bounds[1:], strict=False)]
    assert sorted(capacity - size for size in sizes) == naive_best_fit_decreasing(lengths, capacity)


def test_best_fit_pads_less_than_one_percent_of_many_documents():
    lengths = np.random.default_rng(0).geometric(1 / 90, size=20_000)
    source = documents(lengths)
    plan = make_plan(source, "best_fit", 256, PAD)
    assert len(plan) <= 1.01 * lengths.sum() / 256


def test_concat_by_hand():
    first, second = rows([3, 2, 4], "concat", 6)
    np.testing.assert_array_equal(first["tokens_BT"], [0, 1, 2, 3, 4, 5])
    np.testing.assert_array_equal(first["targets_BT"], [1, 2, PAD, 4, PAD, 6])
    np.testing.assert_array_equal(first["weights_BT"], [1, 1, 0, 1, 0, 1])
    np.testing.assert_array_equal(first["segments_BT"], [1, 1, 1, 2, 2, 3])
    np.testing.assert_array_equal(first["positions_BT"], [0, 1, 2, 0, 1, 0])
    np.testing.assert_array_equal(second["tokens_BT"], [6, 7, 8, PAD, PAD, PAD])
    np.testing.assert_array_equal(second["targets_BT"], [7, 8, PAD, PAD, PAD, PAD])
    np.testing.assert_array_equal(second["weights_BT"], [1, 1, 0, 0, 0, 0])
    np.testing.assert_array_equal(second["segments_BT"], [1, 1, 1, 0, 0, 0])
    np.testing.assert_array_equal(second["positions_BT"], [0, 1, 2, 0, 0, 0])


def test_best_fit_by_hand():
    # Documents [0, 2), [2, 6) and [6, 9); rows of 6: the longest takes the shortest along, the third is alone.
    first, second = rows([2, 4, 3], "best_fit", 6)
    np.testing.assert_array_equal(first["tokens_BT"], [2, 3, 4, 5, 0, 1])
    np.testing.assert_array_equal(first["targets_BT"], [3, 4, 5, PAD, 1, PAD])
    np.testing.assert_array_equal(first["weights_BT"], [1, 1, 1, 0, 1, 0])
    np.testing.assert_array_equal(first["segments_BT"], [1, 1, 1, 1, 2, 2])
    np.testing.assert_array_equal(first["positions_BT"], [0, 1, 2, 3, 0, 1])
    np.testing.assert_array_equal(second["tokens_BT"], [6, 7, 8, PAD, PAD, PAD])
    np.testing.assert_array_equal(second["segments_BT"], [1, 1, 1, 0, 0, 0])


@packings
def test_a_row_that_would_predict_nothing_is_not_made(packing):
    # Five tokens make four predictions: one row of four, and none for the last token alone.
    (row,) = rows([5], packing, 4)
    np.testing.assert_array_equal(row["tokens_BT"], [0, 1, 2, 3])
    np.testing.assert_array_equal(row["targets_BT"], [1, 2, 3, 4])


def test_an_unknown_packing_is_an_error_that_names_the_field():
    with pytest.raises(ValueError, match=r"data\.packing='bestfit' is not one of .*best_fit"):
        make_plan(documents([3]), "bestfit", 4, PAD)
