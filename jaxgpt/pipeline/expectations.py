"""What must hold of a stage's result: comparisons of its manifest's numbers, by their bounds where they have an interval."""

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jaxgpt.evaluation.intervals import Z
from jaxgpt.reporting.pipeline_report import Verdict

_COMPARISON = re.compile(r"(?P<left>.+?) (?P<sign>[<>]) (?:(?P<factor>[-+.\de]+) \* )?(?P<right>.+)")
_BOUNDS = ("low", "high")
# Command -> its numbers that are means over a sample. A right program misses a bare one by chance, so bounds are compared.
_OF_SAMPLES = {
    "evaluate": re.compile(r"final_metrics\..+"),
    "ppo": re.compile(r"(final_metrics|first)\.eval/(scores|gold|loss)"),
    "grpo": re.compile(r"(final_metrics|first)\.eval/(scores|gold|loss)"),
    "reward": re.compile(r"report_card\.(.+\.)?accuracy|(final_metrics|first)\.eval/(pair_)?accuracy"),
}
# Where the interval of such a number is to be found, if not beside it.
_INTERVAL_OF = {
    "report_card.accuracy.accuracy": "report_card.accuracy",
    "final_metrics.eval/accuracy": "report_card.accuracy",
    "final_metrics.eval/pair_accuracy": "report_card.accuracy",
    "final_metrics.eval/loss": "final_metrics.eval/gold or final_metrics.eval/scores",  # minus one of them
    "first.eval/loss": "first.eval/gold or first.eval/scores",
}


def check_expectation(text: str, command: str) -> None:
    """ValueError where it is no comparison, or compares a mean over a sample instead of a bound of its interval."""
    match = _COMPARISON.fullmatch(text)
    if match is None:
        raise ValueError(
            f"expect={text!r} is not a comparison such as 'final_metrics.eval/loss < 0.9 * first.eval/loss'."
        )
    for path in (match["left"], match["right"]):
        if path.endswith(tuple(f".{bound}" for bound in _BOUNDS)):
            continue
        if command in _OF_SAMPLES and _OF_SAMPLES[command].fullmatch(path):
            raise ValueError(
                f"expect={text!r}: {path} is a mean over a sample, which misses such a bound by chance; compare .low or "
                f".high of {_INTERVAL_OF.get(path, path)}, the bounds of its 95 % interval, and leave room."
            )


def judge(expect: Sequence[str], manifest: Mapping[str, Any], first: Mapping[str, float]) -> list[Verdict]:
    """What became of each expectation; first: metric -> its first logged value. NaN fulfils nothing.

    Raises ValueError where a path leads to no number.
    """
    content, verdicts = {**manifest, "first": first}, []
    for text in expect:
        match = _COMPARISON.fullmatch(text)
        assert match is not None  # as check_expectation has seen
        left = number(content, match["left"])
        right = float(match["factor"] or 1) * number(content, match["right"])
        verdicts.append(Verdict(text, left, right, left < right if match["sign"] == "<" else left > right))
    return verdicts


def number(content: Mapping[str, Any], path: str, field: str = "expect") -> float:
    """A number, or the one that a path leads to; PATH.low and PATH.high are the bounds of a metric's 95 % interval.

    Raises:
      ValueError: naming the config's field and the nearest name, where it leads nowhere or to something else.
    """
    try:
        return float(path)
    except ValueError:
        pass
    value: Any = content
    parts = path.split(".")
    for i, part in enumerate(parts):
        if part in _BOUNDS and i == len(parts) - 1 and isinstance(value, int | float):
            return _bound(content, parts[:-1], part, value, field)
        if not isinstance(value, Mapping) or part not in value:
            known = list(value) if isinstance(value, Mapping) else []
            nearest = difflib.get_close_matches(part, known, n=1, cutoff=0.0)
            raise ValueError(
                f"{field}: the manifest has no {path}" + (f"; the nearest is {nearest[0]!r}." if nearest else ".")
            )
        value = value[part]
    if value is None:
        return math.nan  # what was not finite; no comparison with it holds
    if not isinstance(value, int | float):
        raise ValueError(f"{field}: {path} of the manifest is not a number.")
    return float(value)


def _bound(content: Mapping[str, Any], parts: Sequence[str], side: str, value: float, field: str) -> float:
    """A metric's bound: from the manifest's `intervals`, or by the standard error that is logged beside it."""
    intervals, name = content.get("intervals", {}), parts[-1]
    if parts[:-1] == ["final_metrics"] and name in intervals:
        bound = intervals[name][side]
    else:
        around: Any = content
        for part in parts[:-1]:
            around = around[part]
        stderr = around.get(f"{name}_stderr")
        bound = None if stderr is None else value + (Z if side == "high" else -Z) * stderr
    if bound is None:
        raise ValueError(f"{field}: the manifest has no interval for {'.'.join(parts)}.")
    return float(bound)
