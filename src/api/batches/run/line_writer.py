"""Appends lines to files so that each is on the disk before it counts."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path

Entry = tuple[Path, bytes, asyncio.Future[None]]


class LineWriter:
    """Writes in a thread; lines that arrive meanwhile are written and flushed together."""

    def __init__(self) -> None:
        self._waiting: list[Entry] = []
        self._writing: asyncio.Task[None] | None = None

    async def append(self, path: Path, line: bytes) -> None:
        """Returns once the line, or lines, are on the disk. Raises OSError, with nothing written."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((path, line, done))
        if self._writing is None:
            self._writing = asyncio.create_task(self._write_all())
        await asyncio.shield(done)

    async def _write_all(self) -> None:
        try:
            while self._waiting:
                entries, self._waiting = self._waiting, []
                for path in dict.fromkeys(path for path, _, _ in entries):
                    await self._write(path, [entry for entry in entries if entry[0] == path])
        finally:
            self._writing = None

    async def _write(self, path: Path, entries: Sequence[Entry]) -> None:
        error: OSError | None = None
        try:
            await asyncio.to_thread(append_durably, path, b"".join(line for _, line, _ in entries))
        except OSError as raised:
            error = raised
        for _, _, done in entries:
            if done.done():
                continue
            if error is None:
                done.set_result(None)
            else:
                done.set_exception(error)
                done.exception()  # the task that wrote the line may have been cancelled


def append_durably(path: Path, data: bytes) -> None:
    """Appends to a file and flushes it to the disk, or leaves it as it was. Raises OSError."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600), "ab", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            written = 0
            while written < len(data):
                written += file.write(data[written:]) or 0
            os.fsync(file.fileno())
        except OSError:
            os.ftruncate(file.fileno(), size)
            raise


def write_durably(path: Path, data: bytes) -> None:
    """Replaces a file: after a crash it is the old one or the new one. Raises OSError."""
    temporary = path.with_name(f"{path.name}.tmp")
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    flush_folder(path.parent)


def flush_folder(path: Path) -> None:
    """Makes new and removed names of a folder durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
