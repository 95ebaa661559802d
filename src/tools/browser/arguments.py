"""The model's calls: search, open and find, read as leniently as their meaning allows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gptoss.tools.browser.errors import BrowserError

MAX_QUERY = 2_000  # characters of a query or pattern
MAX_URL = 2_048


@dataclass(frozen=True, slots=True)
class Search:
    query: str
    num_results: int | None


@dataclass(frozen=True, slots=True)
class Open:
    target: int | str | None  # a link's id, a URL, or the page itself
    cursor: int | None
    line: int | None
    num_lines: int | None
    shows_source: bool


@dataclass(frozen=True, slots=True)
class Find:
    pattern: str
    cursor: int | None


def read_call(function: str, text: str) -> Search | Open | Find:
    """A call of one of the browser's functions. Raises BrowserError; unknown arguments are ignored."""
    given = _object(text)
    match function:
        case "search":
            return Search(_text(given, "query"), _number(given, "topn") or _number(given, "top_n"))
        case "open":
            return Open(
                _target(given),
                _number(given, "cursor"),
                _number(given, "loc"),
                _number(given, "num_lines"),
                given.get("view_source") in (True, "true", "True"),
            )
        case "find":
            return Find(_text(given, "pattern"), _number(given, "cursor"))
    raise BrowserError("invalid", f"There is no function {function!r}: use search, open or find.")


def _object(text: str) -> Mapping[str, Any]:
    try:
        given = json.loads(text) if text.strip() else {}
    except (ValueError, RecursionError):
        raise BrowserError("invalid", "The arguments are not valid JSON.") from None
    if not isinstance(given, dict):
        raise BrowserError("invalid", "The arguments are not a JSON object.")
    return given


def _text(given: Mapping[str, Any], name: str) -> str:
    value = given.get(name)
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise BrowserError("invalid", f"`{name}` is missing.")
    return value[:MAX_QUERY]


def _number(given: Mapping[str, Any], name: str) -> int | None:
    """A number of 0 or more; None if it is missing, or negative: the default."""
    value = _integer(given.get(name), name)
    return value if value is not None and value >= 0 else None


def _integer(value: Any, name: str) -> int | None:
    if value is None or value == "":
        return None
    try:
        if isinstance(value, bool):
            raise ValueError
        number = int(value) if isinstance(value, int | str) else float(value)
        if number != int(number) or abs(number) > 1e9:
            raise ValueError
        return int(number)
    except (TypeError, ValueError, OverflowError):
        raise BrowserError("invalid", f"`{name}` is not an integer.") from None


def _target(given: Mapping[str, Any]) -> int | str | None:
    value = given.get("id", given.get("url"))
    if isinstance(value, str) and value.strip() and not value.strip().lstrip("-").isdecimal():
        return value.strip()[: MAX_URL + 1]
    number = _integer(value, "id")
    return number if number is not None and number >= 0 else None
