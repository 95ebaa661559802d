"""What the loader reads from: the tensors of a checkpoint in one form, whatever the file's layout.

Canonical names are Hugging Face's, with gate and up as matrices of their own. Shapes of the experts' tensors:
    mlp.experts.{gate,up,down}_proj_bias                [E, R]
    mlp.experts.{gate,up,down}_proj_{blocks,scales}     as kernels/mxfp4.py, R rows of expert E (packed sources)
    mlp.experts.{gate,up,down}_proj                     [E, R, K] (others)
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from gptoss.kernels.mxfp4 import AlternatingMxfp4, GgufGateUp, GgufMxfp4, Mxfp4Tensor

Shape = tuple[int, ...]
StoredMatrices = tuple[AlternatingMxfp4 | GgufGateUp, Mxfp4Tensor | GgufMxfp4]  # W1 and W2 of a layer's experts
MADV_POPULATE_READ = 22  # linux/mman.h


class CheckpointError(Exception):
    """The checkpoint cannot be served. The message names the file and the tensor."""


class TensorSource(Protocol):
    """The checked tensors of a checkpoint."""

    packed: bool  # whether the experts' matrices are MXFP4
    files: tuple[MappedFile, ...]

    def part(self, name: str, *cut: slice) -> torch.Tensor:
        """The part of a canonical tensor that `cut` selects.

        It is a view of the mapped file where the layout allows. Raises CheckpointError if its bytes cannot be read.
        """
        ...

    def stored_experts(self, layer: int, experts: slice) -> StoredMatrices | None:
        """A layer's matrices as views of the mapped file, in its order; None if no kernel reads that."""
        ...

    def kv_scales(self, layer: int) -> tuple[float, float] | None:
        """What a layer's keys and values are divided by before they become FP8; None: it does not say."""
        ...


@dataclass(frozen=True, slots=True)
class FileState:
    """What shows that a file has not changed since it was opened."""

    path: Path
    num_bytes: int
    modified_ns: int

    @classmethod
    def of(cls, path: Path) -> FileState:
        """The state now. Raises CheckpointError if there is no such file."""
        try:
            status = path.stat()
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror or error}") from error
        return cls(path, status.st_size, status.st_mtime_ns)


def populate(tensors: Iterable[torch.Tensor]) -> None:
    """Reads the pages of mapped tensors, in the order of the files.

    The first steps would read them in small pieces, which takes a multiple of the time from a disk. Without effect
    before Linux 5.14.
    """
    madvise = getattr(ctypes.CDLL(None), "madvise", None)
    if madvise is None:
        return
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for begin, end in ranges_of(tensors):
        madvise(begin, end - begin, MADV_POPULATE_READ)


def ranges_of(tensors: Iterable[torch.Tensor]) -> list[tuple[int, int]]:
    """The addresses of the tensors' pages, neighbours as one range.

    After each call that releases the interpreter's lock, a thread waits for those that hold it.
    """
    ranges: list[tuple[int, int]] = []
    for tensor in sorted(tensors, key=torch.Tensor.data_ptr):
        begin, end = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE, tensor.data_ptr() + tensor.nbytes
        if ranges and begin <= ranges[-1][1] + mmap.PAGESIZE:
            begin, end = ranges[-1][0], max(ranges.pop()[1], end)
        ranges.append((begin, end))
    return ranges


class MappedFile:
    """A file whose pages are read when they are used, and shared by all processes that map it.

    A write to them is private to this process and does not reach the file.
    """

    def __init__(self, path: Path) -> None:
        """Raises CheckpointError if there is no such file."""
        self.path = path
        self.state = FileState.of(path)
        try:
            storage = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=self.state.num_bytes)
        except RuntimeError as error:
            raise CheckpointError(f"{path} cannot be mapped: {error}") from error
        assert isinstance(storage, torch.UntypedStorage)
        self._bytes = storage

    def view(self, dtype: torch.dtype, shape: Shape, offset: int) -> torch.Tensor:
        """A contiguous tensor over the bytes from `offset`; a copy if the type cannot begin there."""
        empty = torch.empty(0, dtype=dtype)
        size = empty.element_size()
        if offset % size:
            count = torch.Size(shape).numel() * size
            return self.view(torch.uint8, (count,), offset).clone().view(dtype).reshape(shape)
        strides = [1]
        for length in reversed(shape[1:]):
            strides.insert(0, strides[0] * length)
        return empty.set_(self._bytes, offset // size, shape, strides[: len(shape)])

    def offset_of(self, tensor: torch.Tensor) -> int | None:
        """Where a tensor begins in this file; None if it is elsewhere."""
        offset = tensor.data_ptr() - self._bytes.data_ptr()
        return offset if 0 <= offset < self.state.num_bytes and tensor.device.type == "cpu" else None

    def check_unchanged(self) -> None:
        """Raises CheckpointError if the file was changed, replaced or truncated since it was opened."""
        if FileState.of(self.path) != self.state:
            raise CheckpointError(f"{self.path} was changed while it was read: start the server again")
