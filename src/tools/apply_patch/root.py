"""The folder below which a patch may change files, and nothing outside it.

Each folder of a path is opened relative to its parent without following symbolic links, and files are named relative to
the opened folder. A link or folder that is exchanged meanwhile cannot lead anywhere else.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # a pipe must not block
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
MAX_FILE_BYTES = 64 * 2**20
MAX_FOLDERS = 128


class PathError(Exception):
    """A path that a patch may not use, or cannot. The message names it."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A name within an opened folder."""

    folder: int
    name: str
    path: str  # below the root, for messages


@dataclass(frozen=True, slots=True)
class Found:
    """A regular file as it was read."""

    content: bytes
    status: os.stat_result


def parts_of(path: str) -> tuple[str, ...]:
    """The names of a path below the root. Raises PathError for any that leads elsewhere."""
    if path.startswith("/"):
        raise PathError("the path is absolute; paths are relative to the root")
    if "\0" in path:
        raise PathError("the path has a NUL character")
    names = tuple(name for name in path.split("/") if name not in ("", "."))
    if ".." in names:
        raise PathError("the path has '..', which is not allowed")
    if not names or path.endswith(("/", "/.")):
        raise PathError("the path names no file")
    if len(names) > MAX_FOLDERS:
        raise PathError(f"the path has more than {MAX_FOLDERS} folders")
    return names


class Root:
    """An opened root. Folders that it opened stay open until it is closed."""

    def __init__(self, path: Path) -> None:
        self._folders: dict[tuple[str, ...], int] = {}
        self._made: list[tuple[int, str]] = []
        try:
            self._folders[()] = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise PathError(f"the root {str(path)!r} cannot be opened: {error.strerror}") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for folder in self._folders.values():
            os.close(folder)
        self._folders.clear()

    def entry(self, path: str, *, make_folders: bool = False) -> Entry:
        """The file's name in its folder, which is made where `make_folders` says so. Raises PathError."""
        *folders, name = parts_of(path)
        return Entry(self._folder(tuple(folders), make_folders), name, path)

    def remove_made_folders(self) -> None:
        """Removes the folders that `entry` made, as far as they are empty."""
        for folder, name in reversed(self._made):
            with contextlib.suppress(OSError):
                os.rmdir(name, dir_fd=folder)
        self._made.clear()

    def _folder(self, names: tuple[str, ...], make: bool) -> int:
        if names in self._folders:
            return self._folders[names]
        within = self._folder(names[:-1], make)
        shown = "/".join(names)
        try:
            opened = self._open_folder(within, names[-1], make)
        except OSError as error:
            raise PathError(_folder_problem(error, shown, within, names[-1])) from None
        self._folders[names] = opened
        return opened

    def _open_folder(self, within: int, name: str, make: bool) -> int:
        try:
            return os.open(name, _DIRECTORY, dir_fd=within)
        except FileNotFoundError:
            if not make:
                raise
        with contextlib.suppress(FileExistsError):
            os.mkdir(name, dir_fd=within)
            self._made.append((within, name))
        return os.open(name, _DIRECTORY, dir_fd=within)


def _folder_problem(error: OSError, shown: str, within: int, name: str) -> str:
    if error.errno in (errno.ELOOP, errno.ENOTDIR):
        kind = "a symbolic link, which is not followed" if _is_link(within, name) else "not a folder"
        return f"{shown!r} is {kind}"
    return f"the folder {shown!r} cannot be opened: {error.strerror}"


def _is_link(folder: int, name: str) -> bool:
    try:
        return stat.S_ISLNK(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode)
    except OSError:
        return False


def exists(entry: Entry) -> bool:
    """Whether anything has this name, a link without a target too."""
    try:
        os.stat(entry.name, dir_fd=entry.folder, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def read(entry: Entry) -> Found:
    """The regular file of this name. Raises PathError."""
    try:
        opened = os.open(entry.name, _FILE, dir_fd=entry.folder)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise PathError("the file is a symbolic link, which is not followed") from None
        raise PathError("there is no such file" if error.errno == errno.ENOENT else str(error.strerror)) from None
    try:
        status = os.fstat(opened)
        if not stat.S_ISREG(status.st_mode):
            raise PathError("the path is not a regular file")
        if status.st_size > MAX_FILE_BYTES:
            raise PathError(f"the file has more than {MAX_FILE_BYTES} bytes")
        with open(opened, "rb", closefd=False) as file:
            return Found(file.read(), status)
    finally:
        os.close(opened)


def is_unchanged(entry: Entry, found: Found) -> bool:
    """Whether the name still has the file that was read."""
    try:
        now = os.stat(entry.name, dir_fd=entry.folder, follow_symlinks=False)
    except OSError:
        return False
    then = found.status
    return all(getattr(now, name) == getattr(then, name) for name in ("st_dev", "st_ino", "st_size", "st_mtime_ns"))


def write_beside(entry: Entry, content: bytes, like: os.stat_result | None) -> Entry:
    """Writes a file of a new name in the same folder, flushed, with the mode (and owner) of `like`."""
    hidden = Entry(entry.folder, f".{secrets.token_hex(8)}.patch", entry.path)
    opened = os.open(hidden.name, _CREATE, 0o666, dir_fd=entry.folder)
    try:
        with open(opened, "wb") as file:
            file.write(content)
            file.flush()
            if like is not None:
                if (os.geteuid(), os.getegid()) != (like.st_uid, like.st_gid):
                    with contextlib.suppress(PermissionError):
                        os.fchown(opened, like.st_uid, like.st_gid)
                os.fchmod(opened, stat.S_IMODE(like.st_mode))
            os.fsync(opened)
    except BaseException:
        remove(hidden)
        raise
    return hidden


def remove(entry: Entry) -> None:
    """Removes the name, if it is there."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(entry.name, dir_fd=entry.folder)


def rename(old: Entry, new: Entry) -> None:
    os.rename(old.name, new.name, src_dir_fd=old.folder, dst_dir_fd=new.folder)


def link(old: Entry, new: Entry) -> None:
    """Gives the file a second name. Raises FileExistsError if the name is taken."""
    os.link(old.name, new.name, src_dir_fd=old.folder, dst_dir_fd=new.folder, follow_symlinks=False)


@contextlib.contextmanager
def opened_root(path: Path) -> Iterator[Root]:
    """The root, whose folders are removed again if the block ends with an error."""
    with Root(path) as root:
        try:
            yield root
        except BaseException:
            root.remove_made_folders()
            raise
