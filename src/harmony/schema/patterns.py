"""Translates regular expressions of JSON Schema to those of the grammar compiler.

The former are ECMA-262's, the latter those of Rust's regex crate.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

_QUANTIFIER = re.compile(r"\{\d+(,\d*)?\}")
_HEX = re.compile(r"[0-9A-Fa-f]+")
_GROUP = re.compile(r"\?(:|<[A-Za-z_]\w*>|P<[A-Za-z_]\w*>|[ims]+(-[ims]+)?[:)]|-[ims]+[:)])")
_LOOKAROUND = re.compile(r"\(\?(=|!|<=|<!)")
_META = frozenset(r"\.+*?()|[]{}^$#&-~")
_ANY = r"[^\n\r\x{2028}\x{2029}]"

# 29 February only in leap years; no year 0, no second 60.
_YEAR = r"(?:000[1-9]|00[1-9][0-9]|0[1-9][0-9]{2}|[1-9][0-9]{3})"
_LEAP_YEAR = r"(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"
_DAY = (
    r"(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    r"|02-(?:0[1-9]|1[0-9]|2[0-8]))"
)
_DATE = rf"(?:{_YEAR}-{_DAY}|{_LEAP_YEAR}-02-29)"
_HOUR = r"(?:[01][0-9]|2[0-3])"
_TIME = rf"{_HOUR}:[0-5][0-9]:[0-5][0-9](?:\.[0-9]{{1,9}})?(?:Z|[+-]{_HOUR}:[0-5][0-9])"
NARROWED_FORMATS = {"date": f"^{_DATE}$", "time": f"^{_TIME}$", "date-time": f"^{_DATE}T{_TIME}$"}
# formats that the grammar compiler supports; any other is an annotation, as in JSON Schema 2020-12
KNOWN_FORMATS = frozenset({"duration", "email", "hostname", "ipv4", "ipv6", "uri", "uuid"})


class PatternError(ValueError):
    """A pattern that cannot be translated."""


@dataclass(slots=True)
class Translated:
    patterns: list[str] = field(default_factory=list)  # a string matches when all of these do
    exact: bool = True  # False: they match more than the original


def translate(pattern: str) -> Translated:
    """Translates a pattern. Raises PatternError.

    Lookahead at the beginning becomes a separate pattern; other assertions are left out.
    """
    reader = _Reader(pattern)
    reader.read()
    return Translated([*reader.ahead, "".join(reader.out)], reader.exact)


class _Reader:
    def __init__(self, pattern: str) -> None:
        self._text, self._at = pattern, 0
        self.out: list[str] = []
        self.ahead: list[str] = []
        self.exact = True
        self._splits = _has_alternatives(pattern)

    def read(self) -> None:
        while self._at < len(self._text):
            self._next()

    def _next(self) -> None:
        char = self._text[self._at]
        if char == "\\":
            self._escape()
        elif char == "[":
            self._class()
        elif char == "(":
            self._group()
        elif char == "{" and (found := _QUANTIFIER.match(self._text, self._at)):
            self._put(found[0], len(found[0]))
        elif char == "{" and self._text.startswith("{,", self._at):
            raise PatternError("'{,' has two meanings")
        else:
            self._put(_ANY if char == "." else "\\" + char if char in "{}]#&~" else char, 1)

    def _put(self, text: str, length: int) -> None:
        self.out.append(text)
        self._at += length

    def _escape(self) -> None:
        char = self._text[self._at + 1 : self._at + 2]
        if char in ("b", "B"):
            self._leave_out(2)
        elif char == "A" and not self.out:
            self._put("^", 2)
        elif char in ("z", "Z") and self._at + 2 == len(self._text):
            self._put("$", 2)
        else:
            self._put(*self._escaped_char())

    def _escaped_char(self) -> tuple[str, int]:
        """Returns (the escape at this position in Rust's syntax, its length)."""
        text, at = self._text, self._at
        char = text[at + 1 : at + 2]
        if char in ("d", "D", "w", "W", "s", "S", "n", "r", "t", "f", "v"):
            return f"\\{char}", 2
        if char in ("p", "P"):
            end = text.find("}", at)
            if text[at + 2 : at + 3] != "{" or end < 0:
                raise PatternError("a property of characters needs braces")
            return text[at : end + 1], end + 1 - at
        if char == "0" and not text[at + 2 : at + 3].isdigit():
            return r"\x00", 2
        if char == "c" and text[at + 2 : at + 3].isascii() and text[at + 2 : at + 3].isalpha():
            return f"\\x{ord(text[at + 2]) % 32:02x}", 3
        if char == "x":
            return f"\\x{self._hex(at + 2, 2):02x}", 4
        if char == "u":
            return self._unicode(at)
        if char and char.isascii() and not char.isalnum():
            return ("\\" + char if char in _META else char), 2
        raise PatternError(f"'\\{char}' is not supported")

    def _unicode(self, at: int) -> tuple[str, int]:
        if self._text[at + 2 : at + 3] == "{":
            end = self._text.find("}", at)
            code, length = self._hex(at + 3, max(0, end - at - 3)), end + 1 - at
        else:
            code, length = self._hex(at + 2, 4), 6
            if 0xD800 <= code < 0xDC00 and self._text.startswith("\\u", at + 6):
                low = self._hex(at + 8, 4)
                code, length = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00), 12
        if 0xD800 <= code < 0xE000 or code > 0x10FFFF:
            raise PatternError("half of a surrogate pair is not a character")
        return f"\\x{{{code:x}}}", length

    def _hex(self, start: int, length: int) -> int:
        digits = self._text[start : start + length]
        if len(digits) != length or not _HEX.fullmatch(digits):
            raise PatternError("an escape lacks its hexadecimal digits")
        return int(digits, 16)

    def _class(self) -> None:
        """Translates a class.

        In Rust `[`, `&&`, `--` and `~~` are operators in classes; here they are characters.
        """
        text = self._text
        begin, self._at = self._at, self._at + 1
        negated = text.startswith("^", self._at)
        self._at += negated
        if text.startswith("]", self._at):
            if not negated:
                raise PatternError("'[]' matches nothing")
            self._put(r"[\s\S]", 1)
            return
        members: list[str] = []
        while not text.startswith("]", self._at):
            first, single = self._member()
            if single and text.startswith("-", self._at) and not text.startswith("-]", self._at):
                self._at += 1
                last, single = self._member()
                members.append(f"{first}-{last}" if single else f"{first}\\-{last}")
            else:
                members.append(first)
            if self._at >= len(text):
                raise PatternError(f"'[' at {begin} is not closed")
        self._put(f"[{'^' * negated}{''.join(members)}]", 1)

    def _member(self) -> tuple[str, bool]:
        """Returns (one member of a class, whether it is a single character)."""
        text = self._text
        if self._at >= len(text):
            raise PatternError("a class is not closed")
        char = text[self._at]
        if char != "\\":
            self._at += 1
            return ("\\" + char if char in "[&-~^" else char), True
        if text.startswith("\\b", self._at):
            self._at += 2
            return r"\x08", True
        member, length = self._escaped_char()
        self._at += length
        return member, member[:2] not in (r"\d", r"\D", r"\w", r"\W", r"\s", r"\S", r"\p", r"\P")

    def _group(self) -> None:
        around = _LOOKAROUND.match(self._text, self._at)
        if around is not None:
            end = _end_of_group(self._text, self._at)
            inner = self._text[around.end() : end]
            if around[1] == "=" and "".join(self.out) in ("", "^") and not self._splits:
                ahead = translate(inner)
                if self.out or self._text.startswith("(?=.*") or self._text.startswith(r"(?=[\s\S]*"):
                    self.ahead += [f"^(?:{p})" for p in ahead.patterns]
                    self.exact = self.exact and ahead.exact
                    self._at = end + 1
                    return
            self._leave_out(end + 1 - self._at)
        elif self._text.startswith("(?", self._at):
            named = _GROUP.match(self._text, self._at + 1)
            if named is None:
                raise PatternError("this kind of group is not supported")
            self._put("(" + named[0], 1 + len(named[0]))
        else:
            self._put("(", 1)

    def _leave_out(self, length: int) -> None:
        self.exact = False
        self._at += length
        if self._text[self._at : self._at + 1] in ("*", "+", "?", "{") and self._at < len(self._text):
            raise PatternError("a repeated assertion is not supported")


MAX_EXCLUDED = 1000  # total length of names


def any_name_but(names: Iterable[str]) -> str | None:
    """A pattern for all names except these; None if they are too long."""
    excluded = sorted(set(names))
    return None if sum(map(len, excluded)) > MAX_EXCLUDED else f"^{_rest_but(excluded)}$"


def _rest_but(rests: list[str]) -> str:
    tails: dict[str, list[str]] = {}
    for rest in rests:
        if rest:
            tails.setdefault(rest[0], []).append(rest[1:])
    heads = "".join(map(_code, tails))
    choices = [rf"[^{heads}][\s\S]*" if heads else r"[\s\S]+"]
    choices += [_code(head) + _rest_but(tail) for head, tail in tails.items()]
    return f"(?:{'|'.join(choices)}){'' if '' in rests else '?'}"


def _code(char: str) -> str:
    return f"\\x{{{ord(char):x}}}"


def _outside_classes(pattern: str, start: int = 0) -> Iterator[tuple[int, str]]:
    """Yields position and character of what is neither escaped nor in a class."""
    at = start
    while at < len(pattern):
        char = pattern[at]
        if char == "\\":
            at += 1
        elif char == "[":
            at = _end_of_class(pattern, at)
        else:
            yield at, char
        at += 1


def _has_alternatives(pattern: str) -> bool:
    """Whether a `|` is outside all groups and classes."""
    depth = 0
    for _, char in _outside_classes(pattern):
        depth += (char == "(") - (char == ")")
        if char == "|" and depth == 0:
            return True
    return False


def _end_of_class(pattern: str, at: int) -> int:
    at += 2 if pattern.startswith("[^", at) else 1
    while at < len(pattern) and pattern[at] != "]":
        at += 2 if pattern[at] == "\\" else 1
    return at


def _end_of_group(pattern: str, start: int) -> int:
    """The position of the `)` that closes the group at `start`. Raises PatternError without one."""
    depth = 0
    for at, char in _outside_classes(pattern, start):
        depth += (char == "(") - (char == ")")
        if char == ")" and depth == 0:
            return at
    raise PatternError("a group is not closed")
