"""Reads patches of several files in the form that the model was trained on (V4A). Opens no file.

*** Begin Patch
*** Update File: src/app.py
*** Move to: src/main.py
@@ def main():
 context
-a line that goes
+a line that comes
*** End of File
*** Add File: notes.txt
+the first line
*** Delete File: old.txt
*** End Patch
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["create_file", "update_file", "delete_file"]
BEGIN, END = "*** Begin Patch", "*** End Patch"
HEADERS: dict[Kind, str] = {
    "create_file": "*** Add File: ",
    "update_file": "*** Update File: ",
    "delete_file": "*** Delete File: ",
}
MOVE, END_OF_FILE = "*** Move to: ", "*** End of File"
QUOTED_CHARS = 200


@dataclass(frozen=True, slots=True)
class Line:
    """A line of the patch; the first is number 1."""

    number: int
    text: str


class PatchError(Exception):
    """The patch cannot be applied. `line` is the line of the patch at fault, if it is one line."""

    def __init__(self, message: str, line: Line | None = None) -> None:
        super().__init__(
            message if line is None else f"line {line.number} of the patch, {quoted(line.text)}: {message}"
        )
        self.line = line


@dataclass(slots=True)
class FileChange:
    """What a patch does to one file."""

    kind: Kind
    path: str
    header: Line
    body: list[Line] = field(default_factory=list)  # with the mark of each line
    move_to: str | None = None
    move_line: Line | None = None

    @property
    def diff(self) -> str:
        return "\n".join(line.text for line in self.body)


def quoted(text: str) -> str:
    """Returns the text as a message quotes it."""
    text = text.rstrip("\r")
    return repr(text if len(text) <= QUOTED_CHARS else text[:QUOTED_CHARS] + "...")


def parse(text: str) -> list[FileChange]:
    """Returns the changes in their order, at least one. Raises PatchError."""
    before = len(text) - len(text.lstrip())
    first = text.count("\n", 0, before) + 1
    lines = [Line(number, line) for number, line in enumerate(text.strip().split("\n"), first)]
    if lines[0].text.rstrip() != BEGIN:
        raise PatchError(f"a patch begins with {BEGIN!r}", lines[0])
    if lines[-1].text != END:
        raise PatchError(f"a patch ends with {END!r}", lines[-1])
    changes: list[FileChange] = []
    for line in lines[1:-1]:
        change = _header(line)
        if change is not None:
            changes.append(change)
        elif not changes:
            raise PatchError("a header such as '*** Update File: path' has to come first", line)
        else:
            _add(changes[-1], line)
    if not changes:
        raise PatchError("the patch changes no file")
    return changes


def _header(line: Line) -> FileChange | None:
    for kind, prefix in HEADERS.items():
        if line.text.startswith(prefix.rstrip()):
            path = line.text.removeprefix(prefix.rstrip()).strip()
            if not path:
                raise PatchError("the path is missing", line)
            return FileChange(kind, path, line)
    return None


def _add(change: FileChange, line: Line) -> None:
    """Adds a line to the change of its file. Raises PatchError if it is none of such a change."""
    if line.text.startswith(MOVE):
        _move(change, line)
    elif change.kind == "delete_file":
        raise PatchError("nothing follows the header of a file that is deleted", line)
    elif change.kind == "create_file":
        if not line.text.startswith("+"):
            raise PatchError("every line of a new file begins with '+'", line)
        change.body.append(line)
    elif line.text.startswith(("+", "-", " ", "@@")) or line.text.rstrip("\r") in ("", END_OF_FILE):
        change.body.append(line)
    else:
        raise PatchError("a line of a change begins with '+', '-', ' ' or '@@'", line)


def _move(change: FileChange, line: Line) -> None:
    target = line.text[len(MOVE) :].strip()
    if change.kind != "update_file" or change.body or change.move_to is not None:
        raise PatchError("a file is moved once, right after its header '*** Update File'", line)
    if not target:
        raise PatchError("the path is missing", line)
    change.move_to, change.move_line = target, line
