"""Perplexity against float64 numpy, in windows whose rule is written out token by token."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from jaxgpt import partition
from jaxgpt.evaluation.config import TaskConfig
from jaxgpt.evaluation.logprobs import token_scores
from jaxgpt.evaluation.perplexity import evaluate_perplexity, windows
from jaxgpt.partition import MeshConfig
from tests.evaluation.conftest import MAX_SEQ_LENGTH, TEXT, logprobs64
from tests.models import reference

LENGTHS = (2, 11, 12, 13, 14, 40)


@pytest.mark.parametrize("stride", [1, 5, 12])
@pytest.mark.parametrize("count", LENGTHS)
def test_every_id_is_scored_once_with_its_context(count, stride):
    length = 12
    seen = []
    for begin, first, end in windows(count, length, stride):
        assert 0 <= begin < first < end <= count
        assert end - begin <= length + 1
        for place in range(first, end):
            seen.append(place)
            assert begin == 0 or place - begin >= length - stride + 1
    assert seen == list(range(1, count))
    with pytest.raises(ValueError, match="from 1 to max_seq_length=12, not 13"):
        windows(count, length, 13)


def reference_nats(model, ids, stride) -> float:
    """Place j is scored where the window has moved just far enough to show it."""
    nats, length = 0.0, MAX_SEQ_LENGTH
    for j in range(1, len(ids)):
        moves = max(0, math.ceil((j - length) / stride))
        end = min(len(ids), length + 1 + moves * stride)
        begin = max(0, end - length - 1)
        nats -= logprobs64(model, ids[begin : j + 1])[-1]
    return nats


@pytest.mark.parametrize("stride", [0, 7])
def test_loss_and_bits_per_byte_are_those_of_float64(model, mesh, write, stride):
    texts = [TEXT, "Bob.", "Ärger — ελ 漢 house", TEXT[:30]]
    path = write("texts", *({"body": text} for text in texts))
    task = TaskConfig(kind="perplexity", path=path, stride=stride, fields={"text": "body"})
    found = evaluate_perplexity(task, "tasks.x", model, mesh=mesh, batch_size=2)
    ids = [model.tokenizer.encode(text, add_bos=True) for text in texts]
    assert max(map(len, ids)) > MAX_SEQ_LENGTH + 1
    nats = [reference_nats(model, i, stride or MAX_SEQ_LENGTH // 2) for i in ids]
    tokens, size = sum(len(i) - 1 for i in ids), sum(len(text.encode()) for text in texts)
    values = {name: metric["value"] for name, metric in found.metrics.items()}
    assert values["loss"] == pytest.approx(sum(nats) / tokens, rel=2e-6)
    assert values["perplexity"] == pytest.approx(math.exp(sum(nats) / tokens), rel=1e-5)
    assert values["bits_per_byte"] == pytest.approx(sum(nats) / math.log(2) / size, rel=2e-6)
    assert found.counts == {"documents": 4, "tokens": tokens, "bytes": size}
    assert found.samples[1]["document"] == f"{path}, line 2"
    np.testing.assert_allclose([s["loss"] * s["tokens"] for s in found.samples], nats, rtol=2e-6)
    loss = found.metrics["loss"]
    assert loss["low"] < loss["value"] < loss["high"]
    assert found.metrics["perplexity"]["high"] == pytest.approx(math.exp(loss["high"]))


UNIFORM = {"text": "a"}, {"text": "Ann sees Bob"}, {"text": TEXT}


@pytest.mark.parametrize("name", ["model", "model_without_bos"])
def test_a_uniform_model_needs_the_same_bits_for_every_token(name, request, mesh, write):
    """log2 V for each, over the bytes of the text: no byte counts whose token is not scored, one-token documents included."""
    model = request.getfixturevalue(name)
    uniform = dataclasses.replace(model, params=jax.tree.map(lambda leaf: 0 * leaf, model.params))
    found = evaluate_perplexity(
        TaskConfig(kind="perplexity", path=write("texts", *UNIFORM)), "tasks.x", uniform, mesh=mesh, batch_size=2
    )
    tokens = [len(model.tokenizer.encode(row["text"])) for row in UNIFORM]
    size = [len(row["text"].encode()) for row in UNIFORM]
    bits = math.log2(model.config.vocab_size)
    assert tokens[0] == 1
    assert found.counts == {"documents": 3, "tokens": sum(tokens), "bytes": sum(size)}
    assert found.metrics["bits_per_byte"]["value"] == pytest.approx(bits * sum(tokens) / sum(size), rel=1e-6)
    assert found.metrics["perplexity"]["value"] == pytest.approx(model.config.vocab_size, rel=1e-5)
    for sample, n, m in zip(found.samples, tokens, size, strict=True):
        assert (sample["tokens"], sample["bytes"]) == (n, m)
        assert sample["bits_per_byte"] == pytest.approx(bits * n / m, rel=1e-6)


def test_without_bos_the_first_token_is_conditioned_on_eos(model_without_bos, mesh, write):
    model = model_without_bos
    expected = logprobs64(model, [model.tokenizer.eos_id, *model.tokenizer.encode("Bob")]).sum()
    found = evaluate_perplexity(
        TaskConfig(kind="perplexity", path=write("texts", {"text": "Bob"})), "tasks.x", model, mesh=mesh, batch_size=1
    )
    assert found.samples[0]["loss"] * found.samples[0]["tokens"] == pytest.approx(-expected, abs=1e-5)


def test_greedy_tokens_batches_and_devices(model, mesh):
    ids = [model.tokenizer.encode(TEXT[:n], add_bos=True)[:MAX_SEQ_LENGTH] for n in (5, 60, 20)]
    one = token_scores(model, ids, mesh=mesh, batch_size=1)
    for sequence, scores in zip(ids, one, strict=True):
        np.testing.assert_allclose(scores.logprobs, logprobs64(model, sequence), atol=1e-5)
        best = reference.forward(jax.device_get(model.params), sequence[:-1], model.config).argmax(-1)
        assert scores.is_greedy.tolist() == (best == sequence[1:]).tolist()
    eight = partition.make_mesh(MeshConfig(data=4, fsdp=2))
    spread = model.__class__(
        model.config, jax.device_put(model.params, partition.replicated(eight)), model.tokenizer, None
    )
    for a, b in zip(one, token_scores(spread, ids, mesh=eight, batch_size=8), strict=True):
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)
    with pytest.raises(ValueError, match=r"batch_size=3 is not a multiple .* = 8; the nearest valid value is 8"):
        token_scores(spread, ids, mesh=eight, batch_size=3)


def test_mistakes_name_the_field_or_the_file(model, mesh, tmp_path, write):
    run = lambda **fields: evaluate_perplexity(
        TaskConfig(kind="perplexity", **fields), "tasks.x", model, mesh=mesh, batch_size=2
    )
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    with pytest.raises(ValueError, match=r"empty\.txt is empty"):
        run(path=str(empty))
    with pytest.raises(
        ValueError, match=r"tasks\.x\.path: no file matches '.*/emty\.txt'; the nearest is '.*empty\.txt'"
    ):
        run(path=str(tmp_path / "emty.txt"))
    with pytest.raises(ValueError, match=r"tasks\.x\.stride=25 is more than model\.max_seq_length=24"):
        run(path=write("a", {"text": "a"}), stride=25)
    with pytest.raises(ValueError, match=r"b\.jsonl, line 2: no field 'text' \(there are: txt\); the nearest is 'txt'"):
        run(path=write("b", {"text": "a"}, {"txt": "a"}))
