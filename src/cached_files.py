"""Derived files, created once and kept in the cache folder.

Their size and SHA-256 are recorded next to them and checked at each use; a damaged file is created again.

A file or folder is written to a temporary folder of the same file system, flushed and renamed. If the cache is not
writable, the file is created in a temporary folder for this process only.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import hashlib
import logging
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from gptoss.run_folder import RunFolder

logger = logging.getLogger(__name__)

MAKING = ".making-"  # prefix of the temporary folders
FORMER_MAKING = "tmp????????"  # temporary folders of earlier versions, which held no lock
FORMER_AGE_S = 3600
LOCK_TIMEOUT_S = 120.0
REMEDY = "set XDG_CACHE_HOME to a writable folder with free space"


class CacheError(Exception):
    """Neither the cache nor a temporary folder can be written. The message names both and the remedy."""


class FileSum(msgspec.Struct):
    num_bytes: int
    sha256: str


_decoder = msgspec.json.Decoder(dict[str, FileSum])


def default_cache_folder() -> Path:
    """The folder of derived files: gpt-oss-server in $XDG_CACHE_HOME or ~/.cache."""
    root = os.path.expanduser(os.environ.get("XDG_CACHE_HOME", ""))
    if os.path.isabs(root):  # the XDG Base Directory Specification requires relative paths to be ignored
        return Path(root) / "gpt-oss-server"
    try:
        home = Path.home()
    except RuntimeError:  # no HOME, and this user has no passwd entry
        home = Path("/")
    return home / ".cache" / "gpt-oss-server"


def cached(path: Path, make: Callable[[Path], None], sha256: str | None = None) -> Path:
    """Returns the file or folder at `path`, created by `make(temporary path)` if it is missing or damaged.

    Without a writable cache the result is in a temporary folder and lasts as long as this process. `sha256`: of a file
    whose content is known in advance. Raises CacheError, and what `make` raises other than OSError.
    """
    if damage(path, sha256) is None:
        with contextlib.suppress(OSError), _locked(path.parent, timeout_s=0) as locked:
            _remove_abandoned(path.parent, locked)
        return path
    try:
        _make_folder(path.parent)
        with _locked(path.parent, LOCK_TIMEOUT_S) as locked:
            found = damage(path, sha256)  # another process may have created it
            if found is None:
                return path
            if os.path.lexists(path):
                logger.warning("damaged cache: %s; creating it again", found)
            _remove_abandoned(path.parent, locked)
            _write(path, make)
            return path
    except OSError as error:
        return _make_for_this_process(path, make, error)


def damage(path: Path, sha256: str | None = None) -> str | None:
    """What is wrong with a cached file or folder, naming the file; None if it is intact."""
    try:
        if sha256 is not None:
            return None if _hash(path) == sha256 else f"{path} has the wrong SHA-256"
        if not os.path.lexists(_record(path)) and path.exists():
            return f"{path} has no record of its size and SHA-256"
        sums = _decoder.decode(_record(path).read_bytes())
        if not sums:
            return f"{_record(path)} is empty"
        files = {path.parent / name: expected for name, expected in sums.items()}
        for file, expected in files.items():
            status = file.stat()
            if not stat.S_ISREG(status.st_mode):
                return f"{file} is not a file"
            if status.st_size != expected.num_bytes:
                return f"{file} has {status.st_size} bytes instead of {expected.num_bytes}"
        for file in _files_of(path):
            if file not in files and not file.name.startswith("."):
                return f"{file} is not in the record of its folder"
        for file, expected in files.items():
            if _hash(file) != expected.sha256:
                return f"{file} has the wrong SHA-256"
    except (msgspec.DecodeError, ValueError, RecursionError):  # ValueError: invalid UTF-8, or a NUL in a file name
        return f"{_record(path)} cannot be read"
    except OSError as error:
        return f"{error.filename or path}: {error.strerror or error}"
    return None


def _record(path: Path) -> Path:
    return path.with_name(path.name + ".sums")


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(path: Path, make: Callable[[Path], None]) -> None:
    with tempfile.TemporaryDirectory(prefix=MAKING, dir=path.parent) as temporary:
        folder = Path(temporary)
        made, record = folder / path.name, _record(folder / path.name)
        make(made)
        files = _files_of(made)
        sums = {str(p.relative_to(folder)): FileSum(p.stat().st_size, _hash(p)) for p in files}
        record.write_bytes(msgspec.json.format(msgspec.json.encode(sums)) + b"\n")
        for written in (*files, *({p.parent for p in files} - {folder}), record, folder):
            _flush(written)
        for new, target in ((made, path), (record, _record(path))):
            if os.path.lexists(target) and (new.is_dir() or target.is_dir()):
                target.rename(folder / f"replaced {target.name}")
            new.replace(target)
    _flush(path.parent)


def _files_of(path: Path) -> list[Path]:
    """The files below a folder; `path` itself if it is a file."""
    return sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]


def _make_folder(folder: Path) -> None:
    """Creates a folder of the cache, replacing a file or a dangling link of that name."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        if not folder.is_symlink() and not folder.is_file():
            raise
        logger.warning("damaged cache: %s is not a folder; creating it again", folder)
        folder.unlink()
        folder.mkdir()


def _flush(path: Path) -> None:
    """Flushes a file, or the entries of a folder, to the disk, so that they survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _make_for_this_process(path: Path, make: Callable[[Path], None], error: OSError) -> Path:
    reason = _reason(error)
    logger.warning("no cache: cannot write %s (%s); to keep it, %s", path, reason, REMEDY)
    try:
        folder = RunFolder()
        atexit.register(folder.remove)
        made = folder.path / path.name
        make(made)
    except OSError as second:
        raise CacheError(
            f"cannot write {path} ({reason}), nor into {tempfile.gettempdir()} ({_reason(second)}): {REMEDY}"
        ) from None
    return made


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


@contextlib.contextmanager
def _locked(folder: Path, timeout_s: float) -> Iterator[bool]:
    """Locks the folder against other processes, waiting up to `timeout_s`; yields whether it succeeded."""
    deadline = time.monotonic() + timeout_s
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        while not (locked := _lock(descriptor)) and time.monotonic() < deadline:
            time.sleep(0.05)
        yield locked
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _remove_abandoned(folder: Path, locked: bool) -> None:
    """Removes the temporary folders of killed processes: with the lock held, no other process is writing."""
    abandoned = [*folder.glob(f"{MAKING}*")] if locked else []
    for path in folder.glob(FORMER_MAKING):
        with contextlib.suppress(OSError):
            if time.time() - path.lstat().st_mtime > FORMER_AGE_S:
                abandoned.append(path)
    for path in abandoned:
        logger.info("removing %s, left by a killed process", path)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
