"""Reads numbers in text: with Markdown or LaTeX around them, separators, units, as fractions."""

from __future__ import annotations

import re
from decimal import Decimal
from fractions import Fraction
from typing import Final

_INTEGER: Final = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)"
_PLAIN: Final = rf"(?:{_INTEGER}(?:\.[0-9]*)?|\.[0-9]+)"
_DECIMAL: Final = re.compile(rf"[-+]?{_PLAIN}(?:e[-+]?[0-9]{{1,3}})?", re.IGNORECASE)
_RATIO: Final = re.compile(rf"([-+]?{_INTEGER})\s*/\s*(-?{_INTEGER})")
_MIXED: Final = re.compile(r"([-+]?)([0-9]+)\s+([0-9]+)\s*/\s*([0-9]+)")
_POWER: Final = re.compile(rf"([-+]?)(?:({_PLAIN})\s*[*x]\s*)?10\s*\^\s*\(?([-+]?[0-9]{{1,3}})\)?")
# A digit repeated without end is not a number; Python refuses to parse more than 4,300 digits.
_MAX_LENGTH: Final = 200

_CURRENCIES: Final = "$€£¥₹"
_SIGN_FIRST: Final = re.compile(rf"([-+]?)\s*([{_CURRENCIES}])\s*(.*)", re.DOTALL)
_SIGN_LAST: Final = re.compile(rf"(.*?)\s*([{_CURRENCIES}%])", re.DOTALL)

# Minus signs and dashes used as one; blanks of all widths; the slash of fractions.
_CHARACTERS: Final = str.maketrans(
    dict.fromkeys("\u2212\u2013\u2012\u2010\u2011\ufe63\uff0d", "-")
    | dict.fromkeys("\u00a0\u2007\u2009\u200a\u202f", "\u2009")
    | dict.fromkeys("\u200b\u2060\ufeff", None)
    | {"\u2044": "/", "\u00d7": "x", "\uff05": "%", "\uff0c": ","}
)
_PAIRS: Final = (
    ("**", "**"), ("__", "__"), ("*", "*"), ("_", "_"), ("```", "```"), ("`", "`"), ("$$", "$$"), ("$", "$"),
    ("\\(", "\\)"), ("\\[", "\\]"), ('"', '"'),
)  # fmt: skip
_TEXT: Final = re.compile(
    r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mbox|operatorname|boldsymbol)\s*\{([^{}]*)\}"
)
BOX: Final = r"\\(?:boxed|fbox)\s*\{"
_WHOLE_BOX: Final = re.compile(BOX + r"([^{}]*)\}")
# A brace after a backslash is a literal one and closes nothing.
_BRACE: Final = re.compile(r"\\.|[{}]", re.DOTALL)
_FRACTION: Final = re.compile(
    r"(?P<whole>(?<![0-9.,])[0-9]+)?\s*\\[dtc]?frac\s*"
    r"(?:\{\s*(?P<top>[-+]?[0-9.,]+)\s*\}|(?P<top_digit>[0-9]))\s*"
    r"(?:\{\s*(?P<bottom>-?[0-9.,]+)\s*\}|(?P<bottom_digit>[0-9]))(?!\s*[0-9])"
)
_LETTER: Final = re.compile(r"\(\s*([A-Za-z])\s*\)")
# Blanks between groups of three digits: a separator where they are narrow or LaTeX's.
_NARROW: Final = re.compile(r"(?<=[0-9])(?:\u2009|\\,|\\;|\\:|\\ )(?=[0-9]{3}(?![0-9]))")


def plain_text(text: str) -> str:
    r"""Strips Markdown and LaTeX from an answer, with fractions as ``1/2`` and ASCII's minus.

    Example:
        >>> plain_text(r"**$1{,}234$**."), plain_text(r"-\frac{1}{2}"), plain_text(r"\text{ Paris }")
        ('1,234', '-1/2', 'Paris')
    """
    text = strip_marks(text)
    text = _NARROW.sub(",", text.replace("{,}", ","))
    for command in (r"\left", r"\right", r"\displaystyle", r"\!"):
        text = re.sub(re.escape(command) + r"(?![A-Za-z])", "", text)
    text = text.replace(r"\%", "%").replace(r"\$", "$").replace(r"\#", "#")
    text = re.sub(r"\\(?:,|;|:|quad|qquad|\s)|[~\u2009]", " ", text)
    text = re.sub(r"\\(?:times|cdot)(?![A-Za-z])", " x ", text)
    text = re.sub(r"\^\{([-+]?\w+)\}", r"^\1", text)
    text = _FRACTION.sub(_ratio, text)
    # Commands may be nested.
    while (bare := _WHOLE_BOX.sub(r"\1", _TEXT.sub(r"\1", text))) != text:
        text = bare
    text = re.sub(r"\\[dt]frac(?![A-Za-z])", r"\\frac", text).strip()
    if letter := _LETTER.fullmatch(text):
        return letter[1]
    return text.rstrip(" .").strip() if text.rstrip(" .") else text


def strip_marks(text: str) -> str:
    r"""Strips the marks around a text (emphasis, code, ``$``) and its full stop, with ASCII's minus.

    Example:
        >>> strip_marks(r"**\(\frac{1}{2}\)**.")
        '\\frac{1}{2}'
    """
    text = plain_signs(text).strip()
    before = None
    while text != before:  # each may be within another
        before = text
        text = _without_pair(text.rstrip(" .,;:\u2009").strip())
    return text


def plain_signs(text: str) -> str:
    r"""Writes minus signs, blanks and other signs of numbers as ASCII does, without changing anything else.

    Example:
        >>> plain_signs("x is \u22125")
        'x is -5'
    """
    return text.translate(_CHARACTERS)


def until_closing_brace(text: str, start: int = 0) -> str:
    r"""Returns the text before the brace that closes an already open one; empty if it never closes.

    Example:
        >>> until_closing_brace(r"\frac{1}{2}} and"), until_closing_brace(r"\{1, 2} and"), until_closing_brace("{1}")
        ('\\frac{1}{2}', '\\{1, 2', '')
    """
    depth = 1
    for brace in _BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)
        if depth == 0:
            return text[start : brace.start()]
    return ""


def take_unit(text: str) -> tuple[str, str]:
    """Splits a number's text from its currency or percent sign, which may be empty.

    Example:
        >>> take_unit("-$5"), take_unit("50 %"), take_unit("7")
        (('-5', '$'), ('50', '%'), ('7', ''))
    """
    if found := _SIGN_FIRST.fullmatch(text):
        return found[1] + found[3].strip(), found[2]
    if found := _SIGN_LAST.fullmatch(text):
        return found[1], found[2]
    return text, ""


def read_number(text: str) -> Fraction | None:
    """Parses a text as an exact number; ``None`` if it is not a number.

    Example:
        >>> read_number("1,000.5"), read_number("1 1/2"), read_number("2 x 10^3"), read_number("1,00")
        (Fraction(2001, 2), Fraction(3, 2), Fraction(2000, 1), None)
    """
    text = text.strip()
    # Otherwise a hostile answer could take minutes to convert.
    if len(text) > _MAX_LENGTH:
        return None
    if _DECIMAL.fullmatch(text):
        return Fraction(Decimal(text.replace(",", "")))
    if found := _POWER.fullmatch(text):
        factor = Fraction(Decimal((found[2] or "1").replace(",", "")))
        return factor * Fraction(10) ** int(found[3]) * (-1 if found[1] == "-" else 1)
    if found := _RATIO.fullmatch(text):
        numerator, denominator = (int(part.replace(",", "")) for part in found.groups())
        return Fraction(numerator, denominator) if denominator else None
    if found := _MIXED.fullmatch(text):
        whole, numerator, denominator = (int(part) for part in found.groups()[1:])
        if 0 < numerator < denominator:
            return (whole + Fraction(numerator, denominator)) * (-1 if found[1] == "-" else 1)
    return None


def _without_pair(text: str) -> str:
    for start, end in _PAIRS:
        inner = text[len(start) : len(text) - len(end)]
        if len(text) > len(start) + len(end) and text.startswith(start) and text.endswith(end) and start not in inner:
            return inner.strip()
    return text


def _ratio(found: re.Match[str]) -> str:
    top, bottom = found["top"] or found["top_digit"], found["bottom"] or found["bottom_digit"]
    if found["whole"]:
        return f"{found['whole']} {top}/{bottom}"
    before = found.string[: found.start()][-1:]
    return f" {top}/{bottom}" if before.isalnum() or before in tuple(".,)}") else f"{top}/{bottom}"
