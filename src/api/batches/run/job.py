"""One batch that is being run: which of its requests are answered, and where answers go."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from gptoss.api.batches.run.line_writer import LineWriter
from gptoss.api.batches.run.lines import (
    BatchUsage,
    InputLine,
    LineError,
    output_line,
    parse_line,
    raw_lines,
    recover_lines,
    unanswered_line,
)
from gptoss.api.dispatch import URLS, Answer
from gptoss.api.http.sender import ANONYMOUS, Sender

logger = logging.getLogger(__name__)
LINES_AT_ONCE = 1000  # that are written for requests that were not run
PARSE_IN_THREAD_BYTES = 20_000


@dataclass(slots=True)
class Counts:
    total: int = 0
    completed: int = 0
    failed: int = 0


class BatchJob:
    """The requests of an input file without an answer, in the order of the file.

    The output files are the only record of what has been done, so a job that was killed continues where it was.
    """

    def __init__(
        self,
        source: Path,
        output: Path,
        errors: Path,
        *,
        endpoint: str | None,
        max_line_bytes: int,
        owner: str = ANONYMOUS,
        sender_of: Callable[[str], Sender] = Sender,
        on_written: Callable[[int], None] = lambda _: None,
    ) -> None:
        """
        Args:
            errors: may be the same file as `output`.
            sender_of: the sender of an owner's requests, as it is now.
            on_written: called with the bytes that are written, and with those that an earlier process has written.
        """
        self.owner = owner
        self.counts, self.usage = Counts(), BatchUsage()
        self.ended = asyncio.Event()  # every request has an answer, or the job has been stopped
        self.failure: Exception | None = None
        self._sender_of, self._on_written = sender_of, on_written
        self._source, self._output, self._errors = source, output, errors
        self._endpoint, self._max_line_bytes = endpoint, max_line_bytes
        self._written: set[str] = set()  # custom ids
        self._lines: Iterator[tuple[int, bytes | LineError]] | None = None
        self._file: BinaryIO | None = None
        self._writer = LineWriter()
        self._rows: set[asyncio.Task[None]] = set()
        self._records: set[asyncio.Task[None]] = set()  # answers that are being written
        self._finishing: asyncio.Task[None] | None = None
        self._stopped = False

    def recover(self, num_lines: int) -> None:
        """Finds out which of the `num_lines` requests have an answer. Reads files: call it in a thread."""
        self.counts, self.usage = Counts(num_lines), BatchUsage()
        self._written.clear()
        for path in dict.fromkeys((self._output, self._errors)):
            for line in recover_lines(path):
                self._written.add(line.custom_id)
                answer = line.response
                self._count(answer is not None and answer.status_code == 200)
                if answer is not None:
                    self.usage.add(answer.body)
            self._on_written(path.stat().st_size if path.exists() else 0)
        self._file = self._source.open("rb")
        self._lines = raw_lines(self._file, self._max_line_bytes)

    @property
    def num_written(self) -> int:
        return len(self._written)

    async def next_line(self) -> InputLine | None:
        """The next request without an answer; None: there is none, or the job has been stopped."""
        assert self._lines is not None
        while not self._stopped:
            number, data = next(self._lines, (0, b""))
            if not number:
                return None
            line = await self._parse(number, data)
            if line.custom_id not in self._written:
                return line
            await asyncio.sleep(0)  # a job that continues may skip thousands
        return None

    async def _parse(self, number: int, data: bytes | LineError) -> InputLine:
        """Raises LineError if the file has changed since it was checked."""
        if isinstance(data, LineError):
            raise data
        if len(data) < PARSE_IN_THREAD_BYTES:
            return parse_line(data, number, self._endpoint, URLS)
        return await asyncio.to_thread(parse_line, data, number, self._endpoint, URLS)

    def sender_of(self, line: InputLine) -> Sender:
        """The sender of one request."""
        return replace(self._sender_of(self.owner), body_bytes=line.num_bytes)

    def begin(self, row: asyncio.Task[None]) -> None:
        """Notes a request that is running."""
        if self._stopped:
            row.cancel()
        self._rows.add(row)
        row.add_done_callback(self._task_ended)

    def _task_ended(self, row: asyncio.Task[None]) -> None:
        self._rows.discard(row)
        self._records.discard(row)
        if not row.cancelled() and (error := row.exception()) is not None:
            self.fail(error if isinstance(error, Exception) else RuntimeError(str(error)))

    def fail(self, error: Exception) -> None:
        """Ends the job: its files cannot be read or written, or a bug."""
        if self.failure is None:
            self.failure = error
        self._stopped = True
        self.ended.set()

    def exhausted(self) -> None:
        """Ends the job once the requests that are running have ended: there are no others."""
        self._finishing = asyncio.create_task(self._finish())

    async def _finish(self) -> None:
        while self._rows or self._records:
            await asyncio.wait(self._rows | self._records)
        self.close()
        self.ended.set()

    async def stop(self) -> None:
        """Ends the requests that are running; they have no answer then."""
        self._stopped = True
        for row in self._rows:
            row.cancel()
        await self._finish()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    async def write(self, line: InputLine, answer: Answer) -> None:
        """Records an answer. Raises OSError."""
        is_error = answer.status != 200
        text = output_line(new_row_id(), line.custom_id, answer.status, answer.request_id, answer.body)
        await self._append([line.custom_id], text, is_error=is_error, body=answer.body)

    async def write_unanswered(self, code: str, message: str) -> int:
        """Records all requests without an answer as errors; returns their number. Raises OSError."""
        rest = [custom_id for custom_id in await asyncio.to_thread(self._custom_ids) if custom_id not in self._written]
        for first in range(0, len(rest), LINES_AT_ONCE):
            ids = rest[first : first + LINES_AT_ONCE]
            text = b"".join(unanswered_line(new_row_id(), custom_id, code, message) for custom_id in ids)
            await self._append(ids, text, is_error=True)
        return len(rest)

    def _custom_ids(self) -> list[str]:
        with self._source.open("rb") as file:
            lines = raw_lines(file, self._max_line_bytes)
            return [
                parse_line(data, number, self._endpoint, URLS).custom_id
                for number, data in lines
                if not isinstance(data, LineError)
            ]

    async def _append(
        self, custom_ids: Sequence[str], text: bytes, *, is_error: bool, body: bytes | None = None
    ) -> None:
        record = asyncio.create_task(self._record(custom_ids, text, is_error, body))
        self._records.add(record)
        record.add_done_callback(self._task_ended)
        await asyncio.shield(record)  # a request that is cancelled now has its answer all the same

    async def _record(self, custom_ids: Sequence[str], text: bytes, is_error: bool, body: bytes | None) -> None:
        await self._writer.append(self._errors if is_error else self._output, text)
        self._on_written(len(text))
        self._written.update(custom_ids)
        for _ in custom_ids:
            self._count(not is_error)
        if body is not None:
            self.usage.add(body)

    def _count(self, is_completed: bool) -> None:
        if is_completed:
            self.counts.completed += 1
        else:
            self.counts.failed += 1


def new_row_id() -> str:
    return f"batch_req_{secrets.token_hex(12)}"
