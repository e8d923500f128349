"""Verifiable rewards: what a response can be scored by without a model, each a small class with its options as fields."""

import dataclasses
import difflib
import math
import re
import string
import threading
from collections import Counter
from typing import Any, Literal

from jaxgpt.rewards.final_number import final_number

MAX_MATH = 10_000  # characters of a response that math_answer looks at, from its end


@dataclasses.dataclass(frozen=True)
class ExactMatch:
    """1 where the response is the reference but for white space, else 0.

    field: of the record, with the reference or a list of them, of which any will do; empty means `answer`, or
      `reference`.
    """

    field: str = ""
    ignore_case: bool = False
    ignore_punctuation: bool = False

    def __call__(self, response: str, record: dict[str, Any]) -> float:
        wanted = {self._normalized(text) for text in _references(record, self.field)}
        return float(self._normalized(response) in wanted)

    def _normalized(self, text: str) -> str:
        text = text.casefold() if self.ignore_case else text
        text = text.translate(_NO_PUNCTUATION) if self.ignore_punctuation else text
        return " ".join(text.split())


@dataclasses.dataclass(frozen=True)
class NumericAnswer:
    """1 where the response's final number is the reference's, else 0 (GSM8K, Cobbe et al. 2021, arXiv:2110.14168).

    The final number is as of `final_number`, in the response and in the reference: a plain number, never an expression,
    for which there is `math_answer`. A reference without one is an error, since it would teach what is wrong.

    field: as of ExactMatch. tolerance: the largest absolute difference that counts as equal.
    marked_only: a number without "####" before it is no answer.
    """

    field: str = ""
    tolerance: float = 0.0
    marked_only: bool = False

    def __post_init__(self):
        if not (self.tolerance >= 0 and math.isfinite(self.tolerance)):
            raise ValueError(f"numeric_answer.options.tolerance must be a number >= 0, not {self.tolerance}.")

    def __call__(self, response: str, record: dict[str, Any]) -> float:
        wanted = []
        for text in _references(record, self.field):
            number = final_number(text)
            if number is None:
                raise ValueError(
                    f"the record's answer {shortened(text)} does not end in a plain number, such as 1,234.50 or -3/4; "
                    "math_answer reads expressions and LaTeX"
                )
            wanted.append(number)
        found = final_number(response, marked_only=self.marked_only)
        return float(found is not None and any(abs(found - number) <= self.tolerance for number in wanted))


@dataclasses.dataclass(frozen=True)
class MathAnswer:
    r"""1 where the response's final answer equals the reference as mathematics, else 0: LaTeX, expressions, sets, intervals.

    The answer is what the package math-verify finds: in \boxed{}, after "answer is", or last. A reference without LaTeX
    around it may be bare (\frac{1}{2}). An answer that takes longer than five seconds is none.

    field: as of ExactMatch.

    Source: https://github.com/huggingface/Math-Verify.
    """

    field: str = ""

    def __post_init__(self):
        _math_verify()

    def __call__(self, response: str, record: dict[str, Any]) -> float:
        library = _math_verify()
        # The limit is a signal's, which the main thread alone can have.
        seconds = 5 if threading.current_thread() is threading.main_thread() else None
        wanted = []
        for text in _references(record, self.field):
            is_bare = not _MATH_MARKS.search(text) and not _WORD.search(_LATEX_WORD.sub("", text))
            found = library.parse(f"${text}$" if is_bare else text, parsing_timeout=seconds)
            if not found:
                raise ValueError(f"math_answer finds no mathematics in the record's answer {shortened(text)}")
            wanted.append(found)
        answer = library.parse(response[-MAX_MATH:], parsing_timeout=seconds)
        return float(any(library.verify(gold, answer, timeout_seconds=seconds) for gold in wanted))


def _math_verify() -> Any:
    try:
        import math_verify
    except ImportError as error:
        raise ValueError(
            "math_answer needs the package math-verify: pip install -e '.[math]' in the project's folder."
        ) from error
    return math_verify


@dataclasses.dataclass(frozen=True)
class Regex:
    """1 where the pattern matches the response, but for white space at its ends, else 0.

    pattern: in Python's syntax; flags go inside, as in "(?is)<think>.*</think>.*". method: the whole or any part of it.
    """

    pattern: str = ""
    method: Literal["fullmatch", "search"] = "fullmatch"

    def __post_init__(self):
        if not self.pattern:
            raise ValueError("regex.options.pattern is empty; it must be a regular expression.")
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"regex.options.pattern={self.pattern!r} is not a regular expression: {error}.") from error

    def __call__(self, response: str, record: dict[str, Any]) -> float:
        return float(getattr(re, self.method)(self.pattern, response.strip()) is not None)


@dataclasses.dataclass(frozen=True)
class Length:
    """How long the response is, in words (parts between white space), against what is wanted.

    target: -|words - target|, so that the best is 0. minimum, maximum: 1 where minimum <= words <= maximum, else 0;
      either may be left out. Either a target or bounds.
    """

    target: int | None = None
    minimum: int | None = None
    maximum: int | None = None

    def __post_init__(self):
        has_bounds = self.minimum is not None or self.maximum is not None
        if has_bounds == (self.target is not None):
            raise ValueError("length.options needs either a target or a minimum and maximum (or one of the two).")
        for name, value in dataclasses.asdict(self).items():
            if value is not None and value < 0:
                raise ValueError(f"length.options.{name} must not be negative, not {value}.")
        if self.minimum is not None and self.maximum is not None and self.minimum > self.maximum:
            raise ValueError(f"length.options.minimum={self.minimum} is above length.options.maximum={self.maximum}.")

    def __call__(self, response: str, record: dict[str, Any]) -> float:
        words = len(response.split())
        if self.target is not None:
            return -float(abs(words - self.target))
        return float((self.minimum or 0) <= words <= (math.inf if self.maximum is None else self.maximum))


@dataclasses.dataclass(frozen=True)
class TokenF1:
    """`token_f1` of the response against the reference; of several, the best. field: as of ExactMatch."""

    field: str = ""

    def __call__(self, response: str, record: dict[str, Any]) -> float:
        return max(token_f1(response, text) for text in _references(record, self.field))


# Each scores one response; its fields are the options of the name it goes by.
REWARDS: dict[str, type] = {
    "exact_match": ExactMatch,
    "numeric_answer": NumericAnswer,
    "math_answer": MathAnswer,
    "regex": Regex,
    "length": Length,
    "token_f1": TokenF1,
}


def token_f1(response: str, reference: str) -> float:
    """The F1 of a response's words against a reference's, in [0, 1], symmetric (SQuAD, Rajpurkar et al. 2016, 5.1).

    Words count as often as they occur; case, ASCII punctuation and the articles a, an, the do not matter. Two texts
    without words are equal, one without has nothing in common with any other.
    """
    left, right = _words(response), _words(reference)
    if not left or not right:
        return float(left == right)
    common = (Counter(left) & Counter(right)).total()
    return 2 * common / (len(left) + len(right))  # 2 p r / (p + r) with p = common / left, r = common / right


# Whether a reference is mathematics and nothing else, with nothing that says so: x^2 + 1, (1, 2), \\text{Monday}.
_MATH_MARKS = re.compile(r"\$|\\boxed|\\[(\[]")
_LATEX_WORD = re.compile(r"\\text\{[^{}]*\}|\\[a-zA-Z]+")
_WORD = re.compile(r"[^\W\d_]{2,}")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split()


def _references(record: dict[str, Any], field: str) -> list[str]:
    """The texts of a record's field, numbers written out; ValueError where it is missing or of another kind."""
    names = (field,) if field else ("answer", "reference")
    name = next((name for name in names if name in record), None)
    if name is None:
        close = difflib.get_close_matches(names[0], record, n=1)
        nearest = f"; the nearest is {close[0]!r}, and the option field can name it" if close else ""
        raise ValueError(
            f"the record has no field {' or '.join(map(repr, names))} (there are: {', '.join(record)}){nearest}"
        )
    value = record[name]
    texts = value if isinstance(value, list) else [value]
    if not texts or any(isinstance(text, bool) or not isinstance(text, str | int | float) for text in texts):
        raise ValueError(f"the record's field {name!r} must be a text, a number or a list of them, not {value!r}")
    return [str(text) for text in texts]


def shortened(value: Any) -> str:
    """The repr of a value, cut after 80 characters, for messages."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
