"""Applies the hunks of one file to its text.

A hunk has no line numbers: it applies where the file has its context and removed lines, at or after the end of the
previous hunk. `@@ text` moves the search past that line. Lines are compared exactly first, then without trailing
whitespace, without surrounding whitespace, and with typographic punctuation as ASCII. Context keeps the file's text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from gptoss.tools.apply_patch.parser import END_OF_FILE, Line, PatchError, quoted

_UNIFIED = re.compile(r"@@ -\d+(,\d+)? \+\d+(,\d+)? @@")  # a header of `diff -u`, whose numbers are not used
_BOM = "\ufeff"
_ASCII = str.maketrans(
    dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2212", "-")
    | dict.fromkeys("\u2018\u2019\u201a\u201b", "'")
    | dict.fromkeys("\u201c\u201d\u201e\u201f", '"')
    | dict.fromkeys("\u00a0\u2002\u2003\u2007\u2009\u202f\u3000", " ")
)
_FORMS: tuple[Callable[[str], str], ...] = (
    lambda line: line,
    str.rstrip,
    str.strip,
    lambda line: line.strip().translate(_ASCII),
)


@dataclass(slots=True)
class Hunk:
    """One place of a file that changes."""

    scopes: list[Line] = field(default_factory=list)  # `@@ text`
    lines: list[Line] = field(default_factory=list)  # with their marks
    at_end: bool = False

    @property
    def old(self) -> list[Line]:
        """The lines that the file must have, without their marks."""
        return [Line(line.number, line.text[1:]) for line in self.lines if line.text[0] != "+"]


@dataclass(frozen=True, slots=True)
class Edited:
    """The text after the change, and how many lines came and went."""

    text: str
    added: int
    removed: int


def read_hunks(body: Sequence[Line]) -> list[Hunk]:
    """Returns the hunks of a file's change."""
    hunks: list[Hunk] = []
    for given in body:
        line = Line(given.number, given.text.rstrip("\r") or " ")  # models write an empty context line without its mark
        if line.text.startswith("@@"):
            if not hunks or hunks[-1].lines:
                hunks.append(Hunk())
            hunks[-1].scopes.append(line)
            continue
        if not hunks or hunks[-1].at_end:
            hunks.append(Hunk())
        if line.text == END_OF_FILE:
            hunks[-1].at_end = True
        else:
            hunks[-1].lines.append(line)
    return [hunk for hunk in hunks if hunk.lines or hunk.scopes]


def apply_hunks(text: str, hunks: Sequence[Hunk], path: str) -> Edited:
    """Returns the file's text after the hunks. Raises PatchError where one does not fit."""
    bom = _BOM if text.startswith(_BOM) else ""
    lines = text.removeprefix(_BOM).split("\n")
    ends_with_newline = lines[-1] == ""
    if ends_with_newline:
        lines.pop()
    ending = "\r" if 2 * sum(line.endswith("\r") for line in lines) > len(lines) else ""
    position = added = removed = 0
    for hunk in hunks:
        start, old = _place(lines, hunk, position, path)
        new = _replacement(lines, start, hunk, len(old), ending)
        lines[start : start + len(old)] = new
        position = start + len(new)
        added += sum(line.text[0] == "+" for line in hunk.lines)
        removed += sum(line.text[0] == "-" for line in hunk.lines)
        if position == len(lines) and hunk.lines and hunk.lines[-1].text[0] == "+":
            ends_with_newline = True
    return Edited(bom + "\n".join(lines) + ("\n" if ends_with_newline and lines else ""), added, removed)


def _replacement(lines: list[str], start: int, hunk: Hunk, count: int, ending: str) -> list[str]:
    """The file's lines after the hunk, of which `count` old ones begin at `start`."""
    new: list[str] = []
    at = start
    for line in hunk.lines:
        if line.text[0] == "+":
            new.append(line.text[1:] + ending)
        elif at < start + count:  # an empty line at the hunk's end may be absent: see _place
            if line.text[0] == " ":
                new.append(lines[at])
            at += 1
    return new


def _place(lines: list[str], hunk: Hunk, position: int, path: str) -> tuple[int, list[Line]]:
    """Where the hunk's old lines begin, and these."""
    position = _after_scopes(lines, hunk, position, path)
    old = hunk.old
    if not hunk.lines:
        raise PatchError("no change follows", hunk.scopes[-1])
    if not old:
        has_scope = any(_scope(line) for line in hunk.scopes) and not hunk.at_end
        return (position if has_scope else len(lines)), old
    found = _seek(lines, old, position, hunk.at_end)
    if found is None and not hunk.lines[-1].text.strip() and len(old) > 1:
        old = old[:-1]  # the empty line that separates two changes of a patch
        found = _seek(lines, old, position, hunk.at_end)
    if found is None:
        raise _misfit(lines, hunk, position, path)
    return found, old


def _scope(line: Line) -> str:
    """The line of the file that `@@ text` names; empty if it names none."""
    return _UNIFIED.sub("", line.text).removeprefix("@@").strip()


def _after_scopes(lines: list[str], hunk: Hunk, position: int, path: str) -> int:
    for line in hunk.scopes:
        scope = _scope(line)
        if not scope:
            continue
        found = _seek(lines, [Line(line.number, scope)], position, at_end=False)
        if found is not None:
            position = found + 1
        elif _seek(lines[:position], [Line(line.number, scope)], 0, at_end=False) is None:
            raise PatchError(f"{path} has no line {quoted(scope)}", line)
    return position


def _seek(lines: Sequence[str], old: Sequence[Line], start: int, at_end: bool) -> int | None:
    """The first index from `start` at which the file has the old lines."""
    last = len(lines) - len(old)
    if at_end:
        start = max(start, last)
    for form in _FORMS:
        wanted = [form(line.text) for line in old]
        for index in range(start, last + 1):
            if all(form(lines[index + k].rstrip("\r")) == want for k, want in enumerate(wanted)):
                return index
    return None


def _misfit(lines: list[str], hunk: Hunk, position: int, path: str) -> PatchError:
    """The error of a hunk that fits nowhere: its first wrong line where most of it fits."""
    old = hunk.old
    best, at = 0, None
    for index in range(position, len(lines)):
        fits = 0
        while fits < len(old) and index + fits < len(lines) and lines[index + fits].strip() == old[fits].text.strip():
            fits += 1
        if fits > best:
            best, at = fits, index + fits
    if best == len(old):
        return PatchError(f"{path} has these lines, but not at its end", hunk.lines[0])
    wrong = next(line for line in hunk.lines if line.number == old[best].number)
    if at is None:
        place = f" after its line {position}" if position else ""
        return PatchError(f"{path} has no such line{place}", wrong)
    there = f"line {at + 1} of {path} is {quoted(lines[at])}" if at < len(lines) else f"{path} ends before it"
    return PatchError(there, wrong)
