"""Applies a patch to the files below a folder: all of it, or nothing.

Everything is read and computed first. New contents are written next to the files and flushed; only then are names
exchanged, each exchange by one system call that can be undone. Where one fails, those before it are undone.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from gptoss.tools.apply_patch.hunks import Edited, apply_hunks, read_hunks
from gptoss.tools.apply_patch.parser import FileChange, Line, PatchError, parse
from gptoss.tools.apply_patch.root import (
    Entry,
    Found,
    PathError,
    Root,
    exists,
    is_unchanged,
    link,
    opened_root,
    parts_of,
    read,
    remove,
    rename,
    write_beside,
)

Letter = Literal["A", "M", "D", "R"]


@dataclass(frozen=True, slots=True)
class Changed:
    """What became of one file: added, modified, deleted or renamed, with the lines that came and went."""

    letter: Letter
    path: str
    moved_to: str | None
    added: int
    removed: int


@dataclass(slots=True)
class _Work:
    """One file's change, computed and not yet made."""

    change: FileChange
    result: Changed
    source: Entry | None = None
    found: Found | None = None
    target: Entry | None = None
    content: bytes = b""
    written: Entry | None = None


@dataclass(slots=True)
class _Undo:
    """How to take back what was done, last first, and what to remove when all is done."""

    steps: list[tuple[str, Callable[[], None]]] = field(default_factory=list)  # with the path
    saved: list[Entry] = field(default_factory=list)


def apply_patch(patch: str, root: Path, *, dry_run: bool = False) -> list[Changed]:
    """Applies the patch below `root` and returns what it changed.

    Raises PatchError, and then nothing has changed.
    """
    try:
        patch.encode()
    except UnicodeEncodeError:
        raise PatchError("the patch has half of a surrogate pair, which no file can hold") from None
    changes = parse(patch)
    _refuse_repeated_paths(changes)
    try:
        with opened_root(root) as opened:
            works = [_compute(change, opened, dry_run) for change in changes]
            if not dry_run:
                _make(works)
            return [work.result for work in works]
    except PathError as error:
        raise PatchError(str(error)) from None


def _refuse_repeated_paths(changes: list[FileChange]) -> None:
    seen: dict[tuple[str, ...], Line] = {}
    for change in changes:
        named = [(change.path, change.header)]
        if change.move_to is not None and change.move_line is not None:
            named.append((change.move_to, change.move_line))
        for path, line in named:
            try:
                parts = parts_of(path)
            except PathError as error:
                raise PatchError(str(error), line) from None
            if parts in seen:
                raise PatchError(f"line {seen[parts].number} changes this file already", line)
            seen[parts] = line


def _compute(change: FileChange, root: Root, dry_run: bool) -> _Work:
    """Reads the file and computes its new content. Raises PatchError that quotes the header."""
    line = change.header
    try:
        if change.kind == "create_file":
            return _creation(change, root, dry_run)
        source = root.entry(change.path)
        found = read(source)
        if change.kind == "delete_file":
            removed = found.content.count(b"\n") + (not found.content.endswith(b"\n") and bool(found.content))
            return _Work(change, Changed("D", change.path, None, 0, removed), source, found)
        edited = _edited(change, found)
        target: Entry | None = source
        if change.move_to is not None and change.move_line is not None:
            line = change.move_line
            target = _new_entry(change.move_to, root, dry_run)
        letter: Letter = "M" if change.move_to is None else "R"
        result = Changed(letter, change.path, change.move_to, edited.added, edited.removed)
        return _Work(change, result, source, found, target, edited.text.encode())
    except PathError as error:
        raise PatchError(str(error), line) from None
    except OSError as error:
        raise PatchError(error.strerror or str(error), line) from None


def _creation(change: FileChange, root: Root, dry_run: bool) -> _Work:
    content = "".join(line.text[1:].rstrip("\r") + "\n" for line in change.body).encode()
    result = Changed("A", change.path, None, len(change.body), 0)
    return _Work(change, result, target=_new_entry(change.path, root, dry_run), content=content)


def _new_entry(path: str, root: Root, dry_run: bool) -> Entry | None:
    """A name that nothing has; its folders are made. Raises PathError."""
    if dry_run and not _has_folder(root, path):
        return None
    entry = root.entry(path, make_folders=not dry_run)
    if exists(entry):
        raise PathError("the file exists already")
    return entry


def _has_folder(root: Root, path: str) -> bool:
    """False where a folder on the way is still to be made. Raises PathError for one that cannot be."""
    parts = parts_of(path)
    for count in range(1, len(parts)):
        within = root.entry("/".join(parts[:count]))
        if not exists(within):
            return False
        root.entry("/".join([*parts[:count], "x"]))  # opens it
    return True


def _edited(change: FileChange, found: Found) -> Edited:
    try:
        text = found.content.decode()
    except UnicodeDecodeError:
        raise PathError("the file is not UTF-8 text") from None
    hunks = read_hunks(change.body)
    if not hunks and change.move_to is None:
        raise PatchError("nothing of the file changes", change.header)
    return apply_hunks(text, hunks, change.path)


def _make(works: list[_Work]) -> None:
    """Writes all contents, then exchanges names. Raises PatchError after undoing what was done."""
    undo = _Undo()
    current = works[0]
    try:
        for current in works:
            if current.target is not None:
                like = current.found.status if current.found else None
                current.written = write_beside(current.target, current.content, like)
        for current in works:
            _exchange(current, undo)
    except BaseException as error:
        problems = _take_back(undo)
        _remove_written(works)
        reason = (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
        if problems:
            raise PatchError(f"{reason}; and not everything could be undone: {'; '.join(problems)}") from error
        if isinstance(error, OSError | PathError):
            raise PatchError(f"{reason}; nothing was changed", current.change.header) from None
        raise
    _remove_written(works)
    for saved in undo.saved:
        with contextlib.suppress(OSError):
            remove(saved)


def _exchange(work: _Work, undo: _Undo) -> None:
    """Gives the new content its name, and takes the old one's away."""
    if work.source is not None and work.found is not None:
        if not is_unchanged(work.source, work.found):
            raise PathError("the file was changed by another program meanwhile")
        _save(work.source, undo)
    if work.written is not None and work.target is not None:
        if work.target is work.source:
            rename(work.written, work.target)
        else:
            _put_new(work.written, work.target, undo)
    if work.source is not None and work.target is not work.source:
        remove(work.source)


def _save(entry: Entry, undo: _Undo) -> None:
    """Keeps the file under a second name, from which it can be put back."""
    saved = Entry(entry.folder, f".{secrets.token_hex(8)}.orig", entry.path)
    try:
        link(entry, saved)
    except OSError:  # a file system without hard links
        rename(entry, saved)
    undo.steps.append((entry.path, lambda: _put_back(saved, entry)))
    undo.saved.append(saved)


def _put_back(saved: Entry, entry: Entry) -> None:
    rename(saved, entry)
    remove(saved)  # rename leaves two names of one file as they are


def _put_new(written: Entry, target: Entry, undo: _Undo) -> None:
    """Gives a file its name, never in place of another one."""
    try:
        link(written, target)
    except FileExistsError:
        raise PathError("the file exists already") from None
    except OSError:  # a file system without hard links
        os.close(os.open(target.name, os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, dir_fd=target.folder))
        rename(written, target)
    undo.steps.append((target.path, lambda: remove(target)))


def _take_back(undo: _Undo) -> list[str]:
    """Undoes all steps, last first. Returns what could not be undone."""
    problems = []
    for path, step in reversed(undo.steps):
        try:
            step()
        except OSError as error:
            problems.append(f"{path}: {error.strerror}")
    return problems


def _remove_written(works: list[_Work]) -> None:
    for work in works:
        if work.written is not None:
            with contextlib.suppress(OSError):
                remove(work.written)
