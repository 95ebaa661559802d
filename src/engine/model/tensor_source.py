"""What the loader reads from: the tensors of a checkpoint in one form, whatever the file's layout.

Canonical names are Hugging Face's, with gate and up as matrices of their own. Shapes of the experts' tensors:
    mlp.experts.{gate,up,down}_proj_bias                [E, R]
    mlp.experts.{gate,up,down}_proj_{blocks,scales}     as kernels/mxfp4.py, R rows of expert E (packed sources)
    mlp.experts.{gate,up,down}_proj                     [E, R, K] (others)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

Shape = tuple[int, ...]


class CheckpointError(Exception):
    """The checkpoint cannot be served. The message names the file and the tensor."""


class TensorSource(Protocol):
    """The checked tensors of a checkpoint."""

    packed: bool  # whether the experts' matrices are MXFP4
    files: tuple[FileState, ...]

    def part(self, name: str, *cut: slice) -> torch.Tensor:
        """The part of a canonical tensor that `cut` selects.

        It is a view of the mapped file where the layout allows. Raises CheckpointError if its bytes cannot be read.
        """
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


def check_unchanged(source: TensorSource) -> None:
    """Raises CheckpointError if a file was changed, replaced or truncated since it was opened."""
    for opened in source.files:
        if FileState.of(opened.path) != opened:
            raise CheckpointError(f"{opened.path} was changed while it was read: start the server again")


def mapped_bytes(path: Path, num_bytes: int) -> torch.UntypedStorage:
    """Maps a file's bytes: pages are read when they are used.

    All processes that map the file share them. A write to them is private to this process and does not reach the file.
    """
    storage = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=num_bytes)
    assert isinstance(storage, torch.UntypedStorage)
    return storage


def typed_view(storage: torch.UntypedStorage, dtype: torch.dtype, shape: Shape, offset: int) -> torch.Tensor:
    """A contiguous tensor over mapped bytes. `offset` in bytes, a multiple of the element's size."""
    empty = torch.empty(0, dtype=dtype)
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * size)
    return empty.set_(storage, offset // empty.element_size(), shape, strides)
