"""Templates that compute without end, or fill the memory, end with a sentence; what was there before goes on."""

import os
import subprocess
import sys

import pytest

from jaxgpt.data import template_worker
from jaxgpt.data.chat import ChatTemplate, Message

TALK = [Message("user", "a"), Message("assistant", "b")]
EACH = "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
ATTACKS = {
    "nested ranges": LOOPS,
    "lipsum": "{{ lipsum(n=10**7) }}",
    "a power of constants, as it is compiled": "{{ 10 ** (10 ** 9) }}",
    "a power": "{{ (messages | length + 8) ** (10 ** 9) }}",
    "indent": "{{ ('a\\n' * 10**6) | indent(10**6) }}",
    "a long text of constants": "{{ 'a' * 10**10 }}",
    "a long text": "{{ messages[0].content * 10**10 }}",
    "doubling": "{% set n = namespace(a='a') %}{% for i in range(60) %}{% set n.a = n.a ~ n.a %}{% endfor %}",
    "center": "{{ 'a' | center(10**10) }}",
    "format": "{{ '%99999999999d' % 1 }}",
    "a list": "{{ [0] * 10**10 }}",
    "recursion": "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    "a long output": "{% for a in range(99999) %}{% for b in range(99999) %}aaaaaaaaaaaaaaaa{% endfor %}{% endfor %}",
}
# In a process of its own, so that what is not bounded fails this test and not all others.
PROGRAM = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))
from jaxgpt.data import template_worker
from jaxgpt.data.chat import ChatTemplate, Message
template_worker.CPU_SECONDS = 0.5
talk = [Message("user", "a"), Message("assistant", "b")]
for source in sys.argv[1:]:
    try:
        print(len(ChatTemplate(source, "theirs").render(talk)))
    except ValueError as error:
        print(error)
print(ChatTemplate("{{ messages[1].content }}{# fine #}", "mine").render(talk))
"""


def test_what_would_never_end_or_fill_the_memory_is_an_error_of_the_template():
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, *ATTACKS.values()], capture_output=True, text=True, timeout=120,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    *said, last = run.stdout.splitlines()
    assert last == "b"
    assert len(said) == len(ATTACKS)
    for name, line in zip(ATTACKS, said, strict=True):
        assert line.startswith("Chat template theirs"), (name, line)
    assert "takes more than 0.5 seconds of processor time" in said[0]
    assert "needs more memory than a template may have" in said[list(ATTACKS).index("a long text")]


def test_a_template_that_hangs_in_the_middle_of_a_conversation_is_an_error_and_the_next_turn_is_answered(monkeypatch):
    template_worker._WORKER.close()
    monkeypatch.setattr(template_worker, "CPU_SECONDS", 0.5)
    template = ChatTemplate(f"{{% if messages | length == 3 %}}{LOOPS}{{% endif %}}{EACH}", "theirs")
    assert template.render(TALK) == "a<eos>b<eos>"
    with pytest.raises(ValueError, match="^Chat template theirs: it takes more than 0.5 seconds of processor time$"):
        template.render([*TALK, TALK[0]])
    assert template.render([*TALK, *TALK]) == "a<eos>b<eos>" * 2
    template_worker._WORKER.close()


def test_an_error_has_its_line_and_its_words_but_not_more_of_them_than_one_reads():
    with pytest.raises(ValueError, match="Chat template theirs, line 2: a{500}$"):
        ChatTemplate("\n{{ raise_exception('a' * 10**6) }}", "theirs").render(TALK)
    with pytest.raises(ValueError, match=r"it writes 40000000 characters; at most 33554432 are allowed"):
        ChatTemplate("{{ 'a' * 40000000 }}", "theirs").render(TALK)


def test_a_process_that_was_ended_from_outside_is_replaced():
    template = ChatTemplate(EACH, "theirs")
    process = template_worker._WORKER._process
    process.kill()
    process.wait()
    assert template.render(TALK) == "a<eos>b<eos>"


def test_texts_of_any_kind_go_through():
    text = 'é👩 \ue000 \0 \u2028 "\\" {{ 1 }}\r\n'
    assert ChatTemplate(EACH, "theirs").render([Message("user", text)]) == text + "<eos>"


def test_a_copy_of_the_process_renders_for_itself():
    template = ChatTemplate(EACH, "theirs")
    expected = template.render(TALK)
    program = (
        "import os\nfrom jaxgpt.data.chat import ChatTemplate, Message\n"
        f"template = ChatTemplate({EACH!r}, 'theirs')\n"
        "child = os.fork()\n"
        "text = template.render([Message('user', 'a'), Message('assistant', 'b')])\n"
        "print(text, flush=True)\n"
        "child and os.waitpid(child, 0)\n"
    )
    run = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", "-c", program], capture_output=True, text=True, timeout=60,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert (run.stdout, run.stderr) == (f"{expected}\n" * 2, "")
