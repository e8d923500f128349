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
import sys
import traceback
import types
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from typing import Any, NamedTuple

import numpy as np

from jaxgpt import config as config_lib
from jaxgpt.data.sources import content_digest
from jaxgpt.rewards.verifiers import REWARDS, shortened

# (prompts, responses, records) -> one number for each response. A record is the prompt's object in the file, with all
# its fields.
RewardFn = Callable[[Sequence[str], Sequence[str], Sequence[dict[str, Any]]], Sequence[float]]


class Rewards(NamedTuple):
    """total_B: f32, the weighted sum. by_source: label -> f32 [B], before the weight."""

    total_B: np.ndarray
    by_source: dict[str, np.ndarray]


# The same with "path, line n" of each prompt, for messages.
CheckedRewardFn = Callable[[Sequence[str], Sequence[str], Sequence[dict[str, Any]], Sequence[str]], Rewards]


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
        elif file_and_function(self.name) is None:
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
            label: checked_values(labelled[label].name, function, (prompts, responses, records), where)
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
            checked_values(source.name, load(source), (empty, empty, records), where)


def load(source: RewardSource) -> RewardFn:
    """The batch function of a source, unchecked and without its weight; raises as `combine`."""
    if source.name in REWARDS:
        score: Any = config_lib.build(REWARDS[source.name], source.options, f"{source.name}.options")
        return lambda prompts, responses, records: [score(*pair) for pair in zip(responses, records, strict=True)]
    function = load_function(source.name)
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


def _labels(sources: Sequence[RewardSource]) -> Iterator[str]:
    seen: Counter = Counter()
    for source in sources:
        name = (file_and_function(source.name) or ("", source.name))[1]
        seen[name] += 1
        yield name if seen[name] == 1 else f"{name}_{seen[name]}"


def file_and_function(name: str) -> tuple[str, str] | None:
    """The parts of file.py:function, None for any other name."""
    path, colon, function = name.rpartition(":")
    return (path, function) if colon and path.endswith(".py") and function.isidentifier() else None


def function_digests(sources: Mapping[str, RewardSource], field: str) -> dict[str, str]:
    """The sha256 (hex) of the file of each source that is a user's function, by "field.label"; what it imports is not in it.

    Raises ValueError where a file cannot be read.
    """
    files = {label: file_and_function(source.name) for label, source in sources.items()}
    digests = {label: content_digest([file[0]]) for label, file in files.items() if file is not None}
    return {f"{field}.{label}": digest for label, digest in digests.items()}


def load_function(name: str, what: str = "reward") -> Callable[..., Any]:
    """The function of file.py:function, from the file as it is now; ValueError, in which it is the `what` it serves as."""
    path, function = file_and_function(name) or (name, "")
    try:
        with open(path, "rb") as file:
            source = file.read()
    except OSError as error:
        raise ValueError(f"The {what} {name!r}: {path} cannot be read ({error.strerror}).") from error
    # Not importlib, which would keep byte code beside the file and take it for a file changed within the same second.
    module = types.ModuleType(f"jaxgpt_reward_{os.path.basename(path).removesuffix('.py')}")
    module.__file__ = path
    sys.modules[module.__name__] = module  # dataclasses look their module up there
    try:
        exec(compile(source, path, "exec"), module.__dict__)
    except SyntaxError as error:
        raise ValueError(f"The {what} {name!r}: {error.filename}, line {error.lineno}: {error.msg}.") from error
    except (Exception, SystemExit) as error:
        raise ValueError(f"The {what} {name!r} cannot be loaded: {_cause(error, path)}.") from error
    found = getattr(module, function, None)
    if not callable(found):
        there = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        close = difflib.get_close_matches(function, there, n=1, cutoff=0.0)
        nearest = f"; the nearest is {close[0]!r}" if close else ", nor any other"
        raise ValueError(f"The {what} {name!r}: {path} has no function {function!r}{nearest}.")
    return found


_Batch = tuple[Sequence[Any], ...]  # the prompts, their responses, ...; of one length
_LARGEST = float(np.finfo(np.float32).max)


def checked_values(
    name: str, function: Callable[..., Any], batch: _Batch, where: Sequence[str], what: str = "reward"
) -> np.ndarray:
    """The values (f64 [B]) of function(*batch), each a finite number that fits f32; raises as `combine` says.

    what: "reward", or what else the function gives, for messages.
    """
    count = len(where)
    if not count:
        return np.zeros(0)
    prompts = f"the prompts of {where[0]} to {where[-1]}"
    try:
        values = function(*batch)
    except (Exception, SystemExit) as error:  # a function that calls sys.exit ends no run
        culprit = _culprit(function, batch)
        place = f"the prompt of {where[culprit]}" if culprit is not None else f"{prompts}, but for none of them alone"
        path = (file_and_function(name) or ("", ""))[0]
        raise ValueError(f"The {what} function {name} failed for {place}: {_cause(error, path)}.") from error
    try:
        found = -1 if isinstance(values, str | bytes | Mapping | Set) else len(values)
    except TypeError:
        found = -1
    if found < 0:
        raise ValueError(
            f"The {what} function {name} returned {type(values).__name__} for {prompts}; it must return a list or "
            f"array of {count} numbers, one for each response."
        )
    if found != count:
        raise ValueError(f"The {what} function {name} returned {found} values for {count} responses, {prompts}.")
    checked_B = np.empty(count)
    for i, value in enumerate(values):
        number = _number(value)
        if number is None or not abs(number) <= _LARGEST:
            raise ValueError(
                f"The {what} function {name} returned {shortened(value)} for the prompt of {where[i]}; a {what} must "
                f"be a finite number. The response was {shortened(batch[1][i])}."
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


def _culprit(function: Callable[..., Any], batch: _Batch) -> int | None:
    """The first prompt for which the function raises when it is alone, by bisection; None where it does for none."""

    def fails(low: int, high: int) -> bool:
        try:
            function(*(part[low:high] for part in batch))
        except (Exception, SystemExit):
            return True
        return False

    low, high = 0, len(batch[0])
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fails(low, middle) else (middle, high)
    return low if fails(low, high) else None


def _cause(error: BaseException, path: str) -> str:
    """An exception in a sentence, with the line of the user's file where it was raised."""
    if not path and isinstance(error, ValueError):
        return str(error)
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    place = f" ({path}, line {lines[-1]})" if lines else ""
    return f"{type(error).__name__}: {error}{place}"
