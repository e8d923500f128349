"""The data as a function of the global step: any hosts, workers, prefetch or place to start give the same rows."""

import hashlib
from collections import Counter
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest

from jaxgpt.data import batches
from jaxgpt.data.batches import build_data, eval_batches, train_batches, unigram_entropy
from jaxgpt.data.config import DataConfig, HoldoutConfig, SourceConfig
from jaxgpt.data.packing import ConcatPlan

T = 4
ALL = slice(None)


def plan(num_rows, first=0):
    """Rows that tell their number: row i of `plan(n, f)` begins with token T * (f + i)."""
    tokens = np.arange(T * first, T * (first + num_rows) + 1)
    return ConcatPlan(SimpleNamespace(trained=None, tokens=tokens, offsets=np.array([0, len(tokens)])), T, 0)


class CountingPlan:
    """A plan that counts how often a row is read."""

    def __init__(self, num_rows):
        self.plan, self.reads = plan(num_rows), 0

    def __len__(self):
        return len(self.plan)

    def __getitem__(self, index):
        self.reads += 1
        return self.plan[index]

    def empty_row(self):
        return self.plan.empty_row()


def row_numbers(sources, count, **kwargs):
    """Row numbers of the next batches, [count, rows]."""
    sources = sources if isinstance(sources, dict) else {"text": (sources, 1.0)}
    options = {"batch_size": 8, "seed": 0, "rows": ALL, "prefetch": 0} | kwargs
    taken = list(islice(train_batches(sources, **options), count))
    return np.stack([np.asarray(batch.tokens_BT)[:, 0] // T for batch in taken])


def test_a_batch_has_the_fields_of_the_plan():
    batch = next(train_batches({"text": (plan(20), 1.0)}, batch_size=8, seed=0, rows=ALL, shuffle=False))
    np.testing.assert_array_equal(batch.tokens_BT, np.arange(32).reshape(8, T))
    np.testing.assert_array_equal(batch.targets_BT, np.arange(1, 33).reshape(8, T))
    np.testing.assert_array_equal(batch.positions_BT, np.tile(np.arange(T), (8, 1)))
    assert batch.weights_BT.dtype == np.float32
    assert (batch.weights_BT == 1).all()
    assert (batch.segments_BT == 1).all()


@pytest.mark.parametrize("hosts", [2, 4])
def test_the_rows_of_all_hosts_make_the_batch_of_one(hosts):
    per_host = 8 // hosts
    parts = [row_numbers(plan(20), 6, rows=slice(h * per_host, (h + 1) * per_host)) for h in range(hosts)]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), row_numbers(plan(20), 6))


def test_the_order_of_rows_does_not_depend_on_the_batch_size():
    np.testing.assert_array_equal(
        row_numbers(plan(20), 6, batch_size=8).ravel(), row_numbers(plan(20), 12, batch_size=4).ravel()
    )


def test_threads_and_worker_processes_do_not_change_the_order():
    mixture = {"a": (plan(20), 1.0), "b": (plan(30, first=100), 2.0)}
    expected = row_numbers(mixture, 9, start_batch=5)
    np.testing.assert_array_equal(row_numbers(mixture, 9, start_batch=5, prefetch=4), expected)
    np.testing.assert_array_equal(row_numbers(mixture, 9, start_batch=5, prefetch=2, num_workers=2), expected)


@pytest.mark.parametrize("few_rows", [39, 40])
def test_every_epoch_is_another_permutation_of_the_rows(monkeypatch, few_rows):
    monkeypatch.setattr(batches, "FEW_ROWS", few_rows)  # below and above it, the shuffle is another
    epochs = row_numbers(plan(40), 15).reshape(3, 40)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(40), (3, 1)))
    assert len({tuple(epoch) for epoch in [*epochs, np.arange(40)]}) == 4


@pytest.mark.parametrize("size", [2**16 + 1, 2**16 + 2])
def test_every_row_of_a_large_source_is_visited_once_an_epoch(size):
    order = batches._endless_order(range(size), seed=3)
    epochs = np.array([[order[epoch * size + i] for i in range(size)] for epoch in range(2)])
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(size), (2, 1)))
    assert np.mean(epochs[0] == epochs[1]) < 0.001


def test_without_shuffling_rows_come_in_order_again_and_again():
    rows = row_numbers(plan(20), 5, shuffle=False).ravel()
    np.testing.assert_array_equal(rows, np.tile(np.arange(20), 2))


def test_a_source_smaller_than_a_batch_is_repeated():
    assert Counter(row_numbers(plan(3), 3).ravel().tolist()) == {0: 8, 1: 8, 2: 8}


def test_starting_at_a_batch_is_skipping_those_before():
    everything = row_numbers(plan(20), 12)
    for start in (1, 5, 11):  # 2.5 batches are an epoch
        np.testing.assert_array_equal(row_numbers(plan(20), 12 - start, start_batch=start), everything[start:])


def test_starting_far_into_the_run_reads_only_the_rows_of_its_batch():
    counting = CountingPlan(20)
    rows = row_numbers(counting, 1, start_batch=10**12, rows=slice(2, 4))
    assert rows.shape == (1, 2)
    assert counting.reads == 2


@pytest.mark.parametrize("few_rows", [39, 40])
def test_seeds_and_sources_have_orders_of_their_own(monkeypatch, few_rows):
    monkeypatch.setattr(batches, "FEW_ROWS", few_rows)
    epochs = {seed: row_numbers(plan(40), 10, seed=seed).reshape(2, 40) for seed in (0, 1)}
    assert not any((a == b).all() for a in epochs[0] for b in epochs[1])
    both = row_numbers({"a": (plan(40), 1.0), "b": (plan(40, first=100), 1.0)}, 10).ravel()
    assert (both[both < 100] != both[both >= 100] - 100).any()


def test_each_source_has_its_share_of_any_run_of_rows():
    weights = {"a": 0.6, "b": 0.3, "c": 0.1}
    mixture = {name: (plan(7, first=100 * i), weight) for i, (name, weight) in enumerate(weights.items())}
    source = row_numbers(mixture, 50, start_batch=3).ravel() // 100
    np.testing.assert_allclose(np.bincount(source) / 400, [0.6, 0.3, 0.1], atol=1 / 400)


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ({}, r"data\.train is empty"),
        ({"web": (plan(0), 1.0)}, r"data\.train: the source 'web' has no rows"),
        ({"web": (plan(3), 0.0)}, r"data\.train: the weight of the source 'web' must be positive, not 0\.0"),
    ],
)
def test_sources_that_cannot_be_read_are_errors(sources, message):
    with pytest.raises(ValueError, match=message):
        train_batches(sources, batch_size=4, seed=0, rows=ALL)


def test_evaluation_reads_every_row_once_and_fills_up_with_weight_zero():
    taken = list(eval_batches(plan(11), batch_size=4, rows=ALL))
    assert [batch.tokens_BT.shape for batch in taken] == [(4, T)] * 3
    rows = np.concatenate([batch.tokens_BT[:, 0] // T for batch in taken])
    weights = np.concatenate([batch.weights_BT for batch in taken])
    np.testing.assert_array_equal(rows[:11], np.arange(11))
    assert (weights[:11] == 1).all()
    assert (weights[11:] == 0).all()
    assert (taken[-1].segments_BT[-1] == 0).all()


def test_evaluation_of_some_batches_spreads_them_over_the_data():
    taken = list(eval_batches(plan(40), batch_size=4, rows=ALL, max_batches=2))
    rows = np.concatenate([batch.tokens_BT[:, 0] // T for batch in taken])
    np.testing.assert_array_equal(rows, [0, 5, 10, 15, 20, 25, 30, 35])


def test_the_hosts_of_an_evaluation_share_its_rows():
    whole = [batch.tokens_BT for batch in eval_batches(plan(11), batch_size=4, rows=ALL)]
    halves = [list(eval_batches(plan(11), batch_size=4, rows=rows)) for rows in (slice(0, 2), slice(2, 4))]
    for batch, first, second in zip(whole, *halves, strict=True):
        np.testing.assert_array_equal(np.concatenate([first.tokens_BT, second.tokens_BT]), batch)


class LetterTokenizer:
    """a is 3, b is 4, ..."""

    vocab_size, pad_id, bos_id, eos_id = 32, 0, 1, 2
    digest = hashlib.sha256(b"letters").hexdigest()

    def encode_batch(self, texts):
        return [np.array([ord(c) - ord("a") + 3 for c in text], np.int32) for text in texts]


def config(**kwargs):
    return DataConfig(**{"sequence_length": 8, "text_separator": "\n"} | kwargs)


def write(path, *documents):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(documents))
    return str(path)


def letters(plans):
    """The documents of some rows, read back as text."""
    found = []
    for source in {id(p.source): p.source for p in plans}.values():
        for begin, end in zip(source.offsets, source.offsets[1:], strict=False):
            found.append("".join(chr(t - 3 + ord("a")) for t in source.tokens[begin:end] if t > 2))
    return found


def test_a_path_is_split_into_train_and_held_out_documents(tmp_path):
    documents = [f"{a}{b}{c}" for a in "abcdef" for b in "abcdef" for c in "abcdef"]
    path = write(tmp_path / "text.txt", *documents)
    data = build_data(
        config(train=path, holdout=HoldoutConfig(fraction=0.3)), LetterTokenizer(), cache_dir=tmp_path / "cache"
    )
    assert list(data.train) == list(data.eval) == ["text"]
    train, held_out = letters([data.train["text"][0]]), letters([data.eval["text"]])
    assert sorted(train + held_out) == documents
    assert abs(len(held_out) / 216 - 0.3) < 4 * (0.3 * 0.7 / 216) ** 0.5
    assert data.stats["train/text"]["documents"] == len(train)
    assert data.stats["train/text"]["tokens"] == 5 * len(train)
    assert data.stats["train/text"]["bytes"] == 3 * len(train)
    assert data.stats["train/text"]["rows"] == np.ceil((5 * len(train) - 1) / 8)


def test_a_mixture_is_split_source_by_source(tmp_path):
    write(tmp_path / "a.txt", *["abc" + c for c in "abcdefghijkl"])
    write(tmp_path / "b.txt", *["xyz" + c for c in "abcdefghijkl"])
    sources = {name: SourceConfig(str(tmp_path / f"{name}.txt"), weight) for name, weight in (("a", 3.0), ("b", 1.0))}
    settings = config(train=sources, holdout=HoldoutConfig(fraction=0.5))
    data = build_data(settings, LetterTokenizer(), cache_dir=tmp_path / "cache")
    assert {name: weight for name, (_, weight) in data.train.items()} == {"a": 3.0, "b": 1.0}
    assert set(data.eval) == {"a", "b"}
    assert all(text.startswith("xyz") for text in letters([data.train["b"][0], data.eval["b"]]))


def test_evaluation_files_of_their_own_leave_the_training_files_whole(tmp_path):
    train = (write(tmp_path / "a.txt", "aa", "bb"), write(tmp_path / "b.txt", "cc"))
    evaluation = {"easy": SourceConfig(write(tmp_path / "c.txt", "dd"))}
    data = build_data(config(train=train, eval=evaluation), LetterTokenizer(), cache_dir=tmp_path / "cache")
    assert letters([data.train["text"][0]]) == ["aa", "bb", "cc"]
    assert letters([data.eval["easy"]]) == ["dd"]


def test_a_held_out_fraction_of_zero_holds_nothing_out(tmp_path):
    path = write(tmp_path / "a.txt", "aa", "bb")
    data = build_data(
        config(train=path, holdout=HoldoutConfig(fraction=0.0)), LetterTokenizer(), cache_dir=tmp_path / "cache"
    )
    assert data.eval == {}
    assert letters([data.train["text"][0]]) == ["aa", "bb"]


def test_the_fingerprint_follows_the_content_and_not_the_place(tmp_path):
    def fingerprint(folder, *documents):
        settings = config(train=write(tmp_path / folder / "a.txt", *documents), holdout=HoldoutConfig(fraction=0.0))
        return build_data(settings, LetterTokenizer(), cache_dir=tmp_path / folder / "cache").fingerprint

    assert fingerprint("one", "aa", "bb") == fingerprint("two", "aa", "bb")
    assert fingerprint("one", "aa", "bb") != fingerprint("three", "aa", "bc")


def test_no_training_data_is_an_error_that_names_the_field(tmp_path):
    with pytest.raises(ValueError, match=r"data\.train is empty"):
        build_data(config(), LetterTokenizer(), cache_dir=tmp_path)


def test_data_without_anything_to_predict_is_an_error_that_names_the_field(tmp_path):
    source = {"web": SourceConfig(write(tmp_path / "a.txt", "a"))}
    settings = config(train=source, holdout=HoldoutConfig(by="position", fraction=0.0))
    with pytest.raises(ValueError, match=r"data\.train\.web\.path: no document has two tokens"):
        build_data(settings, LetterTokenizer(), cache_dir=tmp_path / "cache")


def test_the_unigram_entropy_is_that_of_the_training_targets(tmp_path):
    # A row of "a" has the targets 3 x a and 1 x EOS; two rows of "b", read half as often each, have 8 x c and 4 x EOS.
    texts = {"a": ["aaa"], "b": ["cc"] * 4}
    sources = {name: SourceConfig(write(tmp_path / f"{name}.txt", *lines)) for name, lines in texts.items()}
    settings = config(train=sources, holdout=HoldoutConfig(fraction=0.0))
    data = build_data(settings, LetterTokenizer(), cache_dir=tmp_path / "cache")
    p = np.array([3, 4, 3]) / 10
    assert unigram_entropy(data) == pytest.approx(-(p * np.log(p)).sum(), rel=1e-12)
