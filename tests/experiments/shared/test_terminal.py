"""A conversation in this process: settings out of range, turns that fail, and answers that are broken off."""

import json
import signal

import jax
import pytest

from experiments.shared.terminal import Terminal
from jaxgpt import partition
from jaxgpt.data.chat import CHAT_TEMPLATES, ChatTemplate
from jaxgpt.data.sentencepiece_tokenizer import TokenizerConfig, train_tokenizer
from jaxgpt.generate.dialogue import ChatFormat, Dialogue, Speech
from jaxgpt.generate.engine import Engine
from jaxgpt.generate.samplers import SamplerConfig
from jaxgpt.generate.stream import TextEngine, TextStream
from jaxgpt.models import decoder
from jaxgpt.models.config import ModelConfig

TOKENIZER = train_tokenizer(
    ["Ann sees Bob and Cid likes Dora."] * 3, TokenizerConfig(model_type="char", vocab_size=400)
)
CFG = ModelConfig(
    vocab_size=TOKENIZER.vocab_size, num_layers=1, embed_dim=16, num_heads=2, max_seq_length=64, dtype="float32"
)


@pytest.fixture(scope="module")
def engine():
    mesh = partition.make_mesh(partition.MeshConfig(), devices=jax.devices()[:1])
    params = partition.unbox(jax.jit(lambda: decoder.init_params(CFG, jax.random.key(0)))())
    return TextEngine(Engine(CFG, jax.device_put(params, partition.replicated(mesh)), mesh, num_slots=1), TOKENIZER)


@pytest.fixture
def dialogue(engine):
    template = ChatTemplate(CHAT_TEMPLATES["gemma"], "gemma")  # which insists that turns alternate
    return Dialogue(engine, ChatFormat.of(TOKENIZER, template), Speech(SamplerConfig(temperature=0), 6))


@pytest.fixture
def say(dialogue, capsys):
    """What the terminal prints for lines."""
    terminal = Terminal(dialogue)

    def handle(*lines):
        for line in lines:
            terminal.handle(line)
        return capsys.readouterr().out

    return handle


OUT_OF_RANGE = {
    "temperature": ["-1", "1e999", "1e7", "1e-9", "nan", "x", "", "9" * 5000],
    "top_k": ["-1", "99999999999", "2147483648", "1.5", "9" * 5000, "(" * 500],
    "top_p": ["0", "2", "-1", "1e-300", "nan"],
    "min_p": ["-1", "1.01", "1e999"],
    "repetition_penalty": ["0", "-1", "1e999", "1e300", "1e-45"],
    "max_new_tokens": ["-1", "1.5", "none"],
    "seed": ["-1", "4294967296", "1e3"],
}


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in OUT_OF_RANGE.items() for text in texts])
def test_a_setting_out_of_range_is_a_sentence_and_changes_nothing(dialogue, say, name, text):
    before = dialogue.speech
    printed = say(f"/set {name} {text}")
    assert printed.startswith("error: ")
    assert printed.count("\n") == 1
    assert dialogue.speech == before
    assert say("Ann").endswith("[length]\n")


@pytest.mark.parametrize("name", ["max_new_tokens"])
def test_a_setting_that_leaves_no_room_is_said_with_the_next_message(dialogue, say, name):
    assert say(f"/set {name} 99999999999") == ""
    assert say("Ann").startswith(f"error: {name}=99999999999 leaves no room")
    assert say(f"/set {name} 6", "Ann").endswith("[length]\n")


@pytest.mark.parametrize("place", ["step", "text", "prompt"])
def test_whatever_a_turn_raises_is_a_sentence_and_the_conversation_stays(
    engine, dialogue, say, monkeypatch, tmp_path, place
):
    first = say("Ann")

    def broken(*_, **__):
        raise ArithmeticError("out of\nluck")

    if place == "step":
        monkeypatch.setattr(engine.engine, "_decode_step", broken)
    elif place == "text":
        monkeypatch.setattr(TextStream, "push", broken)
    else:
        monkeypatch.setattr(dialogue, "_prompt", broken)
    printed = say("Bob", "/retry", "/probs")
    assert printed.count("error: This turn failed (ArithmeticError: out of luck); the conversation is still there") >= 2
    monkeypatch.undo()
    assert say("/retry").endswith("[length]\n")
    assert say("/clear", "Ann") == first
    say(f"/save {tmp_path / 'saved.jsonl'}")
    assert [m["role"] for m in json.loads((tmp_path / "saved.jsonl").read_text())["messages"]] == ["user", "assistant"]


def test_a_message_after_a_turn_that_failed_is_answered(dialogue, say, engine, monkeypatch):
    """Turns alternate for a template that insists on it."""
    monkeypatch.setattr(engine.engine, "_decode_step", lambda *_: 1 / 0)
    say("Ann")
    monkeypatch.undo()
    assert say("Bob").endswith("[length]\n")
    assert [m.role for m in dialogue.messages] == ["user", "assistant"] * 2


def test_ctrl_c_during_an_answer_ends_the_answer(engine, dialogue, say, monkeypatch, request):
    step = engine.engine.step
    steps = []
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever ran before in this process
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, previous))

    def interrupted():
        steps.append(1)
        if len(steps) == 2:
            signal.raise_signal(signal.SIGINT)
        return step()

    monkeypatch.setattr(engine.engine, "step", interrupted)
    say("/set max_new_tokens 20")
    assert say("Ann").endswith("[broken off]\n")
    assert len(steps) < 5
    assert engine.engine.num_free == 1
    monkeypatch.setattr(dialogue, "ask", lambda _: signal.raise_signal(signal.SIGINT))
    assert say("Bob") == "[broken off]\n"
