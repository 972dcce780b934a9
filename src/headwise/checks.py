"""Checks of arguments that several artifacts share: each gives the plain value or raises the caller's error class."""

import math
import operator
from collections.abc import Mapping
from typing import Any

from headwise.errors import HeadwiseError

Meta = dict[str, str | int | float | bool]
LARGEST = 2**31 - 1  # of any layer, unit, token position or window


def shown(value: Any, limit: int = 60) -> str:
    """`repr(value)` for an error text: cut to `limit` characters, never failing."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an int of thousands of digits has no text
        text = f"a huge {type(value).__name__}"
    return text if len(text) <= limit else text[:limit] + "…"


def whole(name: str, value: Any, low: int, error: type[HeadwiseError], high: int = LARGEST) -> int:
    """`value` as an int in [low, high]; otherwise `error` naming the argument."""
    try:
        number = operator.index(value)
    except TypeError:
        number = low - 1
    if isinstance(value, bool) or not low <= number <= high:
        raise error(f"{name} is {shown(value)}; it must be a whole number from {low} to {high}")
    return number


def finite(name: str, value: Any, error: type[HeadwiseError]) -> float:
    """`value` as a finite float; otherwise `error` naming the argument."""
    try:
        number = math.nan if isinstance(value, bool | str) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        number = math.nan
    if not math.isfinite(number):
        raise error(f"{name} is {shown(value)}; it must be a finite number")
    return number


def numbers(name: str, text: str, error: type[HeadwiseError], count: int) -> tuple[int, ...]:
    """Whole numbers below `count` of a text such as `2,5:8,30:`; a range leaves its end out, as in Python. Raises `error`.

    >>> numbers("layers", "1,5:8,30:", HeadwiseError, 32)
    (1, 5, 6, 7, 30, 31)
    """
    found: set[int] = set()
    for part in text.replace(" ", "").split(","):
        low, colon, high = part.partition(":")
        if not (low.isdecimal() or (colon and not low)) or not (high.isdecimal() or not high) or len(part) > 20:
            raise error(f"{name} is {shown(text)}; write whole numbers and ranges such as 2,5:8")
        end = (int(high) if high else count) if colon else int(low) + 1
        if end > count:
            raise error(f"{name} is {shown(text)}; there are 0 to {count - 1}")
        found.update(range(int(low or 0), end))
    if not found:
        raise error(f"{name} is {shown(text)}, which names none; there are 0 to {count - 1}")
    return tuple(sorted(found))


def plain_meta(meta: Mapping[str, Any], error: type[HeadwiseError]) -> Meta:
    """A copy of `meta`, if it maps text to text, finite numbers and bools; otherwise `error`."""
    for key, value in meta.items():
        if not isinstance(key, str) or not isinstance(value, str | int | float | bool):
            raise error(f"meta has {shown(key)}: {type(value).__name__}; keys are text, values text, numbers or bools")
        if isinstance(value, int | float) and not abs(value) <= 2.0**63:
            raise error(f"meta has {key!r} = {shown(value)}; numbers must be finite and within 64 bits")
    return dict(meta)
