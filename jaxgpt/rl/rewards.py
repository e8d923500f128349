"""Rewards that are computed on the host: verifiable ones by name, a user's own from a file, weighted and added up.

A reward function sees a whole batch. What it returns is checked number by number, because one NaN would be in every
parameter an update later.
"""

import copy
import dataclasses
import decimal
import difflib
import inspect
import math
import numbers
import os
import re
import string
import sys
import traceback
import types
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from fractions import Fraction
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxgpt import config as config_lib

# (prompts, responses, records) -> one number for each response. A record is the prompt's object in the file, with all
# its fields.
RewardFn = Callable[[Sequence[str], Sequence[str], Sequence[dict[str, Any]]], Sequence[float]]

MAX_NUMBER = 1000  # characters; a model may write digits without end, which cost quadratic time to read


class Rewards(NamedTuple):
    """total_B: f32, the weighted sum. by_source: label -> f32 [B], before the weight."""

    total_B: np.ndarray
    by_source: dict[str, np.ndarray]


# The same with "path, line n" of each prompt, for messages.
CheckedRewardFn = Callable[[Sequence[str], Sequence[str], Sequence[dict[str, Any]], Sequence[str]], Rewards]


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

    The final number is as of `final_number`, in the response and in the reference.

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
                raise ValueError(f"there is no number in the record's answer {_shortened(text)}")
            wanted.append(number)
        found = final_number(response, marked_only=self.marked_only)
        return float(found is not None and any(abs(found - number) <= self.tolerance for number in wanted))


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
    "regex": Regex,
    "length": Length,
    "token_f1": TokenF1,
}


@dataclasses.dataclass(frozen=True)
class RewardSource:
    """One term of the reward.

    name: one of REWARDS, or a function of the user's as `path/to/file.py:function`.
    weight: its factor in the sum; 0 logs it without an effect, a negative one punishes.
    options: of the named reward; a user's function gets them as keyword arguments.
    """

    name: str = ""
    weight: float = 1.0
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if not math.isfinite(self.weight):
            raise ValueError(f"The weight of the reward {self.name!r} must be a finite number, not {self.weight}.")
        if self.name in REWARDS:
            config_lib.build(REWARDS[self.name], self.options, f"{self.name}.options")
        elif _file_and_function(self.name) is None:
            close = difflib.get_close_matches(self.name, REWARDS, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"There is no reward {self.name!r}; the nearest is {close!r}, and a function of your own is named as "
                "path/to/file.py:function."
            )


def combine(sources: Mapping[str, RewardSource] | Sequence[RewardSource]) -> CheckedRewardFn:
    """The weighted sum of rewards as one function that lets no bad value pass.

    Args:
      sources: label -> source, or a list, whose labels are the names (of a user's function, without the file; a second
        one of a name gets "_2").

    Returns:
      (prompts, responses, records, where) -> Rewards. It raises ValueError, naming the function and the prompt's file
      and line, for a function that raises (the cause is chained), and for a result of the wrong length or with
      anything but finite numbers; True and False are 1 and 0.

    Raises:
      ValueError: for no source, or a user's file or function that cannot be loaded or does not take the arguments.
    """
    labelled = sources if isinstance(sources, Mapping) else dict(zip(_labels(sources), sources, strict=True))
    if not labelled:
        raise ValueError("There is no reward; at least one source is needed.")
    functions = {label: load(source) for label, source in labelled.items()}

    def rewards(prompts, responses, records, where) -> Rewards:
        by_source = {
            label: _checked(labelled[label].name, function, (prompts, responses, records), where)
            for label, function in functions.items()
        }
        with np.errstate(all="ignore"):
            terms = [labelled[label].weight * value_B for label, value_B in by_source.items()]
            total_B = np.sum(terms, axis=0)
        for i in np.flatnonzero(~(np.abs(total_B) <= _LARGEST))[:1]:
            raise ValueError(
                f"The weighted sum of the rewards is {total_B[i]} for the prompt of {where[i]}: too large."
            )
        return Rewards(total_B.astype(np.float32), {k: value_B.astype(np.float32) for k, value_B in by_source.items()})

    return rewards


def check_records(
    sources: Mapping[str, RewardSource] | Sequence[RewardSource],
    records: Sequence[dict[str, Any]],
    where: Sequence[str],
) -> None:
    """ValueError naming file and line for a record without what a reward of REWARDS needs, before a run finds out."""
    empty = [""] * len(records)
    for source in sources.values() if isinstance(sources, Mapping) else sources:
        if source.name in REWARDS:
            _checked(source.name, load(source), (empty, empty, records), where)


def load(source: RewardSource) -> RewardFn:
    """The batch function of a source, unchecked and without its weight; raises as `combine`."""
    if source.name in REWARDS:
        score: Any = config_lib.build(REWARDS[source.name], source.options, f"{source.name}.options")
        return lambda prompts, responses, records: [score(*pair) for pair in zip(responses, records, strict=True)]
    function = _load_function(source.name)
    try:
        inspect.signature(function).bind([], [], [], **source.options)
    except TypeError as error:
        raise ValueError(
            f"The reward function {source.name} cannot be called as function(prompts, responses, records"
            f"{''.join(f', {key}=...' for key in source.options)}): {error}."
        ) from error

    # A function that changed its records would change what the next epoch sees.
    return lambda prompts, responses, records: function(
        list(prompts), list(responses), copy.deepcopy(list(records)), **source.options
    )


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


def final_number(text: str, *, marked_only: bool = False) -> Fraction | None:
    """The number that a text ends in, exactly; None where there is none.

    It is the one that directly follows "####" (the last such), else the last one. Numbers are written the English way:
    1,234.50, -.5, 3/4, 1 1/2, 1e-3; a currency sign before and a unit after are ignored. A minus after a digit, a letter
    or a closing bracket is subtraction, and digits after a letter (x2) belong to a name.
    """
    matches = list(_MARKED_NUMBER.finditer(text)) or ([] if marked_only else list(_NUMBER.finditer(text)))
    if not matches or len(matches[-1][0]) > MAX_NUMBER:
        return None
    match = matches[-1]
    if match["denominator"]:
        number = int(match["whole"] or 0) + Fraction(int(match["numerator"]), int(match["denominator"]))
    else:
        number = Fraction(match["decimal"].replace(",", ""))
    return -number if match["sign"] in ("-", "\u2212") else number


_SIGNED = r"""
    (?: (?<![^\W_]) (?<! \) ) (?P<sign> [-+\u2212] ) )? [$\u20ac\u00a3]?
    (?<! [^\W_] )
    (?: (?: (?P<whole> [0-9]+ ) [ ] )? (?P<numerator> [0-9]+ ) / (?P<denominator> 0* [1-9] [0-9]* ) (?! \.?[0-9] )
    |   (?P<decimal> (?: (?: [0-9]{1,3} (?: ,[0-9]{3} )+ (?! [0-9] ) | [0-9]+ ) (?: \.[0-9]+ )? | \.[0-9]+ )
        (?: [eE][-+]?[0-9]{1,3} (?! [^\W_] ) )? )
    )
"""  # [^\W_] is a letter or a digit
_NUMBER = re.compile(_SIGNED, re.VERBOSE)
_MARKED_NUMBER = re.compile(r"\#\#\#\# [\s*$\u20ac\u00a3]*" + _SIGNED, re.VERBOSE)

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


def _labels(sources: Sequence[RewardSource]) -> Iterator[str]:
    seen: Counter = Counter()
    for source in sources:
        name = (_file_and_function(source.name) or ("", source.name))[1]
        seen[name] += 1
        yield name if seen[name] == 1 else f"{name}_{seen[name]}"


def _file_and_function(name: str) -> tuple[str, str] | None:
    """The parts of file.py:function, None for any other name."""
    path, colon, function = name.rpartition(":")
    return (path, function) if colon and path.endswith(".py") and function.isidentifier() else None


def _load_function(name: str) -> Callable[..., Any]:
    path, function = _file_and_function(name) or (name, "")
    try:
        with open(path, "rb") as file:
            source = file.read()
    except OSError as error:
        raise ValueError(f"The reward {name!r}: {path} cannot be read ({error.strerror}).") from error
    # Not importlib, which would keep byte code beside the file and take it for a file changed within the same second.
    module = types.ModuleType(f"jaxgpt_reward_{os.path.basename(path).removesuffix('.py')}")
    module.__file__ = path
    sys.modules[module.__name__] = module  # dataclasses look their module up there
    try:
        exec(compile(source, path, "exec"), module.__dict__)
    except SyntaxError as error:
        raise ValueError(f"The reward {name!r}: {error.filename}, line {error.lineno}: {error.msg}.") from error
    except Exception as error:
        raise ValueError(f"The reward {name!r} cannot be loaded: {_cause(error, path)}.") from error
    found = getattr(module, function, None)
    if not callable(found):
        there = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        close = difflib.get_close_matches(function, there, n=1, cutoff=0.0)
        nearest = f"; the nearest is {close[0]!r}" if close else ", nor any other"
        raise ValueError(f"The reward {name!r}: {path} has no function {function!r}{nearest}.")
    return found


_Batch = tuple[Sequence[str], Sequence[str], Sequence[dict[str, Any]]]
_LARGEST = float(np.finfo(np.float32).max)


def _checked(name: str, function: RewardFn, batch: _Batch, where: Sequence[str]) -> np.ndarray:
    """The values (f64 [B]) of a reward function, each a finite number that fits f32; raises as `combine` says."""
    count = len(where)
    if not count:
        return np.zeros(0)
    prompts = f"the prompts of {where[0]} to {where[-1]}"
    try:
        values = function(*batch)
    except Exception as error:
        culprit = _culprit(function, batch)
        place = f"the prompt of {where[culprit]}" if culprit is not None else f"{prompts}, but for none of them alone"
        path = (_file_and_function(name) or ("", ""))[0]
        raise ValueError(f"The reward function {name} failed for {place}: {_cause(error, path)}.") from error
    try:
        found = -1 if isinstance(values, str | bytes | Mapping | Set) else len(values)
    except TypeError:
        found = -1
    if found < 0:
        raise ValueError(
            f"The reward function {name} returned {type(values).__name__} for {prompts}; it must return a list or "
            f"array of {count} numbers, one for each response."
        )
    if found != count:
        raise ValueError(f"The reward function {name} returned {found} values for {count} responses, {prompts}.")
    checked_B = np.empty(count)
    for i, value in enumerate(values):
        number = _number(value)
        if number is None or not abs(number) <= _LARGEST:
            raise ValueError(
                f"The reward function {name} returned {_shortened(value)} for the prompt of {where[i]}; a reward must "
                f"be a finite number. The response was {_shortened(batch[1][i])}."
            )
        checked_B[i] = number
    return checked_B


def _number(value: Any) -> float | None:
    """A Python, numpy or jax scalar as a float, None for anything else."""
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        value = value.item()
    if not isinstance(value, numbers.Real | decimal.Decimal):
        return None
    try:
        return float(value)
    except (OverflowError, ValueError):
        return None


def _culprit(function: RewardFn, batch: _Batch) -> int | None:
    """The first prompt for which the function raises when it is alone, by bisection; None where it does for none."""

    def fails(low: int, high: int) -> bool:
        try:
            function(*(part[low:high] for part in batch))  # type: ignore[arg-type]
        except Exception:
            return True
        return False

    low, high = 0, len(batch[0])
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fails(low, middle) else (middle, high)
    return low if fails(low, high) else None


def _cause(error: Exception, path: str) -> str:
    """An exception in a sentence, with the line of the user's file where it was raised."""
    if not path and isinstance(error, ValueError):
        return str(error)
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    place = f" ({path}, line {lines[-1]})" if lines else ""
    return f"{type(error).__name__}: {error}{place}"


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
