"""Converts bounds of numbers to ones that the grammar compiler supports.

It stores them as float64 and int64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

INT64_MAX = 2**63 - 1
LOWEST = -(2**63 - 1024)  # the lowest float64 above the lowest int64, which the compiler refuses
EXACT = 2**53  # above it not every integer is a float64
LARGEST = 10.0**18  # bound of numbers with a fraction
FLOAT_LIMIT = 1e300  # a bound beyond it only means that the number is a float64
SMALLEST = 1e-15


@dataclass(slots=True)
class Bounds:
    keywords: dict[str, Any] = field(default_factory=dict)
    relaxed: list[str] = field(default_factory=list)


def bounds(schema: Mapping[str, Any], *, integer: bool, strict: bool) -> Bounds:
    """The keywords for the compiler of minimum, maximum and their exclusive forms.

    A bound that it does not support is relaxed, or in strict mode made narrower.
    """
    out = Bounds()
    low, high = dict(schema), dict(schema)
    for side, plain, exclusive in ((low, "minimum", "exclusiveMinimum"), (high, "maximum", "exclusiveMaximum")):
        if side.get(exclusive) is True and plain in side:  # draft 4
            side[exclusive] = side.pop(plain)
        for keyword in (plain, exclusive):
            bound = side.get(keyword)
            if bound is not None and not isinstance(bound, bool):
                (_integer if integer else _number)(out, keyword, bound, strict)
    return out


def _integer(out: Bounds, keyword: str, bound: float, strict: bool) -> None:
    upper = keyword.endswith("aximum")
    if math.isinf(bound):
        whole = (INT64_MAX if upper else LOWEST) * 2
    else:
        whole = math.floor(bound) if upper else math.ceil(bound)
        if keyword.startswith("exclusive") and whole == bound:
            whole += -1 if upper else 1
    if upper and whole > INT64_MAX or not upper and whole < -(2**63):
        if not strict:
            if abs(whole) < FLOAT_LIMIT:
                out.relaxed.append(keyword)
            return
        whole = INT64_MAX if upper else LOWEST
    if upper and whole < LOWEST or not upper and whole > INT64_MAX - 1024:
        out.relaxed.append(keyword)
        return
    plain = "maximum" if upper else "minimum"
    if whole != INT64_MAX:
        whole = max(whole, LOWEST)
        if abs(whole) > EXACT:
            whole = _inside(whole, upper)
    known = out.keywords.get(plain)
    out.keywords[plain] = whole if known is None else (min if upper else max)(known, whole)


def _inside(whole: int, upper: bool) -> int:
    """The nearest integer that is a float64 and inside the bound."""
    rounded = float(whole)
    if upper and rounded > whole:
        rounded = math.nextafter(rounded, -math.inf)
    if not upper and rounded < whole:
        rounded = math.nextafter(rounded, math.inf)
    return int(rounded)


def _number(out: Bounds, keyword: str, bound: float, strict: bool) -> None:
    upper = keyword.endswith("aximum")
    if abs(bound) > LARGEST:
        if (bound > 0) != upper:  # nothing that can be written is inside
            out.relaxed.append(keyword)
        elif strict and abs(bound) < FLOAT_LIMIT:
            out.keywords[keyword] = LARGEST if upper else -LARGEST
        elif abs(bound) < FLOAT_LIMIT:
            out.relaxed.append(keyword)
    elif 0 < abs(bound) < SMALLEST:
        if (bound > 0) != upper:  # away from zero: what is beyond zero is beyond the bound, or too near to tell
            out.keywords["exclusiveMaximum" if upper else "exclusiveMinimum"] = 0
        else:
            out.keywords[keyword] = 0
    else:
        out.keywords[keyword] = bound
