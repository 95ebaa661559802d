"""A running sandbox with the state of one interpreter: cells go in, text and images come out."""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import secrets
from dataclasses import dataclass, field
from typing import Any, Literal

from gptoss.tools.python_sandbox import processes
from gptoss.tools.python_sandbox.bubblewrap import Sandbox, Started
from gptoss.tools.python_sandbox.errors import SandboxError
from gptoss.tools.python_sandbox.limits import MIB, SandboxLimits
from gptoss.tools.python_sandbox.pipes import BrokenContainerError, CellOutput, Pipes

Status = Literal["ok", "error", "timeout", "output", "memory", "ended"]
Reason = Literal["timeout", "output", "memory"]
INTERRUPT_S = 2.0  # for a cell to end after KeyboardInterrupt
START_S = 30.0  # for the interpreter to start, on a loaded machine
WATCH_S = 0.2  # between two looks at the memory of a running cell
MAX_FRAMES = 64  # of a cell; the driver sends fewer, whatever the code does to its pipe
_MARGIN_BYTES = 64 * MIB  # what Python takes by itself, and what is counted late
_IMAGE_TYPES = ("image/png",)


@dataclass(frozen=True, slots=True)
class Image:
    data: bytes
    media_type: str


@dataclass(slots=True)
class Execution:
    """What a cell came to. `detail` says why it did not end by itself, or which error it raised."""

    text: str = ""
    images: list[Image] = field(default_factory=list)
    status: Status = "ok"
    detail: str = ""


class Container:
    """One sandbox. Cells run one after the other; between them all of its processes are stopped."""

    def __init__(self, started: Started, pipes: Pipes, limits: SandboxLimits) -> None:
        self.id = f"cntr_{secrets.token_hex(24)}"
        self.limits = limits
        self._started, self._process, self._pipes = started, started.process, pipes
        self._lock = asyncio.Lock()
        self._is_running = False  # a cell, which may still run although no caller waits for it
        self._closed: asyncio.Task[None] | None = None

    @classmethod
    async def start(cls, sandbox: Sandbox, limits: SandboxLimits) -> Container:
        """A container whose interpreter is ready. Raises SandboxError. If cancelled, it leaves no process."""
        try:
            started = sandbox.start(limits)
        except OSError as error:
            raise SandboxError(f"no process can be started: {error.strerror}") from None
        loop = asyncio.get_running_loop()
        released = loop.run_in_executor(None, started.release)
        try:
            await asyncio.shield(released)
        except SandboxError:
            started.discard()  # its process has ended
            raise
        except asyncio.CancelledError:
            released.add_done_callback(lambda done: (done.exception(), loop.run_in_executor(None, started.discard)))
            raise
        return await cls._connected(started, limits)

    @classmethod
    async def _connected(cls, started: Started, limits: SandboxLimits) -> Container:
        output = CellOutput(limits.output_bytes)
        pipes = await Pipes.connect(started, output, 2 * limits.image_bytes)
        container = cls(started, pipes, limits)
        try:
            await asyncio.wait_for(pipes.receive(), START_S)
        except (BrokenContainerError, TimeoutError) as error:
            await container.close()
            lines = output.text().strip().splitlines()
            raise SandboxError(lines[-1] if lines else f"the interpreter does not start: {error}") from None
        except BaseException:
            await container.close()
            raise
        processes.stop(started.process.pid)
        return container

    @property
    def is_alive(self) -> bool:
        """Whether it can run a cell, now or after the one that runs."""
        is_stuck = self._is_running and not self._lock.locked()
        return self._closed is None and not is_stuck and self._process.poll() is None

    async def run(self, code: str, timeout_s: float) -> Execution:
        """Runs a cell. Never raises for what the cell does. Cancelled, it interrupts the cell first."""
        async with self._lock:
            if self._is_running or not self.is_alive:
                return Execution(status="ended", detail="the container has ended")
            processes.resume(self._process.pid)
            execution = Execution()
            try:
                await self._run(execution, code, timeout_s)
            finally:
                if self._closed is None and self._process.poll() is None:
                    processes.stop(self._process.pid)
            execution.text = self._pipes.output.text()
            return execution

    async def _run(self, execution: Execution, code: str, timeout_s: float) -> None:
        mark = f"<{secrets.token_hex(16)}>"
        self._is_running = True
        self._pipes.output.begin(mark)
        self._pipes.send(run=code, mark=mark)
        cell = asyncio.ensure_future(self._collect(execution))
        limit = asyncio.ensure_future(self._until_a_limit())
        try:
            await asyncio.wait({cell, limit}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if not cell.done():
                reason: Reason = limit.result() if limit.done() else "timeout"
                await self._end_cell(execution, cell, reason, timeout_s)
            if not cell.cancelled() and (error := cell.exception()):
                await self._broke(execution, str(error))
        except asyncio.CancelledError:
            if not await self._interrupt(cell):
                await self.close()
            raise
        finally:
            for task in (cell, limit):
                task.cancel()
            await asyncio.gather(cell, limit, return_exceptions=True)

    async def _collect(self, execution: Execution) -> None:
        """Takes images until the cell is done and its output complete. Raises BrokenContainerError."""
        left, num_frames = self.limits.image_bytes, 0
        while "done" not in (frame := await self._pipes.receive()):
            num_frames += 1
            if num_frames > MAX_FRAMES:
                raise BrokenContainerError("the interpreter sent too many frames")
            image = _image(frame)
            if image is not None and len(image.data) <= left:
                left -= len(image.data)
                execution.images.append(image)
        if frame["done"] != "ok":
            execution.status = "error"
        execution.detail = str(frame.get("message", ""))[:1000]
        await self._pipes.output.complete.wait()
        self._is_running = False

    async def _until_a_limit(self) -> Reason:
        """Ends when the cell has written too much, or its processes hold too much memory."""
        limit = self.limits.memory_bytes + _MARGIN_BYTES
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._pipes.output.flooded.wait(), WATCH_S)
                return "output"
            if processes.memory_of(processes.descendants(self._process.pid), limit) > limit:
                return "memory"

    async def _end_cell(
        self, execution: Execution, cell: asyncio.Future[None], reason: Reason, timeout_s: float
    ) -> None:
        """Interrupts a cell that reached a limit; where that does not help, ends the container."""
        why = {
            "timeout": f"the time limit of {timeout_s:g} s",
            "output": "the limit of what a cell may print",
            "memory": f"the memory limit of {self.limits.memory_bytes // MIB} MiB",
        }[reason]
        kept = reason != "memory" and await self._interrupt(cell)
        if not kept:
            cell.cancel()
            await self.close()
        execution.status = reason
        execution.detail = f"The code was interrupted at {why}."
        if not kept:
            execution.detail = f"The container was ended at {why}; variables and files are lost."

    async def _interrupt(self, cell: asyncio.Future[None]) -> bool:
        """Raises KeyboardInterrupt in the cell and returns whether that ended it."""
        self._pipes.send(interrupt=True)
        done, _ = await asyncio.wait({cell}, timeout=INTERRUPT_S)
        return bool(done) and not cell.cancelled() and cell.exception() is None

    async def _broke(self, execution: Execution, reason: str) -> None:
        await self.close()
        execution.status = "ended"
        execution.detail = f"The container has ended ({reason}); variables and files are lost."

    async def close(self) -> None:
        """Ends all of its processes and waits until they are gone."""
        if self._closed is None:
            self._closed = asyncio.create_task(self._close())
        await asyncio.shield(self._closed)

    async def _close(self) -> None:
        await asyncio.to_thread(self._started.end)
        await self._pipes.rest(1.0)
        await self._pipes.close()


def _image(frame: dict[str, Any]) -> Image | None:
    """The image of a frame; None for what is none: frames come from inside the sandbox."""
    data, media_type = frame.get("image"), frame.get("media_type")
    if not isinstance(data, str) or media_type not in _IMAGE_TYPES:
        return None
    try:
        return Image(base64.b64decode(data, validate=True), media_type)
    except (ValueError, binascii.Error):
        return None
