"""The pipes of a container, as the event loop sees them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import struct
from typing import Any, Self

from gptoss.tools.python_sandbox.bubblewrap import Started
from gptoss.tools.python_sandbox.output import BoundedOutput

MAX_OUTPUT_BYTES = 16 * 2**20  # of a cell, read and mostly thrown away, before it is interrupted
_CHUNK = 65_536


class BrokenContainerError(Exception):
    """The driver has ended, or does not keep to the protocol."""


class CellOutput:
    """Standard output up to the mark that the driver writes after a cell."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._mark = b""
        self._held = b""  # may be the beginning of the mark; after it, the next cell's
        self._kept = BoundedOutput(limit)
        self.complete = asyncio.Event()
        self.flooded = asyncio.Event()

    def begin(self, mark: str) -> None:
        """Begins the output of a cell."""
        self._mark, self._kept = mark.encode(), BoundedOutput(self._limit)
        self.complete.clear()
        self.flooded.clear()
        held, self._held = self._held, b""
        self.feed(held)

    def feed(self, data: bytes) -> None:
        data = self._held + data
        end = data.find(self._mark) if self._mark else -1
        if end >= 0:
            self._kept.add(data[:end])
            self._held, self._mark = data[end + len(self._mark) :][-self._limit :], b""
            self.complete.set()
            return
        keep = len(self._mark) - 1 if self._mark else self._limit
        cut = max(0, len(data) - keep)
        self._kept.add(data[:cut])
        self._held = data[cut:]
        if self._kept.total > MAX_OUTPUT_BYTES:
            self.flooded.set()

    def text(self) -> str:
        """The text so far."""
        if not self.complete.is_set():
            self._kept.add(self._held)
            self._held = b""
        return self._kept.text()


class Pipes:
    """Frames to and from the driver, and the output."""

    def __init__(self, output: CellOutput, max_frame_bytes: int) -> None:
        self.output = output
        self._max_frame_bytes = max_frame_bytes
        self._frames: asyncio.StreamReader
        self._writer: asyncio.WriteTransport
        self._pump: asyncio.Task[None]
        self._transports: list[asyncio.BaseTransport] = []

    @classmethod
    async def connect(cls, started: Started, output: CellOutput, max_frame_bytes: int) -> Self:
        """Takes over the ends of the pipes."""
        pipes = cls(output, max_frame_bytes)
        loop = asyncio.get_running_loop()
        pipes._frames = await pipes._reader(started.read_end)
        stdout = await pipes._reader(started.output)
        writer, _ = await loop.connect_write_pipe(asyncio.Protocol, os.fdopen(started.write_end, "wb", 0))
        pipes._writer = writer
        pipes._transports.append(writer)
        pipes._pump = loop.create_task(pipes._feed(stdout))
        return pipes

    async def _reader(self, end: int) -> asyncio.StreamReader:
        reader = asyncio.StreamReader()
        protocol = asyncio.StreamReaderProtocol(reader)
        file = os.fdopen(end, "rb", 0)
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, file)
        self._transports.append(transport)
        return reader

    async def _feed(self, stdout: asyncio.StreamReader) -> None:
        while data := await stdout.read(_CHUNK):
            self.output.feed(data)

    def send(self, **frame: Any) -> None:
        body = json.dumps(frame).encode()
        self._writer.write(struct.pack("!I", len(body)) + body)

    async def receive(self) -> dict[str, Any]:
        """The driver's next frame. Raises BrokenContainerError."""
        try:
            size = struct.unpack("!I", await self._frames.readexactly(4))[0]
            if size > self._max_frame_bytes:
                raise BrokenContainerError("the interpreter sent too much at once")
            frame = json.loads(await self._frames.readexactly(size))
        except (asyncio.IncompleteReadError, ConnectionError):
            raise BrokenContainerError("the interpreter has ended") from None
        except (ValueError, RecursionError):
            raise BrokenContainerError("the interpreter sent what is not JSON") from None
        if not isinstance(frame, dict):
            raise BrokenContainerError("the interpreter sent what is not a frame")
        return frame

    async def rest(self, timeout_s: float) -> None:
        """Waits until the output has ended, at most this long."""
        await asyncio.wait({self._pump}, timeout=timeout_s)

    async def close(self) -> None:
        self._pump.cancel()
        with contextlib.suppress(asyncio.CancelledError, OSError):
            await self._pump
        for transport in self._transports:
            transport.close()
