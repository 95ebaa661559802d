"""Receives a multipart body: its file goes to the disk as it arrives."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from starlette.requests import ClientDisconnect, Request

from gptoss.api.batches.schema import Seconds
from gptoss.api.http.errors import BodyTooLarge, BodyTooSlow, InvalidRequest, UnsupportedMediaType
from gptoss.api.http.fields import contract_error

MAX_FIELD_BYTES = 64 * 1024  # all fields but the file
MAX_NAME = 255
WRITE_BYTES = 2**20  # written at a time, in a thread
MIN_BYTES_PER_S = 64 * 1024
OVERHEAD_BYTES = 128 * 1024  # of boundaries, headers and fields


class FileFields(BaseModel):
    """The fields of a multipart body other than the file; their values arrive as text."""

    model_config = ConfigDict(populate_by_name=True, extra="ignore")

    purpose: Literal["batch"]
    anchor: Annotated[Literal["created_at"] | None, Field(alias="expires_after[anchor]")] = None
    seconds: Annotated[Seconds | None, Field(alias="expires_after[seconds]")] = None

    @model_validator(mode="after")
    def _both_or_none(self) -> Self:
        if (self.anchor is None) != (self.seconds is None):
            missing = "expires_after[anchor]" if self.anchor is None else "expires_after[seconds]"
            raise contract_error(f"Missing required parameter: '{missing}'.", missing, "missing_required_parameter")
        return self


@dataclass(slots=True)
class Upload:
    """What a multipart body held."""

    filename: str = ""
    num_bytes: int = 0
    has_file: bool = False
    fields: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class UploadLimits:
    max_bytes: int  # of the file
    timeout_s: float  # and a second more for each MIN_BYTES_PER_S that arrive
    reserve: Callable[[int], None]  # called for all bytes before they are written; raises ApiError


async def receive(request: Request, path: Path, limits: UploadLimits) -> Upload:
    """Writes the part named `file` to `path`, durably; returns the rest. An error leaves no file.

    Raises:
        InvalidRequest, UnsupportedMediaType, BodyTooLarge, BodyTooSlow, what `reserve` raises, OSError.
    """
    boundary = _boundary(request)
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limits.max_bytes + OVERHEAD_BYTES:
        raise _too_large(limits)
    try:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
            body = _MultipartBody(boundary, file, limits)
            await _read_all(request, body, limits)
            await asyncio.to_thread(body.close)
        return body.upload
    except BaseException:  # also a cancellation
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        raise


def _boundary(request: Request) -> bytes:
    from python_multipart.multipart import parse_options_header

    media_type, options = parse_options_header(request.headers.get("content-type", ""))
    if media_type != b"multipart/form-data":
        raise UnsupportedMediaType("Content-Type must be multipart/form-data.")
    if not options.get(b"boundary"):
        raise InvalidRequest("The Content-Type multipart/form-data has no boundary.")
    return bytes(options[b"boundary"])


async def _read_all(request: Request, body: _MultipartBody, limits: UploadLimits) -> None:
    loop = asyncio.get_running_loop()
    started, num_bytes, waiting = loop.time(), 0, bytearray()
    try:
        async with asyncio.timeout(limits.timeout_s) as timer:
            async for chunk in request.stream():
                num_bytes += len(chunk)
                timer.reschedule(started + limits.timeout_s + num_bytes / MIN_BYTES_PER_S)
                waiting += chunk
                if len(waiting) >= WRITE_BYTES:
                    await asyncio.to_thread(body.feed, bytes(waiting))
                    waiting.clear()
            await asyncio.to_thread(body.feed, bytes(waiting))
    except TimeoutError:
        raise BodyTooSlow(f"The body arrived at less than {MIN_BYTES_PER_S} bytes a second.") from None
    except ClientDisconnect:
        raise InvalidRequest("The client disconnected before its body was complete.") from None


class _MultipartBody:
    """Parses a body piece by piece."""

    def __init__(self, boundary: bytes, file: BinaryIO, limits: UploadLimits) -> None:
        from python_multipart.exceptions import FormParserError
        from python_multipart.multipart import MultipartParser, parse_options_header

        self._parse_error, self._parse_options = FormParserError, parse_options_header
        self.upload = Upload()
        self._file, self._limits = file, limits
        self._header = [b"", b""]  # name and value
        self._options: dict[bytes, bytes] = {}  # of the part's Content-Disposition
        self._value = b""  # of a part that is not the file
        self._num_field_bytes = 0
        self._is_file = self._ended = False
        callbacks: Any = {
            "on_part_begin": self._begin_part,
            "on_part_data": self._part_data,
            "on_part_end": self._end_part,
            "on_header_field": lambda data, start, end: self._header_data(0, data[start:end]),
            "on_header_value": lambda data, start, end: self._header_data(1, data[start:end]),
            "on_header_end": self._end_header,
            "on_headers_finished": self._begin_data,
            "on_end": self._end,
        }
        try:
            self._parser = MultipartParser(boundary, callbacks)
        except FormParserError as error:
            raise InvalidRequest(f"The multipart body cannot be read: {error}.") from None

    def feed(self, data: bytes) -> None:
        """Parses and writes; call it in a thread."""
        try:
            self._parser.write(data)
        except self._parse_error as error:
            raise InvalidRequest(f"The multipart body cannot be read: {error}.") from None

    def close(self) -> None:
        """Makes the file durable. Raises InvalidRequest if the body ended too early."""
        if not self._ended:
            raise InvalidRequest("The multipart body ends before its last boundary.")
        self._file.flush()
        os.fsync(self._file.fileno())

    def _begin_part(self) -> None:
        self._options, self._value, self._is_file = {}, b"", False

    def _header_data(self, index: int, data: bytes) -> None:
        self._header[index] += data

    def _end_header(self) -> None:
        name, value = self._header
        self._header = [b"", b""]
        if name.lower() == b"content-disposition":
            self._options = dict(self._parse_options(value)[1])

    def _begin_data(self) -> None:
        self._is_file = self._options.get(b"name") == b"file"
        if self._is_file:
            if self.upload.has_file:
                raise InvalidRequest("The body has more than one 'file'.", "file", "invalid_value")
            self.upload.has_file = True
            name = self._options.get(b"filename", b"").decode("utf-8", "replace")
            self.upload.filename = name.replace("\\", "/").rpartition("/")[2][:MAX_NAME]

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        size = end - start
        if not self._is_file:
            self._num_field_bytes += size
            if self._num_field_bytes > MAX_FIELD_BYTES:
                raise InvalidRequest(f"The fields other than 'file' have more than {MAX_FIELD_BYTES} bytes.")
            self._value += data[start:end]
            return
        if self.upload.num_bytes + size > self._limits.max_bytes:
            raise _too_large(self._limits)
        self._limits.reserve(size)
        self.upload.num_bytes += size
        self._file.write(data[start:end])

    def _end_part(self) -> None:
        if not self._is_file:
            name = self._options.get(b"name", b"").decode("utf-8", "replace")
            self.upload.fields[name] = self._value.decode("utf-8", "replace")

    def _end(self) -> None:
        self._ended = True


def _too_large(limits: UploadLimits) -> BodyTooLarge:
    return BodyTooLarge(f"The file has more than {limits.max_bytes} bytes (batch_max_file_bytes).", "file")
