"""A temporary folder for the lifetime of a process.

The next process that needs one removes what killed ones left. The owner holds a lock (flock) on its folder, which the
kernel releases however the process ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import stat
import tempfile
from pathlib import Path
from types import TracebackType

PREFIX = "gpt-oss-run-"
_NAME = re.compile(PREFIX + r"[a-z0-9_]{8}")
MAX_TRIES = 100


class RunFolder:
    """A locked temporary folder; as a context manager it is removed at the end."""

    def __init__(self) -> None:
        """Creates the folder. Raises OSError if that is not possible."""
        remove_abandoned()
        self.path, self._descriptor = _create()

    def __enter__(self) -> Path:
        return self.path

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def remove(self) -> None:
        if self._descriptor >= 0:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._descriptor)
            self._descriptor = -1


def remove_abandoned() -> None:
    """Removes the folders of this user's processes that have ended."""
    try:
        candidates = [p for p in Path(tempfile.gettempdir()).iterdir() if _NAME.fullmatch(p.name)]
    except OSError:
        return
    for path in candidates:
        with contextlib.suppress(OSError):
            status = path.lstat()
            if stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid():
                _remove_if_unlocked(path)


def _remove_if_unlocked(path: Path) -> None:
    """Removes a folder. Raises OSError if it is in use or gone."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(path, ignore_errors=True)
    finally:
        os.close(descriptor)


def _create() -> tuple[Path, int]:
    """Creates a folder; returns it and the descriptor that holds its lock."""
    for _ in range(MAX_TRIES):
        path = Path(tempfile.mkdtemp(prefix=PREFIX))
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        if _lock(descriptor) and path.is_dir():
            return path, descriptor
        os.close(descriptor)  # another process removed it as abandoned before it was locked
    raise OSError(f"cannot keep a temporary folder in {tempfile.gettempdir()}")


def _lock(descriptor: int) -> bool:
    """Takes the lock; returns False if another process holds it.

    Always True on file systems without locks.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True
