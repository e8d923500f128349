"""The terminal chat with lines from a pipe: a base model, and the same one with a chat template."""

import json
import re

import pytest

from jaxgpt.data.chat import ChatTemplate, Message
from jaxgpt.data.tokenizer import load_tokenizer
from tests.experiments.conftest import command, with_template

SHORT = ("--config=configs/chat.py:greedy", "--config.max_new_tokens=6")


@pytest.fixture(scope="module")
def base(finished):
    return str(finished[0])


@pytest.fixture(scope="module")
def assistant(base, tmp_path_factory):
    """The base model as if it had been trained on a template: what it says is no answer, but it is said in turns."""
    return with_template(base, tmp_path_factory.mktemp("assistant") / "run")


def chat(workdir, *lines, flags=SHORT):
    done = command("chat", *flags, f"--config.init_from={workdir}", input="".join(f"{line}\n" for line in lines))
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout.splitlines()


def generated(workdir, prompt, *flags):
    done = command(
        "generate", "--config=configs/generate.py:greedy", "--config.max_new_tokens=6", f"--config.init_from={workdir}",
        f"--config.prompt={prompt}", *flags,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_base_model_says_that_it_goes_on_with_the_text_and_does(base):
    said = chat(base, "Ann likes", "/probs 3", "/system Be brief.", "/quit", "Bob")
    assert "has no chat template: it continues the text" in said[0]
    continuation = said[2].removesuffix(" [length]")
    assert f"Ann likes{continuation}\n" in generated(base, "Ann likes")
    probabilities = [float(re.match(r" +(\d\.\d{4})  ", line)[1]) for line in said[3:6]]
    assert probabilities == sorted(probabilities, reverse=True)
    assert said[6:] == ["error: The model has no chat template, so it knows no system message."]


def test_turns_settings_and_files_of_a_conversation(assistant, tmp_path):
    file = tmp_path / "saved.jsonl"
    said = chat(
        assistant, "Ann", "/retry", "/set", "/set temperature 1.0", "/set seed 3", "/retry", f"/save {file}", "/retry",
        f"/save {file}", "/set temperature 0", "/set max_new_tokens 2", "Bob", f"/save {file}", "/clear", "/retry",
        "/set temprature 1", "/set top_p 2", "/probs x", "/nothing", "/save",
    )  # fmt: skip
    first, again, settings = said[1:4]
    assert said[0] == "[/help lists the commands.]"
    assert first == again
    assert f"-> {first.removesuffix(' [length]')}\n" in generated(assistant, "Ann")
    assert settings.startswith("temperature 0.0, top_k 0, ")
    assert settings.endswith("max_new_tokens 6, seed 0")
    turns = [[message["content"] for message in json.loads(line)["messages"]] for line in file.read_text().splitlines()]
    (ann, one), (_, other), (*before, bob, short) = turns
    assert (ann, bob) == ("Ann", "Bob")
    assert one != other  # each response has a key of its own
    assert before == [ann, other]
    assert len(short) <= 2 < len(first.removesuffix(" [length]"))
    assert f"[4 messages in {file}.]" in said
    mistakes = [
        "no response to draw again", "nearest is temperature", "sampler.top_p must be", "not 'x'", "no command /nothing",
        "needs a file",
    ]  # fmt: skip
    for line, words in zip([line for line in said if line.startswith("error: ")], mistakes, strict=True):
        assert words in line


def test_a_conversation_that_no_longer_fits_loses_its_oldest_turns_and_says_so(assistant):
    template, tokenizer = ChatTemplate.from_dir(assistant), load_tokenizer(assistant)
    message = "Ann likes Bob and Dora likes 3."
    alone = len(template.encode_prompt(tokenizer, [Message("user", message)]))
    assert alone <= 64 - 6 < 2 * alone  # two turns and a response do not fit the context of 64
    said = chat(
        assistant, message, message, message * 3, message, f"/system {message * 2}", "/retry", "/system", "/retry"
    )
    notice = "[The conversation no longer fits: its 1 oldest turn(s) were forgotten.]"
    assert said[2] == notice
    assert said[1] == said[3]  # the second is answered as if it were the first
    assert re.fullmatch(r"error: The message has \d+ tokens .*; max_new_tokens=6 leaves room for 58\.", said[4])
    assert said[5:7] == [notice, said[1]]  # the message that was refused has changed nothing
    assert re.fullmatch(r"error: The prompt has \d+ tokens; .* so at most 0 can be generated\.", said[7])
    assert said[8:] == [said[1]]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "init_from is required"),
        (["--config.init_from=nowhere"], "nowhere"),
        (["--config.init_from=RUN", "--config.max_new_tokens=-1"], "max_new_tokens must be at least 0, not -1"),
        (["--config.init_from=RUN", "--config.max_length=1"], "max_length must be at least 2"),
    ],
    ids=str,
)
def test_a_mistake_is_one_sentence_and_exit_code_2(base, flags, words):
    done = command("chat", *[flag.replace("RUN", base) for flag in flags], input="")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert [words in line for line in done.stderr.splitlines() if line.startswith("error: ")] == [True]
