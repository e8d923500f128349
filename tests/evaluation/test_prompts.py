"""Few-shot prompts: their exact text and turns, and that a record never shows its own answer."""

import collections

import numpy as np
import pytest

from jaxgpt.data.chat import Message
from jaxgpt.evaluation import prompts
from jaxgpt.evaluation.config import TaskConfig
from jaxgpt.evaluation.generation import read_answer
from jaxgpt.runs.load import LoadedModel

FIELD = "tasks.x"
RECORDS = [{"prompt": f"Question {i}?", "answer": f"answer{i}"} for i in range(12)]


def shots(path: str, num_shots: int, *, read_from: str | None = None, seed=0):
    task = TaskConfig(kind="generation", path=path, shots=path, num_shots=num_shots)
    examples = prompts.read_examples(read_from or path, FIELD, read_answer, {})
    return examples, prompts.few_shot(examples, task, FIELD, read_answer, seed)


def test_no_record_is_among_its_own_shots(write):
    twin = {"prompt": " Question  3?\n", "answer": "answer3, differently put"}
    path = write("all", *RECORDS, twin)
    counts: collections.Counter = collections.Counter()
    for seed in range(20):
        for example, turns in zip(*shots(path, 4, seed=seed), strict=True):
            shown = [turn.content.split() for turn in turns[:-1:2]]
            assert len(shown) == 4
            assert example.text.split() not in shown
            assert turns[-1] == example.messages[0]
            counts.update(turn.content for turn in turns[1::2])
    assert len(counts) == 13
    assert max(counts.values()) < 2 * min(counts.values())  # all are drawn, about equally often


def test_shots_depend_on_seed_and_prompt_alone(write):
    path = write("all", *RECORDS)
    examples, turns = shots(path, 3)
    _, fewer = shots(path, 3, read_from=write("some", RECORDS[7], RECORDS[2]))
    assert fewer == [turns[7], turns[2]]
    assert shots(path, 3, seed=1)[1] != turns
    assert [turn[-1].content for turn in turns] == [example.text for example in examples]


def test_too_few_shots_are_an_error(write):
    path = write("few", *RECORDS[:3])
    assert len(shots(path, 2)[1][0]) == 5
    with pytest.raises(
        ValueError, match=r"tasks\.x\.num_shots=3 is more than the 2 records of tasks\.x\.shots that differ"
    ):
        shots(path, 3)


TURNS = [Message("user", "1+1?"), Message("assistant", "2"), Message("user", "2+2?")]


def test_the_text_without_a_template(model):
    ids = prompts.encode_prompt(model, TURNS, "here")
    assert ids[0] == model.tokenizer.bos_id
    assert model.tokenizer.decode(ids) == "1+1? 2\n\n2+2?"
    for prompt, answer, text in (("a", "b", "a b"), ("a ", "b", "a b"), ("a\n", "b", "a\nb"), ("a", " b", "a b")):
        a, b = prompts.encode_answer(model, [Message("user", prompt)], answer, "here")
        assert (model.tokenizer.decode(a), model.tokenizer.decode(b)) == ("a", text[1:])
    as_is = prompts.encode_answer(model, [Message("user", "a")], "b", "here", as_is=True)
    assert [model.tokenizer.decode(ids) for ids in as_is] == ["a", "b"]
    with pytest.raises(ValueError, match="^here: a prompt that is a list of messages needs a chat template"):
        prompts.encode_prompt(model, [Message("system", "x"), *TURNS], "here")


def test_the_turns_of_a_template(chat_model):
    a, b = prompts.encode_answer(chat_model, TURNS, "4", "here")
    conversation = [*TURNS, Message("assistant", "4")]
    whole = chat_model.template.encode(chat_model.tokenizer, conversation, loss_on="completion")
    assert a.tolist() == chat_model.template.encode_prompt(chat_model.tokenizer, TURNS).tolist()
    assert [*a, *b] == whole.ids[: len(a) + len(b)].tolist()
    assert b.tolist() == chat_model.tokenizer.encode("4").tolist()  # its end is not scored
    with pytest.raises(ValueError, match="^here: "):
        prompts.encode_prompt(chat_model, conversation, "here")


def test_system_messages_stay_in_front(write):
    path = write("all", *({"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"{i}?"}],
                           "answer": i} for i in range(3)))  # fmt: skip
    turns = shots(path, 2)[1][0]
    assert [turn.role for turn in turns] == ["system", "user", "assistant", "user", "assistant", "user"]


def test_what_is_cut_of_a_long_prompt_is_its_beginning():
    assert prompts.shorten(range(5), 5, 0) == range(5)
    assert prompts.shorten(np.arange(9), 4, 0).tolist() == [0, 6, 7, 8]
    assert prompts.shorten(np.arange(9), 1, 0).tolist() == [0]
    assert prompts.shorten(np.arange(9), 4, None).tolist() == [5, 6, 7, 8]  # without BOS the first is as good as any
    assert prompts.shorten(np.arange(9), 4, 7).tolist() == [5, 6, 7, 8]


@pytest.mark.parametrize("kind", ["llama2", "mistral", "gemma", "qwen"])
@pytest.mark.parametrize("as_is", [False, True])
def test_the_tokens_of_an_answer_are_those_that_follow_the_prompt_in_the_whole_text(kind, as_is):
    """As lm-eval's _encode_pair splits them: a space at the prompt's end goes to the answer."""
    tokenizers = pytest.importorskip("tokenizers")
    from tests.data.foreign import foreign

    tokenizer = foreign(kind)
    theirs = tokenizers.Tokenizer.from_str(tokenizer.source)
    model = LoadedModel(None, None, tokenizer, None)
    for prompt, answer in [
        ("the sky is", "blue"),
        ("why ", "yes"),
        ("[INST]", "the fox"),
        ("the", "\nlazy"),
        ("a", "b"),
    ]:
        whole = prompt + answer if as_is or prompt.endswith(" ") or answer[0] == "\n" else f"{prompt} {answer}"
        context, everything = (theirs.encode(text).ids for text in (prompt.rstrip(), whole))
        prompt_ids, answer_ids = prompts.encode_answer(model, [Message("user", prompt)], answer, "here", as_is=as_is)
        assert (prompt_ids.tolist(), answer_ids.tolist()) == (context, everything[len(context) :])


def test_an_answer_that_makes_one_token_with_the_prompt_has_that_token():
    pytest.importorskip("tokenizers")
    from tests.data.foreign import foreign

    tokenizer = foreign("qwen")
    (whole,) = tokenizer.encode("he")
    model = LoadedModel(None, None, tokenizer, None)
    prompt_ids, answer_ids = prompts.encode_answer(model, [Message("user", "h")], "e", "here", as_is=True)
    assert (prompt_ids.tolist(), answer_ids.tolist()) == ([], [whole])
