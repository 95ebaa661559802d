"""Files and batches on the disk, by owner. The records of all of them are in memory too.

Each record is a small JSON file of its own, replaced as a whole, so that a killed process leaves the old one or the new
one. A file's content is written before its record: content without a record belongs to a batch that is being run, or is
removed at the next start.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

import msgspec

from gptoss.api.batches.records import BATCH_ID, FILE_ID, StoredBatch, StoredFile, new_file_id
from gptoss.api.batches.run.line_writer import flush_folder, write_durably
from gptoss.api.http.errors import InvalidRequest, NotFound, RateLimited
from gptoss.config.errors import ConfigError

logger = logging.getLogger(__name__)
MAX_FILES = 10_000  # of one owner
MAX_BATCHES = 1000  # of one owner, ended ones included
MAX_UNFINISHED = 100  # of one owner
R = TypeVar("R", StoredFile, StoredBatch)


class BatchStore:
    """The folder of one server. Belongs to one event loop; only `reserve` may be called in a thread."""

    def __init__(self, folder: Path, quota_bytes: int, retention_s: float) -> None:
        """Creates the folder, or reads what is in it. Raises ConfigError if it cannot be used."""
        self.quota_bytes, self.retention_s = quota_bytes, int(retention_s)
        self._contents, self._records, self._batches = folder / "contents", folder / "files", folder / "batches"
        self.files: dict[str, StoredFile] = {}
        self.batches: dict[str, StoredBatch] = {}
        self._num_bytes: Counter[str] = Counter()  # by owner, of files that are being received too
        self._mutex = threading.Lock()  # of _num_bytes
        self._saving = asyncio.Lock()
        try:
            for path in (self._contents, self._records, self._batches):
                path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise ConfigError(f"batch_dir {folder} is in use by another server") from None
        except OSError as error:
            raise ConfigError(f"batch_dir {folder} cannot be used: {error.strerror}") from None
        self._load()

    def close(self) -> None:
        """Lets another server use the folder."""
        os.close(self._lock)

    def _load(self) -> None:
        self.files = {f.id: f for f in _read_all(self._records, StoredFile) if self.content(f.id).exists()}
        self.batches = {b.id: b for b in _read_all(self._batches, StoredBatch)}
        for file in self.files.values():
            self._num_bytes[file.owner] += file.bytes
        known = {*self.files, *(name for b in self.batches.values() if not b.ended for name in b.spool_ids)}
        for path in self._contents.iterdir():
            if path.name not in known:
                path.unlink(missing_ok=True)

    def content(self, file_id: str) -> Path:
        """The path of a file's content. `file_id` must be the id of a stored file."""
        assert FILE_ID.fullmatch(file_id), file_id
        return self._contents / file_id

    # --- files ---

    def file(self, owner: str, file_id: str) -> StoredFile:
        """Returns an owner's file. Raises NotFound."""
        found = self.files.get(file_id)
        if found is None or found.owner != owner or found.expires_at <= time.time():
            raise NotFound(f"No such File object: {file_id[:100]}", "id", "file_not_found")
        return found

    def files_of(self, owner: str) -> list[StoredFile]:
        """An owner's files, the oldest first."""
        now = time.time()
        return [file for file in self.files.values() if file.owner == owner and file.expires_at > now]

    def num_bytes(self, owner: str) -> int:
        """The size of an owner's files, those included that are being received."""
        return self._num_bytes[owner]

    def total_bytes(self) -> int:
        return sum(self._num_bytes.values())

    def begin_upload(self, owner: str) -> Path:
        """Returns the path for a content that is being received. Raises RateLimited."""
        if sum(file.owner == owner for file in self.files.values()) >= MAX_FILES:
            raise _over(f"This key has {MAX_FILES} files already: delete some.")
        return self.content(new_file_id())

    def reserve(self, owner: str, num_bytes: int) -> None:
        """Takes bytes from an owner's quota, for a file that is being received. Raises RateLimited."""
        with self._mutex:
            if self._num_bytes[owner] + num_bytes > self.quota_bytes:
                raise _over(f"The files of this key would have more than {self.quota_bytes} bytes: delete some.")
            self._num_bytes[owner] += num_bytes

    def count_bytes(self, owner: str, num_bytes: int) -> None:
        """Adds to the size of an owner's files, whatever the quota."""
        with self._mutex:
            self._num_bytes[owner] += num_bytes

    async def add_file(self, file: StoredFile) -> None:
        """Records a file whose content is written and whose size is counted. Raises OSError."""

        def write() -> None:
            flush_folder(self._contents)
            write_durably(self._records / f"{file.id}.json", msgspec.json.encode(file))

        await asyncio.to_thread(write)
        self.files[file.id] = file

    async def delete_file(self, file: StoredFile) -> None:
        """Removes a file. Raises InvalidRequest if a batch that has not ended reads it."""
        user = next((b.id for b in self.batches.values() if not b.ended and b.input_file_id == file.id), None)
        if user is not None:
            raise InvalidRequest(f"{file.id} is the input of {user}, which has not ended.", "id", "file_in_use")
        await self._remove_file(file)

    async def _remove_file(self, file: StoredFile) -> None:
        if self.files.pop(file.id, None) is not None:
            self.count_bytes(file.owner, -file.bytes)
        for path in (self._records / f"{file.id}.json", self.content(file.id)):
            await asyncio.to_thread(path.unlink, missing_ok=True)

    # --- batches ---

    def batch(self, owner: str, batch_id: str) -> StoredBatch:
        """Returns an owner's batch. Raises NotFound."""
        found = self.batches.get(batch_id)
        if found is None or found.owner != owner:
            raise NotFound(f"No batch found with id '{batch_id[:100]}'.", "batch_id", "batch_not_found")
        return found

    def batches_of(self, owner: str) -> list[StoredBatch]:
        """An owner's batches, the newest first."""
        return [batch for batch in reversed(self.batches.values()) if batch.owner == owner]

    def check_room(self, owner: str) -> None:
        """Raises RateLimited if an owner may not have another batch."""
        own = self.batches_of(owner)
        if sum(not batch.ended for batch in own) >= MAX_UNFINISHED:
            raise _over(f"{MAX_UNFINISHED} batches of this key have not ended yet.")
        if len(own) >= MAX_BATCHES:
            raise _over(f"This key has {MAX_BATCHES} batches already, which are kept {self.retention_s} s.")
        if self.num_bytes(owner) >= self.quota_bytes:
            raise _over(f"The files of this key have {self.quota_bytes} bytes or more: delete some.")

    async def save_batch(self, batch: StoredBatch) -> None:
        """Writes a batch's record. Raises OSError."""
        assert BATCH_ID.fullmatch(batch.id), batch.id
        async with self._saving:
            await asyncio.to_thread(write_durably, self._batches / f"{batch.id}.json", msgspec.json.encode(batch))
        self.batches[batch.id] = batch

    async def remove_expired(self) -> None:
        """Removes files and ended batches whose time is over. Raises OSError."""
        now = time.time()
        in_use = {batch.input_file_id for batch in self.batches.values() if not batch.ended}
        for file in list(self.files.values()):
            if file.expires_at <= now and file.id not in in_use:
                await self._remove_file(file)
        for batch in list(self.batches.values()):
            if batch.ended_at is not None and batch.ended_at + self.retention_s <= now:
                self.batches.pop(batch.id, None)
                await asyncio.to_thread((self._batches / f"{batch.id}.json").unlink, missing_ok=True)


def _over(message: str) -> RateLimited:
    """A limit that waiting does not lift, so that clients do not try again by themselves."""
    return RateLimited(message, None, "quota_exceeded", {"x-should-retry": "false"})


def _read_all(folder: Path, kind: type[R]) -> Iterable[R]:
    """The records of a folder, the oldest first. A damaged one is logged and left out."""
    found = []
    for path in folder.iterdir():
        if path.suffix != ".json":
            path.unlink(missing_ok=True)  # what a killed process was writing
            continue
        with contextlib.suppress(FileNotFoundError):
            try:
                record = msgspec.json.decode(path.read_bytes(), type=kind)
            except msgspec.MsgspecError as error:
                logger.error("ignoring the damaged record %s: %s", path, error)
                continue
            if path.stem == record.id and (FILE_ID.fullmatch(record.id) or BATCH_ID.fullmatch(record.id)):
                found.append(record)
    return sorted(found, key=lambda record: (record.created_at, record.id))
