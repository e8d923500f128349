"""The number that a text ends in, read exactly or not at all: an expression is no number, and no part of it is one."""

import re
from fractions import Fraction

MAX_NUMBER = 1000  # characters; a model may write digits without end, which cost quadratic time to read
_CONTEXT = 40  # characters on either side that tell whether a number stands for itself


def final_number(text: str, *, marked_only: bool = False) -> Fraction | None:
    r"""The number that a text ends in, exactly; None where there is none, or where it is only a part of something else.

    It is the one that directly follows "####" (the last such; a numbered heading, "#### 1. Compute", is none), else the last
    one of the last \boxed{}, else the last one of all. Numbers are written the English way: 1,234.50, -.5, 3/4, 1 1/2, 1e-3,
    in LaTeX 1{,}234. Thousands may also be apart by a thin or a no-break space, and by an ordinary one where a
    group begins with 0 (1 000), which no number of its own does. A currency sign before and a unit after are ignored, of
    which % is one, and so is the power of one (18 cm^2); so are the marks of bold text, and what an aside in the end works
    out: 18 dollars (6 * 3). Digits after a letter (x2) belong to a name.

    What is no plain number gives None: LaTeX (\frac{1}{2}, \sqrt{2}, 2\pi), powers and roots (2^10, √2), a division by zero,
    sums and products that are not worked out (2-5, 7 * 3), 3,5 and 1.2.3 and 3:45, 2½, 12 345.
    """
    text = _POWER_OF_UNIT.sub(r"\1", text)
    marked = [match for match in _MARKED_NUMBER.finditer(text) if not _HEADING.match(text, match.end())]
    if marked:
        return _read(marked[-1], text, is_marked=True)
    if marked_only:
        return None
    text = _boxed(text)
    number = _last_number(text)
    aside = _ASIDE.search(text, max(0, len(text) - _MAX_ASIDE)) if number is None else None
    if aside and re.search("[0-9]", aside[1]) and _last_number(aside[1]) is None:
        return _last_number(text[: aside.start(1)].rstrip())
    return number


def _boxed(text: str) -> str:
    r"""What stands in the last \boxed{} of a text, to whose braces nothing is done after it; else the text."""
    begin = max(text.rfind(name) + len(name) if name in text else 0 for name in _BOXES)
    depth = 1 if begin else 0
    for brace in re.compile("[{}]").finditer(text, begin) if begin else ():
        depth += 1 if brace[0] == "{" else -1
        if not depth:
            is_base = text.startswith("^", brace.end())
            return text if is_base else text[begin : brace.start()]
    return text


def _last_number(text: str) -> Fraction | None:
    matches = list(_NUMBER.finditer(text))
    return _read(matches[-1], text, is_marked=False) if matches else None


def _read(match: re.Match[str], text: str, *, is_marked: bool) -> Fraction | None:
    """The number of a match, None where it is a part of something else."""
    if len(match[0]) > MAX_NUMBER or not _is_plain(match, text, is_marked=is_marked):
        return None
    if match["denominator"]:
        number = int(match["whole"] or 0) + Fraction(int(match["numerator"]), int(match["denominator"]))
    else:
        number = Fraction(_SEPARATORS.sub("", match["decimal"]))
    return -number if match["sign"] in ("-", "\u2212") else number


def _is_plain(match: re.Match[str], text: str, *, is_marked: bool) -> bool:
    """Whether what stands around the number leaves it what it looks like."""
    begin, end = match.start(), match.end()
    after = text[end : end + _CONTEXT]
    if _AFTER.match(after) or (_GROUP.fullmatch(match[0]) and _GROUP_AFTER.match(after)):
        return False
    if is_marked:
        return True
    before = text[max(0, begin - _CONTEXT) : begin]
    if _BEFORE.search(before) or (match["sign"] and _OPERAND.search(before)):
        return False
    stars = _STARS.search(before)
    if stars and not after.startswith(stars[1]):  # 7 **21** is bold, 7 *3 is a product
        return False
    if _THREE.fullmatch(match[0]) and _GROUP_BEFORE.search(before):
        return False
    return not _NUMBER_LATER.search(text, end)


_SIGNED = r"""
    (?: (?<![^\W_]) (?<! [)\]}] ) (?P<sign> [-+\u2212] ) )? [$\u20ac\u00a3]?
    (?<! [^\W_] )
    (?: (?: (?P<whole> [0-9]+ ) [ ] )? (?P<numerator> 0 | [1-9][0-9]* ) / (?P<denominator> 0* [1-9] [0-9]* ) (?! \.?[0-9] )
    |   (?P<decimal> (?: (?: [0-9]{1,3} (?: (?: ,[0-9]{3} )+ | (?: \{,\}[0-9]{3} )+ | (?: [\u00a0\u2009\u202f][0-9]{3} )+
                                            | (?= (?: [ ][0-9]{3} ){0,5} [ ]0[0-9]{2} ) (?: [ ][0-9]{3} ){1,6} ) (?! [0-9] )
                            | [0-9]+ ) (?: \.[0-9]+ )? | \.[0-9]+ )
        (?: [eE][-+]?[0-9]{1,3} (?! [^\W_] ) )? )
    )
"""  # [^\W_] is a letter or a digit
_NUMBER = re.compile(_SIGNED, re.VERBOSE)
_MARKED_NUMBER = re.compile(r"\#\#\#\# [\s*$\u20ac\u00a3]*" + _SIGNED, re.VERBOSE)
_HEADING = re.compile(r"[.):][*]*[ \t]+[^\s*]|[ \t]+[A-Z][a-z]+[ \t]+[^\W\d_]")  # 1. Compute, 2 Find the
_BOXES = (r"\boxed{", r"\fbox{")
_UNIT = "(?:[kcdm]?m|in|ft|yd|mi|inch(?:es)?|feet|foot|yards?|miles?|met(?:er|re)s?|units?|s)"
_POWER_OF_UNIT = re.compile(
    rf"""(
        [0-9] (?: [ ~] | \\[,;: ] )? (?: [a-zA-Z]{{1,3}} / )? {_UNIT}
    |   [0-9] (?: [ ~] | \\[,;: ] )? \\(?: text | mathrm ) \{{ [ ]? (?: [a-zA-Z]{{1,3}} / )? {_UNIT} [ ]? \}}
    ) \^ (?: [23] | \{{ [23] \}} ) (?! [0-9] )""",
    re.VERBOSE,
)
_MAX_ASIDE = 200  # characters
# A unit, or nothing where words are in them, and brackets that end the text.
_ASIDE = re.compile(
    r"""[0-9%] (?: [ ] (?! (?: is | are | was | were | equals? | gives? | makes? | and | or | to | of | by | for | in | at
                          | as | plus | minus | times | over | divided | multiplied ) \b ) [a-zA-Z]{2,20} [ ]+
               | [ ]+ (?= \( [a-zA-Z]{2} ) )
        ( \( [^()\n]* \) ) [.!\s$*]* \Z""",
    re.VERBOSE,
)
_SEPARATORS = re.compile("[{}, \u00a0\u2009\u202f]")
# What makes a number a part of an expression, by what stands before it ...
_BEFORE = re.compile(
    r"""(?:
        [\^\u221a-\u221c\u00b1] [ \t]* [({]?                                  # x^5, x^(5, \u221a5, \u00b15
    |   [^\W\d_] \(                                                           # f(5
    |   \\(?: pm | mp | times | cdot | div | sqrt | log | ln ) [ \t]* \(?      # 7 \times 5
    |   [^\W_)}\]] _ | [)}\]] _                                               # a_5, 1_000
    |   (?<! \\boxed ) (?<! \\fbox ) (?<! \\text ) (?<! \\mathrm ) (?<! \\mathbf ) (?<! \\textbf ) \{    # \frac{5
    |   \}                                                                    # \frac{1}5
    |   \\[,;:!] | [0-9]\\[ ]                                                 # 1\,000
    |   [0-9] [.,:'\u2019]+                                                   # 1.2.3, 3,5, 3:45, 1'000
    |   [0-9)\]}%] [ \t]* [-+\u2212\u2010-\u2015/\u00d7\u00f7\u00b7\u22c5]+ [ \t]*           # 2 - 5, 1/0
    |   [0-9)\]}%] (?: \*+ [ \t]* | [ \t]* \*+ [ \t]+ )                        # 7*3, 7 * 3
    |   [^\W\d_] (?: [-+\u2212/*\u00d7\u00f7\u00b7\u22c5]+ | [ \t]+ [*/\u00d7\u00f7\u00b7\u22c5] [ \t]+ )   # x-5, x * 5
    )\Z""",
    re.VERBOSE,
)
_OPERAND = re.compile(r"[0-9)\]}%][ \t]+\Z")  # before a sign, that is: 2 -5
_STARS = re.compile(r"[0-9)\]}%][ \t]+(\*+)\Z")
# ... or after it.
_AFTER = re.compile(
    r"""
        \^ (?! \{? \\circ ) | [{\u2070-\u209c\u00b2\u00b3\u00b9] | _[^\W_]     # 2^10, 2_10; 90^\circ is a unit
    |   [ ]? [\u00bc-\u00be\u2150-\u215e]                                     # 2\u00bd
    |   \\ (?= [a-zA-Z] ) (?! (?: text | math | operatorname | q?quad | right | circ | degree | end ) )      # 2\pi
    |   [ \t]* \\ (?: times | cdot | div | pm | d?frac | sqrt | pi )           # 2 \times 10
    |   [ \t]* (?: [-+\u2212/*\u00d7\u00f7\u00b7\u22c5] | \*\* ) [ \t]* [0-9(]    # 2 + 3, 1/0
    |   [.,:'\u2019\u2010-\u2015] [0-9] | \\[,;:!] [0-9]                       # 1,2345; 2\u20135
    |   [xX\u00d7] [0-9] | [eE][-+]?[0-9]                                     # 0x1F, 1e4000
    """,
    re.VERBOSE,
)
# Groups of digits: 12 345 may be one number or two.
_THREE = re.compile("[0-9]{3}")
_GROUP = re.compile("(?:.*[^0-9])?[0-9]{1,3}", re.DOTALL)
_GROUP_BEFORE = re.compile(r"(?<![0-9.,])[0-9]{1,3}[ ]\Z")
_GROUP_AFTER = re.compile(r"[ ][0-9]{3}(?![0-9])")
# Numbers that are not written in the digits of _NUMBER: \frac12, \u00bd, digits of other scripts.
_NUMBER_LATER = re.compile(r"\\[a-zA-Z]+[ \t]*[0-9]|[\u00bc-\u00be\u2150-\u215e]|[^\D0-9]")
