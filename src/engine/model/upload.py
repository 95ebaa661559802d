"""Brings the tensors of mapped files to a GPU.

A copy from a mapped file waits for each page and goes through a buffer of the driver, so one thread gets a quarter of
what disk and bus can do. Here threads read the files piece by piece into pinned buffers, from which the device copies
while the next pieces are read; and the next layer is read while the device puts this one in the kernels' order.
"""

from __future__ import annotations

import contextlib
import os
import queue
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TypeVar

import torch

from gptoss.engine.model.tensor_source import CheckpointError, MappedFile

Made = TypeVar("Made")
READERS = 4
BUFFER_BYTES = 16 * 2**20
SMALL_BYTES = 2**20  # what is copied at once, without threads
DENSE = 1.05  # a stretch of a file is brought whole if the tensors in it leave out less than a twentieth


@dataclass(slots=True)
class _Buffer:
    bytes: torch.Tensor  # uint8
    copied: torch.cuda.Event | None = None  # when the device has read it

    def wait(self) -> None:
        if self.copied is not None:
            self.copied.synchronize()


class Uploader:
    """Use it as a context: it ends its threads and gives its buffers back."""

    def __init__(self, device: torch.device, files: Sequence[MappedFile]) -> None:
        """`files`: those that tensors may lie in; others are copied from memory."""
        self._device = device
        self._files = {file.path: file for file in files}
        self._readers = ThreadPoolExecutor(READERS, "read-weights", initializer=self._use_device)
        self._ahead = ThreadPoolExecutor(1, "next-layer", initializer=self._use_device)
        pinned = device.type == "cuda"
        self._free: queue.SimpleQueue[_Buffer] = queue.SimpleQueue()
        for _ in range(2 * READERS):
            self._free.put(_Buffer(torch.empty(BUFFER_BYTES, dtype=torch.uint8, pin_memory=pinned)))
        self._handles: dict[object, int] = {}

    def __enter__(self) -> Uploader:
        for path in self._files:
            with contextlib.suppress(OSError):  # then it is read through the map
                self._handles[path] = os.open(path, os.O_RDONLY)
        return self

    def __exit__(self, *_: object) -> None:
        self._ahead.shutdown(cancel_futures=True)
        self._readers.shutdown(cancel_futures=True)
        for handle in self._handles.values():
            os.close(handle)

    def in_turn(self, make: Callable[[int], Made], numbers: Sequence[int]) -> Iterator[Made]:
        """Yields make(number) for each, and makes the next one meanwhile in a thread."""
        coming: deque[Future[Made]] = deque()  # what was yielded, the caller alone holds
        for number in numbers:
            coming.append(self._ahead.submit(make, number))
            if len(coming) > 1:
                yield coming.popleft().result()
        if coming:
            yield coming.popleft().result()

    def bring(self, parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Copies tensors of the host to the device.

        Views that fill a stretch of one tensor between them, such as its even and its odd rows, are brought as that
        stretch, and are views of it on the device too.
        """
        begin, end = _stretch(parts)
        if begin < end <= begin + DENSE * sum(part.numel() for part in parts):
            whole = self._bring_flat(parts[0].as_strided((end - begin,), (1,), begin))
            moved = whole.storage_offset() - begin
            return [whole.as_strided(p.shape, p.stride(), moved + p.storage_offset()) for p in parts]
        return [self._bring_rows(part) for part in parts]

    def _bring_flat(self, flat: torch.Tensor) -> torch.Tensor:
        """Copies a contiguous tensor [N]."""
        if flat.nbytes <= SMALL_BYTES:
            return flat.to(self._device)
        source = flat.view(torch.uint8)
        out = torch.empty(flat.nbytes, dtype=torch.uint8, device=self._device)
        file = next((f for f in self._files.values() if f.offset_of(flat) is not None), None)
        handle = self._handles.get(file.path) if file is not None else None

        def piece(begin: int) -> None:
            end = min(begin + BUFFER_BYTES, flat.nbytes)
            with self._buffer() as buffer:
                if file is None or handle is None:
                    buffer.bytes[: end - begin].copy_(source[begin:end])
                else:
                    offset = file.offset_of(flat)
                    assert offset is not None
                    _read(file, handle, buffer.bytes[: end - begin], offset + begin)
                self._copy(out[begin:end], buffer, end - begin)

        self._all(piece, range(0, flat.nbytes, BUFFER_BYTES))
        return out.view(flat.dtype)

    def _bring_rows(self, part: torch.Tensor) -> torch.Tensor:
        """Copies a part with gaps, as many rows at a time as fit a buffer. It has none on the device."""
        row_bytes = part.nbytes // max(1, len(part))
        if part.dim() == 1 or part.nbytes <= SMALL_BYTES or row_bytes > BUFFER_BYTES:
            return part.to(self._device).contiguous()
        out = torch.empty(part.shape, dtype=part.dtype, device=self._device)
        step = BUFFER_BYTES // row_bytes

        def piece(begin: int) -> None:
            rows = part[begin : begin + step]
            size = len(rows) * row_bytes
            with self._buffer() as buffer:
                buffer.bytes[:size].view(part.dtype).view(rows.shape).copy_(rows)
                self._copy(out[begin : begin + step].view(-1).view(torch.uint8), buffer, size)

        self._all(piece, range(0, len(part), step))
        return out

    def _all(self, piece: Callable[[int], None], begins: range) -> None:
        started = [self._readers.submit(piece, begin) for begin in begins]
        wait(started)
        for done in started:
            done.result()

    @contextlib.contextmanager
    def _buffer(self) -> Iterator[_Buffer]:
        buffer = self._free.get()
        try:
            buffer.wait()
            yield buffer
        finally:
            self._free.put(buffer)

    def _copy(self, out: torch.Tensor, buffer: _Buffer, size: int) -> None:
        """Starts the copy. On a GPU the buffer is free when it is done."""
        out.copy_(buffer.bytes[:size], non_blocking=True)
        if self._device.type == "cuda":
            buffer.copied = torch.cuda.Event()
            buffer.copied.record(torch.cuda.current_stream(self._device))

    def _use_device(self) -> None:
        """Chooses the device in a thread, which starts with the first GPU."""
        if self._device.index is not None and self._device.type == "cuda":
            torch.cuda.set_device(self._device)


def _stretch(parts: Sequence[torch.Tensor]) -> tuple[int, int]:
    """Returns where in their common storage the parts begin and end, in elements.

    (0, 0): they have none in common.
    """
    first = parts[0]
    ends = []
    for part in parts:
        alike = part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr() and part.dtype == first.dtype
        if not alike or not part.numel():
            return 0, 0
        last = sum((length - 1) * step for length, step in zip(part.shape, part.stride(), strict=True))
        ends.append(int(part.storage_offset()) + last + 1)
    return min(int(part.storage_offset()) for part in parts), max(ends)


def _read(file: MappedFile, handle: int, buffer: torch.Tensor, offset: int) -> None:
    """Fills the buffer uint8 [N] from the file.

    Raises CheckpointError if it has fewer bytes, or cannot be read.
    """
    view, done = buffer.numpy().data, 0
    while done < len(view):
        try:
            count = os.preadv(handle, [view[done:]], offset + done)
        except OSError as error:
            raise CheckpointError(f"{file.path} cannot be read: {error.strerror or error}") from error
        if not count:
            raise CheckpointError(f"{file.path} ends within a tensor: it was changed while it was read")
        done += count
