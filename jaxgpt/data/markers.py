"""Markers: the special tokens that chat templates write, told apart from texts that look like them."""

import functools
import re
from typing import NamedTuple

from jaxgpt.data.marker_names import ALIASES, KNOWN_MARKERS, RESERVED
from jaxgpt.data.tokenizer import Tokenizer

_ESCAPE = "\ue000"  # follows the first character of what must not be taken for a marker; a text's own is doubled


class Markers(NamedTuple):
    """ids: of every marker. either: matches (and captures) one of them, or one that the tokenizer ought to have. start:
    matches the first character of one, or of the beginning of one at the end of the text, where the template's text may
    complete it.
    """

    ids: dict[str, int]
    either: re.Pattern[str]
    start: re.Pattern[str]


def is_ours(tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer is of this project, with reserved tokens for the markers of any template."""
    return RESERVED[0] in tokenizer.special_ids


@functools.lru_cache(maxsize=8)
def markers_of(tokenizer: Tokenizer, has_known: bool) -> Markers:
    """The markers of a tokenizer. has_known: KNOWN_MARKERS are markers, too, even such as the tokenizer lacks."""
    special = tokenizer.special_ids
    ids = {name: special[target] for name, target in marker_aliases(tokenizer).items()} | special
    names = sorted({*ids, *(KNOWN_MARKERS if has_known else ())}, key=len, reverse=True)
    starts = []
    for name in names:
        beginnings = "|".join(re.escape(name[1:stop]) for stop in range(1, len(name)))
        starts.append(rf"{re.escape(name[0])}(?={re.escape(name[1:])}|(?:{beginnings})\Z)")
    return Markers(ids, re.compile(f"({'|'.join(map(re.escape, names))})"), re.compile("|".join(starts)))


def marker_aliases(tokenizer: Tokenizer) -> dict[str, str]:
    """Markers of other models' templates and the reserved tokens that stand for them; none where the tokenizer is theirs."""
    special = tokenizer.special_ids
    return {name: target for name, target in ALIASES.items() if name not in special} if is_ours(tokenizer) else {}


def escape(content: str, markers: Markers) -> str:
    """A message's content with nothing in it that is a marker, so that only the template's own are."""
    return markers.start.sub(lambda match: match.group() + _ESCAPE, double(content))


def double(text: str) -> str:
    """A text that `unescape` gives back, markers and all."""
    return text.replace(_ESCAPE, _ESCAPE * 2)


def unescape(text: str) -> str:
    """A text without what `escape` and `double` have put into it."""
    return re.sub(f"{_ESCAPE}({_ESCAPE}?)", r"\1", text)
