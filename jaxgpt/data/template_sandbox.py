"""Jinja for chat templates, in a sandbox. As a program it renders for another process, within limits of time and memory.

It imports nothing of this project, so that such a process starts fast. A line of JSON comes in, {"source", "values"}, and one
goes out: {"text"}, or {"error", "line"}.
"""

import functools
import json
import resource
import signal
import sys
import traceback
from collections.abc import Mapping
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox

MAX_CHARACTERS = 1 << 25  # of a rendered text
_MAX_MESSAGE = 500  # characters of an error that a template words


class TemplateError(Exception):
    """What is wrong with a template, or what it refuses. line: of its source, None where that is not known."""

    def __init__(self, message: str, line: int | None):
        super().__init__(message[:_MAX_MESSAGE])
        self.line = line


@functools.lru_cache(maxsize=8)
def compiled(source: str) -> jinja2.Template:
    """A template that has been parsed; TemplateError with the line of a syntax error."""
    try:
        return _environment().from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise TemplateError(error.message or "syntax error", error.lineno) from error
    except Exception as error:  # constants are computed as a template is compiled
        raise TemplateError(_words(error), None) from error


def render(source: str, values: Mapping[str, Any]) -> str:
    """The text of a template; TemplateError where it fails or refuses."""
    try:
        return compiled(source).render(values)
    except TemplateError:
        raise
    except Exception as error:  # the template is a program of the user's: whatever it raises is a message to them
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == "<template>"]
        raise TemplateError(_words(error), lines[-1] if lines else None) from error


def _words(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return "it needs more memory than a template may have"
    return str(error) or type(error).__name__


class _Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}, with which some templates enclose what the assistant says: no effect."""

    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = _raise_exception
    # Jinja's own would write <, > and everything beyond ASCII as \u escapes.
    environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    return environment


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    try:
        text = render(request["source"], request["values"]) if request["values"] is not None else ""
        compiled(request["source"])
        if len(text) > MAX_CHARACTERS:
            raise TemplateError(f"it writes {len(text)} characters; at most {MAX_CHARACTERS} are allowed", None)
        return {"text": text}
    except TemplateError as error:
        return {"error": str(error), "line": error.line}


def main(cpu_seconds: float, memory_bytes: int) -> None:
    """Answer requests until there are no more. Beyond cpu_seconds for one of them the system ends the process."""
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
        answer = json.dumps(_answer(json.loads(line)))
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(f"{answer}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]))
