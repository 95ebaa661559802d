"""Values that are told apart by one part of them: two days of a month, two files of one ending, two people of one
family.

A model that copies by what stood before a token, and not by where it is, gives both parameters the same of such two.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from training.nano.examples import Source
from training.nano.values import value

_DATE = re.compile(r"(\d{4})-(\d\d)-(\d\d)")
_NAMED_DAY = re.compile(r"([A-Z][a-z]+) (\d\d?)(.*)")
_TIME = re.compile(r"(\d\d?)(.*)")
_NUMBERS = ("integer", "code")  # of any size; an hour or a year is not
_FILE = re.compile(r"(.*?)([^/]+)(\.[a-z0-9]+)")


def alike(s: Source, kind: str, other: Any) -> Any:
    """Another value of this kind, that has a part of `other` where it has parts."""
    for _ in range(4):
        made = _of(s, kind, other)
        if made != other:
            return made
    return value(s, kind)


def _of(s: Source, kind: str, other: Any) -> Any:
    if isinstance(other, str) and kind in _ALIKE:
        made = _ALIKE[kind](s, other)
        return value(s, kind) if made is None else made
    if kind in _NUMBERS and isinstance(other, int) and other > 9:
        digits = str(other)
        return s.rng.choice(
            (
                other + s.number(1, 9) * s.rng.choice((1, 10)),
                int(digits[:-1] + str(s.number(0, 9))),
                int(str(s.number(1, 9)) + digits[1:]),
            )
        )
    return value(s, kind)


def _date(s: Source, other: str) -> str | None:
    if found := _DATE.fullmatch(other):
        year, month, _ = found.groups()
        return s.pick(
            f"{year}-{month}-{s.number(1, 28):02}", f"{year}-{month}-{s.number(1, 28):02}", f"{year}-{s.number(1, 12):02}-{s.number(1, 28):02}",
        )  # fmt: skip
    if found := _NAMED_DAY.fullmatch(other):
        return f"{found[1]} {s.number(1, 28)}{found[3]}"
    return None


def _time(s: Source, other: str) -> str | None:
    found = _TIME.fullmatch(other)
    return found and f"{s.number(1, 12)}{found[2]}"


def _file(s: Source, other: str) -> str | None:
    found = _FILE.fullmatch(other)
    if found is None:
        return None
    folder, stem, ending = found.groups()
    return s.pick(
        f"{folder}{s.word()}{ending}", f"{folder}{s.word()}{ending}", f"{folder}{stem}_{s.word()}{ending}", f"{folder}{stem}{s.number(1, 9)}{ending}",
        f"{folder}{stem}{s.pick('.txt', '.csv', '.json', '.md', '.bak')}", f"{s.word()}/{stem}{ending}",
    )  # fmt: skip


def _path(s: Source, other: str) -> str | None:
    folder, slash, _ = other.rpartition("/")
    return _file(s, other) or (f"{folder}/{s.word()}" if slash else None)


def _email(s: Source, other: str) -> str | None:
    who, _, host = other.partition("@")
    return s.pick(f"{s.word()}@{host}", f"{who}@{s.word()}.com")


def _words(s: Source, other: str) -> str | None:
    words = other.split()
    if len(words) < 2:
        return None
    words[s.number(0, len(words) - 1)] = s.name() if words[0][:1].isupper() else s.word()
    return " ".join(words)


def _slug(s: Source, other: str) -> str | None:
    parts = re.split("([-_/.])", other)
    if len(parts) < 3:
        return None
    at = s.rng.randrange(0, len(parts), 2)
    parts[at] = str(s.number(1, 99)) if parts[at].isdigit() else s.word()
    return "".join(parts)


def _code(s: Source, other: str) -> str:
    return re.sub(r"\d+$", str(s.number(1, 9999)), other)


_ALIKE: dict[str, Callable[[Source, str], str | None]] = {
    "date": _date, "day_or_date": _date, "time": _time, "hour": _time, "file": _file, "image": _file, "audio": _file, "path": _path, "email": _email,
    "person_or_email": _words, "person": _words, "name": _words, "city": _words, "place": _words, "title": _words, "phrase": _words,
    "short_phrase": _words, "item": _words, "slug": _slug, "version": _slug, "code": _code, "coupon": _code, "account": _words,
}  # fmt: skip
